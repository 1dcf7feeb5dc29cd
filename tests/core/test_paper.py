"""Batch Normalization does what the paper says (arXiv 1502.03167), one statement a test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import cases, compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_section_3_the_identity_is_representable():
    # "By setting gamma = sqrt(Var[x]) and beta = E[x], we could recover the original activations."
    data = cases.make(cases.Case((64, 5), offset=3.0))
    m = oracle.moments(data.x)
    scale, bias = np.sqrt(m.var).astype(np.float32), m.mean.astype(np.float32)
    y, _ = compiled.normalize(data.x, scale, bias, epsilon=0.0)
    tolerance.assert_close(y, data.x, "float32", 64)


def test_section_3_at_initialisation_y_has_mean_0_and_variance_1():
    data = cases.make(cases.Case((512, 3), offset=3.0))
    y, _ = compiled.normalize(data.x)
    m = oracle.moments(np.asarray(y))
    true = oracle.moments(data.x)
    tolerance.assert_close(m.mean, np.zeros(3), "float32", 512, magnitude=1)
    tolerance.assert_close(m.var, true.var / (true.var + 1e-5), "float32", 512)


def test_section_3_2_a_feature_map_is_normalised_over_examples_and_locations():
    # "For a mini-batch of size m and feature maps of size p x q, we use m' = m p q."
    x = normal(4, 5, 6, 3).astype(np.float32)
    y, m = compiled.normalize(x)
    flat, same = compiled.normalize(x.reshape(-1, 3))
    assert m.count == 4 * 5 * 6
    tolerance.assert_close(y.reshape(-1, 3), flat, "float32", 120)
    tolerance.assert_close(m.var, same.var, "float32", 120)


# --- section 3.3: BN(Wu) = BN((aW)u) -----------------------------------------------------------


@pytest.fixture
def layer(x64):
    """W, u, the function BN(W u) with epsilon 0, and a loss of it with a random cotangent."""
    weights, inputs, r = normal(4, 3), normal(16, 4, seed=1), normal(16, 3, seed=2)
    scale, bias = normal(3, seed=3), normal(3, seed=4)

    @jax.jit
    def output(w, u):
        return jbn.normalize(u @ w, scale, bias, epsilon=0.0)[0]

    return weights, inputs, output, lambda w, u: (r * output(w, u)).sum()


@pytest.mark.parametrize("a", [0.01, 3.7, 1000.0])
def test_section_3_3_the_scale_of_the_weights_does_not_matter(layer, a):
    w, u, output, _ = layer
    tolerance.assert_close(output(a * w, u), output(w, u), "float64", 16)


@pytest.mark.parametrize("a", [0.01, 3.7, 1000.0])
def test_section_3_3_the_gradient_below_does_not_depend_on_the_scale_of_the_weights(layer, a):
    w, u, _, loss = layer
    below = jax.grad(loss, argnums=1)
    tolerance.assert_close(below(a * w, u), below(w, u), "float64", 16)


@pytest.mark.parametrize("a", [0.01, 3.7, 1000.0])
def test_section_3_3_larger_weights_lead_to_smaller_gradients(layer, a):
    w, u, _, loss = layer
    own = jax.grad(loss)
    tolerance.assert_close(own(a * w, u), own(w, u) / a, "float64", 16)


def test_section_3_3_the_gradient_is_orthogonal_to_the_weights(layer):
    # The loss does not change with the scale a, so its derivative along w is 0 at a = 1.
    w, u, _, loss = layer
    along = (jax.grad(loss)(w, u) * w).sum(0)
    tolerance.assert_close(along, np.zeros(3), "float64", 16, magnitude=np.abs(w).sum())


# --- section 2: the exploding bias -------------------------------------------------------------


@pytest.mark.parametrize("through", [True, False], ids=["through", "ignored"])
def test_section_2_the_bias_explodes_only_if_the_statistics_are_ignored(through):
    # "x = u + b, xhat = x - E[x]. If a gradient descent step ignores the dependence of E[x] on b,
    # it will update b <- b + db, db = -dl/dxhat. [...] b will grow indefinitely while the loss
    # remains fixed."
    u, target = normal(32, 2).astype(np.float32), np.float32([[0.5, -0.5]])

    def normalised(x):
        if through:
            return jbn.normalize(x)[0]
        m = jbn.moments(jax.lax.stop_gradient(x))
        params = jbn.Params(None, None)
        return jbn.batch_norm_inference(
            x, params, jbn.init_stats(2)._replace(mean=m.mean, var=m.var)
        )

    def loss(b):
        return ((normalised(u + b) - target) ** 2).mean()

    @jax.jit
    def descend(b):
        def step(b, _):
            value, gradient = jax.value_and_grad(loss)(b)
            return b - gradient, value

        return jax.lax.scan(step, b, length=100)

    b, values = descend(jnp.zeros((1, 2)))
    assert np.ptp(values) < 1e-5 * values[0]  # the loss remains fixed, whatever b is
    if through:
        tolerance.assert_close(b, np.zeros((1, 2)), "float32", 32 * 100, magnitude=1)
    else:
        assert np.min(np.abs(b)) > 10


# --- algorithm 2 -------------------------------------------------------------------------------


def test_algorithm_2_inference_uses_the_population():
    # E[x] = E_B[mean_B], Var[x] = m/(m-1) E_B[var_B] over many training mini-batches of size m,
    # and y = gamma / sqrt(Var[x] + eps) x + (beta - gamma E[x] / sqrt(Var[x] + eps)).
    m, channels = 8, 3
    data = cases.make(cases.Case((20 * m, channels), offset=2.0))
    params, stats = jbn.Params(data.scale, data.bias), jbn.init_stats(channels)
    batches = data.x.reshape(20, m, channels)
    for batch in batches:
        _, stats = compiled.batch_norm(batch, params, stats, update=jbn.cumulative(unbiased=True))
    true = [oracle.moments(batch) for batch in batches]
    mean = np.mean([t.mean for t in true], axis=0)
    var = m / (m - 1) * np.mean([t.var for t in true], axis=0)
    tolerance.assert_close(stats.mean, mean, "float32", 20 * m)
    tolerance.assert_close(stats.var, var, "float32", 20 * m)
    slope = data.scale / np.sqrt(var + 1e-5)
    y = compiled.batch_norm_inference(data.x, params, stats)
    expected = slope * data.x + (data.bias - slope * mean)
    tolerance.assert_close(y, expected, "float32", 20 * m, ratio=2.0)


def test_section_3_1_inference_is_one_affine_map_of_each_example():
    data = cases.make(cases.Case((16, 3)))
    params = jbn.Params(data.scale, data.bias)
    stats = jbn.init_stats(3)._replace(mean=data.dmean, var=data.dvar**2 + 1)
    infer = compiled.batch_norm_inference
    y = infer(data.x, params, stats)
    # "The output depends only on the input": one example alone gives the same.
    chex.assert_trees_all_close(infer(data.x[:1], params, stats), y[:1], rtol=1e-6, atol=1e-6)
    middle = infer((data.x[:8] + data.x[8:]) / 2, params, stats)
    tolerance.assert_close(middle, (np.asarray(y)[:8] + np.asarray(y)[8:]) / 2, "float32", 1)
