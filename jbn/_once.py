"""Vectors of one number per feature, computed once and not for every value that they meet.

XLA puts what is computed on [C] into the pass over [..., C] that uses the result, and a CPU then
does it for each element: in Batch Normalization some 50 operations instead of 3. A barrier does not
help, as XLA for CPUs drops it.

This is a primitive of JAX, an identity, because with a choice by `jax.lax.platform_dependent` the
training step of ResNet-50 took a quarter longer to trace.
"""

import collections

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad, batching, mlir


def made_once(*vectors: Array) -> tuple[Array, ...]:
    """`vectors`, (1, ..., C) each, to be used in a pass over x.

    Linear, so that backwards it does the same. Without effect for a vector of which no other has
    the shape and dtype.
    """
    return tuple(_made_once.bind(*vectors))


def _together(*vectors: Array) -> list[Array]:
    """`vectors`, those that are alike from one array: XLA puts no concatenation into such a pass.

    The factor keeps it from seeing that the array is of no use.
    """
    alike = collections.defaultdict(list)
    for i, v in enumerate(vectors):
        alike[v.shape, v.dtype, jax.typeof(v).sharding].append(i)
    out = list(vectors)
    for (shape, dtype, _), places in alike.items():
        if len(places) > 1 and 1 in shape:
            axis = shape.index(1)
            together = lax.concatenate([vectors[i] for i in places], axis)
            together *= lax.optimization_barrier(jnp.ones((), dtype))
            for i, v in zip(places, lax.split(together, (1,) * len(places), axis), strict=True):
                out[i] = v
    return out


def _jvp(vectors, tangents):
    return _made_once.bind(*vectors), _made_once.bind(*map(ad.instantiate_zeros, tangents))


def _transpose(cotangents, *_):
    return _made_once.bind(*map(ad.instantiate_zeros, cotangents))


_made_once = jax.extend.core.Primitive("jbn_made_once")
_made_once.multiple_results = True
_made_once.def_impl(lambda *vectors: list(vectors))
_made_once.def_abstract_eval(lambda *avals: [aval.update(weak_type=False) for aval in avals])
ad.primitive_jvps[_made_once] = _jvp
ad.primitive_transposes[_made_once] = _transpose
batching.primitive_batchers[_made_once] = lambda vs, dims: (_made_once.bind(*vs), dims)
mlir.register_lowering(_made_once, lambda _, *vectors: vectors)
mlir.register_lowering(_made_once, mlir.lower_fun(_together, multiple_results=True), platform="cpu")
