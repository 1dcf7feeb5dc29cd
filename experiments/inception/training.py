"""One run of one recipe: train, measure, save; and go on where an earlier run was stopped.

Everything is one program under ``jit``. On several devices the batch is cut over them, and whose
statistics a Batch Normalization layer takes is only a matter of its ``groups``: none for those of
the whole batch, one for each device for local statistics, and any other number between.

A run leaves, in a folder of its own, its measurements as JSON lines, its events for TensorBoard and
its newest checkpoint. Started again it goes on from there: batches and random numbers depend on the
step alone, so the end is the same as without the stop.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jbn.population
import jbn.training
from experiments.common import checkpoints
from experiments.common.records import Records
from experiments.images import data
from experiments.inception.recipes import (
    Recipe,
    Scale,
    hyperparameters,
    n_steps,
    network,
    optimizer,
)
from experiments.nets import bn_inception, convolution

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

log = logging.getLogger(__name__)
AXIS = "batch"
STATISTICS = ("synchronised", "ghost", "local")
PATIENCE = 20  # steps in a row without finite gradients; then a run has diverged
LOOK = 100  # steps from one look at the losses to the next
AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head, as in GoogLeNet


class Options(NamedTuple):
    """How a run is computed and what it leaves."""

    workers: int = 0
    devices: int | None = None  # None: all
    statistics: str = "synchronised"
    ghost_batch: int = 16  # images that share their statistics, if they are "ghost"
    bfloat16: bool = False
    auxiliary: bool = False
    tensorboard: bool = False
    checkpoint_every: int = 1_000  # steps
    stop_after: int | None = None  # steps; as if interrupted there

    def of_program(self) -> Options:
        """Without what a compiled program does not depend on."""
        names = "devices", "statistics", "ghost_batch", "bfloat16", "auxiliary"
        return Options(**{name: getattr(self, name) for name in names})


class Run(NamedTuple):
    """One network to train."""

    name: str  # of the recipe
    recipe: Recipe
    scale: Scale
    rate: float  # the baseline's first
    seed: int

    @property
    def folder(self) -> str:
        """Where it leaves its results."""
        words = self.name.replace(",", "").replace("%", "").split()
        return f"{'-'.join(words)}-rate{self.rate:g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """How many it takes."""
        return n_steps(self.recipe, self.scale)

    @property
    def every(self) -> int:
        """Steps from one measurement to the next: short runs are looked at more closely."""
        shorter = 1 if self.recipe.share == 1 else 2
        return max(1, self.scale.steps // (shorter * self.scale.evaluations))


class Sets(NamedTuple):
    """The images."""

    train: data.ImageSet
    val: data.ImageSet


# --- The compiled parts -------------------------------------------------------------------------


def as_input(images: Array) -> Array:
    """uint8 to float32 of about zero mean and unit variance."""
    return (images.astype(jnp.float32) - 127.5) / 64.0


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Of each image, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_loss(net: bn_inception.Inception) -> Callable[..., Any]:
    """The mean cross-entropy of a batch; that of auxiliary heads is added."""

    def loss_fn(params: Any, stats: Any, batch: Any, key: Array) -> Any:
        variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key}
        x = as_input(batch["image"])
        out, new = net.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        logits, heads = out if isinstance(out, tuple) else (out, [])
        loss = cross_entropy(logits, batch["label"]).mean()
        for head in heads:
            loss += AUXILIARY_WEIGHT * cross_entropy(head, batch["label"]).mean()
        return loss, new.get("batch_stats", {}), {}

    return loss_fn


def make_judge(net: bn_inception.Inception) -> Callable[..., Any]:
    """Loss and accuracies over the images that a batch's mask lets pass."""

    def judge(params: Any, stats: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits: Any = net.apply(variables, as_input(batch["image"]), train=False)
        labels = jnp.maximum(batch["label"], 0)  # padding has none
        place = rank(logits, labels)
        values = {"loss": cross_entropy(logits, labels), "top1": place <= 1, "top5": place <= 5}
        values = {k: v.astype(jnp.float32) for k, v in values.items()}
        weights = batch["mask"].astype(jnp.float32)
        return {k: jbn.training.Mean((v * weights).sum(), weights.sum()) for k, v in values.items()}

    return judge


def rank(scores: Array, labels: Array) -> Array:
    """The place of the right class among all: 1 is the best, and shared places are the last.

    ``scores: [N, n_classes]``, ``labels: [N]``; a NaN or infinity is in the last place of all.
    """
    own = jnp.take_along_axis(scores, labels[:, None], 1)
    place = (~(scores < own)).sum(1)
    return jnp.where(jnp.isfinite(own[:, 0]), place, jnp.iinfo(place.dtype).max)


class Program(NamedTuple):
    """The compiled functions of a network, and where they run."""

    mesh: Mesh
    start: Callable[..., jbn.training.TrainState]  # of (key, hyperparameters)
    step: Callable[..., Any]  # (state, batch, key) -> (state, metrics)
    judge: Callable[..., Any]  # (params, stats, batch) -> metrics
    collect: Callable[..., Any]  # (params, stats, batch) -> stats, in training mode

    def place(self, batch: Any) -> Any:
        """Every process' share of a batch, as the global batch on all devices."""
        split = NamedSharding(self.mesh, P(AXIS))
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, split), batch)


