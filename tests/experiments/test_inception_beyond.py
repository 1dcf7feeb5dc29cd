"""Gradients through the depth, a layer that learns the identity, ensembles and crops."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.inception import programs
from experiments.nets import bn_inception
from experiments.nets.inputs import as_input

pytest.importorskip("grain")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")

from PIL import Image

from experiments.images import augment, data
from experiments.inception import __main__ as inception
from experiments.inception.recipes import SCALES, TABLE, network
from experiments.inception.runs import Sets
from experiments.inception_beyond import __main__ as inception_beyond
from experiments.inception_beyond import depth as inception_depth
from experiments.inception_beyond import ensemble as inception_ensemble
from experiments.inception_beyond import identity as inception_identity
from experiments.inception_beyond.depth import quickly
from experiments.inception_beyond.ensemble import Score
from tests.tolerance import eps

SMOKE = SCALES["smoke"]


def command(*argv, out):
    inception_beyond.main([*map(str, argv), "--dataset", "smoke", "--out", str(out)])


def lines(path, kind=None):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def assert_drawn(path):
    with Image.open(path) as image:
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


# --- Depth --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the results of one command, with one seed."""
    out = tmp_path_factory.mktemp("beyond")
    command("depth", "identity", "--seeds", 3, "--images", 64, out=out)
    return out


def profile(results, net, activation, init, what):
    rows = lines(results / "depth.jsonl", "layer")
    key = net, activation, init
    mine = [row for row in rows if (row["net"], row["activation"], row["init"]) == key]
    assert [row["layer"] for row in mine] == [1, 2, 3, 4]  # the stem, and three of the module
    assert {row["seed"] for row in mine} == {3}
    return np.array([row[what] for row in mine])


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_with_batch_norm_the_kernels_scale_only_their_own_gradient(results, activation):
    """Checks BN((aW)u) = BN(Wu) and dBN((aW)u)/d(aW) = 1/a dBN(Wu)/dW, up to epsilon."""
    of = functools.partial(profile, results, "with BN", activation)
    for init in (0.5, 2.0):
        np.testing.assert_allclose(of(init, "output"), of(1.0, "output"), rtol=1e-3)
        want = of(1.0, "output_gradient")
        np.testing.assert_allclose(of(init, "output_gradient"), want, rtol=5e-3)
        want = of(1.0, "kernel_gradient") / init
        np.testing.assert_allclose(of(init, "kernel_gradient"), want, rtol=5e-3)


def test_without_batch_norm_every_layer_multiplies_by_the_scale(results):
    """Relies on homogeneous relu and zero biases; local response norm changes 1 part in 1e4."""
    of = functools.partial(profile, results, "without BN", "relu")
    for init in (0.5, 2.0):
        want = of(1.0, "output") * init ** np.arange(1, 5)
        np.testing.assert_allclose(of(init, "output"), want, rtol=1e-3)


def test_the_figure_and_the_header(results):
    assert_drawn(results / "depth.png")
    assert_drawn(results / "identity.png")
    [header] = lines(results / "depth.jsonl", "header")
    assert header["images"] == 64
    assert header["command"].startswith("python -m experiments.inception_beyond depth identity")
    assert "jax" in header


def test_the_longest_path_follows_the_signal():
    """Checks that each convolution reads as many channels as the one before writes."""
    net = bn_inception.small_inception(1 / 2)
    image = jnp.zeros((1, 32, 32, 3))
    init = functools.partial(net.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), image)["params"]
    path = inception_depth.longest_path(net)
    assert len(path) == 1 + 3 * 10
    assert path[0] == ("ConvUnit_0",)
    for i, row in enumerate(net.rows):
        convs = [params[a][b]["Conv_0"]["kernel"].shape for a, b in path[3 * i + 1 : 3 * i + 4]]
        assert [shape[:2] for shape in convs] == [(1, 1), (3, 3), (3, 3)]
        assert [shape[-1] for shape in convs] == [row.reduce_double, row.double_3x3, row.double_3x3]
        assert [shape[2] for shape in convs[1:]] == [row.reduce_double, row.double_3x3]


