"""Training steps over Optax: the same numbers on one device and on many, in one pass or in parts.

The loss of a batch is total / weight. Both add up, over microbatches and over devices, and so does
the gradient of the total; division comes last. So a step is right by construction wherever it runs:

    total, weight, gradient of the total        of every microbatch, on every device
    psum of all three                           one collective
    gradient / weight  ->  Optax  ->  params

The moments of the Batch Normalization layers are pooled in the same manner before they enter the
running statistics (see `jbn._core.deferral`), so these move once a step, by the whole batch.

A model is any function of (params, stats, batch): Flax linen, Flax nnx, or the core alone.
"""

from jbn._core.export import serializable as _serializable
from jbn.training.evaluation import evaluate
from jbn.training.loss_scale import LossScaleState, dynamic_loss_scale
from jbn.training.mean import Mean
from jbn.training.state import TrainState, init
from jbn.training.step import StepFn, make_train_step
from jbn.training.types import LossFn
from jbn.training.weight_decay import decay_mask

__all__ = [
    # The state of a training
    "TrainState",
    "init",
    # Its step
    "Mean",
    "LossFn",
    "StepFn",
    "make_train_step",
    # Metrics of a data set
    "evaluate",
    # Around optimizers of Optax
    "decay_mask",
    "dynamic_loss_scale",
    "LossScaleState",
]

for _container in (TrainState, Mean, LossScaleState):
    _container.__module__ = __name__  # pickle finds the class by this name, not by its file

_serializable(TrainState, Mean, LossScaleState)
