"""Flax nnx modules. `BatchNorm` is Flax's own with jbn's statistics and derivatives.

Change one import, `from jbn.nnx import BatchNorm`; models and checkpoints stay as they are.
`BatchRenorm` is Batch Renormalization with the same arguments and variables, and `steps`.
`ConditionalBatchNorm` takes scale and bias at the call, and `SplitBatchNorm` has several sets of
statistics. `Whitening` whitens features jointly.
"""

from jbn.nnx.batch_norm import BatchNorm
from jbn.nnx.conditional import ConditionalBatchNorm
from jbn.nnx.renorm import BatchRenorm
from jbn.nnx.sets import SplitBatchNorm
from jbn.nnx.whitening import Whitening

__all__ = ["BatchNorm", "BatchRenorm", "ConditionalBatchNorm", "SplitBatchNorm", "Whitening"]

for _class in (BatchNorm, BatchRenorm, ConditionalBatchNorm, SplitBatchNorm, Whitening):
    _class.__module__ = __name__  # pickle finds the class by this name, not by its file
