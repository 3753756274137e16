"""``SparseConv`` for ``flax.linen``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from .conv import ConvHook
from .telemetry import sparsity, tap_gradient

__all__ = ["SparseConv"]


class SparseConv(nn.Conv):
    """``flax.linen.Conv`` that skips zeros: same arguments, parameters and results.

    Its parameters have the names, shapes and, for a layer with an explicit ``name`` and the same key, the initial
    values of ``nn.Conv``'s. An unnamed layer is called ``SparseConv_0`` after its class, where ``nn.Conv`` is
    ``Conv_0``: name layers explicitly to move checkpoints between the two.

    Attributes:
      relu_input: a promise that the input comes out of a ReLU; see :func:`sparsetrain_jax.sparse_conv`.
      mode: ``"auto"``, ``"sparse"`` or ``"dense"``.
      sow_sparsity: tell the zeros of this layer's input and of its output's gradient. The first is sown as
        ``input_sparsity`` into the collection ``"intermediates"``; the second is the gradient for the variable
        ``output_gradient_sparsity`` of the collection ``"perturbations"``, which ``init`` then makes. No cost for a
        collection that is not asked for.

    A ``conv_general_dilated`` or ``conv_general_dilated_cls`` that the user supplies is used instead of ours.
    """

    relu_input: bool = False
    mode: str = "auto"
    sow_sparsity: bool = False

    def __post_init__(self) -> None:
        # Set as linen's own hook, which it reads in __call__. A clone() hands us our earlier hook: replace or drop it.
        if isinstance(self.conv_general_dilated_cls, _HookFactory | None):
            ours = _HookFactory(self.relu_input, self.mode) if self.conv_general_dilated is None else None
            object.__setattr__(self, "conv_general_dilated_cls", ours)
        super().__post_init__()

    @nn.nowrap  # super's is wrapped: another time would make two calls of one for interceptors, tables and scopes
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve ``inputs``, ``(*batch, *spatial, in_features)``; see ``nn.Conv``."""
        if not self.sow_sparsity:
            return super().__call__(inputs)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "input_sparsity", sparsity(inputs))
        outputs = super().__call__(inputs)
        name = "output_gradient_sparsity"
        if self.has_variable("perturbations", name) or self.is_mutable_collection("perturbations"):
            outputs = tap_gradient(outputs, self.perturb(name, jnp.zeros(())))
        return outputs


class _HookFactory(ConvHook):
    """linen's ``conv_general_dilated_cls``: a function without arguments that returns the convolution."""

    def __call__(self) -> ConvHook:  # type: ignore[override]
        return ConvHook(self.relu_input, self.mode)
