"""The parameters that weight decay is of use for."""

from typing import Any

import jax

from jbn.training.types import Tree


def decay_mask(params: Tree) -> Tree:
    """Marks where weight decay is of use: everywhere but in what is named `scale` or `bias`.

    Before a normalisation the size of a kernel only sets its effective learning rate, and decay
    keeps that up; the scale and bias after it have no such part, and neither have other biases.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> params = {"conv": {"kernel": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    >>> jbn.training.decay_mask(params)
    {'conv': {'kernel': True}, 'norm': {'scale': False}}
    >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=jbn.training.decay_mask)

    Args:
      params: linen's `params`, nnx's State of Param, or a tree with jbn.Params.

    Returns:
      A tree of the same structure, of bools: True where decay is of use.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in ("scale", "bias"), params
    )


def _name(path: tuple[Any, ...]) -> str | None:
    """Finds the innermost name in a path; not that of the array within an nnx.Variable."""
    for entry in reversed(path):
        name = getattr(entry, "key", getattr(entry, "name", None))
        if isinstance(name, str) and name != "value":
            return name
    return None