@functools.cache
def program(recipe: Recipe, scale: Scale, n_classes: int, options: Options) -> Program:
    """Made once for all runs that differ in nothing else: to be given what `of_...` return."""
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    slots = network_slots(scale, n_classes, options)
    plain = network(recipe, scale, **slots)  # ghost batches are for training
    net = network(recipe, scale, groups=n_groups(scale, options, len(devices)), **slots)
    loss_fn = make_loss(net)
    step = jbn.training.make_train_step  # the key is an argument, so that all seeds share a program

    def start(key: Array, hyper: dict[str, Array]) -> jbn.training.TrainState:
        image = jnp.zeros((1, scale.size, scale.size, 3))
        variables = plain.init({"params": key, "dropout": key}, image, train=options.auxiliary)
        stats = variables.get("batch_stats", {})
        return jbn.training.init(variables["params"], stats, optimizer(**hyper))

    def train_step(state: Any, batch: Any, key: Array) -> Any:
        return step(loss_fn, optimizer(0.0, 0.0, 0.0), rng=key)(state, batch)

    def collect(params: Any, stats: Any, batch: Any) -> Any:
        return loss_fn(params, stats, batch, jax.random.key(0))[1]

    everywhere = NamedSharding(mesh, P())
    return Program(
        mesh,
        jax.jit(start, out_shardings=everywhere),
        jax.jit(train_step, donate_argnums=0, out_shardings=everywhere),
        make_judge(plain),
        collect,
    )


def network_slots(scale: Scale, n_classes: int, options: Options) -> dict[str, Any]:
    """What a network has besides its recipe."""
    slots: dict[str, Any] = {"n_classes": n_classes}
    if options.auxiliary:
        names = [row.name for row in bn_inception.rows(*scale.modules, repeat=scale.repeat)]
        slots["auxiliary"] = tuple({"4a", "4d"} & {*names}) or (names[-1],)
    if options.bfloat16:
        slots["dtype"] = jnp.bfloat16
    if jax.default_backend() == "cpu" and scale.size < 64:
        slots["conv"] = convolution.CPU_CONV
    return slots


def n_groups(scale: Scale, options: Options, devices: int) -> int | None:
    """How many parts of a batch are normalised on their own; None: it is one."""
    counts = {"synchronised": 1, "local": devices, "ghost": scale.batch // options.ghost_batch}
    groups = counts[options.statistics]
    return groups if groups > 1 else None


# --- What a run leaves --------------------------------------------------------------------------


class Notebook:
    """The measurements of a run: JSON lines, and TensorBoard's events if wanted.

    Of several processes all measure the same, and the first one writes it down.
    """

    def __init__(self, path: Path, *, resume_from: int, tensorboard: bool, **header: Any):
        writes = jax.process_index() == 0
        self.records = Records(path, resume_from=resume_from, **header) if writes else None
        self.writer: Any = None
        if tensorboard and writes:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_from)

    def write(self, kind: str, **fields: Any) -> None:
        """A line; of every number in it a point of a curve."""
        if self.records is not None:
            self.records.write(kind, **fields)
        for name, value in fields.items():
            if self.writer is not None and name != "step" and isinstance(value, float):
                self.writer.add_scalar(f"{kind}/{name}", value, fields["step"])

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *error: object) -> None:
        if self.records is not None:
            self.records.__exit__(*error)
        if self.writer is not None:
            self.writer.close()


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The measurements in a file, of one kind or all; none, if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a line that was being written when the program died
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


