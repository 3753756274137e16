"""Train ReLU networks on the CPU faster: JAX convolutions that skip zeros."""

from __future__ import annotations

from . import nnx
from .conv import conv_general_dilated, explain, sparse_conv
from .linen import SparseConv
from .native import available_isas, custom_calls, isa
from .primitives import dots_saveable
from .telemetry import plot_sparsity, sparsity
from .transform import sparsify

__version__ = "0.1.0"

__all__ = [
    "SparseConv",
    "available_isas",
    "conv_general_dilated",
    "custom_calls",
    "dots_saveable",
    "explain",
    "isa",
    "nnx",
    "plot_sparsity",
    "sparse_conv",
    "sparsify",
    "sparsity",
]
