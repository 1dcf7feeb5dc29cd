"""Makes views of a photograph: crops, flips, changed colours; pure functions of (image, rng).

Training uses the views of GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842, section 6):

- ``resized_crop``: a part of random size, shape and place, resized to a square;
- ``shift_crop``: for images of 32 x 32, the whole image moved by up to four pixels (He et al. 2015,
  arXiv 1512.03385, section 4.2; the border is filled by reflection, theirs by zeros);
- ``flip``: left and right exchanged, with probability 1/2;
- ``distort``: brightness, contrast, saturation and the colour of the light (Howard 2013,
  arXiv 1312.5402, section 2.2).

Evaluation uses the centre (``centre_crop``), or 144 crops (``crops_144``; GoogLeNet, section 7). A
view decodes no more of a JPEG file than it needs: see ``square``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom [pixels]

AREA = (0.08, 1.0)  # of a random crop, relative to the image
ASPECT = (3 / 4, 4 / 3)  # width / height of a random crop
RESIZED = 256 / 224  # shorter side of an image, relative to its centre crop
SCALES_144 = (256 / 224, 288 / 224, 320 / 224, 352 / 224)
SHIFT = 4 / 32  # pixels that `shift_crop` moves an image, relative to its side

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green, blue, in ITU-R 601 and Pillow

# The colours of ImageNet vary along these directions (columns) by these deviations [0..255]:
# Krizhevsky et al. 2012, section 4.1; numbers from github.com/facebookarchive/fb.resnet.torch.
LIGHT = 255 * np.array([0.2175, 0.0188, 0.0045], np.float32)
LIGHT_DIRECTIONS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    np.float32,
)


AT_ONCE = 1 << 16  # pixels whose colours are changed together: their floats fit into a cache


class Distortion(NamedTuple):
    """The size of the random changes of colours."""

    enhance: float  # brightness, contrast, saturation: times 1 - enhance to 1 + enhance
    light: float  # standard deviation of the light, relative to that of ImageNet's colours


DISTORTIONS = {
    # Howard: 0.5 to 1.5; Krizhevsky et al.: 0.1.
    "full": Distortion(0.5, 0.1),
    # "Reduce the photometric distortions" (Ioffe & Szegedy, section 4.2.1) gives no number: half.
    "reduced": Distortion(0.25, 0.05),
    "none": None,
}


# --- Squares of an image ------------------------------------------------------------------------


def square(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Resizes the part of an image within ``box`` to ``[size, size, 3]`` uint8.

    A JPEG consists of blocks of 8 x 8 pixels, which decode to 4 x 4, 2 x 2 or 1 x 1 in a fraction
    of the time. A large image is decoded in this way, as long as the box keeps ``size`` pixels in
    either direction.
    """
    width, height = image.size
    wanted = (width * size / (box[2] - box[0]), height * size / (box[3] - box[1]))
    image.draft(None, (math.ceil(wanted[0]), math.ceil(wanted[1])))
    x, y = image.size[0] / width, image.size[1] / height  # 1 unless decoded to fewer pixels
    box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return np.asarray(rgb(image).resize((size, size), Image.Resampling.BILINEAR, box))


def rgb(image: Image.Image) -> Image.Image:
    """Converts to three bytes a pixel: ImageNet has grey images, CMYK ones, and a PNG."""
    return image if image.mode == "RGB" else image.convert("RGB")


