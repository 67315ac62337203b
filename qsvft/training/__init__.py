"""``qsvft train`` and what belongs to it: data, forecast, trainer, checkpoints; on TRL, datasets and transformers."""
