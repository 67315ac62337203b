"""bitsandbytes' wheel with the library of one CUDA version, a thirtieth of its size; card.sh unpacks it.

    python slim_wheel.py bitsandbytes-0.50.2-....whl TARGET [--cuda 130]

A wheel is a zip archive. Left out are the libraries for other CUDA versions and other makers' cards.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

_LIBRARY = re.compile(r"libbitsandbytes_(?!cpu\b)(\w+)\.so$")


def slim(wheel: Path, target: Path, cuda: str) -> Path:
    """Write the smaller wheel, under the same name.

    Raises:
        ValueError: it has no library for this CUDA version.
    """
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as source:
        libraries = {name: found[1] for name in source.namelist() if (found := _LIBRARY.search(name))}
        if f"cuda{cuda}" not in libraries.values():
            raise ValueError(
                f"{wheel.name}: has no library for cuda{cuda}, only {', '.join(sorted(libraries.values()))}"
            )
        with zipfile.ZipFile(target / wheel.name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
            for name in source.namelist():
                if libraries.get(name, f"cuda{cuda}") == f"cuda{cuda}":
                    out.writestr(name, source.read(name))
    return target / wheel.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--cuda", default="130", help="the version of torch.version.cuda, without the dot")
    options = parser.parse_args()
    try:
        path = slim(options.wheel, options.target, options.cuda)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {error}")
    print(f"{path}  {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
