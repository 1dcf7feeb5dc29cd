"""The paper's other remarks on its networks: ``python -m experiments.inception_beyond``."""
