"""Trains sbx's CrossQ on Pendulum, and measures the return of its policy on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from experiments.common.records import rounded
from experiments.crossq.layers import LAYERS, using

TASK = "Pendulum-v1"  # of gymnasium; the return of an episode of 200 steps is between -1900 and 0
FIRST_EVALUATION_SEED = 10_000  # of the starts on which policies are judged: no seed of training


class Config(NamedTuple):
    """The numbers of the learning curves; all that is not here is sbx's default."""

    steps: int = 4_000  # of the environment; one update each, after 100
    every: int = 250  # steps from one evaluation to the next
    episodes: int = 20  # of an evaluation
    width: int = 128  # units of both hidden layers of actor and critics; sbx: 256, and 1024
    batch: int = 256
    warmups: tuple[int, ...] = (100_000, 500)  # steps of Batch Normalization, in each layer
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


class Case(NamedTuple):
    """One training."""

    seed: int
    warmup: int
    layer: str


def cases(config: Config) -> Iterator[Case]:
    """Yields all trainings, those that are compared one after the other."""
    yield from itertools.starmap(Case, itertools.product(config.seeds, config.warmups, LAYERS))


def make_model(config: Config, seed: int, warmup: int, activation: str = "relu") -> Any:
    """Makes sbx's CrossQ, untrained; the layers are those of the `using` around it."""
    from sbx import CrossQ  # pyright: ignore[reportMissingImports]  (optional)

    net = {
        "net_arch": [config.width] * 2,
        "renorm_warmup_steps": warmup,
        "activation_fn": getattr(nn, activation),
    }
    return CrossQ("MlpPolicy", TASK, seed=seed, batch_size=config.batch, policy_kwargs=net)


def forget_programs() -> None:
    """Frees what JAX has compiled for models that are gone.

    JAX keeps the programs of each model, some hundred mappings of memory in each. Linux allows a
    process 65,530 of them (vm.max_map_count); without this the 40th model ended the process.
    """
    jax.clear_caches()


def train(config: Config, case: Case) -> dict[str, Any]:
    """Trains one policy; returns the curve of its mean returns.

    A policy is judged without noise, by the running statistics, on episodes whose starts are the
    same in all evaluations of all runs.
    """
    from stable_baselines3.common.env_util import (  # pyright: ignore[reportMissingImports]
        make_vec_env,
    )
    from stable_baselines3.common.evaluation import (  # pyright: ignore[reportMissingImports]
        evaluate_policy,
    )

    judges = make_vec_env(TASK, n_envs=config.episodes)
    began, steps, returns = time.perf_counter(), [], []

    def judge(of: dict[str, Any], _: Any) -> bool:
        step = of["self"].num_timesteps
        if step % config.every == 0:
            judges.seed(FIRST_EVALUATION_SEED)
            each, _ = evaluate_policy(
                of["self"], judges, config.episodes, return_episode_rewards=True
            )
            steps.append(step)
            returns.append(rounded(float(np.mean(each))))
        return True  # go on

    with using(case.layer):
        model = make_model(config, case.seed, case.warmup)
        model.learn(config.steps, callback=judge)
    episodes = [rounded(float(episode["r"])) for episode in model.ep_info_buffer]
    seconds = time.perf_counter() - began
    return {"steps": steps, "returns": returns, "training_returns": episodes, "seconds": seconds}
