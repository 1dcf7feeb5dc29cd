"""The C++ kernel has right sums of every size and dtype, all derivatives, and clear errors.

Where no compiler is installed, the tests that need the kernel are skipped.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jbn import native
from jbn.native.compile import load

HALF = ("bfloat16", "float16")
DTYPES = ("float32", *HALF)
# Ragged numbers of rows, blocks of 64 and chunks of 256; fewer channels than a vector has, several
# narrow rows that are read as one, and panels of 1024 channels.
SHAPES = (
    (0, 4), (1, 1), (5, 3), (63, 7), (1000, 3), (9001, 5), (130, 63), (3, 5, 7, 64), (700, 65),
    (257, 130), (4100, 64), (2, 1024), (70, 1025), (600, 2500), (3,),
)  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A directory with the library, one for all workers, because compiling takes seconds."""
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        pytest.skip("no C++ compiler")
    directory = tmp_path_factory.getbasetemp().parent / "jbn-native"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JBN_CACHE", str(directory))
        native.build()
    return directory


@pytest.fixture(autouse=True)
def as_before():
    """Disables the kernel before each test, and restores its state afterwards."""
    enabled = native.is_enabled()
    native.disable()
    yield
    (native.enable if enabled else native.disable)()


@pytest.fixture
def kernel(cache, monkeypatch):
    """Enables the kernel for one test."""
    monkeypatch.setenv("JBN_CACHE", str(cache))
    native.enable()


def make(shape, dtype="float32", t_dtype=None, seed=0):
    """Makes x, a shift, t and a gate that half of the values pass."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(2 * rng.standard_normal(shape) + 1, dtype)
    t = jnp.asarray(rng.standard_normal(shape), t_dtype or dtype)
    vectors = rng.standard_normal((3, shape[-1])).astype(np.float32)
    return x, jnp.asarray(vectors[0]), t, tuple(map(jnp.asarray, vectors[1:]))


def wide(*arrays):
    """Converts arrays to NumPy's float64, as [rows, C]."""
    return [np.asarray(a.astype(jnp.float32), np.float64).reshape(-1, a.shape[-1]) for a in arrays]


def expected_pair(x, shift, t, gate=None):
    """Returns (sum t, sum z t) and the sums of their magnitudes, in float64."""
    x, shift, t = wide(x, shift, t)
    z = x - shift
    if gate is not None:
        scale, bias = wide(*gate)
        t = np.where(z * scale + bias > 0, t, 0)
    return [(term.sum(0), np.abs(term).sum(0)) for term in (t, z * t)]


def assert_sums(actual, expected, terms=1e-6):
    """Checks that each sum is right up to `terms` times the magnitudes of its terms.

    float32 rounds z, its product, and 8 + 8 additions before float64 takes over. These are 18
    roundings of 6e-8 in the worst case, for any number of rows.
    """
    for got, (value, magnitude) in zip(actual, expected, strict=True):
        assert got.dtype == jnp.float32
        error = np.abs(np.asarray(got, np.float64) - value)
        np.testing.assert_array_less(error, terms * magnitude + 1e-30)


def uses_kernel(function, *args) -> bool:
    return "jbn_" in jax.jit(function).lower(*args).as_text()


sums, pair = jax.jit(native.sums), jax.jit(native.pair)
spread = jax.jit(native.spread, static_argnames="dtype")


# Values.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_every_size(kernel, shape, dtype):
    x, shift, t, gate = make(shape, dtype)
    assert uses_kernel(native.sums, x, shift)
    assert uses_kernel(native.pair, x, shift, t)
    z = wide(x)[0] - wide(shift)[0]
    assert_sums(sums(x, shift), [(v.sum(0), np.abs(v).sum(0)) for v in (z, z * z)])
    assert_sums(pair(x, shift, t), expected_pair(x, shift, t))
    assert_sums(pair(x, shift, t, gate=gate), expected_pair(x, shift, t, gate))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_spread(kernel, dtype, gated):
    x, shift, w, gate = make((50, 2, 70), dtype)
    u, v = shift + 1, shift - 1
    gate = gate if gated else None
    got = spread(x, shift, u, v, w, gate=gate)
    z = wide(x)[0] - wide(shift)[0]
    expected = wide(w)[0] + wide(u)[0] + z * wide(v)[0]
    if gate is not None:
        expected = np.where(z * wide(gate[0])[0] + wide(gate[1])[0] > 0, expected, 0)
    chex.assert_type(got, jnp.float32)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-6, atol=1e-5)
    rounded = spread(x, shift, u, v, w, gate=gate, dtype=jnp.dtype(dtype))
    chex.assert_trees_all_equal(rounded, got.astype(dtype))


