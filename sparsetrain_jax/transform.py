"""``sparsify``: a function transformation that makes every convolution of a function skip zeros.

The function is traced to a jaxpr, convolutions in it are exchanged for ours, and the result is evaluated in place of
the function, under whatever transformation is at work outside. All of that happens while tracing. Equations that are
not convolutions, and do not contain one, stay the objects that they were: nothing about them can change.

On the way, :mod:`~sparsetrain_jax.facts` proves for which convolutions ``relu_input`` holds.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import os
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
from flax import nnx
from jax import lax
from jax.extend import core, linear_util, source_info_util

from . import _compat, facts, primitives
from .conv import Component, _Call, _inverse, _plan, explain_call
from .facts import Facts, Origin
from .shapes import ConvSpec

__all__ = ["ConvReport", "SparsifyReport", "sparsify"]


@overload
def sparsify(fn: Callable[..., Any], *, explain: bool = False) -> Callable[..., Any]: ...
@overload
def sparsify(fn: None = None, *, explain: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
def sparsify(fn: Callable[..., Any] | None = None, *, explain: bool = False) -> Callable[..., Any]:
    """A function that computes what ``fn`` does, with convolutions that skip zeros.

    Every ``jax.lax.conv_general_dilated`` that ``fn`` comes to call and that the sparse kernels can compute is
    exchanged: in ``jit``, ``scan``, ``while_loop``, ``cond``, ``checkpoint``, ``custom_jvp``, ``custom_vjp``, ``vmap``
    and ``shard_map`` too. Everything else stays as it is, parameters and their names included. The result can be
    transformed like ``fn``::

        step = jax.jit(jax.grad(st.sparsify(loss)))
        logits = st.sparsify(model.apply)(variables, images, train=False)

    Where the input of a convolution provably comes out of a ReLU, its gradient is only computed where the input is not
    zero (``relu_input`` of :func:`sparse_conv`). The proof needs to see the ReLU: take gradients of ``sparsify(loss)``
    rather than sparsify a function that takes them, which also works, but without the proof.

    Args:
      fn: a function of pytrees. JAX arrays in its arguments are traced, as ``jax.jit`` would; everything else, NumPy
        arrays and Python numbers included, is handed to ``fn`` as it is.
      explain: return a function of the same arguments that computes nothing and returns a :class:`SparsifyReport`.

    Returns:
      A function with the signature of ``fn``. It traces ``fn`` whenever it is called: call it under ``jax.jit``.

    Raises:
      TypeError: if ``fn`` is not callable.
    """
    if fn is None:
        return functools.partial(sparsify, explain=explain)
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {fn!r}")

    @functools.wraps(fn, updated=())
    def sparse(*args: Any, **kwargs: Any) -> Any:
        with _nnx_context():
            traced = _trace(fn, args, kwargs, explain)
            closed, reports = _rewrite(traced.jaxpr, explain)
            return SparsifyReport(reports) if explain else traced.evaluate(closed)

    return sparse


# ---------------------------------------------------------------------------------------------------------------------
# Explanation


@dataclass(frozen=True)
class ConvReport:
    """What :func:`sparsify` did with one convolution.

    Attributes:
      source: where ``fn`` calls it, ``"file:line (function)"``.
      scope: its name stack: module paths in Flax, ``jax.named_scope``.
      operands: shapes and dtype of its operands.
      paths: its components, ``"fwd"``, ``"bwd_input"``, ``"bwd_weights"``: which path each takes and why. Only one of
        them if ``fn`` had taken a gradient already and this is a part of it.
      relu_input: whether it was proven that the input's gradient is not needed where the input is zero.
      proof: the way from the ReLU to this convolution, or the operation at which the proof failed.
    """

    source: str
    scope: str
    operands: str
    paths: dict[str, Component]
    relu_input: bool
    proof: str


class SparsifyReport(tuple[ConvReport, ...]):
    """The convolutions of a function, in the order in which they are computed; ``str()`` of it is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        if not self:
            return "no convolutions"
        head = ("", "source", "layer", "operands", "fwd", "bwd_input", "bwd_weights", "relu_input", "proof")
        rows = [
            (
                str(i),
                r.source,
                r.scope,
                r.operands,
                *(r.paths[c].path if c in r.paths else "-" for c in ("fwd", "bwd_input", "bwd_weights")),
                "yes" if r.relu_input else "no",
                r.proof,
            )
            for i, r in enumerate(self)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        reasons = dict.fromkeys(
            f"lax: {c.reason}" for r in self for c in r.paths.values() if c.path == "lax" and c.reason
        )
        return "\n".join([*lines, *reasons])


#: Our own code is no more the user's where it is not installed.
_HERE = os.path.dirname(__file__) + os.sep


def _source(eqn: Any) -> str:
    """The line that an equation comes from: the innermost that is not in an installed package, if there is one."""
    frames = source_info_util.summarize(eqn.source_info, num_frames=100).split("\n")[::-1]
    frame = next((f for f in frames if "site-packages" not in f and not f.startswith(_HERE)), frames[0])
    place, _, function = frame.rpartition("/")[2].partition(" ")
    file, *line = place.split(":")
    return ":".join([file, *line[:1]]) + (f" {function}" if function else "")


def _proof(known: Facts) -> str:
    """The proof of ``relu_input``, or where it failed, from the operations that led to a value."""
    steps: list[str] = []
    while known.qualifies and known.why is not None:
        why = known.why
        if known.fixed:
            return "the input has no gradient"
        if why.rule is facts.RELU:
            return " > ".join([f"{why.name} at {why.source}", *reversed(steps)])
        steps.append(why.name)
        known = next(o for o in why.operands if not o.fixed)
    while known.why is not None:
        why, gradients = known.why, [o for o in known.why.operands if not o.fixed]
        if not why.source:
            return f"comes from {why.name}"
        # Operations that fail by themselves, rather than because of what they are given.
        fails = (why.name, len(gradients)) in (("max", 1), ("min", 1), ("mul", 2), ("div", 2))
        culprit = next((o for o in gradients if not o.qualifies), None)
        if why.rule is None or culprit is None or fails or any(o.qualifies for o in gradients):
            hint = (why.rule.hint or why.rule.qualifies) if why.rule else "no rule for it"
            return f"stopped at {why.name}, {why.source}: {hint}"
        known = culprit
    return "nothing is known of the input"


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


@dataclass(frozen=True)
class _Traced:
    """A function as a jaxpr.

    Attributes:
      jaxpr: of the function of ``arrays``.
      arrays: the JAX arrays in its arguments.
      outputs: the jaxpr's results -> the function's.
    """

    jaxpr: Any
    arrays: list[jax.Array]
    outputs: Callable[[Sequence[jax.Array]], Any]

    def evaluate(self, jaxpr: Any) -> Any:
        """The function's result, computed by another jaxpr."""
        values = core.jaxpr_as_fun(jaxpr)(*self.arrays)
        # What depends on no argument comes as the jaxpr's literal, which may be the caller's own NumPy array.
        return self.outputs([value if _is_array(value) else jax.numpy.array(value) for value in values])


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def _is_array_or_type(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def _is_nnx(node: Any) -> bool:
    return isinstance(node, (nnx.Pytree, nnx.Variable))


def _is_none(node: Any) -> bool:
    return node is None


#: Of the context in which nnx objects are taken apart and put together again.
_NNX_TAG = "sparsetrain_jax.sparsify"


@contextlib.contextmanager
def _nnx_context() -> Iterator[None]:
    with nnx.update_context(_NNX_TAG) as context:
        context.static_cache = None  # nnx.cached_partial's is meant for the next nnx.jit
        yield


def _bound(fn: Any) -> tuple[Callable[..., Any], Any]:
    """``function`` and the nnx objects ``held`` that ``fn`` is bound to: ``function(held, ...)`` is ``fn(...)``."""
    if type(fn) in (functools.partial, jax.tree_util.Partial):
        inner, inner_held = _bound(fn.func)
        leaves, structure = jax.tree.flatten((fn.args, fn.keywords), is_leaf=_is_nnx)

        def function(held: Any, *args: Any, **kwargs: Any) -> Any:
            own, named = jax.tree.unflatten(structure, _filled(leaves, map(_is_nnx, leaves), held[1]))
            return functools.partial(inner, held[0], *own, **named)(*args, **kwargs)

        return function, (inner_held, list(filter(_is_nnx, leaves)))
    if isinstance(fn, types.MethodType) and _is_nnx(fn.__self__):
        return fn.__func__, fn.__self__
    if _is_nnx(fn) and not isinstance(inspect.getattr_static(type(fn), "__call__", None), staticmethod):
        return type(fn).__call__, fn
    return lambda held, *args, **kwargs: fn(*args, **kwargs), ()


def _trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], explain: bool = False) -> _Traced:
    """``fn`` with everything but JAX arrays closed over; its results may contain anything, too.

    It gets copies of the nnx objects among its arguments, since those hold arrays; copies share what the objects share.
    What it changes in them (running averages, counters of random numbers, attributes) is one more result, by which
    ``outputs`` changes the objects themselves. Both are to be called in one ``_nnx_context``. With ``explain``, types
    may stand for arrays.
    """
    is_traced = _is_array_or_type if explain else _is_array
    function, held = _bound(fn)
    leaves, structure = jax.tree.flatten(((held, *args), kwargs), is_leaf=_is_nnx)
    objects = [leaf for leaf in leaves if _is_nnx(leaf)]
    tag = _NNX_TAG if objects else None
    with nnx.split_context(tag) as context:
        graph, state = context.flatten(objects, with_paths=False)
    others = [None if _is_nnx(leaf) else leaf for leaf in leaves]
    values, contents = jax.tree.flatten((others, state), is_leaf=_is_none)
    arrays = [value for value in values if is_traced(value)]
    results: list[Any] = []

    def of_arrays(*arrays_in_arguments: jax.Array) -> list[jax.Array]:
        others, state = jax.tree.unflatten(contents, _filled(values, map(is_traced, values), arrays_in_arguments))
        with nnx.merge_context(tag, inner=True if objects else None) as context:
            copies = context.unflatten(graph, state)
        before = _Snapshot.of(copies)
        given = jax.tree.unflatten(structure, _filled(others, map(_is_nnx, leaves), copies))
        out_leaves, out_structure = jax.tree.flatten(function(*given[0], **given[1]), is_leaf=_is_nnx)
        after = _Snapshot.of(copies)
        made = [leaf for leaf in out_leaves if _is_nnx(leaf)]
        old = [before.index_of(node) for node in made]
        changed = before.changed(after)
        out_graph = out_state = None
        if changed is None or None in old:
            # Other objects, or other attributes of theirs: all is put together anew.
            with nnx.split_context(tag) as context:
                out_graph, out_state = context.flatten((copies if changed is None else [], made), with_paths=False)
        news = [jax.tree.unflatten(structure, leaves) for leaves, structure in (after.values[i] for i in changed or ())]
        out_others = [None if _is_nnx(leaf) else leaf for leaf in out_leaves]
        out, out_contents = jax.tree.flatten((out_others, out_state, news), is_leaf=_is_none)
        constants = [None if _is_array(leaf) else leaf for leaf in out]
        kinds = list(map(_is_array, out)), list(map(_is_nnx, out_leaves))
        results[:] = constants, *kinds, out_contents, out_graph, out_structure, changed or (), old
        return [leaf for leaf in out if _is_array(leaf)]

    _name_after(of_arrays, fn)
    jaxpr = jax.make_jaxpr(of_arrays)(*arrays)

    def outputs(values: Sequence[jax.Array]) -> Any:
        constants, is_array, is_nnx, out_contents, out_graph, out_structure, changed, old = results
        others, state, news = jax.tree.unflatten(out_contents, _filled(constants, is_array, values))
        own = _Snapshot.of(objects)
        for index, value in zip(changed, news, strict=True):
            _compat.set_raw_value(own.variables[index], value)
        if out_graph is None:
            made = [own.nodes[index] for index in old]
        else:
            with nnx.merge_context(tag, inner=False if objects else None) as context:
                _, made = context.unflatten(out_graph, state)
        return jax.tree.unflatten(out_structure, _filled(others, is_nnx, made))

    return _Traced(jaxpr, arrays, outputs)


