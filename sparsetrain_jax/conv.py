"""Public convolutions: :func:`sparse_conv`, :func:`conv_general_dilated`, the hooks for layers, and :func:`explain`.

Both functions describe a call by a :class:`_Call`, which either has a :class:`_Route` to the sparse primitives or a
reason why ``jax.lax`` computes it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _compat, native, primitives
from .shapes import LARGEST, MODES, ConvSpec, padding_pairs, per_axis

__all__ = ["Component", "ConvHook", "Explanation", "conv_general_dilated", "explain", "sparse_conv"]

#: dtypes that the sparse kernels take; all accumulate in float32.
_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


# ---------------------------------------------------------------------------------------------------------------------
# Which convolutions the sparse kernels compute, and how their operands get there


@dataclass(frozen=True)
class _Route:
    """The way to the primitives: how the operands become ``NHWC`` and ``RSCK``, and the spec."""

    spec: ConvSpec
    lhs_axes: tuple[int, ...]
    rhs_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def lhs(self, lhs: jax.Array) -> jax.Array:
        return self._enter(lhs, self.lhs_axes, 1)

    def rhs(self, rhs: jax.Array) -> jax.Array:
        return self._enter(rhs, self.rhs_axes, 0)

    def out(self, out: jax.Array) -> jax.Array:
        if len(self.out_axes) == 3:
            out = lax.squeeze(out, (1,))
        return out if self.out_axes == tuple(range(len(self.out_axes))) else lax.transpose(out, self.out_axes)

    def _enter(self, x: jax.Array, axes: tuple[int, ...], row: int) -> jax.Array:
        """``x`` in the order of dimensions of the computation; ``row`` is where 1-D ones get their H or R."""
        if axes != tuple(range(len(axes))):
            x = lax.transpose(x, axes)
        return lax.expand_dims(x, (row,)) if len(axes) == 3 else x


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.argsort(axes).tolist())


@dataclass(frozen=True)
class _Call:
    """The arguments of one convolution, those of ``jax.lax.conv_general_dilated``, and the way it takes.

    Attributes:
      route: the way to the sparse primitives, or None.
      reason: why there is none; empty if there is one.
    """

    window_strides: Any
    padding: Any
    lhs_dilation: Any
    rhs_dilation: Any
    dimension_numbers: Any
    feature_group_count: Any
    batch_group_count: Any
    precision: Any
    preferred_element_type: Any
    out_sharding: Any
    route: _Route | None = None
    reason: str = ""

    def lax(self, lhs: Any, rhs: Any) -> jax.Array:
        """The stock operation; its exceptions are those of calls that it does not accept."""
        return primitives.stock_convolution(
            lhs,
            rhs,
            self.window_strides,
            self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            batch_group_count=self.batch_group_count,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=self.out_sharding,
        )

    def __call__(self, lhs: jax.Array, rhs: jax.Array, relu_input: bool = False) -> jax.Array:
        """The convolution, differentiable in both modes; with ``relu_input``, for ``lhs`` only where it is not zero."""
        route = self.route
        if route is None:
            return self.lax(primitives.where_active(lhs, lhs) if relu_input else lhs, rhs)
        spec = replace(route.spec, relu_input=relu_input)

        def sparse(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return route.out(primitives.sparse_conv_fwd(route.lhs(lhs), route.rhs(rhs), spec=spec))

        if self.out_sharding is None:
            return sparse(lhs, rhs)
        # The stock operation knows what it makes of the argument, and what is wrong with it. (Where some axes are Auto,
        # eval_shape would not tell.)
        sharding = jax.make_jaxpr(self.lax)(lhs, rhs).out_avals[0].sharding
        return _compat.resharded(sparse, sharding)(lhs, rhs)


def _indices(values: Any, default: int, count: int) -> tuple[int, ...] | None:
    """``values`` as ``count`` integers; None if they are not that."""
    if values is None:
        return (default,) * count
    try:
        items = tuple(operator.index(v) for v in values)
    except TypeError:
        return None
    return items if len(items) == count else None


def _precision(precision: Any) -> tuple[bool, Any]:
    """(True, hashable form) if ``precision`` is one that float32 accumulation satisfies."""
    if precision is None:
        return True, None
    pair = isinstance(precision, (tuple, list)) and len(precision) == 2
    values = tuple(precision) if pair else (precision,)
    if not any(all(isinstance(p, kind) for p in values) for kind in (str, lax.Precision)):
        return False, None
    try:
        return True, tuple(map(lax.Precision, values)) if pair else lax.Precision(precision)
    except ValueError:
        return False, None


def _route(call: _Call, lhs: Any, rhs: Any, mode: str) -> _Route | str:
    """The way of ``call`` to the sparse kernels, or the reason why it has none.

    Whatever is wrong with the arguments counts as a reason too: ``jax.lax`` then raises its own exception.
    """
    spatial = lhs.ndim - 2
    if spatial not in (1, 2) or rhs.ndim != lhs.ndim:
        return f"sparse kernels are for 1 or 2 spatial dimensions, lhs has {spatial}, rhs {rhs.ndim - 2}"
    if lhs.dtype != rhs.dtype or lhs.dtype not in _DTYPES:
        return f"sparse kernels are for float32, bfloat16 and float16, lhs is {lhs.dtype}, rhs {rhs.dtype}"
    result = None
    if call.preferred_element_type is not None:
        preferred = jnp.dtype(call.preferred_element_type)
        if preferred not in (lhs.dtype, jnp.dtype(jnp.float32)):
            return f"sparse kernels do not return preferred_element_type={preferred} for {lhs.dtype}"
        result = None if preferred == lhs.dtype else "float32"
    for name in ("feature_group_count", "batch_group_count"):
        if getattr(call, name) != 1:
            return f"{name} is {getattr(call, name)}, sparse kernels are for 1"
    for name in ("lhs_dilation", "rhs_dilation"):
        if _indices(getattr(call, name), 1, spatial) != (1,) * spatial:
            return f"{name} is {getattr(call, name)}, sparse kernels are for 1"
    strides = _indices(call.window_strides, 1, spatial)
    if call.window_strides is None or strides is None or any(s < 1 for s in strides):
        return f"window_strides {call.window_strides} are not {spatial} positive integers"
    known, precision = _precision(call.precision)
    if not known:
        return f"precision {call.precision!r} is not one of lax.Precision's"
    try:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, call.dimension_numbers)
        lhs_spec, rhs_spec, out_spec = (tuple(map(operator.index, axes)) for axes in numbers)
    except (IndexError, TypeError, ValueError) as error:
        return f"dimension_numbers: {error}"
    lhs_axes = (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
    rhs_axes = (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])
    out_axes = _inverse((out_spec[0], *out_spec[2:], out_spec[1]))
    lhs_shape = tuple(lhs.shape[a] for a in lhs_axes)
    rhs_shape = tuple(rhs.shape[a] for a in rhs_axes)
    size, window = lhs_shape[1:-1], rhs_shape[:-2]
    if not all(isinstance(d, int) for d in (*size, *rhs_shape, lhs_shape[-1])):
        return "only the batch may have a symbolic size"
    if lhs_shape[-1] != rhs_shape[-2]:
        return f"lhs has {lhs_shape[-1]} features, rhs takes {rhs_shape[-2]}"
    if any(w < 1 for w in window):
        return f"kernel size {window} is not positive"
    try:
        if isinstance(call.padding, str):
            padding = tuple(lax.padtype_to_pads(size, window, strides, call.padding))
        else:
            padding = tuple((operator.index(low), operator.index(high)) for low, high in call.padding)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"padding: {error}"
    if len(padding) != spatial or any(p < 0 for pair in padding for p in pair):
        return f"padding {call.padding} is not {spatial} pairs of non-negative integers"
    if max(*strides, *(p for pair in padding for p in pair)) > LARGEST:
        return f"window_strides {strides} or padding {padding} are above {LARGEST}"
    if spatial == 1:  # one row, seen by a kernel of one row
        size, window, strides, padding = (1, *size), (1, *window), (1, *strides), ((0, 0), *padding)
    (top, bottom), (left, right) = padding
    spec = ConvSpec(
        (size[0], size[1]),
        (window[0], window[1]),
        (strides[0], strides[1]),
        ((int(top), int(bottom)), (int(left), int(right))),
        mode,
        precision,
        result,
    )
    return _Route(spec, lhs_axes, rhs_axes, out_axes)


def _plan(lhs: Any, rhs: Any, mode: str, **arguments: Any) -> _Call:
    """The call with its route.

    Raises:
      ValueError: for an unknown mode, and for ``"sparse"`` without sparse kernels.
    """
    _check_mode(mode)
    call = _Call(**arguments)
    route = _route(call, lhs, rhs, mode)
    if isinstance(route, _Route):
        return _Call(**arguments, route=route)
    if mode == "sparse":
        raise ValueError(
            f"mode='sparse' needs a convolution with sparse kernels: {route}; accepted here: 'auto', 'dense'"
        )
    return _Call(**arguments, reason=route)


def _check_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")


def _checked_promise(relu_input: Any) -> bool:
    if not isinstance(relu_input, (bool, np.bool_)):
        raise TypeError(f"relu_input must be True or False, got {relu_input!r}")
    return bool(relu_input)


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def sparse_conv(
    lhs: Any,
    rhs: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    relu_input: bool = False,
    mode: str = "auto",
) -> jax.Array:
    """Convolution, channels last, that skips the zeros of its input, and in its gradients those of either operand.

    Equal to ``jax.lax.conv_general_dilated`` with ``dimension_numbers=("NHWC", "HWIO", "NHWC")`` but for the order of
    summation, and for zeros times Inf or NaN, which may count as 0 or as NaN. Subnormal numbers of float32 and bfloat16
    count as zero.

    Differentiable in both modes and any nesting of them.

    Args:
      lhs: input, ``(batch, *spatial, in_features)``; 1 to 3 spatial dimensions.
      rhs: kernel, ``(*window, in_features // feature_group_count, features)``, of the dtype of ``lhs``.
      strides: window strides, an integer or one per spatial dimension.
      padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, an integer for all sides, or per spatial dimension an integer
        or a (low, high) pair.
      input_dilation: dilation of ``lhs``; other than 1 is computed by ``jax.lax``.
      kernel_dilation: dilation of ``rhs``; other than 1 is computed by ``jax.lax``.
      feature_group_count: number of feature groups; other than 1 is computed by ``jax.lax``.
      precision: as in ``jax.lax``. The sparse kernels always multiply and accumulate in float32.
      preferred_element_type: dtype of the result, as in ``jax.lax``.
      relu_input: a promise that wherever ``lhs`` is zero its gradient will be discarded, as it is when ``lhs`` comes
        out of a ReLU. The gradient for ``lhs`` is then exactly zero there, and the work for it is skipped; in forward
        mode, tangents of ``lhs`` count as zero there, as those of a ReLU are.
      mode: ``"auto"`` measures the zeros of each call and picks; ``"sparse"`` and ``"dense"`` force.

    Returns:
      The convolution, ``(batch, *spatial, features)``.

    Raises:
      TypeError: for operands of different dtypes, or arguments of a wrong type.
      ValueError: for wrong ranks, sizes or values, and for ``mode="sparse"`` where there are no sparse kernels.
    """
    lhs, rhs, call = _sparse_conv_call(
        lhs,
        rhs,
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        mode=mode,
    )
    return call(lhs, rhs, _checked_promise(relu_input))


def _sparse_conv_call(
    lhs: Any,
    rhs: Any,
    *,
    strides: Any = 1,
    padding: Any = "SAME",
    input_dilation: Any = 1,
    kernel_dilation: Any = 1,
    feature_group_count: Any = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    mode: str = "auto",
) -> tuple[Any, Any, _Call]:
    """Checked operands and the call of :func:`sparse_conv`'s arguments."""
    _check_mode(mode)
    if not isinstance(lhs, jax.ShapeDtypeStruct):
        lhs = _array(lhs)
    if not isinstance(rhs, jax.ShapeDtypeStruct):
        rhs = _array(rhs)
    if lhs.ndim not in (3, 4, 5):
        raise ValueError(f"lhs must have rank 3, 4 or 5, (batch, *spatial, features), got shape {lhs.shape}")
    if rhs.ndim != lhs.ndim:
        raise ValueError(
            f"rhs must have the rank of lhs, (*window, in_features, features), got {rhs.shape} for lhs {lhs.shape}"
        )
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"lhs and rhs must have one dtype, got {lhs.dtype} and {rhs.dtype}; cast one with .astype")
    rank = lhs.ndim - 2
    try:
        groups = operator.index(feature_group_count)
    except TypeError:
        raise TypeError(f"feature_group_count must be a positive integer, got {feature_group_count!r}") from None
    if groups < 1:
        raise ValueError(f"feature_group_count must be a positive integer, got {groups}")
    if lhs.shape[-1] % groups or rhs.shape[-1] % groups:
        raise ValueError(
            f"feature_group_count must divide the features of lhs and rhs, got {groups} for "
            f"{lhs.shape[-1]} and {rhs.shape[-1]}"
        )
    if lhs.shape[-1] // groups != rhs.shape[-2]:
        raise ValueError(
            f"rhs must take lhs's {lhs.shape[-1]} features"
            + (f" divided by feature_group_count={groups}" if groups > 1 else "")
            + f" in its second to last dimension, got rhs shape {rhs.shape} for lhs shape {lhs.shape}"
        )
    if any(size < 1 for size in rhs.shape[:-2]):
        raise ValueError(f"rhs must have a kernel size of at least 1 everywhere, got shape {rhs.shape}")
    pads = padding_pairs(padding, rank)
    dilation = per_axis("input_dilation", input_dilation, rank)
    if isinstance(pads, str) and any(d != 1 for d in dilation):
        raise ValueError(f"padding must be explicit (low, high) pairs with input_dilation {dilation}, got {padding!r}")
    letters = "HWD"[:rank] if rank != 3 else "DHW"
    call = _plan(
        lhs,
        rhs,
        mode,
        window_strides=per_axis("strides", strides, rank),
        padding=pads,
        lhs_dilation=dilation,
        rhs_dilation=per_axis("kernel_dilation", kernel_dilation, rank),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        batch_group_count=1,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=None,
    )
    return lhs, rhs, call


