"""Textbook Batch Normalization in jax.numpy, which JAX differentiates by itself.

This is the second reference beside `oracle`. It gives derivatives of any order, in float64, and
the error of two passes over the data in float32, which is the unit of the tester's bounds. It
shares nothing with the library; `test_fuzz.py` compares it with the oracle.
"""

import math

import jax.numpy as jnp


def normalize(x, scale, bias, *, axis, epsilon=1e-5, w=None, groups=1, devices=1):
    """Computes (y, mean, var) of Algorithm 1, in x's dtype; mean and var are [groups, *C].

    Args:
      x: [N, ..., C].
      scale: [C], or None for 1.
      bias: [C], or None for 0.
      axis: the feature axes, a tuple.
      epsilon: as in the library.
      w: the weights of all positions, of x's shape; 0 is masked. None: all the same.
      groups: how many equal parts of the first reduced axis have statistics of their own.
      devices: how many partial sums each sum has. The order of additions decides the rounding.
    """
    features = tuple(sorted(a % x.ndim for a in axis))
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    parts = [x] if groups == 1 else jnp.split(x, groups, reduced[0])
    weights = [None] * groups if w is None else jnp.split(w, groups, reduced[0])
    results = [
        _group(x, scale, bias, epsilon, w, reduced, devices)
        for x, w in zip(parts, weights, strict=True)
    ]
    y, mean, var = zip(*results, strict=True)
    return jnp.concatenate(y, reduced[0]), jnp.stack(mean), jnp.stack(var)


def _group(x, scale, bias, epsilon, w, reduced, devices):
    def cut(values):
        return jnp.split(values, devices, reduced[0])

    def total(parts):
        return sum(jnp.sum(part, reduced, keepdims=True) for part in parts)

    def each(f, *parts):
        return [f(*at) for at in zip(*parts, strict=True)]

    x = cut(x)
    if w is None:
        n = sum(math.prod(part.shape[a] for a in reduced) for part in x)
        mean = total(x) / n
        z = each(lambda x: x - mean, x)
        var = total(each(jnp.square, z)) / n
    else:
        # Weights are divided by the largest of the feature, so that a common factor has no effect.
        largest = jnp.max(w, reduced, keepdims=True)
        some = largest > 0
        w = cut(w / jnp.where(some, largest, 1.0))
        count = jnp.where(some, total(w), 1.0)
        p = each(lambda w: w / count, w)
        inside = each(lambda x, w: jnp.where(w > 0, x, 0.0), x, w)
        mean = total(each(lambda p, x: p * x, p, inside))
        var = total(each(lambda p, x: p * (x - mean) ** 2, p, inside))
        # A masked position may hold anything; a feature without data gives its bias.
        z = each(lambda x, w: jnp.where(some & ((w > 0) | jnp.isfinite(x)), x - mean, 0.0), x, w)
    y = each(lambda z: z / jnp.sqrt(var + epsilon), z)
    y = y if scale is None else each(lambda y: y * jnp.expand_dims(scale, reduced), y)
    y = y if bias is None else each(lambda y: y + jnp.expand_dims(bias, reduced), y)
    return jnp.concatenate(y, reduced[0]), jnp.squeeze(mean, reduced), jnp.squeeze(var, reduced)


def inference(x, scale, bias, mean, var, *, axis, epsilon=1e-5):
    """Computes line 11 of Algorithm 2 with the given statistics, [C] each."""
    features = tuple(sorted(a % x.ndim for a in axis))
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    xhat = (x - jnp.expand_dims(mean, reduced)) / jnp.sqrt(jnp.expand_dims(var, reduced) + epsilon)
    y = xhat if scale is None else xhat * jnp.expand_dims(scale, reduced)
    return y if bias is None else y + jnp.expand_dims(bias, reduced)