def test_vectors_are_computed_once(kernel):
    """Checks that the pass over x does not compute vectors again for each element of x."""

    def function(x, shift, scale):
        return native.spread(x, shift, jnp.abs(scale), jnp.minimum(scale, 1), gate=(scale, scale))

    x, shift, _, _ = make((1000, 70))
    text = jax.jit(function).lower(x, shift, shift).compile().as_text()
    computations = [c for c in text.split("\n\n") if c.strip().startswith("%")]
    (big,) = [c for c in computations if "f32[1000,70]" in c]
    for operation in ("abs(", "minimum("):
        assert operation in text
        assert operation not in big


@pytest.mark.parametrize("t_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_and_t_of_two_dtypes(kernel, dtype, t_dtype):
    x, shift, t, gate = make((333, 70), dtype, t_dtype)
    assert_sums(pair(x, shift, t), expected_pair(x, shift, t))
    assert_sums(pair(x, shift, t, gate=gate), expected_pair(x, shift, t, gate))


def test_a_gate_of_another_dtype(kernel):
    x, shift, t, gate = make((1000, 70))
    half = tuple(v.astype(jnp.bfloat16) for v in gate)
    actual = jax.jit(native.pair)(x, shift, t, gate=half)
    same = tuple(v.astype(jnp.float32) for v in half)
    chex.assert_trees_all_equal(actual, jax.jit(native.pair)(x, shift, t, gate=same))


def test_a_gate_has_no_derivative(kernel):
    x, shift, _, (u, v) = make((10, 3))
    for function in (
        lambda b: native.spread(x, shift, u, v, gate=(u, b)).sum(),
        lambda b: native.pair(x, shift, x, gate=(u, b))[0].sum(),
    ):
        np.testing.assert_array_equal(jax.grad(function)(v), 0)


def test_the_error_does_not_grow_with_the_rows(kernel):
    """Sums 2e6 rows at mean/std 1e4, which float32 accumulators would get wrong by about 1e-4."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1 << 21, 4)) + 1e4, jnp.float32)
    shift = x[0]
    z = wide(x)[0] - wide(shift)[0]
    assert_sums(sums(x, shift), [(v.sum(0), np.abs(v).sum(0)) for v in (z, z * z)], terms=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_an_element(kernel, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = bits.view(jnp.dtype(dtype)) if dtype in HALF else (bits.astype(np.uint32) << 16).view("f4")
    zero = jnp.zeros(x.size)
    total, _ = sums(x[None], zero)
    expected = x.astype(np.float32)
    # XLA's threads flush float32's subnormal numbers to 0; those of float16 are normal here.
    subnormal = np.abs(expected) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(np.where(subnormal, 0, total), np.where(subnormal, 0, expected))


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(kernel, junk):
    x, shift, t, _ = make((300, 70))
    clean, dirty = sums(x, shift), sums(x.at[7, 3].set(junk), shift)
    np.testing.assert_array_equal(np.asarray(dirty)[:, 3], [junk, junk**2])
    others = np.arange(70) != 3
    np.testing.assert_array_equal(np.asarray(dirty)[:, others], np.asarray(clean)[:, others])
    first, second = np.asarray(pair(x, shift, t.at[7, 3].set(junk)))
    assert first[3] == junk or np.isnan(junk)
    assert not np.isfinite(second[3])
    assert np.isfinite(first[others]).all()


def test_values_that_do_not_pass_the_gate_may_be_nan(kernel):
    x, shift, t, _ = make((300, 70))
    zero = jnp.zeros_like(shift)
    chex.assert_trees_all_equal(pair(x, shift, t * np.nan, gate=(zero, zero - 1)), (zero, zero))


def test_results_do_not_depend_on_threads(kernel, cache):
    """Compares several runs on eight threads with a run on one thread, bit for bit."""
    code = (
        "import jax, numpy as np; from jbn import native\n"
        "from tests.native.test_native import make\n"
        "native.enable(); x, shift, t, _ = make((30011, 70))\n"
        "print(np.asarray(native.pair(x, shift, t)).tobytes().hex())"
    )
    single = dict(os.environ, JBN_CACHE=str(cache), XLA_FLAGS="", PYTHONPATH=os.getcwd())
    command = ["taskset", "-c", "0", sys.executable, "-c", code]
    if not shutil.which("taskset"):
        command = command[3:]
    done = subprocess.run(command, env=single, capture_output=True, text=True, check=True)
    x, shift, t, _ = make((30011, 70))
    for _ in range(20):
        assert np.asarray(pair(x, shift, t)).tobytes().hex() == done.stdout.strip()


def test_many_kernels_at_once_do_not_wait_for_each_other(kernel):
    """Runs more kernels than threads, all of which use the threads of one pool."""
    data = [make((20000, 64), seed=i)[:3] for i in range(12)]
    together = jax.jit(lambda data: [native.pair(*one) for one in data])
    for _ in range(30):
        got = together(data)
    chex.assert_trees_all_equal(got, [pair(*one) for one in data])


# Derivatives.


def plain_pair(x, shift, t, gate=None):
    """Computes the equation by operations that JAX differentiates."""
    z = x.astype(shift.dtype) - shift[None]
    t = t.astype(shift.dtype)
    if gate is not None:
        scale, bias = (v[None] for v in gate)
        t = jnp.where(z * scale + bias > 0, t, 0)
    return t.sum(0), (z * t).sum(0)


def plain_spread(x, shift, u, v, w, gate=None, dtype=None):
    z = x.astype(shift.dtype) - shift[None]
    y = w.astype(shift.dtype) + u[None] + z * v[None]
    if gate is not None:
        scale, bias = (v[None] for v in gate)
        y = jnp.where(z * scale + bias > 0, y, 0)
    return y.astype(dtype or shift.dtype)


def scalar(pair, spread):
    """Returns a scalar function of all arguments through both maps, which is not linear."""

    def function(x, shift, t, w, gate=None):
        gate = {} if gate is None else {"gate": gate}
        first, second = pair(x, shift, jnp.sin(t), **gate)
        u, v = jnp.tanh(first / x.shape[0]), jnp.cos(second / x.shape[0])
        y = spread(x, shift, u, v, w**2, dtype=x.dtype, **gate)
        return jnp.sum(jnp.tanh(y) * jnp.cos(t))

    return function


@functools.partial(jax.jit, static_argnames=("function", "order"))
def directional(function, order, at, directions):
    """Returns the gradient of the derivative in `order` - 1 directions."""
    for direction in directions[: order - 1]:
        inner = function
        function = lambda *at, f=inner, d=direction: jax.jvp(f, at, d)[1]  # noqa: E731
    return jax.grad(function, argnums=(0, 1, 2, 3))(*at)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_of_every_order(x64, order, gated):
    rng = np.random.default_rng(1)
    shapes = ((6, 4), (4,), (6, 4), (6, 4))
    at, *directions = [tuple(jnp.asarray(rng.standard_normal(s)) for s in shapes) for _ in range(3)]
    gate = tuple(jnp.asarray(rng.standard_normal(4)) for _ in range(2)) if gated else None
    functions = [
        functools.partial(scalar(p, s), gate=gate)
        for p, s in ((native.pair, native.spread), (plain_pair, plain_spread))
    ]
    got, expected = (directional(f, order, at, directions) for f in functions)
    chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_derivatives_with_the_kernel(kernel, dtype, gated):
    x, shift, t, gate = make((100, 70), dtype)
    at, gate = (x, shift, t, t[::-1]), gate if gated else None
    ours, plain = scalar(native.pair, native.spread), scalar(plain_pair, plain_spread)
    ours, plain = functools.partial(ours, gate=gate), functools.partial(plain, gate=gate)
    got = directional(ours, 1, at, ())
    chex.assert_trees_all_equal_dtypes(got, at)
    # Half precision rounds y and its cotangent, at different places in the two functions.
    tolerance = 1e-5 if dtype == "float32" else 4 * float(jnp.finfo(dtype).eps)
    for a, b in zip(got, directional(plain, 1, at, ()), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(a, np.float64), b, 0, tolerance * np.abs(b).max())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_pair_and_spread_are_transposes_of_each_other(kernel, gated):
    x, shift, t, gate = make((100, 70), "bfloat16")
    gate = gate if gated else None
    u, v = shift + 1, shift - 1
    forward = functools.partial(native.pair, x, shift, gate=gate)
    backward = jax.linear_transpose(forward, t)
    (ct,) = jax.jit(backward)((u, v))
    chex.assert_trees_all_equal(ct, spread(x, shift, u, v, gate=gate, dtype=t.dtype))

    def widen(u, v, w):
        return native.spread(x, shift, u, v, w, gate=gate, dtype=x.dtype)

    back = jax.linear_transpose(widen, u, v, t)
    assert uses_kernel(back, t)
    first, second, w = jax.jit(back)(t)
    chex.assert_trees_all_equal((first, second), pair(x, shift, t, gate=gate))
    chex.assert_trees_all_equal(
        w, native.spread(x, shift, 0 * u, 0 * v, t, gate=gate, dtype=t.dtype)
    )


def test_cotangents_stay_in_their_dtype(kernel):
    """Checks that the kernel takes cotangents in bfloat16, without a float32 copy of x's size."""
    x, shift, t, _ = make((100, 70), "bfloat16")
    spreading = lambda u: native.spread(x, shift, u, u, t, dtype=x.dtype)  # noqa: E731
    text = jax.jit(lambda u, ct: jax.vjp(spreading, u)[1](ct)).lower(shift, t).as_text()
    calls = [line for line in text.splitlines() if "jbn_pair" in line]
    assert len(calls) == 1
    assert "tensor<100x70xf32>" not in calls[0]


# Transformations and devices.


def contexts():
    """Returns functions of (x, shift, t), by name, which call pair somewhere inside."""

    def scanned(x, shift, t):
        return jax.lax.scan(lambda c, _: (c + native.pair(x, shift, t)[1], None), shift, None, 3)[0]

    def rematerialised(x, shift, t):
        y = jax.checkpoint(lambda t: native.pair(x, shift, jnp.sin(t))[1])
        return jax.grad(lambda t: jnp.sum(y(t) ** 2))(t)

    def linearized(x, shift, t):
        return jax.linearize(lambda t: native.pair(x, shift, t), t)[1](t)[1]

    def grad_of_grad(x, shift, t):
        f = lambda t: jnp.sum(jnp.sin(native.pair(x, shift, t)[1]))  # noqa: E731
        return jax.grad(lambda t: jnp.sum(jax.grad(f)(t) ** 2))(t)

    return {f.__name__: f for f in (scanned, rematerialised, linearized, grad_of_grad)}


@pytest.mark.parametrize("name", contexts())
def test_under_transformations(kernel, name):
    data, function = make((100, 70))[:3], contexts()[name]
    assert uses_kernel(function, *data)
    got, eager = jax.jit(function)(*data), function(*data)
    native.disable()
    expected = jax.jit(function)(*data)
    scale = float(jnp.abs(expected).max())
    chex.assert_trees_all_close(got, expected, rtol=0, atol=2e-5 * scale)
    chex.assert_trees_all_close(eager, expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, None), (1, 0, None)], ids=str)
