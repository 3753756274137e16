"""``SparseConv`` for ``flax.nnx``, and :func:`sparsify` for models that exist already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from . import _compat
from .conv import ConvHook
from .primitives import stock_convolution
from .telemetry import sparsity, tap_gradient

__all__ = ["SparseConv", "sparsify"]

_M = TypeVar("_M", bound=nnx.Module)


class SparseConv(nnx.Conv):
    """``flax.nnx.Conv`` that skips zeros: same arguments, parameters, initial values and results.

    Args:
      in_features: number of input features.
      out_features: number of output features.
      kernel_size: window, an integer for one spatial dimension or a sequence.
      strides: window strides.
      relu_input: a promise that the input comes out of a ReLU; see :func:`sparsetrain_jax.sparse_conv`.
      mode: ``"auto"``, ``"sparse"`` or ``"dense"``.
      sow_sparsity: tell the zeros of this layer's input and of its output's gradient, for ``nnx.capture``: the first is
        sown as ``input_sparsity`` into ``nnx.Intermediate``; the second is the gradient for the ``nnx.Perturbation``
        called ``output_gradient_sparsity``.
      conv_general_dilated: used instead of ours if given.
      rngs: random number generators.
      **arguments: ``nnx.Conv``'s.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        relu_input: bool = False,
        mode: str = "auto",
        sow_sparsity: bool = False,
        conv_general_dilated: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
        **arguments: Any,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            conv_general_dilated=ConvHook(relu_input, mode) if conv_general_dilated is None else conv_general_dilated,
            rngs=rngs,
            **arguments,
        )
        self.sow_sparsity = sow_sparsity

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Convolve ``inputs``, ``(*batch, *spatial, in_features)``; see ``nnx.Conv`` for further arguments."""
        if not (self.sow_sparsity and _compat.is_captured(self)):
            return super().__call__(inputs, *args, **kwargs)
        self.sow(nnx.Intermediate, "input_sparsity", sparsity(inputs))
        outputs = super().__call__(inputs, *args, **kwargs)
        return tap_gradient(outputs, self.perturb("output_gradient_sparsity", jnp.zeros(())))

    @property
    def relu_input(self) -> bool:
        """The promise that the input comes out of a ReLU; can be set. False for a user's ``conv_general_dilated``."""
        return getattr(self.conv_general_dilated, "relu_input", False)

    @relu_input.setter
    def relu_input(self, value: bool) -> None:
        self._replace(relu_input=value)

    @property
    def mode(self) -> str:
        """``"auto"``, ``"sparse"`` or ``"dense"``; can be set. ``"auto"`` for a user's ``conv_general_dilated``."""
        return getattr(self.conv_general_dilated, "mode", "auto")

    @mode.setter
    def mode(self, value: str) -> None:
        self._replace(mode=value)

    def _replace(self, **changes: Any) -> None:
        if not isinstance(self.conv_general_dilated, ConvHook):
            raise ValueError(f"{next(iter(changes))} cannot be set: this layer has a conv_general_dilated of its own")
        self.conv_general_dilated = dataclasses.replace(self.conv_general_dilated, **changes)


def sparsify(model: _M) -> _M:
    """Make every ``nnx.Conv`` in ``model`` skip zeros, in place, and return ``model``.

    Parameters stay as they are. ``relu_input`` stays False: nothing is known of what the layers are fed with. Layers
    whose ``conv_general_dilated`` was supplied by the user keep it.

    Raises:
      TypeError: if ``model`` is not an nnx object.
    """
    if not isinstance(model, nnx.Pytree):
        raise TypeError(f"model must be an nnx module, got {model!r}; for functions there is sparsetrain_jax.sparsify")
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Conv) and node.conv_general_dilated is stock_convolution:
            node.conv_general_dilated = ConvHook()
    return model
