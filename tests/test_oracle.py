"""The oracle agrees with finite differences, its parts with the whole, its sums with recursion."""

import numpy as np
import pytest

from tests import cases, oracle

SMALL = [case._replace(dtype="float64") for case in (*cases.AXES, *cases.MASKS) if not case.offset]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_backward_is_the_derivative_of_the_forward_pass(case):
    data = cases.make(case)
    given = case.kwargs | data.support
    rng = np.random.default_rng(0)

    def loss(x, scale, bias):
        y, m = oracle.normalize(x, scale, bias, **given)
        return (data.dy * y).sum() + (data.dmean * m.mean).sum() + (data.dvar * m.var).sum()

    at = data.x, data.scale, data.bias
    gradient = oracle.vjp(*at, data.dy, data.dmean, data.dvar, **given)
    for k in range(3):
        direction = rng.normal(size=at[k].shape)
        h = 1e-5
        ahead, behind = (
            [v + sign * h * direction if i == k else v for i, v in enumerate(at)]
            for sign in (1, -1)
        )
        slope = (loss(*ahead) - loss(*behind)) / (2 * h)
        # Central differences have truncation errors of h^2 and rounding errors of eps/h, both below
        # 1e-9 of the terms.
        np.testing.assert_allclose(slope, (gradient[k] * direction).sum(), rtol=1e-6, atol=1e-7)


def test_one_pass_of_the_whole_and_merged_parts_agree():
    x = np.random.default_rng(0).normal(size=(9, 4))
    parts = oracle.merge(oracle.moments(x[:2]), oracle.moments(x[2:]))
    for part, whole in zip(parts, oracle.moments(x), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_running_sums_are_the_usual_recursion(debias, unbiased):
    rng = np.random.default_rng(0)
    batches = [oracle.moments(rng.normal(size=(5, 3))) for _ in range(4)]
    mean, var = np.zeros(3), np.zeros(3) if debias else np.ones(3)
    for batch in batches:
        mean = 0.9 * mean + 0.1 * batch.mean
        var = 0.9 * var + 0.1 * batch.var * (5 / 4 if unbiased else 1)
    correction = 1 - 0.9**4 if debias else 1.0
    result = oracle.running(batches, 0.9, debias, unbiased)
    np.testing.assert_allclose(result.mean, mean / correction, rtol=1e-12)
    np.testing.assert_allclose(result.var, var / correction, rtol=1e-12)
    np.testing.assert_array_equal(result.count, 4)
