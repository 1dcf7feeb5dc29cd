"""Measures how much several views of an image, and several networks, add to the accuracy of one.

Section 4.2.3: an ensemble predicts the arithmetic mean of its networks' class probabilities; a
network predicts their mean over several crops of an image.

    p(class) = mean over networks, mean over views, softmax(logits)

The views are the centre alone, or GoogLeNet's 144 crops, or, for small images, which fill the
frame, the views of training: shifted by an eighth of the side or not, in either direction, and
mirrored.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbn.training
from experiments.common import checkpoints
from experiments.images import augment, data
from experiments.inception import notebook, programs
from experiments.inception import training as inception_train
from experiments.inception.programs import Program
from experiments.inception.recipes import SCALES, Recipe, hyperparameters, network
from experiments.inception.runs import Options, Run, Sets
from experiments.nets.inputs import as_input

CROPS = ("shifts", "144")


class Member(NamedTuple):
    """One trained network."""

    run: Run
    options: Options
    params: Any
    stats: dict[str, Any]  # keys: "moving averages", "Algorithm 2"


class Score(NamedTuple):
    """Sums over images; divide last."""

    images: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    loss: float = 0.0

    def plus(self, probabilities: np.ndarray, batch: Any) -> Score:
        """Adds a batch with ``probabilities: [N, n_classes]``."""
        seen, labels = batch["mask"], np.maximum(batch["label"], 0)
        own = np.take_along_axis(probabilities, labels[:, None], 1)
        place = np.asarray(programs.rank(jnp.asarray(probabilities), jnp.asarray(labels)))
        loss = -np.log(np.maximum(own[:, 0], np.finfo(np.float32).tiny))
        values = (np.ones(len(seen)), place <= 1, place <= 5, loss)
        return Score(*(a + float(v[seen].sum()) for a, v in zip(self, values, strict=True)))

    def means(self) -> dict[str, float]:
        """Returns the means per image."""
        return {k: v / self.images for k, v in self._asdict().items() if k != "images"}


# --- Networks -----------------------------------------------------------------------------------


def finished(out: Path, recipe: str) -> list[Path]:
    """Lists the folders of a recipe's runs, and its variants', that ended without diverging.

    Raises:
      FileNotFoundError: there is no such run.
    """
    found = []
    for path in sorted(out.glob("*/measurements.jsonl")):
        [*_, header] = notebook.lines(path, "header") or [{"run": ""}]
        ends = notebook.lines(path, "end")
        # A variant is called "recipe, change".
        named = recipe in (header["run"], header["run"].split(",")[0])
        if named and ends and not ends[-1]["diverged"]:
            found.append(path.parent)
    if not found:
        raise FileNotFoundError(
            f"{out} has no run of {recipe} that has ended. Expected the folder that "
            "experiments.inception was given with --out, after `table` or `ensemble`."
        )
    return found


def restore(
    folder: Path, dataset: str, n_classes: int, devices: int | None = None, workers: int = 0
) -> Member:
    """Restores the network of a run, with its moving averages.

    Args:
      folder: the folder of the run.
      dataset: the name, in `SCALES`, of the data set that it was trained on.
      n_classes: the number of classes of that data set.
      devices: how many devices it is to run on; None: all. It may have been trained on others.
      workers: processes that will read its images.

    Raises:
      FileNotFoundError: the folder has no run, or the run no checkpoint.
    """
    headers = notebook.lines(folder / "measurements.jsonl", "header")
    if not (headers and (folder / "checkpoints").is_dir()):
        raise FileNotFoundError(
            f"{folder} holds no run with a checkpoint. Expected a folder that "
            "experiments.inception has made, with measurements.jsonl and checkpoints/."
        )
    header, scale = headers[-1], SCALES[dataset]
    given = header["of_network"]
    scale = scale._replace(**given | {"modules": tuple(given["modules"])})
    run = Run(header["run"], Recipe(**header["recipe"]), scale, header["rate"], header["seed"])
    kept = {k: header["options"][k] for k in ("bfloat16", "auxiliary")}
    options = Options(devices=devices, workers=workers, **kept)
    made = compiled(run, options, n_classes).program
    given = hyperparameters(run.recipe, run.scale, run.rate)
    hyper = {k: np.float32(v) for k, v in given.items()}
    shapes = jax.eval_shape(made.start, jax.random.key(0), hyper)
    everywhere = jax.sharding.NamedSharding(made.mesh, jax.sharding.PartitionSpec())
    like: Any = jax.tree.map(lambda x: x.update(sharding=everywhere), shapes)
    with checkpoints.manager(folder / "checkpoints", keep=1) as manager:
        state = checkpoints.resume(manager, like)
    if state is like:
        raise FileNotFoundError(f"{folder / 'checkpoints'} holds no checkpoint.")
    return Member(run, options, state.params, {"moving averages": state.stats})


class Compiled(NamedTuple):
    """The functions that all members of the same architecture share."""

    program: Program
    probabilities: Callable[..., jax.Array]  # (crops, params, stats, images)


def compiled(run: Run, options: Options, n_classes: int) -> Compiled:
    """Compiles a network; those that differ in Dropout or in their initial kernels share it."""
    recipe = run.recipe.of_network()._replace(dropout=0.0, init=1.0)
    return _compiled(recipe, run.scale.of_network(), n_classes, options.of_program())


@functools.cache
def _compiled(recipe: Recipe, scale: Any, n_classes: int, options: Options) -> Compiled:
    slots = programs.network_slots(scale, n_classes, options)
    net = network(recipe, scale, **slots)

    def probabilities(crops: str, params: Any, stats: Any, images: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}

        def add(total: jax.Array, view: jax.Array) -> tuple[jax.Array, None]:
            logits: Any = net.apply(variables, as_input(view), train=False)
            return total + jax.nn.softmax(logits), None

        looks = views(images, crops)
        total, _ = lax.scan(add, jnp.zeros((len(images), n_classes)), looks)
        return total / len(looks)

    program = programs.program(recipe, scale, n_classes, options)
    return Compiled(program, jax.jit(probabilities, static_argnums=0))


def with_population(member: Member, sets: Sets) -> Member:
    """Adds the statistics of Algorithm 2 to a member, if its network has any."""
    if not member.run.recipe.batch_norm:
        return member
    made = compiled(member.run, member.options, len(sets.train.classes)).program
    no_notebook: Any = None
    loop = inception_train.Loop(member.run, sets, member.options, made, no_notebook)
    step, stats = jnp.zeros((), jnp.int32), member.stats["moving averages"]
    with jax.set_mesh(made.mesh):
        exact = loop.population(jbn.training.TrainState(step, member.params, stats, ()))
    return member._replace(stats=member.stats | {"Algorithm 2": exact})


# --- Views --------------------------------------------------------------------------------------


def views(images: jax.Array, crops: str) -> jax.Array:
    """Makes the views ``[V, N, size, size, 3]`` of a batch of `data.eval_batches`."""
    if crops == "centre":
        return images[None]
    return shifts(images) if crops == "shifts" else jnp.moveaxis(images, 1, 0)


def shifts(images: jax.Array) -> jax.Array:
    """Makes ``[18, N, H, W, 3]``: nine places, and their mirror images.

    Reflection fills the borders. The first view is the image itself.
    """
    height, width = images.shape[1:3]
    down, right = (round(augment.SHIFT * side) for side in (height, width))
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)), mode="reflect")
    places = itertools.product((down, 0, 2 * down), (right, 0, 2 * right))
    moved = [padded[:, i : i + height, j : j + width] for i, j in places]
    return jnp.stack(moved + [image[:, :, ::-1] for image in moved])


# --- Evaluation ---------------------------------------------------------------------------------


def judge(
    members: Sequence[Member], images: data.ImageSet, crops: str, statistics: str
) -> tuple[list[Score], Score]:
    """Returns each network's scores, and the scores of all networks together."""
    first, options = members[0].run.scale, members[0].options
    batches = data.eval_batches(
        images,
        batch=first.eval_batch,
        size=first.size,
        crops="144" if crops == "144" else "centre",
        workers=options.workers,
    )
    alone, together = [Score() for _ in members], Score()
    try:
        for batch in batches:
            found = list(predict(members, batch["image"], len(images.classes), crops, statistics))
            alone = [s.plus(p, batch) for s, p in zip(alone, found, strict=True)]
            together = together.plus(np.mean(found, 0), batch)
    finally:
        batches.close()
    return alone, together


