"""Batch Normalization in jax.numpy as a textbook has it, which JAX differentiates by itself.

The second reference beside `oracle`: for derivatives of any order, in float64, and for the error
that two passes over the data have in float32, which is the unit of the tester's bounds. It shares
nothing with the library; `test_fuzz.py` holds it against the oracle.
"""

import jax.numpy as jnp


def normalize(x, scale, bias, *, axis, epsilon=1e-5, w=None, groups=1):
    """(y, mean, var) of algorithm 1, in x's dtype; mean and var are [groups, *C].

    Args:
      x: [N, ..., C].
      scale: [C], or None for 1.
      bias: [C], or None for 0.
      axis: the feature axes, a tuple.
      epsilon: as in the library.
      w: the weights of all positions, of x's shape; 0 is masked. None: all the same.
      groups: how many equal parts of the first reduced axis have statistics of their own.
    """
    features = tuple(sorted(a % x.ndim for a in axis))
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    parts = [x] if groups == 1 else jnp.split(x, groups, reduced[0])
    weights = [None] * groups if w is None else jnp.split(w, groups, reduced[0])
    results = [
        _part(x, scale, bias, epsilon, w, reduced) for x, w in zip(parts, weights, strict=True)
    ]
    y, mean, var = zip(*results, strict=True)
    return jnp.concatenate(y, reduced[0]), jnp.stack(mean), jnp.stack(var)


def _part(x, scale, bias, epsilon, w, reduced):
    if w is None:
        mean = jnp.mean(x, reduced, keepdims=True)
        var = jnp.mean((x - mean) ** 2, reduced, keepdims=True)
        some, z = jnp.ones_like(mean, bool), x - mean
    else:
        # Divided by the largest of the feature: weights with a common factor are the same weights.
        largest = jnp.max(w, reduced, keepdims=True)
        some = largest > 0
        w = w / jnp.where(some, largest, 1.0)
        p = w / jnp.where(some, jnp.sum(w, reduced, keepdims=True), 1.0)
        inside = jnp.where(w > 0, x, 0.0)
        mean = jnp.sum(p * inside, reduced, keepdims=True)
        var = jnp.sum(p * (inside - mean) ** 2, reduced, keepdims=True)
        # What a masked position holds may be anything; a feature without data shows its bias.
        z = jnp.where(some & ((w > 0) | jnp.isfinite(x)), x - mean, 0.0)
    xhat = z / jnp.sqrt(var + epsilon)
    y = xhat if scale is None else xhat * jnp.expand_dims(scale, reduced)
    y = y if bias is None else y + jnp.expand_dims(bias, reduced)
    return y, jnp.squeeze(mean, reduced), jnp.squeeze(var, reduced)


def inference(x, scale, bias, mean, var, *, axis, epsilon=1e-5):
    """Line 11 of algorithm 2: normalised by the statistics given, [C] each."""
    features = tuple(sorted(a % x.ndim for a in axis))
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    xhat = (x - jnp.expand_dims(mean, reduced)) / jnp.sqrt(jnp.expand_dims(var, reduced) + epsilon)
    y = xhat if scale is None else xhat * jnp.expand_dims(scale, reduced)
    return y if bias is None else y + jnp.expand_dims(bias, reduced)
