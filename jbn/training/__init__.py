"""Training steps over Optax: the same numbers on one device and on many, in one pass or in parts.

The loss of a batch is total / weight. Both add up, over microbatches and over devices, and so does
the gradient of the total; division comes last. So a step is right by construction wherever it runs:

    total, weight, gradient of the total        of every microbatch, on every device
    psum of all three                           one collective
    gradient / weight  ->  Optax  ->  params

The moments of the Batch Normalization layers are pooled in the same manner before they enter the
running statistics (see `jbn._deferred`), so these move once a step, by the whole batch.

A model is any function of (params, stats, batch): Flax linen, Flax nnx, or the core alone.
"""

from jbn.training.step import (
    LossScaleState,
    Mean,
    TrainState,
    decay_mask,
    dynamic_loss_scale,
    evaluate,
    init,
    make_train_step,
)

__all__ = [
    "TrainState",
    "init",
    "Mean",
    "make_train_step",
    "evaluate",
    "decay_mask",
    "dynamic_loss_scale",
    "LossScaleState",
]
