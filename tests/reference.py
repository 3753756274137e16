"""Float64 convolution and its gradients in NumPy, tap by tap; error bounds; sparse test data.

Independent of ``jax.lax`` and of the package: only the letters are shared (lhs NHWC, rhs RSCK, output NPQK).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST_NORMAL = 2.0**-126
SMALLEST_SUBNORMAL = {"float16": 2.0**-24, "bfloat16": 2.0**-133}


class Case(NamedTuple):
    """A convolution's sizes. ``padding`` is explicit: ((top, bottom), (left, right))."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))

    @property
    def out(self) -> tuple[int, int]:
        (top, bottom), (left, right) = self.padding
        return (
            max(0, (self.h + top + bottom - self.r) // self.strides[0] + 1),
            max(0, (self.w + left + right - self.s) // self.strides[1] + 1),
        )

    @property
    def lhs_shape(self) -> tuple[int, ...]:
        return (self.n, self.h, self.w, self.c)

    @property
    def rhs_shape(self) -> tuple[int, ...]:
        return (self.r, self.s, self.c, self.k)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.n, *self.out, self.k)

    def __str__(self) -> str:
        pad = "".join(str(p) for pair in self.padding for p in pair)
        strides = "".join(map(str, self.strides))
        return f"{self.n}x{self.h}x{self.w}x{self.c}-{self.r}x{self.s}x{self.k}-s{strides}-p{pad}"


def same(case: Case) -> Case:
    """The case with "SAME" padding."""

    def pair(size: int, window: int, stride: int) -> tuple[int, int]:
        total = max(0, (-(-size // stride) - 1) * stride + window - size)
        return total // 2, total - total // 2

    return case._replace(
        padding=(pair(case.h, case.r, case.strides[0]), pair(case.w, case.s, case.strides[1])),
    )


def _taps(case: Case) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    p, q = case.out
    for r in range(case.r):
        for s in range(case.s):
            rows = slice(r, r + p * case.strides[0], case.strides[0])
            cols = slice(s, s + q * case.strides[1], case.strides[1])
            yield r, s, (slice(None), rows, cols)


def _padded(case: Case, lhs: np.ndarray) -> np.ndarray:
    # Also as far as the last window reaches, so that slices of p rows always have p rows.
    (top, bottom), (left, right) = case.padding
    return np.pad(lhs, ((0, 0), (top, bottom + case.r), (left, right + case.s), (0, 0)))


def fwd(case: Case, lhs: Any, rhs: Any) -> np.ndarray:
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    padded, out = _padded(case, lhs), np.zeros(case.out_shape)
    if out.size:
        for r, s, window in _taps(case):
            out += padded[window][:, : case.out[0], : case.out[1]] @ rhs[r, s]
    return out


def bwd_input(case: Case, g: Any, rhs: Any) -> np.ndarray:
    g, rhs = np.asarray(g, np.float64), np.asarray(rhs, np.float64)
    padded = _padded(case, np.zeros(case.lhs_shape))
    if g.size:
        for r, s, window in _taps(case):
            padded[window] += g @ rhs[r, s].T
    top, left = case.padding[0][0], case.padding[1][0]
    return padded[:, top : top + case.h, left : left + case.w]


def bwd_weights(case: Case, lhs: Any, g: Any) -> np.ndarray:
    lhs, g = np.asarray(lhs, np.float64), np.asarray(g, np.float64)
    padded, out = _padded(case, lhs), np.zeros(case.rhs_shape)
    if g.size:
        for r, s, window in _taps(case):
            out[r, s] = np.tensordot(padded[window], g, axes=((0, 1, 2), (0, 1, 2)))
    return out


COMPONENTS = {"fwd": fwd, "bwd_input": bwd_input, "bwd_weights": bwd_weights}


def operand_shapes(component: str, case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return {
        "fwd": (case.lhs_shape, case.rhs_shape),
        "bwd_input": (case.out_shape, case.rhs_shape),
        "bwd_weights": (case.lhs_shape, case.out_shape),
    }[component]


def terms(component: str, case: Case) -> int:
    """Products that one element of the result adds up, at most."""
    p, q = case.out
    return {"fwd": case.r * case.s * case.c, "bwd_input": case.r * case.s * case.k, "bwd_weights": case.n * p * q}[
        component
    ]


def bound(component: str, case: Case, a: Any, b: Any, dtype: str = "float32") -> np.ndarray:
    """Largest error that float32 accumulation in any order may make, per element of the result.

    n products added up in any order err by at most n u sum|a||b| (u: unit roundoff), and random rounding errors by some
    sqrt(n) u sum|a||b|: 8 times that is granted. Flushing subnormals adds at most the smallest normal number for each
    product and sum. A narrow result is that sum rounded once: by half a unit of its last place, which is at most its
    unit roundoff times the sum, or half the smallest subnormal number.
    """
    n = terms(component, case)
    magnitude = COMPONENTS[component](case, np.abs(np.asarray(a, np.float64)), np.abs(np.asarray(b, np.float64)))
    error = min(n, 8 * np.sqrt(n)) * UNIT_ROUNDOFF["float32"] * magnitude + 2 * n * SMALLEST_NORMAL
    if dtype == "float32":
        return error
    largest = np.abs(COMPONENTS[component](case, a, b)) + error
    return error + UNIT_ROUNDOFF[dtype] * largest + SMALLEST_SUBNORMAL[dtype] / 2


def check(component: str, case: Case, got: Any, a: Any, b: Any, dtype: str = "float32") -> None:
    """Assert that ``got`` is ``component`` of ``a`` and ``b`` to within :func:`bound`."""
    assert got.dtype == dtype, f"{got.dtype} is not {dtype}"
    want = COMPONENTS[component](case, a, b)
    assert got.shape == want.shape
    excess = np.abs(np.asarray(got, np.float64) - want) - bound(component, case, a, b, dtype)
    if excess.size and not excess.max() <= 0:  # also catches NaN
        where = np.unravel_index(np.nanargmax(excess), excess.shape)
        raise AssertionError(
            f"{component} of {case}: {np.count_nonzero(~(excess <= 0))} of {excess.size} elements are outside their "
            f"error bound; worst at {tuple(map(int, where))}: got {got[where]}, want {want[where]}"
        )


def mask(rng: np.random.Generator, shape: tuple[int, ...], sparsity: float, pattern: str = "iid") -> np.ndarray:
    """True where an array of ``shape`` is to be non-zero.

    Patterns: ``iid``; ``blobs``, where neighbouring pixels are zero together as in real ReLU maps; ``images``, where
    images, and ``channels``, where channels, have densities from 0 to 1 that average to the one asked for.
    """
    if pattern == "iid" or sparsity in (0, 1) or 0 in shape:
        return rng.random(shape) >= sparsity
    if pattern == "blobs":
        field = rng.standard_normal(shape)
        for axis in (1, 2):
            for _ in range(2):
                field = field + np.roll(field, 1, axis)
        return field > np.quantile(field, sparsity)
    axis = {"images": 0, "channels": 3}[pattern]
    count = shape[axis]
    density = np.clip(np.linspace(-0.5, 1.5, count) - sparsity + 0.5, 0, 1) if count > 1 else np.array([1 - sparsity])
    return rng.random(shape) < np.moveaxis(np.broadcast_to(density, (*np.delete(shape, axis), count)), -1, axis)


def values(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    sparsity: float = 0.0,
    pattern: str = "iid",
    integers: bool = False,
) -> np.ndarray:
    """Float32 data with exact zeros; ``integers``: from -4 to 4, so that sums of under a million products are exact."""
    data = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape) if integers else rng.standard_normal(shape)
    return np.where(mask(rng, shape, sparsity, pattern), data, 0).astype(np.float32)
