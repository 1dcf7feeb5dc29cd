"""jbn: Batch Normalization for JAX (Ioffe & Szegedy 2015, arXiv 1502.03167).

The pure functions, in the direction of the data::

    x --moments--> Moments --(sync)--> normalize --> y
                      |
    RunningStats -----+---- update ----> RunningStats

Flax modules live in `jbn.linen` and `jbn.nnx`, which this package does not import:
``import jbn`` costs jax alone.
"""

import os

from jbn._batch_norm import batch_norm, batch_norm_inference
from jbn._checkpoint import checkpoint_policy
from jbn._export import serializable as _serializable
from jbn._moments import moments
from jbn._normalize import Params, init_params, normalize
from jbn._pool import Moments, merge, pool
from jbn._running import RunningStats, UpdateRule, cumulative, ema, init_stats

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
    # What a backward pass keeps
    "checkpoint_policy",
]

_serializable(Params, RunningStats, Moments)

if os.environ.get("JBN_NATIVE", "0") not in ("", "0"):
    from jbn import native

    native.from_environment()
