"""qsvft: SVFT fine-tuning of quantised models, as a PEFT method.

    model = qsvft.prepare(model, bits=4)
    print(qsvft.profile("llama-3-8b"))
    print(qsvft.recommend("llama-3-8b", card_gib=8))

Importing this package registers the method with PEFT.
"""

from .options.started import is_the_command
from .version import __version__

if not is_the_command():
    from .public import *  # noqa: F403
    from .public import __all__ as _public

    __all__ = ["__version__", "train", *_public]  # noqa: F405


def __getattr__(name: str) -> object:
    if name == "train":  # imports TRL and datasets, which nothing else needs
        from .training.train import train

        return train
    raise AttributeError(f"module 'qsvft' has no attribute {name!r}")
