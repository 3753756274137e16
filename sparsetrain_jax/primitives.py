"""The convolution and its gradients as JAX primitives, all made by one factory.

=================================  ================================  =========================================
primitive                          operands                          result
=================================  ================================  =========================================
``sparse_conv_fwd``                lhs ``NHWC``, rhs ``RSCK``        out ``NPQK``
``sparse_conv_bwd_input``          g ``NPQK``, rhs ``RSCK``          dlhs ``NHWC``
``sparse_conv_bwd_weights``        lhs ``NHWC``, g ``NPQK``          drhs ``RSCK``
``sparse_conv_bwd_input_masked``   g, rhs, x ``NHWC``                dlhs, 0 where x is
``sparse_conv_fwd_masked``         lhs, rhs, x ``NHWC``              out of lhs where x is not 0
``sparse_conv_bwd_both``           g, rhs, x                         dlhs, 0 where x is, and drhs of x and g
``sparse_conv_fwd_both``           dlhs, drhs, lhs, rhs              out of dlhs where lhs is not 0 and rhs,
                                                                     plus that of lhs and drhs
=================================  ================================  =========================================

All operands of a call have one dtype: float32, bfloat16 or float16 (accumulated in float32). The result has it too, or
is float32 if ``spec`` says so. No array is converted as a whole: the custom calls convert tile by tile.

The only parameter is ``spec``, a :class:`~sparsetrain_jax.shapes.ConvSpec`. The first three are bilinear and transpose
into each other. The next two do as well, with a third operand that has no gradient: with ``relu_input``, the derivative
of ``sparse_conv_fwd`` for the input is ``sparse_conv_fwd_masked``. Differentiation in both modes and to any order
follows from that. The last two are calls of two others each, by whose names jaxprs show them, and transpose into each
other: the gradients for both operands, which read the same g and x, can then be one call.

Everything else is read off the letters of the table: shapes, how a batched operand folds into N, C or K, and how a call
is partitioned over devices. On the CPU a primitive lowers to a custom call, elsewhere to ``jax.lax``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.lax import conv_general_dilated as stock_convolution  # bound now: ours may be put in place of jax.lax's
from jax.sharding import NamedSharding, PartitionSpec

from . import _compat, native
from .shapes import MODES, ConvSpec

__all__ = [
    "dots_saveable",
    "sparse_conv_bwd_both",
    "sparse_conv_bwd_input",
    "sparse_conv_bwd_input_masked",
    "sparse_conv_bwd_weights",
    "sparse_conv_fwd",
    "sparse_conv_fwd_both",
    "sparse_conv_fwd_masked",
    "stock_convolution",
    "where_active",
]

_FEATURES = "NCK"  # the letters along which calls batch and partition; the others hold the window's geometry
_DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def _lax_fwd(lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    return stock_convolution(
        lhs,
        rhs,
        spec.strides,
        spec.padding,
        dimension_numbers=_DIMENSION_NUMBERS,
        precision=spec.precision,
        preferred_element_type=spec.result,
    )


def _in_result_dtype(spec: ConvSpec, *operands: jax.Array) -> list[jax.Array]:
    return [operand.astype(_result_dtype(spec, operand)) for operand in operands]


def _lax_bwd_input(g: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    g, rhs = _in_result_dtype(spec, g, rhs)
    lhs = jax.ShapeDtypeStruct((g.shape[0], *spec.input_size, rhs.shape[2]), g.dtype)
    return jax.linear_transpose(lambda lhs: _lax_fwd(lhs, rhs, spec=spec.gradient), lhs)(g)[0]


def _lax_bwd_weights(lhs: jax.Array, g: jax.Array, *, spec: ConvSpec) -> jax.Array:
    lhs, g = _in_result_dtype(spec, lhs, g)
    rhs = jax.ShapeDtypeStruct((*spec.kernel_size, lhs.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda rhs: _lax_fwd(lhs, rhs, spec=spec.gradient), rhs)(g)[0]


def _lax_bwd_input_masked(g: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> jax.Array:
    return where_active(x, _lax_bwd_input(g, rhs, spec=spec))


def _fwd_masked(lhs: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> jax.Array:
    return sparse_conv_fwd(where_active(x, lhs), rhs, spec=spec)


def _lax_bwd_both(g: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> tuple[jax.Array, jax.Array]:
    return _lax_bwd_input_masked(g, rhs, x, spec=spec), _lax_bwd_weights(x, g, spec=spec)


def _fwd_both(dlhs: jax.Array, drhs: jax.Array, lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    return sparse_conv_fwd_masked(dlhs, rhs, lhs, spec=spec) + sparse_conv_fwd(lhs, drhs, spec=spec)


def where_active(x: jax.Array, value: jax.Array) -> jax.Array:
    """``value`` where ``x`` is not zero, exactly 0 elsewhere, whatever ``value`` is there."""
    return lax.select(x != 0, value, jnp.zeros_like(value))


@dataclass(frozen=True)
class _Component:
    """One row of the module's table.

    Attributes:
      name: the primitive's name.
      target: the custom call's name; empty if there is none, and the reference is computed everywhere.
      operands: one string of dimension letters per operand.
      results: likewise for the results.
      reference: the same function in terms of ``jax.lax``, or of other components.
      parts: if there are several results, the component that each is, and which of the operands are that one's.
    """

    name: str
    target: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    reference: Callable[..., Any]
    parts: tuple[tuple[_Component, tuple[int, ...]], ...] = ()

    @property
    def result(self) -> str:
        """The letters of the only result."""
        (letters,) = self.results
        return letters

    def apart(self, values: Sequence[Any]) -> list[tuple[_Component, list[Any]]]:
        """The parts, each with its own of ``values``, of which there is one per operand."""
        return [(part, [values[i] for i in own]) for part, own in self.parts]

    def sizes(self, spec: ConvSpec, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Size of every letter.

        Raises:
          ValueError: if the operands' shapes contradict each other or the spec.
        """
        sizes = dict(spec.sizes())
        for letters, shape in zip(self.operands, shapes, strict=True):
            given = dict(zip(letters, shape, strict=True)) if len(letters) == len(shape) else {}
            if not given or any(sizes.setdefault(letter, size) != size for letter, size in given.items()):
                raise ValueError(
                    f"{self.name}: operands {', '.join(self.operands)} of {spec} cannot have shapes {shapes}"
                )
        return sizes

    def result_shapes(self, spec: ConvSpec, shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        sizes = self.sizes(spec, shapes)
        return [tuple(sizes[letter] for letter in letters) for letters in self.results]


def _contracted(result: str) -> str:
    """The feature letter that is summed over for a result."""
    (letter,) = (f for f in _FEATURES if f not in result)
    return letter


# ---------------------------------------------------------------------------------------------------------------------
# Abstract evaluation


def _dtype_rule(component: _Component, *avals: Any, spec: ConvSpec) -> Any:
    dtypes = {np.dtype(aval.dtype) for aval in avals}
    if len(dtypes) != 1:
        raise TypeError(
            f"{component.name}: operands must have one dtype, got {', '.join(map(str, sorted(dtypes, key=str)))}"
        )
    return _result_dtype(spec, avals[0])


def _result_dtype(spec: ConvSpec, operand: Any) -> Any:
    return operand.dtype if spec.result is None else np.dtype(spec.result)


def _sharding_rule(component: _Component, *avals: Any, spec: ConvSpec) -> NamedSharding:
    """Explicit mesh axes of the result: each of its feature letters is sharded as in the operand that has it.

    The gradients may contract a letter that both operands shard alike (each device then has a part of the sum, and the
    custom call's partitioning adds the parts up); the forward pass may not, as in ``jax.lax``.
    """
    axes: dict[str, Any] = {}
    for letters, aval in zip(component.operands, avals, strict=True):
        for letter, axis in zip(letters, aval.sharding.spec, strict=True):
            if letter in _FEATURES and axis != axes.setdefault(letter, axis):
                raise _sharding_error(f"{component.name}: operands shard {letter} differently: {axes[letter]}, {axis}")
            if axis is not None and letter not in _FEATURES:
                raise _sharding_error(f"{component.name} cannot keep a spatial dimension sharded: {letters} is {aval}")
    if _contracted(component.result) == "C" and axes["C"] is not None:
        raise _sharding_error(f"{component.name}: the input features of lhs and rhs must not be sharded")
    mesh = next((aval.sharding.mesh for aval in avals if not aval.sharding.mesh.empty), avals[0].sharding.mesh)
    return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) for letter in component.result)))


