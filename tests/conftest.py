"""Sets up eight virtual CPU devices, strict promotion and a deterministic hypothesis profile.

Also marks the tests that are `slow`, and those that need the extra `experiments`.
"""

import collections
import importlib.util
import os
import pathlib

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


EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"
INSTALLED = all(
    importlib.util.find_spec(name)
    for name in ("grain", "matplotlib", "mlxtend", "optax", "orbax", "PIL", "pooch", "rich", "tqdm")
)


def pytest_report_header():
    """Says what is not run."""
    missing = "run" if INSTALLED else "not run: they need `pip install -e '.[test,experiments]'`"
    return [f"tests of experiments: {missing}", "slow tests as well: -m 'slow or not slow'"]


def pytest_ignore_collect(collection_path):
    """Leaves tests/experiments out where its packages are not installed."""
    return True if collection_path == EXPERIMENTS and not INSTALLED else None


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(items):
    """Marks tests as `experiments` and as `slow`.

    Of a test with parameters those cases are slow that bring no new value of any parameter: every
    value of every parameter is in the others once.
    """
    seen = collections.defaultdict(set)
    for item in items:
        if EXPERIMENTS in item.path.parents:
            item.add_marker("experiments")
        if hasattr(item, "callspec"):
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            known = seen[item.path, item.originalname]
            if values <= known:
                item.add_marker("slow")
            known |= values
    if not INSTALLED:
        items[:] = [item for item in items if not item.get_closest_marker("experiments")]


@pytest.fixture
def cheap_programs():
    """XLA compiles with few optimisations: for tests of values, most of whose time is compiling.

    Random inputs (`tests/fuzz.py`) run as users' programs do, with derivatives of all orders.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
