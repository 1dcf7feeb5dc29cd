"""Whose batch statistics? Why devices that hold few images each must share them.

Data parallel training gives every device a small batch of its own. Here a small ResNet trains on
CIFAR-10 with 2 images a device, on 1, 2, 4 and 8 devices, normalised in three ways:

- ``local``: every device by the moments of its own 2 images. No communication.
- ``ghost``: pairs of devices share; ``groups=`` of the global batch, under ``jit``.
- ``synchronised``: all devices share; ``axis_name=``, under ``shard_map``.

Claim: with local statistics more devices bring nothing, whatever the batch of all of them together.
With shared statistics accuracy rises with the number of images that share, and so does how often
training and inference agree on the class of an image.

Command::

    python -m experiments.scaling --data-dir DIR     # CIFAR-10 in DIR
    python -m experiments.scaling --download         # fetches it first, 170 MB
    python -m experiments.scaling --smoke            # seconds, on made-up images: does it run?

Expected test accuracy after 16,000 images: 38 % on one device; on eight 39 % with local statistics,
42 % with ghost batches of 4 images and 46 % with synchronised ones. 20 minutes on two CPU cores.

The devices are virtual: shares of one CPU. They compute what as many real ones would, only slower.

The same in every run of a seed: initial parameters, images and their order, how many images are
seen (each at most once an epoch), SGD with momentum 0.9 and a cosine schedule, a learning rate
proportional to the images a step (Goyal et al., arXiv 1706.02677), running averages over the last
2,000 images. So runs on as many devices differ in nothing but the statistics.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from experiments.common import cluster, figures
from experiments.common.command import at_least_one
from experiments.common.records import Records, aligned
from experiments.images.photos import (
    CIFAR10_URL,
    CIFAR10_WANTED,
    N_CLASSES,
    Photos,
    download_cifar10,
    painted_stripes,
    read_cifar10,
)
from experiments.nets.convolution import matmul_conv
from experiments.nets.resnet import ResNet

# In this order the first of several that are the same on so many devices is the one that runs.
STATISTICS = ("local", "synchronised", "ghost")
AXIS = "batch"
JUDGED_AT_ONCE = 512  # images


class Config(NamedTuple):
    """What the runs depend on, besides the photographs."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    per_device: int = 2  # images a device and step
    images: int = 16_000  # that a run trains on
    seeds: tuple[int, ...] = (0, 1)
    learning_rate: float = 0.1  # the first, at 16 images a step
    window: int = 2_000  # images that the running statistics average over
    every: int = 2_000  # images from one movement of the progress bar to the next
    judged: int = 2_560  # images of either set that a network is judged by
    widths: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 2


class Case(NamedTuple):
    """One network to train."""

    statistics: str
    devices: int
    seed: int


class Judgement(NamedTuple):
    """How a network does on a set of images."""

    loss: Array  # [] nats, mean over the images
    accuracy: Array  # []
    predicted: Array  # [N] int32, the class of each image


# --- Which runs there are -----------------------------------------------------------------------


def sharing(statistics: str, devices: int) -> int:
    """How many devices share their statistics. An odd number has no pairs: there ghost is local."""
    pair = 2 if devices % 2 == 0 else 1
    return {"local": 1, "ghost": pair, "synchronised": devices}[statistics]


def runs_as(statistics: str, devices: int) -> str:
    """The statistics that stand for these: on one device all are the same, on two two of them."""
    shared = sharing(statistics, devices)
    return next(name for name in STATISTICS if sharing(name, devices) == shared)


def cases(config: Config) -> Iterator[Case]:
    """Every network that differs from the ones before; a whole table first, then the next seed."""
    for seed, devices in itertools.product(config.seeds, config.devices):
        for statistics in STATISTICS:
            if runs_as(statistics, devices) == statistics:
                yield Case(statistics, devices, seed)


# --- Training -----------------------------------------------------------------------------------


def network(config: Config, statistics: str = "local", devices: int = 1) -> ResNet:
    """The same layers in every run: the scope of the statistics is no parameter."""
    # So the running statistics average over as many images however many make a step.
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


