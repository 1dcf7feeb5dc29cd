"""Describes devices to XLA's compilers for GPUs and TPUs, which run without the hardware."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

# NVIDIA's H100 with 80 GB, as protobuf text: XLA cannot query a GPU that is not there.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ONE_CHIP = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
}  # the smallest that libtpu knows
NAMES = ("h100", *ONE_CHIP, "cpu")


def device(name: str) -> Any:
    """Returns one device of the kind, which need not be there.

    Raises:
      ImportError: XLA's compiler for the device is not installed.
    """
    if name == "cpu":
        return jax.devices("cpu")[0]
    return gpu() if name == "h100" else tpus(ONE_CHIP[name])[0]


def gpu() -> Any:
    """Returns an H100, which need not be there."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ImportError(
            "target h100 needs XLA's compiler for GPUs, which runs without a GPU: "
            'pip install "jax[cuda12]" (3 GB).'
        )
    config = {"topology": "1x1x1", "target_config": H100}
    return topologies.get_topology_desc("", "cuda", **config).devices[0]


def tpus(topology: str) -> Sequence[Any]:
    """Returns the devices of a TPU pod such as "v5e:16x16", which need not be there.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: libtpu knows no such pod.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"target {topology} needs XLA's compiler for TPUs, which runs without a TPU: "
            f"pip install libtpu, or use --target cpu."
        )
    try:
        with quiet():
            return topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu has no devices for target {topology!r}: {error}. Expected cpu, or a "
            f"generation and a shape such as v5e:2x2, v5e:16x16, v5p:4x4x4 or v6e:16x16."
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences stderr, where libtpu, a C++ library, writes messages when it finds no TPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def prepare(cpu_devices: int = 1) -> None:
    """Configures JAX to compile without the hardware; call it before JAX looks for devices."""
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to compete for
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no GPU driver to check


def version(package: str) -> str | None:
    """Returns the installed version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
