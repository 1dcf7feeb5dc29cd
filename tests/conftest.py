"""Eight virtual CPU devices, strict dtypes and ranks, one deterministic hypothesis profile."""

import os

# Before JAX starts: the tests of synchronisation need several devices and must never find one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,  # the same examples on every machine, every day
    deadline=None,  # an example may have to compile
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture
def x64():
    """The test runs with 64-bit types enabled, and only that test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device():
    """As on a machine with one device, where no batch is cut into blocks."""
    with jax.set_mesh(jax.make_mesh((1,), ("only",), (jax.sharding.AxisType.Auto,))):
        yield
