"""The paper's experiments, one command each: ``python -m benchmarks.paper NAME``."""
