"""The one place that depends on JAX's version or on names that JAX keeps private.

Supported: jax and jaxlib from the minimum in ``pyproject.toml`` to the newest that the tests ran with (0.10.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import core, dispatch
from jax._src.lax import utils as lax_utils
from jax.extend.core import Primitive
from jax.interpreters import mlir

ShardingTypeError = core.ShardingTypeError

__all__ = ["ShardingTypeError", "auto_match", "is_single_device", "needs_devices", "standard_primitive"]


def standard_primitive(
    name: str, shape_rule: Callable[..., Any], dtype_rule: Callable[..., Any], sharding_rule: Callable[..., Any]
) -> Primitive:
    """A primitive with one result that JAX evaluates as it does its own: eager dispatch, explicit sharding, manual axes.

    The rules get the operands' abstract values and the primitive's parameters.
    """

    def vma_rule(*avals: Any, **_: Any) -> Any:
        return core.standard_vma_rule(name, *avals)

    return lax_utils.standard_primitive(shape_rule, dtype_rule, name, sharding_rule=sharding_rule, vma_rule=vma_rule)


def needs_devices(primitive: Primitive) -> None:
    """Tell JAX that ``primitive``'s lowering asks for the devices (``custom_partitioning`` does, also when eager)."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def is_single_device(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether a lowering is for one device, so that nothing has to be partitioned."""
    context = ctx.module_context.axis_context
    return isinstance(context, mlir.ShardingContext) and context.num_devices == 1


def auto_match(*operands: Any) -> Sequence[jax.Array]:
    """Operands made to vary over the same manual mesh axes, as JAX does before binding its own primitives."""
    for name in ("auto_insert_reshard", "standard_insert_pvary", "standard_insert_pbroadcast"):
        if (function := getattr(core, name, None)) is not None:
            return function(*operands)
    return operands
