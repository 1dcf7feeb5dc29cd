"""Small and sorted batches: ``python -m experiments.batches``."""
