"""A field of adapter_config.json is another: the same numbers would be another map."""

import json
from pathlib import Path

from scene import CONFIG, adapter, answer, loaded

REFUSED = "contents do not match their digest: .*pattern \\('random', seed 7\\) does not come out the same"


def attack(place: Path) -> str:
    """What is said of it."""
    folder = adapter(place, pattern="random", off_diagonals=2)
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**fields, "seed": 7}))
    return answer(lambda: loaded(place, folder))
