#!/usr/bin/env bash
# Everything worth measuring on a CUDA card that is there for minutes. See README.md beside this file.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"

refuse() {
    echo "card.sh: $1" >&2
    exit 2
}

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
fi
command -v "$python" >/dev/null || refuse "no interpreter '$python'; set PYTHON to one that has torch"
started="$("$python" -c 'import time; print(time.time() - 1)')" # about when this script began

wheels=""
forwarded=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels)
            [ $# -ge 2 ] || refuse "--wheels needs a directory"
            wheels="$2"
            shift
            ;;
        --rehearse)
            forwarded+=(--rehearse)
            export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
            ;;
        *) forwarded+=("$1") ;;
    esac
    shift
done

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ]; then
    found=("$wheels"/*.whl)
    [ -e "${found[0]}" ] || refuse "no wheels in '$wheels'"
    for wheel in "${found[@]}"; do # a wheel is a zip archive, and unpacked it can be imported
        "$python" -m zipfile -e "$wheel" "$scratch" || refuse "'$wheel' could not be unpacked"
    done
fi
# Saved adapters record the version of the installed distribution, so there has to be one.
if ! "$python" -c "from importlib.metadata import version; version('qsvft')" 2>/dev/null; then
    number="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/qsvft/version.py")"
    mkdir "$scratch/qsvft-$number.dist-info"
    printf 'Metadata-Version: 2.1\nName: qsvft\nVersion: %s\n' "$number" >"$scratch/qsvft-$number.dist-info/METADATA"
fi
# The wheels come first; qsvft itself is always the one of this checkout.
export PYTHONPATH="$scratch:$root:$here${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONDONTWRITEBYTECODE=1
status=0
"$python" -W ignore "$here/card.py" --started "$started" ${forwarded[@]+"${forwarded[@]}"} || status=$?
exit "$status"
