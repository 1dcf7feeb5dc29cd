"""Reads 32 x 32 colour photographs into arrays, with labels and a fixed split. The sources are:

- ``read_cifar10(folder)``: the binary files of CIFAR-10, or a folder of JPEG or PNG files a class.
- ``download_cifar10()``: fetches the binary files once, checks them, and returns their folder.
- ``painted_stripes()``: made-up images, to test that a program runs; accuracy means nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.download import download_explained, import_pooch

N_CLASSES = 10
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
    """Reads CIFAR-10 in ``folder``: its binary files, or a folder of image files a class.

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
    """Reads rows of one label byte, then 1024 red, 1024 green and 1024 blue bytes."""
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
    """Lists the class folders in alphabetical order: label 0, 1, ..."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) != N_CLASSES:
        raise ValueError(
            f"{folder} has {len(names)} class folders ({', '.join(names) or 'none'}). "
            f"Expected {N_CLASSES}, one a class of CIFAR-10."
        )
    return names


def _read_classes(folder: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads every image file of every class folder, in alphabetical order."""
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
    """Reads an image file as ``[32, 32, 3]`` uint8."""
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
    except (OSError, SyntaxError) as error:  # Pillow raises these for damaged files
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
    """Fetches CIFAR-10's binary files (170 MB) into the user's cache; returns their folder.

    Args:
      url: the address of the archive cifar-10-binary.tar.gz.
      sha256: the checksum of the archive.

    Raises:
      OSError: the archive could not be fetched.
      ValueError: the fetched archive is not the published one.
    """
    pooch = import_pooch(f"fetch and unpack {url} yourself and give the folder with --data-dir")
    cache: Any = pooch.os_cache("jbn-cifar10")  # pooch declares a str, and needs a path
    with download_explained("CIFAR-10", url):
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
    """Makes up images: a class is a direction of stripes; phase, colours and noise vary.

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


def half_size(images: np.ndarray) -> np.ndarray:
    """Averages squares of 2 x 2 pixels: ``[N, 2 H, 2 W, 3]`` uint8 to ``[N, H, W, 3]``."""
    n, height, width, channels = images.shape
    squares = images.reshape(n, height // 2, 2, width // 2, 2, channels)
    return (squares.sum((2, 4), dtype=np.uint16) // 4).astype(np.uint8)