def test_under_vmap(kernel, axes):
    sizes = {0: (3, 20, 5), 1: (20, 3, 5), None: (20, 5)}
    rng = np.random.default_rng(0)
    x, t = (jnp.asarray(rng.standard_normal(sizes[axes[i]]), jnp.float32) for i in (0, 2))
    shift = jnp.asarray(rng.standard_normal((5,) if axes[1] is None else (3, 5)), jnp.float32)
    for ours, plain, args in (
        (native.pair, plain_pair, (x, shift, t)),
        (native.sums, lambda x, k: plain_pair(x, k, x - k[None]), (x, shift)),
    ):
        got = jax.vmap(ours, axes[: len(args)])(*args)
        expected = jax.vmap(plain, axes[: len(args)])(*args)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-4)
    y = jax.vmap(lambda x, k, w: native.spread(x, k, k, k, w), axes)(x, shift, t)
    expected = jax.vmap(lambda x, k, w: plain_spread(x, k, k, k, w), axes)(x, shift, t)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-4)


def test_float64_gets_the_plain_form(kernel, x64):
    x, shift, t = (a.astype(jnp.float64) for a in make((100, 5))[:3])
    assert not native.usable(x)
    assert not uses_kernel(native.pair, x, shift, t)
    chex.assert_type(pair(x, shift, t), jnp.float64)
    assert uses_kernel(native.pair, *make((100, 5))[:3])  # float32 with x64 enabled