def test_the_probe_measures_gradients_of_the_loss(one_device):
    """Uses Euler's theorem: relu(W u) is homogeneous in W, so <dL/dW, W> = <dL/dy, y>."""
    recipe = TABLE["Inception"]._replace(dropout=0.0)
    net = network(recipe, SMOKE, n_classes=10)
    batch = {
        "image": jnp.asarray(data.stripes(8, 10)[0].pixels),
        "label": jnp.arange(8, dtype=jnp.int32),
    }
    init = functools.partial(net.init, train=False)
    params = quickly(init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]

    @quickly
    def both(params):
        loss_fn = programs.make_loss(net)
        return (
            inception_depth.probe(net, params, {}, batch),
            jax.grad(lambda p: loss_fn(p, {}, batch, jax.random.key(0))[0])(params),
        )

    found, plain = both(params)
    for i, at in enumerate(inception_depth.longest_path(net)):
        kernel, gradient = (
            functools.reduce(lambda tree, name: tree[name], (*at, "Conv_0", "kernel"), tree)
            for tree in (params, plain)
        )
        np.testing.assert_allclose(found["kernel_gradient"][i], gradient, rtol=1e-4, atol=1e-6)
        want = np.vdot(found["kernel_gradient"][i], kernel)
        got = np.vdot(found["output_gradient"][i], found["output"][i])
        size = np.linalg.norm(found["kernel_gradient"][i]) * np.linalg.norm(kernel)
        assert abs(got - want) < 100 * eps("float32") * size


def test_the_rms_of_tiny_numbers_does_not_underflow():
    x = jnp.full((3, 5), 1e-30)
    assert inception_depth.rms(x) == pytest.approx(1e-30, rel=1e-6, abs=0)
    assert inception_depth.rms(jnp.array([3.0, -4.0])) == pytest.approx(12.5**0.5)


def test_first_to_last_and_span():
    gradient = np.array([8.0, 1.0, 16.0, 2.0])
    p = inception_depth.Profile("with BN", "relu", 1.0, 0, gradient, gradient**2, gradient)
    assert (p.first_to_last, p.span) == (16, 16)
    flat = np.ones(4)
    [_, row] = inception_depth.table([p, p._replace(kernel_gradient=flat, output_gradient=flat)])
    assert row == ["with BN", "relu", "x 1", "4", "2.8", "1.4", "4", "2"]  # geometric means


# --- Identity -----------------------------------------------------------------------------------


def synthetic(n=40):
    """Makes values [n, 3, 3, 4] of known means and standard deviations."""
    rng = np.random.default_rng(0)
    mean, std = np.array([0.0, 3.0, -20.0, 0.5]), np.array([1.0, 0.1, 5.0, 2.0])
    x = rng.standard_normal((n, 3, 3, 4))
    x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    return jnp.float32(mean + std * x), mean, std


def test_the_identity_is_found():
    x, mean, std = synthetic()
    found = inception_identity.learn(x, batch=40, steps=400, rate=0.05)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.std, std, rtol=1e-3)
    np.testing.assert_allclose(found.scale[-1], found.std, rtol=1e-5)
    np.testing.assert_allclose(found.bias[-1], found.mean, atol=1e-4)
    assert found.residual < 1e-4
    assert found.scale.shape == (401, 4)
    assert (found.scale[0] == 1).all()
    assert (found.bias[0] == 0).all()
    assert found.bias_error[0, 2] == pytest.approx(4, rel=1e-3)
    assert found.scale_error[0, 1] == pytest.approx(9, rel=1e-2)


def test_a_step_of_sgd_is_one_of_a_moving_average():
    """Compares the steps with moving averages of the batches' moments, in NumPy."""
    x, _, _ = synthetic()
    rate = 0.1
    found = inception_identity.learn(x, batch=8, steps=12, rate=rate, seed=5)
    scale, bias = np.ones(4), np.zeros(4)
    values = np.asarray(x, np.float64)
    for step, chosen in enumerate(inception_identity.orders(40, 8, 12, 5), 1):
        mean, var = values[chosen].mean((0, 1, 2)), values[chosen].var((0, 1, 2))
        whole = var / (var + inception_identity.EPSILON)  # the variance of xhat
        scale += rate * (var / np.sqrt(var + inception_identity.EPSILON) - whole * scale)
        bias += rate * (mean - bias)
        np.testing.assert_allclose(found.scale[step], scale, rtol=1e-5)
        np.testing.assert_allclose(found.bias[step], bias, rtol=1e-5, atol=1e-5)


def test_every_example_comes_once_before_any_comes_again():
    order = inception_identity.orders(12, 4, 7, 0)
    assert order.shape == (7, 4)
    for epoch in (order[:3], order[3:6]):
        assert sorted(epoch.flat) == list(range(12))
    assert not np.array_equal(order[:3], order[3:6])


