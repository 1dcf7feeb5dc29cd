"""Flax nnx modules. `BatchNorm` is Flax's own with jbn's statistics and derivatives.

Change one import, `from jbn.nnx import BatchNorm`; models and checkpoints stay as they are.
`BatchRenorm` is Batch Renormalization with the same arguments and variables, and `steps`.
"""

from jbn.nnx.batch_norm import BatchNorm
from jbn.nnx.renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm"]

for _class in (BatchNorm, BatchRenorm):
    _class.__module__ = __name__  # pickle finds the class by this name, not by its file
