"""Options of a command line for CIFAR-10: in a folder, fetched, or made-up images instead."""

from __future__ import annotations

import argparse

from experiments.images.photos import (
    CIFAR10_URL,
    CIFAR10_WANTED,
    Photos,
    download_cifar10,
    painted_stripes,
    read_cifar10,
)


def add_image_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the images, of which one has to be given."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--data-dir", metavar="DIR",
        help="CIFAR-10: its binary files, or images in train/CLASS and test/CLASS")  # fmt: skip
    add("--download", metavar="URL", nargs="?", const=CIFAR10_URL,
        help=f"fetch CIFAR-10 once (170 MB, checked) from URL or {CIFAR10_URL}")  # fmt: skip
    add("--smoke", action="store_true",
        help="made-up stripes, a tiny network, few steps: to see that everything runs")  # fmt: skip


def check_image_options(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if no option says where the images are."""
    if not (args.data_dir or args.download or args.smoke):
        options.error(
            f"no images. Expected --data-dir DIR with {CIFAR10_WANTED}; or --download, which "
            "fetches them; or --smoke, which needs none."
        )


def load(args: argparse.Namespace) -> tuple[Photos, str]:
    """Reads the images that the options ask for; returns them and their description."""
    if args.smoke:
        return painted_stripes(1_600, 320), "made-up stripes, not CIFAR-10"
    if args.download:
        return read_cifar10(download_cifar10(args.download)), "CIFAR-10, downloaded"
    return read_cifar10(args.data_dir), "CIFAR-10"
