"""What a test needs of another package that the lowest version declared does not have yet."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def is_before(package, since):
    """Whether the installed version of a package is an older one."""
    return Version(version(package)) < Version(since)


def need(package, since, before):
    """Skip a test on an older version, saying what that one does or lacks."""
    if is_before(package, since):
        pytest.skip(f"{package} {version(package)}: before {since} it {before}")
