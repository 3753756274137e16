"""The convolution and its gradients as JAX primitives, all made by one factory.

=================================  ================================  ===========================
primitive                          operands                          result
=================================  ================================  ===========================
``sparse_conv_fwd``                lhs ``NHWC``, rhs ``RSCK``        out ``NPQK``
``sparse_conv_bwd_input``          g ``NPQK``, rhs ``RSCK``          dlhs ``NHWC``
``sparse_conv_bwd_weights``        lhs ``NHWC``, g ``NPQK``          drhs ``RSCK``
``sparse_conv_bwd_input_masked``   g, rhs, x ``NHWC``                dlhs, 0 where x is
``sparse_conv_fwd_masked``         lhs, rhs, x ``NHWC``              out of lhs where x is not 0
=================================  ================================  ===========================

All operands of a call have one dtype: float32, bfloat16 or float16 (accumulated in float32). The result has it too, or
is float32 if ``spec`` says so. No array is converted as a whole: the custom calls convert tile by tile.

The only parameter is ``spec``, a :class:`~sparsetrain_jax.shapes.ConvSpec`. The first three are bilinear and transpose
into each other. The last two do as well, with a third operand that has no gradient: with ``relu_input``, the derivative
of ``sparse_conv_fwd`` for the input is the last. Differentiation in both modes and to any order follows from that.

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
    "sparse_conv_bwd_input",
    "sparse_conv_bwd_input_masked",
    "sparse_conv_bwd_weights",
    "sparse_conv_fwd",
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
      result: the letters of the result.
      reference: the same function in terms of ``jax.lax``, or of other components.
    """

    name: str
    target: str
    operands: tuple[str, ...]
    result: str
    reference: Callable[..., jax.Array]

    @property
    def contracted(self) -> str:
        """The feature letter that is summed over."""
        (letter,) = (f for f in _FEATURES if f not in self.result)
        return letter

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

    def result_shape(self, spec: ConvSpec, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        sizes = self.sizes(spec, shapes)
        return tuple(sizes[letter] for letter in self.result)


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
    if component.contracted == "C" and axes["C"] is not None:
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


def _fold(arg: jax.Array, batch_dim: int, axis: int) -> jax.Array:
    """``arg`` with its batch dimension merged, as the major part, into ``axis`` (counted without the batch)."""
    arg = jnp.moveaxis(arg, batch_dim, axis)
    return arg.reshape(*arg.shape[:axis], arg.shape[axis] * arg.shape[axis + 1], *arg.shape[axis + 2 :])


# ---------------------------------------------------------------------------------------------------------------------
# Lowering


def _call_native(
    component: _Component, *operands: jax.Array, spec: ConvSpec, reduced: tuple[str, ...] = ()
) -> jax.Array:
    """The custom call, for the shapes that one device sees, summed over the mesh axes ``reduced``."""
    shape = component.result_shape(spec, [operand.shape for operand in operands])
    dtype = _result_dtype(spec, operands[0])
    if any(isinstance(d, int) and d == 0 for d in (*shape, *(d for operand in operands for d in operand.shape))):
        return jnp.zeros(shape, dtype)  # nothing to add up, or nothing to write
    partial = jnp.dtype(jnp.float32) if reduced else dtype  # parts of a sum are rounded once, after adding them up
    if _lax_reason(component, spec, [operand.shape for operand in operands]):
        out = component.reference(*operands, spec=spec).astype(partial)
    else:
        out = _custom_call(component).bind(*operands, spec=spec, dtype=partial)
    return lax.psum(out, reduced).astype(dtype) if reduced else out


def _lax_reason(component: _Component, spec: ConvSpec, shapes: Sequence[Sequence[int]]) -> str:
    """Why ``auto`` leaves this shape to ``jax.lax``; empty if it does not."""
    if spec.mode != "auto":
        return ""
    sizes = {**component.sizes(spec, shapes), "N": 1}  # which may be symbolic, and does not matter
    plan = native.plan(component.name.removeprefix("sparse_conv_"), [sizes[d] for d in "NHWCKRS"], spec.geometry)
    return str(plan.get("lax", ""))


@functools.cache
def _custom_call(component: _Component) -> Any:
    """The bare custom call, for lowering only: a primitive too, so that traces show it by the component's name.

    It returns the dtype of its operands or float32, and converts tile by tile: no array is converted as a whole.
    """

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, spec: ConvSpec, dtype: Any) -> Any:
        geometry, mode = np.array(spec.geometry, np.int64), np.int64(MODES.index(spec.mode))
        return jax.ffi.ffi_lowering(component.target)(ctx, *operands, geometry=geometry, mode=mode)

    primitive = Primitive(component.name)
    primitive.def_abstract_eval(
        lambda *avals, spec, dtype: avals[0].update(
            shape=component.result_shape(spec, [aval.shape for aval in avals]), dtype=dtype
        )
    )
    mlir.register_lowering(primitive, lower, platform="cpu")
    return primitive


