"""The ResNet, CIFAR-10's two layouts, and the scaling experiment, without the data set."""

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.nets.inputs import as_input
from experiments.scaling import cases, judging, training
from tests.tolerance import assert_close

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from experiments.images import photos
from experiments.nets.convolution import matmul_conv
from experiments.nets.resnet import ResidualBlock, ResNet
from experiments.scaling import __main__ as scaling

ROW = 1 + 3 * 32 * 32


def rows(n, seed=0):
    """Makes images and labels, and the bytes that CIFAR-10's binary files have for them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    labels = (np.arange(n) % 10).astype(np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(n, -1)  # all red, all green, all blue
    return images, labels, np.concatenate([labels[:, None], planes], 1).tobytes()


@pytest.fixture
def binary(tmp_path):
    """A tiny CIFAR-10 in the layout of cifar-10-binary.tar.gz: 20 to train, 10 to test."""
    folder = tmp_path / "tiny" / photos.CIFAR10_FOLDER
    folder.mkdir(parents=True)
    for i, name in enumerate(photos.CIFAR10_TRAIN):
        (folder / name).write_bytes(rows(4, i)[2])
    (folder / photos.CIFAR10_TEST[0]).write_bytes(rows(10, 9)[2])
    return folder.parent


@pytest.fixture
def classes(tmp_path):
    """A tiny CIFAR-10 with one folder a class: each has one training and one test image."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "classes"
    for part, seed in (("train", 1), ("test", 2)):
        for label, pixels in enumerate(rows(10, seed)[0]):
            inside = folder / part / f"class{label}"
            inside.mkdir(parents=True)
            image.fromarray(pixels).save(inside / "0000.png")  # lossless
    return folder


# --- Data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_binary_files(binary, inside):
    sets = photos.read_cifar10(binary / photos.CIFAR10_FOLDER if inside else binary)
    assert sets.train_images.dtype == np.uint8
    assert sets.train_labels.dtype == np.int32
    np.testing.assert_array_equal(
        sets.train_images, np.concatenate([rows(4, i)[0] for i in range(5)])
    )
    np.testing.assert_array_equal(sets.train_labels, [0, 1, 2, 3] * 5)
    np.testing.assert_array_equal(sets.test_images, rows(10, 9)[0])
    np.testing.assert_array_equal(sets.test_labels, range(10))


def test_each_folder_is_a_class(classes):
    sets = photos.read_cifar10(classes)
    np.testing.assert_array_equal(sets.train_images, rows(10, 1)[0])
    np.testing.assert_array_equal(sets.test_images, rows(10, 2)[0])
    for labels in (sets.train_labels, sets.test_labels):
        assert labels.dtype == np.int32
        assert labels.tolist() == list(range(10))


def test_jpegs_are_read(classes):
    image = pytest.importorskip("PIL.Image")
    path = classes / "train" / "class3" / "0001.jpg"
    image.new("RGB", (32, 32), (200, 100, 50)).save(path, quality=95)
    sets = photos.read_cifar10(classes)
    assert sets.train_labels.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert abs(sets.train_images[4].astype(int) - (200, 100, 50)).max() < 5


def test_missing_files_and_classes_are_named(binary, classes):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere\. Expected CIFAR-10.*https"):
        photos.read_cifar10(binary / "nowhere")
    (binary / photos.CIFAR10_FOLDER / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file data_batch_4\.bin.*train/CLASS"):
        photos.read_cifar10(binary)
    (classes / "test" / "class7" / "0000.png").unlink()
    with pytest.raises(FileNotFoundError, match="test/class7 holds no image"):
        photos.read_cifar10(classes)
    (classes / "train" / "class2").rename(classes / "class2")
    with pytest.raises(ValueError, match=r"9 class folders \(class0, class1, class3"):
        photos.read_cifar10(classes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows(4)[2][:-5], f"12287 bytes.*multiple of {ROW}.*incomplete"),
        (b"", "0 bytes"),
        (bytes([77]) + rows(4)[2][1:], "go up to 77. Expected 0 to 9"),
    ],
)
def test_damaged_binary_files_are_explained(binary, content, message):
    (binary / photos.CIFAR10_FOLDER / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        photos.read_cifar10(binary)


def test_damaged_images_are_explained(classes):
    image = pytest.importorskip("PIL.Image")
    path = classes / "train" / "class5" / "0000.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an image"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"class5/0000\.png is not a whole image file"):
            photos.read_cifar10(classes)
    image.new("RGB", (48, 32)).save(path)
    with pytest.raises(ValueError, match=r"48 x 32 pixels\. Expected 32 x 32"):
        photos.read_cifar10(classes)