def _filled(values: Sequence[Any], where: Iterable[bool], others: Iterable[Any]) -> list[Any]:
    """``values`` with the next of ``others`` wherever ``where`` is true."""
    rest = iter(others)
    return [next(rest) if is_other else value for value, is_other in zip(values, where, strict=True)]


@dataclass(frozen=True)
class _Snapshot:
    """What nnx objects hold at some time.

    Attributes:
      paths: of all objects and attributes.
      held: these objects and attributes.
      values: of the Variables among them, flattened: containers may be changed in place.
      metadata: of these Variables.
    """

    paths: list[Any]
    held: list[Any]
    values: list[Any]
    metadata: list[dict[str, Any]]

    @classmethod
    def of(cls, objects: Sequence[Any]) -> _Snapshot:
        parts = list(nnx.iter_graph(objects)) if objects else []
        variables = [node for _, node in parts if isinstance(node, nnx.Variable)]
        return cls(
            [path for path, _ in parts],
            [node for _, node in parts],
            [jax.tree.flatten(_compat.raw_value(variable), is_leaf=_is_none) for variable in variables],
            [dict(variable.get_metadata()) for variable in variables],
        )

    @property
    def nodes(self) -> list[Any]:
        return list(filter(_is_nnx, self.held))

    @property
    def variables(self) -> list[nnx.Variable[Any]]:
        return [node for node in self.held if isinstance(node, nnx.Variable)]

    def index_of(self, node: Any) -> int | None:
        """The place of an object among ``nodes``, if it is one."""
        return next((i for i, other in enumerate(self.nodes) if other is node), None)

    def changed(self, after: _Snapshot) -> list[int] | None:
        """The Variables that have another value afterwards; None if more than values has changed."""
        if self.paths != after.paths or not all(map(operator.is_, self.held, after.held)):
            return None
        if any(
            a.keys() != b.keys() or any(a[k] is not b[k] for k in a)
            for a, b in zip(self.metadata, after.metadata, strict=True)
        ):
            return None
        changed = []
        for index, values in enumerate(zip(self.values, after.values, strict=True)):
            (old, old_structure), (new, new_structure) = values
            same = old_structure == new_structure and all(map(operator.is_, old, new))
            if not same:
                changed.append(index)
        return changed