def _partitioned(component: _Component) -> Any:
    """The custom call as a function that XLA's partitioner splits along N, C and K instead of gathering operands."""
    position = len(component.operands)

    def axes_by_letter(shapes: Sequence[Any], result: Any) -> dict[str, tuple[str, ...]]:
        """Mesh axes of each feature letter: the first operand that shards it decides, then the result."""
        chosen: dict[str, tuple[str, ...]] = {}
        for letters, value in (*zip(component.operands, shapes, strict=True), (component.result, result)):
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

    def partition(spec: ConvSpec, mesh: Any, shapes: Sequence[Any], result: Any) -> Any:
        chosen = axes_by_letter(shapes, result)

        def sharding(letters: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(chosen.get(letter) for letter in letters)))

        def local(*operands: jax.Array) -> jax.Array:
            with _compat.plain_types():
                return _call_native(component, *operands, spec=spec, reduced=chosen.get(component.contracted, ()))

        return mesh, local, sharding(component.result), tuple(sharding(letters) for letters in component.operands)

    def infer(spec: ConvSpec, mesh: Any, shapes: Sequence[Any], result: Any) -> NamedSharding:
        chosen = axes_by_letter(shapes, result)
        return NamedSharding(mesh, PartitionSpec(*(chosen.get(letter) for letter in component.result)))

    def whole(*args: Any) -> jax.Array:
        return _call_native(component, *args[:position], spec=args[position])

    call = custom_partitioning(whole, static_argnums=(position,))
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=", ".join(" ".join(letters.lower()) for letters in component.operands)
        + " -> "
        + " ".join(component.result.lower()),
        reduction_factors=(component.contracted.lower(),),
        # In the order in which they appear, as the rule's verifier wants them.
        need_replication_factors=tuple(
            dict.fromkeys(f.lower() for f in "".join((*component.operands, component.result)) if f not in _FEATURES)
        ),
    )
    return call


def _make_primitive(component: _Component) -> Any:
    primitive = _compat.standard_primitive(
        component.name,
        lambda *avals, spec: component.result_shape(spec, [aval.shape for aval in avals]),
        functools.partial(_dtype_rule, component),
        functools.partial(_sharding_rule, component),
    )
    mlir.register_lowering(primitive, _compat.lower_plain(component.reference))
    batching.primitive_batchers[primitive] = functools.partial(_batch, component, primitive)
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


_FWD = _Component("sparse_conv_fwd", "sparsetrain_conv_fwd_v1", ("NHWC", "RSCK"), "NPQK", _lax_fwd)
_BWD_INPUT = _Component(
    "sparse_conv_bwd_input", "sparsetrain_conv_bwd_input_v1", ("NPQK", "RSCK"), "NHWC", _lax_bwd_input
)
_BWD_WEIGHTS = _Component(
    "sparse_conv_bwd_weights", "sparsetrain_conv_bwd_weights_v1", ("NHWC", "NPQK"), "RSCK", _lax_bwd_weights
)
_BWD_INPUT_MASKED = _Component(
    "sparse_conv_bwd_input_masked",
    "sparsetrain_conv_bwd_input_masked_v1",
    ("NPQK", "RSCK", "NHWC"),
    "NHWC",
    _lax_bwd_input_masked,
)
_FWD_MASKED = _Component("sparse_conv_fwd_masked", "", ("NHWC", "RSCK", "NHWC"), "NPQK", _fwd_masked)

_fwd_p = _make_primitive(_FWD)
_bwd_input_p = _make_primitive(_BWD_INPUT)
_bwd_weights_p = _make_primitive(_BWD_WEIGHTS)
_bwd_input_masked_p = _make_primitive(_BWD_INPUT_MASKED)
_fwd_masked_p = _make_primitive(_FWD_MASKED)


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
    return _fwd_masked_p.bind(*_compat.auto_match(lhs, rhs, x), spec=spec)


def dots_saveable(prim: Any, *args: Any, **params: Any) -> bool:
    """``jax.checkpoint_policies.dots_saveable``, which does not know our convolutions, with them: a checkpoint policy.

    Results of matrix products and of all convolutions are saved for the backward pass, others are computed again.
    """
    ours = prim in (_fwd_p, _bwd_input_p, _bwd_weights_p, _bwd_input_masked_p, _fwd_masked_p)
    return ours or bool(jax.checkpoint_policies.dots_saveable(prim, *args, **params))


# ---------------------------------------------------------------------------------------------------------------------
# Differentiation: the three bilinear maps are transposes of each other. Argument names: ct is the cotangent of the
# result; the operand that is asked for is only known by its abstract value.


def _gradient(call: Callable[..., jax.Array], *operands: jax.Array, wanted: Any, spec: ConvSpec) -> jax.Array:
    """One of ``operands`` is ct. If it is wider than the others, they meet in its dtype, as in lax."""
    dtype = max((x.dtype for x in operands), key=lambda dtype: dtype.itemsize)  # not by promotion, which may be strict
    return call(*(x.astype(dtype) for x in operands), spec=spec.gradient).astype(wanted.aval.dtype)


def _tangent_of_lhs(tangent: jax.Array, lhs: jax.Array, rhs: jax.Array, *, spec: ConvSpec) -> jax.Array:
    if spec.relu_input:
        return sparse_conv_fwd_masked(tangent, rhs, lhs, spec=replace(spec, relu_input=False))
    return sparse_conv_fwd(tangent, rhs, spec=spec)


ad.defbilinear(
    _fwd_p,
    lambda ct, lhs, rhs, *, spec: _gradient(sparse_conv_bwd_input, ct, rhs, wanted=lhs, spec=spec),
    lambda ct, lhs, rhs, *, spec: _gradient(sparse_conv_bwd_weights, lhs, ct, wanted=rhs, spec=spec),
)
ad.defjvp(_fwd_p, _tangent_of_lhs, lambda tangent, lhs, rhs, *, spec: sparse_conv_fwd(lhs, tangent, spec=spec))
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


ad.primitive_transposes[_bwd_input_masked_p] = _transpose_bwd_input_masked
ad.primitive_transposes[_fwd_masked_p] = _transpose_fwd_masked
