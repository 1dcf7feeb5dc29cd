"""Makes the programs to compile: one layer, and the training step of ResNet-50."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen

import jbn
from experiments.nets.layers import BASELINE, FORMS, Case, Data, function_of, of_jbn, of_linen
from experiments.nets.resnet import BottleneckBlock, ResNet, ResNet50
from experiments.nets.steps import SLOTS, Network

LIBRARIES = {BASELINE: of_linen, "jbn": of_jbn}
DTYPES = ("bfloat16", "float32")
# Some of the 12 shapes [H, W, C] after convolutions of ResNet-50: large, small, wide and narrow.
SHAPES = ((112, 112, 64), (56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 256), (7, 7, 2048))
BATCH = 128


class Program(NamedTuple):
    """A line of the table, before it is compiled."""

    part: str  # "op" or "step"
    case: str  # shape of x, or the network
    dtype: str
    form: str  # one of FORMS; "-" of a step
    library: str
    elements: int | None  # of x
    function: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]


def op(batch: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> Iterator[Program]:
    """Yields the programs of one layer in training, forward and backward."""
    for dtype in dtypes:
        for form in FORMS:
            for shape in shapes:
                case = Case((batch, *shape), dtype, form)
                about = "x".join(map(str, case.shape)), dtype, form
                for library in LIBRARIES:
                    function = functools.partial(layer, library, case)
                    yield Program("op", *about, library, case.elements, function)


def layer(library: str, case: Case) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Returns a library's layer, the shapes of its arguments, and no donated arguments."""
    nothing = np.broadcast_to(np.float32(0), case.shape)  # only its shape is used
    channels = np.ones(case.shape[-1], np.float32)
    made = LIBRARIES[library](case, Data(nothing, nothing, nothing, channels, channels))
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    residual = x if case.form == "bn_add_relu" else None
    return function_of(made, case.which), (made.params, made.stats, x, residual, x), ()


def step(batch: int, dtypes: Sequence[str], quick: bool = False) -> Iterator[Program]:
    """Yields the forms of ResNet-50's training step; quick: of one block of the network."""
    one_block = functools.partial(ResNet, (4,), (1,), block=BottleneckBlock)
    network, size = (one_block, 8) if quick else (ResNet50, 224)
    case = f"{'one block' if quick else 'ResNet-50'}, batch {batch}"
    for dtype in dtypes:
        for name, (slot, make) in networks(network).items():
            function = functools.partial(training, slot, make, batch, size, dtype)
            yield Program("step", case, dtype, "-", name, None, function)


def networks(
    network: Callable[..., linen.Module],
) -> dict[str, tuple[str, Callable[..., linen.Module]]]:
    """Maps the name of a row to (the name in `SLOTS`, the maker of the network)."""

    def checkpointed(network: Callable[..., linen.Module], **slots: Any) -> linen.Module:
        return Checkpointed(functools.partial(network, **slots))

    lean = linen.remat(BottleneckBlock, policy=jbn.checkpoint_policy)
    blocks = functools.partial(network, block=lean)
    return {
        BASELINE: (BASELINE, network),
        "jbn drop-in": ("jbn drop-in", network),
        "jbn": ("jbn", network),
        "jbn, policy": ("jbn", functools.partial(checkpointed, network)),
        "jbn, policy per block": ("jbn", blocks),
        # With the inner policy a block is not recomputed before its gradient is there.
        "jbn, policy, both": ("jbn", functools.partial(checkpointed, blocks)),
    }


class Checkpointed(linen.Module):
    """A network whose training step keeps what `jbn.checkpoint_policy` selects."""

    make: Callable[[], linen.Module]

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def whole(net: Any, x: jax.Array) -> jax.Array:
            return net(x, train)

        return linen.remat(whole, policy=jbn.checkpoint_policy)(self.make(), x)


def training(
    slot: str, make: Callable[..., linen.Module], batch: int, size: int, dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """Returns a training step, the shapes of its arguments, and the donated one: the first."""
    made = Network("ResNet-50", make, size, batch, dtype).training(SLOTS[slot])
    return made.step, (made.state, made.images, made.labels), (0,)
