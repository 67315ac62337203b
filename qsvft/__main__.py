"""``python -m qsvft``: the same as the command ``qsvft``, for launchers such as ``accelerate launch -m qsvft``."""

from .cli.main import app

app(prog_name="qsvft")
