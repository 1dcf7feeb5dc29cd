"""The random tester accepts right functions, finds wrong ones, and can repeat a case."""

import jax
import numpy as np
import pytest

import jbn
from tests import cases, fuzz, fuzz_cases, oracle, textbook

# Each law has at least one case; modes, dtypes and data vary.
RIGHT = (
    "shape=8x3,mode=eager,mask=examples,activation=relu,residual=True,data=integers",
    "shape=16x5x4,axis=-2x-1,dtype=bfloat16,mode=shard_map,groups=2,data=lognormal",
    "law=derivatives,shape=8x3,mode=one_device,order=fr,activation=silu,data=symmetric",
    "law=inference,shape=8x3,mode=one_device,order=rr,offset=-3.0",
    "law=running,shape=8x3,rule=debias,weights=examples,weighting=zeros",
    "law=pool,shape=8x3,mode=one_device,mask=feature,data=cauchy,offset=1000.0",
)


@pytest.fixture
def fresh():
    """Clears the cached programs before and after the test."""

    def clear():
        for cached in fuzz.PROGRAMS:
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.slow
@pytest.mark.parametrize("line", RIGHT)
def test_the_library_passes(line):
    assert fuzz.check(fuzz_cases.parse(line)) == []


def _wrong_variance(x, *args, **kwargs):
    y, m = jbn._core.normalize.normalize(x, *args, **kwargs)
    return y, m._replace(var=m.var * 1.0001)


def _wrong_gradient(x, scale, bias, **kwargs):
    y, m = jbn._core.normalize.normalize(x, scale, bias, **kwargs)
    return y, m._replace(var=jax.lax.stop_gradient(m.var))


def _no_variance_between(a, b):
    m = jbn._core.pooling.merge(a, b)
    return m._replace(var=(a.count * a.var + b.count * b.var) / (a.count + b.count))


@pytest.mark.parametrize(
    ("function", "broken", "line", "kinds"),
    [
        ("normalize", _wrong_variance, RIGHT[0], {"var", "dx"}),
        ("normalize", _wrong_gradient, "shape=8x3", {"dx"}),
        ("normalize", _wrong_gradient, "law=derivatives,shape=8x3,order=rf", {"rf[0]"}),
        ("merge", _no_variance_between, "law=pool,shape=8x3", {"merge.var"}),
        ("moments", None, "law=pool,shape=8x3", {"raises TypeError"}),
    ],
)
def test_a_broken_function_is_found(function, broken, line, kinds, fresh, monkeypatch):
    monkeypatch.setattr(jbn, function, broken)
    assert {failure.kind for failure in fuzz.check(fuzz_cases.parse(line))} == kinds


def test_a_failure_is_printed_with_the_command_that_repeats_it(fresh, monkeypatch, capsys):
    monkeypatch.setattr(jbn, "moments", None)
    assert fuzz.main(["--run", "law=pool,shape=40x7,data=ramp,seed=5", "--shrink"]) == 1
    line = "--run 'law=pool,seed=5'"  # fields that do not matter are gone
    assert line in capsys.readouterr().out


def test_failures_are_counted_by_kind_and_the_next_case_is_still_run(fresh, monkeypatch, capsys):
    def check(case):
        return [fuzz.Failure(case, "var", "is wrong")] if case.seed % 2 else []

    monkeypatch.setattr(fuzz, "check", check)
    assert fuzz.main(["--cases", "20", "--seed", "1"]) == 1
    out = capsys.readouterr().out
    assert "seed 1\n" in out
    assert "20 cases" in out
    drawn = out.count("FAILED ")
    assert 1 < drawn == sum(int(row.split()[0]) for row in out.splitlines() if ": e.g." in row)


def test_a_case_is_what_its_line_says_and_a_seed_draws_the_same_cases():
    first, second = (
        [c for _ in range(200) for c in fuzz_cases.draw(rng, 2)]
        for rng in (np.random.default_rng(0), np.random.default_rng(0))
    )
    assert first == second == [fuzz_cases.parse(str(case)) for case in first]
    assert {case.law for case in first} == set(fuzz.LAWS)
    assert {case.mode for case in first} == set(fuzz.MODES)


@pytest.mark.parametrize("case", [c for c in cases.MASKS if c.axis == -1][1:4:2], ids=str)
def test_the_textbook_is_the_oracle(case, x64):
    data = cases.make(case._replace(dtype="float64"))
    w = oracle.position_weights(data.x, data.mask, data.weights)
    dmean, dvar = data.dmean[None], data.dvar[None]

    def loss(*at):
        y, mean, var = textbook.normalize(*at, axis=(case.axis,), w=w)
        return sum((c * v).sum() for c, v in ((data.dy, y), (dmean, mean), (dvar, var)))

    at = data.x, data.scale, data.bias
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)
    expected = oracle.vjp(*at, data.dy, data.dmean, data.dvar, **data.support)
    for ours, right in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-10, atol=1e-10)
    y, m = oracle.normalize(*at, **data.support)
    ours = jax.jit(lambda *at: textbook.normalize(*at, axis=(case.axis,), w=w))(*at)
    for part, right in zip(ours, (y, m.mean[None], m.var[None]), strict=True):
        np.testing.assert_allclose(part, right, rtol=1e-12, atol=1e-12)
