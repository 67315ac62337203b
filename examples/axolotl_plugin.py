"""axolotl trains adapters of qsvft: a plugin, with the options of ``qsvft.prepare`` in its YAML file.

    base_model: prepared            # of `qsvft prepare`, or a checkpoint, which is then quantised after it is loaded
    plugins: [axolotl_plugin.QSVFTPlugin]
    adapter: qsvft
    load_in_4bit: true
    learning_rate: 4e-2
    weight_decay: 0.0
    qsvft: {rank: 128}

The folder of this file has to be on PYTHONPATH. docs/plugins.md says what was tried.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel
from pydantic import BaseModel

import qsvft

NAME = "qsvft"


class QSVFTArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    qsvft: dict[str, Any] | None = None


class QSVFTPlugin(BasePlugin):
    """``adapter: qsvft``."""

    def get_input_args(self) -> str:
        """Where axolotl finds the new key."""
        return f"{QSVFTArgs.__module__}.{QSVFTArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """One adapter, which is no LoRA: axolotl's loader of those is not asked."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """A new adapter, or the one in ``lora_model_dir``; None leaves other adapters to axolotl.

        With ``config_only`` the trainer attaches it, to the base as axolotl loaded it, and the switches of
        ``qsvft.prepare`` are refused as unknown.
        """
        if cfg.adapter != NAME:
            return None
        options = {"task_type": "CAUSAL_LM", **(cfg.qsvft or {})}
        if config_only:
            return None, qsvft.QSVFTConfig(**options)
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            bits = 4 if cfg.load_in_4bit else 8 if cfg.load_in_8bit else 16
            checkpointing = {"gradient_checkpointing": bool(cfg.gradient_checkpointing)}
            loaded = qsvft.prepare(model, bits, **{**checkpointing, **options})
        return loaded, loaded.peft_config["default"]
