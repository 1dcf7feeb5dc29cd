"""Exact statistics of a data set for inference (Alg. 2), which do not depend on past parameters.

Running averages include batches of older parameters, and weigh the last batches most. Here the
parameters are constant, and every batch gives its moments:

    layers, given deferred statistics   ->  Moments of one batch            compiled, on devices
    sum n,  sum n (mean - shift),  sum n var,  sum n |mean - shift|^2       over batches, in float64
    mean, var                                                               division last

The sums are `HostSums` in `_core/pooling`, on the host, one batch behind the devices.

A model is any function of (params, stats, batch): Flax linen, Flax nnx, or the core alone.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jbn._core.deferral import (
    MissingCounts,
    Update,
    called,
    cells,
    chosen,
    defer,
    fitted,
    is_waiting,
)
from jbn._core.pooling import HostSums
from jbn._core.running import RunningStats, unbiased_var
from jbn._devices.named_axes import AxisName

__all__ = ["estimate"]

T = TypeVar("T")
Tree = Any  # of arrays
ApplyFn = Callable[[Tree, Tree, Any], Tree]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def estimate(
    apply_fn: ApplyFn,
    params: Tree,
    stats: Tree,
    batches: Batches,
    *,
    variance: Literal["pooled", "paper"] = "pooled",
    layer_by_layer: bool = False,
    mesh: Mesh | None = None,
    axis_name: AxisName | None = None,
) -> Tree:
    """Computes the statistics of all Batch Normalization layers on a data set (Alg. 2, lines 7-10).

        n = sum n_B,  mean = sum n_B mean_B / n
        var = sum n_B (var_B + (mean_B - mean)^2) / n         "pooled": that of all values
        mean = E_B[mean_B],  var = E_B[m_B/(m_B - 1) var_B]   "paper": Alg. 2, line 10

    >>> import jax.numpy as jnp, jbn.population
    >>> def apply_fn(params, stats, batch):
    ...     y, stats = jbn.batch_norm(batch, params, stats)
    ...     return stats
    >>> x = jnp.arange(10.0)[:, None]
    >>> batches = [x[:4], x[4:8], x[8:]]
    >>> stats = jbn.init_stats(1)
    >>> stats = jbn.population.estimate(apply_fn, jbn.init_params(1), stats, batches)
    >>> print(stats.mean, stats.var, stats.count)
    [4.5] [8.25] [3.]

    Args:
      apply_fn: (params, stats, batch) -> stats: the model in *training* mode, which returns only
        the new statistics. It is compiled once for each shape of a batch, and stays compiled: pass
        the same function each time, and not a new lambda. With linen,
        `apply(..., mutable=["batch_stats"])[1]["batch_stats"]`; with nnx, merge the model, call it
        and return `nnx.state(model, nnx.BatchStat)`.
      params: the parameters of the model, of any type.
      stats: linen's `batch_stats`, nnx's State of BatchStat, or a tree of jbn.RunningStats. State
        of other layers is returned as the model returns it for the last batch.
      batches: of any sizes, with masks or weights if the model takes them. Use batches as in
        training, because the input of deeper layers depends on the batch. With `layer_by_layer`
        they are read several times: pass a list, or a function that returns all batches each time.
      variance: "pooled": every value counts the same, as if the data set were one batch. "paper":
        every batch counts the same, and its variance is the unbiased one; weights are frequencies,
        as in `jbn.ema(unbiased=True)`. A batch with one value of a feature (a count below 1.5) has
        no unbiased variance, and is left out there.
      layer_by_layer: False: one pass, in which layers normalise by their batch, so that the input
        of a deeper layer is not quite that of inference. True: several passes, in which layers
        normalise by the result of the previous pass (in the first pass by `stats`), as in
        inference. Each pass makes one more layer of every path exact. The passes end when nothing
        changes any more, at the latest after as many passes as the model can have layers. (A layer
        that is called several times counts as several; if it depends on itself, the result need not
        be a fixed point. In statistics with further axes, such as a scan's, all axes but the
        shortest count as layers.)
      mesh: run in a shard_map over this mesh, with batches sharded along their first axis over
        axis_name. Moments are pooled over devices unless the layers have done so themselves. None
        on one device, and with sharded arrays, where a batch is the global one. If several
        processes compute together, batches must be global arrays; with a mesh of its own devices a
        process gets the statistics of its own batches.
      axis_name: one or several axes of mesh.

    Returns:
      A tree of the structure and dtypes of `stats`, the same on all devices and in all processes,
      with a `count` where the model has one and `stats` does not.
      `count` is the number of batches that entered, for each feature; a layer that is called
      several times counts each call. If a batch has no data of a feature, or a NaN or infinity, it
      is left out there. A feature without any batch keeps its old statistics, as do frozen layers
      and features whose statistics would be infinite in the dtype of `stats`.

    Raises:
      TypeError: a normalisation is not jbn's; branches do not update the same statistics; or
        batches is an array or a dictionary.
      ValueError: there is no batch, or none has data; batches are in one of several processes, can
        be read only once and layer_by_layer is True, or differ in number from pass to pass; a batch
        has a single value of each feature, and a layer would have to normalise by it (not with
        layer_by_layer); apply_fn returns something else than statistics, or updates none; variance
        is neither "pooled" nor "paper"; or only one of mesh and axis_name is given.

    PyTorch's `torch.optim.swa_utils.update_bn` takes E_B[m_B/(m_B - 1) var_B]: every batch counts
    the same, and the variance between the batches is left out.
    """
    if not callable(apply_fn):
        raise TypeError(
            f"apply_fn must be a function (params, stats, batch) -> stats, the model in training "
            f"mode; got {type(apply_fn).__name__}."
        )
    _check_options(variance, mesh, axis_name)
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    way = _Way(variance == "paper", layer_by_layer, mesh, names)
    read = _reader(batches, layer_by_layer)
    found = _measure(apply_fn, way, params, stats, read())
    _check_first(found)
    stats = found.given
    passes = sum(layer.calls for layer in found.layers.values()) if layer_by_layer else 1
    for i in range(2, passes + 1):
        previous = found
        found = _measure(apply_fn, way, params, _write(stats, previous.layers), read())
        if found.batches != previous.batches:
            raise ValueError(
                f"batches were {previous.batches} in the first pass and {found.batches} in pass "
                f"{i}: a function for batches= must return all of them each time, from the first "
                f"on."
            )
        # Compare to the last bit: a deep net may amplify the last bit of its first layer.
        if all(
            layer.value.tobytes() == previous.layers[at].value.tobytes()
            for at, layer in found.layers.items()
        ):
            break
    return _write(stats, found.layers, found.others)


class _Way(NamedTuple):
    """The options of a measurement; static."""

    paper: bool
    fixed: bool  # layers normalise by the statistics that they are given
    mesh: Mesh | None
    axis_name: AxisName | None


class _Found(NamedTuple):
    """RunningStats in NumPy: float64, complex128."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)


