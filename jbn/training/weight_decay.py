"""A mask of the parameters for which weight decay is useful."""

from typing import Any

import jax

from jbn.training.types import Tree


def decay_mask(params: Tree) -> Tree:
    """Marks the arrays for which weight decay is useful: all that are not named `scale` or `bias`.

    Before a normalisation the size of a kernel only sets its effective learning rate, which decay
    keeps high. The scale and bias after it have no such role, nor do other biases.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> params = {"conv": {"kernel": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    >>> jbn.training.decay_mask(params)
    {'conv': {'kernel': True}, 'norm': {'scale': False}}
    >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=jbn.training.decay_mask)

    Args:
      params: linen's `params`, nnx's State of Param, or a tree with jbn.Params.

    Returns:
      A tree of bools, of the same structure: True where decay is useful.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in ("scale", "bias"), params
    )


def _name(path: tuple[Any, ...]) -> str | None:
    """Finds the innermost name in a path, but not the `value` of an nnx.Variable."""
    for entry in reversed(path):
        name = getattr(entry, "key", getattr(entry, "name", None))
        if isinstance(name, str) and name != "value":
            return name
    return None
