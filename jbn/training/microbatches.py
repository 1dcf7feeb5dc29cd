"""The parts of a batch that go through the model one after the other, and the gradient of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn._core.deferral import called, fitted, vary
from jbn._core.shift import accumulator
from jbn.training.checks import check_output
from jbn.training.mean import Mean
from jbn.training.types import LossFn, Tree


class Sums(NamedTuple):
    """The results of a step that add up over microbatches and devices."""

    grads: Tree  # of the loss's total
    loss: Mean
    metrics: dict[str, Mean]


class Microbatches(NamedTuple):
    """A batch in parts, and all that the gradient of a part depends on besides the statistics.

    Attributes:
      loss_fn: (params, stats, batch[, key]) -> (loss, stats, metrics).
      params: device-varying over `names`, so that autodiff adds no psum to their gradient.
      batch: a tree with leaves [N, ...].
      number: the number of parts.
      names: the names of the axes that the step runs over.
      scale: [], float32: the factor of the loss; None for 1.
      key: i -> the key of part i; None where loss_fn takes none.
    """

    loss_fn: LossFn
    params: Tree
    batch: Tree
    number: int
    names: tuple[Any, ...]
    scale: Array | None
    key: Callable[[Array | int], Array] | None

    def arguments(self, i: Array | int) -> tuple[Any, ...]:
        """Returns the arguments of loss_fn after params and stats: part i, and its key."""
        part = examples(self.batch, i, self.number)
        return (part,) if self.key is None else (part, self.key(i))

    def differentiate(self, i: Array | int, stats: Tree) -> tuple[Sums, Tree]:
        """Computes the sums of part i, and the statistics that the layers return for it."""
        args, scale = self.arguments(i), self.scale

        def total(params: Tree) -> tuple[Array, tuple[Mean, Tree, dict[str, Mean]]]:
            output = called(self.loss_fn, params, writable(stats), *args)
            loss, new_stats, metrics = check_output(output)
            scaled = loss.total if scale is None else loss.total * scale.astype(loss.total.dtype)
            return scaled, (loss, new_stats, metrics)

        grads, (loss, new_stats, metrics) = jax.grad(total, has_aux=True)(self.params)
        new_stats = fitted("loss_fn", new_stats, stats)
        # float32 at least: small gradients must not be lost in a large sum.
        grads = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), grads)
        return Sums(grads, *lax.stop_gradient((loss, metrics))), new_stats


def examples(batch: Tree, i: Array | int, microbatches: int) -> Tree:
    """Takes the examples i, i + microbatches, ...; a sharded batch gives some of every device.

    Raises:
      ValueError: the batch cannot be divided into so many parts.
    """
    if microbatches == 1:
        return batch

    def part(path: Any, x: Array) -> Array:
        n = jnp.shape(x)[0] if jnp.ndim(x) else 0
        if n == 0 or n % microbatches:
            raise ValueError(
                f"microbatches={microbatches} must divide the number of examples; the batch's "
                f"leaf {jax.tree_util.keystr(path) or 'itself'} has the shape {jnp.shape(x)}."
            )
        x = jnp.reshape(x, (n // microbatches, microbatches, *x.shape[1:]))
        return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    return jax.tree_util.tree_map_with_path(part, batch)


def part_key(rng: Array, step: Array, names: tuple[Any, ...], i: Array | int) -> Array:
    """Derives the key of this step, microbatch and program instance."""
    key = jax.random.fold_in(jax.random.fold_in(rng, step), i)
    return jax.random.fold_in(key, lax.axis_index(names)) if names else key


def writable(stats: Tree) -> Tree:
    """Copies the tree: its nnx Variables then belong to this trace, and can be written."""
    return jax.tree.map(lambda v: v, stats)


def summed(sums: Sums, names: tuple[Any, ...]) -> Sums:
    """Adds up all sums over the axes `names`, by one collective."""
    return lax.psum(vary(sums, names), names) if names else sums