def _name_after(function: Any, fn: Any) -> None:
    """Makes errors of JAX's name the user's ``fn`` and its line, where they would name our ``function``."""
    function.__signature__ = inspect.signature(function)
    name = getattr(fn, "__name__", None)
    if isinstance(name, str):
        function.__name__ = name
    function.__wrapped__ = fn


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


@dataclass(frozen=True)
class _Kernel:
    """What takes the place of one convolution: a function of its operands that can be traced, hashed and explained.

    Attributes:
      component: ``"fwd"``, ``"bwd_input"`` or ``"bwd_weights"``: which the convolution is, of ``call``.
      call: the convolution in the forward direction; for gradients, with channels last.
      relu_input: see :func:`sparse_conv`.
      axes: for gradients, the orders in which their operands and their result are to be transposed.
      flip: for ``"bwd_input"``, whether the second operand is a flipped kernel.
    """

    component: str
    call: _Call
    relu_input: bool = False
    axes: tuple[tuple[int, ...], ...] = ()
    flip: bool = False

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        call, route = self.call, self.call.route
        if self.component == "fwd" or route is None:
            return call(first, second, self.relu_input)
        first, second = (
            lax.transpose(operand, axes) for operand, axes in zip((first, second), self.axes[:2], strict=True)
        )
        if self.component == "bwd_input":
            if self.flip:
                second = lax.rev(second, tuple(range(second.ndim - 2)))
            out = route.out(primitives.sparse_conv_bwd_input(route.lhs(first), route.rhs(second), spec=route.spec))
        else:
            out = primitives.sparse_conv_bwd_weights(route.lhs(first), route.lhs(second), spec=route.spec)
            out = out.reshape(out.shape[4 - second.ndim :])  # a single spatial dimension has a window of one row
        return lax.transpose(out, self.axes[2])


