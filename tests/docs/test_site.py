"""docs/ builds into a site without a warning, and the site asks nothing of the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import ROOT

pytest.importorskip("mkdocs", reason="the site is built where the docs extra is installed, as make test does")


# Without --quiet, which would hide the warnings from --strict.
def build(root: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """The sources of the site, to be changed."""
    shutil.copytree(ROOT / "docs", tmp_path / "copy" / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path / "copy")
    return tmp_path / "copy"


def test_the_site_builds_and_needs_nothing_from_the_network(tmp_path):
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))  # and one for what is not found
    for page in pages:
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]*)"|<link[^>]*\bhref="([^"]*)"', page.read_text())
        assert [url for pair in fetched for url in pair if url.startswith(("http", "//"))] == []


@pytest.mark.parametrize(
    "link", ["[a](nowhere.md)", "[a](method.md#nowhere)", "[a](/method.md)", "![a](pictures/nowhere.svg)"]
)
def test_a_link_that_leads_nowhere_is_an_error(copy, tmp_path, link):
    page = copy / "docs" / "index.md"
    page.write_text(page.read_text() + f"\n{link}\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0 and "index.md" in done.stderr


def test_a_page_that_the_navigation_lacks_is_an_error(copy, tmp_path):
    (copy / "docs" / "more.md").write_text("# More\n")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0 and "more.md" in done.stderr


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in headings]
