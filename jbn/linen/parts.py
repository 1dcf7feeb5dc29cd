"""Parts that the linen modules share: the switch, the parameters, the running statistics."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core.normalize import Params
from jbn._core.running import RunningStats

# These are functions, not methods, because Flax wraps and records every method of a module.


def inference_wanted(module: Any, use_running_average: bool | None) -> bool:
    """Chooses between the field of the module and the argument of the call."""
    _flax.refuse_array_as_switch(use_running_average)
    return _flax.inference_wanted(
        nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    )


def declare_params(module: Any, shape: tuple[int, ...]) -> Params:
    """Declares the parameters scale and bias, drawn in this order as in Flax."""

    def param(name: str, used: bool, init: jax.nn.initializers.Initializer) -> Array | None:
        return module.param(name, init, shape, module.param_dtype) if used else None

    return Params(
        param("scale", module.use_scale, module.scale_init),
        param("bias", module.use_bias, module.bias_init),
    )


def declare_statistics(
    module: Any,
    shape: tuple[int, ...],
    *others: Dtype | None,
    inference: bool,
    dtype: Dtype = jnp.float32,
) -> list[nn.Variable[Array]]:
    """Declares mean, var and, if batches are counted, count, in `batch_stats`, in `dtype`.

    The mean is complex if one of the dtypes `others` is. A new count starts at 0.
    """
    mean = _flax.mean_dtype(dtype, *others)
    initial: dict[str, tuple[Callable[..., Array], Any]]
    initial = {"mean": (jnp.zeros, mean), "var": (jnp.ones, jnp.finfo(dtype).dtype)}
    if module.update is not None and (module.is_initializing() or not inference):
        initial["count"] = (jnp.zeros, jnp.float32)  # half precision could not count
    return [
        module.variable("batch_stats", name, init, shape, dtype)
        for name, (init, dtype) in initial.items()
    ]


def read(variables: Sequence[nn.Variable[Array]]) -> RunningStats:
    """Returns the statistics; a count that is not declared is 0."""
    mean, var, *count = (v.value for v in variables)
    return RunningStats(mean, var, *(count or [jnp.zeros(var.shape, jnp.float32)]))


def store(variables: Sequence[nn.Variable[Array]], stats: Sequence[Array] | None) -> None:
    """Stores the statistics, if there are new ones, in the variables that are declared."""
    for variable, value in zip(variables, stats or (), strict=False):
        variable.value = value
