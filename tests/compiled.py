"""The library's functions under jit; arguments that are no arrays are static.

All calls with the same shapes share one compilation; eager calls would compile each operation.
"""

import functools

import jax
import jax.numpy as jnp

import jbn

_REDUCE = ("axis", "axis_name", "axis_index_groups", "groups")

moments = jax.jit(jbn.moments, static_argnames=_REDUCE)
merge = jax.jit(jbn.merge)
normalize = jax.jit(jbn.normalize, static_argnames=(*_REDUCE, "epsilon"))
batch_norm = jax.jit(jbn.batch_norm, static_argnames=(*_REDUCE, "epsilon", "update"))
batch_norm_inference = jax.jit(jbn.batch_norm_inference, static_argnames=("axis", "epsilon"))


@functools.partial(jax.jit, static_argnames=("axis", "epsilon", "groups"))
def vjp(x, scale, bias, dy, dmean=None, dvar=None, **kwargs):
    """Returns (y, moments, gradient of sum(dy y) + sum(dmean mean) + sum(dvar var))."""

    def outputs(x, scale, bias):
        y, m = jbn.normalize(x, scale, bias, **kwargs)
        return (y, m.mean, m.var), m

    (y, mean, var), pull, m = jax.vjp(outputs, x, scale, bias, has_aux=True)
    dmean = jnp.zeros_like(mean) if dmean is None else dmean
    dvar = jnp.zeros_like(var) if dvar is None else dvar
    return y, m, pull((dy, dmean, dvar))
