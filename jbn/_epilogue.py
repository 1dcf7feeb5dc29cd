"""What follows Batch Normalization in a network: y = activation(bn(x) + residual).

Written behind the layer, `relu(bn(x) + residual)`, autodiff keeps what the derivative of the
activation needs: a mask as large as x, or the activation's whole input. Here the two are part of
the layer, and its backward pass computes that input again, from x and the moments: a multiply-add
in a pass that reads x anyway. The sum is taken in the accumulator's dtype and rounded once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jbn import _check
from jbn._reference import accumulator

Activation = Callable[[Array], Array]

_NAME = "jbn.moments"
_moments_saveable = jax.checkpoint_policies.save_only_these_names(_NAME)
_policy = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, _moments_saveable
)


def named(moments: Any) -> Any:
    """`moments`, any tree of arrays, under the name by which checkpoint policies know them."""
    return jax.tree.map(lambda values: checkpoint_name(values, _NAME), moments)


def checkpoint_policy(primitive: Any, *args: Any, **params: Any) -> Any:
    """What to keep for the backward pass: for `jax.checkpoint(f, policy=jbn.checkpoint_policy)`.

    Keeps the results of convolutions and matrix products, and the moments of every Batch
    Normalization in f, [C] each; normalisation, activations and the rest are computed again. No
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


class Epilogue(NamedTuple):
    """activation(y + residual); either may be None."""

    activation: Activation | None
    residual: Array | None

    def __bool__(self) -> bool:
        return self.activation is not None or self.residual is not None

    def dtype(self, x: DTypeLike, y: DTypeLike) -> DTypeLike:
        """What bn(x) is to be computed in, for a final result of dtype `y`."""
        return accumulator(x) if self else y

    def after(self, transform: Callable[..., tuple], dtype: DTypeLike) -> Callable[..., tuple]:
        """`transform`, whose first result is bn(x), such that this is y, of `dtype`."""
        if not self:
            return transform

        def fused(residual, *args):
            y, *others = transform(*args)
            if residual is not None:
                y = y + residual.astype(y.dtype)
            if self.activation is not None:
                y = _check.elementwise(self.activation(y), y)
            return y.astype(dtype), *others

        if self.activation is not None:
            # prevent_cse=False: the compiler may keep what it wants; only autodiff must not.
            fused = jax.checkpoint(fused, policy=_moments_saveable, prevent_cse=False)
        return lambda *args: fused(self.residual, *args)


def epilogue(activation: Activation | None, residual: ArrayLike | None, x: Array) -> Epilogue:
    """The checked epilogue of a layer whose input is x."""
    return Epilogue(_check.activation(activation), _check.residual(residual, x))
