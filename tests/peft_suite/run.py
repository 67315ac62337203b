"""PEFT's own tests, on adapters of ours: what they ask of every method, asked of this one.

    make peft-suite                                    or: python tests/peft_suite/run.py [-k WORDS]

The tests are taken from the source distribution of the PEFT that is installed, into ``.peft-suite``; none of them lies
here. Each list that they are parametrised with is replaced by the cases of ``cases.py``, and every model id by a small
model of the same family made by ``models.py``: no hub is asked. What fails without being our fault stands in
``exceptions.py``, one by one with its reason. Exit code 1: something else fails, or one of these passes.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / ".peft-suite"
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_lora_conversion.py",
    "test_low_level_api.py",
    "test_quantization.py",
)
LISTS = {
    "TEST_CASES",
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    "MIXED_ADAPTER_TEST_CASES",
    "ALL_CONFIGS",
    "TOKEN_CLS_CONFIGS",
    "QA_CONFIGS",
}
"""What tests are parametrised with, by its name in their modules."""


WRITTEN: dict[str, dict[str, str]] = {
    "test_custom_models.py": {
        r'"LoRA (mixed .*)",\s+LoraConfig\((.*)\),\s+LoraConfig\(': r'"QSVFT \1", _our(\2), _our(',
        r'"LoRA (mixed batch .*)",\s+LoraConfig\(': r'"QSVFT \1", _our(',
    },
    "test_lora_conversion.py": {
        r"class TestLoraConversion\b": "class TestLoraConversionOfQSVFT",
        r"LoKrConfig\(|C3AConfig\(block_size=4, ": "_our(",
        "c3a_only": "qsvft_only",
        r'rsplit\("\.", 2\)(.* in lokr_state_dict.* if )"\.lokr"': r'rsplit(".", 3)\1".qsvft_M"',
        r"weight shape \(16\)": "weight shape (32)",
    },
    "test_low_level_api.py": {
        r"^ +LoraConfig\(\),": '_our(target_modules=r".*\\.(q_proj|v_proj|query|value)"),',
        r'del sd_before\["(.*)\.lora_A\.weight"\]': r'[sd_before.pop(key) for key in list(sd_before) if r"\1" in key]',
        r'del sd_before\[".*\.lora_B\.weight"\]': "",
        r"\bLoraConfig\(": "_our(",
        "class Test": "class TestQSVFT",
        r'"lora_[AB]"': '"qsvft_M"',
        r"\.lora_[AB]\b": ".qsvft_M",
        '"lora" in': '"qsvft" in',
        r"\{LoraConfig: .*\}\[config_cls\]": '"qsvft_"',
        r"\[LoraConfig, LoKrConfig\]": "[_our]",
    },
    "test_quantization.py": {"class TestQuantization": "class TestQuantizationOfQSVFT"},
}
"""What tests name themselves, as regular expressions, and what stands there in place of it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only tests with these words in their names, as for pytest")
    options = parser.parse_args(arguments)
    tests = theirs(version("peft"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(tests.parent)]), "HF_HUB_OFFLINE": "1"}
    words = f"QSVFT and ({options.k})" if options.k else "QSVFT"
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "-rfE", "-k", words]
    command += ["--rootdir", str(tests.parent), "-c", os.devnull, *(str(tests / name) for name in FILES)]
    return subprocess.run(command, env=environment, cwd=tests.parent, check=False).returncode


def theirs(release: str) -> Path:
    """The folder with PEFT's tests of a release, each list in them replaced."""
    folder = WORK / release
    tests = folder / "tests"
    if not list(folder.glob("peft-*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--no-build-isolation", "-d", str(folder), f"peft=={release}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        inner = f"peft-{release}/tests/"
        for member in archive.getmembers():
            if member.isfile() and member.name.startswith(inner) and member.name.count("/") == 2:
                member.name = member.name.removeprefix(inner)
                archive.extract(member, tests, filter="data")
    for name in FILES:
        (tests / name).write_text(with_our_cases((tests / name).read_text(), name))
    with (tests / "testing_utils.py").open("a") as file:  # it would go back to the hub now and then
        file.write("from contextlib import nullcontext as hub_online_once\n")
    (tests / "__init__.py").touch()
    return tests


def with_our_cases(source: str, name: str) -> str:
    """A test module in which every list that its tests are parametrised with is replaced once it is made, and what
    its tests name themselves."""
    for old, new in WRITTEN.get(name, {}).items():
        source = re.sub(old, new, source, flags=re.MULTILINE)
    source = source.replace(
        "import pytest\n", "import cases as _cases\nfrom cases import configured as _our\nimport pytest\n", 1
    )
    lines = source.splitlines()
    found = [
        (node.end_lineno, target.id)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in LISTS
    ]
    for end, target in sorted(found, reverse=True):
        lines.insert(end or 0, f"{target} = _cases.ours({name!r}, {target!r}, {target})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