def _sharding_error(message: str) -> Exception:
    return _compat.ShardingTypeError(
        f"{message}. Reshard with jax.sharding.reshard first, or give conv_general_dilated an out_sharding."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batching


def _batch(component: _Component, primitive: Any, args: Sequence[Any], dims: Sequence[Any], *, spec: ConvSpec) -> Any:
    """One call with the batch folded into N, C or K if one of them is in just the batched operands; else a loop."""
    batched = [dim is not None for dim in dims]
    for letter in _FEATURES:
        own = [letter in letters for letters in component.operands]
        if letter in component.result and own == batched:
            folded = [
                _fold(arg, dim, letters.index(letter)) if dim is not None else arg
                for arg, dim, letters in zip(args, dims, component.operands, strict=True)
            ]
            first = batched.index(True)
            shape = list(args[first].shape)
            size = shape.pop(dims[first])
            each = shape[component.operands[first].index(letter)]
            axis = component.result.index(letter)
            out = primitive.bind(*folded, spec=spec)
            return out.reshape(*out.shape[:axis], size, each, *out.shape[axis + 1 :]), axis

    args = [arg if dim is None else jnp.moveaxis(arg, dim, 0) for arg, dim in zip(args, dims, strict=True)]

    def loop(*args: jax.Array) -> jax.Array:
        def one(slices: Sequence[jax.Array]) -> jax.Array:
            rest = iter(slices)
            operands = [next(rest) if is_batched else arg for arg, is_batched in zip(args, batched, strict=True)]
            return primitive.bind(*_compat.auto_match(*operands), spec=spec)

        return lax.map(one, [arg for arg, is_batched in zip(args, batched, strict=True) if is_batched])

    return _compat.over_explicit_axes(loop, args, batched)(*args), 0


def _batch_apart(component: _Component, args: Sequence[Any], dims: Sequence[Any], *, spec: ConvSpec) -> Any:
    """One call of each part: few batches fold into both, and a result of what is not batched is not either."""
    results = []
    for (part, own), (_, own_dims) in zip(component.apart(args), component.apart(dims), strict=True):
        if all(dim is None for dim in own_dims):
            results.append((_primitive(part).bind(*own, spec=spec), None))
        else:
            results.append(_batch(part, _primitive(part), own, own_dims, spec=spec))
    return tuple(zip(*results, strict=True))


def _fold(arg: jax.Array, batch_dim: int, axis: int) -> jax.Array:
    """``arg`` with its batch dimension merged, as the major part, into ``axis`` (counted without the batch)."""
    arg = jnp.moveaxis(arg, batch_dim, axis)
    return arg.reshape(*arg.shape[:axis], arg.shape[axis] * arg.shape[axis + 1], *arg.shape[axis + 2 :])


# ---------------------------------------------------------------------------------------------------------------------
# Lowering


def _call_native(
    component: _Component, *operands: jax.Array, spec: ConvSpec, reduced: Sequence[tuple[str, ...]] = ()
) -> list[jax.Array]:
    """The custom call, for the shapes that one device sees; each result is summed over its mesh axes in ``reduced``."""
    operand_shapes = [operand.shape for operand in operands]
    shapes = component.result_shapes(spec, operand_shapes)
    dtype = _result_dtype(spec, operands[0])
    if any(isinstance(d, int) and d == 0 for shape in (*shapes, *operand_shapes) for d in shape):
        return [jnp.zeros(shape, dtype) for shape in shapes]  # nothing to add up, or nothing to write
    reduced = reduced or [()] * len(shapes)
    left_to_lax = _lax_reason(component, spec, operand_shapes)
    if component.parts and (spec.mode == "dense" or left_to_lax):
        calls = zip(component.apart(operands), reduced, strict=True)
        return [out for (part, own), axes in calls for out in _call_native(part, *own, spec=spec, reduced=[axes])]
    # Parts of a sum are rounded once, after adding them up.
    partial = tuple(jnp.dtype(jnp.float32) if axes else dtype for axes in reduced)
    if left_to_lax:
        outs = [component.reference(*operands, spec=spec).astype(*partial)]
    else:
        outs = _custom_call(component).bind(*operands, spec=spec, dtypes=partial)
    return [lax.psum(out, axes).astype(dtype) if axes else out for out, axes in zip(outs, reduced, strict=True)]


def _lax_reason(component: _Component, spec: ConvSpec, shapes: Sequence[Sequence[int]]) -> str:
    """Why ``auto`` leaves this shape, or a part of the component, to ``jax.lax``; empty if it does not."""
    if component.parts:
        return "".join(_lax_reason(part, spec, own) for part, own in component.apart(shapes))
    if spec.mode != "auto":
        return ""
    sizes = {**component.sizes(spec, shapes), "N": 1}  # which may be symbolic, and does not matter
    plan = native.plan(component.name.removeprefix("sparse_conv_"), [sizes[d] for d in "NHWCKRS"], spec.geometry)
    return str(plan.get("lax", ""))


@functools.cache
def _custom_call(component: _Component) -> Any:
    """The bare custom call, for lowering only: a primitive too, so that traces show it by the component's name.

    Its results have the dtype of its operands or float32. It converts tile by tile: no array is converted as a whole.
    """

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, spec: ConvSpec, dtypes: Any) -> Any:
        geometry, mode = np.array(spec.geometry, np.int64), np.int64(MODES.index(spec.mode))
        return jax.ffi.ffi_lowering(component.target)(ctx, *operands, geometry=geometry, mode=mode)

    primitive = Primitive(component.name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(
        lambda *avals, spec, dtypes: [
            avals[0].update(shape=shape, dtype=dtype)
            for shape, dtype in zip(component.result_shapes(spec, [aval.shape for aval in avals]), dtypes, strict=True)
        ]
    )
    mlir.register_lowering(primitive, lower, platform="cpu")
    return primitive


def _partitioned(component: _Component) -> Any:
    """The custom call as a function that XLA's partitioner splits along N, C and K instead of gathering operands."""
    position = len(component.operands)

    def axes_by_letter(shapes: Sequence[Any], results: Sequence[Any]) -> dict[str, tuple[str, ...]]:
        """Mesh axes of each feature letter: the first operand that shards it decides, then the first result."""
        chosen: dict[str, tuple[str, ...]] = {}
        for letters, value in zip((*component.operands, *component.results), (*shapes, *results), strict=True):
            sharding = value.sharding
            if not isinstance(sharding, NamedSharding):
                continue
            for letter, size, axis in zip(letters, value.shape, sharding.spec, strict=False):
                axes = (axis,) if isinstance(axis, str) else tuple(axis or ())
                taken = {a for other in chosen.values() for a in other}
                ways = int(np.prod([sharding.mesh.shape[a] for a in axes], dtype=int))
                # A letter that is summed over must not be padded, and a device without work gains nothing.
                if letter in _FEATURES and letter not in chosen and axes and not taken & set(axes) and size % ways == 0:
                    chosen[letter] = axes
        return chosen

    def shardings(mesh: Any, chosen: dict[str, tuple[str, ...]], values: Sequence[str]) -> list[NamedSharding]:
        return [NamedSharding(mesh, PartitionSpec(*(chosen.get(letter) for letter in letters))) for letters in values]

    def partition(spec: ConvSpec, mesh: Any, shapes: Sequence[Any], results: Sequence[Any]) -> Any:
        chosen = axes_by_letter(shapes, results)
        reduced = [chosen.get(_contracted(letters), ()) for letters in component.results]

        def local(*operands: jax.Array) -> list[jax.Array]:
            with _compat.plain_types():
                return _call_native(component, *operands, spec=spec, reduced=reduced)

        return (
            mesh,
            local,
            shardings(mesh, chosen, component.results),
            tuple(shardings(mesh, chosen, component.operands)),
        )

    def infer(spec: ConvSpec, mesh: Any, shapes: Sequence[Any], results: Sequence[Any]) -> list[NamedSharding]:
        return shardings(mesh, axes_by_letter(shapes, results), component.results)

    def whole(*args: Any) -> list[jax.Array]:
        return _call_native(component, *args[:position], spec=args[position])

    call = custom_partitioning(whole, static_argnums=(position,))
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(
            ", ".join(" ".join(letters.lower()) for letters in values)
            for values in (component.operands, component.results)
        ),
        reduction_factors=tuple(f.lower() for f in _FEATURES if not any(f in letters for letters in component.results)),
        # In the order in which they appear, as the rule's verifier wants them.
        need_replication_factors=tuple(
            dict.fromkeys(f.lower() for f in "".join((*component.operands, *component.results)) if f not in _FEATURES)
        ),
    )
    return call


