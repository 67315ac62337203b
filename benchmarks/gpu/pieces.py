"""A file in pieces, for a way that takes only so many bytes at a time, and whole again.

    python pieces.py split FILE TARGET [--most 50000000]
    python pieces.py join FOLDER... TARGET

``split`` writes FILE's bytes as NAME.piece-1-of-2 and so on, and NAME.pieces.json with the SHA-256 of the whole.
``join`` finds the pieces in any of the folders and copies what else lies there; it refuses what is not whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

MOST = 50_000_000
ENDING = ".pieces.json"
_AT_ONCE = 2**22


def split(file: Path, target: Path, most: int = MOST) -> list[Path]:
    """Write a file as pieces of at most ``most`` bytes, and what joins them; gives all that was written."""
    target.mkdir(parents=True, exist_ok=True)
    size = file.stat().st_size
    count = max(1, -(-size // most))
    each = -(-size // count)
    names = [f"{file.name}.piece-{i}-of-{count}" for i in range(1, count + 1)]
    with open(file, "rb") as source:
        for name in names:
            (target / name).write_bytes(source.read(each))
    record = target / f"{file.name}{ENDING}"
    record.write_text(json.dumps({"name": file.name, "bytes": size, "sha256": sha256(file), "pieces": names}) + "\n")
    return [*(target / name for name in names), record]


def join(folders: Sequence[Path], target: Path) -> Path:
    """Put the files of some folders into one, those in pieces whole again.

    Raises:
        ValueError: a piece is missing, or the digest is another, naming the file.
    """
    target.mkdir(parents=True, exist_ok=True)
    files = {path.name: path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}
    records = [json.loads(path.read_text()) for name, path in files.items() if name.endswith(ENDING)]
    pieces = {name for record in records for name in record["pieces"]}
    for record in records:
        missing = [name for name in record["pieces"] if name not in files]
        if missing:
            raise ValueError(f"{missing[0]}: found in none of {', '.join(map(str, folders))}; bring that piece too")
        whole = target / Path(record["name"]).name
        with open(whole, "wb") as out:
            for name in record["pieces"]:
                with open(files[name], "rb") as piece:
                    shutil.copyfileobj(piece, out, _AT_ONCE)
        if sha256(whole) != record["sha256"]:
            raise ValueError(f"{whole.name}: its pieces give another SHA-256 than the whole had; bring them again")
    for name, path in files.items():
        if name not in pieces and not name.endswith(ENDING):
            shutil.copyfile(path, target / name)
    return target


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        sha = hashlib.sha256()
        while block := file.read(_AT_ONCE):
            sha.update(block)
    return sha.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    splitting = commands.add_parser("split")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("--most", type=int, default=MOST, help="bytes of a piece")
    joining = commands.add_parser("join")
    joining.add_argument("folders", type=Path, nargs="+")
    for one in (splitting, joining):
        one.add_argument("target", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "split":
            for path in split(options.file, options.target, options.most):
                print(f"{path}  {path.stat().st_size} bytes")
        else:
            print(join(options.folders, options.target))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
