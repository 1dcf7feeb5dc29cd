"""Makes the training steps of the benchmarks, with each library's Batch Normalization layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen

import jbn.linen
from experiments.nets import convolution, layers, resnet
from experiments.nets.layers import BASELINE


class Slot(NamedTuple):
    """The normalisation layer that a network gets (see `nets.slots`)."""

    norm: Any
    fused: bool  # whether the norm does the ReLU and the addition, too
    peer: str  # the library it stands for: a name in `speed.peers.PEERS`


SLOTS = {
    BASELINE: Slot(linen.BatchNorm, False, BASELINE),
    "jbn": Slot(jbn.linen.BatchNorm, True, "jbn"),
    "jbn drop-in": Slot(jbn.linen.BatchNorm, False, "jbn"),  # only the import has changed
    "jbn native": Slot(jbn.linen.BatchNorm, True, "jbn native"),
}


class TrainingStep(NamedTuple):
    """A step of SGD with momentum, (state, images, labels) -> (state, loss), and its arguments."""

    step: Callable[..., Any]
    state: Any
    images: Any
    labels: Any
    init: Callable[[jax.Array], Any]  # key -> state

    def lower(self) -> Any:
        """Traces and lowers the step; the new state reuses the memory of the old one."""
        step = jax.jit(self.step, donate_argnums=0)
        return step.trace(self.state, self.images, self.labels).lower()


def training_step(net: linen.Module, images: tuple[int, ...]) -> TrainingStep:
    """Makes a step on the softmax cross-entropy of a network, for images [N, H, W, C]."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    x = jax.ShapeDtypeStruct(images, jnp.float32)
    labels = jax.ShapeDtypeStruct(images[:1], jnp.int32)

    def init(key):
        variables = net.init(key, jnp.zeros(images, x.dtype), train=False)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step(state, images, labels):
        params, stats, opt_state = state

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = net.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new_stats, opt_state), value

    return TrainingStep(step, jax.eval_shape(init, jax.random.key(0)), x, labels, init)


class Network(NamedTuple):
    """A network from `experiments.nets`, and the sizes and dtype of its training."""

    name: str
    make: Callable[..., linen.Module]  # takes norm, fused, dtype
    size: int  # pixels, height and width
    batch: int
    dtype: str = "float32"  # that the layers compute in

    def training(self, slot: Slot) -> TrainingStep:
        norm = functools.partial(slot.norm, momentum=layers.DECAY)
        dtype = None if self.dtype == "float32" else jnp.dtype(self.dtype)
        net = self.make(norm=norm, fused=slot.fused, dtype=dtype)
        return training_step(net, (self.batch, self.size, self.size, 3))

    def about(self) -> tuple[str, str, str]:
        """Returns the fields of a row: case, dtype, form."""
        return f"{self.name}, batch {self.batch}", self.dtype, "-"


def small_resnet(**slots: Any) -> linen.Module:
    """Makes a ResNet; on a CPU with fast convolutions, since XLA's would hide all else."""
    if jax.default_backend() == "cpu":
        slots["conv"] = functools.partial(linen.Conv, conv_general_dilated=convolution.matmul_conv)
    return resnet.ResNet(**slots)


def tiny_resnet(**slots: Any) -> linen.Module:
    """Makes a ResNet that compiles in a second, for a quick run."""
    return resnet.ResNet(widths=(4,), blocks=(1,), **slots)