@functools.cache
def _primitive(component: _Component) -> Any:
    if component.parts:
        primitive = _compat.primitive_of_parts(
            component.name, [(_primitive(part), own) for part, own in component.parts]
        )
        batching.primitive_batchers[primitive] = functools.partial(_batch_apart, component)
    else:
        primitive = _compat.standard_primitive(
            component.name,
            lambda *avals, spec: component.result_shapes(spec, [aval.shape for aval in avals])[0],
            functools.partial(_dtype_rule, component),
            functools.partial(_sharding_rule, component),
        )
        batching.primitive_batchers[primitive] = functools.partial(_batch, component, primitive)
    mlir.register_lowering(primitive, _compat.lower_plain(component.reference))
    _compat.needs_devices(primitive)
    if not component.target:
        return primitive
    partitioned = _partitioned(component)
    whole = _compat.lower_plain(functools.partial(_call_native, component))
    shared = _compat.lower_plain(lambda *operands, spec: partitioned(*operands, spec))

    def lower_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, spec: ConvSpec) -> Any:
        return (shared if _compat.is_partitioned(ctx) else whole)(ctx, *operands, spec=spec)

    mlir.register_lowering(primitive, lower_cpu, platform="cpu")
    return primitive


_FWD = _Component("sparse_conv_fwd", "sparsetrain_conv_fwd_v1", ("NHWC", "RSCK"), ("NPQK",), _lax_fwd)
_BWD_INPUT = _Component(
    "sparse_conv_bwd_input", "sparsetrain_conv_bwd_input_v1", ("NPQK", "RSCK"), ("NHWC",), _lax_bwd_input
)
_BWD_WEIGHTS = _Component(
    "sparse_conv_bwd_weights", "sparsetrain_conv_bwd_weights_v1", ("NHWC", "NPQK"), ("RSCK",), _lax_bwd_weights
)
_BWD_INPUT_MASKED = _Component(
    "sparse_conv_bwd_input_masked",
    "sparsetrain_conv_bwd_input_masked_v1",
    ("NPQK", "RSCK", "NHWC"),
    ("NHWC",),
    _lax_bwd_input_masked,
)
_FWD_MASKED = _Component("sparse_conv_fwd_masked", "", ("NHWC", "RSCK", "NHWC"), ("NPQK",), _fwd_masked)
_BWD_BOTH = _Component(
    f"{_BWD_INPUT_MASKED.name}_{_BWD_WEIGHTS.name}",
    "sparsetrain_conv_bwd_both_v1",
    _BWD_INPUT_MASKED.operands,
    (_BWD_INPUT_MASKED.result, _BWD_WEIGHTS.result),
    _lax_bwd_both,
    ((_BWD_INPUT_MASKED, (0, 1, 2)), (_BWD_WEIGHTS, (2, 0))),
)
_FWD_BOTH = _Component(f"{_FWD_MASKED.name}_{_FWD.name}", "", ("NHWC", "RSCK", "NHWC", "RSCK"), ("NPQK",), _fwd_both)

