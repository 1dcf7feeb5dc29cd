"""Flax nnx modules. `BatchNorm` is Flax's own with jbn's statistics and derivatives.

Change one import, `from jbn.nnx import BatchNorm`; models and checkpoints stay as they are.
`Whitening` whitens features jointly.
"""

from jbn.nnx.batch_norm import BatchNorm
from jbn.nnx.whitening import Whitening

__all__ = ["BatchNorm", "Whitening"]

for _class in (BatchNorm, Whitening):
    _class.__module__ = __name__  # pickle finds the class by this name, not by its file
