"""Parts that the nnx modules share: the switch, and the running statistics as variables."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core.running import RunningStats


def inference_wanted(module: Any, use_running_average: bool | None) -> bool:
    """Chooses between the argument of the call and that of the constructor."""
    _flax.refuse_array_as_switch(use_running_average)
    inference = first_from(
        use_running_average,
        module.use_running_average,
        error_msg=f"{type(module).__name__} needs use_running_average=True or False, in the "
        f"constructor or in the call; or call model.train() or model.eval() first, or "
        f"nnx.view(model, ...).",
    )
    return _flax.inference_wanted(inference)


class WithStatistics(nnx.Module):
    """The base of modules with `mean`, `var` and, under an update rule, `count`."""

    update: Any

    def make_statistics(self, shape: tuple[int, ...], *others: Dtype | None) -> None:
        """Makes mean 0 and variance 1, in float32; complex if one of the dtypes `others` is."""
        self.mean = nnx.BatchStat(jnp.zeros(shape, _flax.mean_dtype(jnp.float32, *others)))
        self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; an update rule, also on an existing layer, adds a `count` of 0."""
        super().__setattr__(name, value)
        if name == "update" and value is not None and not hasattr(self, "count"):
            self.count = nnx.BatchStat(jnp.zeros(self.mean.shape, jnp.float32))

    def statistics(self, *, counts: bool) -> list[nnx.BatchStat]:
        """Returns the variables: mean, var and, if the rule counts batches, count."""
        return [self.mean, self.var, *([self.count] if counts and self.update is not None else [])]


def read(variables: Sequence[nnx.BatchStat]) -> RunningStats:
    """Returns the statistics; a count that is not among the variables is 0."""
    mean, var, *count = (v.get_value() for v in variables)
    return RunningStats(mean, var, *(count or [jnp.zeros(var.shape, jnp.float32)]))


def store(variables: Sequence[nnx.BatchStat], stats: Sequence[Array] | None) -> None:
    """Stores the statistics, if there are new ones, in the variables."""
    for variable, value in zip(variables, stats or (), strict=False):
        if isinstance(value, Array) and variable.dtype == value.dtype:
            variable[...] = value
        else:  # the mean of the first complex batch, or a deferred update
            variable.set_value(value)
