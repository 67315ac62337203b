"""Checkpoints prepared on disk, one matrix at a time, without holding the model."""
