"""Compares the first updates of both layers from the same state, on the same batches.

Two programs that compute the same differ in the last bits, and each update enlarges that. A control
measures how much: sbx's own layer, with every parameter changed by a unit in the last place or two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from experiments.common.records import rounded
from experiments.crossq.layers import using
from experiments.crossq.training import Config, forget_programs, make_model

VARIANTS = {"sbx": ("sbx", 0.0), "control": ("sbx", 2.0**-23), "jbn": ("jbn", 0.0)}


class Setting(NamedTuple):
    """Names the normalisation, and the state from which the updates start."""

    name: str
    learned: int  # steps of the environment before, of which the first 100 are without an update
    warmup: int
    epsilon: float
    activation: str  # of flax.linen; sbx: relu


SETTINGS = (
    Setting("BN, untrained", 100, 100_000, 1e-3, "relu"),
    Setting("BN", 1_000, 100_000, 1e-3, "relu"),
    Setting("renorm", 1_000, 0, 1e-3, "relu"),
    Setting("renorm, tanh", 1_000, 0, 1e-3, "tanh"),
    Setting("renorm, tanh, epsilon 1e-8", 1_000, 0, 1e-8, "tanh"),
)
SEEDS = (0, 1, 2)
UPDATES = 30


class Start(NamedTuple):
    """All that an update of CrossQ reads."""

    critic: Any
    actor: Any
    temperature: Any
    key: Array
    buffer: Any
    updates: int  # done; every third one updates the actor


def start_of(model: Any) -> Start:
    """Returns the state of a model."""
    states = model.policy.qf_state, model.policy.actor_state, model.ent_coef_state
    return Start(*states, model.key, model.replay_buffer, model._n_updates)


def set_start(model: Any, start: Start, change: float, seed: int) -> None:
    """Gives a model the state, with parameters that are changed by the factors 1 +- `change`."""
    keys = jax.random.split(jax.random.key(seed))
    policy = model.policy
    policy.qf_state = start.critic.replace(
        apply_fn=policy.qf_state.apply_fn, params=changed(start.critic.params, change, keys[0])
    )
    policy.actor_state = start.actor.replace(
        apply_fn=policy.actor_state.apply_fn, params=changed(start.actor.params, change, keys[1])
    )
    model.ent_coef_state = start.temperature
    model.key, model.replay_buffer, model._n_updates = start.key, start.buffer, start.updates


def changed(params: Any, change: float, key: Array) -> Any:
    """Multiplies every parameter by 1 + change or 1 - change, at random."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    new = [
        leaf * (1 + change * jax.random.rademacher(k, leaf.shape, leaf.dtype))
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(new)


def learned(config: Config, steps: int, activation: str, seed: int) -> Start:
    """Trains to where the updates start; with jbn's layer, as sbx's may be NaN by then."""
    with using("jbn"):
        model = make_model(config, seed, warmup=500, activation=activation)
        model.learn(steps)
    return start_of(model)


def losses(
    config: Config, setting: Setting, variant: str, start: Start, seed: int, updates: int
) -> np.ndarray:
    """Returns the critics' loss of each update, ``[updates]``."""
    from stable_baselines3.common.logger import (  # pyright: ignore[reportMissingImports]
        Logger,
    )

    layer, change = VARIANTS[variant]
    with using(layer, epsilon=setting.epsilon):
        model = make_model(config, seed, setting.warmup, setting.activation)
        model.set_logger(Logger(folder=None, output_formats=[]))
        set_start(model, start, change, seed)
        np.random.seed(seed)  # noqa: NPY002  (the buffer draws its batches by this generator)
        values = []
        for _ in range(updates):
            model.train(gradient_steps=1, batch_size=config.batch)
            values.append(model.logger.name_to_value["train/critic_loss"])
    return np.array(values)


def compare(
    config: Config, seeds: tuple[int, ...], updates: int, settings: Sequence[Setting] = SETTINGS
) -> Iterator[dict[str, Any]]:
    """Yields, for each setting and seed, losses and their differences relative to sbx's."""
    for seed in seeds:
        start = functools.cache(functools.partial(learned, config, seed=seed))
        for setting in settings:
            at = start(setting.learned, setting.activation)
            of = {v: losses(config, setting, v, at, seed, updates) for v in VARIANTS}
            for variant, values in of.items():
                yield {
                    **setting._asdict(),
                    "seed": seed,
                    "variant": variant,
                    "losses": short(values),
                    "differences": short(abs(values - of["sbx"]) / of["sbx"]),
                }
        forget_programs()


def short(values: np.ndarray) -> list[float | None]:
    """Rounds the values as a record does with single ones."""
    return [rounded(float(value)) for value in values]