def as_input(images: Array) -> Array:
    """uint8 to float32 of about zero mean and unit variance."""
    return (images.astype(jnp.float32) - 127.5) / 64.0


def make_optimizer(config: Config, devices: int) -> optax.GradientTransformation:
    """SGD with momentum, on a cosine from a rate proportional to the images a step."""
    batch = config.per_device * devices
    first, steps = config.learning_rate * batch / 16, config.images // batch

    def rate(step: ArrayLike) -> Array:
        done = jnp.asarray(step, jnp.float32) / steps
        return first * 0.5 * (1 + jnp.cos(jnp.pi * done))

    return optax.sgd(rate, momentum=0.9)


def make_loss(net: ResNet) -> Callable[..., tuple[Array, Any, dict[str, Array]]]:
    """Softmax cross-entropy [nats], mean over the batch; and the updated running statistics."""

    def loss_fn(params: Any, stats: Any, batch: tuple[Array, Array]) -> Any:
        images, labels = batch
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, as_input(images), True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"], {}

    return loss_fn


@functools.cache
def make_trainer(config: Config, statistics: str, devices: int) -> tuple[Mesh, Callable[..., Any]]:
    """The mesh, and the compiled ``(state, images, labels) -> (state, mean loss)`` of many steps.

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
    """Which image comes when, ``[wanted]``: every epoch a new shuffle."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(n_images) for _ in range(-(-wanted // n_images))]
    return np.concatenate(epochs)[:wanted]


def train(config: Config, photos: Photos, case: Case) -> tuple[Any, float]:
    """The trained variables, and the mean loss over the last ``config.every`` images."""
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
            with jax.set_mesh(mesh):  # tells jbn how many parts a sharded array has
                state, loss = train_steps(state, images, labels)
            bar.set_postfix_str(f"loss {float(loss):.3f}")
            bar.update(len(chunk))
    return jax.device_get({"params": state.params, "batch_stats": state.stats}), float(loss)


