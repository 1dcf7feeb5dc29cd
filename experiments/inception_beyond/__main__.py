"""Are the paper's other remarks on normalised networks true?

Three remarks of Ioffe & Szegedy (2015, arXiv 1502.03167), beside the comparison of Figure 2:

``depth``: does the gradient keep its size in the backward pass through the layers? Claim (section
3.3): "backpropagation through a layer is unaffected by the scale of its parameters", and larger
kernels have smaller gradients. It measures the networks of `experiments.inception` before training,
with kernels of half, once and twice He's deviation.

``identity``: does a layer find the identity where the identity is best? Claim (section 3): scale =
sqrt(Var[x]) and bias = E[x] recover the original activations. A layer is trained to return its
input, the output of a convolution of the network.

``ensemble``: how much do several networks and several crops of an image add? Claim (section 4.2.3,
Figure 4): on ImageNet one BN-Inception has 25.2 % error (top-5 7.82 %) on one crop and 21.99 %
(5.82 %) on 144; six networks together have 20.1 % (4.9 %).

Commands (``ensemble`` needs the runs of ``python -m experiments.inception``)::

    python -m experiments.inception_beyond depth --data-dir DIR
    python -m experiments.inception_beyond identity --data-dir DIR
    python -m experiments.inception_beyond ensemble --data-dir DIR --members BN-Baseline
    python -m experiments.inception_beyond depth identity --dataset smoke    # does it run?

Expected on CIFAR-10, with the small network of 31 layers (three seeds, 128 images):

depth: the gradient with respect to a layer's output (root mean square) in the first layer, relative
to the last layer, with kernels of half, once and twice He's size::

    with BN, relu            5.1      5.1      5.1
    with BN, sigmoid         0.46     0.46     0.46
    without BN, relu         3.5e-5   0.10     1.0e5
    without BN, sigmoid      2.3e-9   3.6e-7   2.7e-5

With Batch Normalization kernels of twice the size give the same outputs and half the gradient in
every layer (to 0.04 %, at most 2 %, because of epsilon); without it the last output is 1.7e-5, 0.26
and 4.3e5 with ReLUs. It takes one to three minutes on two CPU cores, most of it for compiling.

identity: after 1,000 steps on all 2,000 images at once every scale is off by 0.01 % at most, the
share of the start that is left. On batches of 32 scales are off by 0.3 % (median) and 0.5 % (worst
of 16): all are too small, like the standard deviation of a batch. Biases are off by 0.1 % of a
standard deviation. It takes half a minute.

ensemble: BN-Baseline, three seeds: one network 64.7 %, with 18 views 66.7 %; all together 67.9 %
and 68.5 %. It takes six minutes on one core. The default members, BN-x30 and its variants, are the
paper's: they do not train on CIFAR-10, but are for ImageNet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.command import NO_IMAGES, as_typed, at_least_one
from experiments.common.records import Records, aligned
from experiments.inception import runs
from experiments.inception.recipes import SCALES
from experiments.inception.runs import Sets
from experiments.inception_beyond import depth as inception_depth
from experiments.inception_beyond import ensemble as inception_ensemble
from experiments.inception_beyond import figures as inception_beyond_figures
from experiments.inception_beyond import identity as inception_identity
from experiments.inception_beyond.ensemble import ensemble_table
from experiments.inception_beyond.identity import identity_table, write_identity
from experiments.inception_beyond.inputs import chosen_network, middle, some_images
from experiments.nets.inputs import as_input

BATCHES = 32  # images, as in training; `identity` also uses all images at once


def depth(args: argparse.Namespace, sets: Sets, about: dict[str, Any]) -> None:
    """Measures gradients and outputs of all layers of the longest path, before training."""
    scale = SCALES[args.dataset]
    batch = some_images(sets.train, scale, args.images or 128)
    found = []
    with Records(args.out / "depth.jsonl", **about, images=len(batch["image"])) as records:
        for p in inception_depth.profiles(scale, len(sets.train.classes), batch, args.seeds):
            found.append(p)
            values = zip(p.kernel_gradient, p.output_gradient, p.output, strict=True)
            for layer, (kernel, gradient, output) in enumerate(values, 1):
                records.write("layer", net=p.net, activation=p.activation, init=p.init,
                              seed=p.seed, layer=layer, kernel_gradient=float(kernel),
                              output_gradient=float(gradient), output=float(output))  # fmt: skip
    print(aligned(inception_depth.table(found)))
    inception_beyond_figures.depth(args.out / "depth.png", found)


def identity(args: argparse.Namespace, sets: Sets, about: dict[str, Any]) -> None:
    """Learns a layer's scale and bias from a convolution's outputs."""
    net, variables = chosen_network(args, sets)
    path = tuple(args.layer.split("/")) if args.layer else middle(net)
    batch = some_images(sets.train, SCALES[args.dataset], args.images or 2000)
    x = inception_identity.activations(net, variables, as_input(batch["image"]), path)
    found, n = {}, len(x)
    header = about | {"layer": "/".join(path), "images": n, "rate": args.rate}
    with Records(args.out / "identity.jsonl", **header, run=args.run) as records:
        for size in dict.fromkeys((min(BATCHES, n), n)):
            name = "all at once" if size == n else f"batches of {size}"
            found[name] = inception_identity.learn(x, batch=size, steps=args.steps, rate=args.rate)
            write_identity(records, size, found[name])
    print(f"{'/'.join(path)}: {n} images, {x.shape[-1]} features")
    print(aligned(identity_table(found)))
    inception_beyond_figures.identity(args.out / "identity.png", found)


def ensemble(args: argparse.Namespace, sets: Sets, about: dict[str, Any]) -> None:
    """Measures the accuracy of each member and of all, by their views and their statistics."""
    small = SCALES[args.dataset].crop == "shift"
    ways = ("centre", args.crops or ("shifts" if small else "144"))
    n_classes = len(sets.train.classes)
    folders = inception_ensemble.finished(args.out, args.members)
    how = args.dataset, n_classes, args.devices, args.workers
    members = [inception_ensemble.restore(folder, *how) for folder in folders]
    members = [inception_ensemble.with_population(member, sets) for member in members]
    rows = []
    with Records(args.out / "ensemble.jsonl", **about, members=[f.name for f in folders]) as file:
        for statistics in members[0].stats:
            for crops in ways:
                alone, together = inception_ensemble.judge(members, sets.val, crops, statistics)
                scores = [*zip(folders, alone, strict=True), (Path("all together"), together)]
                for folder, score in scores:
                    kind = "ensemble" if score is together else "member"
                    row = {"name": folder.name, "crops": crops, "statistics": statistics}
                    row |= {"images": score.images, **score.means()}
                    file.write(kind, **row)
                    rows.append({"kind": kind, **row})
    print(aligned(ensemble_table(rows)))
    inception_beyond_figures.ensemble(args.out / "ensemble.png", rows)


# --- Command line -------------------------------------------------------------------------------

ACTIONS = {"depth": depth, "identity": identity, "ensemble": ensemble}


def parser() -> argparse.ArgumentParser:
    """Makes the parser; images are the only thing without a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.inception_beyond",
        description="Remarks of the Batch Normalization paper on its networks. Each writes a "
        "figure and every measurement as JSON lines.",
    )
    p.add_argument("what", nargs="+", choices=ACTIONS, metavar="WHAT",
        help="depth: gradients through the layers before training; identity: a layer learns the "
        "identity; ensemble: several trained networks and several crops")  # fmt: skip
    add = p.add_argument_group("images and results").add_argument
    add("--data-dir", metavar="DIR", help="the images: folders train and val (or test) of classes")
    add("--dataset", choices=SCALES, default="cifar10",
        help="what they are; smoke: made-up images, seconds (default: %(default)s)")  # fmt: skip
    add("--images", type=at_least_one, metavar="N",
        help="how many of them (default: 128 for depth, 2000 for identity; not for ensemble, which "
        "takes all)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes that read images")
    add("--out", type=Path, metavar="DIR", help="where results go, and where runs of "
        f"experiments.inception are (default: {runs.results_of('DATASET')})")  # fmt: skip
    add = p.add_argument_group("depth").add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add = p.add_argument_group("identity").add_argument
    add("--run", metavar="NAME", help="a folder in --out: its trained network (default: untrained)")
    add("--layer", metavar="PATH", help="whose convolution, such as inception_4a/ConvUnit_0 "
        "(default: one in the middle)")  # fmt: skip
    add("--steps", type=at_least_one, default=1000, metavar="N",
        help="of SGD (default: %(default)s)")  # fmt: skip
    add("--rate", type=float, default=0.01, metavar="X", help="of SGD (default: %(default)s)")
    add = p.add_argument_group("ensemble").add_argument
    add("--members", default="BN-x30", metavar="NAME",
        help="all runs of this recipe and of its variants (default: %(default)s)")  # fmt: skip
    add("--devices", type=at_least_one, metavar="N", help="(default: all)")
    add("--crops", choices=inception_ensemble.CROPS,
        help="beside the centre: 18 shifted and mirrored views, or GoogLeNet's 144 crops (default: "
        "what suits the images)")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment with `argv`, or with the arguments of the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = (p := parser()).parse_args(argv)
    args.out = args.out or runs.results_of(args.dataset)
    if args.data_dir is None and args.dataset != "smoke":
        p.error(NO_IMAGES)
    try:
        sets = runs.load(args.dataset, args.data_dir)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    about = {"command": as_typed("inception_beyond", argv, args.data_dir)}
    one_device = jax.make_mesh((1,), ("batch",), (jax.sharding.AxisType.Auto,))
    for what in args.what:
        try:
            if what == "ensemble":  # it places its batches on all devices itself
                ensemble(args, sets, about)
            else:
                with jax.set_mesh(one_device):
                    ACTIONS[what](args, sets, about)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(f"figure:  {args.out / what}.png\nnumbers: {args.out / what}.jsonl")


if __name__ == "__main__":
    main()
