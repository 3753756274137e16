"""Conversions between float32 and narrow dtypes, and how they get into a compiled call: without a pass of their own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import COMPONENTS, Case, check, same, values

import sparsetrain_jax as st
from sparsetrain_jax import _native, primitives
from sparsetrain_jax.shapes import ConvSpec

NARROW = ["bfloat16", "float16"]
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}
SMALLEST_NORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-14}


def every_value(dtype: str) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def widen(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(_native.widen(str(values.dtype), values.tobytes()), np.float32)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.frombuffer(_native.narrow(dtype, values.tobytes()), np.uint16).view(dtype)


def bits(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize])


@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_value_widens_as_xla_does(dtype: str, isa: str) -> None:
    values = every_value(dtype)
    got, want = widen(values), np.asarray(jax.jit(lambda x: x.astype(jnp.float32))(jnp.asarray(values)))
    exact = values.astype(np.float32)
    nan = np.isnan(exact)
    assert np.isnan(got[nan]).all()
    np.testing.assert_array_equal(bits(got[~nan]), bits(exact[~nan]))
    # XLA may flush what stays subnormal.
    sure = ~nan & ((np.abs(exact) >= 2.0**-126) | (exact == 0))
    np.testing.assert_array_equal(bits(got[sure]), bits(want[sure]))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_value_survives_widening_and_narrowing(dtype: str, isa: str) -> None:
    values = every_value(dtype)
    nan = np.isnan(values.astype(np.float32))
    again = narrow(widen(values), dtype)
    assert np.isnan(again[nan]).all()
    np.testing.assert_array_equal(bits(again[~nan]), bits(values[~nan]))


def around_every_narrow_value(dtype: str) -> np.ndarray:
    """float32 numbers at, beside and half-way between neighbouring narrow numbers of either sign; infinities, NaNs."""
    ordered = np.arange(INFINITY[dtype], dtype=np.uint16).view(dtype).astype(np.float64)
    beyond = 2 * ordered[-1] - ordered[-2]  # where the next one would be
    middle = ((ordered + np.append(ordered[1:], beyond)) / 2).astype(np.float32)
    points = np.concatenate([ordered.astype(np.float32), middle])
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    special = np.array([np.inf, 3e38, 1e-45, 1e-40, 2.0**-126], np.float32)
    nans = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F800100, 0x7FBFFFFF], np.uint32).view(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    points = np.concatenate([points, special, nans, random])
    return np.concatenate([points, -points])


@pytest.mark.parametrize("dtype", NARROW)
def test_narrowing_rounds_to_nearest_even_as_xla_does(dtype: str, isa: str) -> None:
    values = around_every_narrow_value(dtype)
    got = narrow(values, dtype)
    nan = np.isnan(values)
    assert np.isnan(got[nan]).all()
    with np.errstate(over="ignore", invalid="ignore"):
        exact = values.astype(dtype)
    np.testing.assert_array_equal(bits(got[~nan]), bits(exact[~nan]))
    want = np.asarray(jax.jit(lambda x: x.astype(dtype))(jnp.asarray(values)))
    assert np.isnan(want[nan]).all()
    # XLA may flush subnormal float32 operands, or bfloat16 results that are subnormal.
    sure = ~nan & (np.abs(values) >= 2.0**-126)
    np.testing.assert_array_equal(bits(got[sure]), bits(want[sure]))


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("dtype", NARROW)
def test_conversions_of_any_length_touch_nothing_else(dtype: str, count: int, isa: str) -> None:
    values = np.linspace(-3, 3, count).astype(dtype)
    np.testing.assert_array_equal(widen(values), values.astype(np.float32))
    np.testing.assert_array_equal(narrow(values.astype(np.float32), dtype), values)


# Compiled calls


CASE = same(Case(2, 12, 12, 32, 48, 3, 3))
SPEC = ConvSpec((12, 12), (3, 3), (1, 1), ((1, 1), (1, 1)), "sparse")
CALLS: dict[str, tuple[Callable[..., jax.Array], tuple[tuple[int, ...], ...]]] = {
    "fwd": (primitives.sparse_conv_fwd, (CASE.lhs_shape, CASE.rhs_shape)),
    "bwd_input": (primitives.sparse_conv_bwd_input, (CASE.out_shape, CASE.rhs_shape)),
    "bwd_weights": (primitives.sparse_conv_bwd_weights, (CASE.lhs_shape, CASE.out_shape)),
    "bwd_input_masked": (
        primitives.sparse_conv_bwd_input_masked,
        (CASE.out_shape, CASE.rhs_shape, CASE.lhs_shape),
    ),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_narrow_call_converts_nothing_outside_the_custom_call(name: str, dtype: str) -> None:
    call, shapes = CALLS[name]
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    text = jax.jit(lambda *operands: call(*operands, spec=SPEC)).lower(*operands).compile().as_text() or ""
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert re.search(rf"= {short}\[[\d,]+\]\S* custom-call\(.*sparsetrain_conv_{name}_v1", text), text
    assert not re.search(r"\bconvert\(|\bf32\[", text), text


@pytest.mark.parametrize("dtype", NARROW)
def test_a_compiled_training_step_converts_no_activations(dtype: str) -> None:
    def loss(rhs: jax.Array, lhs: jax.Array, g: jax.Array) -> Any:
        return jax.vjp(lambda lhs, rhs: st.sparse_conv(lhs, rhs, relu_input=True, mode="sparse"), lhs, rhs)[1](g)

    shapes = (CASE.rhs_shape, CASE.lhs_shape, CASE.out_shape)
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    text = jax.jit(loss).lower(*operands).compile().as_text() or ""
    assert text.count("custom-call(") == 1
    assert not re.search(r"\bconvert\(|\bf32\[", text), text


@pytest.mark.parametrize("dtype", NARROW)
def test_a_float32_result_leaves_narrow_operands_as_they_are(dtype: str) -> None:
    rng = np.random.default_rng(2)
    lhs, rhs = (jnp.asarray(values(rng, shape, 0.5), dtype) for shape in (CASE.lhs_shape, CASE.rhs_shape))

    def call(lhs: jax.Array, rhs: jax.Array, **arguments: Any) -> jax.Array:
        return st.sparse_conv(lhs, rhs, preferred_element_type=jnp.float32, mode="sparse", **arguments)

    text = jax.jit(call).lower(lhs, rhs).compile().as_text() or ""
    assert "custom-call(" in text and not re.search(r"\bconvert\(", text), text
    check("fwd", CASE, np.asarray(call(lhs, rhs)), lhs, rhs)

    # Gradients as in jax.lax: in float32, then rounded. Strict promotion would not let the dtypes meet.
    g = jnp.asarray(values(rng, CASE.out_shape))
    for relu_input in (False, True):
        with jax.numpy_dtype_promotion("strict"):
            dlhs, drhs = jax.vjp(lambda *operands: call(*operands, relu_input=relu_input), lhs, rhs)[1](g)  # noqa: B023
        assert np.all(np.asarray(dlhs)[np.asarray(lhs) == 0] == 0) == relu_input
        check("bwd_weights", CASE, np.asarray(drhs), lhs, g, dtype)
        dense = COMPONENTS["bwd_input"](CASE, g, rhs).astype(np.float32).astype(dtype)
        dlhs = np.where(np.asarray(lhs) == 0, dense, np.asarray(dlhs)) if relu_input else np.asarray(dlhs)
        check("bwd_input", CASE, dlhs, g, rhs, dtype)
    tangent = jax.jvp(lambda lhs: st.conv_general_dilated(lhs, rhs, (1, 1), "SAME", **FLOAT32), (lhs,), (lhs,))[1]
    check("fwd", CASE, np.asarray(tangent), lhs, rhs)


FLOAT32: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "preferred_element_type": jnp.float32}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["fwd", "bwd_input", "bwd_weights"])
def test_every_primitive_may_return_float32_and_is_differentiable(name: str, dtype: str) -> None:
    call, shapes = CALLS[name]
    rng = np.random.default_rng(3)
    a, b = (jnp.asarray(values(rng, shape, 0.5), dtype) for shape in shapes)
    spec = dataclasses.replace(SPEC, result="float32")
    got, transpose = jax.vjp(lambda a, b: call(a, b, spec=spec), a, b)
    check(name, CASE, np.asarray(got), a, b)
    wide = jax.vjp(lambda a, b: call(a, b, spec=SPEC), a.astype(jnp.float32), b.astype(jnp.float32))[1](got)
    for narrow_gradient, wide_gradient in zip(transpose(got), wide, strict=True):
        assert narrow_gradient.dtype == dtype
        np.testing.assert_array_equal(narrow_gradient, wide_gradient.astype(dtype))
    reference = {"fwd": primitives._FWD, "bwd_input": primitives._BWD_INPUT, "bwd_weights": primitives._BWD_WEIGHTS}
    check(name, CASE, np.asarray(jax.jit(lambda a, b: reference[name].reference(a, b, spec=spec))(a, b)), a, b)


# The custom calls' own contract: operands of one dtype, the result of that dtype or float32


ATTRIBUTES = {"geometry": np.array(SPEC.geometry, np.int64), "mode": np.int64(1)}
RESULTS = {
    "fwd": CASE.out_shape,
    "bwd_input": CASE.lhs_shape,
    "bwd_weights": CASE.rhs_shape,
    "bwd_input_masked": CASE.lhs_shape,
}


@pytest.mark.parametrize("dtypes", [*itertools.product(["narrow", "float32"], repeat=2)], ids="-".join)
@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_at_once_may_have_dtypes_of_their_own(dtype: str, dtypes: tuple[str, str], isa: str) -> None:
    """Parts of sums over devices are float32, of one gradient or the other."""
    rng = np.random.default_rng(4)
    shapes = (CASE.out_shape, CASE.rhs_shape, CASE.lhs_shape)
    g, rhs, x = (jnp.asarray(values(rng, shape, 0.6, integers=True), dtype) for shape in shapes)
    results = [dtype if name == "narrow" else name for name in dtypes]
    structs = [jax.ShapeDtypeStruct(*struct) for struct in zip((CASE.lhs_shape, CASE.rhs_shape), results, strict=True)]
    call = jax.ffi.ffi_call("sparsetrain_conv_bwd_both_v1", structs)
    dlhs, drhs = jax.jit(lambda *operands: call(*operands, **ATTRIBUTES))(g, rhs, x)
    np.testing.assert_array_equal(dlhs, custom_call("bwd_input_masked", [g, rhs, x], results[0]))
    np.testing.assert_array_equal(drhs, custom_call("bwd_weights", [x, g], results[1]))


def custom_call(name: str, operands: list[Any], dtype: str) -> np.ndarray:
    call = jax.ffi.ffi_call(f"sparsetrain_conv_{name}_v1", jax.ShapeDtypeStruct(RESULTS[name], dtype))
    return np.asarray(jax.jit(lambda *operands: call(*operands, **ATTRIBUTES))(*operands))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", CALLS)
def test_narrow_operands_may_have_a_float32_result(name: str, dtype: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    operands = [values(rng, shape, 0.5).astype(dtype) for shape in CALLS[name][1]]
    wide = custom_call(name, operands, "float32")
    if name == "bwd_input_masked":
        active = operands[2] != 0
        assert np.all(wide[~active] == 0)
        wide = np.where(active, wide, custom_call("bwd_input", operands[:2], "float32"))
    check(name.removesuffix("_masked"), CASE, wide, *operands[:2])
    if name != "bwd_input_masked":
        np.testing.assert_array_equal(custom_call(name, operands, dtype), wide.astype(dtype))


@pytest.mark.parametrize("name", CALLS)
def test_other_combinations_of_dtypes_are_errors_of_the_call(name: str) -> None:
    shapes = CALLS[name][1]

    def refuses(dtypes: list[str], result: str, why: str) -> None:
        operands = [jnp.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"sparse_conv_{name}: .*{why}"):
            jax.block_until_ready(custom_call(name, operands, result))

    count = len(shapes)
    refuses(["bfloat16"] * count, "float16", "the result must have the dtype of the operands or be float32")
    refuses(["float32"] * count, "bfloat16", "the result must have the dtype of the operands or be float32")
    refuses(["bfloat16"] * (count - 1) + ["float16"], "float32", "operands must have one dtype")
    refuses(["bfloat16"] + ["float32"] * (count - 1), "float32", "operands must have one dtype")
    refuses(["int32"] * count, "float32", "float32, bfloat16 or float16")
    refuses(["bfloat16"] * count, "int32", "float32, bfloat16 or float16")
