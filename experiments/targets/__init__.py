"""Kernels and bytes in compiled programs: ``python -m experiments.targets``."""