class _Layer(NamedTuple):
    """The result of one pass for one array of the statistics."""

    cell: Update  # of the last batch
    stats: _Found

    @property
    def calls(self) -> int:
        """The largest possible number of layers: calls, times further axes such as a scan's."""
        shape = self.cell.shape
        once = self.cell.field == "mean"
        # It is unknown which axis holds features; the shortest gives the largest number of layers.
        return once * len(self.cell.moments) * (math.prod(shape) // max(1, min(shape, default=1)))

    @property
    def value(self) -> np.ndarray:
        """The new value of the array, in its dtype."""
        return _rounded(getattr(self.stats, self.cell.field), self.cell.dtype)


class _Pass(NamedTuple):
    """The results of a pass over the batches; the keys are the positions among the leaves."""

    given: Tree  # the statistics, with counts where the model counts
    layers: dict[int, _Layer]
    others: dict[int, Array]  # the state of layers that are not jbn's, of the last batch
    batches: int


def _measure(
    apply_fn: ApplyFn, way: _Way, params: Tree, stats: Tree, batches: Iterable[Any]
) -> _Pass:
    """Runs one pass over the batches, and divides the sums of each array."""
    given = stats

    def steps() -> Iterator[tuple[dict[int, Update], dict[int, Array]]]:
        nonlocal given
        for batch in batches:
            batch = _check_batch(batch, way)
            try:
                result = _step(apply_fn, way, params, given, batch)
            except MissingCounts as missing:  # the model has not counted batches so far
                given = missing.filled(given)
                result = _step(apply_fn, way, params, given, batch)
            yield result

    sums: dict[int, HostSums] = {}
    last: dict[int, Update] = {}
    others: dict[int, Array] = {}
    n = 0
    for updates, returned in _one_behind(steps()):
        moments = _on_host({at: update.moments for at, update in updates.items()})
        for at, calls in moments.items():
            for m in calls:
                total = sums.get(at, HostSums.of_none(m))
                sums[at] = total.add(m, weighted=not way.paper)
        last |= updates
        others = returned
        n += 1
    if sums and not any(total.batches.any() for total in sums.values()):
        raise ValueError(
            "no batch has data: every value is masked, has weight 0, is NaN or infinite, or is so "
            "large that its square overflows. All statistics would stay as they were."
            + ' (Nor has "paper" use for a batch with one value of a feature, which has no '
            'unbiased variance; "pooled" has.)' * way.paper
        )
    layers = {
        at: _Layer(last[at], _divide(last[at].stats, sums[at], pooled=not way.paper)) for at in last
    }
    return _Pass(given, layers, others, n)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    apply_fn: ApplyFn, way: _Way, params: Tree, stats: Tree, batch: Tree
) -> tuple[dict[int, Update], dict[int, Array]]:
    """Computes the moments of a batch, for every call of every layer, and state of other layers."""

    def observe(params: Tree, stats: Tree, batch: Tree) -> tuple[dict, dict]:
        only = chosen(lambda v: apply_fn(params, v, batch), stats, fixed=way.fixed)
        waiting = defer(stats, fixed=way.fixed, only=only)
        new = fitted("apply_fn", called(apply_fn, params, waiting, batch), waiting)
        found = dict(enumerate(cells(new, axis_name=way.axis_name, deferred=only)))
        updates = {at: _bare(cell) for at, cell in found.items() if isinstance(cell, Update)}
        for update in updates.values():
            _check_has_variance(update)
        if way.paper:
            updates = {at: _unbiased(update) for at, update in updates.items()}
        return updates, {at: v for at, v in found.items() if not is_waiting(v)}

    if way.mesh is not None:
        # check_vma=False: nothing is differentiated, and all results have been pooled.
        specs = {"in_specs": (P(), P(), P(way.axis_name)), "out_specs": P(), "check_vma": False}
        observe = jax.shard_map(observe, mesh=way.mesh, **specs)
    return observe(params, stats, batch)


