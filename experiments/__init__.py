"""Questions about Batch Normalization, one file each: ``python -m experiments.NAME``."""