def test_the_command_finds_the_identity(results):
    """Takes 1000 steps at a rate of 0.01, which leave 0.99^1000 = 4e-5 of the initial error."""
    path = results / "identity.jsonl"
    [header] = lines(path, "header")
    assert header["layer"] == "inception_3c/ConvUnit_2"
    for batch, bound in ((32, 0.02), (64, 5e-4)):
        errors = [row for row in lines(path, "error") if row["batch"] == batch]
        assert [row["step"] for row in errors[:4]] == [0, 1, 2, 4]
        assert errors[-1]["step"] == 1000
        assert errors[0]["scale_worst"] > 0.1
        assert max(errors[-1]["scale_worst"], errors[-1]["bias_worst"]) < bound
        [row] = [row for row in lines(path, "residual") if row["batch"] == batch]
        assert row["residual"] < bound
    features = [row for row in lines(path, "feature") if row["batch"] == 64]
    assert len(features) == 3
    assert all(row["scale"] == pytest.approx(row["std"], rel=5e-4) for row in features)


@pytest.mark.parametrize("separable", [None, 2])
def test_activations_are_those_before_the_norm(one_device, separable):
    net = bn_inception.Inception((), ((4, 3, 2),), 5, separable=separable)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = quickly(functools.partial(net.init, train=False))(jax.random.key(1), x)
    got = inception_identity.activations(net, variables, x, ("ConvUnit_0",))
    kernels = variables["params"]["ConvUnit_0"]
    if separable is None:
        conv = nn.Conv(4, (3, 3), 2, use_bias=False)
        want = conv.apply({"params": kernels["Conv_0"]}, x)
    else:
        spread = nn.Conv(6, (3, 3), 2, feature_group_count=3, use_bias=False)
        want = spread.apply({"params": kernels["Conv_0"]}, x) @ kernels["Conv_1"]["kernel"][0, 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no unit 'inception_9a/x' in the network"):
        inception_identity.activations(net, variables, x, ("inception_9a", "x"))


# --- Ensemble -----------------------------------------------------------------------------------


def test_scores_respect_masks_labels_and_nan():
    p = np.array(
        [
            [0.1, 0.6, 0.1, 0.1, 0.05, 0.05, 0.0],  # right
            [0.5, 0.2, 0.3, 0.0, 0.0, 0.0, 0.0],  # third
            [0.3, 0.2, 0.15, 0.12, 0.11, 0.1, 0.02],  # sixth
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],  # a broken image
            [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # padding
            [np.nan] * 7,
        ]
    )
    batch = {
        "label": np.array([1, 1, 5, 6, -1, 0]),
        "mask": np.array([True, True, True, False, False, False]),
    }
    score = Score().plus(p, batch)
    assert score[:3] == (3, 1, 2)
    assert score.loss == pytest.approx(-np.log([0.6, 0.2, 0.1]).sum())
    assert score.means()["top5"] == pytest.approx(2 / 3)
    again = score.plus(p, batch | {"mask": np.array([True] * 5 + [True])})
    assert again[:3] == (9, 4, 6)  # the last row, of NaN, never counts as right


def test_shifts_are_those_of_training():
    """Expects nine places and their mirror images, first of all the image itself."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    got = np.asarray(inception_ensemble.views(jnp.asarray(images), "shifts"))
    assert got.shape == (18, 2, 32, 32, 3)
    np.testing.assert_array_equal(got[0], images)
    np.testing.assert_array_equal(got[9:], got[:9, :, :, ::-1])

    class Moved:
        """A stand-in for a random generator that moves an image to a given place."""

        def __init__(self, *places):
            self.places = places

        def random(self, n):
            return (np.array(self.places) + 0.5) / 9

    want = {
        augment.shift_crop(images[0], Moved(i, j)).tobytes() for i in (0, 4, 8) for j in (0, 4, 8)
    }
    assert {view.tobytes() for view in got[:9, 0]} == want
    assert len(want) == 9


def test_views_of_crops_come_one_by_one():
    images = jnp.arange(2 * 144).reshape(2, 144, 1, 1, 1)
    assert inception_ensemble.views(images, "144").shape == (144, 2, 1, 1, 1)
    assert inception_ensemble.views(images, "144")[5].ravel().tolist() == [5, 149]
    assert inception_ensemble.views(images[:, 0], "centre").shape == (1, 2, 1, 1, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with two networks of BN-x30 after eight steps, and with their ensemble."""
    out = tmp_path_factory.mktemp("trained")
    smoke = "--dataset", "smoke", "--devices", "1", "--out", str(out)
    inception.main(["BN-x30", "BN-x30, larger init", *smoke])
    command("ensemble", "--devices", 1, out=out)
    return out


def test_members_score_what_their_runs_did(trained):
    rows = lines(trained / "ensemble.jsonl", "member")
    assert len(rows) == 2 * 2 * 2  # networks, crops, statistics
    for suffix, statistics in (("", "moving averages"), ("_population", "Algorithm 2")):
        chosen = [r for r in rows if (r["crops"], r["statistics"]) == ("centre", statistics)]
        assert len(chosen) == 2
        for row in chosen:
            [end] = lines(trained / row["name"] / "measurements.jsonl", "end")
            assert row["images"] == 80
            for k in ("top1", "top5", "loss"):
                assert row[k] == pytest.approx(end[k + suffix], rel=1e-3)
    assert_drawn(trained / "ensemble.png")


def test_the_ensemble_has_the_mean_of_the_probabilities(trained):
    """Recomputes the mean from the checkpoints, view by view, without padding."""
    sets = Sets(*data.stripes(320, 80))
    folders = inception_ensemble.finished(trained, "BN-x30")
    members = [inception_ensemble.restore(folder, "smoke", 10, devices=1) for folder in folders]
    images, labels = jnp.asarray(sets.val.pixels), sets.val.labels
    rows = lines(trained / "ensemble.jsonl", "ensemble")
    net = network(TABLE["BN-x30"], SMOKE, n_classes=10)

    @quickly
    def probabilities(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        x = as_input(images)
        return jax.nn.softmax(net.apply(variables, x, train=False))

    for crops, looks in (("centre", images[None]), ("shifts", inception_ensemble.shifts(images))):
        p = np.mean(
            [
                probabilities(m.params, m.stats["moving averages"], look)
                for m in members
                for look in looks
            ],
            axis=0,
        )
        way = crops, "moving averages"
        [row] = [row for row in rows if (row["crops"], row["statistics"]) == way]
        assert row["top1"] == pytest.approx((p.argmax(1) == labels).mean(), abs=1.01 / 80)
        assert row["loss"] == pytest.approx(-np.log(p[np.arange(80), labels]).mean(), rel=1e-4)


def test_the_identity_of_a_trained_network(trained):
    [name] = [path.name for path in trained.glob("BN-x30-rate*")]
    command("identity", "--run", name, "--layer", "ConvUnit_0", "--steps", 30, "--rate", 0.2,
            "--images", 32, out=trained)  # fmt: skip
    [header] = lines(trained / "identity.jsonl", "header")
    assert (header["run"], header["layer"]) == (name, "ConvUnit_0")
    [row] = lines(trained / "identity.jsonl", "residual")
    assert row["residual"] < 0.02  # 0.8^30 = 0.001 of the initial error is left


def test_only_runs_that_ended_well_are_members(tmp_path):
    def write(name, run, *rows):
        (tmp_path / name).mkdir()
        rows = [{"kind": "header", "run": run}, *rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "measurements.jsonl").write_text(text)

    end = {"kind": "end", "diverged": False}
    write("b", "BN-x30, Dropout 5 %", end)
    write("a", "BN-x30", end)
    write("c", "BN-x30", end | {"diverged": True})
    write("d", "BN-x30")
    write("e", "BN-x5", end)
    assert [path.name for path in inception_ensemble.finished(tmp_path, "BN-x30")] == ["a", "b"]
    assert [f.name for f in inception_ensemble.finished(tmp_path, "BN-x30, Dropout 5 %")] == ["b"]
    with pytest.raises(SystemExit, match=r"no run of Inception that has ended\. Expected"):
        command("ensemble", "--members", "Inception", out=tmp_path)
    with pytest.raises(SystemExit, match="holds no run with a checkpoint"):
        command("identity", "--run", "a", out=tmp_path)


def test_options_are_explained(capsys):
    with pytest.raises(SystemExit):
        inception_beyond.main(["depth"])
    assert "Expected --data-dir DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inception_beyond.main(["depth", "--dataset", "smoke", "--images", "0"])
    assert "Expected a whole number, 1 or more" in capsys.readouterr().err
