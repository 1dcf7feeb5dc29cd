"""Measures the gradient in the backward pass through 31 layers, with and without normalisation.

Without Batch Normalization each layer multiplies the signal by the size of its kernels in the
forward pass, and the gradient in the backward pass: both grow or vanish as a power of the depth.
With it a layer's output does not depend on the size of its kernels, BN((aW)u) = BN(Wu), and its
gradient with respect to them is the smaller the larger they are:
dBN((aW)u)/d(aW) = 1/a dBN(Wu)/dW (section 3.3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.inception import programs, runs
from experiments.inception.recipes import TABLE, Scale, network
from experiments.nets import bn_inception

NETS = {"without BN": TABLE["Inception"], "with BN": TABLE["BN-Baseline"]}
ACTIVATIONS = ("relu", "sigmoid")
INITS = (0.5, 1.0, 2.0)  # standard deviation of the kernels, as a multiple of He's

# For programs that run a few times: they compile faster and run slower, which pays off here.
quickly = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class Profile(NamedTuple):
    """Root mean squares along the longest path through a network, ``[layers]`` each."""

    net: str
    activation: str
    init: float
    seed: int
    kernel_gradient: np.ndarray  # of the loss with respect to the layer's kernel
    output_gradient: np.ndarray  # of the loss with respect to the layer's output
    output: np.ndarray

    @property
    def first_to_last(self) -> float:
        """The gradient in the first layer, relative to the gradient in the last one."""
        return float(self.output_gradient[0] / self.output_gradient[-1])

    @property
    def span(self) -> float:
        """The largest kernel gradient of a layer, relative to the smallest."""
        return float(self.kernel_gradient.max() / self.kernel_gradient.min())


def longest_path(net: bn_inception.Inception) -> list[tuple[str, ...]]:
    """Lists the units on the longest path, three a module (1x1, 3x3, 3x3), named as in `params`.

    Flax numbers units as they are made: the first 3x3 is made before the 1x1 in front of it.
    """
    stem = [(f"ConvUnit_{i}",) for i in range(sum(not isinstance(p, str) for p in net.stem))]
    inside = []
    for row in net.rows:
        first = 2 + bool(row.conv_1x1)
        inside += [(f"inception_{row.name}", f"ConvUnit_{first + i}") for i in (1, 0, 2)]
    return stem + inside


def probe(
    net: bn_inception.Inception, params: Any, stats: Any, batch: Any
) -> dict[str, list[jax.Array]]:
    """Computes outputs and gradients of the units of the longest path, as in a training step."""
    path = longest_path(net)

    def forward(params: Any, nudges: Mapping[Any, jax.Array]) -> tuple[jax.Array, Any]:
        outputs = {}

        def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            y, at = call(*args, **kwargs), context.module.path
            if context.method_name == "__call__" and at in path:
                outputs[at] = y = y + nudges[at] if at in nudges else y
            return y

        with nn.intercept_methods(note):
            loss, *_ = programs.make_loss(net)(params, stats, batch, jax.random.key(0))
        return loss, outputs

    _, shapes = jax.eval_shape(lambda: forward(params, {}))
    nudges = {at: jnp.zeros(like.shape, like.dtype) for at, like in shapes.items()}
    of_all = jax.grad(forward, (0, 1), has_aux=True)
    (of_params, of_outputs), outputs = of_all(params, nudges)
    layers = [functools.reduce(lambda tree, name: tree[name], at, of_params) for at in path]
    return {
        # A separable convolution has two kernels: take the second one.
        "kernel_gradient": [
            layer[max(name for name in layer if name.startswith("Conv_"))]["kernel"]
            for layer in layers
        ],
        "output_gradient": [of_outputs[at] for at in path],
        "output": [outputs[at] for at in path],
    }


def rms(x: jax.Array) -> float:
    """Computes the root mean square in float64: tiny squares would be 0 in float32."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def profiles(
    scale: Scale, n_classes: int, batch: Any, seeds: Sequence[int], inits: Sequence[float] = INITS
) -> Iterator[Profile]:
    """Yields the profiles of the networks before training; all of them without Dropout."""
    slots = programs.network_slots(scale, n_classes, runs.Options())
    image = jnp.zeros((1, scale.size, scale.size, 3))
    for name, recipe in NETS.items():
        fresh = network(recipe, scale, **slots)
        start = quickly(functools.partial(fresh.init, x=image, train=False))
        drawn = {seed: start(jax.random.key(seed)) for seed in seeds}
        for activation in ACTIVATIONS:
            recipe = recipe._replace(sigmoid=activation == "sigmoid", dropout=0.0)
            look = quickly(functools.partial(probe, network(recipe, scale, **slots)))
            for init, seed in itertools.product(inits, seeds):
                params = scaled(drawn[seed]["params"], init)
                found = look(params, drawn[seed].get("batch_stats", {}), batch)
                values = {k: np.array([rms(x) for x in layers]) for k, layers in found.items()}
                yield Profile(name, activation, init, seed, **values)


def scaled(params: Any, init: float) -> Any:
    """Scales the convolutions' kernels, as if drawn with so many times He's deviation."""

    def of_layer(path: Any, x: jax.Array) -> jax.Array:
        names = [entry.key for entry in path]
        return init * x if names[-1] == "kernel" and "readout" not in names else x

    return jax.tree_util.tree_map_with_path(of_layer, params)


def table(found: Sequence[Profile]) -> list[list[str]]:
    """Makes a line for each network: the geometric means over the seeds."""
    rows = [["network", "activation", "kernels", "gradient: first / last", "kernel's: first",
             "last", "largest / smallest", "last output"]]  # fmt: skip
    for key in dict.fromkeys((p.net, p.activation, p.init) for p in found):
        mine = [p for p in found if (p.net, p.activation, p.init) == key]
        values = [
            (p.first_to_last, p.kernel_gradient[0], p.kernel_gradient[-1], p.span, p.output[-1])
            for p in mine
        ]
        means = np.exp(np.log(values).mean(0))
        rows.append([key[0], key[1], f"x {key[2]:g}", *(f"{v:.2g}" for v in means)])
    return rows
