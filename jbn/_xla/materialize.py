"""A primitive that stores per-feature vectors before a pass over x reads them.

Cause: XLA for CPUs (jax 0.10 to 0.12) fuses the computation of a vector [C] into the loop over
[N, ..., C] that uses it, and so repeats it for every element; it removes optimization barriers
before it fuses. Effect: without `materialize` the forward pass over [4096, 1024] takes 1.3 times as
long, and the shift, the median of seven draws, is computed again for each element. On CPUs the
primitive calls a function that may not be inlined. No fusion crosses this call, and it is cheap to
compile: a concatenation of the vectors, which is not fused either, made training steps 15 to 25 %
slower to compile.

Check: `python -m experiments.speed --part op compile`.

It is a primitive of JAX, an identity, because a choice by `jax.lax.platform_dependent` made the
training step of ResNet-50 take a quarter longer to trace.
"""

import jax.extend.core
from jax import Array
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func
from jax.interpreters import ad, batching, mlir


def materialize(*vectors: Array) -> tuple[Array, ...]:
    """Stores `vectors` for a pass over x; to the compiler the results are new values.

    It is linear, and its transpose stores the cotangents in the same way.
    """
    return tuple(_materialize.bind(*vectors))


def _lower_on_cpu(ctx, *operands):
    """Makes a call of a function that returns its arguments and that XLA may not inline."""
    types, module = [operand.type for operand in operands], ctx.module_context
    with ir.InsertionPoint.at_block_begin(module.module.body):
        stored = func.FuncOp("jbn_stored", (types, types), visibility="private")
    module.symbol_table.insert(stored)
    body = stored.add_entry_block()
    with ir.InsertionPoint(body):
        func.return_(list(body.arguments))
    call = func.CallOp(stored, list(operands))
    attributes = ir.DictAttr.get({"inlineable": ir.StringAttr.get("false")})
    call.attributes["mhlo.frontend_attributes"] = attributes
    return call.results


def _jvp(vectors, tangents):
    return _materialize.bind(*vectors), _materialize.bind(*map(ad.instantiate_zeros, tangents))


def _transpose(cotangents, *_):
    return _materialize.bind(*map(ad.instantiate_zeros, cotangents))


_materialize = jax.extend.core.Primitive("jbn_materialize")
_materialize.multiple_results = True
_materialize.def_impl(lambda *vectors: list(vectors))
_materialize.def_abstract_eval(lambda *avals: [aval.update(weak_type=False) for aval in avals])
ad.primitive_jvps[_materialize] = _jvp
ad.primitive_transposes[_materialize] = _transpose
batching.primitive_batchers[_materialize] = lambda vs, dims: (_materialize.bind(*vs), dims)
mlir.register_lowering(_materialize, lambda _, *vectors: vectors)
mlir.register_lowering(_materialize, _lower_on_cpu, platform="cpu")
