"""What is built: a source archive, and of it a wheel that holds the package and nothing else.

Nothing is fetched: setuptools must be installed, as torch asks for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from importlib.metadata import EntryPoint, version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from qsvft.cli.main import app
from qsvft.version import __version__

ROOT = Path(__file__).resolve().parents[1]
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"

pytest.importorskip("setuptools", reason="what builds the packages is not installed")
if Version(version("setuptools")) < Version("77"):
    pytest.skip("pyproject.toml builds with setuptools 77 or newer", allow_module_level=True)


def build(folder: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, made of a copy, and the wheel, made of the archive."""
    folder = tmp_path_factory.mktemp("packages")
    copy = folder / "copy"
    for source in ("qsvft", "tests"):
        shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__", "from_before"))
    for source in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / source, copy)
    build(copy, "-c", SDIST, str(folder))
    [archive] = folder.glob("*.tar.gz")
    build(folder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(archive))
    [wheel] = folder.glob("*.whl")
    return archive, wheel


def sources() -> set[str]:
    """The files of the package, as they are in its folder."""
    found = (path.relative_to(ROOT).as_posix() for path in (ROOT / "qsvft").rglob("*") if path.is_file())
    return {name for name in found if "__pycache__" not in name}


def in_wheel(wheel: Path, ending: str) -> str:
    with ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(ending)]
        return file.read(name).decode()


def test_both_are_called_by_name_and_version_and_run_on_any_machine(built):
    archive, wheel = built
    assert archive.name == f"qsvft-{__version__}.tar.gz"
    assert wheel.name == f"qsvft-{__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with ZipFile(built[1]) as file:
        names = set(file.namelist())
    info = {name for name in names if name.startswith(f"qsvft-{__version__}.dist-info/")}
    assert names - info == sources()
    assert f"qsvft-{__version__}.dist-info/licenses/LICENSE" in info
    assert "qsvft/py.typed" in names


def test_the_archive_holds_what_builds_it_and_what_explains_it_and_no_tests(built):
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames() if not file.getmember(name).isdir()}
    made = {name for name in names if name.startswith("qsvft.egg-info/")}
    assert names - made == sources() | {
        *("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", "setup.cfg")
    }


def test_the_wheel_says_what_the_project_declares(built):
    said = message_from_string(in_wheel(built[1], ".dist-info/METADATA"))
    assert (said["Name"], said["Version"], said["Requires-Python"]) == ("qsvft", __version__, ">=3.10")
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = [Requirement(text) for text in said.get_all("Requires-Dist")]
    assert {"torch", "peft", "bitsandbytes", "transformers"} <= {one.name for one in asked if one.marker is None}
    assert [one for one in asked if f'"{one.name}{one.specifier}"' not in declared and one.name != "mkdocs"] == []
    assert set(said.get_all("Provides-Extra")) == {"test", "dev", "docs", "paper"}


def test_the_command_of_the_wheel_is_the_command_line(built):
    head, *commands = in_wheel(built[1], ".dist-info/entry_points.txt").split("\n")
    [(name, value)] = [line.split(" = ") for line in commands if line]
    assert (head, name) == ("[console_scripts]", "qsvft")
    assert EntryPoint(name, value, "console_scripts").load() is app