def mesh(kind):
    return jax.make_mesh((8,), ("d",), (kind,))


def test_several_devices_get_the_plain_form(kernel):
    x, shift, t, _ = make((80, 5))
    expected = pair(x, shift, t)
    with jax.set_mesh(mesh(AxisType.Auto)):
        x, t = jax.device_put((x, t), PartitionSpec("d"))
        assert not native.usable(x)
        assert not uses_kernel(native.pair, x, shift, t)
        chex.assert_trees_all_close(pair(x, shift, t), expected, rtol=1e-5, atol=1e-5)


def test_shard_map_gets_the_plain_form(kernel):
    x, shift, t, _ = make((80, 5))
    answers = []

    def local(x, shift, t):
        answers.append(native.usable(x))
        return jax.lax.psum(native.pair(x, shift, t), "d")

    with jax.set_mesh(mesh(AxisType.Auto)):
        d, everywhere = PartitionSpec("d"), PartitionSpec()
        sharded = jax.shard_map(
            local, in_specs=(d, everywhere, d), out_specs=everywhere, check_vma=False
        )
        assert not uses_kernel(sharded, x, shift, t)
        got = jax.jit(sharded)(x, shift, t)
    assert not any(answers)
    chex.assert_trees_all_close(got, pair(x, shift, t), rtol=1e-5, atol=1e-5)


