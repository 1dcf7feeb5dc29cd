"""A scale of the loss, in the optimizer's state, so that float16 gradients do not vanish."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbn.training.types import Tree


class LossScaleState(NamedTuple):
    """The state of `dynamic_loss_scale`.

    Attributes:
      scale: [], float32: the factor of the loss.
      good_steps: [], int32: finite steps since the scale last changed.
      inner: the state of the wrapped optimizer.
    """

    scale: Array
    good_steps: Array
    inner: Tree


def dynamic_loss_scale(
    optimizer: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps float16 gradients from vanishing; `make_train_step` finds the scale in opt_state.

    The loss is multiplied by a scale, and the gradients are divided by it, in float32. A step whose
    gradients overflow is skipped and divides the scale by `factor`; `growth_interval` finite steps
    in a row multiply it. A skipped step changes only this scale and its counter of finite steps.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> optimizer = jbn.training.dynamic_loss_scale(optax.sgd(0.1), initial=1024)
    >>> print(optimizer.init({"kernel": jnp.ones(2)}).scale)
    1024.0

    Args:
      optimizer: receives the unscaled gradients.
      initial: the first scale.
      growth_interval: the number of finite steps after which the scale grows.
      factor: the scale grows and shrinks by it; a power of 2 rounds nothing.
      minimum: the smallest scale.

    Returns:
      An optimizer. bfloat16 has float32's range and does not need it.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Tree) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Tree, state: Any, params: Tree = None, *, finite: Array | None = None, **extra: Any
    ) -> tuple[Tree, LossScaleState]:
        finite = all_finite(updates) if finite is None else finite
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= growth_interval
        scale = jnp.where(
            finite, jnp.where(grows, state.scale * factor, state.scale), state.scale / factor
        )
        scale = jnp.clip(scale, minimum, 2.0**126)  # finite in float32
        return updates, LossScaleState(scale, jnp.where(grows, 0, good_steps), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Tree) -> Array:
    """Returns whether every number of the tree is finite: [], bool."""
    return functools.reduce(jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves(tree)))


def _is_loss_scale(node: Any) -> bool:
    return isinstance(node, LossScaleState)


def current_scale(opt_state: Tree) -> Array | None:
    """Finds the loss scale in the state of an optimizer; None where there is none.

    Raises:
      ValueError: there are several.
    """
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=_is_loss_scale) if _is_loss_scale(n)]
    if len(found) > 1:
        raise ValueError(
            f"opt_state has {len(found)} loss scales: wrap the whole optimizer once, "
            f"dynamic_loss_scale(optax.chain(...))."
        )
    return found[0].scale if found else None


def with_new_scale(old: Tree, new: Tree) -> Tree:
    """Puts the new loss scale into the old state of an optimizer."""

    def merge(old: Any, new: Any) -> Any:
        return new._replace(inner=old.inner) if _is_loss_scale(old) else old

    return jax.tree.map(merge, old, new, is_leaf=_is_loss_scale)
