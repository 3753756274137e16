"""Every kernel against the float64 reference: shapes, strides, paddings, sparsities, instruction sets, modes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import COMPONENTS, Case, check, operand_shapes, same, values

from sparsetrain_jax import native, primitives
from sparsetrain_jax.shapes import MODES, ConvSpec

SPARSITIES = [0.0, 0.3, 0.7, 0.99, 1.0]
FUNCTIONS = {name: getattr(primitives, f"sparse_conv_{name}") for name in COMPONENTS}

SHAPES = [
    same(Case(2, 14, 14, 32, 48, 3, 3)),
    same(Case(3, 13, 15, 32, 32, 3, 3, (2, 2))),
    Case(1, 12, 11, 64, 33, 3, 3),
    Case(4, 9, 10, 64, 96, 1, 1),
    Case(2, 9, 10, 80, 64, 1, 1, (2, 2)),
    same(Case(2, 12, 12, 20, 40, 5, 5)),
    same(Case(1, 18, 17, 16, 16, 7, 7)),
    same(Case(2, 20, 20, 3, 64, 7, 7, (2, 2))),
    same(Case(2, 16, 16, 3, 32, 3, 3)),
    Case(2, 8, 30, 24, 24, 1, 3, (1, 1), ((0, 0), (1, 1))),
    Case(2, 30, 8, 24, 24, 3, 1, (1, 2), ((1, 1), (0, 0))),
    Case(2, 11, 12, 17, 31, 2, 4, (3, 2), ((0, 3), (2, 1))),
    Case(5, 7, 7, 128, 130, 3, 3, (1, 1), ((1, 1), (1, 1))),
    Case(1, 40, 41, 16, 32, 3, 3, (1, 1), ((2, 2), (2, 2))),
    Case(1, 7, 9, 130, 520, 1, 1),  # many features for each value: 1x1 packs
    Case(1, 7, 9, 520, 130, 1, 1),
    Case(2, 9, 11, 40, 520, 1, 1, (2, 2)),
]

ADVERSARIAL = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 1, 1, 17, 15, 3, 3, (1, 1), ((1, 1), (1, 1))),
    Case(1, 1, 1, 16, 16, 3, 3, (2, 2), ((1, 1), (1, 1))),
    Case(2, 2, 3, 15, 17, 5, 5, (1, 1), ((4, 4), (4, 4))),  # padding as wide as the kernel allows
    Case(1, 2, 2, 8, 8, 7, 7, (1, 1), ((3, 3), (3, 3))),  # kernel larger than the image
    Case(1, 3, 3, 4, 4, 3, 3, (1, 1), ((5, 6), (7, 5))),  # windows that see only padding
    Case(1, 5, 5, 4, 4, 2, 2, (3, 3)),  # pixels that no window sees
    Case(1, 6, 6, 4, 4, 1, 1, (5, 5)),
    Case(1, 6, 6, 4, 4, 2, 2, (7, 9)),  # one window
    same(Case(2, 6, 6, 1, 1, 3, 3)),
    same(Case(2, 6, 6, 1, 16, 3, 3)),
    same(Case(2, 6, 6, 16, 1, 3, 3)),
    same(Case(2, 6, 7, 15, 17, 3, 3)),
    same(Case(2, 6, 7, 17, 15, 3, 3, (2, 1))),
    Case(1, 1, 50, 5, 9, 1, 9, (1, 1), ((0, 0), (8, 0))),
    Case(17, 1, 1, 33, 47, 1, 1),
    Case(1, 9, 9, 3, 5, 9, 9, (1, 1), ((0, 0), (0, 0))),  # kernel of the size of the image
    Case(1, 4, 4, 3, 5, 11, 11, (1, 1), ((8, 8), (8, 8))),
]

# Pixels that meet padding are many, and enough of them for lists of their own.
BORDERS = [
    same(Case(16, 7, 7, 32, 33, 3, 3)),
    same(Case(32, 5, 4, 48, 64, 3, 3)),
    Case(16, 6, 6, 20, 32, 3, 3, (1, 1), ((2, 0), (0, 2))),
    same(Case(16, 3, 9, 32, 32, 3, 3)),  # one block between the borders
    same(Case(16, 9, 10, 16, 24, 5, 5)),
    same(Case(20, 10, 11, 16, 16, 7, 7)),
    same(Case(16, 13, 13, 32, 32, 3, 3, (2, 2))),
    same(Case(16, 12, 12, 16, 32, 6, 5, (2, 2))),
    same(Case(16, 28, 28, 16, 16, 3, 3)),  # the pixels in chunks
]
# Taps that meet padding only, in all of an image or of the pixels of a stride.
NARROW_IMAGES = [
    same(Case(16, 16, 1, 32, 32, 3, 3)),
    same(Case(16, 1, 16, 32, 32, 3, 3)),
    same(Case(64, 12, 2, 16, 16, 5, 5)),
    same(Case(16, 32, 2, 16, 16, 3, 11)),
    same(Case(32, 1, 2, 32, 32, 1, 7)),
    Case(64, 18, 1, 32, 32, 7, 7, (2, 2), ((3, 3), (3, 3))),
    Case(16, 16, 2, 32, 32, 3, 4, (1, 2), ((1, 1), (3, 0))),
]

EMPTY = [
    same(Case(0, 6, 6, 4, 8, 3, 3)),
    same(Case(2, 6, 6, 0, 8, 3, 3)),
    same(Case(2, 6, 6, 4, 0, 3, 3)),
    Case(2, 2, 2, 4, 8, 3, 3),  # no window fits
    Case(2, 0, 6, 4, 8, 3, 3, (1, 1), ((1, 1), (1, 1))),
]


def spec_of(case: Case, mode: str = "auto") -> ConvSpec:
    return ConvSpec((case.h, case.w), (case.r, case.s), case.strides, case.padding, mode)


def run(component: str, case: Case, a: Any, b: Any, mode: str = "auto") -> np.ndarray:
    return np.asarray(FUNCTIONS[component](jnp.asarray(a), jnp.asarray(b), spec=spec_of(case, mode)))


def seed(*key: Any) -> np.random.Generator:
    return np.random.default_rng(list(repr(key).encode()))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_results_are_within_the_error_bound_of_the_reference(
    component: str, case: Case, sparsity: float, isa: str
) -> None:
    rng = seed(component, case, sparsity)
    first, second = operand_shapes(component, case)
    a, b = values(rng, first, sparsity), values(rng, second)
    for mode in MODES:
        check(component, case, run(component, case, a, b, mode), a, b)


@pytest.mark.parametrize("pattern", ["blobs", "images", "channels"])
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[11]], ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_uneven_zeros_give_the_same_results(component: str, case: Case, pattern: str, isa: str) -> None:
    rng = seed(component, case, pattern)
    first, second = operand_shapes(component, case)
    a, b = values(rng, first, 0.6, pattern), values(rng, second)
    for mode in MODES:
        check(component, case, run(component, case, a, b, mode), a, b)


@pytest.mark.parametrize("case", [*SHAPES, *ADVERSARIAL], ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_small_integers_give_the_exact_result(component: str, case: Case, isa: str) -> None:
    rng = seed("integers", component, case)
    first, second = operand_shapes(component, case)
    for sparsity_a, sparsity_b in ((0.0, 0.0), (0.4, 0.0), (0.5, 0.8), (0.97, 0.2), (1.0, 0.0)):
        a = values(rng, first, sparsity_a, integers=True)
        b = values(rng, second, sparsity_b, integers=True)
        want = COMPONENTS[component](case, a, b).astype(np.float32)
        for mode in MODES:
            np.testing.assert_array_equal(run(component, case, a, b, mode), want, err_msg=f"{sparsity_a} {mode}")


@pytest.mark.parametrize("case", [*BORDERS, *NARROW_IMAGES], ids=str)
def test_weight_gradients_leave_nothing_out_but_padding(case: Case, isa: str) -> None:
    rng = seed("borders", case)
    borders = 0
    for sparsity_lhs, sparsity_g in (
        (0.0, 0.0),
        (0.3, 0.0),
        (0.5, 0.0),
        (0.7, 0.0),
        (0.9, 0.0),
        (0.0, 0.4),
        (0.2, 0.8),
    ):
        lhs = values(rng, case.lhs_shape, sparsity_lhs, integers=True)
        g = values(rng, case.out_shape, sparsity_g, integers=True)
        want = COMPONENTS["bwd_weights"](case, lhs, g).astype(np.float32)
        for mode in ("sparse", "dense"):
            got = run("bwd_weights", case, lhs, g, mode)
            np.testing.assert_array_equal(got, want, err_msg=f"{sparsity_lhs} {sparsity_g} {mode}")
        narrow = [jnp.asarray(operand, "bfloat16") for operand in (lhs, g)]
        got = FUNCTIONS["bwd_weights"](*narrow, spec=spec_of(case, "sparse"))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(want, "bfloat16")))
        dims = [case.n, case.h, case.w, case.c, case.k, case.r, case.s]
        plan = native.plan("bwd_weights", dims, spec_of(case).geometry, 1 - sparsity_lhs)
        borders += int(plan["borders"]) if plan["path"] == "sparse" else 0
    assert borders > 0 or case not in BORDERS or case.strides != (1, 1) or isa == "portable"


# Many taps and features: weight gradients take non-zeros of neighbouring pixels two by two.
NEIGHBOURS = [
    same(Case(2, 5, 17, 33, 200, 3, 3)),
    same(Case(4, 7, 7, 20, 250, 3, 3)),
    same(Case(3, 9, 14, 18, 136, 5, 5)),
    same(Case(2, 20, 9, 16, 128, 7, 7)),
    same(Case(2, 15, 16, 17, 130, 7, 7, (2, 2))),
    same(Case(1, 6, 7, 512, 176, 3, 3)),  # pixels whose lines share places in L1
    Case(2, 9, 10, 16, 176, 3, 3, (1, 1), ((2, 2), (2, 2))),  # rows without anything between them
    same(Case(16, 16, 16, 16, 176, 3, 3)),  # the pixels in chunks
]


@pytest.mark.parametrize("case", NEIGHBOURS, ids=str)
def test_weight_gradients_of_neighbouring_nonzeros_are_exact(case: Case, isa: str) -> None:
    rng = seed("neighbours", case)
    dims = [case.n, case.h, case.w, case.c, case.k, case.r, case.s]
    plan = native.plan("bwd_weights", dims, spec_of(case).geometry, 0.43)
    assert plan["lists"] == "neighbours" or (case.r > 3 and not isa.startswith("avx512"))
    for sparsity, pattern in ((0.57, "iid"), (0.57, "blobs"), (0.8, "iid"), (0.3, "channels"), (0.0, "iid")):
        lhs = values(rng, case.lhs_shape, sparsity, pattern, integers=True)
        g = values(rng, case.out_shape, integers=True)
        want = COMPONENTS["bwd_weights"](case, lhs, g).astype(np.float32)
        got = run("bwd_weights", case, lhs, g, "sparse")
        np.testing.assert_array_equal(got, want, err_msg=f"{sparsity} {pattern}")


# All features in one step of whole vectors: where pixels follow each other, the dense operand is read where it lies.
IN_PLACE = [
    *(Case(3, 9, 11, 40, k, 1, 1) for k in (16, 32, 64, 128)),
    *(Case(3, 9, 11, c, 40, 1, 1) for c in (8, 16, 64, 128)),
    Case(9, 14, 15, 24, 64, 1, 1),  # the pixels in chunks
    Case(2, 1, 40, 20, 32, 1, 1, (1, 1), ((0, 0), (1, 2))),
    Case(4, 1, 30, 24, 32, 3, 1, (1, 1), ((1, 1), (0, 0))),  # single rows, of which two taps meet padding only
    Case(4, 30, 1, 24, 32, 1, 3, (1, 1), ((0, 0), (1, 1))),
    Case(2, 1, 33, 16, 32, 1, 1, (1, 2)),
    Case(3, 1, 16, 16, 64, 1, 2, (1, 2)),  # windows that follow each other
]


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_weight_gradients_of_features_in_one_step_are_exact(case: Case, isa: str) -> None:
    rng = seed("in place", case)
    for sparsity_lhs, sparsity_g in ((0.0, 0.0), (0.5, 0.0), (0.7, 0.2), (0.92, 0.0), (0.1, 0.8)):
        lhs = values(rng, case.lhs_shape, sparsity_lhs, integers=True)
        g = values(rng, case.out_shape, sparsity_g, integers=True)
        want = COMPONENTS["bwd_weights"](case, lhs, g).astype(np.float32)
        for mode in MODES:
            got = run("bwd_weights", case, lhs, g, mode)
            np.testing.assert_array_equal(got, want, err_msg=f"{sparsity_lhs} {sparsity_g} {mode}")


# Few features and 3x3 taps: all rows of the kernel in one sweep. Channels and features as in FWD.
TALL = [
    same(Case(5, 9, 11, 20, 8, 3, 3)),
    same(Case(2, 12, 8, 130, 7, 3, 3)),  # channels in blocks
    Case(3, 7, 9, 16, 8, 3, 3),  # no padding: rows at the border meet fewer rows of the kernel in BWI
    Case(2, 6, 7, 20, 5, 3, 3, (1, 1), ((2, 0), (0, 2))),
    Case(2, 4, 5, 20, 8, 3, 3, (1, 1), ((5, 4), (3, 6))),  # windows that see only padding
    same(Case(3, 3, 20, 16, 8, 3, 3)),
    same(Case(3, 20, 1, 16, 8, 3, 3)),
    same(Case(2, 9, 10, 20, 16, 3, 3)),  # whole vectors of 16 lanes, and
    same(Case(2, 10, 9, 50, 13, 3, 3)),
    same(Case(3, 8, 9, 12, 3, 3, 3)),  # of 4
    same(Case(2, 90, 90, 8, 8, 3, 3)),  # images in tiles
]


@pytest.mark.parametrize("case", TALL, ids=str)
@pytest.mark.parametrize("component", ["fwd", "bwd_input"])
def test_sweeps_over_all_rows_of_the_kernel_are_exact(component: str, case: Case, isa: str) -> None:
    if component == "bwd_input":
        case = case._replace(c=case.k, k=case.c)
    dims = [case.n, case.h, case.w, case.c, case.k, case.r, case.s]
    plan = native.plan(component, dims, spec_of(case).geometry, 0.1)
    features = case.k if component == "fwd" else case.c
    # Rows of the output gradient that meet little but padding would be swept for all rows of the kernel.
    idle = component == "bwd_input" and case.padding[0][0] > 2
    assert plan["tall"] == (features <= {"portable": 4, "avx2": 8}.get(isa, 16) and not idle), plan
    rng = seed("tall", component, case)
    first, second = operand_shapes(component, case)
    for sparsity, pattern in ((0.5, "iid"), (0.9, "blobs"), (0.3, "images"), (0.0, "iid"), (0.97, "iid")):
        a = values(rng, first, sparsity, pattern, integers=True)
        b = values(rng, second, integers=True)
        want = COMPONENTS[component](case, a, b).astype(np.float32)
        np.testing.assert_array_equal(run(component, case, a, b, "sparse"), want, err_msg=f"{sparsity} {pattern}")
        narrow = [jnp.asarray(operand, "bfloat16") for operand in (a, b)]
        got = FUNCTIONS[component](*narrow, spec=spec_of(case, "sparse"))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(jnp.asarray(want, "bfloat16")))


@pytest.mark.parametrize("component", ["fwd", "bwd_input"])
def test_images_of_few_rows_leave_rows_of_the_kernel_to_sweeps_of_their_own(component: str, isa: str) -> None:
    for shape, tall in (((32, 1, 64), False), ((32, 2, 64), False), ((1, 64, 4000), False), ((32, 32, 32), True)):
        dims = [*shape, *((16, 4) if component == "fwd" else (4, 16)), 3, 3]
        plan = native.plan(component, dims, [1, 1, 1, 1, 1, 1], 0.5)
        assert plan["tall"] == tall, (shape, plan)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_position_of_a_single_nonzero_is_found(component: str, isa: str) -> None:
    case = same(Case(2, 3, 5, 18, 19, 3, 3))
    first, second = operand_shapes(component, case)
    b = values(seed("single", component), second, integers=True)
    size = int(np.prod(first))
    for position in range(0, size, 7):
        a = np.zeros(first, np.float32)
        a.flat[position] = 3
        want = COMPONENTS[component](case, a, b).astype(np.float32)
        np.testing.assert_array_equal(run(component, case, a, b, "sparse"), want, err_msg=f"position {position}")


@pytest.mark.parametrize("nonzeros", [0, 1])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_large_operand_of_zeros_but_for_one_value_is_not_taken_for_zeros(
    component: str, nonzeros: int, isa: str
) -> None:
    case = same(Case(3, 32, 32, 80, 80, 3, 3))  # so large that its zeros are sampled
    first, second = operand_shapes(component, case)
    rng = seed("nearly zeros", component)
    b = values(rng, second, integers=True)
    for position in [0, int(np.prod(first)) - 1, *rng.integers(0, np.prod(first), 6)]:
        a = np.zeros(first, np.float32)
        a.flat[position] = 3 * nonzeros
        want = COMPONENTS[component](case, a, b).astype(np.float32)
        for mode in MODES:
            got = run(component, case, a, b, mode)
            np.testing.assert_array_equal(got, want, err_msg=f"position {position}, {mode}")


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_empty_arrays_give_zeros_of_the_right_shape(component: str, case: Case) -> None:
    first, second = operand_shapes(component, case)
    got = run(component, case, np.ones(first, np.float32), np.ones(second, np.float32))
    np.testing.assert_array_equal(got, COMPONENTS[component](case, np.ones(first), np.ones(second)))


# Narrow dtypes: the same kernels, which widen what they load and narrow what they store

NARROW = ["bfloat16", "float16"]
NARROW_CASES = [
    *(SHAPES[i] for i in (0, 1, 3, 4, 5, 7, 8, 11, 12)),  # 3x3, strided, 1x1, strided 1x1, 5x5, two first layers, odd
    same(Case(2, 6, 7, 15, 17, 3, 3)),
    same(Case(2, 6, 6, 16, 1, 3, 3)),
    Case(1, 3, 3, 4, 4, 3, 3, (1, 1), ((5, 6), (7, 5))),  # rows of the result that no pixel reaches
    Case(1, 25, 25, 300, 70, 1, 1),  # several tiles, channel blocks and feature blocks
]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_narrow_dtypes_accumulate_in_float32_and_round_once(component: str, case: Case, dtype: str, isa: str) -> None:
    rng = seed("narrow", component, case, dtype)
    first, second = operand_shapes(component, case)
    for sparsity in (0.0, 0.5, 0.95):
        a, b = jnp.asarray(values(rng, first, sparsity), dtype), jnp.asarray(values(rng, second), dtype)
        for mode in MODES:
            got = run(component, case, a, b, mode)
            check(component, case, got, np.asarray(a, np.float64), np.asarray(b, np.float64), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_narrow_results_of_small_integers_are_the_exact_ones_rounded(
    component: str, case: Case, dtype: str, isa: str
) -> None:
    """Sums beyond 256 and 2048 are not bfloat16 and float16 numbers; many are ties."""
    rng = seed("narrow integers", component, case)
    first, second = operand_shapes(component, case)
    for sparsity_a, sparsity_b in ((0.0, 0.0), (0.5, 0.8), (0.97, 0.2), (1.0, 0.0)):
        a = values(rng, first, sparsity_a, integers=True).astype(dtype)
        b = values(rng, second, sparsity_b, integers=True).astype(dtype)
        want = COMPONENTS[component](case, a, b).astype(np.float32).astype(dtype)
        for mode in MODES:
            np.testing.assert_array_equal(run(component, case, a, b, mode), want, err_msg=f"{sparsity_a} {mode}")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", NARROW_CASES, ids=str)
def test_the_masked_input_gradient_of_narrow_dtypes(case: Case, dtype: str, isa: str) -> None:
    rng = seed("narrow masked", case)
    integers = values(rng, case.out_shape, 0.3, integers=True), values(rng, case.rhs_shape, integers=True)
    floats = values(rng, case.out_shape, 0.3), values(rng, case.rhs_shape)
    for sparsity in (0.0, 0.6, 0.95):
        x = values(rng, case.lhs_shape, sparsity).astype(dtype)
        x[0, 0, 0, 0] = -0.0
        g, rhs = (operand.astype(dtype) for operand in integers)
        want = np.where(x == 0, 0, COMPONENTS["bwd_input"](case, g, rhs)).astype(np.float32).astype(dtype)
        for mode in MODES:
            np.testing.assert_array_equal(run_masked(case, g, rhs, x, mode), want, err_msg=f"{sparsity} {mode}")
        g, rhs = (operand.astype(dtype) for operand in floats)
        dense = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32).astype(dtype)
        for mode in MODES:
            got = run_masked(case, g, rhs, x, mode)
            assert np.all(got[x == 0] == 0)
            check("bwd_input", case, np.where(x == 0, dense, got), g, rhs, dtype)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("component", COMPONENTS)
def test_zeros_of_narrow_dtypes_are_counted(component: str, dtype: str, zero: float, isa: str) -> None:
    case = same(Case(2, 28, 28, 64, 64, 3, 3))
    first, second = operand_shapes(component, case)
    b = values(seed(component), second).astype(dtype)
    plan = native.plan(component, [2, 28, 28, 64, 64, 3, 3], [1, 1, 1, 1, 1, 1], 1.0)
    walks_all = plan.get("dense_density", 0.0) > 1  # where that costs less than dense sweeps
    for sparsity, path in ((0.95, "sparse"), (0.0, "sparse" if walks_all else "dense")):
        a = values(seed(1), first, sparsity).astype(dtype)
        native.reset_counters()
        run(component, case, np.where(a == 0, np.asarray(zero, dtype), a), b)
        counted = {key for key, count in native.counters().items() if count}
        assert counted == {f"conv_{component}/{path}"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("component", COMPONENTS)
def test_nonfinite_narrow_values_propagate(component: str, dtype: str, value: float, isa: str) -> None:
    case = same(Case(1, 9, 9, 20, 24, 3, 3))
    first, second = operand_shapes(component, case)
    a = values(seed("nan", component), first, 0.7).astype(dtype)
    b = (np.abs(values(seed(component), second)) + 1).astype(dtype)
    a[0, 4, 4, 3] = value
    touched = np.zeros(first)
    touched[0, 4, 4, 3] = 1
    touched = COMPONENTS[component](case, touched, np.ones(second)) != 0
    for mode in MODES:
        got = run(component, case, a, b, mode).astype(np.float32)
        assert np.all(np.isnan(got[touched]) if np.isnan(value) else got[touched] == value)
        assert np.all(np.isfinite(got[~touched]))


def test_sums_beyond_float16_become_infinite(isa: str) -> None:
    case = Case(1, 4, 4, 32, 16, 1, 1)
    lhs, rhs = np.full(case.lhs_shape, 256, np.float16), np.full(case.rhs_shape, 8, np.float16)
    rhs[..., 1] = 7.99  # 7.99 * 256 * 32 rounds to 65440, the largest float16 number below 65504 + 16
    rhs[..., 2] = -8
    for mode in MODES:
        got = run("fwd", case, lhs, rhs, mode)
        assert np.all(got[..., 0] == np.inf) and np.all(got[..., 2] == -np.inf) and np.all(np.isfinite(got[..., 1]))


def test_subnormal_float16_operands_and_results_are_exact(isa: str) -> None:
    case = Case(1, 4, 8, 32, 16, 1, 1)
    lhs = (np.arange(np.prod(case.lhs_shape)) % 1024).reshape(case.lhs_shape) * np.float64(2.0**-24)
    rhs = np.zeros(case.rhs_shape, np.float16)
    rhs[0, 0, np.arange(32), np.arange(32) % 16] = 1
    for mode in MODES:
        got = run("fwd", case, lhs.astype(np.float16), rhs, mode)
        np.testing.assert_array_equal(got, COMPONENTS["fwd"](case, lhs, rhs).astype(np.float16))


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_forced_mode_runs_only_that_path(component: str, mode: str, isa: str) -> None:
    case = SHAPES[0]
    first, second = operand_shapes(component, case)
    a, b = values(seed(mode), first, 0.5), values(seed(component), second)
    native.reset_counters()
    run(component, case, a, b, mode)
    counters = {key: count for key, count in native.counters().items() if count}
    assert set(counters) == {f"conv_{component}/{mode}"}


@pytest.mark.parametrize("component", COMPONENTS)
def test_auto_runs_sparse_kernels_where_most_values_are_zero(component: str, isa: str) -> None:
    case = same(Case(2, 28, 28, 64, 64, 3, 3))
    first, second = operand_shapes(component, case)
    b = values(seed(component), second)
    native.reset_counters()
    run(component, case, values(seed(1), first, 0.95), b)
    assert native.counters().get(f"conv_{component}/sparse", 0) > 0
    assert native.counters().get(f"conv_{component}/dense", 0) == 0


@pytest.mark.parametrize("row", range(8))
def test_auto_sees_zeros_that_all_images_have_in_the_same_rows(row: int, isa: str) -> None:
    case = same(Case(64, 8, 8, 64, 64, 3, 3))
    lhs, g = np.zeros(case.lhs_shape, np.float32), np.ones(case.out_shape, np.float32)
    lhs[:, row] = 1
    native.reset_counters()
    run("bwd_weights", case, lhs, g)
    assert native.counters().get("conv_bwd_weights/sparse", 0) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[3], SHAPES[1]], ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_second_operand_may_be_the_sparse_one(component: str, case: Case, mode: str, isa: str) -> None:
    rng = seed("second", component, case)
    first, second = operand_shapes(component, case)
    a, b = values(rng, first), values(rng, second, 0.9)
    check(component, case, run(component, case, a, b, mode), a, b)


@pytest.mark.parametrize("component", COMPONENTS)
def test_repeated_calls_give_the_same_bits(component: str, isa: str) -> None:
    case = same(Case(3, 17, 19, 48, 72, 3, 3))
    rng = seed("repeat", component)
    first, second = operand_shapes(component, case)
    a, b = values(rng, first, 0.6), values(rng, second)
    want = run(component, case, a, b)
    for _ in range(5):
        np.testing.assert_array_equal(run(component, case, a, b), want)


def test_concurrent_callers_get_their_own_results(isa: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    case = same(Case(2, 14, 14, 32, 48, 3, 3))
    rng = seed("threads")
    pairs = [
        (values(rng, case.lhs_shape, 0.6, integers=True), values(rng, case.rhs_shape, integers=True)) for _ in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(lambda pair: run("fwd", case, *pair), pairs))
            for (a, b), got in zip(pairs, results, strict=True):
                np.testing.assert_array_equal(got, COMPONENTS["fwd"](case, a, b))


# Non-finite values and zeros of all kinds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("component", COMPONENTS)
def test_nonfinite_values_of_the_checked_operand_propagate(component: str, value: float, mode: str, isa: str) -> None:
    case = same(Case(1, 9, 9, 20, 24, 3, 3))
    first, second = operand_shapes(component, case)
    a, b = values(seed("nan", component), first, 0.7), np.abs(values(seed(component), second)) + 1
    a[0, 4, 4, 3] = value
    got = run(component, case, a, b, mode)
    touched = np.zeros(first)
    touched[0, 4, 4, 3] = 1
    touched = COMPONENTS[component](case, touched, np.ones(second)) != 0
    assert np.all(np.isnan(got[touched]) if np.isnan(value) else got[touched] == value)
    assert np.all(np.isfinite(got[~touched]))


@pytest.mark.parametrize("component", COMPONENTS)
def test_nonfinite_values_of_the_other_operand_propagate_where_they_meet_a_nonzero(component: str, isa: str) -> None:
    case = Case(1, 6, 6, 16, 16, 1, 1)
    first, second = operand_shapes(component, case)
    a, b = np.ones(first, np.float32), np.ones(second, np.float32)
    b[0, 0, 2, 5] = np.nan
    for mode in MODES:
        got = run(component, case, a, b, mode)
        want = COMPONENTS[component](case, a, b)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_zero_times_nan_is_zero_or_nan_and_touches_nothing_else(component: str, isa: str) -> None:
    case = same(Case(1, 6, 7, 16, 18, 3, 3))
    first, second = operand_shapes(component, case)
    a, b = values(seed("zero", component), first, 0.5), values(seed(component), second)
    clean = b.copy()
    b[-1, 0, 2, 5], clean[-1, 0, 2, 5] = np.nan, 0
    may_differ = np.isnan(COMPONENTS[component](case, np.zeros(first), b))
    must = np.zeros(second)
    must[-1, 0, 2, 5] = 1
    must_be_nan = COMPONENTS[component](case, np.abs(a), must) != 0
    for mode in MODES:
        got = run(component, case, a, b, mode)
        assert np.isnan(got[must_be_nan]).all()
        sure = ~(may_differ | must_be_nan)
        want = COMPONENTS[component](case, a, clean)
        np.testing.assert_allclose(got[sure], want[sure], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [-0.0, 1e-40, -1e-40])
@pytest.mark.parametrize("component", COMPONENTS)
def test_negative_zeros_and_subnormals_count_as_zero(component: str, zero: float, isa: str) -> None:
    case = same(Case(1, 8, 8, 16, 16, 3, 3))
    first, second = operand_shapes(component, case)
    a, b = values(seed("zeros", component), first, 0.5), values(seed(component), second)
    with_zeros = np.where(a == 0, np.float32(zero), a)
    for mode in MODES:
        check(component, case, run(component, case, with_zeros, b, mode), a, b)
    native.reset_counters()
    nothing = np.full(first, zero, np.float32)
    np.testing.assert_array_equal(run(component, case, nothing, b, "sparse"), 0)


# The masked input gradient


def run_masked(case: Case, g: Any, rhs: Any, x: Any, mode: str) -> np.ndarray:
    return np.asarray(primitives.sparse_conv_bwd_input_masked(*map(jnp.asarray, (g, rhs, x)), spec=spec_of(case, mode)))


@pytest.mark.parametrize("pattern", ["iid", "blobs"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_masked_input_gradient_is_within_bounds_where_x_is_nonzero_and_zero_elsewhere(
    case: Case, pattern: str, isa: str
) -> None:
    rng = seed("masked", case, pattern)
    g, rhs = values(rng, case.out_shape, 0.3), values(rng, case.rhs_shape)
    dense = COMPONENTS["bwd_input"](case, g, rhs)
    for sparsity in SPARSITIES if pattern == "iid" else [0.6]:
        x = values(rng, case.lhs_shape, sparsity, pattern)
        for mode in MODES:
            got = run_masked(case, g, rhs, x, mode)
            assert np.all(got[x == 0] == 0)
            check("bwd_input", case, np.where(x == 0, dense.astype(np.float32), got), g, rhs)


@pytest.mark.parametrize("case", [*SHAPES, *ADVERSARIAL], ids=str)
def test_the_masked_input_gradient_of_small_integers_is_exact(case: Case, isa: str) -> None:
    rng = seed("masked integers", case)
    g, rhs = values(rng, case.out_shape, 0.3, integers=True), values(rng, case.rhs_shape, integers=True)
    for sparsity in (0.0, 0.6, 1.0):
        x = values(rng, case.lhs_shape, sparsity)
        want = np.where(x == 0, 0, COMPONENTS["bwd_input"](case, g, rhs)).astype(np.float32)
        for mode in MODES:
            np.testing.assert_array_equal(run_masked(case, g, rhs, x, mode), want)


# Few features, many, and a last step of its own width.
@pytest.mark.parametrize("features", [16, 48, 64, 160])
@pytest.mark.parametrize("case", [*BORDERS, *NARROW_IMAGES], ids=str)
def test_masked_input_gradients_leave_nothing_out_but_padding(case: Case, features: int, isa: str) -> None:
    case = case._replace(k=features)
    rng = seed("masked borders", case)
    g = values(rng, case.out_shape, integers=True)
    rhs = values(rng, case.rhs_shape, integers=True)
    whole = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    for sparsity in (0.0, 0.5, 0.7, 0.9):
        x = values(rng, case.lhs_shape, sparsity)
        got = run_masked(case, g, rhs, x, "sparse")
        np.testing.assert_array_equal(got, np.where(x != 0, whole, 0), err_msg=str(sparsity))
    dims = [case.n, case.h, case.w, case.c, case.k, case.r, case.s]
    plan = native.plan("bwd_input_masked", dims, spec_of(case).geometry, 0.5)
    if isa.startswith("avx512") and case.strides == (1, 1) and case in [b._replace(k=features) for b in BORDERS]:
        assert int(plan["pixel_classes"]) > 1 or (case.r > 3 and features == 16), plan


@pytest.mark.parametrize("fmas", [1, 2])
def test_masked_input_gradients_of_small_images_have_classes_for_their_borders(fmas: int, isa: str) -> None:
    for size in (7, 14):
        dims = [16, size, size, 128, 256, 3, 3]
        plan = native.plan("bwd_input_masked", dims, [1, 1, 1, 1, 1, 1], 0.5, fmas)
        assert plan["path"] == "product", plan
        assert int(plan["pixel_classes"]) > 1 or isa == "portable", plan  # whose steps are many and narrow
        few = native.plan("bwd_input_masked", dims, [1, 1, 1, 1, 1, 1], 0.02, fmas)
        assert int(few["pixel_classes"]) <= int(plan["pixel_classes"]), (few, plan)
        if fmas == 1 and isa.startswith("avx512"):
            assert int(few["pixel_classes"]) == 1, few


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_points_are_cut_by_pixels_and_keep_all_channels(threads: int, isa: str) -> None:
    for channels in (64, 1024, 4096):
        dims = [16, 14, 14, channels, 256, 1, 1]
        plan = native.plan("bwd_input_masked", dims, [1, 1, 0, 0, 0, 0], 0.3, None, threads)
        points = math.prod(map(int, str(plan["pixel_block"]).split("x")))
        assert int(plan["channel_block"]) == channels, plan
        assert 16 <= points <= 256 and points * 3 * threads <= max(16 * 14 * 14, 64 * 3 * threads), plan


# All channels at once; and cut into pieces, because other classes of pixels meet several taps.
@pytest.mark.parametrize(
    "case", [same(Case(3, 14, 14, 1040, 300, 1, 1)), same(Case(2, 24, 24, 1100, 40, 3, 3, strides=(2, 2)))], ids=str
)
def test_masked_input_gradients_of_many_points_and_filter_blocks_are_exact(case: Case, isa: str) -> None:
    rng = seed("points", case)
    g, rhs = values(rng, case.out_shape, integers=True), values(rng, case.rhs_shape, integers=True)
    whole = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    for sparsity in (0.5, 0.9):
        x = values(rng, case.lhs_shape, sparsity)
        x[0, 3:5] = 0  # points without a channel
        x[1, 1, 2:9] = 1  # and with all of them
        np.testing.assert_array_equal(run_masked(case, g, rhs, x, "sparse"), np.where(x != 0, whole, 0))
    dims = [case.n, case.h, case.w, case.c, case.k, case.r, case.s]
    plan = native.plan("bwd_input_masked", dims, spec_of(case).geometry, 0.02)
    assert plan["path"] == "product", plan
    assert (int(plan["channel_block"]) < case.c) == (case.r == 3), plan


def test_the_masked_input_gradient_ignores_nonfinite_gradients_where_x_is_zero(isa: str) -> None:
    case = same(Case(1, 6, 6, 16, 16, 3, 3))
    rng = seed("masked nan")
    g, rhs, x = (
        np.full(case.out_shape, np.nan, np.float32),
        values(rng, case.rhs_shape),
        values(rng, case.lhs_shape, 0.5),
    )
    for mode in MODES:
        got = run_masked(case, g, rhs, x, mode)
        assert np.all(got[x == 0] == 0) and np.isnan(got[x != 0]).all()


# Both gradients at once


def run_both(case: Case, g: Any, rhs: Any, x: Any, mode: str = "auto") -> list[np.ndarray]:
    """The gradients, of lhs and rhs, by one custom call, whose counters start anew."""
    native.reset_counters()
    return [
        np.asarray(d) for d in primitives.sparse_conv_bwd_both(*map(jnp.asarray, (g, rhs, x)), spec=spec_of(case, mode))
    ]


def walked_together(isa: str) -> bool:
    """Whether the last call of both gradients took walks that make both; the other ISAs have none."""
    together = native.counters().get("conv_bwd_both/sparse", 0) == 1
    assert isa.startswith("avx512") or not together
    return together


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_gradients_at_once_are_within_their_bounds(case: Case, isa: str) -> None:
    rng = seed("both", case)
    g, rhs = values(rng, case.out_shape, 0.3), values(rng, case.rhs_shape)
    dense = COMPONENTS["bwd_input"](case, g, rhs)
    for sparsity in SPARSITIES:
        x = values(rng, case.lhs_shape, sparsity)
        for mode in MODES:
            dlhs, drhs = run_both(case, g, rhs, x, mode)
            assert np.all(dlhs[x == 0] == 0)
            check("bwd_input", case, np.where(x == 0, dense.astype(np.float32), dlhs), g, rhs)
            check("bwd_weights", case, drhs, x, g)


# Chunks of pixels, several blocks of channels and of features in a step, steps of their own for the last features.
MANY = [
    same(Case(4, 56, 56, 32, 48, 3, 3)),
    same(Case(4, 14, 14, 272, 80, 3, 3)),
    same(Case(3, 14, 14, 1040, 300, 1, 1)),
    same(Case(2, 24, 24, 528, 40, 3, 3, (2, 2))),
    same(Case(2, 12, 12, 32, 176, 5, 7)),
]


@pytest.mark.parametrize("case", [*SHAPES, *ADVERSARIAL, *BORDERS, *NARROW_IMAGES, *MANY], ids=str)
def test_gradients_at_once_of_small_integers_are_exact(case: Case, isa: str) -> None:
    rng = seed("both integers", case)
    g, rhs = values(rng, case.out_shape, 0.3, integers=True), values(rng, case.rhs_shape, integers=True)
    whole = COMPONENTS["bwd_input"](case, g, rhs).astype(np.float32)
    together = 0
    for sparsity in (0.0, 0.5, 0.9):
        x = values(rng, case.lhs_shape, sparsity, integers=True)
        x[0, 0] = 0  # a block may have nothing but zeros
        dlhs, drhs = run_both(case, g, rhs, x, "sparse")
        together += walked_together(isa)
        np.testing.assert_array_equal(dlhs, np.where(x == 0, 0, whole), err_msg=str(sparsity))
        np.testing.assert_array_equal(drhs, COMPONENTS["bwd_weights"](case, x, g).astype(np.float32))
    if isa.startswith("avx512") and case in (*BORDERS, *MANY):
        assert together == 3


def test_gradients_at_once_are_walked_together_where_that_is_cheaper(isa: str) -> None:
    """Not if most values are there, nor if the gradient of the output has far fewer than lhs."""
    case = same(Case(8, 14, 14, 128, 128, 3, 3))
    rng = seed("both paths")
    rhs = values(rng, case.rhs_shape)
    for of_x, of_g, wanted in ((0.8, 0.0, True), (0.9, 0.5, True), (0.3, 0.97, False)):
        x, g = values(rng, case.lhs_shape, of_x), values(rng, case.out_shape, of_g)
        run_both(case, g, rhs, x)
        assert walked_together(isa) == (wanted and isa.startswith("avx512")), (of_x, of_g)
        run_both(case, g, rhs, x, "dense")
        assert not walked_together(isa)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("shape", [(4, 6, 6, 64, 64, 3, 3), (6, 13, 7, 80, 128, 1, 1), (3, 14, 14, 64, 40, 3, 3)])
def test_gradients_at_once_are_nonfinite_only_where_a_nonzero_meets_a_nonfinite_value(
    shape: tuple[int, ...], value: float, isa: str
) -> None:
    """Entries that are left over when others go by fours meet nothing that they should not."""
    stride = 2 if shape[1] == 14 else 1
    case = same(Case(*shape, strides=(stride, stride)))
    rng = seed("both nonfinite", case)
    g, rhs, x = values(rng, case.out_shape), values(rng, case.rhs_shape), values(rng, case.lhs_shape, 0.8)
    g[0, 0, 0, 3] = g[1, 1, 2, 5] = g[2, 5, 3, 37] = value  # the first is where a block begins
    dlhs, drhs = run_both(case, g, rhs, x, "sparse")
    assert walked_together(isa) == isa.startswith("avx512")
    bad = (~np.isfinite(g)).astype(np.float32)
    met = COMPONENTS["bwd_input"](case, bad, np.ones(case.rhs_shape)) * (x != 0) > 0
    assert np.array_equal(~np.isfinite(dlhs), met) and np.all(dlhs[x == 0] == 0)
    met = COMPONENTS["bwd_weights"](case, (x != 0).astype(np.float32), bad)
    if isa.startswith("avx512"):  # others may skip the zeros of g, which x then meets
        assert np.array_equal(~np.isfinite(drhs), met > 0)
        assert np.array_equal(np.isnan(drhs)[met == 1], np.full((met == 1).sum(), np.isnan(value)))


def test_results_are_right_for_operands_in_another_memory_order(isa: str) -> None:
    case = same(Case(2, 7, 9, 16, 24, 3, 3))
    rng = seed("layout")
    lhs, rhs = values(rng, case.lhs_shape, 0.5), values(rng, case.rhs_shape)

    @jax.jit
    def from_nchw(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return primitives.sparse_conv_fwd(lhs.transpose(0, 2, 3, 1), rhs.transpose(2, 3, 1, 0), spec=spec_of(case))

    got = from_nchw(jnp.asarray(lhs.transpose(0, 3, 1, 2)), jnp.asarray(rhs.transpose(3, 2, 0, 1)))
    check("fwd", case, np.asarray(got), lhs, rhs)
