"""What devices tell each other: ``python -m experiments.collectives``."""
