"""The base weights and the factors, in memory and in files."""
