"""Batch Normalization in NumPy float64, from the equations of the paper (arXiv 1502.03167).

Nothing here is fast or clever, and nothing is shared with the library. There are two passes over
the data, the backward pass of section 3 with weights, and the running averages as plain sums.
`test_oracle.py` compares the backward pass with finite differences of the forward pass.

Arrays per channel have the sizes of the feature axes, in the order of x's axes. A position with
weight 0 is masked: it takes no part in the statistics, and is normalised by them. A value that is
not finite there is normalised to 0.
"""

import functools
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """The weighted count, mean and biased variance of every channel."""

    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Running(NamedTuple):
    """Running statistics: mean and variance, and the number of batches in them."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray


def axes(ndim: int, axis: int | tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (feature axes, reduced axes), both ascending."""
    given = (axis,) if isinstance(axis, int) else axis
    features = tuple(sorted(a % ndim for a in given))
    return features, tuple(a for a in range(ndim) if a not in features)


def _wide(reduced, values):
    """Expands values per channel so that they broadcast against x."""
    return np.expand_dims(np.asarray(values, np.float64), reduced)


def position_weights(x, mask=None, weights=None):
    """Returns the weight of every position of x; 0 is masked."""
    w = np.ones(x.shape)
    if mask is not None:
        w = w * np.asarray(mask, np.float64)
    if weights is not None:
        w = w * np.asarray(weights, np.float64)
    return w


def moments(x, axis=-1, mask=None, weights=None) -> Moments:
    """Computes lines 1 and 2 of Algorithm 1, sum(p x) and sum(p (x - mean)^2), p = w / sum(w)."""
    w = position_weights(x, mask, weights)
    x = np.where(w > 0, np.asarray(x, np.float64), 0.0)
    reduced = axes(x.ndim, axis)[1]
    count = w.sum(reduced)
    some = np.where(count > 0, count, 1.0)
    mean = (w * x).sum(reduced) / some
    var = (w * (x - np.expand_dims(mean, reduced)) ** 2).sum(reduced) / some
    return Moments(count, mean, var)


def merge(a: Moments, b: Moments) -> Moments:
    """Merges the moments of two batches by their sums of x and of x^2."""
    count = a.count + b.count
    some = np.where(count > 0, count, 1.0)
    mean = (a.count * a.mean + b.count * b.mean) / some
    square = (a.count * (a.var + a.mean**2) + b.count * (b.var + b.mean**2)) / some
    return Moments(count, mean, square - mean**2)


def affine(x, mean, var, scale=None, bias=None, axis=-1, epsilon=1e-5):
    """Computes lines 3 and 4 of Algorithm 1, or by population statistics line 11 of Algorithm 2."""
    reduced = axes(np.ndim(x), axis)[1]
    wide = functools.partial(_wide, reduced)
    xhat = (np.asarray(x, np.float64) - wide(mean)) / np.sqrt(wide(var) + epsilon)
    y = xhat if scale is None else wide(scale) * xhat
    return y if bias is None else y + wide(bias)


def normalize(x, scale=None, bias=None, axis=-1, epsilon=1e-5, mask=None, weights=None):
    """Computes (y, moments) of Algorithm 1; masked positions are normalised, too.

    A channel without any weight has no statistics, and y is its bias.
    """
    m = moments(x, axis, mask, weights)
    x = np.where(_is_constant(x, mask, weights), _wide(axes(x.ndim, axis)[1], m.mean), x)
    scale = np.where(m.count > 0, 1.0 if scale is None else scale, 0.0)
    return affine(x, m.mean, m.var, scale, bias, axis, epsilon), m


def _is_constant(x, mask, weights):
    """Tells where y does not depend on x: at masked positions that are not finite."""
    return (position_weights(x, mask, weights) == 0) & ~np.isfinite(np.asarray(x, np.float64))


