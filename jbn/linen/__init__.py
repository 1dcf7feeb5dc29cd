"""Flax linen modules. `BatchNorm` is Flax's own with jbn's statistics and derivatives.

Change one import, `from jbn.linen import BatchNorm`; models and checkpoints stay as they are.
`BatchRenorm` is Batch Renormalization with the same arguments and variables, and `steps`.
"""

from jbn.linen.batch_norm import BatchNorm
from jbn.linen.renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm"]

for _class in (BatchNorm, BatchRenorm):
    _class.__module__ = __name__  # pickle finds the class by this name, not by its file
