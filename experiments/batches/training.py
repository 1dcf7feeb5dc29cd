"""Trains one network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

import jbn.training
from experiments.batches.cases import Case, Config
from experiments.batches.network import logits_and_stats, network
from experiments.batches.order import image_order
from experiments.nets.inputs import as_input

MOMENTUM = 0.9


@functools.cache
def make_trainer(
    config: Config, norm: str, part: int
) -> tuple[Callable[..., jbn.training.TrainState], Callable[..., Any]]:
    """Makes two compiled functions: ``(key, rate) -> state``, and all steps of a run.

    The latter is ``(state, pixels, labels, rows) -> (state, loss of every step)``, of all pixels
    ``[N, H, W, 3]`` and the images of every step, ``rows: [steps, STEP]``. The learning rate is in
    the state, so that one compiled program serves all rates and orders.
    """
    case = Case(norm, part, "iid", 0)
    net = network(config, case)

    @optax.inject_hyperparams
    def optimizer(learning_rate: float) -> optax.GradientTransformation:
        def rate(step: ArrayLike) -> Array:
            done = jnp.asarray(step, jnp.float32) / config.steps
            return learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * done))

        return optax.sgd(rate, momentum=MOMENTUM)

    def loss_fn(params: Any, stats: Any, batch: tuple[Array, Array]) -> Any:
        images, labels = batch
        variables = {"params": params, "batch_stats": stats}
        logits, stats = logits_and_stats(net, case, variables, as_input(images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats, {}

    def init(key: Array, rate: Array, image: Array) -> jbn.training.TrainState:
        variables = net.init(key, as_input(image[None]), train=False)
        return jbn.training.init(
            variables["params"], variables.get("batch_stats", {}), optimizer(rate)
        )

    step = jbn.training.make_train_step(loss_fn, optimizer(0.0))

    def train_steps(state: Any, pixels: Array, labels: Array, rows: Array) -> Any:
        state, metrics = lax.scan(
            lambda state, row: step(state, (pixels[row], labels[row])), state, rows
        )
        return state, metrics["loss"]

    return jax.jit(init), jax.jit(train_steps, donate_argnums=0)


def train(
    config: Config,
    case: Case,
    rate: float,
    images: np.ndarray,
    labels: np.ndarray,
    among: np.ndarray | None = None,
) -> tuple[Any, float]:
    """Returns the trained variables, and the mean loss over the last tenth of the steps.

    ``among``: the images to train on, as indices; by default all. A subset compiles nothing new.
    """
    among = np.arange(len(labels)) if among is None else among
    rows = among[image_order(labels[among], config.steps, case.order, case.seed)]
    init, train_steps = make_trainer(config._replace(orders=(), seeds=()), case.norm, case.part)
    state = init(jax.random.key(case.seed), rate, images[0])
    state, losses = train_steps(state, images, labels, rows)
    last = float(losses[-max(1, config.steps // 10) :].mean())
    return {"params": state.params, "batch_stats": state.stats}, last
