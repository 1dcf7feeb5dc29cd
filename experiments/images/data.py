"""Serves batches of photographs, read by Grain in worker processes, to train and to evaluate.

``imagesets`` opens the images, ``shuffling`` orders them, ``augment`` changes them. This file makes
batches of them:

- Batch k depends on the seed and k alone, and not on the number of workers. So training continues
  from any step, even within an epoch, at no cost: ``start=k``, or ``set_state``.
- Process p of P takes every P-th image, beginning with the p-th. So the global batch has the same
  images, seen in the same way, for any P; a process must ask for its share of it.
- A file that is no whole image (see ``imagesets``) causes one warning, by name. In training the
  next image of its class takes its place. In evaluation its mask is False and it keeps its label,
  unlike padding. With ``strict=True`` it stops the run instead; so do ten broken images in a row
  in one class, or a class whose images are all broken.

>>> from experiments.images import data
>>> train, test = data.stripes(100, 20)
>>> batches = data.train_batches(train, batch=8, size=32, seed=0, crop="shift")
>>> batch = next(batches)
>>> batch["image"].shape, batch["image"].dtype, batch["label"].shape
((8, 32, 32, 3), dtype('uint8'), (8,))
>>> batches.get_state()
{'next': 1}
>>> batches.close()
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterator

import numpy as np

from experiments.images import augment, shuffling
from experiments.images.batches import ENDLESS, Batch, Batches, Share, Source, iterate
from experiments.images.imagesets import BrokenImage, ImageSet, open_dataset, stripes

__all__ = [
    "Batches",
    "BrokenImage",
    "ImageSet",
    "eval_batches",
    "open_dataset",
    "stripes",
    "train_batches",
]

CROPS = ("resized", "shift")
EVALUATION = {"centre": augment.centre_crop, "144": augment.crops_144}
TRIES = 10  # images of a class; so many broken ones in a row have another cause

log = logging.getLogger(__name__)
_warned: set[str] = set()  # the files that this process has warned of


def n_threads(images: ImageSet) -> int:
    """Returns how many threads read: several decode files; one suffices for arrays in memory."""
    return 1 if images.pixels is not None else min(16, os.cpu_count() or 1)


# --- Training -----------------------------------------------------------------------------------


def train_batches(
    images: ImageSet,
    *,
    batch: int,
    size: int,
    seed: int,
    crop: str = "resized",
    distortion: str = "none",
    shuffle: str = "thorough",
    shards: int = 1,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
    strict: bool = False,
) -> Batches:
    """Makes endless batches: ``{"image": [batch, size, size, 3] uint8, "label": [batch] int32}``.

    Args:
      images: the training set.
      batch: how many images a batch of this process has.
      size: height and width of the images, in pixels.
      seed: decides the order of the images, and how each is cropped, flipped and distorted.
      crop: "resized", a random part of an image; or "shift", for images that have that size.
      distortion: how far the colours are changed; "full", "reduced" or "none".
      shuffle: "thorough", "within-shard" or "fixed-shards".
      shards: the number of shards, unless shuffling is thorough.
      workers: processes that read; 0 for threads of this process. Each worker imports the script
        that started it, which must guard its own work by ``if __name__ == "__main__"``.
      process_index, process_count: as JAX counts them.
      start: the number of the first batch, to continue after that many steps.
      strict: stop at a file that is no whole image.

    Raises:
      ValueError: an argument is none of these, or crop is "shift" and images have another size.
    """
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r}. Expected one of {', '.join(CROPS)}.")
    if distortion not in augment.DISTORTIONS:
        known = ", ".join(augment.DISTORTIONS)
        raise ValueError(f"distortion={distortion!r}. Expected one of {known}.")
    if seed < 0:
        raise ValueError(f"seed={seed}. Expected 0 or more.")
    shuffling.check(len(images), shuffle, shards)
    if crop == "shift":
        check_shift(images, size)
    share = Share(batch, process_index, process_count)
    source = TrainSource(images, share, size, seed, crop, distortion, shuffle, shards, strict)
    return iterate(source, ENDLESS, workers, n_threads(images), start)


def check_shift(images: ImageSet, size: int) -> None:
    """Raises ValueError unless all images are in memory and have ``size`` x ``size`` pixels."""
    shape = getattr(images.pixels, "shape", None)
    if shape is None or shape[1:3] != (size, size):
        given = f"of {shape[2]} x {shape[1]} pixels" if shape else "of several sizes, or in files"
        raise ValueError(
            f"crop='shift' with images {given}. Expected a small set, all of them of the {size} x "
            f"{size} pixels that are asked for; use crop='resized'."
        )


@dataclasses.dataclass(frozen=True)
class TrainSource(Source):
    """Training batches: batch k from the images, their order and their random views."""

    images: ImageSet
    share: Share
    size: int
    seed: int
    crop: str
    distortion: str
    shuffle: str
    shards: int
    strict: bool

    def __getitem__(self, index: int) -> Batch:
        positions = self.share.positions(index)
        chosen = shuffling.images_at(
            positions, len(self.images), self.seed, self.shuffle, self.shards
        )
        rngs = [view_rng(self.seed, int(position)) for position in positions]
        cropped = np.stack([self.cropped(int(i), rng) for i, rng in zip(chosen, rngs, strict=True)])
        distorted = augment.distort(cropped, rngs, augment.DISTORTIONS[self.distortion])
        return {"image": distorted, "label": self.images.labels[chosen]}

    def cropped(self, i: int, rng: np.random.Generator) -> np.ndarray:
        """Returns a view of image i, or of the next of its class that is whole."""
        for other in [i] if self.strict else next_of_class(self.images.labels, i):
            try:
                return augment.flip(self.look(other, rng), rng)
            except BrokenImage as error:
                if self.strict:
                    raise
                warn_once(self.images.path(other), error, "The next of its class takes its place.")
        raise BrokenImage(
            f"{self.images.path(i)} is broken, and so are the next {TRIES - 1} of its class, or "
            f"all that it has. Expected whole images: is {self.images.root} still there?"
        )

    def look(self, i: int, rng: np.random.Generator) -> np.ndarray:
        if self.crop == "shift":
            return augment.shift_crop(self.images.load(i), rng)
        crop = functools.partial(augment.resized_crop, rng=rng, size=self.size)
        return self.images.view(i, crop)


def view_rng(seed: int, position: int) -> np.random.Generator:
    """Makes the random numbers for the view of the image at a position of the sequence."""
    return np.random.default_rng((seed, shuffling.VIEWS, position))


def next_of_class(labels: np.ndarray, i: int) -> Iterator[int]:
    """Yields image i, and then, if asked for more, the next ones of its class, in a ring."""
    yield i
    ring = np.flatnonzero(labels == labels[i])
    place = int(np.searchsorted(ring, i))
    yield from map(int, np.roll(ring, -place)[1:TRIES])


def warn_once(path: str, error: BrokenImage, consequence: str) -> None:
    if path not in _warned:
        _warned.add(path)
        log.warning("%s %s (Broken files in this process: %d.)", error, consequence, len(_warned))


# --- Evaluation ---------------------------------------------------------------------------------


def eval_batches(
    images: ImageSet,
    *,
    batch: int,
    size: int,
    crops: str = "centre",
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    strict: bool = False,
) -> Batches:
    """Makes batches of every image once, in order; equally many in each process.

    ``{"image": [batch, size, size, 3] uint8, "label": [batch] int32, "mask": [batch] bool}``; with
    crops "144" images are ``[batch, 144, size, size, 3]``. The mask is False where there is no
    image: black images with label -1 fill up the last batches, and a broken image is black but
    keeps its label. So ``(label >= 0).sum()`` images were requested, and ``mask.sum()`` were read.
    """
    if crops not in EVALUATION:
        raise ValueError(f"crops={crops!r}. Expected one of {', '.join(EVALUATION)}.")
    share = Share(batch, process_index, process_count)
    source = EvalSource(images, share, size, crops, strict)
    threads = n_threads(images) if crops == "centre" else 1  # 22 MB an image, at a size of 224
    return iterate(source, source.n_batches(), workers, threads)


@dataclasses.dataclass(frozen=True)
class EvalSource(Source):
    """Evaluation batches; empty after the last one, which workers may read ahead of."""

    images: ImageSet
    share: Share
    size: int
    crops: str
    strict: bool

    def n_batches(self) -> int:
        return math.ceil(len(self.images) / (self.share.batch * self.share.process_count))

    def __getitem__(self, index: int) -> Batch:
        if index >= self.n_batches():
            return {}
        n, shape = self.share.batch, (self.size, self.size, 3)
        pixels = np.zeros((n, *((144,) if self.crops == "144" else ()), *shape), np.uint8)
        labels, mask = np.full(n, -1, np.int32), np.zeros(n, bool)
        look = functools.partial(EVALUATION[self.crops], size=self.size)
        for row, i in enumerate(map(int, self.share.positions(index))):
            if i >= len(self.images):
                break
            labels[row] = self.images.labels[i]
            try:
                pixels[row] = self.images.view(i, look)
                mask[row] = True
            except BrokenImage as error:
                if self.strict:
                    raise
                warn_once(self.images.path(i), error, "It is left out of the evaluation.")
        return {"image": pixels, "label": labels, "mask": mask}
