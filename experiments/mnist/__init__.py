"""Figure 1 of the paper: ``python -m experiments.mnist``."""