#: Primitives that are ours already: layers of ``fn`` may be ``SparseConv``.
_FWD, _BWD_WEIGHTS = "sparse_conv_fwd", "sparse_conv_bwd_weights"


def _forward(eqn: Any) -> _Call:
    """The convolution that an equation is, one of JAX's or one of ours."""
    lhs, rhs = (v.aval for v in eqn.invars)
    if eqn.primitive is lax.conv_general_dilated_p:
        return _plan(lhs, rhs, "auto", **_arguments(eqn.params))
    spec = eqn.params["spec"]
    return _plan(lhs, rhs, spec.mode, **_stock_arguments(spec))


def _stock_arguments(spec: ConvSpec) -> dict[str, Any]:
    """The parameters of JAX's own primitive for a convolution of ours."""
    return {
        "window_strides": spec.strides,
        "padding": spec.padding,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": _channels_last(4),
        "feature_group_count": 1,
        "batch_group_count": 1,
        "precision": spec.precision,
        "preferred_element_type": spec.result,
        "out_sharding": None,
    }


def _kernel_axes(eqn: Any) -> tuple[int, ...]:
    """The spatial dimensions of a convolution's second operand."""
    numbers = eqn.params.get("dimension_numbers")
    return (0, 1) if numbers is None else tuple(numbers[1][2:])


def _struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _arguments(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The arguments of ``jax.lax.conv_general_dilated`` in an equation's parameters."""
    names = (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count"),
        *("batch_group_count", "precision", "preferred_element_type", "out_sharding"),
    )
    return {**{name: params.get(name) for name in names}, **changes}


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    image = (0, rank - 1, *range(1, rank - 1))
    return lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *range(rank - 2)), image)


