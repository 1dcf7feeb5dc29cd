"""Flax linen modules. `BatchNorm` is Flax's own with jbn's statistics and derivatives.

Change one import, `from jbn.linen import BatchNorm`; models and checkpoints stay as they are.
`Whitening` whitens features jointly.
"""

from jbn.linen.batch_norm import BatchNorm
from jbn.linen.whitening import Whitening

__all__ = ["BatchNorm", "Whitening"]

for _class in (BatchNorm, Whitening):
    _class.__module__ = __name__  # pickle finds the class by this name, not by its file
