"""Of 1,000 damaged files each is what it was, or refused with its name: never another result, a crash, a raw error.

``make fuzz`` reads twenty times as many.
"""

import pytest
from read_damaged import cases

CASES, CHUNK = 1000, 250


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_what_is_damaged_is_as_before_or_refused_by_name(first, tmp_path):
    wrong = [found for found in cases(first, CHUNK, tmp_path) if found[-1] is not None]
    assert not wrong, "\n".join(f"{number} {door} {done}\n    {what}" for number, door, done, what in wrong)
