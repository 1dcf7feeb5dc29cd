"""The policy of `jax.checkpoint` by which the moments are saved for backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_NAME = "jbn.moments"
_policy = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names(_NAME),
)


def named(moments: Any) -> Any:
    """Gives `moments`, any tree of arrays, the name by which checkpoint policies know them."""
    leaves, tree = jax.tree.flatten(moments)
    leaves = [
        lax.complex(checkpoint_name(v.real, _NAME), checkpoint_name(v.imag, _NAME))
        if jnp.iscomplexobj(v)  # jax.checkpoint (to 0.12) can save real arrays only
        else checkpoint_name(v, _NAME)
        for v in leaves
    ]
    return jax.tree.unflatten(tree, leaves)


def checkpoint_policy(primitive: Any, *args: Any, **params: Any) -> Any:
    """Chooses what `jax.checkpoint(f, policy=jbn.checkpoint_policy)` saves for backward.

    It saves the results of convolutions and matrix products, and the moments of every Batch
    Normalization in f, [C] each. Normalisation, activations and all else are rematerialised; no
    convolution and no reduction over a batch is.

    >>> import jax, jax.numpy as jnp, jbn
    >>> def layer(x, kernel):
    ...     return jbn.normalize(x @ kernel, activation=jax.nn.relu)[0]
    >>> lean = jax.checkpoint(layer, policy=jbn.checkpoint_policy)
    >>> jax.grad(lambda x: lean(x, jnp.eye(2)).max())(jnp.array([[1.0, 2.0], [3.0, 2.0]])).shape
    (2, 2)

    With Flax: `nn.remat(Block, policy=jbn.checkpoint_policy)`, `nnx.remat(policy=...)(f)`.
    """
    return _policy(primitive, *args, **params)
