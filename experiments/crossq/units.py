"""Compares the outputs of both layers, unit by unit, on what a trained critic gives them.

sbx normalises by (x - mean_B + d sqrt(var_B) / r) / sqrt(var_B / r^2 + epsilon). For var_B far
above epsilon that is the paper's (x - mean_B) / sigma_B r + d; for var_B = 0 it is 0 and not d.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

import jbn.linen.crossq
from experiments.crossq.training import Config
from experiments.crossq.updates import learned

LEARNED = 1_000  # steps of the environment
BATCH = 512  # as current and next states together
EPSILON = 1e-3
GROUPS = {  # of units, by the variance of their values in the batch
    "0": (-1.0, 0.0),
    "up to epsilon": (0.0, EPSILON),
    "up to 100 epsilon": (EPSILON, 100 * EPSILON),
    "above": (100 * EPSILON, np.inf),
}


def layer_inputs(config: Config, variables: Any, obs: Array, actions: Array) -> list[Array]:
    """Returns what one critic gives its second and third layer, ``[BATCH, width]`` each."""
    from sbx.crossq.policies import Critic  # pyright: ignore[reportMissingImports]  (optional)

    critic = Critic(net_arch=[config.width] * 2, renorm_warmup_steps=0)
    _, found = critic.apply(
        variables, obs, actions, train=True, mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
    )  # fmt: skip
    return [nn.relu(found["intermediates"][f"Dense_{i}"]["__call__"][0]) for i in (0, 1)]


def outputs(cls: Any, variables: Any, x: Array) -> np.ndarray:
    """Normalises x by a layer of the class in training, after its warm-up."""
    layer = cls(use_running_average=False, warmup_steps=0, epsilon=EPSILON)
    y, _ = layer.apply(variables, x, mutable=["batch_stats"])
    return np.asarray(y)


def compare(config: Config, seed: int) -> Iterator[dict[str, Any]]:
    """Yields, for each group of units, their number and the differences of their outputs."""
    from sbx.common.jax_layers import (  # pyright: ignore[reportMissingImports]  (optional)
        BatchRenorm,
    )

    start = learned(config, LEARNED, "relu", seed)
    batch = start.buffer.sample(BATCH)
    obs, actions = (jnp.asarray(t.numpy()) for t in (batch.observations, batch.actions))
    both = {"params": start.critic.params, "batch_stats": start.critic.batch_stats}
    first = {k: jax.tree.map(lambda v: v[0], tree["VmapCritic_0"]) for k, tree in both.items()}
    variances, worst = [], []
    for i, x in enumerate(layer_inputs(config, first, obs, actions), 1):
        mine = {k: tree[f"BatchRenorm_{i}"] for k, tree in first.items()}
        theirs, ours = (outputs(c, mine, x) for c in (BatchRenorm, jbn.linen.crossq.BatchRenorm))
        variances.append(np.var(x, 0))
        worst.append(abs(theirs - ours).max(0))
    var, difference = np.concatenate(variances), np.concatenate(worst)
    for name, (low, high) in GROUPS.items():
        chosen = difference[(low < var) & (var <= high)]
        quantiles = [float(np.quantile(chosen, q)) if chosen.size else 0.0 for q in (0.5, 1)]
        yield {"seed": seed, "variance": name, "units": chosen.size, "of": difference.size,
               "median": quantiles[0], "largest": quantiles[1]}  # fmt: skip