# --- A run --------------------------------------------------------------------------------------


def train(run: Run, sets: Sets, out: Path, about: dict[str, Any], options: Options) -> Path:
    """Trains one network, or goes on with it; returns the file of its measurements.

    A run that has ended is not begun again.
    """
    path = out / run.folder / "measurements.jsonl"
    with alone(path.parent):
        identity = json.loads(json.dumps(described(run, options)))  # as the file has it
        check_same(path, identity)
        if not lines(path, "end"):
            _train(run, sets, path, about | identity, options)
    return path


def _train(run: Run, sets: Sets, path: Path, about: dict[str, Any], options: Options) -> None:
    made = program(
        run.recipe.of_network(),
        run.scale.of_network(),
        len(sets.train.classes),
        options.of_program(),
    )
    key, dropout_key = jax.random.split(jax.random.key(run.seed))
    hyper = {k: np.float32(v) for k, v in hyperparameters(run.recipe, run.scale, run.rate).items()}
    with (
        checkpoints.manager(path.parent / "checkpoints", keep=1) as manager,
        jax.set_mesh(made.mesh),
    ):
        state = checkpoints.resume(manager, made.start(key, hyper))
        header = {**about, "steps": run.steps, "options": options._asdict()}
        with Notebook(
            path, resume_from=int(state.step), tensorboard=options.tensorboard, **header
        ) as notebook:
            loop = Loop(run, sets, options, made, notebook)
            state, diverged = loop.advance(state, dropout_key, manager)
            if diverged or int(state.step) >= run.steps:
                loop.finish(state, diverged)


def described(run: Run, options: Options) -> dict[str, Any]:
    """All that the results of a run depend on."""
    computed = {k: getattr(options, k) for k in ("statistics", "bfloat16", "auxiliary")}
    if options.statistics == "ghost":
        computed["ghost_batch"] = options.ghost_batch
    if options.statistics == "local":
        computed["devices"] = options.devices or jax.device_count()
    return {
        "run": run.name,
        "seed": run.seed,
        "rate": run.rate,
        "dataset": run.scale.name,
        "baseline_steps": run.scale.steps,
        "evaluations": run.scale.evaluations,
        "of_network": run.scale.numbers(),
        "recipe": run.recipe._asdict(),
        **computed,
    }


