"""The reference of the other tests is itself right, and its bound is one that wrong results fail."""

from __future__ import annotations

import numpy as np
import pytest
from reference import COMPONENTS, Case, check, mask, operand_shapes, same, values

CASES = [
    Case(2, 5, 4, 3, 2, 3, 2, (2, 1), ((1, 0), (2, 1))),
    same(Case(1, 4, 4, 2, 3, 3, 3)),
    Case(1, 1, 2, 1, 1, 3, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_definition_of_a_convolution(case: Case) -> None:
    rng = np.random.default_rng(0)
    lhs, rhs = values(rng, case.lhs_shape), values(rng, case.rhs_shape)
    want = np.zeros(case.out_shape)
    for n, p, q, k in np.ndindex(*case.out_shape):
        for r, s, c in np.ndindex(case.r, case.s, case.c):
            y = p * case.strides[0] + r - case.padding[0][0]
            x = q * case.strides[1] + s - case.padding[1][0]
            if 0 <= y < case.h and 0 <= x < case.w:
                want[n, p, q, k] += float(lhs[n, y, x, c]) * float(rhs[r, s, c, k])
    np.testing.assert_allclose(COMPONENTS["fwd"](case, lhs, rhs), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_adjoints_of_forward(case: Case) -> None:
    rng = np.random.default_rng(1)
    lhs, rhs, g = (values(rng, shape) for shape in (case.lhs_shape, case.rhs_shape, case.out_shape))
    product = np.vdot(COMPONENTS["fwd"](case, lhs, rhs), g)
    np.testing.assert_allclose(np.vdot(COMPONENTS["bwd_input"](case, g, rhs), lhs), product, rtol=1e-10)
    np.testing.assert_allclose(np.vdot(COMPONENTS["bwd_weights"](case, lhs, g), rhs), product, rtol=1e-10)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_product_exceeds_the_error_bound(component: str) -> None:
    case = same(Case(2, 14, 14, 256, 32, 3, 3))
    rng = np.random.default_rng(2)
    a, b = (values(rng, shape, 0.3) for shape in operand_shapes(component, case))
    right = COMPONENTS[component](case, a, b).astype(np.float32)
    check(component, case, right, a, b)
    a_wrong = a.copy()
    a_wrong[0, 7, 7, 3] = 0 if a[0, 7, 7, 3] else 1
    with pytest.raises(AssertionError, match="outside their error bound"):
        check(component, case, COMPONENTS[component](case, a_wrong, b).astype(np.float32), a, b)
    with pytest.raises(AssertionError, match="outside their error bound"):
        check(component, case, np.zeros_like(right), a, b)


@pytest.mark.parametrize("pattern", ["iid", "blobs", "images", "channels"])
def test_masks_have_the_sparsity_asked_for(pattern: str) -> None:
    rng = np.random.default_rng(3)
    for sparsity in (0.3, 0.7):
        assert abs(np.mean(~mask(rng, (8, 20, 20, 16), sparsity, pattern)) - sparsity) < 0.12