def _as_gradient(eqn: Any, flipped: bool) -> _Kernel | None:
    """A convolution as the gradient of another, which JAX expresses by permuted dimension numbers and dilation.

    Args:
      eqn: the convolution.
      flipped: whether its second operand is known to be a flipped kernel; the result then takes that kernel.

    Returns:
      None if it does not look like a gradient, or if sparse kernels do not compute it.
    """
    params, rank = eqn.params, eqn.invars[0].aval.ndim
    lhs, rhs = (v.aval for v in eqn.invars)
    ones = (1,) * (rank - 2)
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    if (
        tuple(params["window_strides"]) != ones
        or params["feature_group_count"] != 1
        or params["batch_group_count"] != 1
        or params.get("out_sharding") is not None
    ):
        return None
    size, window, result = (
        [aval.shape[axis] for axis in spec[2:]]
        for aval, spec in ((lhs, lhs_spec), (rhs, rhs_spec), (eqn.outvars[0].aval, out_spec))
    )
    if lhs.dtype != rhs.dtype or not all(isinstance(d, int) for d in (*size, *window, *result)):
        return None
    dilated = tuple(params["lhs_dilation"]) != ones
    low = [pads[0] for pads in params["padding"]]

    # Both sum over their leading dimension, the batch: kernel gradient, whose window is the output's gradient. Or an
    # ordinary convolution of CHWN, as its result then is, too; its window is small.
    undilated = tuple(params["rhs_dilation"]) == ones
    chwn = lhs_spec == out_spec and lhs_spec[0] == rank - 1
    ordinary = chwn and undilated and math.prod(window) < math.prod(result)
    if not dilated and lhs_spec[1] == 0 == rhs_spec[1] and not ordinary:
        component, strides = "bwd_weights", tuple(params["rhs_dilation"])
        inputs, kernel, output, top = size, result, window, low
        batch, in_features, features = lhs.shape[lhs_spec[1]], lhs.shape[lhs_spec[0]], rhs.shape[rhs_spec[0]]
        axes = (
            (lhs_spec[1], *lhs_spec[2:], lhs_spec[0]),
            (rhs_spec[1], *rhs_spec[2:], rhs_spec[0]),
            _inverse((*out_spec[2:], out_spec[0], out_spec[1])),
        )
    elif (dilated or flipped) and undilated:
        # The output's gradient, spread out by the strides, against the flipped kernel with features exchanged.
        component, strides = "bwd_input", tuple(params["lhs_dilation"])
        inputs, kernel, output, top = result, window, size, [w - 1 - p for w, p in zip(window, low, strict=True)]
        batch, in_features, features = lhs.shape[lhs_spec[0]], rhs.shape[rhs_spec[0]], rhs.shape[rhs_spec[1]]
        axes = (
            (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]),
            (*rhs_spec[2:], rhs_spec[0], rhs_spec[1]),
            _inverse((out_spec[0], *out_spec[2:], out_spec[1])),
        )
    else:
        return None
    # Of the paddings at the end that give this many outputs (strides make several do) the smallest.
    padding = tuple(
        (t, max((p - 1) * s + k - i - t, 0)) for t, p, s, k, i in zip(top, output, strides, kernel, inputs, strict=True)
    )
    if any(
        t < 0 or p < 1 or (i + t + b - k) // s + 1 != p
        for (t, b), p, s, k, i in zip(padding, output, strides, kernel, inputs, strict=True)
    ):
        return None
    call = _plan(
        _struct((batch, *inputs, in_features), lhs.dtype),
        _struct((*kernel, in_features, features), lhs.dtype),
        "auto",
        **_arguments(
            params,
            window_strides=strides,
            padding=padding,
            lhs_dilation=ones,
            rhs_dilation=ones,
            dimension_numbers=_channels_last(rank),
        ),
    )
    if call.route is None:
        return None
    return _Kernel(component, call, axes=axes, flip=component == "bwd_input" and not flipped)


@functools.lru_cache(maxsize=1024)
def _jaxpr_of(kernel: _Kernel, avals: tuple[Any, ...], context: Any) -> Any:
    with _compat.within(context, avals):
        return _compat.trace(lambda *operands: [kernel(*operands)], avals)


