"""Anybody's checkpoint, as this model's tensors."""
