"""Opens sets of photographs: a folder of image files for each class, as in ImageNet, or arrays.

::

    DIR/train/n01440764/n01440764_10026.JPEG        DIR/train/airplane/0000.jpg
    DIR/val/n01440764/ILSVRC2012_val_00000293.JPEG  DIR/test/airplane/0000.jpg

The second folder may be called val or test. A class is a folder, and its label is the folder's
place in alphabetical order. A set that takes less than a gigabyte when decoded (CIFAR-10 takes
184 MB) is decoded once, into memory; an image of a larger set is decoded at every access.

Possible faults, and their effects:

=============================================  =================================================
a missing folder, no class folders, no images  FileNotFoundError
train and val with different classes           ValueError
a class folder without images                  a warning; the class keeps its label
a file that is no whole image                  BrokenImage at its access, which ``data`` handles
hidden files, files with another suffix        ignored
=============================================  =================================================
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.images import augment, photos

DATASETS = ("imagenet", "cifar10", "folder")
IN_MEMORY = 1 << 30  # bytes of decoded pixels
READ_AT_ONCE = 100  # by a thread: one by one, small images would take twice as long
SUFFIXES = (".jpg", ".jpeg", ".png")
SECOND = ("val", "test")
WANTED = (
    "DIR/train/CLASS/ and DIR/val/CLASS/ (or DIR/test/CLASS/) with files "
    f"{', '.join('*' + suffix for suffix in SUFFIXES)}, the same classes in both"
)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
# Pillow raises these for files that are damaged, cut short, or not images at all.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

log = logging.getLogger(__name__)


class BrokenImage(ValueError):
    """A file that is not a whole image; the message names it."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that can be read in any order; decoded on access, or in memory.

    Attributes:
      labels: ``[N]`` int32.
      classes: the name of each label.
      names: ``[N]`` bytes, the files below ``root``; or None if the images are not in files.
        (Bytes of one length are small: every worker process gets a copy, 40 MB for ImageNet.)
      root: the folder of the class folders.
      pixels: ``[N, H, W, 3]`` uint8, or a sequence of ``[H, W, 3]``; None to decode on access. An
        image without pixels was broken when the set was decoded.
      broken: index of each broken image in ``pixels`` -> the reason.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    names: np.ndarray | None = None
    root: Path | None = None
    pixels: np.ndarray | Sequence[np.ndarray] | None = None
    broken: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Returns the name of an image in a message: its file."""
        if self.root is None or self.names is None:
            return f"image {i}"
        return str(self.root / os.fsdecode(self.names[i]))

    def load(self, i: int) -> np.ndarray:
        """Returns a whole image, ``[H, W, 3]`` uint8. Raises BrokenImage."""
        if self.pixels is None:
            return self.view(i, lambda image: np.asarray(augment.rgb(image)))
        self._check(i)
        return self.pixels[i]

    def view(self, i: int, look: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        """Applies ``look`` to an image, of which it may decode only a part. Raises BrokenImage."""
        if self.pixels is not None:
            self._check(i)
            return look(Image.fromarray(self.pixels[i]))
        try:
            with Image.open(self.path(i)) as image:
                return look(image)
        except DAMAGE as error:
            raise BrokenImage(broken_message(self.path(i), error)) from error

    def _check(self, i: int) -> None:
        if i in self.broken:
            raise BrokenImage(self.broken[i])


def broken_message(path: str, error: Exception) -> str:
    return f"{path} is not a whole image file ({error}). Fetch it again, or remove it."


# --- From folders -------------------------------------------------------------------------------


def open_dataset(
    data_dir: str | Path, dataset: str = "folder", *, in_memory: int = IN_MEMORY
) -> tuple[ImageSet, ImageSet]:
    """Opens the training and the validation images of a folder.

    Args:
      data_dir: the folder, with train/ and val/ or test/ in it.
      dataset: "imagenet"; "cifar10", which may also be its binary files; or "folder", any other.
      in_memory: bytes; a set that has fewer of them when decoded is decoded now, into memory.

    Raises:
      FileNotFoundError: a folder is missing, or has no class folders, or no images at all.
      ValueError: the two sets differ in classes, or a binary file of CIFAR-10 is damaged.
    """
    folder = Path(data_dir)
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r}. Expected one of {', '.join(DATASETS)}.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Expected {WANTED}.")
    if dataset == "cifar10" and not (folder / "train").is_dir():
        return in_memory_sets(photos.read_cifar10(folder), CIFAR10_CLASSES)
    second = next((folder / name for name in SECOND if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or second is None:
        missing = "train" if second else "val or test"
        raise FileNotFoundError(f"{folder} has no folder {missing}. Expected {WANTED}.")
    classes = common_classes(folder / "train", second)
    if dataset == "imagenet" and len(classes) != 1000:
        log.warning("%s has %d classes; ImageNet has 1000.", folder, len(classes))
    train, val = read_folder(folder / "train", classes), read_folder(second, classes)
    return decoded(train, in_memory), decoded(val, in_memory)


def stripes(n_train: int = 1600, n_test: int = 320, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Makes up images of 32 x 32, to test that a program runs; their accuracy means nothing."""
    names = tuple(f"stripes at {18 * i} degrees" for i in range(photos.N_CLASSES))
    return in_memory_sets(photos.painted_stripes(n_train, n_test, seed), names)


