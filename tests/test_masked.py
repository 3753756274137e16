"""The masked input gradient natively: the product over active pixels, the ordinary gradient, and the choice of them.

And together with the kernel gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import COMPONENTS, Case, check, same, values

from sparsetrain_jax import native, primitives
from sparsetrain_jax.shapes import MODES, ConvSpec

TARGET = "sparsetrain_conv_bwd_input_masked_v1"
DENSITIES = [0.0, 0.3, 0.7, 1.0]

CASES = [
    same(Case(2, 14, 14, 32, 48, 3, 3)),
    same(Case(1, 30, 61, 17, 40, 3, 3)),  # blocks cut along rows and columns
    same(Case(9, 7, 7, 100, 33, 3, 3)),  # blocks of several images
    same(Case(2, 13, 15, 33, 70, 3, 3, (2, 2))),
    Case(2, 11, 12, 17, 31, 2, 4, (3, 2), ((0, 3), (2, 1))),
    Case(2, 6, 9, 16, 24, 1, 1, (2, 3)),  # pixels that no window sees
    same(Case(1, 12, 12, 20, 40, 5, 5)),
    same(Case(1, 18, 17, 16, 16, 7, 7)),
    same(Case(1, 9, 40, 8, 130, 1, 4)),
    Case(3, 9, 10, 80, 96, 1, 1),
    Case(1, 20, 20, 250, 15, 1, 1),
    Case(1, 5, 7, 300, 200, 1, 1),  # several blocks of channels, the last step of features is narrow
    Case(2, 20, 15, 40, 260, 1, 1, (1, 1), ((1, 0), (0, 2))),  # one tap, and padding
    Case(1, 1, 1, 3, 2, 1, 1),
    Case(3, 5, 5, 9, 17, 2, 2, (2, 2)),  # one tap for each class
    Case(1, 8, 9, 24, 24, 3, 3, (1, 1), ((4, 0), (0, 5))),  # more padding than the kernel reaches
    Case(1, 2, 2, 8, 8, 7, 7, (1, 1), ((3, 3), (3, 3))),
]


def spec_of(case: Case, mode: str = "auto", result: str | None = None) -> ConvSpec:
    return ConvSpec((case.h, case.w), (case.r, case.s), case.strides, case.padding, mode, result=result)


def run(case: Case, g: Any, rhs: Any, x: Any, mode: str = "auto", result: str | None = None) -> np.ndarray:
    operands = map(jnp.asarray, (g, rhs, x))
    return np.asarray(primitives.sparse_conv_bwd_input_masked(*operands, spec=spec_of(case, mode, result)))


def seed(*key: Any) -> np.random.Generator:
    return np.random.default_rng(list(repr(key).encode()))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_integers_give_the_exact_gradient_where_x_is_active_and_zero_elsewhere(
    case: Case, density: float, isa: str
) -> None:
    rng = seed("integers", case, density)
    rhs, x = values(rng, case.rhs_shape, integers=True), values(rng, case.lhs_shape, 1 - density)
    for zeros_of_g in (0.0, 0.8):
        g = values(rng, case.out_shape, zeros_of_g, integers=True)
        want = np.where(x == 0, 0, COMPONENTS["bwd_input"](case, g, rhs)).astype(np.float32)
        for mode in MODES:
            np.testing.assert_array_equal(run(case, g, rhs, x, mode), want, err_msg=f"{zeros_of_g} {mode}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_operands_give_the_exact_gradient_rounded_once_or_not_at_all(case: Case, dtype: str, isa: str) -> None:
    rng = seed("narrow", case)
    g, rhs = (values(rng, shape, integers=True).astype(dtype) for shape in (case.out_shape, case.rhs_shape))
    dense = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    for density in (0.0, 0.05, 0.3, 0.7):
        x = values(rng, case.lhs_shape, 1 - density).astype(dtype)
        want = np.where(x == 0, 0, dense)
        for mode in ("sparse", "auto"):
            got = run(case, g, rhs, x, mode)
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, want.astype(dtype), err_msg=f"{density} {mode}")
            wide = run(case, g, rhs, x, mode, "float32")
            assert wide.dtype == np.float32
            np.testing.assert_array_equal(wide, want, err_msg=f"{density} {mode}")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_gradients_are_within_the_error_bound(case: Case, density: float, isa: str) -> None:
    rng = seed("bound", case, density)
    g, rhs = values(rng, case.out_shape), values(rng, case.rhs_shape)
    x = values(rng, case.lhs_shape, 1 - density)
    dense = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    for mode in MODES:
        got = run(case, g, rhs, x, mode)
        assert np.all(got[x == 0] == 0)
        check("bwd_input", case, np.where(x == 0, dense, got), g, rhs)


def test_the_mask_of_every_single_pixel_and_channel_is_honoured(isa: str) -> None:
    case = same(Case(1, 5, 6, 17, 20, 3, 3))
    rng = seed("single")
    g, rhs = values(rng, case.out_shape, integers=True), values(rng, case.rhs_shape, integers=True)
    dense = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    for index in range(0, int(np.prod(case.lhs_shape)), 7):
        x = np.zeros(case.lhs_shape, np.float32)
        x.flat[index] = -1  # active is what is not zero, whatever its sign
        np.testing.assert_array_equal(run(case, g, rhs, x, "sparse"), np.where(x == 0, 0, dense))


def test_a_single_active_element_that_a_sample_of_x_overlooks_is_honoured(isa: str) -> None:
    case = same(Case(5, 64, 64, 16, 4, 1, 1))
    rng = seed("overlooked")
    g, rhs = values(rng, case.out_shape, integers=True), values(rng, case.rhs_shape, integers=True)
    dense = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    x = np.zeros(case.lhs_shape, np.float32)
    for mode in MODES:
        np.testing.assert_array_equal(run(case, g, rhs, x, mode), x)
    for index in (0, x.size // 3, x.size - 1):
        x[...] = 0
        x.flat[index] = 1
        for mode in MODES:
            np.testing.assert_array_equal(run(case, g, rhs, x, mode), np.where(x == 0, 0, dense))


def test_nan_in_x_is_active_and_negative_zero_is_not(isa: str) -> None:
    case = same(Case(1, 4, 4, 16, 64, 3, 3))
    rng = seed("special")
    g, rhs = values(rng, case.out_shape, integers=True), values(rng, case.rhs_shape, integers=True)
    x = np.full(case.lhs_shape, -0.0, np.float32)
    x[..., ::2] = np.nan
    want = np.where(x == 0, 0, COMPONENTS["bwd_input"](case, g, rhs)).astype(np.float32)
    for mode in MODES:
        got = run(case, g, rhs, x, mode)
        np.testing.assert_array_equal(got, want)
        assert not np.signbit(got[x == 0]).any()


@pytest.mark.parametrize(
    ("mode", "zeros_of_x", "zeros_of_g", "path"),
    [
        ("dense", 0.9, 0.9, "dense"),
        ("sparse", 0.0, 0.0, "sparse"),
        ("auto", 0.9, 0.0, "sparse"),
        ("auto", 0.0, 0.9, "sparse"),
        ("auto", 0.0, 0.0, "dense"),
    ],
)
def test_the_path_follows_mode_and_measured_zeros(
    mode: str, zeros_of_x: float, zeros_of_g: float, path: str, isa: str
) -> None:
    case = same(Case(2, 14, 14, 64, 64, 3, 3))
    rng = seed("path")
    g, rhs = values(rng, case.out_shape, zeros_of_g), values(rng, case.rhs_shape)
    x = values(rng, case.lhs_shape, zeros_of_x)
    native.reset_counters()
    jax.block_until_ready(run(case, g, rhs, x, mode))
    other = "sparse" if path == "dense" else "dense"
    counters = native.counters()
    assert counters[f"conv_bwd_input_masked/{path}"] == 1
    assert counters[f"conv_bwd_input_masked/{other}"] == 0
    # The product leaves the ordinary kernels alone.
    product = mode == "auto" and zeros_of_x > 0.5
    assert (counters["conv_bwd_input/sparse"] + counters["conv_bwd_input/dense"] == 0) == product


def test_a_mask_of_another_shape_is_an_error_of_the_call() -> None:
    g, rhs = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 1, 8, 8))
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32))
    with pytest.raises(Exception, match="x and the result differ in dimension 3: 9 and 8"):
        call(
            g, rhs, jnp.zeros((1, 4, 4, 9)), geometry=np.array([1, 1, 0, 0, 0, 0], np.int64), mode=np.int64(0)
        ).block_until_ready()


@pytest.mark.parametrize(("dtype", "result"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_gradients_at_once_equal_each_alone(case: Case, dtype: str, result: str | None, isa: str) -> None:
    rng = seed("both", case)
    g, rhs = (values(rng, shape, integers=True).astype(dtype) for shape in (case.out_shape, case.rhs_shape))
    for density in (0.0, 0.3, 1.0):
        x = values(rng, case.lhs_shape, 1 - density, integers=True).astype(dtype)
        for mode in MODES:
            spec = spec_of(case, mode, result)
            dlhs, drhs = primitives.sparse_conv_bwd_both(g, rhs, x, spec=spec)
            assert dlhs.dtype == drhs.dtype == (result or dtype)
            np.testing.assert_array_equal(dlhs, run(case, g, rhs, x, mode, result), err_msg=f"{density} {mode}")
            alone = primitives.sparse_conv_bwd_weights(x, g, spec=spec)
            np.testing.assert_array_equal(drhs, alone, err_msg=f"{density} {mode}")
