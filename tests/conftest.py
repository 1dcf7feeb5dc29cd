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


EXPERIMENTS = pathlib.Path(__file__).parent / "experiments"
INSTALLED = all(
    importlib.util.find_spec(name)
    for name in ("grain", "matplotlib", "mlxtend", "orbax", "PIL", "pooch", "tensorboardX", "tqdm")
)
QUICK = "not slow"  # the -m of pyproject.toml


def pytest_configure(config):
    """Chooses how many examples hypothesis draws: the same ones on every machine, every day."""
    hypothesis.settings.register_profile(
        "deterministic",
        derandomize=True,
        deadline=None,  # an example may have to compile
        max_examples=10 if config.option.markexpr == QUICK else 25,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("deterministic")


def pytest_report_header(config):
    """Says which tests do not run."""
    lines = []
    if not INSTALLED:
        lines.append("tests/experiments does not run: pip install -e '.[test,experiments]'")
    if config.option.markexpr == QUICK:
        lines.append("slow tests do not run: -m 'slow or not slow' runs all")
    return lines


def pytest_ignore_collect(collection_path):
    """Leaves tests/experiments out where its packages are not installed."""
    return True if collection_path == EXPERIMENTS and not INSTALLED else None


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(config, items):
    """Marks tests as `experiments`, and cases as `slow`.

    A case is slow where each of its parameters has a value that an earlier case of the same test
    has: so the quick tests see every value once, linen and nnx by themselves, and not all
    combinations. Hypothesis draws more
    examples among the slow tests.
    """
    seen = collections.defaultdict(set)
    for item in items:
        if EXPERIMENTS in item.path.parents:
            item.add_marker("experiments")
        drawn = getattr(getattr(item, "function", None), "is_hypothesis_test", False)
        if drawn and config.option.markexpr != QUICK:
            item.add_marker("slow")
        marks = {mark.name for mark in item.iter_markers()}
        if hasattr(item, "callspec") and not marks & {"slow", "quick"}:
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            known = seen[item.path, item.originalname, repr(item.callspec.params.get("skin"))]
            if values <= known:
                item.add_marker("slow")
            known |= values


@pytest.fixture(scope="module")
def cheap_programs():
    """LLVM optimises little in a module's tests, most of whose time is compiling.

    XLA's own passes, and so its programs, remain as they are. Processes that a test starts do the
    same. Random inputs (`tests/fuzz.py`) and most tests of the core run as users' programs do.
    """
    name = "jax_disable_most_optimizations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        jax.config.update(name, True)
        yield
        jax.config.update(name, False)


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
