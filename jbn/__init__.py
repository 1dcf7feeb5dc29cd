"""jbn: Batch Normalization for JAX (Ioffe & Szegedy 2015, arXiv 1502.03167).

The pure functions, in the direction of the data::

    x --moments--> Moments --(sync)--> normalize --> y
                      |
    RunningStats -----+---- update ----> RunningStats

Flax modules live in `jbn.linen` and `jbn.nnx`, which this package does not import:
``import jbn`` costs jax alone.
"""

import os

from jbn._core.batch_norm import batch_norm, batch_norm_inference
from jbn._core.export import serializable as _serializable
from jbn._core.moments import moments
from jbn._core.normalize import Params, init_params, normalize
from jbn._core.pooling import merge, pool
from jbn._core.running import RunningStats, UpdateRule, cumulative, ema, init_stats
from jbn._core.types import Moments
from jbn._xla.checkpoint import checkpoint_policy

__version__ = "0.1.0"

__all__ = [
    # Parameters and state
    "Params",
    "init_params",
    "RunningStats",
    "init_stats",
    # x -> Moments -> y
    "Moments",
    "moments",
    "merge",
    "pool",
    "normalize",
    # RunningStats, Moments -> RunningStats
    "UpdateRule",
    "ema",
    "cumulative",
    # The composition: training and inference
    "batch_norm",
    "batch_norm_inference",
    # The arrays that are saved for backward
    "checkpoint_policy",
]

_serializable(Params, RunningStats, Moments)

if os.environ.get("JBN_NATIVE", "0") not in ("", "0"):
    from jbn import native

    native.from_environment()