@pytest.fixture
def mirror(binary, tmp_path, monkeypatch):
    """The address of the tiny data set as an archive on a local web server, and its checksum."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(binary / photos.CIFAR10_FOLDER, photos.CIFAR10_FOLDER)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "tiny.tar.gz").write_bytes(packed.getvalue())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield (
            f"http://127.0.0.1:{server.server_port}/tiny.tar.gz",
            hashlib.sha256(packed.getvalue()).hexdigest(),
        )
        server.shutdown()
        thread.join()


def test_download_unpacks_and_checks(binary, mirror):
    got = photos.read_cifar10(photos.download_cifar10(*mirror))
    for mine, theirs in zip(got, photos.read_cifar10(binary), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_download_of_other_bytes_is_refused(mirror):
    with pytest.raises(ValueError, match=r"does not serve the published CIFAR-10.*--data-dir"):
        photos.download_cifar10(mirror[0])  # the tiny archive does not have CIFAR-10's checksum


def test_stripes_are_ten_classes_and_the_same_every_time():
    sets = photos.painted_stripes(40, 20)
    assert sets.train_images.shape == (40, 32, 32, 3)
    assert sets.test_images.dtype == np.uint8
    assert np.bincount(sets.train_labels).tolist() == [4] * 10
    assert np.bincount(sets.test_labels).tolist() == [2] * 10
    for first, second in zip(sets, photos.painted_stripes(40, 20), strict=True):
        np.testing.assert_array_equal(first, second)


# --- The network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "padding"),
    [
        ((3, 3), (1, 1), "SAME"),
        ((3, 3), (2, 2), "SAME"),
        ((1, 1), (2, 2), "SAME"),
        ((2, 3), (2, 1), "VALID"),
        ((3, 2), (1, 2), ((2, 0), (1, 1))),
    ],
)
def test_matmul_conv_is_the_convolution(window, stride, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 9, 8, 3))
    kernel = jax.random.normal(keys[1], (*window, 3, 4))

    def xla(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return matmul_conv(x, kernel, stride, padding, lhs_dilation=(1, 1), feature_group_count=1)

    cotangent = jax.random.normal(keys[2], jax.eval_shape(xla, x, kernel).shape)

    @functools.partial(jax.jit, static_argnums=0)
    def forward_and_backward(conv, *primals):
        y, pull = jax.vjp(conv, *primals)
        return y, *pull(cotangent)

    terms = 2 * 9 * 8  # the kernel's gradient is the longest sum: over the images and positions
    got, want = (forward_and_backward(conv, x, kernel) for conv in (ours, xla))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, a.dtype, terms)


@pytest.mark.parametrize("other", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 2}])
def test_matmul_conv_refuses_dilated_and_grouped_convolutions(other):
    with pytest.raises(NotImplementedError, match="plain convolutions"):
        matmul_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 2)), (1, 1), "SAME", **other)


def test_resnet_shapes():
    """Takes stages of one and of two blocks; every stage but the first halves the resolution."""
    net = ResNet(widths=(4, 8, 16), blocks=(1, 2, 1), stem_stride=2, n_classes=7)
    x = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x, True))
    params = variables["params"]
    kernels = {k: v["kernel"].shape for k, v in params.items() if "kernel" in v}
    assert kernels == {"Conv_0": (3, 3, 3, 4), "Dense_0": (16, 7)}
    blocks = {k: v for k, v in params.items() if k.startswith("ResidualBlock")}
    convs = [[v[f"Conv_{i}"]["kernel"].shape for i in range(len(v) // 2)] for v in blocks.values()]
    assert convs == [
        [(3, 3, 4, 4), (3, 3, 4, 4)],
        [(3, 3, 4, 8), (3, 3, 8, 8), (1, 1, 4, 8)],
        [(3, 3, 8, 8), (3, 3, 8, 8)],
        [(3, 3, 8, 16), (3, 3, 16, 16), (1, 1, 8, 16)],
    ]
    assert all("bias" not in v[f"Conv_{i}"] for v in blocks.values() for i in range(2))
    logits = jax.eval_shape(lambda variables: net.apply(variables, x, False), variables)
    assert logits.shape == (2, 7)


def test_a_new_block_is_the_identity_after_relu():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    block = ResidualBlock(3)
    y, _ = jax.jit(block.init_with_output)(jax.random.key(1), x)
    np.testing.assert_array_equal(y, nn.relu(x))


# --- The experiment -----------------------------------------------------------------------------

TINY = cases.Config(
    devices=(4,), images=16, every=16, window=64, judged=16, widths=(4,), stem_stride=4, seeds=(0,)
)


def initialise(net, seed):
    return jax.jit(functools.partial(net.init, train=False))(
        jax.random.key(seed), jnp.zeros((1, 32, 32, 3))
    )


def test_cases_that_are_the_same_run_once():
    config = cases.Config(seeds=(5, 6))
    names = {"l": "local", "s": "synchronised", "g": "ghost"}
    runs = [(n, names[s], 5) for n, kinds in ((1, "l"), (2, "ls"), (4, "lsg"), (8, "lsg"))
            for s in kinds]  # fmt: skip
    assert [(c.devices, c.statistics, c.seed) for c in cases.cases(config)] == [
        *runs,
        *((n, s, 6) for n, s, _ in runs),
    ]
    assert cases.runs_as("ghost", 2) == "synchronised"
    assert cases.runs_as("synchronised", 1) == "local"
    assert cases.runs_as("ghost", 3) == "local"
    assert [cases.sharing(s, 8) for s in ("local", "ghost", "synchronised")] == [1, 2, 8]


def test_images_come_once_an_epoch_and_in_another_order_in_the_next():
    order = training.image_order(10, 25, seed=0)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert (order[:10] != order[10:20]).any()
    np.testing.assert_array_equal(order, training.image_order(10, 25, seed=0))
    assert (order != training.image_order(10, 25, seed=1)).any()


@pytest.mark.parametrize("statistics", cases.STATISTICS)
def test_a_step_is_the_step_of_one_device_normalised_by_groups(statistics):
    """Compares 4 devices with one device that sees groups one after the other.

    The learning rate is such that the first step changes the parameters by the gradient. The
    running statistics are not compared: how groups enter them is tested with the library.
    """
    sets = photos.painted_stripes(8, 8)
    config = TINY._replace(images=8, every=8, learning_rate=2.0)  # 8 images: a rate of 1
    variables, loss = training.train(config, sets, cases.Case(statistics, 4, 0))

    size = 2 * cases.sharing(statistics, 4)
    order = training.image_order(8, 8, 0)
    net = training.network(config)
    start = initialise(net, 0)

    @jax.jit
    @jax.value_and_grad
    def whole_loss(params):
        losses = []
        for rows in order.reshape(-1, size):
            pixels = as_input(jnp.asarray(sets.train_images[rows]))
            logits, _ = net.apply({**start, "params": params}, pixels, True, mutable="batch_stats")
            logs = jax.nn.log_softmax(logits)
            losses.append(-logs[jnp.arange(size), sets.train_labels[rows]].mean())
        return sum(losses) / len(losses)

    want_loss, grads = whole_loss(start["params"])
    want = jax.tree.map(lambda p, g: p - g, start["params"], grads)
    terms = 8 * 8 * 8  # images and positions that a kernel's gradient sums over
    assert_close(loss, want_loss, jnp.float32, terms)
    for got, expected in zip(*map(jax.tree.leaves, (variables["params"], want)), strict=True):
        assert_close(got, expected, jnp.float32, terms)
    # The comparison would say nothing if the step changed no variable.
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), variables, start))
    assert max(map(float, moved)) > 1e-2


@pytest.mark.parametrize("shared_by", [None, 3, 4])  # of 4, the last two images are left out
def test_judge_counts_by_running_statistics_or_by_groups(shared_by):
    sets = photos.painted_stripes(16, 6)
    net = training.network(TINY)
    variables = initialise(net, 1)
    images, labels = jnp.asarray(sets.train_images[:6]), jnp.asarray(sets.train_labels[:6])
    got = judging.judge(TINY, variables, images, labels, shared_by)
    size = shared_by or 6
    n = 6 // size * size

    @jax.jit
    def apply(x):
        return net.apply(variables, x, shared_by is not None, mutable=["batch_stats"])[0]

    logits = jnp.concatenate([apply(as_input(images[i : i + size])) for i in range(0, n, size)])
    losses = -jax.nn.log_softmax(logits)[jnp.arange(n), labels[:n]]
    np.testing.assert_array_equal(got.predicted, logits.argmax(-1))
    assert float(got.accuracy) == pytest.approx(np.mean(logits.argmax(-1) == labels[:n]))
    assert_close(got.loss, losses.mean(), jnp.float32, 64)


def test_measures_have_the_right_names(monkeypatch):
    """Replaces `judge`: moments and running statistics agree on 2 of 4 images."""

    def judge(config, variables, images, labels, by):
        predicted = [0, 1, 5, 5, 5, 5] if by else [0, 1, 2, 3, 4, 5]
        loss = 10.0 * (len(images) == 4) + (by or 0)  # 4 test images
        return judging.Judgement(loss, loss / 100, jnp.array(predicted[: 4 if by else 6]))

    monkeypatch.setattr(judging, "judge", judge)
    sets = photos.painted_stripes(16, 4)
    config = TINY._replace(per_device=2)
    measured = judging.measure(config, sets, cases.Case("ghost", 4, 0), None)
    assert measured["shared_by"] == 4
    assert measured["agreement"] == 0.5  # of the 4 images that fill a group
    losses = [measured[f"{name}_loss"] for name in ("train_by_batch", "train_by_running", "test")]
    assert losses == [4.0, 0.0, 10.0]
    assert measured["test_accuracy"] == pytest.approx(0.1)


def test_judged_images_come_from_all_of_a_sorted_set():
    labels = np.repeat(np.arange(10), 6)
    assert np.bincount(labels[judging.spread_out(60, 20)]).tolist() == [2] * 10
    assert judging.spread_out(5, 20).tolist() == [0, 1, 2, 3, 4]


def test_smoke(tmp_path, capsys):
    scaling.main(["--smoke", "--out", str(tmp_path), "--images", "32", "--devices", "2"])
    header, *rest = map(json.loads, (tmp_path / "scaling.jsonl").read_text().splitlines())
    assert header["command"].startswith("python -m experiments.scaling --smoke")
    assert header["images_from"].startswith("made-up stripes, not CIFAR-10")
    runs = [row for row in rest if row["kind"] == "run"]
    assert [(r["statistics"], r["devices"], r["shared_by"]) for r in runs] == [
        ("local", 2, 2),
        ("synchronised", 2, 4),
    ]
    for run in runs:
        assert 0 <= run["test_accuracy"] <= 1
        assert 0 <= run["agreement"] <= 1
        assert np.isfinite([run["train_by_batch_loss"], run["train_by_running_loss"]]).all()
    results = [row for row in rest if row["kind"] == "summary"]
    assert [r["same_as"] for r in results] == [None, None, "synchronised"]
    assert results[1]["gap"] == results[2]["gap"] != results[0]["gap"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "synchronised = ghost" in capsys.readouterr().out


def test_without_images_the_message_says_where_they_are(capsys):
    with pytest.raises(SystemExit):
        scaling.main([])
    assert "cifar-10-binary.tar.gz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: There is no folder nowhere"):
        scaling.main(["--data-dir", "nowhere"])


def test_too_many_devices():
    with pytest.raises(SystemExit, match=r"JAX has 8 devices.*largest run needs 16"):
        scaling.main(["--smoke", "--devices", "1", "16"])


def test_options_become_whole_steps():
    args = scaling.parser().parse_args(
        ["--smoke", "--devices", "1", "3", "3", "--per-device", "4", "--images", "100"]
    )
    config = scaling.configure(args)
    assert config.devices == (1, 3)
    assert (config.every, config.images) == (108, 108)  # steps of 12 images
    with pytest.raises(SystemExit):
        scaling.parser().parse_args(["--smoke", "--devices", "0"])
