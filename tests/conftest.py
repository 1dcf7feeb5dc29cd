"""Sets up eight virtual CPU devices, strict promotion and a deterministic hypothesis profile."""

import os

# This must happen before JAX starts. The tests of synchronisation need several devices; on a
# single one they would test nothing.
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
    """Enables 64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def one_device():
    """Sets a mesh of one device, on which no batch is divided into blocks."""
    with jax.set_mesh(jax.make_mesh((1,), ("only",), (jax.sharding.AxisType.Auto,))):
        yield