def vjp(x, scale, bias, dy, dmean, dvar, axis=-1, epsilon=1e-5, mask=None, weights=None):
    """Computes (dx, dscale, dbias) of the loss sum(dy y) + sum(dmean mean) + sum(dvar var).

    This is the chain of section 3 with p = w / sum(w) for 1/m and cotangents of the moments:

        dxhat = dy scale
        dvar  = sum(dxhat (x - mean)) (-1/2) (var + eps)^(-3/2)  + dvar given
        dmean = sum(dxhat) (-1) (var + eps)^(-1/2)               + dmean given
        dx    = dxhat (var + eps)^(-1/2) + dvar 2 (x - mean) p + dmean p

    In a channel without any weight y is the bias, whatever x and scale are.
    """
    w = position_weights(x, mask, weights)
    m = moments(x, axis, mask, weights)
    reduced = axes(x.ndim, axis)[1]
    wide = functools.partial(_wide, reduced)
    p = w / wide(np.where(m.count > 0, m.count, 1.0))
    constant = _is_constant(x, mask, weights) | (wide(m.count) == 0)
    centred = np.where(constant, wide(m.mean), np.asarray(x, np.float64)) - wide(m.mean)
    std = np.sqrt(m.var + epsilon)
    dy = np.asarray(dy, np.float64)
    dxhat = np.where(constant, 0.0, dy) * (1.0 if scale is None else wide(scale))
    dvar = dvar - 0.5 * (dxhat * centred).sum(reduced) / std**3
    dmean = dmean - dxhat.sum(reduced) / std
    dx = dxhat / wide(std) + wide(dvar) * 2 * centred * p + wide(dmean) * p
    return dx, (dy * centred).sum(reduced) / std, dy.sum(reduced)


def renorm(x, scale, bias, old, r_max, d_max, axis=-1, epsilon=1e-5, **support):
    """Computes (y, moments, r, d) of Batch Renormalization (Algorithm 1 of arXiv 1702.03275).

    `old` is (mean, var) before this batch. A channel without any weight has d = 0: y is its bias.
    """
    m = moments(x, axis, **support)
    std, own = np.sqrt(np.asarray(old[1], np.float64) + epsilon), np.sqrt(m.var + epsilon)
    r = np.clip(own / std, 1 / r_max, r_max)
    d = np.where(m.count > 0, np.clip((m.mean - old[0]) / std, -d_max, d_max), 0.0)
    y, _ = normalize(x, scale * r, bias + scale * d, axis, epsilon, **support)
    return y, m, r, d


def renorm_vjp(x, scale, bias, dy, r, d, **options):
    """Computes (dx, dscale, dbias) of the loss sum(dy y), for constant r and d."""
    none = np.zeros_like(scale, np.float64)
    dx, dxhat, dbias = vjp(x, scale * r, bias, dy, none, none, **options)
    return dx, r * dxhat + d * dbias, dbias


def running(batches, decay=None, debias=False, unbiased=False) -> Running:
    """Computes the running statistics after `batches`, a list of Moments, as one weighted sum.

    `decay=None` is the plain average. With a decay d the k-th of t absorbed batches has the weight
    (1 - d) d^(t-k). The initial mean 0 and variance 1 have the remaining weight d^t; with `debias`
    the weights of the batches are divided by their sum instead. A batch enters a channel if its
    moments are finite there and it has a count, for the unbiased variance of two observations, up
    to rounding.
    """
    shape = np.shape(batches[0].mean)
    mean, var, absorbed = np.zeros(shape), np.ones(shape), np.zeros(shape, np.int32)
    for channel in np.ndindex(shape):
        kept = []
        for batch in batches:
            n, mu, v = (np.broadcast_to(value, shape)[channel] for value in batch)
            if n > (1.5 if unbiased else 0) and np.isfinite(mu) and np.isfinite(v):
                kept.append((mu, v * n / (n - 1) if unbiased else v))
        t = absorbed[channel] = len(kept)
        if t == 0:
            continue
        if decay is None:
            weight = np.full(t, 1 / t)
        else:
            weight = np.array([(1 - decay) * decay ** (t - 1 - k) for k in range(t)])
        if debias:
            weight = weight / weight.sum()
        rest = 1 - weight.sum()
        means, variances = np.array(kept).T
        mean[channel] = rest * 0.0 + weight @ means
        var[channel] = rest * 1.0 + weight @ variances
    return Running(mean, var, absorbed)


def conv(x, kernel):
    """Applies a kernel [h, w, C, D] to x: [N, H, W, C] without padding, or a dense layer [C, D]."""
    if kernel.ndim == 2:
        return x @ kernel
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijcd->nhwd", windows, kernel, optimize=True)


