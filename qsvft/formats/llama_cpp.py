"""llama.cpp's own converters, where they are installed: a directory in Hugging Face's format becomes one GGUF file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = "LLAMA_CPP"
"""The environment variable that says where llama.cpp is."""

MODEL, LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_MAGIC = b"GGUF"


def find_converter(script: str, folder: str | os.PathLike[str] | None) -> Path:
    """Where a converter is: in the folder that is given, in that of $LLAMA_CPP, or on the PATH.

    Args:
        script: :data:`MODEL` or :data:`LORA`.
        folder: a checkout of llama.cpp.

    Raises:
        ValueError: it is in none of them.
    """
    given = folder if folder is not None else os.environ.get(ENVIRONMENT)
    found = Path(given) / script if given else Path(shutil.which(script) or "")
    if not found.is_file():
        where = f"in {given}" if given else f"on the PATH, and ${ENVIRONMENT} is not set"
        raise ValueError(
            f"format='gguf' is written by llama.cpp's {script}; found none {where}, expected a checkout of it: git "
            "clone https://github.com/ggml-org/llama.cpp, and the packages of its requirements.txt. Give its folder: "
            f"llama_cpp= (--llama-cpp on the command line), or {ENVIRONMENT}; or export the format that it converts, "
            f"{'lora' if script == LORA else 'dense'}."
        )
    return found


def to_gguf(converter: Path, source: Path, target: Path, dtype: str, base: Path | None = None) -> None:
    """Run a converter.

    Args:
        converter: of :func:`find_converter`.
        source: the directory of a dense model or a LoRA.
        target: the file to write.
        dtype: of its matrices, by torch's name.
        base: of a LoRA, the directory with its base's config.json and tokenizer.

    Raises:
        ValueError: the converter ends with an error, or wrote no GGUF file; with its last words.
    """
    command = [sys.executable, str(converter), str(source), "--outfile", str(target), "--outtype", _TYPES[dtype]]
    if base is not None:
        command += ["--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "; ".join(done.stderr.strip().splitlines()[-3:]) or "no word"
        raise ValueError(
            f"{converter}: ended with exit code {done.returncode} ({last}); expected a GGUF file. It may not know this "
            "architecture, or lack a package of its requirements.txt. The format that it converts can be exported "
            "without it."
        )
    if not target.is_file() or not _begins(target):
        raise ValueError(
            f"{converter}: ended well, but wrote no GGUF file to {target}; expected one. Is it llama.cpp's?"
        )


def _begins(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC
