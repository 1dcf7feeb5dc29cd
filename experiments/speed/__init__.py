"""Times jbn beside other libraries: ``python -m experiments.speed``."""