def check_same(path: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError if the file tells of a run that is another one."""
    headers = lines(path, "header")
    for name, value in identity.items():
        given = headers[-1].get(name) if headers else value
        if given != value:
            raise ValueError(
                f"{path.parent} holds a run with {name}={given}, and not {value}. Give the same "
                "options as then to go on with it, or another folder with --out."
            )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder of a run as long as it is written to.

    Raises ValueError, in all processes, if another program holds it.
    """
    with contextlib.ExitStack() as stack:
        free = jax.process_index() != 0 or _hold(folder, stack)
        if jax.process_count() > 1:  # as the first process says
            free = bool(multihost_utils.broadcast_one_to_all(np.asarray(free)))
        if not free:
            raise ValueError(
                f"{folder} is in use: another program trains this very run. Wait for it, or give "
                "another folder with --out."
            )
        yield


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Whether the folder is free; then it is held until the stack is left, or the program dies."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / "lock").open("w"))
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some shared file systems have no locks
        log.warning("%s cannot be locked: take care that no other program trains this run.", folder)
    return True


class Tally:
    """Losses of the steps since the last measurement, and whether steps are taken at all."""

    def __init__(self) -> None:
        self._new: list[dict[str, Array]] = []  # on devices, so that adding does not wait
        self._seen: list[tuple[float, bool]] = []
        self._in_a_row = 0

    def add(self, metrics: dict[str, Array]) -> None:
        """Takes in a step."""
        self._new.append(metrics)

    def _fetch(self) -> None:
        for metrics in jax.device_get(self._new):
            self._seen.append((float(metrics["loss"]), bool(metrics["skipped"])))
            self._in_a_row = self._in_a_row + 1 if metrics["skipped"] else 0
        self._new = []

    def diverged(self) -> bool:
        """Whether the last `PATIENCE` steps were all skipped."""
        self._fetch()
        return self._in_a_row >= PATIENCE

    def loss(self) -> float:
        """Mean over the steps, nats."""
        self._fetch()
        return float(np.mean([loss for loss, _ in self._seen]))

    def skipped(self) -> int:
        """How many steps had no finite gradients."""
        return sum(skipped for _, skipped in self._seen)

    def forget(self) -> None:
        """Begins anew, after a measurement."""
        self._seen = []


class Loop(NamedTuple):
    """What stays the same during a run."""

    run: Run
    sets: Sets
    options: Options
    made: Program
    notebook: Notebook

    def advance(self, state: Any, key: Array, manager: Any) -> tuple[Any, bool]:
        """Trains to the end, or to where the run is to stop; whether it has diverged."""
        first, end = int(state.step), self.run.steps
        last = min(end, self.options.stop_after or end)
        tally = Tally()
        batches = self.batches(self.run.seed, first)
        with progress(self.run, first) as bar:
            try:
                for i in range(first + 1, last + 1):
                    state, metrics = self.made.step(state, self.made.place(next(batches)), key)
                    tally.add(metrics)
                    bar.update()
                    due = i % self.run.every == 0 or i == end
                    if (due or i % LOOK == 0) and tally.diverged():
                        self.measure(state, tally)
                        return state, True
                    if due:
                        bar.set_postfix_str(self.measure(state, tally))
                        tally.forget()
                    if i % self.options.checkpoint_every == 0 or i == last:
                        checkpoints.save(manager, state)
            finally:
                batches.close()
                manager.wait_until_finished()
        return state, False

    def batches(self, seed: int, start: int) -> data.Batches:
        """Of training images, this process' share, as the recipe wants them."""
        run, n = self.run, jax.process_count()
        return data.train_batches(
            self.sets.train,
            batch=run.scale.batch // n,
            size=run.scale.size,
            seed=seed,
            crop=run.scale.crop,
            distortion=run.recipe.distortion,
            shuffle=run.recipe.shuffle,
            shards=min(run.scale.shards, len(self.sets.train)),
            workers=self.options.workers,
            process_index=jax.process_index(),
            process_count=n,
            start=start,
        )

    def measure(self, state: Any, tally: Tally) -> str:
        """Writes down how training goes, and the accuracy by the moving averages."""
        judged = self.judge(state.params, state.stats)
        row = {"train_loss": tally.loss(), "skipped": tally.skipped(), **judged}
        self.notebook.write("measurement", step=int(state.step), **row)
        return f"loss {row['train_loss']:.3f}, accuracy {judged['top1']:.1%}"

    def judge(self, params: Any, stats: Any) -> dict[str, float]:
        """Loss, top-1 and top-5 accuracy on the validation images, with these statistics."""
        n = jax.process_count()
        batches = data.eval_batches(
            self.sets.val,
            batch=self.run.scale.eval_batch // n,
            size=self.run.scale.size,
            workers=self.options.workers,
            process_index=jax.process_index(),
            process_count=n,
        )
        try:
            state: Any = jbn.training.TrainState(jnp.zeros((), jnp.int32), params, stats, ())
            return jbn.training.evaluate(self.made.judge, state, map(self.made.place, batches))
        finally:
            batches.close()

    def finish(self, state: Any, diverged: bool) -> None:
        """The last line: accuracy by moving averages, and by the statistics of the whole set."""
        judged = self.judge(state.params, state.stats)
        results: dict[str, Any] = {"diverged": diverged, **judged}
        if self.run.recipe.batch_norm and not diverged:
            exact = self.judge(state.params, self.population(state))
            results |= {f"{name}_population": value for name, value in exact.items()}
        self.notebook.write("end", step=int(state.step), **results)

    def population(self, state: Any) -> Any:
        """Algorithm 2: over training images, prepared as in training."""
        wanted = min(self.run.scale.population, len(self.sets.train))
        n = max(1, wanted // self.run.scale.batch)
        batches = self.batches(self.run.seed + 1_000_000, 0)
        try:
            some = map(self.made.place, itertools.islice(batches, n))
            return jbn.population.estimate(self.made.collect, state.params, state.stats, some)
        finally:
            batches.close()


def progress(run: Run, first: int) -> tqdm:
    """The bar; one process of several shows it."""
    return tqdm(
        total=run.steps,
        initial=first,
        desc=f"{run.name}, seed {run.seed}",
        unit=" steps",
        disable=jax.process_index() != 0,
    )
