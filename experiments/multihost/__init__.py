"""Training with several processes: ``python -m experiments.multihost``."""