def population(batches, layers, *, paper=False, layer_by_layer=False, epsilon=1e-5):
    """Computes lines 7 to 10 of Algorithm 2, the Running statistics of each layer of a net.

    By default they are the moments of all batches put together. With `paper` they are E_B[mean_B]
    and E_B[m/(m-1) var_B], which is `running` with equal weights.

    Args:
      batches: [(x, mask)]; masks are None or of x's first axis.
      layers: [(kernel, scale, bias)] of x -> conv or dense -> batch normalization -> relu -> ...
      paper: whether line 10 is computed as printed.
      layer_by_layer: whether the next layer's input is normalised by the statistics found, and not
        by those of its batch.
      epsilon: the epsilon of all layers.
    """
    found = []
    batches = [(np.asarray(x, np.float64), mask) for x, mask in batches]
    for kernel, scale, bias in layers:
        h = [conv(x, np.asarray(kernel, np.float64)) for x, _ in batches]
        masks = [
            None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1))
            for x, (_, mask) in zip(h, batches, strict=True)
        ]
        each = [moments(x, mask=mask) for x, mask in zip(h, masks, strict=True)]
        plain = running(each, unbiased=paper)
        if paper:
            found.append(plain)
        else:
            weights = [position_weights(x, mask) for x, mask in zip(h, masks, strict=True)]
            m = moments(np.concatenate(h), weights=np.concatenate(weights))
            found.append(Running(m.mean, m.var, plain.count))
        use = [(found[-1].mean, found[-1].var) if layer_by_layer else (m.mean, m.var) for m in each]
        outputs = [affine(x, *u, scale, bias, epsilon=epsilon) for x, u in zip(h, use, strict=True)]
        batches = [(np.maximum(y, 0), mask) for y, (_, mask) in zip(outputs, batches, strict=True)]
    return found


class Covariance(NamedTuple):
    """The weighted count [], the mean [C] and the biased covariance [G, s, s] of groups."""

    count: np.ndarray
    mean: np.ndarray
    cov: np.ndarray


def rows(x, axis=-1):
    """Reshapes x to [positions, C], features in the order of its axes."""
    features, reduced = axes(x.ndim, axis)
    moved = np.moveaxis(x, (*reduced, *features), range(x.ndim))
    return moved.reshape(-1, int(np.prod([x.shape[i] for i in features])))


def covariance(x, group_size=None, axis=-1, mask=None, weights=None) -> Covariance:
    """Computes Cov = sum p (x - mean)(x - mean)^T of each group of consecutive features."""
    w = rows(position_weights(x, mask, weights), axis)[:, :1]
    x = np.where(w > 0, rows(np.asarray(x, np.float64), axis), 0.0)
    count = w.sum()
    p = w / (count if count > 0 else 1.0)
    mean = (p * x).sum(0)
    groups = np.split(x - mean, x.shape[1] // (group_size or x.shape[1]), axis=1)
    return Covariance(count, mean, np.stack([(p * z).T @ z for z in groups]))


def zca(cov, epsilon):
    """Computes (cov + epsilon I)^(-1/2), [s, s]; with epsilon = 0 without the null space."""
    values, vectors = np.linalg.eigh(cov)
    values = np.maximum(values, 0) + epsilon
    kept = values > (1e-6 * values.max() if epsilon == 0 else 0)
    return (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def newton_schulz(cov, epsilon, iterations):
    """Computes algorithm 1 of IterNorm (arXiv 1904.03441) as printed."""
    p, cov = np.eye(len(cov)), cov + epsilon * np.eye(len(cov))
    trace = np.trace(cov)
    for _ in range(iterations):
        p = (3 * p - p @ p @ p @ (cov / trace)) / 2
    return p / np.sqrt(trace)


def whiten(
    x, scale=None, bias=None, group_size=None, axis=-1, epsilon=1e-5, mask=None, weights=None,
    method=zca, stats=None,
):  # fmt: skip
    """Computes scale W (x - mean) + bias by the moments of x, or by `stats`; scale may be [C, C].

    Where a group of a masked position is not finite, y is the bias. Without any weight it is, too.
    """
    own = covariance(x, group_size, axis, mask, weights) if stats is None else stats
    flat, size = rows(np.asarray(x, np.float64), axis), own.cov.shape[-1]
    y = np.zeros(flat.shape)
    for i, cov in enumerate(own.cov):
        z = flat[:, i * size : (i + 1) * size]
        dead = ~np.isfinite(z).all(1) & (rows(position_weights(x, mask, weights), axis)[:, 0] == 0)
        z = np.where(dead[:, None], 0.0, z - own.mean[i * size : (i + 1) * size])
        y[:, i * size : (i + 1) * size] = z @ method(cov, epsilon).T * (own.count > 0)
    if scale is not None:
        y = y @ scale.T if scale.ndim == 2 else y * scale
    y = y if bias is None else y + np.reshape(bias, -1)
    features, reduced = axes(x.ndim, axis)
    y = y.reshape([x.shape[i] for i in (*reduced, *features)])
    return np.moveaxis(y, range(x.ndim), (*reduced, *features))
