"""Figure 2 of the paper: ``python -m experiments.inception``."""