def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, with sparse kernels where they apply and ``jax.lax`` itself elsewhere.

    Signature, semantics, dtypes and exceptions are those of the stock function; zeros times Inf or NaN may count as 0
    or as NaN. Differentiable in both modes and any nesting of them.

    The sparse kernels take 1 or 2 spatial dimensions without groups, dilation and negative padding, in float32,
    bfloat16 or float16. They work on channels-last arrays: other ``dimension_numbers`` are transposed to that and back.
    :func:`explain` tells which path a call takes.
    """
    return ConvHook()(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )


@dataclass(frozen=True)
class ConvHook:
    """A function with ``jax.lax.conv_general_dilated``'s signature, with ``relu_input`` and ``mode`` of its own.

    What ``SparseConv`` hands to Flax's layers. Hooks with equal attributes compare and hash equal, so that they do not
    make ``nnx.jit`` trace again.
    """

    relu_input: bool = False
    mode: str = "auto"

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """See :func:`conv_general_dilated`; with ``relu_input``, see :func:`sparse_conv`."""
        lhs, rhs = _array(lhs), _array(rhs)
        call = _plan(
            lhs,
            rhs,
            self.mode,
            window_strides=_frozen(window_strides),
            padding=_frozen(padding),
            lhs_dilation=_frozen(lhs_dilation),
            rhs_dilation=_frozen(rhs_dilation),
            dimension_numbers=_frozen(dimension_numbers),
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=_frozen(precision),
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
        return call(lhs, rhs, _checked_promise(self.relu_input))


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that calls can be hashed; named tuples stay what they are."""
    if isinstance(value, list) or type(value) is tuple:
        return tuple(map(_frozen, value))
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Explanation


