"""A finished directory: transformers' side of it."""
