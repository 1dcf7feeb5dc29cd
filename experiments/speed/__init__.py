"""Times beside other libraries: ``python -m experiments.speed``."""
