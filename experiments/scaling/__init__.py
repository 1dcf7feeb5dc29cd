"""Few images a device: ``python -m experiments.scaling``."""
