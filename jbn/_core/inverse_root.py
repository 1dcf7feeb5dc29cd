"""Covariance -> whitening matrix W = (Cov + epsilon I)^(-1/2), by eigenvalues or by iteration.

**By eigenvalues.** With Cov + epsilon I = V diag(l) V^T, the root is S = V diag(sqrt l) V^T and its
inverse is W. Differentiating S S = Cov + epsilon I gives a Lyapunov equation, which is solved in
the same eigenbasis:

    S dS + dS S = dCov,    dS_ij = dCov_ij / (s_i + s_j),    dW = -W dS W

The textbook derivative goes through dV and divides by differences of eigenvalues: it is NaN where
two of them coincide. This one divides by sums. Derivatives of any order follow, because that of a
Lyapunov equation is again one, with the same S:

    S X + X S = R    =>    S dX + dX S = dR - dS X - X dS

**By iteration** (Newton-Schulz). `newton_schulz_root` multiplies matrices only, and autodiff does
the rest.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Roots(NamedTuple):
    """The root of a symmetric matrix A, its inverse, and the eigenbasis of both.

    Attributes:
      root: [..., s, s], A^(1/2).
      inverse: [..., s, s], A^(-1/2).
      vectors: [..., s, s], the eigenvectors, which derivatives take as constants.
      rates: [..., s], the eigenvalues of `inverse`, constants too; 0 in a dropped direction.
    """

    root: Array
    inverse: Array
    vectors: Array
    rates: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def roots(cov: Array, epsilon: float) -> Roots:
    """Computes the roots of cov + epsilon I, [..., s, s], differentiable to any order.

    An eigenvalue below eps (of the dtype) times the largest is a rounding error, perhaps negative,
    and counts as this bound. With epsilon = 0 a direction whose eigenvalue is 0 up to rounding is
    dropped: its rate is 0, and no derivative goes through it. The result is NaN where cov is not
    finite.
    """
    size, info = cov.shape[-1], jnp.finfo(cov.dtype)
    finite = jnp.all(jnp.isfinite(cov), (-2, -1), keepdims=True)
    values, vectors = jnp.linalg.eigh(jnp.where(finite, cov, _eye(cov)))
    unit = jnp.maximum(values[..., -1:], 0) * float(info.eps)
    dropped = values <= size * unit if epsilon == 0 else jnp.zeros_like(values, bool)
    values = jnp.maximum(values, unit) + jnp.asarray(epsilon, cov.dtype)
    rates = jnp.where(dropped, 0.0, lax.rsqrt(jnp.where(dropped, jnp.ones_like(values), values)))
    root = jnp.where(dropped, jnp.zeros_like(values), jnp.sqrt(values))
    return Roots(
        _compose(vectors, root),
        jnp.where(finite, _compose(vectors, rates), jnp.nan),
        vectors,
        rates,
    )


@roots.defjvp
def _roots_jvp(epsilon: float, primals, tangents):
    ((cov,), (dcov,)) = primals, tangents
    r = roots(cov, epsilon)
    dcov = (dcov + _transpose(dcov)) / 2
    own, other = r.rates[..., :, None], r.rates[..., None, :]
    total = own + other
    # 1 / (s_i + s_j) in terms of the rates 1 / s; 0 in dropped directions.
    shares = own * other / jnp.where(total > 0, total, jnp.ones_like(total))
    s = r.root

    def of_root(x: Array) -> Array:
        return multiply(s, x) + multiply(x, s)

    def of_inverse(x: Array) -> Array:  # -dS = S dW S in the equation of dS
        return -multiply(s, multiply(of_root(x), s))

    droot = _solve(of_root, r.vectors, shares, dcov)
    # Multiplying W dS W out would lose digits: W may be 1 / sqrt(epsilon) times as large as dS.
    dinverse = _solve(of_inverse, r.vectors, -own * other * shares, dcov)
    return r, Roots(droot, dinverse, jnp.zeros_like(r.vectors), jnp.zeros_like(r.rates))


def _solve(
    equation: Callable[[Array], Array], vectors: Array, factors: Array, right: Array
) -> Array:
    """Solves equation(X) = right, whose solution in the eigenbasis is factors * right.

    `custom_linear_solve` differentiates by the equation, which only needs this solution again, and
    knows that the map is its own transpose. Basis and factors are constants for it.
    """

    def solve(_, right: Array) -> Array:
        inside = multiply(multiply(_transpose(vectors), right), vectors)
        return multiply(multiply(vectors, factors * inside), _transpose(vectors))

    return lax.custom_linear_solve(equation, right, solve, symmetric=True)


def newton_schulz_root(cov: Array, epsilon: float, iterations: int) -> Array:
    """Computes (cov + epsilon I)^(-1/2), [..., s, s], by Newton-Schulz iterations.

        A = (cov + epsilon I) / t,   t = tr(cov + epsilon I),
        P_0 = I,   P_k = (3 P_{k-1} - P_{k-1}^3 A) / 2,   result P_T / sqrt(t)

    (Huang et al. 2019, arXiv 1904.03441, algorithm 1.) The result is 0 where t = 0. P_k and its
    root Y_k = A P_k are iterated together, P_k = (3 - P_{k-1} Y_{k-1}) P_{k-1} / 2, which is the
    same in exact arithmetic. As written above, rounding errors grow from step to step (Higham,
    Functions of Matrices, 2008, section 6.4): at condition 10 the result in float32 is NaN after
    40 iterations.
    """
    eye = _eye(cov)
    shifted = cov + jnp.asarray(epsilon, cov.dtype) * eye
    trace = jnp.sum(shifted * eye, (-2, -1), keepdims=True)
    some = trace > 0
    # A NaN stays: only a trace of 0 or below, from rounding, gives 0.
    trace = jnp.where(trace <= 0, jnp.ones_like(trace), trace)
    shifted = shifted / trace
    p = (3 * eye - shifted) / 2  # P_1, because P_0 is the identity
    root = multiply(shifted, p)
    for k in range(2, iterations + 1):
        half = (3 * eye - multiply(p, root)) / 2
        p = multiply(half, p)
        if k < iterations:
            root = multiply(root, half)
    return jnp.where(some | jnp.isnan(trace), p * lax.rsqrt(trace), jnp.zeros_like(p))


def _eye(like: Array) -> Array:
    """Makes identities of the shape [..., s, s] of `like`."""
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def _compose(vectors: Array, values: Array) -> Array:
    """Computes V diag(values) V^T."""
    return multiply(vectors * values[..., None, :], _transpose(vectors))


def _transpose(matrix: Array) -> Array:
    return jnp.swapaxes(matrix, -1, -2)