@dataclass(frozen=True)
class Component:
    """How one of ``fwd``, ``bwd_input`` and ``bwd_weights`` is computed.

    Attributes:
      path: ``"sparse"``, ``"dense"`` (our kernels, zeros included) or ``"lax"``.
      reason: why.
      plan: what the compiled plan says of this shape; empty for ``"lax"``.
    """

    path: str
    reason: str
    plan: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.path:<6}  {self.reason}"


class Explanation(dict[str, Component]):
    """``{"fwd": ..., "bwd_input": ..., "bwd_weights": ...}``; ``str()`` of it is a table."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<11}  {component}" for name, component in self.items())


def explain(lhs: Any, rhs: Any, *, density: float | None = None, **arguments: Any) -> Explanation:
    """Which path :func:`sparse_conv` takes for these arguments, for each component, and why. Computes nothing.

    Args:
      lhs: array or ``jax.ShapeDtypeStruct``, as for :func:`sparse_conv`.
      rhs: likewise.
      density: fraction of non-zeros, 0 to 1, of the operand whose zeros are skipped; ``mode="auto"`` decides by it.
      **arguments: :func:`sparse_conv`'s.

    Returns:
      A dictionary of :class:`Component` with the keys ``"fwd"``, ``"bwd_input"`` and ``"bwd_weights"``.

    Raises:
      TypeError, ValueError: as :func:`sparse_conv`, and for a density outside 0 to 1.
    """
    if density is not None and not isinstance(density, Real):
        raise TypeError(f"density must be a fraction of non-zeros from 0 to 1, got {density!r}")
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density must be a fraction of non-zeros from 0 to 1, got {density}")
    if unknown := arguments.keys() - inspect.signature(sparse_conv).parameters:
        raise TypeError(f"explain takes the arguments of sparse_conv, got {', '.join(map(repr, sorted(unknown)))}")
    relu_input = _checked_promise(arguments.pop("relu_input", False))
    return explain_call(*_sparse_conv_call(lhs, rhs, **arguments), density, relu_input)


def explain_call(
    lhs: Any, rhs: Any, call: _Call, density: float | None = None, relu_input: bool = False
) -> Explanation:
    """:func:`explain` for a call that is known already."""
    names = ("fwd", "bwd_input", "bwd_weights")
    if call.route is None:
        return Explanation({name: Component("lax", call.reason, {}) for name in names})
    spec, route = call.route.spec, call.route
    batch, features = lhs.shape[route.lhs_axes[0]], (rhs.shape[a] for a in route.rhs_axes[-2:])
    dims = [batch, *spec.input_size, *features, *spec.kernel_size]
    parts = {name: _explain(name, spec, dims, density) for name in names}
    if relu_input and 0 not in (*dims, *spec.output_size):
        parts["bwd_input"] = _explain_masked(spec, dims, density)
    return Explanation(parts)


def _explain_masked(spec: ConvSpec, dims: list[int], density: float | None) -> Component:
    """The input gradient under ``relu_input``, which has three ways to skip or not to skip."""
    plan = {**_work(spec, dims, density), **native.plan("bwd_input_masked", dims, spec.geometry, _or_half(density))}
    exactly = "; exactly zero where lhs is zero"
    if spec.mode != "auto":
        return Component(spec.mode, f"mode={spec.mode!r} was asked for{exactly}", plan)
    if "lax" in plan:
        return Component("lax", f"{plan.pop('lax')}{exactly}", plan)
    rule = (
        "each call measures the zeros of lhs and of the gradient of the output and takes the cheapest: only where lhs "
        f"is not zero, skipping the gradient's zeros, or dense{exactly} (here: lhs of density "
        f"{_or_half(density):.2f}, the gradient dense)"
    )
    if "both_cost" in native.plan("bwd_both", dims, spec.geometry, _or_half(density)):
        rule += "; where that is cheaper, one walk over the zeros of lhs makes the kernel's gradient as well"
    return Component("dense" if plan["path"] == "dense" else "sparse", rule, plan)


def _or_half(density: float | None) -> float:
    return 0.5 if density is None else density


def _work(spec: ConvSpec, dims: list[int], density: float | None) -> dict[str, Any]:
    n, _, _, c, k, r, s = dims
    p, q = spec.output_size
    work = 2e-9 * n * p * q * c * k * r * s
    return {"dense_gflop": work} if density is None else {"expected_gflop": density * work, "dense_gflop": work}


def _explain(name: str, spec: ConvSpec, dims: list[int], density: float | None) -> Component:
    if 0 in (*dims, *spec.output_size):
        return Component("dense", "an empty array: the result is zeros", {})
    plan = {**_work(spec, dims, density), **native.plan(name, dims, spec.geometry, _or_half(density))}
    if spec.mode != "auto":
        return Component(spec.mode, f"mode={spec.mode!r} was asked for", plan)
    if "lax" in plan:
        return Component("lax", str(plan.pop("lax")), plan)
    limit = float(plan["break_even_density"])
    skipped = {"fwd": "lhs", "bwd_input": "the gradient of the output", "bwd_weights": "the cheaper operand"}[name]
    if 0 < limit < 1:
        rule = f"sparse above {100 * (1 - limit):.0f} % zeros, dense below"
    else:
        rule = "sparse, however few there are" if limit else "dense, however many there are"
    path = plan["path"] if density is not None else "sparse" if limit > 0 else "dense"
    return Component(str(path), f"each call measures the zeros of {skipped}: {rule}", plan)
