"""Trains one network on a mesh of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from tqdm import tqdm

import jbn.linen
import jbn.training
from experiments.images.photos import N_CLASSES, Photos
from experiments.nets.convolution import matmul_conv
from experiments.nets.inputs import as_input
from experiments.nets.resnet import ResNet
from experiments.scaling.cases import Case, Config, sharing

AXIS = "batch"


def network(config: Config, statistics: str = "local", devices: int = 1) -> ResNet:
    """Makes the network, with the same layers whichever devices share statistics."""
    # With this momentum the running statistics average over `window` images at any batch size.
    momentum = max(0.0, 1 - config.per_device * devices / config.window)
    scope: dict[str, Any] = {"local": {}, "synchronised": {"axis_name": AXIS}}.get(
        statistics, {"groups": devices // sharing(statistics, devices)}
    )
    return ResNet(
        widths=config.widths,
        blocks=(1,) * len(config.widths),
        stem_stride=config.stem_stride,
        n_classes=N_CLASSES,
        norm=functools.partial(jbn.linen.BatchNorm, momentum=momentum, **scope),
        conv=functools.partial(nn.Conv, conv_general_dilated=matmul_conv),
    )


def make_optimizer(config: Config, devices: int) -> optax.GradientTransformation:
    """Makes SGD with momentum, on a cosine from a rate proportional to the images a step."""
    batch = config.per_device * devices
    first, steps = config.learning_rate * batch / 16, config.images // batch

    def rate(step: ArrayLike) -> Array:
        done = jnp.asarray(step, jnp.float32) / steps
        return first * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return optax.sgd(rate, momentum=0.9)


def make_loss(net: ResNet) -> Callable[..., tuple[Array, Any, dict[str, Array]]]:
    """Makes a loss function: mean softmax cross-entropy [nats], and updated running statistics."""

    def loss_fn(params: Any, stats: Any, batch: tuple[Array, Array]) -> Any:
        images, labels = batch
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, as_input(images), True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"], {}

    return loss_fn


@functools.cache
def make_trainer(config: Config, statistics: str, devices: int) -> tuple[Mesh, Callable[..., Any]]:
    """Makes the mesh, and many compiled steps ``(state, images, labels) -> (state, mean loss)``.

    ``images: [steps, batch, 32, 32, 3]`` and ``labels: [steps, batch]`` are split over the devices.
    """
    mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    axis_name = None if statistics == "ghost" else AXIS
    net = network(config, statistics, devices)
    step = jbn.training.make_train_step(
        make_loss(net), make_optimizer(config, devices), axis_name=axis_name
    )

    def train_steps(
        state: jbn.training.TrainState, images: Array, labels: Array
    ) -> tuple[jbn.training.TrainState, Array]:
        state, metrics = lax.scan(step, state, (images, labels))
        return state, metrics["loss"].mean()

    if axis_name is not None:
        split = P(None, AXIS)
        train_steps = jax.shard_map(
            train_steps, mesh=mesh, in_specs=(P(), split, split), out_specs=P()
        )
    everywhere = NamedSharding(mesh, P())
    return mesh, jax.jit(train_steps, out_shardings=everywhere, donate_argnums=0)


def image_order(n_images: int, wanted: int, seed: int) -> np.ndarray:
    """Returns the order of the images, ``[wanted]``: every epoch is a new shuffle."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(n_images) for _ in range(-(-wanted // n_images))]
    return np.concatenate(epochs)[:wanted]


def train(config: Config, photos: Photos, case: Case) -> tuple[Any, float]:
    """Returns the trained variables, and the mean loss over the last ``config.every`` images."""
    mesh, train_steps = make_trainer(config, case.statistics, case.devices)
    batch = config.per_device * case.devices
    init = jax.jit(functools.partial(network(config).init, train=False))
    variables = init(jax.random.key(case.seed), as_input(jnp.asarray(photos.train_images[:1])))
    state = jbn.training.init(
        variables["params"], variables["batch_stats"], make_optimizer(config, case.devices)
    )
    state = jax.device_put(state, NamedSharding(mesh, P()))
    split = NamedSharding(mesh, P(None, AXIS))
    order, loss = image_order(len(photos.train_images), config.images, case.seed), jnp.nan
    name = f"{case.statistics}, {case.devices} devices, seed {case.seed}"
    with tqdm(total=config.images, desc=name, unit=" images") as bar:
        for chunk in np.split(order, range(config.every, config.images, config.every)):
            rows = chunk.reshape(-1, batch)
            images, labels = jax.device_put(
                (photos.train_images[rows], photos.train_labels[rows]), split
            )
            with jax.set_mesh(mesh):  # jbn needs the number of parts of a sharded array
                state, loss = train_steps(state, images, labels)
            bar.set_postfix_str(f"loss {float(loss):.3f}")
            bar.update(len(chunk))
    return jax.device_get({"params": state.params, "batch_stats": state.stats}), float(loss)