def in_memory_sets(sets: photos.Photos, classes: tuple[str, ...]) -> tuple[ImageSet, ImageSet]:
    return (
        ImageSet(sets.train_labels, classes, pixels=sets.train_images),
        ImageSet(sets.test_labels, classes, pixels=sets.test_images),
    )


def common_classes(train: Path, second: Path) -> tuple[str, ...]:
    """Lists the class folders, which both must have, in alphabetical order: label 0, 1, ..."""
    names = {folder: class_names(folder) for folder in (train, second)}
    for one, other in ((train, second), (second, train)):
        if lacking := sorted(set(names[one]) - set(names[other])):
            shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            raise ValueError(
                f"{other} lacks {len(lacking)} of the {len(names[one])} classes of {one}: {shown}. "
                "Expected a folder for each class in both, an empty one if it has no images."
            )
    return tuple(names[train])


def class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise FileNotFoundError(
            f"{folder} has no class folders. Expected {WANTED}. (The validation images of ImageNet "
            "come without: move each into the folder of its class.)"
        )
    return names


def read_folder(folder: Path, classes: tuple[str, ...]) -> ImageSet:
    """Lists the image files of every class, in alphabetical order, and opens none of them."""
    names, counts = [], []
    for name in classes:
        with os.scandir(folder / name) as entries:
            files = sorted(e.name for e in entries if is_image(e.name))
        if not files:
            log.warning("%s holds no image; its class keeps the label.", folder / name)
        names += [os.fsencode(f"{name}/{file}") for file in files]
        counts.append(len(files))
    if not names:
        raise FileNotFoundError(f"{folder} holds no image in any class. Expected {WANTED}.")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageSet(labels, classes, np.array(names), folder)


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


# --- Into memory --------------------------------------------------------------------------------


def decoded(images: ImageSet, in_memory: int = IN_MEMORY) -> ImageSet:
    """Returns the same set with its pixels in memory, if they fit."""
    if images.pixels is not None or bytes_estimated(images) > in_memory:
        return images
    pixels, broken = read_all(images)
    shapes = {array.shape for i, array in enumerate(pixels) if i not in broken}
    if len(shapes) == 1:
        shape = shapes.pop()
        for i in broken:
            pixels[i] = np.zeros(shape, np.uint8)
        pixels = np.stack(pixels)
    return dataclasses.replace(images, pixels=pixels, broken=broken)


def read_all(images: ImageSet) -> tuple[list[np.ndarray], dict[int, str]]:
    """Reads every image, and an empty array for a broken one; and why those are broken."""
    broken: dict[int, str] = {}

    def read(i: int) -> np.ndarray:
        try:
            return images.load(i)
        except BrokenImage as error:
            broken[i] = str(error)
            return np.zeros((0, 0, 3), np.uint8)

    def read_part(first: int) -> list[np.ndarray]:
        return [read(i) for i in range(first, min(first + READ_AT_ONCE, len(images)))]

    pixels, name = [], "decoding " + (images.root.name if images.root else "")
    # Pillow releases the interpreter's lock while it decodes.
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        tqdm(total=len(images), desc=name, unit=" images", delay=1) as bar,
    ):
        for part in pool.map(read_part, range(0, len(images), READ_AT_ONCE)):
            pixels += part
            bar.update(len(part))
    return pixels, broken


def bytes_estimated(images: ImageSet, looked_at: int = 100) -> float:
    """Estimates the bytes of the set when decoded, from the headers of some of its files."""
    chosen = np.unique(np.linspace(0, len(images) - 1, looked_at).astype(int))
    sizes = [size for i in chosen if (size := bytes_of(images.path(int(i))))]
    return len(images) * float(np.mean(sizes)) if sizes else 0.0


def bytes_of(path: str) -> int:
    """Returns the bytes of an image when decoded; 0 if it is broken."""
    try:
        with Image.open(path) as image:
            return 3 * image.size[0] * image.size[1]
    except DAMAGE:
        return 0
