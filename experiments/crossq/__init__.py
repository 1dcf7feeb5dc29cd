"""CrossQ with sbx's layer and with jbn's: ``python -m experiments.crossq``."""
