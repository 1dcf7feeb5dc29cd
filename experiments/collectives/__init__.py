"""Counts the collectives of compiled programs: ``python -m experiments.collectives``."""
