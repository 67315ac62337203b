#!/usr/bin/env bash
# Tests, memory and speed of qsvft on a CUDA card, without network. See README.md beside this file.
set -euo pipefail

usage="usage: run.sh [--wheels DIR] [--rehearse] [--output DIR] [tests] [memory] [speed] [decomposition] [summary]"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"

refuse() {
    echo "run.sh: $1" >&2
    exit 2
}

wheels=""
rehearse=""
forwarded=()
stages=()
while [ $# -gt 0 ]; do
    case "$1" in
        --wheels)
            [ $# -ge 2 ] || refuse "--wheels needs a directory"
            wheels="$2"
            shift
            ;;
        --output)
            [ $# -ge 2 ] || refuse "--output needs a directory"
            forwarded+=(--output "$2")
            shift
            ;;
        --rehearse)
            rehearse=yes
            forwarded+=(--rehearse)
            ;;
        -h | --help)
            echo "$usage"
            exit 0
            ;;
        tests | memory | speed | decomposition | summary) stages+=("$1") ;;
        -*) refuse "unknown option '$1'; $usage" ;;
        *) refuse "unknown stage '$1'; expected tests, memory, speed, decomposition or summary" ;;
    esac
    shift
done

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
fi
command -v "$python" >/dev/null || refuse "no interpreter '$python'; set PYTHON to one that has torch"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
site="$scratch/site"
mkdir -p "$site"
install=("$python" -m pip install --quiet --no-index --no-deps --no-cache-dir --disable-pip-version-check --target "$site")

if [ -n "$wheels" ]; then
    found=("$wheels"/*.whl)
    [ -e "${found[0]}" ] || refuse "no wheels in '$wheels'"
    "${install[@]}" "${found[@]}" || refuse "the wheels in '$wheels' could not be installed"
fi
# The wheels come first; qsvft itself is always the one of this checkout.
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"

# Saved adapters record the version of the installed distribution, so there has to be one. It is built
# from a copy, since building leaves files behind; without a recent setuptools its metadata do.
if ! "$python" -c "from importlib.metadata import version; version('qsvft')" 2>/dev/null; then
    mkdir "$scratch/source"
    cp -r "$root/qsvft" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$scratch/source"
    if "${install[@]}" --no-build-isolation "$scratch/source" 2>/dev/null; then
        rm -rf "$site/qsvft"
    else
        number="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/qsvft/version.py")"
        mkdir "$site/qsvft-$number.dist-info"
        printf 'Metadata-Version: 2.1\nName: qsvft\nVersion: %s\n' "$number" >"$site/qsvft-$number.dist-info/METADATA"
    fi
fi
export PATH="$site/bin:$PATH"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
export PYTHONDONTWRITEBYTECODE=1
if [ -n "$rehearse" ]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
fi
"$python" -W ignore "$here/stages.py" ${forwarded[@]+"${forwarded[@]}"} ${stages[@]+"${stages[@]}"}
