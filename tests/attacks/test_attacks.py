"""No attack of this folder is let through, and each is refused in words that say what is wrong."""

import re

import pytest
from run_attacks import NAMES, script


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused(name, tmp_path):
    attack = script(name)
    said = attack.attack(tmp_path)
    assert re.search(attack.REFUSED, said), said