def test_usable(kernel, one_device):
    x = jnp.ones((8, 3))
    assert native.usable(x)
    assert native.usable(x.astype(jnp.bfloat16))
    assert not native.usable(x.astype(jnp.int32))
    assert not native.usable(jnp.float32(1))
    traced = []
    jax.jit(lambda x: traced.append(native.usable(x)))(x)
    assert traced == [True]
    native.disable()
    assert not native.usable(x)


def test_not_usable_with_several_devices_or_explicit_axes(kernel):
    x = jnp.ones((8, 3))
    assert not native.usable(x)  # no mesh, eight devices
    explicit = jax.make_mesh((1,), ("d",), (AxisType.Explicit,))
    with jax.set_mesh(explicit):
        assert not native.usable(x)
    assert not native.usable(jax.device_put(x, NamedSharding(explicit, PartitionSpec("d"))))


def test_exported_programs_do_not_need_the_kernel(kernel):
    data = make((100, 70))[:3]
    exported = jax.export.export(pair)(*data)
    assert "jbn_" not in exported.mlir_module()
    chex.assert_trees_all_close(exported.call(*data), pair(*data), rtol=1e-4, atol=1e-4)


# Enabling.


def test_enabling_and_disabling_reach_what_was_traced_before(cache, monkeypatch):
    monkeypatch.setenv("JBN_CACHE", str(cache))
    data = make((100, 70))[:3]
    traced = jax.jit(lambda *data: native.pair(*data))
    for enabled in (False, True, False, True, False):
        (native.enable if enabled else native.disable)()
        assert native.is_enabled() == enabled
        assert ("jbn_" in traced.lower(*data).as_text()) == enabled


def run(*command, **environment):
    """Runs Python with a command in a process of its own."""
    env = {**os.environ, "JBN_NATIVE": "0", **{k: str(v) for k, v in environment.items()}}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=False
    )


def test_importing_jbn_loads_nothing():
    assert run("-c", "import jbn, sys; assert 'jbn.native' not in sys.modules").returncode == 0


def test_the_command(cache, monkeypatch, capsys):
    done = run("-W", "error::RuntimeWarning", "-m", "jbn.native", JBN_CACHE=cache)
    assert pathlib.Path(done.stdout.strip()).parent == cache
    assert done.returncode == 0
    monkeypatch.setenv("JBN_CACHE", str(cache))
    assert native.main(["--check"]) == 0
    assert "loads" in capsys.readouterr().out


