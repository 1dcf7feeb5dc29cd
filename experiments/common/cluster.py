"""Sets up the devices of a program: virtual ones of this machine, or those of several processes."""

from __future__ import annotations

import argparse
import os
import sys

import jax


def virtual_devices(n: int) -> None:
    """Requests n devices on this machine's CPU; call it before JAX computes anything."""
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={n}"
    found = jax.devices()
    if len(found) < n:
        sys.exit(
            f"error: JAX has {len(found)} devices ({found[0].device_kind}), the largest run needs "
            f"{n}. Expected as many: run it with JAX_PLATFORMS=cpu and without {flag} in "
            "XLA_FLAGS, or ask for fewer with --devices."
        )


def add_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that each of several processes needs; `join` reads them."""
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--num-processes", type=int, default=1, help="of all machines together")
    add("--process-id", type=int, default=0, help="0, 1, ... num-processes - 1")
    add("--auto", action="store_true", help="ask SLURM, Open MPI, the TPU or GKE")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message if the options do not fit together."""
    if args.num_processes > 1 and args.coordinator is None:
        parser.error("--num-processes needs --coordinator HOST:PORT, the address of process 0")
    if not 0 <= args.process_id < args.num_processes:
        parser.error(f"--process-id must be 0 to {args.num_processes - 1}; got {args.process_id}")


def join(args: argparse.Namespace) -> None:
    """Makes this process one of several, if the options say so; call it before JAX computes."""
    if args.auto:
        jax.distributed.initialize()
    elif args.num_processes > 1:  # CPU devices communicate by gloo
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