def _bare(update: Update) -> Update:
    """Removes the rules, which the statistics of a data set do not use."""
    return dataclasses.replace(update, rules=())


def _unbiased(update: Update) -> Update:
    """Replaces var by m/(m - 1) var, which is infinite, so left out, without two values."""
    moments = tuple(m._replace(var=unbiased_var(m)) for m in update.moments)
    return dataclasses.replace(update, moments=moments)


def _one_behind(results: Iterable[T]) -> Iterator[T]:
    """Yields each result when the next is under way: devices compute while the host adds up."""
    under_way: collections.deque[T] = collections.deque()
    for result in results:
        under_way.append(result)
        if len(under_way) > 1:
            yield under_way.popleft()
    yield from under_way


def _on_host(tree: T) -> T:
    """Converts to NumPy arrays, complete on every process."""
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def _divide(old: RunningStats, sums: HostSums, *, pooled: bool) -> _Found:
    """Divides the sums; keeps `old` where no batch has entered or the result cannot be stored."""
    new = *sums.divide(pooled=pooled), sums.batches
    old = _on_host(old)
    sound = sums.batches > 0
    for n, o in zip(new, old, strict=True):
        sound &= np.isfinite(_rounded(n, o.dtype))
    return _Found(*(np.where(sound, n, o) for n, o in zip(new, old, strict=True)))


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds `values` to the dtype that stores them; too large values become infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype)


