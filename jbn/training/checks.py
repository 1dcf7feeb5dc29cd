"""Checks of arguments and of loss_fn's results; every error tells what to write instead."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax

from jbn._core.axes import integer
from jbn._core.deferral import is_typed
from jbn._devices.named_axes import varying
from jbn.training.mean import Mean, as_mean
from jbn.training.types import Tree


def check_function(name: str, value: Any, signature: str) -> None:
    """Refuses a value that cannot be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {type(value).__name__}.")


def check_optimizer(value: Any) -> None:
    """Refuses a value that is no optimizer, such as the function of Optax that makes one."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(
            f"optimizer must be one of Optax's, such as optax.sgd(0.1), called with its "
            f"arguments; got {name}."
        )


def check_microbatches(value: Any) -> int:
    """Refuses a value that is not a positive integer."""
    number = integer(value)
    if number is None:
        raise TypeError(
            f"microbatches must be an integer, such as 4: how many parts of the batch go through "
            f"the model one after the other; got {value!r}."
        )
    if number < 1:
        raise ValueError(f"microbatches must be at least 1; got {number}.")
    return number


def check_output(returned: Any) -> tuple[Mean, Tree, dict[str, Mean]]:
    """Checks that loss_fn returned (loss, stats, metrics); makes every number a Mean."""
    if not isinstance(returned, tuple) or len(returned) != 3:
        what = (
            f"a tuple of {len(returned)}" if isinstance(returned, tuple) else repr(type(returned))
        )
        raise TypeError(
            f"loss_fn must return (loss, stats, metrics); got {what}. Without metrics write "
            f"return loss, stats, {{}}."
        )
    loss, stats, metrics = returned
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"the metrics that loss_fn returns must be a dictionary, perhaps empty; got "
            f"{type(metrics).__name__}."
        )
    reserved = {"loss", "skipped", "loss_scale"} & set(metrics)
    if reserved:
        raise ValueError(
            f"the metrics {sorted(reserved)} are the step's own: name yours otherwise."
        )
    loss = as_mean("the loss", loss)
    if loss.total.shape or loss.weight.shape:
        raise ValueError(
            f"the loss must be the mean over the batch, of shape (); got total and weight of "
            f"shapes {loss.total.shape} and {loss.weight.shape}. Write losses.mean(), or "
            f"jbn.training.Mean((losses * mask).sum(), mask.sum())."
        )
    return loss, stats, {name: as_mean(f"metric {name!r}", v) for name, v in metrics.items()}


def _varying_leaves(tree: Tree, names: tuple[Any, ...]) -> list[str]:
    """Returns the paths of the arrays that JAX knows to be device-varying."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if varying(leaf) & set(names)]


def check_replicated(state: Tree, names: tuple[Any, ...]) -> None:
    """Refuses a device-varying state."""
    for path in _varying_leaves(state, names):
        raise ValueError(
            f"state{path} varies over axis_name={names}: every device must hold the same state. "
            f"Give shard_map in_specs=(P(), P({names[0]!r})) for (state, batch)."
        )


def check_synchronised(stats: Tree, names: tuple[Any, ...]) -> None:
    """Refuses device-varying new statistics."""
    for path in _varying_leaves(stats, names):
        raise ValueError(
            f"the new statistics at {path} differ between the devices of axis_name={names}: the "
            f"layer normalises on each device alone. Give the layer axis_name too, or leave out "
            f"pool_stats=False."
        )


def check_axes(new: Tree, shared: list[Any], names: tuple[Any, ...]) -> None:
    """Refuses layers that share statistics over an axis over which the step adds up nothing."""
    for name in shared:
        if name in names or lax.axis_size(name) == 1:
            continue
        if is_typed(name) and not _varying_leaves(new, (name,)):
            continue  # JAX knows that all devices do the same step
        wanted = (*names, name) if names else name
        raise ValueError(
            f"layers share their statistics over axis_name={name!r}, which is bound outside of "
            f"the step, but the step adds up gradients over "
            f"{'axis_name=' + repr(names) if names else 'no axis'}: the parameters of the devices "
            f"would drift apart. Write make_train_step(..., axis_name={wanted!r})."
        )
