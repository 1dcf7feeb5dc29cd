"""Breaks the library on purpose, one law at a time, and checks that the tests fail.

    python -m tests.mutants            # all mutants, about ten minutes on two cores
    python -m tests.mutants epsilon    # mutants whose law contains the word

Each mutant replaces one text in a temporary copy of the package; then the named tests run against
that copy. A mutant that survives shows a law that no test checks; the exit status is then 1. A
mutant that fails because it is no valid program says nothing about the tests: `test_mutants.py`
finds such mutants.
"""

import builtins
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import symtable
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A replacement of `old`, which occurs once in jbn/`file`, by `new`; `tests` must fail then."""

    law: str
    file: str
    old: str
    new: str
    tests: str


MOMENTS, NORMALIZE, RUNNING = "_core/moments.py", "_core/normalize.py", "_core/running.py"
SHIFT, POOL, SYNC, SHARDING = (
    "_core/shift.py",
    "_core/pooling.py",
    "_devices/named_axes.py",
    "_devices/placement.py",
)
AFFINE, DERIVATIVE = "_core/affine.py", "_core/derivative.py"
DEVICES, SUMS = "_devices/sharded_arrays.py", "_sums/xla.py"
DEFERRED, POPULATION = "_core/deferral.py", "population.py"
RENORM = "renorm.py"
STEP, UPDATE, MICROBATCHES = (f"training/{name}.py" for name in ("step", "update", "microbatches"))
LOSS_SCALE, ACCUMULATION = "training/loss_scale.py", "training/accumulation.py"
CONDITIONAL, SETS, BY_SET = "conditional.py", "sets.py", "_core/by_set.py"
COVARIANCE, ROOTS = "_core/covariance.py", "_core/inverse_root.py"
ACTIVE = "active(weights)"

MUTANTS = [
    # The axes.
    Mutant(
        "negative axes count from the end",
        "_core/axes.py",
        "features.append(a % ndim)",
        "features.append(abs(a) % ndim)",
        "core/test_axes.py",
    ),
    Mutant(
        "features are in the order of the array's axes",
        "_core/axes.py",
        "tuple(sorted(features))",
        "tuple(features)",
        "core/test_axes.py",
    ),
    Mutant(
        "an axis may be named only once",
        "_core/axes.py",
        "if len(set(features)) < len(features):",
        "if False:",
        "core/test_axes.py",
    ),
    # Moments.
    Mutant(
        "half precision is summed in float32",
        SHIFT,
        "return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype",
        "return dtype",
        "core/test_moments.py",
    ),
    Mutant(
        "float64 is summed in float64",
        SHIFT,
        "return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype",
        "return jnp.float32",
        "core/test_moments.py",
    ),
    Mutant(
        "the shift is subtracted from x before the sums",
        SHIFT,
        "np.asarray(info.max * info.eps / 4, size.dtype)",
        "np.asarray(0, size.dtype)",
        "core/test_normalize.py",
    ),
    Mutant(
        "the shift is robust to odd rows",
        SHIFT,
        "for i, j, needed in _MEDIAN:",
        "for i, j, needed in ():",
        "core/test_shift.py",
    ),
    Mutant(
        "the shift is drawn from different places of the examples",
        SHIFT,
        "return _places(n)[place] if _are_several(n) else n * (2 * place + 1) // (2 * _DRAWS)",
        "return n // 2 if order else _places(n)[place]",
        "core/test_shift.py",
    ),
    Mutant(
        "the shift is drawn from different places of examples of one length",
        SHIFT,
        "(draw + offset) / _DRAWS",
        "(draw + 0.5) / _DRAWS",
        "core/test_shift.py",
    ),
    Mutant(
        "weights are scaled to a sum of about 1 before they are used",
        SUMS,
        "weights, count = weights * inverse, count * inverse",
        "pass",
        "core/test_shift.py",
    ),
    Mutant(
        "the largest weights have a finite sum",
        "_core/check.py",
        "jnp.minimum(weights, largest)",
        "weights",
        "core/test_shift.py",
    ),
    Mutant(
        "the shift is taken from a position that is not masked",
        SHIFT,
        "else _weighted_rows(x, weights, axes)",
        "else _rows(x, axes)",
        "core/test_degenerate.py core/test_shift.py",
    ),
    Mutant(
        "x minus the shift is finite",
        SHIFT,
        "np.asarray(info.max * info.eps / 4, size.dtype)",
        "np.asarray(jnp.inf, size.dtype)",
        "core/test_degenerate.py",
    ),
    Mutant(
        "masked values are not summed",
        SUMS,
        f"return jnp.where({ACTIVE}, values, jnp.zeros_like(values))",
        "return values",
        "core/test_moments.py",
    ),
    Mutant(
        "masked values are replaced, not multiplied by zero",
        SUMS,
        f"return jnp.where({ACTIVE}, values, jnp.zeros_like(values))",
        f"return values * {ACTIVE}.astype(values.dtype)",
        "core/test_normalize.py",
    ),
    Mutant(
        "values are multiplied by their weights",
        SUMS,
        "values = tuple(v * weights.astype(v.dtype) for v in values)",
        "pass",
        "core/test_moments.py",
    ),
    Mutant(
        "masked positions are not counted",
        MOMENTS,
        "return own * jnp.asarray(repeats, dtype)",
        "return jnp.full_like(own, axes.size)",
        "core/test_moments.py",
    ),
    Mutant(
        "a mask that broadcasts counts every position that it covers",
        MOMENTS,
        "return own * jnp.asarray(repeats, dtype)",
        "return own",
        "core/test_moments.py",
    ),
    Mutant(
        "counts are added up over the devices",
        POOL,
        "count = total(m.count)",
        "count = m.count[:1]",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "the derivative's sums are added up over the devices",
        SUMS,
        "= over.sum(tuple(sums))",
        "= tuple(sums)",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "sums are never divided by a count of 0",
        SUMS,
        "        count = jnp.where(count > 0, count, jnp.ones_like(count))\n    if weights",
        "        pass\n    if weights",
        "core/test_degenerate.py",
    ),
    Mutant(
        "the variance is around the mean",
        MOMENTS,
        "var = lax.sub(mean_square, dot(mean, mean))",
        "var = mean_square",
        "core/test_moments.py",
    ),
    Mutant(
        "the variance is biased",
        MOMENTS,
        "return ShiftedMoments(shift, count, mean, lax.max(var, np.asarray(0, var.dtype)))",
        "var = jnp.maximum(var * count / jnp.maximum(count - 1, jnp.ones_like(count)), 0.0)\n"
        "    return ShiftedMoments(shift, count, mean, var)",
        "core/test_moments.py",
    ),
    Mutant(
        "squares that overflow make the variance infinite, not NaN",
        MOMENTS,
        "    var = lax.select(lax.eq(mean_square, np.asarray(jnp.inf, var.dtype)), "
        "mean_square, var)\n",
        "",
        "core/test_degenerate.py",
    ),
    Mutant(
        "the shift is added back to the mean",
        POOL,
        "axes.squeeze(lax.add(m.mean, m.shift))",
        "axes.squeeze(m.mean)",
        "core/test_moments.py",
    ),
    # The transform.
    Mutant(
        "epsilon is inside the square root",
        AFFINE,
        "    var = lax.add(var, np.asarray(epsilon, var.dtype))\n",
        "    var = (jnp.sqrt(var) + jnp.asarray(epsilon, var.dtype)) ** 2\n",
        "core/test_normalize.py",
    ),
    Mutant(
        "epsilon is added once",
        AFFINE,
        "    var = lax.add(var, np.asarray(epsilon, var.dtype))\n",
        "    var = var + jnp.asarray(2 * epsilon, var.dtype)\n",
        "core/test_normalize.py",
    ),
    Mutant(
        "a variance of 0 without epsilon gives the bias",
        AFFINE,
        "useless = lax.bitwise_or(lax.le(var, zero), lax.eq(var, inf))",
        "useless = lax.eq(var, inf)",
        "core/test_degenerate.py",
    ),
    Mutant(
        "an infinite variance gives the bias",
        AFFINE,
        "return replaced(mean, useless, 0.0), rstd",
        "return mean, rstd",
        "core/test_degenerate.py",
    ),
    Mutant(
        "a NaN in x makes y NaN",
        AFFINE,
        "useless = lax.bitwise_or(lax.le(var, zero), lax.eq(var, inf))",
        "useless = ~((var > 0) & (var < jnp.inf))",
        "core/test_degenerate.py",
    ),
    Mutant(
        "the bias is added",
        AFFINE,
        "a, bias.astype(rstd.dtype) - a * mean)",
        "a, -bias.astype(rstd.dtype) - a * mean)",
        "core/test_normalize.py",
    ),
    Mutant(
        "y has the dtype of x",
        NORMALIZE,
        "else spec.activation(y)).astype(spec.dtype), Known",
        "else spec.activation(y)), Known",
        "core/test_normalize.py",
    ),
    Mutant(
        "a feature without data gives its bias",
        NORMALIZE,
        "scale = where_data(m.count, scale)  #",
        "pass  #",
        "core/test_normalize.py",
    ),
    Mutant(
        "a feature without data gives its scale no gradient",
        DERIVATIVE,
        "dscale = where_data(m.count, dscale)",
        "pass",
        "core/test_derivatives.py",
    ),
    Mutant(
        "a masked value that is not finite reaches no gradient",
        AFFINE,
        "return jnp.where(active(weights) | jnp.isfinite(at), values, otherwise)",
        "return values",
        "core/test_derivatives.py core/test_epilogue.py",
    ),
    Mutant(
        "a masked value that is not finite gives the bias to full precision",
        AFFINE,
        "harmless(z, z * at.a, weights, otherwise=at.mean)",
        "harmless(z, z * at.a, weights)",
        "core/test_normalize.py",
    ),
    Mutant(
        "a masked residual that is not finite reaches no gradient",
        NORMALIZE,
        "residual=clean(residual, residual, weights)",
        "residual=residual",
        "core/test_epilogue.py",
    ),
    # The derivative rule.
    Mutant(
        "the derivative through the mean has the right sign",
        DERIVATIVE,
        "u = dbias - a * mean_dx - mean * v",
        "u = dbias + a * mean_dx - mean * v",
        "core/test_derivatives.py",
    ),
    Mutant(
        "the derivative goes through the mean",
        DERIVATIVE,
        "u = dbias - a * mean_dx - mean * v",
        "u = dbias - mean * v",
        "core/test_paper.py",
    ),
    Mutant(
        "the derivative goes through the variance",
        DERIVATIVE,
        "(dscale - a * mean_xhat_dx)",
        "(dscale)",
        "core/test_paper.py",
    ),
    Mutant(
        "the derivative through the variance has the right sign",
        DERIVATIVE,
        "(dscale - a * mean_xhat_dx)",
        "(dscale + a * mean_xhat_dx)",
        "core/test_derivatives.py",
    ),
    Mutant(
        "the variance's tangent has the factor 2",
        DERIVATIVE,
        "mean_dx, 2 * half_dvar",
        "mean_dx, half_dvar",
        "core/test_derivatives.py",
    ),
    Mutant(
        "the variance's derivative is around the mean",
        MOMENTS,
        "mean_z_dx - dot(m.mean, mean_dx)",
        "mean_z_dx",
        "core/test_derivatives.py",
    ),
    Mutant(
        "a variance that overflows has no derivative",
        DERIVATIVE,
        "replaced(rstd * half_dvar.astype(dx.dtype), useless, 0.0)",
        "rstd * half_dvar.astype(dx.dtype)",
        "core/test_degenerate.py",
    ),
    Mutant(
        "tangents at masked positions do not enter the sums",
        SUMS,
        "        dx = only_active(dx, weights)\n",
        "        pass\n",
        "core/test_derivatives.py",
    ),
    Mutant(
        "y at a masked position is differentiated",
        DERIVATIVE,
        "return dy.astype(spec.dtype), mean_dx",
        "dy = dy if weights is None else jnp.where(weights > 0, dy, 0)\n"
        "    return dy.astype(spec.dtype), mean_dx",
        "core/test_derivatives.py",
    ),
    Mutant(
        "derivatives are right where x equals the shift",
        SUMS,
        "    others = transform(z, v, u)\n",
        "    others = z * jnp.where(z != 0, v, jnp.zeros_like(v)) + u\n",
        "core/test_derivatives.py",
    ),
    Mutant(
        "second derivatives go through the moments",
        NORMALIZE,
        "m = named(measure(spec.of_moments, x, weights))",
        "m = named(measure(spec.of_moments, jax.lax.stop_gradient(x), weights))",
        "core/test_derivatives.py",
    ),
    Mutant(
        "the backward pass keeps x in its own dtype and no other large array",
        DERIVATIVE,
        "return recomputed(function)(saved",
        "return function(saved",
        "core/test_residuals.py",
    ),
    Mutant(
        "vectors are stored before a pass over x reads them",
        "_xla/materialize.py",
        "return tuple(_materialize.bind(*vectors))",
        "return vectors",
        "xla/test_materialize.py",
    ),
    Mutant(
        "the pass over x shares no operation with the sums",
        NORMALIZE,
        "shift, mean, rstd = materialize(m.shift, mean, rstd)",
        "shift = m.shift",
        "xla/test_materialize.py",
    ),
    Mutant(
        "with an activation, too, the backward pass recomputes x minus the shift",
        SUMS,
        "    if late:\n",
        "    if False:\n",
        "xla/test_materialize.py",
    ),
    Mutant(
        "the backward pass recomputes x minus the shift",
        SUMS,
        "at._replace(shift=unshared(at.shift))",
        "at",
        "xla/test_materialize.py",
    ),
    Mutant(
        "a program has no needless operation",
        AFFINE,
        "    y = lax.add(lax.mul(z, a), c)\n",
        "    y = lax.add(lax.mul(z, a), c) + jnp.zeros_like(z)\n",
        "test_fingerprints.py",
    ),
    Mutant(
        "each sum computes x minus the shift on its own",
        SUMS,
        "shifted(x, unshared(shift), weights)",
        "shifted(x, shift, weights)",
        "test_fingerprints.py",
    ),
    Mutant(
        "the backward pass keeps x, not x minus the shift",
        NORMALIZE,
        "saved = Saved(inputs.x, inputs",
        "saved = Saved(inputs.x.astype(known.a.dtype) + 0, inputs",
        "core/test_residuals.py",
    ),
    Mutant(
        "the forward pass subtracts the mean of x minus the shift",
        AFFINE,
        "bias.astype(rstd.dtype) - a * mean",
        "bias.astype(rstd.dtype)",
        "core/test_normalize.py",
    ),
    Mutant(
        "the derivative subtracts the mean of x minus the shift",
        DERIVATIVE,
        "u = dbias - a * mean_dx - mean * v",
        "u = dbias - a * mean_dx",
        "core/test_derivatives.py devices/test_named_axes.py",
    ),
    # Activation and residual.
    Mutant(
        "the residual is added",
        AFFINE,
        "lax.add(y, widened(residual, z.dtype))",
        "y",
        "core/test_epilogue.py",
    ),
    Mutant(
        "the residual has a gradient",
        DERIVATIVE,
        "own = own if dresidual is None else lax.add(own, dresidual)",
        "pass",
        "core/test_epilogue.py",
    ),
    Mutant(
        "the gradient of the statistics goes through the activation",
        SUMS,
        "jax.jvp(activation, (second,), (others,))[1]",
        "others",
        "core/test_epilogue.py",
    ),
    Mutant(
        "relu after a residual has the derivative of relu",
        DERIVATIVE,
        "return jnp.where(kept > 0, dy, jnp.zeros_like(dy))",
        "return dy",
        "core/test_epilogue.py",
    ),
    Mutant(
        "relu after a residual keeps y for the backward pass",
        DERIVATIVE,
        "return y if spec.activation is jax.nn.relu else residual",
        "return residual",
        "core/test_epilogue.py",
    ),
    Mutant(
        "the checkpoint policy keeps the moments",
        NORMALIZE,
        "m = named(measure(spec.of_moments, x, weights))",
        "m = measure(spec.of_moments, x, weights)",
        "core/test_epilogue.py",
    ),
    Mutant(
        "a widened residual has derivatives of every order",
        "_xla/hints.py",
        "return widened(*primals, dtype), tangents[0].astype(dtype)",
        "return widened(*primals, dtype), jnp.zeros_like(tangents[0].astype(dtype))",
        "core/test_epilogue.py",
    ),
    # Sums of bfloat16, which subtract no shift from x.
    Mutant(
        "sums of bfloat16 are shifted before they are averaged",
        "_xla/bfloat16.py",
        "mean_square = mean_of((second - c * first) - c * rest)",
        "mean_square = mean_of(second) - 2 * shift * mean_of(first) + shift**2",
        "xla/test_bfloat16.py",
    ),
    Mutant(
        "a block of bfloat16 is small enough for exact sums",
        "_xla/bfloat16.py",
        "16 <= size <= LIMIT",
        "16 <= size",
        "xla/test_bfloat16.py",
    ),
    Mutant(
        "the shift of bfloat16 values is rounded to bfloat16",
        "_xla/bfloat16.py",
        "shift = lax.reduce_precision(mean_of(first), exponent_bits=8, mantissa_bits=7)",
        "shift = mean_of(first)",
        "xla/test_bfloat16.py",
    ),
    Mutant(
        "squares of bfloat16 that overflow give the bias",
        "_xla/bfloat16.py",
        "jnp.where(overflow, jnp.inf, var)",
        "var",
        "xla/test_bfloat16.py",
    ),
    # Running statistics.
    Mutant(
        "decay is the weight of the old value",
        RUNNING,
        "return 1 - decay, math.log(decay) if",
        "return decay, math.log(decay) if",
        "core/test_running.py",
    ),
    Mutant(
        "debias counts the current batch",
        RUNNING,
        "t = (stats.count + 1).astype",
        "t = (stats.count + 2).astype",
        "core/test_running.py",
    ),
    Mutant(
        "the plain average counts the current batch",
        RUNNING,
        "1 / (stats.count + 1)",
        "1 / (stats.count + 2)",
        "core/test_running.py",
    ),
    Mutant(
        "unbiased=True stores the unbiased variance",
        RUNNING,
        "var = unbiased_var(moments) if unbiased else moments.var",
        "var = moments.var",
        "core/test_running.py core/test_paper.py",
    ),
    Mutant(
        "unbiased=False stores the biased variance",
        RUNNING,
        "var = unbiased_var(moments) if unbiased else moments.var",
        "var = unbiased_var(moments)",
        "core/test_running.py",
    ),
    Mutant(
        "Bessel's factor is n / (n - 1)",
        RUNNING,
        "bessel = n / jnp.where(several, n - 1, jnp.ones_like(n))",
        "bessel = (n + 1) / n",
        "core/test_running.py",
    ),
    Mutant(
        "one value has no unbiased variance",
        RUNNING,
        "return jnp.where(several, moments.var * bessel, jnp.inf)",
        "return moments.var * bessel",
        "core/test_running.py",
    ),
    Mutant(
        "an empty batch changes no statistics",
        RUNNING,
        "sound = lax.bitwise_and(sound, moments.count > 0)",
        "sound = lax.bitwise_and(sound, moments.count >= 0)",
        "core/test_running.py",
    ),
    Mutant(
        "a NaN or an inf changes no statistics",
        RUNNING,
        "        sound = lax.bitwise_and(sound, is_finite(values))\n",
        "        pass\n",
        "core/test_running.py",
    ),
    Mutant(
        "new statistics carry no gradient to the old statistics",
        RUNNING,
        "stats = lax.stop_gradient(stats)",
        "pass",
        "core/test_running.py",
    ),
    Mutant(
        "new statistics carry no gradient to x",
        NORMALIZE,
        "restore_pooled(jax.lax.stop_gradient(m), spec.axes",
        "restore_pooled(m, spec.axes",
        "core/test_running.py",
    ),
    Mutant(
        "the result of a user's rule is checked before it is stored",
        RUNNING,
        "            )\n    return _keep_sound(stats, moments, new, seen=moments)",
        "            )\n    return new",
        "core/test_running.py",
    ),
    Mutant(
        "statistics keep their dtypes",
        RUNNING,
        "jnp.asarray(n).astype(o.dtype) for n, o",
        "jnp.asarray(n) for n, o",
        "core/test_batch_norm.py core/test_running.py",
    ),
    Mutant(
        "averages of half precision are computed in float32",
        RUNNING,
        "        dtype = accumulator(old.dtype)",
        "        dtype = old.dtype",
        "core/test_running.py",
    ),
    Mutant(
        "the initial variance is 1",
        RUNNING,
        "jnp.ones(features, real)",
        "jnp.zeros(features, real)",
        "core/test_running.py",
    ),
    Mutant(
        "weights that add up to about 1 have no unbiased variance, whatever the rounding",
        RUNNING,
        "    several = n >= _FEW\n",
        "    several = n > 1\n",
        "core/test_running.py",
    ),
    Mutant(
        "a single value does not change the variance",
        RUNNING,
        "spread = sound if single_values else",
        "spread = sound if True else",
        "core/test_running.py",
    ),
    Mutant(
        "a single value changes the mean",
        RUNNING,
        "zip((sound, spread, spread), new, old",
        "zip((spread, spread, spread), new, old",
        "core/test_running.py",
    ),
    Mutant(
        "a batch without a variance is not counted",
        RUNNING,
        "(sound, spread, spread)",
        "(sound, spread, sound)",
        "core/test_running.py",
    ),
    Mutant(
        "many values of little weight change the variance",
        RUNNING,
        "((moments.var == 0) & (moments.count < _FEW))",
        "(moments.count < _FEW)",
        "core/test_running.py",
    ),
    Mutant(
        "a constant channel of several values changes the variance",
        RUNNING,
        "((moments.var == 0) & (moments.count < _FEW))",
        "(moments.var == 0)",
        "core/test_running.py",
    ),
    Mutant(
        "the Flax layers store the variance of a single value, as Flax does",
        "_flax.py",
        "rule = ema_of_flax(layer.momentum) if",
        "rule = ema(layer.momentum) if",
        "test_flax_layers.py::test_a_single_value_enters_as_in_flax",
    ),
    Mutant(
        "values must be finite in the dtype that is stored",
        RUNNING,
        "for values in (*seen, *stored):",
        "for values in (*seen, *new):",
        "core/test_running.py",
    ),
    Mutant(
        "training refuses half-precision statistics",
        "_core/batch_norm.py",
        "old = check.stats(read(stats), spec.axes, x, training=True)",
        "old = check.stats(read(stats), spec.axes, x)",
        "core/test_running.py",
    ),
    Mutant(
        "inference adds epsilon in float32",
        "_core/batch_norm.py",
        "        var = var.astype(accumulator(var.dtype))  # epsilon may be none of float16\n",
        "",
        "core/test_running.py",
    ),
    Mutant(
        "layers for complex x have a complex mean from init on",
        "_flax.py",
        "        return np.promote_types(real, np.complex64)\n",
        "        return real\n",
        "test_linen.py::test_complex_layers_have_statistics_of_the_right_type_from_init_on",
    ),
    Mutant(
        "a real dtype for y of complex x is refused",
        "_core/check.py",
        "        if not jnp.issubdtype(wanted, jnp.complexfloating):\n",
        "        if False:\n",
        "core/test_errors.py",
    ),
    Mutant(
        "a complex scale, bias or residual for real x is refused",
        "_core/check.py",
        "if values is not None and jnp.iscomplexobj(values):",
        "if False:",
        "core/test_errors.py",
    ),
    Mutant(
        "a dtype for y that is not floating point is refused",
        "_core/check.py",
        "if dtype is not None and not (jnp.issubdtype(wanted, jnp.inexact) and _is_signed(wanted))",
        "if False",
        "core/test_errors.py",
    ),
    Mutant(
        "activations with parameters are refused",
        "_core/check.py",
        "if any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(function)):",
        "if False:",
        "core/test_errors.py::test_an_activation_with_parameters_is_refused",
    ),
    Mutant(
        "a residual in the place of the switch is refused",
        "_flax.py",
        'if getattr(switch, "ndim", 0):',
        "if False:",
        "test_skins_sync.py::test_a_residual_by_position_is_refused",
    ),
    Mutant(
        "activations that are not elementwise are refused",
        "_core/check.py",
        "    if mixes(program.jaxpr):\n",
        "    if False:\n",
        "core/test_errors.py",
    ),
    Mutant(
        "a sum over elements mixes them",
        "_core/elementwise.py",
        "        return _MIXED if of_input(axes) else rest\n",
        "        return rest\n",
        "core/test_elementwise.py",
    ),
    Mutant(
        "an operation that moves elements mixes them",
        "_core/elementwise.py",
        "along = along._replace(start=along.start - at)",
        "along = along._replace(start=0)",
        "core/test_elementwise.py",
    ),
    Mutant(
        "values that an empty part holds do not enter",
        POOL,
        "    mean, var = (jnp.where(some, v, jnp.zeros_like(v)) for v in m[1:])\n",
        "    mean, var = m[1:]\n",
        "core/test_moments.py",
    ),
    # The composition.
    Mutant(
        "training passes epsilon on",
        "_core/batch_norm.py",
        "epsilon=epsilon,\n        mask=mask",
        "epsilon=1e-5,\n        mask=mask",
        "core/test_batch_norm.py",
    ),
    Mutant(
        "training passes the weights on",
        "_core/batch_norm.py",
        "mask=mask,\n        weights=weights",
        "mask=mask,\n        weights=None",
        "core/test_batch_norm.py",
    ),
    Mutant(
        "inference returns the dtype of x",
        "_core/batch_norm.py",
        "else spec.activation(y)).astype(spec.dtype)",
        "else spec.activation(y))",
        "core/test_batch_norm.py",
    ),
    Mutant(
        "inference keeps x in its own dtype",
        "_core/batch_norm.py",
        "    run = recomputed(run)\n",
        "",
        "core/test_residuals.py",
    ),
    Mutant(
        "an update rule that is no function is refused",
        RUNNING,
        "if not callable(rule):",
        "if False:",
        "core/test_errors.py",
    ),
    Mutant(
        "training on one value per feature is refused",
        "_core/batch_norm.py",
        "        check.several_values(spec.axes)\n",
        "        pass\n",
        "core/test_errors.py",
    ),
    Mutant(
        "a mask with fewer axes than x is refused",
        "_core/check.py",
        "if values.ndim == ndim and all(",
        "if values.ndim <= ndim and all(",
        "core/test_errors.py",
    ),
    Mutant(
        "sums are taken within index groups",
        SYNC,
        "return lax.psum(tree, self.names, axis_index_groups=self.groups)",
        "return lax.psum(tree, self.names)",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "the shift is a value of large weight",
        SHIFT,
        "whole = (weights / some * 2**bits)",
        "whole = ((weights > 0).astype(some.dtype) * 2**bits)",
        "core/test_shift.py",
    ),
    Mutant(
        "a batch on Explicit mesh axes is measured where it lies",
        DEVICES,
        "    if placement.is_explicitly_sharded(x):\n        return _measure",
        "    if False:\n        return _measure",
        "devices/test_sharded_arrays.py::test_one_collective_each_way_wherever_the_batch_lies",
    ),
    Mutant(
        "statistics are sharded like features on Explicit mesh axes",
        RUNNING,
        "if is_explicitly_sharded(moments.mean):",
        "if False:",
        "devices/test_sharded_arrays.py",
    ),
    Mutant(
        "a negative variance changes no statistics",
        RUNNING,
        "sound = lax.ge(stored.var, np.asarray(0, stored.var.dtype))",
        "sound = jnp.ones(stored.var.shape, bool)",
        "core/test_running.py",
    ),
    # Pooling the moments of parts.
    Mutant(
        "parts are weighted by their counts",
        POOL,
        "share = (m.count / jnp.where(count > 0, count, jnp.ones_like(count))).astype(m.var.dtype)",
        "share = jnp.full_like(m.var, 1 / m.count.shape[0])",
        "devices/test_named_axes.py core/test_moments.py",
    ),
    Mutant(
        "the pooled variance contains the variance between the parts' means",
        POOL,
        "share * (m.var + between)",
        "share * m.var",
        "devices/test_named_axes.py core/test_moments.py",
    ),
    Mutant(
        "pooling empty parts gives an empty part",
        POOL,
        "(m.count / jnp.where(count > 0, count, jnp.ones_like(count)))",
        "(m.count / count)",
        "core/test_moments.py",
    ),
    Mutant(
        "each part has its own shift",
        POOL,
        "offset = (m.shift - shift) + m.mean",
        "offset = m.mean",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "the pooled shift is the one nearest to the mean",
        POOL,
        "nearest = jnp.argmin(",
        "nearest = jnp.argmax(",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "infinities of two parts do not become NaN",
        POOL,
        "between = jnp.where(jnp.isnan(between), jnp.zeros_like(between), between)",
        "between = 1 * between",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "running statistics are pooled over groups",
        POOL,
        "pooled = pool_blocks(axes.whole, jax.tree.map(axes.squeeze, m), counts_differ)",
        "pooled = jax.tree.map(lambda v: axes.squeeze(v)[0], m)",
        "core/test_groups.py devices/test_named_axes.py",
    ),
    Mutant(
        "counts that differ between devices are sent",
        POOL,
        "*((m.count + jnp.zeros_like(like),) if counts_differ else ()))",
        "*((m.count + jnp.zeros_like(like),) if False else ()))",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "moments are gathered within index groups",
        SYNC,
        "return lax.all_gather(x, self.names, axis_index_groups=self.groups)",
        "return lax.all_gather(x, self.names)",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "only members of an index group enter its statistics",
        SYNC,
        "return jnp.asarray(self._table()) == self._group()",
        "return jnp.asarray(self._table()) >= 0",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "gathered moments are in the order of the axis names",
        SYNC,
        "x = jnp.moveaxis(x, [axes.index(name) for name in self.names], range(len(axes)))",
        "x = 1 * x",
        "devices/test_named_axes.py::test_index_groups_count_in_the_order_of_the_names",
    ),
    Mutant(
        "a gathered value is typed as replicated",
        SYNC,
        'to="invarying"',
        'to="varying"',
        "devices/test_named_axes.py devices/test_sharded_arrays.py core/test_errors.py",
    ),
    Mutant(
        "the examples of a group are consecutive",
        SHARDING,
        "shape[old] = axes.shape[at : at + 2] if size != 1 else (1, 1)",
        "shape[old] = axes.shape[at + 1 : at - 1 : -1] if size != 1 else (1, 1)",
        "core/test_groups.py",
    ),
    Mutant(
        "the moments of every block are collected",
        SHARDING,
        "return jnp.sum(jnp.where(own, x[None], jnp.zeros_like(x[None])), axis=1)",
        "return jnp.broadcast_to(x[:1], x.shape)",
        "devices/test_named_axes.py",
    ),
    Mutant(
        "a batch on one device is not divided into blocks",
        DEVICES,
        "    if not _partitions(x):\n        return _in_blocks",
        "    if True:\n        return _in_blocks",
        "devices/test_sharded_arrays.py::test_a_batch_on_one_device_is_not_cut_into_blocks",
    ),
    Mutant(
        "a gradient sum over several axes takes one collective",
        SUMS,
        "u, v = (spread(batch.axes, batch.x, values) for values in (line.u, line.v))",
        "u, v = line.u, line.v",
        "devices/test_sharded_arrays.py::test_one_collective_each_way_wherever_the_batch_lies",
    ),
    Mutant(
        "the padding of an uneven share does not enter the statistics",
        DEVICES,
        "if axes.shape[i] % parts[i] == 0",
        "if True",
        "devices/test_sharded_arrays.py::test_what_fills_up_an_uneven_share_is_not_of_the_batch",
    ),
    Mutant(
        "a serialised program does not call back into Python",
        DEVICES,
        "partitions and not module.lowering_parameters.for_export",
        "partitions",
        "devices/test_sharded_arrays.py::test_a_program_for_several_devices_can_be_kept",
    ),
    Mutant(
        "a partitioned program has the same text every time",
        DEVICES,
        'call.attributes["backend_config"] = mlir.ir.StringAttr.get(name)',
        "pass",
        "devices/test_sharded_arrays.py::test_a_partitioned_program_has_the_same_text_every_time",
    ),
    Mutant(
        "groups are divided over a mesh axis only if its size divides their number",
        SHARDING,
        "if groups % size == 0 and not lies_over[1]:",
        "if not lies_over[1]:",
        "devices/test_sharded_arrays.py::test_groups_and_second_derivatives_wherever_the_batch_lies",
    ),
    Mutant(
        "local statistics may not leave shard_map as replicated",
        "_core/batch_norm.py",
        "        check.as_replicated_as(old.mean, m.mean)\n",
        "        pass\n",
        "core/test_errors.py",
    ),
    # Training steps.
    Mutant(
        "gradients are added up over devices",
        MICROBATCHES,
        "return lax.psum(vary(sums, names), names) if names else sums",
        "return sums._replace(loss=lax.psum(vary(sums.loss, names), names)) if names else sums",
        "training/test_training.py::test_uneven_weights",
    ),
    Mutant(
        "the loss is divided by its weight last",
        MICROBATCHES,
        "return scaled, (loss, new_stats, metrics)",
        "return scaled / loss.weight, (loss, new_stats, metrics)",
        "training/test_training.py::test_uneven_weights",
    ),
    Mutant(
        "gradients of replicated parameters are added up once",
        STEP,
        "params = vary(state.params, names)",
        "params = state.params",
        "training/test_training.py::test_uneven_weights",
    ),
    Mutant(
        "microbatch i holds every kth example from the ith on",
        MICROBATCHES,
        "x = jnp.reshape(x, (n // microbatches, microbatches, *x.shape[1:]))",
        "x = jnp.moveaxis(jnp.reshape(x, (microbatches, -1, *x.shape[1:])), 0, 1)",
        "training/test_training.py::test_microbatch_i_has_every_kth_example",
    ),
    Mutant(
        "each device draws its own random key",
        MICROBATCHES,
        "return jax.random.fold_in(key, lax.axis_index(names)) if names else key",
        "return key",
        "training/test_training.py::test_keys_are_new_everywhere",
    ),
    Mutant(
        "a step that is not finite leaves the statistics unchanged",
        UPDATE,
        "old = state.params, state.stats, with",
        "old = state.params, stats, with",
        "training/test_training.py::test_a_step_that_is_not_finite_is_taken_back",
    ),
    Mutant(
        "a step that is not finite leaves the optimizer unchanged",
        UPDATE,
        "with_new_scale(state.opt_state, opt_state)",
        "opt_state",
        "training/test_training.py::test_a_step_that_is_not_finite_is_taken_back",
    ),
    Mutant(
        "a step that is not finite changes the loss scale",
        LOSS_SCALE,
        "return new._replace(inner=old.inner) if _is_loss_scale(old) else old",
        "return old",
        "training/test_training.py::test_a_step_that_is_not_finite_is_taken_back",
    ),
    Mutant(
        "a loss that is not finite makes the step not finite",
        UPDATE,
        "finite = all_finite((sums.loss, grads))",
        "finite = all_finite(grads)",
        "training/test_training.py::test_a_loss_that_is_not_finite_is_enough",
    ),
    Mutant(
        "a step without weight is not taken",
        UPDATE,
        "taken = finite & (weight > 0)",
        "taken = finite",
        "training/test_training.py::test_a_step_without_weight_is_not_taken",
    ),
    Mutant(
        "gradients are divided by the loss scale",
        UPDATE,
        "divisor = divisor * scale",
        "divisor = divisor + 0 * scale",
        "training/test_training.py::test_loss_scale_saves_small_gradients",
    ),
    Mutant(
        "the loss scale grows after the growth interval",
        LOSS_SCALE,
        "grows = good_steps >= growth_interval",
        "grows = good_steps > growth_interval",
        "training/test_training.py::test_loss_scale_grows",
    ),
    Mutant(
        "evaluation weights batches by their number of examples",
        "training/evaluation.py",
        "return Mean(mean.total * examples, mean.weight * examples)",
        "return mean",
        "training/test_training.py::test_evaluate_weighs_a_ragged_last_batch",
    ),
    Mutant(
        "weight decay leaves biases out",
        "training/weight_decay.py",
        'not in ("scale", "bias")',
        'not in ("scale",)',
        "training/test_training.py::test_decay_mask_goes_by_name",
    ),
    Mutant(
        "gradients are added up over microbatches",
        ACCUMULATION,
        "grads = jax.tree.map(jnp.add, grads, sums.grads)",
        "grads = sums.grads",
        "training/test_training.py::test_accumulated_gradient_is_that_of_the_whole_batch",
    ),
    Mutant(
        "statistics that microbatches update in turn must be synchronised",
        ACCUMULATION,
        "check_synchronised(new_stats, parts.names)",
        "pass",
        "training/test_training.py::test_local_statistics_that_are_not_pooled",
    ),
    Mutant(
        "pickles name the package, not its files",
        "training/__init__.py",
        "_container.__module__ = __name__",
        "pass",
        "training/test_training.py::test_pickles_name_the_package_and_not_its_files",
    ),
    # The C++ kernel.
    Mutant(
        "disabling the kernel reaches its primitives",
        "native/enabling.py",
        "primitives.use({})",
        "pass",
        "native/test_native.py::test_enabling_and_disabling_reach_what_was_traced_before",
    ),
    Mutant(
        "exported programs do not need the kernel",
        "native/primitives.py",
        "and not module.lowering_parameters.for_export",
        "",
        "native/test_native.py::test_exported_programs_do_not_need_the_kernel",
    ),
    # Deferred statistics.
    Mutant(
        "the moments of all microbatches are pooled",
        DEFERRED,
        "moments = tuple(map(pool, cell.moments))",
        "moments = jax.tree.map(lambda v: v[0], cell.moments)",
        "core/test_deferral.py::test_microbatches_pool",
    ),
    Mutant(
        "the moments of all devices are pooled",
        DEFERRED,
        "    if axis_name is None:\n        return found",
        "    if True:\n        return found",
        "core/test_deferral.py::test_devices_pool",
    ),
    Mutant(
        "pooled variances are within and between devices",
        POOL,
        "(m.var + _between(offset, m))",
        "m.var",
        "core/test_deferral.py::test_devices_pool",
    ),
    Mutant(
        "a part without data adds no variance, whatever the mean of the other parts is",
        POOL,
        "gaps=counts_differ or member is not None",
        "gaps=False",
        "core/test_degenerate.py::test_a_part_without_data_beside_squares_that_overflow",
    ),
    Mutant(
        "moments that a layer synchronised are not pooled again",
        DEFERRED,
        "return names if over.groups else tuple(n for n in names if n not in over.names)",
        "return names",
        "core/test_deferral.py::test_devices_pool",
    ),
    Mutant(
        "each device adds its part of its index group's count",
        DEFERRED,
        "return m._replace(count=m.count / size)",
        "return m",
        "core/test_deferral.py::test_devices_pool",
    ),
    Mutant(
        "a layer called twice updates twice",
        DEFERRED,
        "(*earlier.moments, moments), (*earlier.rules, mine), (*earlier.over, over)",
        "(moments,), (mine,), (over,)",
        "core/test_deferral.py::test_linen",
    ),
    Mutant(
        "deferred counts have all axes of the variance",
        DEFERRED,
        "count=moments.count + jnp.zeros_like(like)",
        "count=moments.count",
        "core/test_deferral.py::test_linen",
    ),
    Mutant(
        "statistics are averaged over the traced decays of all microbatches",
        DEFERRED,
        "return values[0] + jnp.mean(values - values[:1], 0)",
        "return values[0]",
        "core/test_other_state.py::test_microbatches_give_the_numbers_of_one_pass_with_traced_rules",
    ),
    Mutant(
        "statistics are averaged over the traced decays of all devices",
        DEFERRED,
        "agreed = _agreed([arrays[i] for i in traced], axis_name)",
        "agreed = [arrays[i] for i in traced]",
        "core/test_other_state.py::test_devices_give_the_numbers_of_one_pass_with_traced_rules",
    ),
    Mutant(
        "a microbatch returns the traced values of its rules as data",
        DEFERRED,
        "if _is_hashable(rule) and not any(isinstance(v, Tracer) for v in program.consts):",
        "if _is_hashable(rule):",
        "core/test_other_state.py::test_microbatches_give_the_numbers_of_one_pass_with_traced_rules",
    ),
    Mutant(
        "each scanned layer has its own traced decay",
        DEFERRED,
        "for _ in range(stats.mean.ndim - self.ndim):",
        "for _ in ():",
        "core/test_other_state.py::test_scanned_layers_take_traced_rules",
    ),
    Mutant(
        "a new decay does not compile a new program",
        RUNNING,
        "return (rule.form, rule.numbers) if isinstance(rule, _Ema) else (rule, ())",
        "return rule, ()",
        "core/test_other_state.py::test_a_schedule_of_the_decay_is_one_program",
    ),
    Mutant(
        "traced decays carry no gradient",
        RUNNING,
        "decay = lax.stop_gradient(decay)",
        "pass",
        "core/test_other_state.py::test_traced_decays_carry_no_gradient",
    ),
    Mutant(
        "the error about branches that mix deferred statistics says what to write",
        DEFERRED,
        'if "jbn._core.deferral" not in str(error) or "structure" not in str(error):',
        "if True:",
        "core/test_other_state.py::test_branches_and_loops_that_mix_deferred_statistics_say_what_to_write",
    ),
    Mutant(
        "the state of other layers is not deferred",
        DEFERRED,
        "if len(by_name) == len(leaves):\n        return by_name",
        "if True:\n        return frozenset(leaves)",
        "core/test_other_state.py::test_state_of_nnx_is_that_of_the_last_microbatch",
    ),
    Mutant(
        "statistics of jbn are recognised by the layers that update them",
        DEFERRED,
        "found.update(eqn.outvars)\n",
        "pass\n",
        "core/test_other_state.py::test_statistics_of_jbn_are_known_by_any_name",
    ),
    Mutant(
        "devices agree on the state of other layers",
        DEFERRED,
        "agreed = _agreed([found[i] for i in others], axis_name)",
        "agreed = [found[i] for i in others]",
        "core/test_other_state.py::test_statistics_of_jbn_are_known_by_any_name",
    ),
    Mutant(
        "missing counts start from zero",
        DEFERRED,
        "if added and not lost and all(_is_count(where, returned) for where in added):",
        "if False:",
        "core/test_other_state.py::test_training_of_linen_starts_counts_from_zero",
    ),
    Mutant(
        "inference needs no counts",
        "linen/parts.py",
        "(module.is_initializing() or not inference)",
        "True",
        "core/test_other_state.py::test_inference_of_linen_needs_no_counts",
    ),
    Mutant(
        "setting a rule on an nnx layer adds a count",
        "nnx/parts.py",
        'if name == "update" and value is not None and not hasattr(self, "count"):',
        "if False:",
        "core/test_other_state.py::test_a_rule_given_to_an_nnx_layer_later_counts_from_zero",
    ),
    Mutant(
        "a frozen dictionary counts as a dictionary",
        DEFERRED,
        "if given and list(given) == list(returned):",
        "if False:",
        "core/test_other_state.py::test_frozen_dictionaries_are_dictionaries",
    ),
    Mutant(
        "a layer's axis from outside the step must be given to the step",
        STEP,
        "[name for name in shared if name in outside]",
        "[]",
        "core/test_other_state.py::test_layers_that_share_statistics_want_gradients_added_up",
    ),
    Mutant(
        "an axis bound inside the loss need not be given to the step",
        STEP,
        "[name for name in shared if name in outside]",
        "list(shared)",
        "core/test_other_state.py::test_other_named_axes_are_free",
    ),
    Mutant(
        "an axis need not be given where all devices are known to take the same step",
        "training/checks.py",
        "if is_typed(name) and not _varying_leaves(new, (name,)):",
        "if False:",
        "core/test_other_state.py::test_a_loss_that_is_the_mean_of_devices_is_one_step",
    ),
    Mutant(
        "the library's containers survive serialisation",
        "_core/export.py",
        "for container in containers:",
        "for container in ():",
        "core/test_other_state.py::test_containers_go_through_bytes",
    ),
    # Statistics of a whole data set.
    Mutant(
        "population statistics are pooled by count",
        POOL,
        "weight = np.where(sound, count if weighted else 1.0, 0.0)",
        "weight = np.where(sound, 1.0, 0.0)",
        "test_population.py::test_models",
    ),
    Mutant(
        "the paper's population variance gives every batch the same weight",
        POOL,
        "weight = np.where(sound, count if weighted else 1.0, 0.0)",
        "weight = np.where(sound, count, 0.0)",
        "test_population.py::test_models",
    ),
    Mutant(
        "the paper's population variance is unbiased",
        POPULATION,
        "moments = tuple(m._replace(var=unbiased_var(m)) for m in update.moments)",
        "moments = update.moments",
        "test_population.py::test_models",
    ),
    Mutant(
        "the paper's population variance leaves out the variance between batches",
        POOL,
        "        if pooled:\n",
        "        if True:\n",
        "test_population.py::test_models",
    ),
    Mutant(
        "the population variance contains the variance between batches",
        POOL,
        "        if pooled:\n",
        "        if False:\n",
        "test_population.py::test_models",
    ),
    Mutant(
        "population sums subtract the shift from the mean",
        POOL,
        "shift = np.where((self.batches == 0) & sound, mean, self.shift)",
        "shift = self.shift",
        "test_population.py::test_nothing_cancels",
    ),
    Mutant(
        "population counts are float64",
        POOL,
        "        self.weight + weight,",
        "        np.float32(self.weight + weight),",
        "test_population.py::test_counts_above_two_to_the_24",
    ),
    Mutant(
        "batches that are not finite leave populations unchanged",
        POOL,
        " & np.isfinite(mean) & np.isfinite(var)",
        "",
        "test_population.py::test_what_says_nothing_is_left_out",
    ),
    Mutant(
        "empty batches leave populations unchanged",
        POOL,
        "sound = (count > 0) & ",
        "sound = (count >= 0) & ",
        "test_population.py::test_what_says_nothing_is_left_out",
    ),
    Mutant(
        "population statistics that the dtype cannot hold are not stored",
        POPULATION,
        "        sound &= np.isfinite(_rounded(n, o.dtype))\n",
        "        pass\n",
        "test_population.py::test_what_the_dtype_cannot_hold_is_not_written",
    ),
    Mutant(
        "statistics without data keep their old values",
        POPULATION,
        "*(np.where(sound, n, o) for",
        "*(n for",
        "test_population.py::test_without_any_data_statistics_stay",
    ),
    Mutant(
        "the last batch enters the population",
        POPULATION,
        "    yield from under_way\n",
        "",
        "test_population.py::test_batches_are_any_cut_of_the_data",
    ),
    Mutant(
        "a single value enters the population in a pass with fixed statistics",
        "_core/batch_norm.py",
        "    if fixed(stats):\n        return old\n    if not spec.over.names:\n",
        "    if not spec.over.names:\n        check.several_values(spec.axes)\n"
        "    if fixed(stats):\n        return old\n    if False:\n",
        "test_population.py::test_a_last_batch_of_one_example",
    ),
    Mutant(
        "a pass that normalises by the batch refuses a single value",
        "_core/batch_norm.py",
        "    if not spec.over.names:\n",
        "    if not (spec.over.names or waits(stats)):\n",
        "test_population.py::test_one_example_normalises_nothing",
    ),
    Mutant(
        "a population without any data is refused",
        POPULATION,
        "if sums and not any(",
        "if False and not any(",
        "test_population.py::test_no_data_at_all",
    ),
    Mutant(
        "layers scanned along any axis of the statistics have a pass each",
        POPULATION,
        "(math.prod(shape) // max(1, min(shape, default=1)))",
        "math.prod(shape[:-1])",
        "test_population.py::test_scanned_layers_are_layers",
    ),
    Mutant(
        "every call of a layer enters the population",
        POPULATION,
        "for m in calls:",
        "for m in calls[:1]:",
        "test_population.py::test_calls_of_one_layer_are_pooled",
    ),
    Mutant(
        "layer by layer, layers normalise as at inference",
        POPULATION,
        '_Way(variance == "paper", layer_by_layer, mesh, names)',
        '_Way(variance == "paper", False, mesh, names)',
        "test_population.py::test_inference_normalises_every_layer",
    ),
    Mutant(
        "a single pass normalises by the batch",
        POPULATION,
        '_Way(variance == "paper", layer_by_layer, mesh, names)',
        '_Way(variance == "paper", True, mesh, names)',
        "test_population.py::test_models",
    ),
    Mutant(
        "each pass starts from the statistics of the pass before",
        POPULATION,
        "_measure(apply_fn, way, params, _write(stats, previous.layers), read())",
        "_measure(apply_fn, way, params, stats, read())",
        "test_population.py::test_inference_normalises_every_layer",
    ),
    Mutant(
        "there are as many passes as layers",
        POPULATION,
        "for i in range(2, passes + 1):",
        "for i in range(2, passes):",
        "test_population.py::test_inference_normalises_every_layer",
    ),
    Mutant(
        "each scanned layer has a pass",
        POPULATION,
        " * (math.prod(shape) // max(1, min(shape, default=1)))",
        "",
        "test_population.py::test_scanned_layers_are_layers",
    ),
    Mutant(
        "passes end when no statistics change",
        POPULATION,
        "            break\n",
        "            pass\n",
        "test_population.py::test_parallel_branches_need_no_pass_each",
    ),
    Mutant(
        "a pass that reads fewer batches is refused",
        POPULATION,
        "        if found.batches != previous.batches:",
        "        if False:",
        "test_population.py::test_a_function_that_returns_what_is_used_up",
    ),
    Mutant(
        "population statistics are pooled over all devices",
        POPULATION,
        "cells(new, axis_name=way.axis_name, deferred=only)",
        "cells(new, deferred=only)",
        "test_population.py::test_shard_map",
    ),
    Mutant(
        "core layers with fixed statistics normalise by the given statistics",
        "_core/batch_norm.py",
        "    if fixed(stats):\n        return old\n",
        "",
        "test_population.py::test_inference_normalises_every_layer",
    ),
    Mutant(
        "Flax layers with fixed statistics normalise by the given statistics",
        "_flax.py",
        "old if fixed(stats) else None",
        "None",
        "test_population.py::test_models",
    ),
    Mutant(
        "fixed statistics stay the same between calls",
        DEFERRED,
        "return cell.stats if cell.fixed else cell.settled()",
        "return cell.settled()",
        "test_population.py::test_frozen_calls_see_what_is_fixed",
    ),
    Mutant(
        "population statistics keep their sharding",
        POPULATION,
        "jax.device_put(value, lies.sharding) if committed else jnp.asarray(value)",
        "jnp.asarray(value)",
        "test_population.py::test_statistics_lie_where_they_lay",
    ),
    Mutant(
        "every process gets the whole population",
        POPULATION,
        "    return multihost_utils.process_allgather(tree, tiled=True)",
        "    return jax.device_get(tree)",
        "test_population.py::test_two_processes",
    ),
    # Batch Renormalization.
    Mutant(
        "r and d are constants in the derivative",
        RENORM,
        "r, d = lax.stop_gradient(correction(spec, m, old, r_max, d_max))",
        "r, d = correction(spec, m, old, r_max, d_max)",
        "test_renorm.py::test_y_statistics_and_gradient_are_those_of_the_oracle",
    ),
    Mutant(
        "the batch's moments are no constants in derivatives of r xhat + d, of any order",
        RENORM,
        "named(measure(spec.of_moments, inputs.x, inputs.weights))",
        "named(measure(spec.of_moments, lax.stop_gradient(inputs.x), inputs.weights))",
        "test_renorm.py::test_derivatives_up_to_the_third_order",
    ),
    Mutant(
        "the batch is measured once for y, r and d",
        RENORM,
        "inputs._replace(scale=scale, bias=bias, measured=m)",
        "inputs._replace(scale=scale, bias=bias)",
        "test_renorm.py::test_x_is_summed_as_often_as_by_batch_norm",
    ),
    Mutant(
        "a schedule at r_max = 1 and d_max = 0 gives the y of Batch Normalization bit for bit",
        RENORM,
        "materialize(scale * r.astype(scale.dtype), bias + scale * d)",
        "scale * r.astype(scale.dtype), bias + scale * d",
        "test_renorm.py::test_without_correction_it_is_batch_norm_bit_for_bit",
    ),
    Mutant(
        "r is at least 1 / r_max",
        RENORM,
        "jnp.clip(r, 1 / r_max, r_max)",
        "jnp.minimum(r, r_max)",
        "test_renorm.py::test_both_limits_count",
    ),
    Mutant(
        "without data d is 0",
        RENORM,
        "d = where_data(m.count, d)",
        "pass",
        "test_renorm.py::test_an_empty_batch_gives_the_bias_and_makes_a_step",
    ),
    Mutant(
        "where squares overflow d is 0",
        RENORM,
        "d = jnp.where(m.var == jnp.inf, 0.0, d)",
        "pass",
        "test_renorm.py::test_an_unsound_feature_changes_no_statistics_and_no_other_feature",
    ),
    Mutant(
        "a limit that is NaN or too small counts as none",
        RENORM,
        "(value >= neutral)",
        "(value == value)",
        "test_renorm.py::test_a_schedule_that_turns_to_nonsense_gives_batch_norm",
    ),
    Mutant(
        "warm-up ends at its step",
        RENORM,
        "(steps >= warmup)",
        "(steps > warmup)",
        "test_renorm.py::test_warm_up_ends_at_its_step",
    ),
    Mutant(
        "an average of the standard deviation leaves unsound batches out",
        RENORM,
        "return running.absorb(self._moved, stats, moments)",
        "return self._moved(stats, moments)",
        "test_renorm.py::test_ema_of_std_leaves_out_what_other_rules_leave_out",
    ),
    Mutant(
        "all microbatches of a step are one step of the layer",
        DEFERRED,
        "dataclasses.replace(steps, value=steps.value + 1)",
        "steps",
        "test_renorm.py::test_microbatches_make_one_step_and_pool_their_moments",
    ),
    Mutant(
        "population statistics leave the number of steps",
        DEFERRED,
        "return checkpoint_name(new, _MARK) if isinstance(new, Tracer) else new",
        "return new",
        "test_renorm.py::test_population_statistics_leave_the_steps",
    ),
    Mutant(
        "init of a layer makes no step",
        "linen/renorm.py",
        "    if not module.is_initializing():\n        steps",
        "    if True:\n        steps",
        "test_renorm_layers.py::test_init_computes_batch_norm_and_makes_no_step",
    ),
    # Scale and bias at the call.
    Mutant(
        "a scale for each example has a gradient of its own",
        "_core/axes.py",
        "if values.ndim == len(self.shape):\n            return values",
        "if values.ndim == len(self.shape):\n            return values[:1]",
        "test_conditional.py::test_y_statistics_and_gradients_are_those_of_the_oracle",
    ),
    Mutant(
        "N of [N, C] runs along the first axis that is not a feature axis",
        "_core/axes.py",
        "self.split(1).unsqueeze(values), self.reduction[0] + 1)",
        "self.split(1).unsqueeze(values[::-1]), self.reduction[0] + 1)",
        "test_conditional.py::test_features_and_examples_along_any_axes",
    ),
    Mutant(
        "1 + scale is added in the accumulator's dtype",
        CONDITIONAL,
        "scale + np.asarray(1, dtype) if plus else scale",
        "(scale + np.asarray(1, dtype)).astype(x.dtype).astype(dtype) if plus else scale",
        "test_conditional.py::test_one_plus_scale_is_added_without_rounding",
    ),
    Mutant(
        "a scale as large as x is saved as it was given",
        CONDITIONAL,
        "return all(shape[i] == 1 for shape in given for i in places)",
        "return True",
        "test_conditional.py::test_a_backward_pass_keeps_x_and_what_was_given",
    ),
    Mutant(
        "a scale that is not finite where x is masked reaches no gradient",
        CONDITIONAL,
        "(v if v is None else harmless(v, v, weights) for v in (scale, bias))",
        "(v for v in (scale, bias))",
        "test_conditional.py::test_masked_values_reach_no_gradient",
    ),
    Mutant(
        "the moments are not computed a second time for a scale at each place",
        CONDITIONAL,
        "policy=checkpoint_policy, prevent_cse=False",
        "prevent_cse=True",
        "test_conditional.py::test_one_collective_each_way",
    ),
    # Several sets of statistics.
    Mutant(
        "each example is normalised by its own set",
        BY_SET,
        "rows = jnp.sum(jnp.where(own, stacked[:, None], jnp.zeros((), dtype)), 2)",
        "rows = jnp.sum(jnp.where(own[:, ::-1], stacked[:, None], jnp.zeros((), dtype)), 2)",
        "test_sets.py::test_each_set_is_that_of_its_examples_alone",
    ),
    Mutant(
        "the derivative of a set's moments sums its own examples",
        BY_SET,
        "return jnp.sum(jnp.where(own, values[:, None], jnp.zeros((), values.dtype)), 0)",
        "return jnp.sum(values[:, None] + jnp.zeros(own.shape, values.dtype), 0)",
        "test_sets.py::test_each_set_is_that_of_its_examples_alone",
    ),
    Mutant(
        "the derivative of a set's moments sums over the devices",
        BY_SET,
        "spec.over.sum(tuple(",
        "Scope().sum(tuple(",
        "test_sets.py::test_each_set_is_that_of_its_examples_alone",
    ),
    Mutant(
        "a backward pass computes no moments of sets again",
        BY_SET,
        "m = named(_measure(spec, x, weights, member))",
        "m = _measure(spec, x, weights, member)",
        "test_sets.py::test_one_collective_each_way_serves_all_sets",
    ),
    Mutant(
        "an example of no set takes no part, whatever it holds",
        BY_SET,
        "some = alongside(axes.expand_examples(some), values)",
        "some = jnp.ones_like(values, bool)",
        "test_sets.py::test_what_belongs_to_no_set_may_be_anything",
    ),
    Mutant(
        "one set for the call moves no other set",
        SETS,
        "own.reshape(-1, *(1 for _ in v.shape)), v[None]",
        "jnp.ones_like(own).reshape(-1, *(1 for _ in v.shape)), v[None]",
        "test_sets.py::test_one_set_is_batch_norm_bit_for_bit_and_the_others_stay",
    ),
    Mutant(
        "y is 0 where a traced index is out of range",
        SETS,
        "jnp.where(some, v, jnp.zeros_like(v))",
        "v",
        "test_sets.py::test_a_traced_index_out_of_range_is_no_set",
    ),
    Mutant(
        "groups have statistics of their own in each set",
        SETS,
        "own = jnp.repeat(jnp.eye(groups, dtype=bool), len(member) // groups, 0)",
        "own = jnp.tile(jnp.eye(groups, dtype=bool), (len(member) // groups, 1))",
        "test_sets.py::test_groups_have_statistics_of_their_own_in_each_set",
    ),
    Mutant(
        "a rule sees the statistics of one set",
        RUNNING,
        "return rule if own or not callable(rule) else _ForSets(rule)",
        "return rule",
        "test_sets.py::test_a_rule_of_the_users_sees_one_set_at_a_time",
    ),
    Mutant(
        "the examples of a set are pooled within a device first",
        DEVICES,
        "blocks = math.gcd(len(member), _automatic_devices(axes))",
        "blocks = 1",
        "test_sets.py::test_sharded_arrays_gather_once_forward",
    ),
    # Whitening.
    Mutant(
        "whitening divides by sums of roots of eigenvalues, not by their differences",
        ROOTS,
        "total = own + other",
        "total = own - other",
        "test_whitening.py::test_derivatives_of_orders_one_to_three_against_float64",
    ),
    Mutant(
        "higher derivatives of whitening differentiate its equation, not its eigenbasis",
        ROOTS,
        "return lax.custom_linear_solve(equation, right, solve, symmetric=True)",
        "return solve(equation, right)",
        "test_whitening.py::test_derivatives_of_orders_one_to_three_against_float64",
    ),
    Mutant(
        "the derivative of a covariance includes that of its mean",
        COVARIANCE,
        "along[..., :-1] - dmean * jnp.swapaxes(m.mean, -1, -2)",
        "along[..., :-1]",
        "test_whitening.py::test_derivatives_of_orders_one_to_three_against_float64",
    ),
    Mutant(
        "ZCA whitens with the symmetric root, which changes x least",
        ROOTS,
        "jnp.where(finite, _compose(vectors, rates), jnp.nan)",
        "jnp.where(finite, _transpose(vectors * rates[..., None, :]), jnp.nan)",
        "test_whitening.py::test_zca_changes_x_least_of_all_whitenings",
    ),
    Mutant(
        "with epsilon = 0 whitening drops directions without variance",
        ROOTS,
        "values <= size * unit if epsilon == 0 else",
        "values <= unit - unit if epsilon == 0 else",
        "test_whitening.py::test_y_and_gradient_are_finite_without_variance",
    ),
    Mutant(
        "the derivative of whitening multiplies W only in the eigenbasis",
        ROOTS,
        "_solve(of_inverse, r.vectors, -own * other * shares, dcov)",
        "-multiply(multiply(r.inverse, droot), r.inverse)",
        "test_whitening.py::test_float32_keeps_its_digits_with_fewer_examples_than_features",
    ),
    Mutant(
        "eigenvalues that are rounding errors have a bound",
        ROOTS,
        "jnp.maximum(values, unit)",
        "jnp.maximum(values, 0)",
        "test_whitening.py::test_float32_keeps_its_digits_with_fewer_examples_than_features",
    ),
    Mutant(
        "Newton-Schulz scales by the trace of the covariance",
        ROOTS,
        "p * lax.rsqrt(trace)",
        "p",
        "test_whitening.py::test_newton_schulz_is_the_printed_algorithm",
    ),
    Mutant(
        "whitening takes no masked value into the covariance",
        COVARIANCE,
        "only_active(x.astype(m.shift.dtype) - m.shift - m.mean, weights)",
        "x.astype(m.shift.dtype) - m.shift - m.mean",
        "test_whitening.py::test_masked_values_take_no_part",
    ),
    Mutant(
        "a pooled covariance includes the products of the differences between means",
        POOL,
        "return lax.mul(*jnp.broadcast_arrays(offset, jnp.swapaxes(offset, -1, -2)))",
        "return 0 * lax.mul(*jnp.broadcast_arrays(offset, jnp.swapaxes(offset, -1, -2)))",
        "devices/test_whitening_over_devices.py::test_every_execution_gives_the_oracles_results",
    ),
    Mutant(
        "no device takes the covariance of a part of a group",
        DEVICES,
        "free = range(ndim - together)",
        "free = range(ndim)",
        "devices/test_whitening_over_devices.py::test_features_over_devices",
    ),
    Mutant(
        "running covariances may be negative off their diagonal",
        RUNNING,
        "least = jnp.min(jnp.diagonal(values.var, axis1=-2, axis2=-1), -1)[..., None, None]",
        "least = jnp.min(values.var, (-2, -1), keepdims=True)",
        "test_whitening.py::test_updates_follow_the_rules_of_the_core",
    ),
    Mutant(
        "the features of a group enter the running statistics together",
        RUNNING,
        "return jnp.max(jnp.abs(v), (-2, -1), keepdims=True)",
        "return jnp.min(jnp.nan_to_num(jnp.abs(v)), (-2, -1), keepdims=True)",
        "test_whitening.py::test_a_group_that_is_not_finite_keeps_its_statistics",
    ),
    Mutant(
        "a deferred step returns whitening statistics in the shapes of the layer",
        DEFERRED,
        "return new if cell.features is None else new.reshape(cell.shape)",
        "return new",
        "test_whitening.py::test_microbatches_pool",
    ),
]


def apply(mutant: Mutant, package: pathlib.Path) -> str:
    """Returns the text of the mutant's file in the package, with the replacement.

    Raises:
      ValueError: the text to replace does not occur exactly once, or the result is no valid
        program.
    """
    text = (package / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"not applied: its text stands {text.count(mutant.old)} times")
    mutated = text.replace(mutant.old, mutant.new)
    if unknown := undefined(mutated):
        raise ValueError(f"not a program: {', '.join(sorted(unknown))} undefined")
    return mutated


def undefined(source: str) -> set[str]:
    """Returns the global names that a module uses and neither defines nor imports.

    Raises:
      SyntaxError: the source is not valid Python.
    """
    module = symtable.symtable(source, "mutant", "exec")
    defined = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported()}

    def used(scope: symtable.SymbolTable) -> set[str]:
        names = {s.get_name() for s in scope.get_symbols() if s.is_referenced() and s.is_global()}
        return names.union(*map(used, scope.get_children()))

    return used(module) - defined - set(dir(builtins)) - {"__file__"}


def run(mutant: Mutant) -> tuple[Mutant, str]:
    """Returns the name of the test that failed, or "survived", or why the mutant is not valid."""
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory)
        for part in ("jbn", "tests", "experiments"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        try:
            (copy / "jbn" / mutant.file).write_text(apply(mutant, copy / "jbn"))
        except (ValueError, SyntaxError) as error:
            return mutant, str(error)
        tests = [f"tests/{name}" for name in mutant.tests.split()]
        verdict = first_failure(copy, tests)
        if verdict == "survived":
            verdict = first_failure(copy, ["-m", "slow", *tests])
            verdict = verdict if verdict == "survived" else f"slow: {verdict}"
    return mutant, verdict


def first_failure(root: pathlib.Path, arguments: list[str]) -> str:
    """Runs tests in a copy; returns the first that fails, or "survived", or pytest's words."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-pno:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^FAILED tests/(\S+::\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    none = 5  # pytest's status where all tests are deselected
    return "survived" if done.returncode in (0, none) else f"pytest: {done.stdout[-300:]}"


def main(words: list[str]) -> int:
    """Runs the mutants whose law contains one of the words, or all mutants; prints a table."""
    chosen = [m for m in MUTANTS if not words or any(w in m.law for w in words)]
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for mutant, verdict in pool.map(run, chosen):
            killed = bool(re.match(r"(slow: )?(\w+/)*test_\w+\.py::", verdict))
            survivors += not killed
            print(f"{'killed' if killed else 'ALIVE':7}| {mutant.law:60}| {verdict}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