def _inlined(closed: Any, invars: Sequence[Any], eqn: Any) -> list[Any] | None:
    """The equations of ``closed``, applied to ``invars``, in place of ``eqn``; None if they cannot take its place."""
    jaxpr, (out,) = closed.jaxpr, eqn.outvars
    (result,) = jaxpr.outvars
    if closed.consts or not any(v is result for e in jaxpr.eqns for v in e.outvars):
        return None
    if result.aval.update(weak_type=False) != out.aval.update(weak_type=False):
        return None
    env: dict[Any, Any] = dict(zip(jaxpr.invars, invars, strict=True))
    env[result] = out

    def renamed(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom
        return env.setdefault(atom, core.Var(atom.aval))

    return [
        e.replace(
            invars=list(map(renamed, e.invars)),
            outvars=[v if isinstance(v, _compat.DropVar) else renamed(v) for v in e.outvars],
            source_info=eqn.source_info,
        )
        for e in jaxpr.eqns
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Walking through a jaxpr

#: Primitives that call one jaxpr with their operands, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
}

#: jaxpr -> what became of it, by the facts of its inputs. A jaxpr that JAX traced once and calls often is also
#: compiled once: so its rewritten form must be one and the same object each time.
_MEMO: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Walked:
    """What became of a jaxpr.

    Attributes:
      jaxpr: the new one; None if it need not change.
      facts: of its results.
      reports: on its convolutions.
    """

    jaxpr: Any
    facts: tuple[Facts, ...]
    reports: tuple[ConvReport, ...]


def _rewrite(closed: Any, explain: bool = False, reverse: bool = True) -> tuple[Any, tuple[ConvReport, ...]]:
    """``closed`` with our convolutions. Nothing is known of its arguments; for ``reverse`` see :meth:`_Walk.enter`."""
    walk = _Walk(explain, _takes_gradients(closed.jaxpr))
    arguments = [walk.outside(facts.of_type(aval), "an argument of fn") for aval in closed.in_avals]
    walked = walk.enter(closed, arguments, reverse)
    return walked.jaxpr or closed, walked.reports


def _takes_gradients(jaxpr: Any) -> bool:
    """Whether there is a kernel gradient among the convolutions: the function differentiates one itself."""
    memo = _MEMO.setdefault(jaxpr, {})
    if "takes gradients" not in memo:
        memo["takes gradients"] = any(
            (kernel := _as_gradient(eqn, False)) is not None and kernel.component == "bwd_weights"
            if eqn.primitive is lax.conv_general_dilated_p
            else eqn.primitive.name == _BWD_WEIGHTS or any(map(_takes_gradients, _compat.jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )
    return memo["takes gradients"]


class _Walk:
    """One pass through a function: facts are derived and convolutions replaced, equation by equation.

    Attributes:
      explain: make reports, and remember where facts come from.
      grad_inside: the function takes gradients itself; ``relu_input`` is not used, it could no longer help.
    """

    def __init__(self, explain: bool, grad_inside: bool) -> None:
        self.explain = explain
        self.grad_inside = grad_inside
        self._memo: Any = weakref.WeakKeyDictionary() if explain else _MEMO
        # Source line and scope of the equation whose jaxpr is walked through: what is in it may lack a line.
        self._place = ("?", source_info_util.new_name_stack())

    def outside(self, known: Facts, what: str) -> Facts:
        """Facts of a value that no equation makes."""
        return replace(known, why=Origin(what)) if self.explain else known

    def made_by(self, eqn: Any, operands: Sequence[Facts], results: Sequence[Facts]) -> Sequence[Facts]:
        """Facts of an equation's results, with where they come from if that is to be explained."""
        if not self.explain:
            return results
        body = eqn.params.get("call_jaxpr")
        name = eqn.primitive.name if body is None else body.jaxpr.debug_info.func_name.split(" ")[0]
        origin = Origin(name, self._source(eqn), tuple(operands), facts.rule_of(eqn.primitive))
        return [replace(f, why=origin) for f in results]

    def _source(self, eqn: Any) -> str:
        return _source(eqn) or self._place[0]

    def _scope(self, eqn: Any) -> str:
        return str(self._place[1] + eqn.source_info.name_stack)

    def enter(self, jaxpr: Any, known: Sequence[Facts], reverse: bool = True) -> _Walked:
        """Walk through a jaxpr, closed or not.

        Args:
          jaxpr: the jaxpr.
          known: facts of its inputs.
          reverse: whether gradients of convolutions in it may come to be asked for.
        """
        key = (tuple(known), reverse, self.grad_inside, self._place)
        memo = self._memo.setdefault(jaxpr, {})
        if key not in memo:
            memo[key] = self._walk(jaxpr, known, reverse)
        return memo[key]

    def _walk(self, jaxpr: Any, known: Sequence[Facts], reverse: bool) -> _Walked:
        is_closed = isinstance(jaxpr, core.ClosedJaxpr)
        inner, consts = (jaxpr.jaxpr, jaxpr.consts) if is_closed else (jaxpr, ())
        env: dict[Any, Facts] = dict(zip(inner.invars, known, strict=True))
        place = self._place

        def known_of(atom: Any) -> Facts:
            return facts.literal_facts(atom.val, atom.aval) if isinstance(atom, core.Literal) else env[atom]

        for var, value in zip(inner.constvars, consts, strict=False):
            env[var] = self.outside(facts.of_constant(value, var.aval), "a value that fn closes over")
        flips: dict[Any, Any] = {}  # variable -> the equation that flips a kernel into it
        eqns: list[Any] = []
        reports: list[ConvReport] = []

        for eqn in inner.eqns:
            operands = [known_of(atom) for atom in eqn.invars]
            enter = _ENTERED.get(eqn.primitive.name)
            report: Sequence[ConvReport] = ()
            if eqn.primitive is lax.conv_general_dilated_p or eqn.primitive.name == _FWD:
                new, report = self._convolution(eqn, operands, reverse, flips)
                results = self.made_by(eqn, operands, [facts.of_type(eqn.outvars[0].aval)])
            elif enter is not None:
                if self.explain:
                    self._place = (self._source(eqn), place[1] + eqn.source_info.name_stack)
                eqn, results, report = enter(self, eqn, operands, reverse)
                new = [eqn]
                self._place = place
            else:
                if eqn.primitive is lax.rev_p:
                    flips[eqn.outvars[0]] = eqn
                results = self.made_by(eqn, operands, facts.eqn_facts(eqn, operands))
                new = [eqn]
                if self.explain:
                    report = tuple(self._not_entered(eqn))
            eqns += new
            reports += report
            env.update(zip(eqn.outvars, results, strict=True))

        out = tuple(map(known_of, inner.outvars))
        if len(eqns) == len(inner.eqns) and all(map(operator.is_, eqns, inner.eqns)):
            return _Walked(None, out, tuple(reports))
        rewritten = inner.replace(eqns=eqns)
        return _Walked(core.ClosedJaxpr(rewritten, consts) if is_closed else rewritten, out, tuple(reports))

    # -- convolutions

    def _convolution(
        self, eqn: Any, operands: Sequence[Facts], reverse: bool, flips: dict[Any, Any]
    ) -> tuple[list[Any], list[ConvReport]]:
        """What takes the place of a convolution: new equations, or the old one; and a report."""
        invars = list(eqn.invars)
        relu_input = operands[0].qualifies and not operands[0].fixed and reverse and not self.grad_inside
        flip = None if relu_input or isinstance(invars[1], core.Literal) else flips.get(invars[1])
        if flip is not None and set(flip.params["dimensions"]) != set(_kernel_axes(eqn)):
            flip = None
        ours = eqn.primitive.name == _FWD
        promised = ours and eqn.params["spec"].relu_input
        kernel = None if ours else _as_gradient(eqn, flipped=flip is not None)
        if kernel is None:
            kernel = _Kernel("fwd", _forward(eqn), relu_input or promised)
        elif kernel.component == "bwd_input" and flip is not None:
            invars[1] = flip.invars[0]
        new = [eqn] if ours and not relu_input else None
        refusal = kernel.call.reason or "its type in the surrounding function cannot be kept"
        if kernel.call.route is not None and new is None:
            try:
                new = _inlined(_jaxpr_of(kernel, tuple(v.aval for v in invars), eqn.ctx), invars, eqn)
            except _compat.ShardingTypeError as error:  # of shardings that lax may keep
                refusal = str(error)
        if not self.explain:
            return new or [eqn], []
        return new or [eqn], [self._report(eqn, kernel, operands, refusal if new is None else None, reverse)]

    def _report(
        self, eqn: Any, kernel: _Kernel, operands: Sequence[Facts], refusal: str | None, reverse: bool
    ) -> ConvReport:
        """A report on a convolution: with ``refusal``, why it is not replaced."""
        replaced = refusal is None
        paths = dict(explain_call(*_forward_operands(eqn, kernel), kernel.call, relu_input=kernel.relu_input))
        if refusal is not None:
            paths = {name: Component("lax", refusal, {}) for name in paths}
        if kernel.component != "fwd":
            paths = {kernel.component: paths[kernel.component]}
        if self.grad_inside:
            proof = "fn takes a gradient itself, relu_input needs sparsify inside: jax.grad(st.sparsify(loss))"
        elif not replaced:
            proof = "computed by jax.lax"
        elif kernel.component != "fwd":
            proof = "a transposed convolution, or the gradient of one: relu_input is for convolutions"
        elif not reverse:
            proof = "in a loop that only forward mode differentiates, or in a function with a rule of its own"
        else:
            proof = _proof(operands[0])
        if kernel.relu_input and not operands[0].qualifies:
            proof = "promised by the layer"
        return ConvReport(
            self._source(eqn),
            self._scope(eqn),
            " * ".join(v.aval.str_short(short_dtypes=True) for v in eqn.invars),
            paths,
            kernel.relu_input and replaced,
            proof,
        )

    def _not_entered(self, eqn: Any) -> Iterator[ConvReport]:
        """Reports on convolutions that are left alone, inside primitives that ``sparsify`` does not know."""
        reason = f"inside {eqn.primitive.name}, which sparsify leaves alone"
        for jaxpr in _compat.jaxprs_in_params(eqn.params):
            for inner in jaxpr.eqns:
                if inner.primitive is lax.conv_general_dilated_p:
                    component = Component("lax", reason, {})
                    yield ConvReport(
                        self._source(inner),
                        self._scope(inner),
                        " * ".join(v.aval.str_short(short_dtypes=True) for v in inner.invars),
                        dict.fromkeys(("fwd", "bwd_input", "bwd_weights"), component),
                        False,
                        reason,
                    )
                else:
                    yield from self._not_entered(inner)

    # -- equations that hold jaxprs: each returns the equation, the facts of its results, and reports

    def _call(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """A jaxpr that is called with the equation's operands."""
        param = _CALLS[eqn.primitive.name]
        walked = self.enter(eqn.params[param], operands, reverse)
        if walked.jaxpr is None:
            return eqn, walked.facts, walked.reports
        changes = {param: walked.jaxpr}
        if eqn.params.get("policy") is not None:
            changes["policy"] = _Policy(eqn.params["policy"])
        return eqn.replace(params={**eqn.params, **changes}), walked.facts, walked.reports

    def _cond(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """One of several jaxprs: what is true of the results of each is true."""
        walks = [self.enter(branch, operands[1:], reverse) for branch in eqn.params["branches"]]
        results = tuple(functools.reduce(facts.meet, f) for f in zip(*(w.facts for w in walks), strict=True))
        branches = tuple(w.jaxpr or b for w, b in zip(walks, eqn.params["branches"], strict=True))
        reports = tuple(r for w in walks for r in w.reports)
        return _with(eqn, walks, branches=branches), results, reports

    def _scan(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """A loop: what is assumed of the carry must be true of its initial value and of what the body makes of it."""
        consts, carries = _compat.scan_sizes(eqn)
        head, carry, tail = operands[:consts], list(operands[consts : consts + carries]), operands[consts + carries :]
        while True:
            walked = self.enter(eqn.params["jaxpr"], [*head, *carry, *tail], reverse)
            weaker = [facts.widen(c, f) for c, f in zip(carry, walked.facts, strict=False)]
            if weaker == carry:
                break
            carry = weaker
        results = (*carry, *walked.facts[carries:])
        return _with(eqn, [walked], jaxpr=walked.jaxpr), results, walked.reports

    def _while(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """A loop that only forward mode differentiates: nothing is proven in it, and nothing of its results."""
        params = eqn.params
        names = ("cond_jaxpr", "body_jaxpr")
        walks = [self.enter(params[n], [facts.of_type(v) for v in params[n].in_avals], False) for n in names]
        changes = {n: w.jaxpr or params[n] for n, w in zip(names, walks, strict=True)}
        reports = tuple(r for w in walks for r in w.reports)
        return _with(eqn, walks, **changes), self._opaque(eqn, operands), reports

    def _custom_jvp(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """A function with a derivative of its own, which is kept. Convolutions in either have no gradient to mask."""
        body = eqn.params["call_jaxpr"]
        walked = self.enter(body, [facts.of_type(v) for v in body.in_avals], False)
        results = self.made_by(eqn, operands, facts.eqn_facts(eqn, operands))
        rule = eqn.params["jvp_jaxpr_fun"]
        changes = {"call_jaxpr": walked.jaxpr, "jvp_jaxpr_fun": _sparse_thunk(rule)}
        return _with(eqn, [walked], **changes), results, walked.reports

    def _custom_vjp(self, eqn: Any, operands: Sequence[Facts], reverse: bool) -> _Entered:
        """Likewise, with a rule in two parts."""
        params = eqn.params
        walked = self.enter(params["call_jaxpr"], [facts.of_type(v) for v in params["call_jaxpr"].in_avals], False)
        changes = {
            "call_jaxpr": walked.jaxpr,
            "fwd_jaxpr_thunk": _sparse_thunk(params["fwd_jaxpr_thunk"]),
            "bwd": _sparse_function(params["bwd"]),
        }
        return _with(eqn, [walked], **changes), self._opaque(eqn, operands), walked.reports

    def _opaque(self, eqn: Any, operands: Sequence[Facts]) -> Sequence[Facts]:
        """Facts of the results of an equation of which only the types are known, and whether gradients go in."""
        fixed = all(f.fixed for f in operands)
        results = [facts.fixed_facts(v.aval) if fixed else facts.of_type(v.aval) for v in eqn.outvars]
        return self.made_by(eqn, operands, results)


_Entered = tuple[Any, Sequence[Facts], tuple[ConvReport, ...]]

#: Primitives whose jaxprs are walked through, and how.
_ENTERED: dict[str, Callable[[_Walk, Any, Sequence[Facts], bool], _Entered]] = {
    **dict.fromkeys(_CALLS, _Walk._call),
    "cond": _Walk._cond,
    "scan": _Walk._scan,
    "while": _Walk._while,
    "custom_jvp_call": _Walk._custom_jvp,
    "custom_vjp_call": _Walk._custom_vjp,
}


def _with(eqn: Any, walks: Sequence[_Walked], **changes: Any) -> Any:
    """``eqn`` with other parameters if a jaxpr in it changed, else itself."""
    return eqn.replace(params={**eqn.params, **changes}) if any(w.jaxpr is not None for w in walks) else eqn


def _forward_operands(eqn: Any, kernel: _Kernel) -> tuple[Any, Any]:
    """Types of the operands of the convolution that ``kernel`` is, or is a gradient of."""
    lhs, rhs = (v.aval for v in eqn.invars)
    route = kernel.call.route
    if kernel.component == "fwd" or route is None:
        return lhs, rhs
    out = eqn.outvars[0].aval
    first, second = ([aval.shape[a] for a in axes] for aval, axes in zip((lhs, rhs), kernel.axes[:2], strict=True))
    result = [out.shape[a] for a in _inverse(kernel.axes[2])]
    if kernel.component == "bwd_input":
        return _struct(result, lhs.dtype), _struct(second, lhs.dtype)
    return _struct(first, lhs.dtype), _struct(result, lhs.dtype)


@dataclass(frozen=True)
class _Policy:
    """A policy of ``jax.checkpoint`` to which our convolution is one of JAX's.

    Attributes:
      policy: the user's.
    """

    policy: Callable[..., Any]

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name == _FWD:
            primitive, params = lax.conv_general_dilated_p, _stock_arguments(params["spec"])
        return self.policy(primitive, *avals, **params)


def _sparse_thunk(thunk: Any) -> Any:
    """A custom rule that JAX has yet to trace: a function that returns (jaxpr, constants, ...)."""

    def traced(*args: Any) -> Any:
        jaxpr, consts, *rest = thunk.call_wrapped(*args)
        closed, _ = _rewrite(core.ClosedJaxpr(jaxpr, consts), reverse=False)
        return (closed.jaxpr, closed.consts, *rest)

    return linear_util.wrap_init(traced, debug_info=thunk.debug_info)


def _sparse_function(function: Any) -> Any:
    """A custom rule that JAX calls with arrays and symbolic zeros."""

    def sparse(*args: Any) -> Any:
        with _nnx_context():
            traced = _trace(function.call_wrapped, args, {})
            return traced.evaluate(_rewrite(traced.jaxpr, reverse=False)[0])

    return linear_util.wrap_init(sparse, debug_info=function.debug_info)