def test_not_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JBN_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Run `python -m jbn.native`"):
        native.enable()
    assert native.main(["--check"]) == 1
    assert "not built" in capsys.readouterr().err
    assert not native.is_enabled()


def test_from_the_environment(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("JBN_CACHE", str(tmp_path))
    for value in ("0", "", None):
        monkeypatch.delenv("JBN_NATIVE") if value is None else monkeypatch.setenv(
            "JBN_NATIVE", value
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            native.from_environment()
    monkeypatch.setenv("JBN_NATIVE", "1")
    with pytest.warns(RuntimeWarning, match="JBN_NATIVE is set, but without effect.*not built"):
        native.from_environment()
    assert not native.is_enabled()
    monkeypatch.setenv("JBN_CACHE", str(cache))
    native.from_environment()
    assert native.is_enabled()


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("JBN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"No C\+\+ compiler.*Install one.*CXX="):
        native.build()
    monkeypatch.setenv("CXX", "nowhere++ -O1")
    with pytest.raises(RuntimeError, match=r"CXX is 'nowhere\+\+ -O1'"):
        native.enable(build=True)


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\nfor i in $(seq 50); do echo line $i >&2; done\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("JBN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        RuntimeError, match=r"C\+\+ compiler failed(.|\n)*line 31\n(.|\n)*line 50$"
    ) as e:
        native.build()
    assert "line 30\n" not in str(e.value)
    assert list((tmp_path / "cache").iterdir()) == []  # no unfinished file is left


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JBN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", sys.executable)  # some command that exists
    with pytest.raises(RuntimeError, match=r"Cannot write to .*JBN_CACHE="):
        native.build()


def test_a_library_that_does_not_load(tmp_path):
    code = (
        "from jbn import native; path = native.library(); path.parent.mkdir(exist_ok=True)\n"
        "path.write_text('no library'); native.enable()"
    )
    done = run("-c", code, JBN_CACHE=tmp_path / "cache")
    assert "cannot be loaded" in done.stderr
    assert "Remove it" in done.stderr


def test_a_library_of_something_else(tmp_path):
    code = (
        "import shutil, _ctypes; from jbn import native\n"
        "path = native.library(); path.parent.mkdir(exist_ok=True)\n"
        "shutil.copy(_ctypes.__file__, path); import jbn; native.from_environment()"
    )
    done = run("-c", code, JBN_CACHE=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    done = run("-c", "import jbn", JBN_CACHE=tmp_path / "cache", JBN_NATIVE=1)
    assert done.returncode == 0, done.stderr
    assert "JBN_NATIVE is set, but without effect" in done.stderr
    assert "cannot be loaded" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="files have owners")
def test_a_library_of_another_user(tmp_path, monkeypatch):
    path = tmp_path / "library.so"
    path.write_text("")
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RuntimeError, match=r"belongs to another user.*JBN_CACHE="):
        load(path)


@pytest.mark.parametrize(("variables", "directory"), [
    ({"JBN_CACHE": "here"}, pathlib.Path.cwd() / "here"),
    ({"JBN_CACHE": "/a"}, "/a"),
    ({"JBN_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/jbn"),
    ({"JBN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/jbn"),
])  # fmt: skip
def test_the_library_goes_to_the_directory_of_the_variables(variables, directory, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert native.library().parent == pathlib.Path(directory)


def test_shapes_that_do_not_fit_are_refused():
    x, shift, t, gate = make((10, 5))
    with pytest.raises(ValueError, match=r"shift has shape \(4,\); expected \(5,\)"):
        native.sums(x, shift[:4])
    with pytest.raises(ValueError, match=r"t has shape \(9, 5\); expected \(10, 5\)"):
        native.pair(x, shift, t[:9])
    with pytest.raises(ValueError, match=r"gate has shape \(4,\)"):
        native.pair(x, shift, t, gate=(gate[0], gate[1][:4]))
    with pytest.raises(ValueError, match=r"w has shape \(5,\)"):
        native.spread(x, shift, shift, shift, shift)