def predict(
    members: Sequence[Member], images: np.ndarray, n_classes: int, crops: str, statistics: str
) -> Iterator[np.ndarray]:
    """Yields the class probabilities ``[N, n_classes]`` of every network."""
    for member in members:
        stats = member.stats.get(statistics, member.stats["moving averages"])
        made = compiled(member.run, member.options, n_classes)
        with jax.set_mesh(made.program.mesh):
            placed = made.program.place(images)
            yield np.asarray(made.probabilities(crops, member.params, stats, placed))


def ensemble_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Makes a line for each network, for their mean, and for all together; top-1 (top-5)."""
    ways = list(dict.fromkeys((row["crops"], row["statistics"]) for row in rows))
    cells: dict[str, list[str]] = {name: [] for name in dict.fromkeys(row["name"] for row in rows)}
    mean: list[str] = []
    for way in ways:
        mine = [row for row in rows if (row["crops"], row["statistics"]) == way]
        for row in mine:
            cells[row["name"]].append(f"{row['top1']:.2%} ({row['top5']:.2%})")
        members = [row for row in mine if row["kind"] == "member"]
        top1, top5 = (np.mean([row[k] for row in members]) for k in ("top1", "top5"))
        mean.append(f"{top1:.2%} ({top5:.2%})")
    *alone, together = cells.items()
    header = ["network", *(f"{crops}, {statistics}" for crops, statistics in ways)]
    lines = [*alone, ("mean of them", mean), together]
    return [header, *([name, *values] for name, values in lines)]