def _write(stats: Tree, layers: dict[int, _Layer], others: dict[int, Array] | None = None) -> Tree:
    """Writes the results into `stats`, in the dtype and sharding of each array."""
    leaves, structure = jax.tree.flatten(stats)
    found = {at: layer.value for at, layer in layers.items()}
    found |= {at: _on_host(v).astype(leaves[at].dtype) for at, v in (others or {}).items()}
    for at, value in found.items():
        lies = leaves[at]
        # JAX places an array that is not committed where it is needed.
        committed = isinstance(lies, Array) and lies.committed
        leaves[at] = jax.device_put(value, lies.sharding) if committed else jnp.asarray(value)
    return jax.tree.unflatten(structure, leaves)


def _reader(batches: Batches, again: bool) -> Callable[[], Iterable[Any]]:
    """Makes a function that returns the batches, from the first on."""
    if callable(batches):
        return batches
    if isinstance(batches, np.ndarray | Array | Mapping):
        kind = "a dictionary" if isinstance(batches, Mapping) else "an array"
        raise TypeError(
            f"batches must be a list or another iterable of batches, or a function that returns "
            f"one; got {kind}, which would be taken apart. If it is one batch, pass [batch]; if "
            f"its first axis counts batches, list(batches)."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise TypeError(
            f"batches must be a list or another iterable of batches, or a function that returns "
            f"one; got {type(batches).__name__}."
        )
    if again and iter(batches) is batches:
        raise ValueError(
            f"layer_by_layer=True reads the batches several times, and batches is a "
            f"{type(batches).__name__}, which is used up after the first. Pass a list, or a "
            f"function that returns the batches: lambda: load(...)."
        )
    return lambda: batches


def _check_batch(batch: T, way: _Way) -> T:
    """Refuses batches that only one process has, if several processes compute together."""
    if jax.process_count() == 1:
        return batch
    devices = jax.devices() if way.mesh is None else way.mesh.devices.flat
    together = len({device.process_index for device in devices}) > 1
    arrays = [x for x in jax.tree.leaves(batch) if np.ndim(x) > 0]
    if together and any(not isinstance(x, Array) or x.is_fully_addressable for x in arrays):
        raise ValueError(
            "batches lie in this process alone, one of several. Make them global: with "
            "jax.make_array_from_process_local_data where each process has a part, with "
            "jax.make_array_from_callback where each has all. For statistics of this process "
            "alone pass a mesh of jax.local_devices()."
        )
    return batch


def _check_has_variance(update: Update) -> None:
    if update.features is not None:
        raise TypeError(
            f"the statistics at {update.path or 'the root'} are a covariance, of a whitening "
            f"layer: jbn.population takes means and variances. Train with "
            f"update=jbn.cumulative() there, or run the training mode over the data set."
        )


def _check_first(found: _Pass) -> None:
    if found.batches == 0:
        raise ValueError("batches is empty: there are no statistics to take.")
    if not found.layers:
        raise ValueError(
            "apply_fn updated no statistics: the model has to run in training mode, such as "
            "use_running_average=False in linen, or model.train() in nnx."
        )


def _check_options(variance: str, mesh: Mesh | None, axis_name: AxisName | None) -> None:
    if variance not in ("pooled", "paper"):
        raise ValueError(
            f'variance must be "pooled", that of all values, or "paper", that of Alg. 2, line 10; '
            f"got {variance!r}."
        )
    if (mesh is None) != (axis_name is None):
        raise ValueError(
            f"mesh and axis_name belong together: batches are cut over the axis of the mesh; got "
            f"mesh={mesh} and axis_name={axis_name!r}. With sharded arrays leave out both."
        )
