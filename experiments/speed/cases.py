"""Lists the cases to measure: shapes, dtypes, and how many of each."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments.nets.layers import FORMS

DTYPES = ("float32", "bfloat16")
COPY = "copy"  # the name of the floor among the libraries
FOLDED = "jbn folded"

SOME_SHAPES = ((32, 56, 56, 64), (32, 28, 28, 256), (32, 7, 7, 2048), (4096, 1024), (256, 128))
TINY_SHAPES = ((8, 4), (256, 128))
RESNET50_SHAPES = (  # [H, W, C] of all layers of Batch Normalization for images of 224 x 224
    (112, 112, 64),
    (56, 56, 64),
    (56, 56, 128),
    (56, 56, 256),
    (28, 28, 128),
    (28, 28, 256),
    (28, 28, 512),
    (14, 14, 256),
    (14, 14, 512),
    (14, 14, 1024),
    (7, 7, 512),
    (7, 7, 2048),
)
MLP_SHAPE = (60, 100)  # of the paper's network for digits

USEFUL = {  # elements moved for each element of x, as __main__.py explains
    ("bn", "forward"): 3,
    ("bn_relu", "forward"): 3,
    ("bn_add_relu", "forward"): 4,
    ("bn", "forward+backward"): 8,
    ("bn_relu", "forward+backward"): 8,
    ("bn_add_relu", "forward+backward"): 11,
    ("bn", "inference"): 2,
    ("bn_relu", "inference"): 2,
    ("bn_add_relu", "inference"): 3,
}


class Config(NamedTuple):
    """The cases to measure, and the number of rounds."""

    shapes: Sequence[tuple[int, ...]] = SOME_SHAPES
    dtypes: Sequence[str] = DTYPES
    forms: Sequence[str] = FORMS
    libraries: Sequence[str] = ()  # names in `peers.PEERS`
    rounds: int = 21
    batch: int = 32  # images a training step
    run: bool = False  # ResNet-50's steps, too
    quick: bool = False


def bar(*axes: Any, about: str) -> Iterator[tuple[Any, ...]]:
    """Iterates over all combinations, with a progress bar."""
    return iter(tqdm(list(itertools.product(*axes)), desc=about, file=sys.stderr, leave=False))


def shapes_of(names: Sequence[str], batch: int) -> list[tuple[int, ...]]:
    """Returns the shapes that the arguments of ``--shapes`` name.

    Raises:
      ValueError: a name is none of "some" and "resnet50", nor numbers such as "32x56x56x64".
    """
    shapes: list[tuple[int, ...]] = []
    for name in names:
        if name == "some":
            shapes += SOME_SHAPES
        elif name == "resnet50":
            shapes += [(batch, *shape) for shape in RESNET50_SHAPES] + [MLP_SHAPE]
        else:
            sizes = name.split("x")
            if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
                raise ValueError(
                    f"--shapes {name} is not a shape. Expected some, resnet50, or sizes above 0 "
                    f"with the channels last, as in 32x56x56x64 or 256x128."
                )
            shapes.append(tuple(map(int, sizes)))
    for shape in shapes:
        if math.prod(shape[:-1]) < 2:
            raise ValueError(f"shape {shape} has one value a channel: there is no variance in it.")
    return shapes