# --- Judging ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "shared_by"))
def judge(
    config: Config, variables: Any, images: Array, labels: Array, shared_by: int | None = None
) -> Judgement:
    """Loss and accuracy by the running statistics, or by those of ``shared_by`` images at a time.

    The latter is what a training step sees whose devices share statistics over so many images.
    Images that fill no group are left out.
    """
    net, size = network(config), shared_by or 1

    def one_group(group: tuple[Array, Array]) -> tuple[Array, Array]:
        pixels, truth = group
        train = shared_by is not None
        logits, _ = net.apply(variables, as_input(pixels), train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
        return losses, logits.argmax(-1).astype(jnp.int32)

    n = len(images) // size * size
    groups = images[:n].reshape(-1, size, *images.shape[1:]), labels[:n].reshape(-1, size)
    losses, predicted = lax.map(one_group, groups, batch_size=max(1, JUDGED_AT_ONCE // size))
    predicted = predicted.reshape(-1)
    return Judgement(losses.mean(), jnp.mean(predicted == labels[:n]), predicted)


def spread_out(n_images: int, wanted: int) -> np.ndarray:
    """Indices of ``wanted`` images, evenly from a set that may be sorted by class."""
    return np.arange(n_images) if n_images <= wanted else np.arange(wanted) * n_images // wanted


def measure(config: Config, photos: Photos, case: Case, variables: Any) -> dict[str, Any]:
    """Accuracy on both sets; on the training images by the batch's and by running statistics.

    And how often these two agree on the class of a training image.
    """
    shared_by = config.per_device * sharing(case.statistics, case.devices)
    seen = image_order(len(photos.train_images), config.images, case.seed)[: config.judged]
    tested = spread_out(len(photos.test_images), config.judged)
    train_set = photos.train_images[seen], photos.train_labels[seen]
    test_set = photos.test_images[tested], photos.test_labels[tested]
    sets = {
        "train_by_batch": (*train_set, shared_by),
        "train_by_running": (*train_set, None),
        "test": (*test_set, None),
    }
    judged = {name: judge(config, variables, *map(jnp.asarray, (images, labels)), by)
              for name, (images, labels, by) in sets.items()}  # fmt: skip
    one_way = judged["train_by_batch"].predicted
    agreement = jnp.mean(one_way == judged["train_by_running"].predicted[: len(one_way)])
    results = {"shared_by": shared_by, "agreement": float(agreement)}
    for name, judgement in judged.items():
        results |= {f"{name}_accuracy": float(judgement.accuracy)}
        results |= {f"{name}_loss": float(judgement.loss)}
    return results


# --- Results ------------------------------------------------------------------------------------


def scaling(config: Config, photos: Photos, path: Path, about: dict[str, str]) -> None:
    """Train and judge every case; write numbers and figure; print a table.

    An interrupt (Ctrl-C) ends the training; what is finished by then is summed up.
    """
    numbers, rows = path.with_suffix(".jsonl"), []
    todo = list(cases(config))
    with Records(numbers, **about, **config._asdict()) as records:
        try:
            for case in todo:
                print(f"run {len(rows) + 1} of {len(todo)}", file=sys.stderr)
                rows.append(run(config, photos, case))
                records.write("run", **rows[-1])
        except KeyboardInterrupt:
            print(f"interrupted after {len(rows)} of {len(todo)} runs")
        results = summaries(config, rows)
        for result in results:
            records.write("summary", **result)
    print(table(results))
    figures.scaling(path, results)
    print(f"figure:  {path}\nnumbers: {numbers}")


def run(config: Config, photos: Photos, case: Case) -> dict[str, Any]:
    """Train one network and judge it: a JSON line."""
    began = time.perf_counter()
    variables, last_loss = train(config, photos, case)
    measured = measure(config, photos, case, variables)
    seconds = time.perf_counter() - began
    return {**case._asdict(), **measured, "last_loss": last_loss, "seconds": seconds}


def summaries(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every statistics and number of devices: means over seeds, and the values themselves."""
    results = []
    for devices, statistics in itertools.product(config.devices, STATISTICS):
        ran = runs_as(statistics, devices)
        mine = [row for row in rows if (row["statistics"], row["devices"]) == (ran, devices)]

        def values(name: str, mine: list[dict[str, Any]] = mine) -> list[float]:
            return [row[name] for row in mine]

        if not mine:
            continue
        accuracies = values("test_accuracy")
        gaps = np.subtract(values("train_by_running_loss"), values("train_by_batch_loss"))
        results.append(
            {
                "statistics": statistics,
                "devices": devices,
                "same_as": None if ran == statistics else ran,
                "shared_by": mine[0]["shared_by"],
                "test_accuracies": accuracies,
                "test_accuracy": float(np.mean(accuracies)),
                "train_accuracy_by_batch": float(np.mean(values("train_by_batch_accuracy"))),
                "train_accuracy_by_running": float(np.mean(values("train_by_running_accuracy"))),
                "agreements": values("agreement"),  # of predictions by batch and by running
                "agreement": float(np.mean(values("agreement"))),
                "gaps": gaps.tolist(),  # nats
                "gap": float(gaps.mean()),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The results, one setting a line; what ran under another name is shown there."""
    header = "devices", "statistics", "images that share", "test", "seeds", "train, by batch"
    lines = [[*header, "train, by running", "agree", "gap [nats]"]]
    for r in results:
        if r["same_as"]:
            continue
        others = [o["statistics"] for o in results
                  if (o["same_as"], o["devices"]) == (r["statistics"], r["devices"])]  # fmt: skip
        seeds = " ".join(f"{a:.1%}" for a in r["test_accuracies"])
        names = "train_accuracy_by_batch", "train_accuracy_by_running", "agreement"
        accuracies = [r[name] for name in names]
        lines.append(
            [str(r["devices"]), " = ".join([r["statistics"], *others]), str(r["shared_by"]),
             f"{r['test_accuracy']:.1%}", seeds, *(f"{a:.1%}" for a in accuracies),
             f"{r['gap']:+.3f}"]
        )  # fmt: skip
    return aligned(lines)


# --- Command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options; photographs are the only thing without a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description="A small ResNet on CIFAR-10 with few images a device, on 1 to 8 devices, with "
        "local, ghost and synchronised batch statistics. Writes a figure and every result as JSON "
        "lines. The devices are virtual: shares of this machine's CPU.",
    )
    add_run_options(p.add_argument_group("what to run"))
    add_image_options(p.add_argument_group("images, one of"))
    add_training_options(p.add_argument_group("training"))
    return p


def add_run_options(group: argparse._ArgumentGroup) -> None:
    """Where the answer goes."""
    add = group.add_argument
    add("--out", type=Path, default=Path("results/scaling"), metavar="DIR",
        help="folder for the figure and the numbers (default: %(default)s)")  # fmt: skip
    add("--tag", metavar="WORD", help="call the files scaling-WORD.png and so on")


def add_image_options(group: argparse._ArgumentGroup) -> None:
    """Where the images come from."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--data-dir", metavar="DIR",
        help="CIFAR-10: its binary files, or images in train/CLASS and test/CLASS")  # fmt: skip
    add("--download", metavar="URL", nargs="?", const=CIFAR10_URL,
        help=f"fetch CIFAR-10 once (170 MB, checked) from URL or {CIFAR10_URL}")  # fmt: skip
    add("--smoke", action="store_true",
        help="made-up stripes, a tiny network, few steps: to see that everything runs")  # fmt: skip


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """What the runs share."""
    config, add = Config(), group.add_argument
    add("--devices", type=at_least_one, nargs="+", metavar="N",
        help=f"numbers of devices (default: {' '.join(map(str, config.devices))})")  # fmt: skip
    add("--per-device", type=at_least_one, metavar="N",
        help=f"images a device and step (default: {config.per_device})")  # fmt: skip
    add("--images", type=at_least_one, metavar="N",
        help=f"that a run trains on, up to whole steps (default: {config.images})")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help=f"one run each (default: {' '.join(map(str, config.seeds))})")  # fmt: skip
    add("--learning-rate", type=float, metavar="X",
        help="at 16 images a step, proportionally more or less at others "
        f"(default: {config.learning_rate})")  # fmt: skip


def load(args: argparse.Namespace) -> tuple[Photos, str]:
    """The images asked for, and what to call them."""
    if args.smoke:
        return painted_stripes(1_600, 320), "made-up stripes, not CIFAR-10"
    if args.download:
        return read_cifar10(download_cifar10(args.download)), "CIFAR-10, downloaded"
    return read_cifar10(args.data_dir), "CIFAR-10"


def configure(args: argparse.Namespace) -> Config:
    """What to run: the options given, the defaults, and less of everything for a smoke test."""
    config = Config()
    if args.smoke:
        config = Config(devices=(4,), seeds=(0,), images=1_600, window=128, every=400, judged=320,
                        widths=(8,), stem_stride=4)  # fmt: skip
    given = {name: getattr(args, name) for name in ("per_device", "images", "learning_rate")}
    given |= {name: args_tuple(getattr(args, name)) for name in ("devices", "seeds")}
    config = config._replace(**{name: value for name, value in given.items() if value is not None})
    # Whole steps for every number of devices, and chunks of one length: one compilation a case.
    whole = config.per_device * int(np.lcm.reduce(config.devices))
    every = -(-min(config.every, config.images) // whole) * whole
    return config._replace(every=every, images=-(-config.images // every) * every)


def args_tuple(values: list[int] | None) -> tuple[int, ...] | None:
    """Without repetitions, in the order given."""
    return None if values is None else tuple(dict.fromkeys(values))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from Python with a list of arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = (options := parser()).parse_args(argv)
    if not (args.data_dir or args.download or args.smoke):
        options.error(
            f"no images. Expected --data-dir DIR with {CIFAR10_WANTED}; or --download, which "
            "fetches them; or --smoke, which needs none."
        )
    config = configure(args)
    cluster.virtual_devices(max(config.devices))
    try:
        photos, source = load(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    sizes = f"{len(photos.train_images)} to train, {len(photos.test_images)} to test"
    shown = ["DIR" if arg == args.data_dir else arg for arg in argv]  # where it lay says nothing
    about = {
        "command": shlex.join(["python", "-m", "experiments.scaling", *shown]),
        "images_from": f"{source}, {sizes}",
    }
    print(about["images_from"])
    scaling(config, photos, args.out / f"scaling{'-' + args.tag if args.tag else ''}.png", about)


if __name__ == "__main__":
    main()
