"""``SparseConv`` for ``flax.linen``."""

from __future__ import annotations

from flax import linen as nn

from .conv import ConvHook

__all__ = ["SparseConv"]


class SparseConv(nn.Conv):
    """``flax.linen.Conv`` that skips zeros: same arguments, parameters and results.

    Its parameters have the names, shapes and, for a layer with an explicit ``name`` and the same key, the initial
    values of ``nn.Conv``'s. An unnamed layer is called ``SparseConv_0`` after its class, where ``nn.Conv`` is ``Conv_0``: name
    layers explicitly to move checkpoints between the two.

    Attributes:
      relu_input: a promise that the input comes out of a ReLU; see :func:`sparsetrain_jax.sparse_conv`. With it the
        layer differentiates in reverse mode, and in forward mode only over that.
      mode: ``"auto"``, ``"sparse"`` or ``"dense"``.

    A ``conv_general_dilated`` or ``conv_general_dilated_cls`` that the user supplies is used instead of ours.
    """

    relu_input: bool = False
    mode: str = "auto"

    def __post_init__(self) -> None:
        # Set as linen's own hook, which it reads in __call__. A clone() hands us our earlier hook: replace it.
        if self.conv_general_dilated is None and isinstance(self.conv_general_dilated_cls, _HookFactory | None):
            object.__setattr__(self, "conv_general_dilated_cls", _HookFactory(self.relu_input, self.mode))
        super().__post_init__()


class _HookFactory(ConvHook):
    """linen's ``conv_general_dilated_cls``: a function without arguments that returns the convolution."""

    def __call__(self) -> ConvHook:  # type: ignore[override]
        return ConvHook(self.relu_input, self.mode)