# --- Training -----------------------------------------------------------------------------------


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws a part of the image: area uniform in ``AREA``, aspect log-uniform in ``ASPECT``."""
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(10):  # a box may be too wide or high; in a real image one of ten fits
        area, aspect = width * height * rng.uniform(*AREA), math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, height * ASPECT[1])
    h = min(height, width / ASPECT[0])
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def resized_crop(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """Crops a part of random size, shape and place to ``[size, size, 3]`` uint8."""
    return square(image, random_box(*image.size, rng), size)


def shift_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves ``image: [H, W, 3]`` by up to an eighth of its sides; the border is reflected."""
    for axis, u in enumerate(rng.random(2)):
        side = image.shape[axis]
        most = round(SHIFT * side)
        place = abs(np.arange(side) + int(u * (2 * most + 1)) - most)
        image = image.take(np.minimum(place, 2 * (side - 1) - place), axis)
    return image


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors ``image: [H, W, 3]`` with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def distort(
    images: np.ndarray, rngs: Sequence[np.random.Generator], distortion: Distortion | None
) -> np.ndarray:
    """Changes brightness, contrast, saturation and light of each ``images: [N, H, W, 3]`` uint8.

    A pixel x [red, green, blue], with grey(x) = GRAY . x, changes in four steps::

        saturation   x <- grey(x) + s (x - grey(x))
        contrast     x <- m + c (x - m)               m: mean of grey(x) over the image
        brightness   x <- b x
        light        x <- x + LIGHT_DIRECTIONS (a * LIGHT)

    b, c, s are uniform in 1 -+ ``enhance``, and a: [3] normal with standard deviation ``light``.
    The first three steps are linear in the pixels, and each keeps what the other two need
    (saturation keeps the greys; contrast and brightness keep the mean, or scale it). So they
    commute: Howard's random order would only decide where values are cut off at 0 and 255. Here
    that is at the end, and all steps together are one 3 x 3 matrix and one vector an image.
    """
    if distortion is None:
        return images
    uniform = np.array([rng.uniform(-1, 1, 3) for rng in rngs], np.float32)
    normal = np.array([rng.standard_normal(3) for rng in rngs], np.float32)
    factors = 1 + distortion.enhance * uniform
    light = distortion.light * (normal * LIGHT) @ LIGHT_DIRECTIONS.T
    at_once = max(1, AT_ONCE // (images.shape[1] * images.shape[2]))
    changed = np.empty_like(images)
    for first in range(0, len(images), at_once):
        part = slice(first, first + at_once)
        changed[part] = recoloured(images[part], factors[part], light[part])
    return changed


def recoloured(images: np.ndarray, factors: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Applies the formula of ``distort`` for given b, c, s: ``[N, 3]``, and light: ``[N, 3]``."""
    n, height, width, _ = images.shape
    pixels = height * width
    b, c, s = factors.T[:, :, None, None]  # [N, 1, 1] each
    x = images.reshape(n, pixels, 3).astype(np.float32)
    to_grey = np.tile(GRAY[:, None], (1, 3))
    matrix = b * c * (s * np.eye(3, dtype=np.float32) + (1 - s) * to_grey)
    # Sums as a product with ones, and additions to rows instead of pixels, are five times faster.
    mean = np.ones((1, pixels), np.float32) @ x @ GRAY[:, None] / pixels
    offset = b * (1 - c) * mean + light[:, None, :] + np.float32(0.5)  # so that astype rounds
    rows = (x @ matrix).reshape(n, height, width * 3)
    rows += np.tile(offset, (1, 1, width))
    return rows.clip(0, 255, out=rows).astype(np.uint8).reshape(images.shape)


# --- Evaluation ---------------------------------------------------------------------------------


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Crops the centre ``[size, size, 3]`` of the image, resized to 256/224 of ``size``.

    An image of ``size`` x ``size`` pixels is returned whole.
    """
    width, height = image.size
    if width == height == size:
        return np.asarray(rgb(image))
    side = min(width, height) / RESIZED
    left, top = (width - side) / 2, (height - side) / 2
    return square(image, (left, top, left + side, top + side), size)


def crops_144(image: Image.Image, size: int) -> np.ndarray:
    """Makes ``[144, size, size, 3]``: 4 scales x 3 squares x 6 places x 2, the last two mirrored.

    The shorter side becomes 256, 288, 320 and 352 (for a size of 224). Each of these images has a
    left, centre and right square (a portrait: top, centre, bottom). Each square has its four
    corners, its centre, and the square resized; each of these comes with its mirror image.
    """
    sides = [round(scale * size) for scale in SCALES_144]
    shorter = min(image.size)
    wanted = [math.ceil(n * max(sides) / shorter) for n in image.size]
    image.draft(None, (wanted[0], wanted[1]))
    image, shorter = rgb(image), min(image.size)
    views = []
    for side in sides:
        width, height = (max(side, round(n * side / shorter)) for n in image.size)
        scaled = image.resize((width, height), Image.Resampling.BILINEAR)
        for part in range(3):
            left, top = (width - side) * part // 2, (height - side) * part // 2
            views += places(scaled.crop((left, top, left + side, top + side)), size)
    stacked = np.stack(views)
    return np.stack([stacked, stacked[:, :, ::-1]], 1).reshape(-1, size, size, 3)


def places(whole: Image.Image, size: int) -> list[np.ndarray]:
    """Cuts top left, top right, bottom left, bottom right and centre; adds the square, resized."""
    pixels, end = np.asarray(whole), whole.size[0] - size
    starts = (0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)
    cut = [pixels[top : top + size, left : left + size] for top, left in starts]
    return [*cut, np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR))]
