"""Shapes of a two-dimensional convolution and of its two gradients.

Nothing here touches arrays: every function maps shapes and arguments to shapes, or to the reason why a convolution is
not one that the sparse kernels compute.

Letters used throughout the package, one per dimension:

====  =======================================  ====  ==========================
N     batch                                    K     output features
H, W  spatial size of the input (lhs)          P, Q  spatial size of the output
R, S  spatial size of the kernel (rhs)         C     input features
====  =======================================  ====  ==========================

lhs is ``NHWC``, the kernel (rhs) is ``RSCK`` (what Flax calls HWIO), the output and its gradient are ``NPQK``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

__all__ = ["LARGEST", "MODES", "ConvSpec", "output_size", "padding_pairs", "per_axis"]

#: Accepted values of ``mode``, in the order of their numbers in the custom calls' ``mode`` attribute.
MODES = ("auto", "sparse", "dense")

#: The largest stride, dilation or padding: what fits the integers of XLA's windows everywhere.
LARGEST = 2**31 - 1

#: Accepted padding strings; those of ``jax.lax.conv_general_dilated``.
PADDINGS = ("SAME", "SAME_LOWER", "VALID")


def output_size(size: int, window: int, stride: int, padding: tuple[int, int]) -> int:
    """Number of positions of a window: 0 when the window is larger than the padded input."""
    return max(0, (size + padding[0] + padding[1] - window) // stride + 1)


@dataclass(frozen=True)
class ConvSpec:
    """Everything about a convolution but its batch and feature sizes; the only parameter of the primitives.

    The same object serves the forward pass and both gradients, so that transposing one into another leaves it alone.

    Attributes:
      input_size: (H, W).
      kernel_size: (R, S), each at least 1.
      strides: window strides (rows, columns), each at least 1.
      padding: zeros added ((top, bottom), (left, right)), none negative.
      mode: ``"auto"``, ``"sparse"`` or ``"dense"``.
      precision: what ``jax.lax`` is told on platforms without kernels of ours; the kernels accumulate in float32.
      result: ``"float32"`` if the result has that dtype and the operands have a narrower one; None if it has theirs.
      relu_input: that the derivative for the input is zero where the input is; concerns ``sparse_conv_fwd`` and
        ``sparse_conv_fwd_both`` only.
    """

    input_size: tuple[int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    mode: str = "auto"
    precision: Any = None
    result: str | None = None
    relu_input: bool = False

    @property
    def gradient(self) -> ConvSpec:
        """The spec of the gradients: their operands all have the dtype of this result, as in ``jax.lax``, and
        ``relu_input`` has become a third operand.
        """
        return dataclasses.replace(self, result=None, relu_input=False)

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q)."""
        rows, cols = (
            output_size(size, window, stride, pad)
            for size, window, stride, pad in zip(
                self.input_size, self.kernel_size, self.strides, self.padding, strict=True
            )
        )
        return rows, cols

    @property
    def geometry(self) -> tuple[int, ...]:
        """The custom calls' ``geometry`` attribute: strides, then padding top, bottom, left, right."""
        return (*self.strides, *self.padding[0], *self.padding[1])

    def sizes(self, **features: int) -> Mapping[str, int]:
        """Size of each dimension letter; ``features`` gives those that are known of N, C and K."""
        fixed = zip("HWRSPQ", (*self.input_size, *self.kernel_size, *self.output_size), strict=True)
        return {**dict(fixed), **features}

    def __str__(self) -> str:
        text = "x".join(map(str, self.kernel_size)) + " on " + "x".join(map(str, self.input_size))
        if self.strides != (1, 1):
            text += " strides " + "x".join(map(str, self.strides))
        if any(map(any, self.padding)):
            text += f" padding {self.padding}".replace(" (", "(").replace("padding(", "padding (")
        return text + f" {self.mode}" * (self.mode != "auto") + " relu_input" * self.relu_input


def per_axis(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """``value`` as one integer per spatial axis: an integer is repeated, a sequence must have ``rank`` of them.

    Raises:
      TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    accepted = f"an integer of at least 1 and at most {LARGEST} or a sequence of {rank} of them"
    if value is None:
        value = 1
    try:
        items = (operator.index(value),) * rank
    except TypeError:
        try:
            items = tuple(operator.index(v) for v in _in_order(value))
        except TypeError:
            raise TypeError(f"{name} must be {accepted}, got {value!r}") from None
    if len(items) != rank or any(not 1 <= v <= LARGEST for v in items):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return items


def _in_order(values: Any) -> tuple[Any, ...]:
    if isinstance(values, (Mapping, Set)):
        raise TypeError("not a sequence")
    return tuple(values)


def _pair(item: Any) -> tuple[Any, ...]:
    try:
        return _in_order(item)
    except TypeError:
        return item, item


def padding_pairs(padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    """``padding`` as one (low, high) pair per spatial axis, or as one of the accepted strings in upper case.

    An integer pads every side alike; a sequence holds, for each axis, an integer or a (low, high) pair. Negative
    values crop, as in ``jax.lax``.

    Raises:
      TypeError, ValueError: naming what was given and what is accepted.
    """
    accepted = f"one of {', '.join(map(repr, PADDINGS))}, an integer, or a sequence of {rank} integers or (low, high)"
    if isinstance(padding, str):
        if padding.upper() not in PADDINGS:
            raise ValueError(f"padding must be {accepted} pairs, got {padding!r}")
        return padding.upper()
    items: tuple[Any, ...]
    try:
        items = (operator.index(padding),) * rank
    except TypeError:
        try:
            items = _in_order(padding)
        except TypeError:
            raise TypeError(f"padding must be {accepted} pairs, got {padding!r}") from None
    pairs = []
    for item in items:
        try:
            low, high = _pair(item)
            pairs.append((operator.index(low), operator.index(high)))
        except (TypeError, ValueError):
            raise ValueError(f"padding must be {accepted} pairs, got {padding!r}") from None
    if len(pairs) != rank:
        raise ValueError(f"padding must be {accepted} pairs, got {padding!r}")
    if any(abs(p) > LARGEST for pair in pairs for p in pair):
        raise ValueError(f"padding must not be larger than {LARGEST}, got {padding!r}")
    return tuple(pairs)