_fwd_p = _primitive(_FWD)
_bwd_input_p = _primitive(_BWD_INPUT)
_bwd_weights_p = _primitive(_BWD_WEIGHTS)
_bwd_input_masked_p = _primitive(_BWD_INPUT_MASKED)
_fwd_masked_p = _primitive(_FWD_MASKED)
_bwd_both_p = _primitive(_BWD_BOTH)
_fwd_both_p = _primitive(_FWD_BOTH)

# As a sum of two calls, a batch that only one of them has stays out of the other.
batching.primitive_batchers[_fwd_both_p] = lambda args, dims, *, spec: (
    jax.vmap(functools.partial(_fwd_both, spec=spec), dims)(*args),
    0,
)


def sparse_conv_fwd(lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    """Convolution of lhs ``NHWC`` with rhs ``RSCK``; the result is ``NPQK``. Zeros of lhs are skipped.

    With ``spec.relu_input`` the derivative for lhs is zero where lhs is.
    """
    return _fwd_p.bind(*_compat.auto_match(lhs, rhs), spec=spec)


def sparse_conv_bwd_input(g: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    """Gradient ``NHWC`` for the input from that of the output, g ``NPQK``, and rhs ``RSCK``. Zeros of g are skipped."""
    return _bwd_input_p.bind(*_compat.auto_match(g, rhs), spec=spec)


def sparse_conv_bwd_weights(lhs: jax.Array, g: jax.Array, *, spec: ConvSpec) -> jax.Array:
    """Gradient ``RSCK`` for the kernel from lhs ``NHWC`` and g ``NPQK``. The cheaper one's zeros are skipped."""
    return _bwd_weights_p.bind(*_compat.auto_match(lhs, g), spec=spec)


def sparse_conv_bwd_input_masked(g: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> jax.Array:
    """Like :func:`sparse_conv_bwd_input`, but only where ``x`` ``NHWC`` is not zero; exactly 0 elsewhere."""
    return _bwd_input_masked_p.bind(*_compat.auto_match(g, rhs, x), spec=spec)


def sparse_conv_fwd_masked(lhs: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> jax.Array:
    """Like :func:`sparse_conv_fwd`, with lhs taken for 0 where ``x`` ``NHWC`` is."""
    return _fwd_masked_p.bind(*_compat.auto_match(lhs, rhs, x), spec=replace(spec, relu_input=False))


def sparse_conv_bwd_both(g: jax.Array, rhs: jax.Array, x: jax.Array, *, spec: ConvSpec) -> tuple[jax.Array, jax.Array]:
    """:func:`sparse_conv_bwd_input_masked` of g ``NPQK``, rhs ``RSCK`` and x ``NHWC``, and the gradient ``RSCK`` for
    the kernel from x and g, like :func:`sparse_conv_bwd_weights`.
    """
    dlhs, drhs = _bwd_both_p.bind(*_compat.auto_match(g, rhs, x), spec=spec)
    return dlhs, drhs


def sparse_conv_fwd_both(
    dlhs: jax.Array, drhs: jax.Array, lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec
) -> jax.Array:
    """:func:`sparse_conv_fwd_masked` of dlhs ``NHWC``, rhs ``RSCK`` and lhs ``NHWC``, plus :func:`sparse_conv_fwd` of
    lhs and drhs ``RSCK``: the tangent, with ``relu_input``, of a convolution both of whose operands have one.
    """
    return _fwd_both_p.bind(*_compat.auto_match(dlhs, drhs, lhs, rhs), spec=spec)


def dots_saveable(prim: Any, *args: Any, **params: Any) -> bool:
    """``jax.checkpoint_policies.dots_saveable``, which does not know our convolutions, with them: a checkpoint policy.

    Results of matrix products and of all convolutions are saved for the backward pass, others are computed again.
    """
    ours = prim in (_fwd_p, _bwd_input_p, _bwd_weights_p, _bwd_input_masked_p, _fwd_masked_p, _bwd_both_p, _fwd_both_p)
    return ours or bool(jax.checkpoint_policies.dots_saveable(prim, *args, **params))


# ---------------------------------------------------------------------------------------------------------------------
# Differentiation: the three bilinear maps are transposes of each other. Argument names: ct is the cotangent of the
# result; the operand that is asked for is only known by its abstract value.


def _gradient(call: Callable[..., Any], *operands: jax.Array, wanted: Any, spec: ConvSpec) -> Any:
    """One of ``operands`` is ct. If it is wider than the others, they meet in its dtype, as in lax."""
    dtype = max((x.dtype for x in operands), key=lambda dtype: dtype.itemsize)  # not by promotion, which may be strict
    out = call(*(x.astype(dtype) for x in operands), spec=spec.gradient)
    return jax.tree.map(lambda out, wanted: out.astype(wanted.aval.dtype), out, wanted)


def _tangent_of_lhs(tangent: jax.Array, lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    if spec.relu_input:
        return sparse_conv_fwd_masked(tangent, rhs, lhs, spec=spec)
    return sparse_conv_fwd(tangent, rhs, spec=spec)


def _jvp_of_both(separately: Callable[..., Any], primals: Any, tangents: Any, *, spec: ConvSpec) -> tuple[Any, Any]:
    """``separately`` with one call for the tangents of lhs and rhs, which are the first two; lhs and rhs come last."""
    both, rest = tangents[:2], tangents[2:]
    if any(type(tangent) is ad.Zero for tangent in both):
        return separately(primals, tangents, spec=spec)
    out, tangent = separately(primals, [*(ad.Zero(jax.typeof(tangent)) for tangent in both), *rest], spec=spec)
    return out, ad.add_tangents(sparse_conv_fwd_both(*both, *primals[-2:], spec=spec), tangent)


def _jvp_fwd(separately: Callable[..., Any], primals: Any, tangents: Any, *, spec: ConvSpec) -> tuple[Any, Any]:
    if spec.relu_input:
        return _jvp_of_both(separately, primals, tangents, spec=spec)
    return separately(primals, tangents, spec=spec)


def _jvp_bwd_both(primals: Any, tangents: Any, *, spec: ConvSpec) -> tuple[Any, Any]:
    (g, rhs, x), (dg, drhs, dx) = primals, tangents
    out = sparse_conv_bwd_both(g, rhs, x, spec=spec)
    linear = type(dg) is not ad.Zero
    of_lhs, of_rhs = sparse_conv_bwd_both(dg, rhs, x, spec=spec) if linear else map(ad.Zero, map(jax.typeof, out))
    if type(drhs) is not ad.Zero:
        of_lhs = ad.add_tangents(of_lhs, sparse_conv_bwd_input_masked(g, drhs, x, spec=spec))
    if type(dx) is not ad.Zero:
        of_rhs = ad.add_tangents(of_rhs, sparse_conv_bwd_weights(dx, g, spec=spec))
    return out, (of_lhs, of_rhs)


ad.defbilinear(
    _fwd_p,
    lambda ct, lhs, rhs, *, spec: _gradient(sparse_conv_bwd_input, ct, rhs, wanted=lhs, spec=spec),
    lambda ct, lhs, rhs, *, spec: _gradient(sparse_conv_bwd_weights, lhs, ct, wanted=rhs, spec=spec),
)
ad.defjvp(_fwd_p, _tangent_of_lhs, lambda tangent, lhs, rhs, *, spec: sparse_conv_fwd(lhs, tangent, spec=spec))
ad.primitive_jvps[_fwd_p] = functools.partial(_jvp_fwd, ad.primitive_jvps[_fwd_p])
ad.defbilinear(
    _bwd_input_p,
    lambda ct, g, rhs, *, spec: _gradient(sparse_conv_fwd, ct, rhs, wanted=g, spec=spec),
    lambda ct, g, rhs, *, spec: _gradient(sparse_conv_bwd_weights, ct, g, wanted=rhs, spec=spec),
)
ad.defbilinear(
    _bwd_weights_p,
    lambda ct, lhs, g, *, spec: _gradient(sparse_conv_bwd_input, g, ct, wanted=lhs, spec=spec),
    lambda ct, lhs, g, *, spec: _gradient(sparse_conv_fwd, lhs, ct, wanted=g, spec=spec),
)
for _masked in (_bwd_input_masked_p, _fwd_masked_p):
    ad.defjvp(
        _masked,
        lambda tangent, a, rhs, x, *, spec, bind=_masked.bind: bind(*_compat.auto_match(tangent, rhs, x), spec=spec),
        lambda tangent, a, rhs, x, *, spec, bind=_masked.bind: bind(*_compat.auto_match(a, tangent, x), spec=spec),
        None,
    )


ad.defjvp(
    _fwd_both_p,
    lambda tangent, dlhs, drhs, lhs, rhs, *, spec: sparse_conv_fwd_masked(tangent, rhs, lhs, spec=spec),
    lambda tangent, dlhs, drhs, lhs, rhs, *, spec: sparse_conv_fwd(lhs, tangent, spec=spec),
    lambda tangent, dlhs, drhs, lhs, rhs, *, spec: _tangent_of_lhs(tangent, lhs, drhs, spec=spec),
    lambda tangent, dlhs, drhs, lhs, rhs, *, spec: sparse_conv_fwd_masked(dlhs, tangent, lhs, spec=spec),
)
ad.primitive_jvps[_fwd_both_p] = functools.partial(_jvp_of_both, ad.primitive_jvps[_fwd_both_p])
ad.primitive_jvps[_bwd_both_p] = _jvp_bwd_both


def _transpose_bwd_input_masked(ct: Any, g: Any, rhs: Any, x: Any, *, spec: ConvSpec) -> tuple[Any, Any, None]:
    if type(ct) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(g):
        return _gradient(sparse_conv_fwd_masked, ct, rhs, x, wanted=g, spec=spec), None, None
    return None, _gradient(sparse_conv_bwd_weights, where_active(x, ct), g, wanted=rhs, spec=spec), None


def _transpose_fwd_masked(ct: Any, lhs: Any, rhs: Any, x: Any, *, spec: ConvSpec) -> tuple[Any, Any, None]:
    if type(ct) is ad.Zero:
        return None, None, None
    if ad.is_undefined_primal(lhs):
        return _gradient(sparse_conv_bwd_input_masked, ct, rhs, x, wanted=lhs, spec=spec), None, None
    return None, _gradient(sparse_conv_bwd_weights, where_active(x, lhs), ct, wanted=rhs, spec=spec), None


def _transpose_bwd_both(cts: Any, g: Any, rhs: Any, x: Any, *, spec: ConvSpec) -> tuple[Any, None, None]:
    of_lhs, of_rhs = cts
    if type(of_rhs) is ad.Zero:
        return _transpose_bwd_input_masked(of_lhs, g, rhs, x, spec=spec)
    if type(of_lhs) is ad.Zero:
        return _gradient(sparse_conv_fwd, x, of_rhs, wanted=g, spec=spec), None, None
    return _gradient(sparse_conv_fwd_both, of_lhs, of_rhs, x, rhs, wanted=g, spec=spec), None, None


def _transpose_fwd_both(ct: Any, dlhs: Any, drhs: Any, lhs: Any, rhs: Any, *, spec: ConvSpec) -> Any:
    if type(ct) is ad.Zero:
        return (None,) * 4
    if not ad.is_undefined_primal(drhs):
        return _gradient(sparse_conv_bwd_input_masked, ct, rhs, lhs, wanted=dlhs, spec=spec), None, None, None
    if not ad.is_undefined_primal(dlhs):
        return None, _gradient(sparse_conv_bwd_weights, lhs, ct, wanted=drhs, spec=spec), None, None
    return *_gradient(sparse_conv_bwd_both, ct, rhs, lhs, wanted=(dlhs, drhs), spec=spec), None, None


ad.primitive_transposes[_bwd_input_masked_p] = _transpose_bwd_input_masked
ad.primitive_transposes[_fwd_masked_p] = _transpose_fwd_masked
ad.primitive_transposes[_bwd_both_p] = _transpose_bwd_both
ad.primitive_transposes[_fwd_both_p] = _transpose_fwd_both
