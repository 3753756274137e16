"""The one place that depends on JAX's version or on names that JAX keeps private.

Supported: jax and jaxlib from the minimum in ``pyproject.toml`` to the newest that the tests ran with (0.12.0.1).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx
from jax._src import api_util, config, core, dispatch, mesh
from jax._src import linear_util as lu
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import utils as lax_utils
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import mlir

DropVar = core.DropVar
jaxprs_in_params = core.jaxprs_in_params
ShardingTypeError = core.ShardingTypeError

__all__ = [
    "DropVar",
    "ShardingTypeError",
    "auto_match",
    "is_captured",
    "is_partitioned",
    "jaxprs_in_params",
    "lower_plain",
    "needs_devices",
    "over_explicit_axes",
    "plain_types",
    "primitive_of_parts",
    "resharded",
    "scan_sizes",
    "standard_primitive",
    "trace",
    "within",
]


def standard_primitive(
    name: str, shape_rule: Callable[..., Any], dtype_rule: Callable[..., Any], sharding_rule: Callable[..., Any]
) -> Primitive:
    """A primitive with one result that JAX treats like its own: eager dispatch, explicit sharding, manual axes.

    The rules get the operands' abstract values and the primitive's parameters.
    """

    def vma_rule(*avals: Any, **_: Any) -> Any:
        return core.standard_vma_rule(name, *avals)

    return lax_utils.standard_primitive(shape_rule, dtype_rule, name, sharding_rule=sharding_rule, vma_rule=vma_rule)


def primitive_of_parts(name: str, parts: Sequence[tuple[Primitive, Sequence[int]]]) -> Primitive:
    """A primitive each of whose results is that of another one, with one result, of the operands at some indices.

    It is typed as these are. Where only one of its results is used, that one's primitive takes its place.
    """

    def abstract_eval(*avals: Any, **parameters: Any) -> list[Any]:
        return [part.abstract_eval(*(avals[i] for i in own), **parameters)[0] for part, own in parts]

    def eliminate(used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
        if sum(used) != 1:
            return [any(used)] * len(eqn.invars), eqn if any(used) else None
        part, own = parts[used.index(True)]
        invars, outvars = [eqn.invars[i] for i in own], [eqn.outvars[used.index(True)]]
        kept = eqn.replace(primitive=part, invars=invars, outvars=outvars)
        return [i in own for i in range(len(eqn.invars))], kept

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))
    primitive.def_abstract_eval(abstract_eval)
    pe.dce_rules[primitive] = eliminate
    return primitive


def needs_devices(primitive: Primitive) -> None:
    """Tell JAX that ``primitive``'s lowering asks for the devices (``custom_partitioning`` does, also when eager)."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def is_partitioned(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will partition what is lowered: not for one device, nor where ``shard_map`` did it along all axes."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        return not context.manual_axes >= set(context.mesh.axis_names)
    return not (isinstance(context, mlir.ShardingContext) and context.num_devices == 1)


def is_captured(module: nnx.Module) -> bool:
    """Whether ``nnx.capture`` is there to take what ``module`` sows; before Flax had it, sowing needed nothing."""
    return hasattr(module, "__captures__") or not hasattr(nnx, "capture")


def raw_value(variable: nnx.Variable[Any]) -> Any:
    """What an nnx Variable holds, without its hooks."""
    return variable.get_raw_value() if hasattr(nnx.Variable, "get_raw_value") else variable.raw_value


def set_raw_value(variable: nnx.Variable[Any], value: Any) -> None:
    """Make an nnx Variable hold ``value``; Flax raises if that is not allowed here."""
    if hasattr(nnx.Variable, "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value


def plain_types() -> AbstractContextManager[Any]:
    """A context in which arrays have no explicit shardings."""
    return mesh.use_abstract_mesh(mesh.empty_abstract_mesh)


def resharded(function: Callable[..., jax.Array], sharding: Any) -> Callable[..., jax.Array]:
    """``function`` with Explicit mesh axes left to XLA inside, and its result given ``sharding``.

    ``function`` itself if no axis of the sharding's mesh is Explicit, or if there is no sharding.
    """
    axes = sharding.mesh.explicit_axes if sharding is not None else ()
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding) if axes else function


def over_explicit_axes(
    loop: Callable[..., jax.Array], args: Sequence[jax.Array], batched: Sequence[bool]
) -> Callable[..., jax.Array]:
    """``loop`` over the leading dimension of its batched arguments; each device its own if Explicit axes shard that."""
    sharding = jax.typeof(args[batched.index(True)]).sharding
    axis = sharding.spec[0] if sharding.spec else None
    if axis is None:
        return loop
    return jax.shard_map(
        loop,
        mesh=None if mesh.get_abstract_mesh() == sharding.mesh else sharding.mesh,
        in_specs=tuple(jax.P(axis) if is_batched else jax.P() for is_batched in batched),
        out_specs=jax.P(axis),
        axis_names={axis} if isinstance(axis, str) else set(axis),
    )


def lower_plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """A lowering rule from ``function``, of one result or several, which sees its operands as plain arrays.

    Explicit shardings and manual mesh axes are in the operands' types while users' functions are traced. By the time of
    lowering they have done their work, and would only make the function's own operations object.
    """
    rule = mlir.lower_fun(lambda *args, **kwargs: jax.tree.leaves(function(*args, **kwargs)), multiple_results=True)

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        avals: Sequence[Any] = ctx.avals_in
        plain = [core.ShapedArray(aval.shape, aval.dtype) for aval in avals]
        with plain_types():
            return rule(ctx.replace(avals_in=plain), *operands, **parameters)

    return lower


def auto_match(*operands: Any) -> Sequence[jax.Array]:
    """Operands made to vary over the same manual mesh axes, as JAX does before binding its own primitives."""
    for name in ("auto_insert_reshard", "standard_insert_pvary", "standard_insert_pbroadcast"):
        if (function := getattr(core, name, None)) is not None:
            return function(*operands)
    return operands


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many of a ``scan``'s operands are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(list(part)) for part in eqn.params["ft_in"].update(eqn.invars).unpack())
    return consts, carry


def trace(function: Callable[..., Sequence[jax.Array]], avals: Sequence[Any]) -> ClosedJaxpr:
    """The jaxpr of a function that returns a list of arrays, for exactly these abstract values."""
    info = api_util.debug_info("sparsetrain_jax", function, tuple(avals), {})
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(lu.wrap_init(function, debug_info=info), list(avals))
    return ClosedJaxpr(jaxpr, consts)


@contextlib.contextmanager
def within(context: Any, avals: Sequence[Any]) -> Iterator[None]:
    """Trace as in an equation's surroundings: its context, and ``shard_map``'s types if its operands have them."""

    def varies(aval: Any) -> bool:
        manual = getattr(aval, "manual_axis_type", None)
        return bool(getattr(aval, "vma", None) if manual is None else manual.varying)

    mesh = context.cur_abstract_mesh
    axes = [(name, mesh.shape[name]) for name in mesh.manual_axes]
    check = config._check_vma.value or any(map(varies, avals))
    with context.manager, config._check_vma(check), core.extend_axis_env_nd(axes):
        yield
