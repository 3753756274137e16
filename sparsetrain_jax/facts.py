"""What :func:`sparsetrain_jax.sparsify` proves about the values of a jaxpr, and the rules by which it does.

Two facts are tracked for every value (:class:`Facts`):

* it *qualifies*: wherever it is zero, its gradient is discarded upstream, inside the traced function. In other words,
  the function's own reverse-mode derivative maps every gradient that lives on the value's zeros only to zero. A
  convolution that reads such a value need not compute its input gradient there: this is ``relu_input``.
* it is *non-negative*: it has no negative element.

The first is a property of the way from the function's arguments *to* the value. Who else reads the value, and whether
the function returns it, does not matter: gradients of several readers add up, and each summand is discarded by itself.

A value that has no gradient (integers, constants, random numbers, ``stop_gradient``) qualifies trivially. Of such
values the *magnitude* of the elements that are not zero is tracked as well, because a product with a tiny number
underflows, and then is zero where its factors are not.

Rules are registered by :func:`_rule` under the names of JAX's primitives; :data:`RULES` is the table in
``docs/sparsify.md``. A primitive without a rule proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from . import _compat

__all__ = [
    "NOTHING",
    "RELU",
    "RULES",
    "Facts",
    "Origin",
    "Rule",
    "eqn_facts",
    "is_relu",
    "literal_facts",
    "meet",
    "of_constant",
    "of_type",
    "rule_of",
    "table",
    "widen",
]

_ANY_MAGNITUDE = (0.0, math.inf)

#: Factors and divisors may shrink a value at most this much, all together. In dtypes with float32's exponents, only
#: numbers below 2^-106 then underflow: as close to the smallest normal number as makes no difference to training.
_SMALLEST_FACTOR = 2.0**-20

#: Constants with more elements are not looked at when tracing.
_LARGEST_INSPECTED = 4096


@dataclass(frozen=True)
class Facts:
    """What is known about one value.

    Attributes:
      qualifies: wherever it is zero, its gradient is discarded upstream.
      nonnegative: it has no negative element.
      magnitude: None if the value may have a gradient. Otherwise (low, high), between which every element's absolute
        value lies that is not zero.
      shrunk: of a value that qualifies, what it has been multiplied by since its ReLU: at least this, at most 1.
      why: where the value comes from, if that is to be explained.
    """

    qualifies: bool = False
    nonnegative: bool = False
    magnitude: tuple[float, float] | None = None
    shrunk: float = 1.0
    why: Origin | None = field(default=None, compare=False, repr=False)

    @property
    def fixed(self) -> bool:
        """Whether the value is known to have no gradient."""
        return self.magnitude is not None


@dataclass(frozen=True)
class Origin:
    """Where a value comes from, for explanations.

    Attributes:
      name: of the primitive, of the function for a ``custom_jvp_call``, or what else the value is.
      source: the line that computes it; empty if no operation does.
      operands: facts of the operands.
      rule: the primitive's, if it has one.
    """

    name: str
    source: str = ""
    operands: tuple[Facts, ...] = ()
    rule: Rule | None = None


#: Nothing is known.
NOTHING = Facts()


def no_gradient(aval: Any) -> bool:
    """Whether values of this type have no gradient: integers, booleans, random keys."""
    dtype = getattr(aval, "dtype", None)
    return isinstance(aval, jax.core.ShapedArray) and dtype is not None and not jnp.issubdtype(dtype, jnp.inexact)


def fixed_facts(aval: Any, magnitude: tuple[float, float] = _ANY_MAGNITUDE, nonnegative: bool = False) -> Facts:
    """Facts of a value without gradient."""
    dtype = aval.dtype
    if dtype == jnp.bool_:
        return Facts(True, True, (1.0, 1.0))
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        low, high = max(magnitude[0], 1.0), min(magnitude[1], float(info.max) + 1)
        return Facts(True, nonnegative or info.min == 0, (low, high))
    return Facts(True, nonnegative, magnitude)


def of_type(aval: Any) -> Facts:
    """Facts of an argument or of an unknown operation's result, from its type alone."""
    return fixed_facts(aval) if no_gradient(aval) else NOTHING


def of_constant(value: Any, aval: Any) -> Facts:
    """Facts of a constant that the function closes over; a tracer may have a gradient elsewhere."""
    if isinstance(value, jax.core.Tracer) or not isinstance(aval, jax.core.ShapedArray):
        return of_type(aval)
    if math.prod(aval.shape) > _LARGEST_INSPECTED or not getattr(value, "is_fully_addressable", True):
        return fixed_facts(aval)
    return literal_facts(value, aval)


def literal_facts(value: Any, aval: Any) -> Facts:
    """Facts of a constant, from its elements."""
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended) or jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return Facts(True, False, _ANY_MAGNITUDE)
    array = np.abs(values := np.asarray(value, np.float64))
    nonzero = array[array != 0]
    if nonzero.size == 0:
        magnitude = (1.0, 1.0)
    elif np.isfinite(nonzero).all():
        magnitude = (float(nonzero.min()), float(nonzero.max()))
    else:
        magnitude = _ANY_MAGNITUDE
    return Facts(True, bool((values >= 0).all()), magnitude)


def meet(first: Facts, second: Facts) -> Facts:
    """What is true of a value that is one of two."""
    magnitude = None
    if first.magnitude is not None and second.magnitude is not None:
        magnitude = (min(first.magnitude[0], second.magnitude[0]), max(first.magnitude[1], second.magnitude[1]))
    # What fails is to blame; where neither does, what has a gradient leads to the proof.
    blame = second if first.qualifies and (first.fixed or not second.qualifies) else first
    return Facts(
        first.qualifies and second.qualifies,
        first.nonnegative and second.nonnegative,
        magnitude,
        min(first.shrunk, second.shrunk),
        why=blame.why,
    )


def widen(before: Facts, after: Facts) -> Facts:
    """``meet`` for loops, where it is repeated: what moves is given up, or may not move again, so that this ends."""
    facts = meet(before, after)
    if facts.fixed and facts.magnitude != before.magnitude:
        facts = replace(facts, magnitude=_ANY_MAGNITUDE)
    if facts.shrunk != before.shrunk:
        facts = replace(facts, shrunk=_SMALLEST_FACTOR)
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# Rules


@dataclass(frozen=True)
class Rule:
    """How the facts of one group of primitives' results follow from those of their operands.

    Attributes:
      primitives: names of the primitives.
      title: what they have in common, as in the documentation's table.
      qualifies: when results qualify.
      nonnegative: when they are non-negative.
      apply: equation and facts of its operands -> facts of its result, or of each of its results.
      hint: what to tell someone whose proof ends here.
    """

    primitives: tuple[str, ...]
    title: str
    qualifies: str
    nonnegative: str
    apply: Callable[[Any, Sequence[Facts]], Facts | list[Facts]]
    hint: str = ""


#: All rules, in the order of the documentation's table.
RULES: list[Rule] = []
_BY_NAME: dict[str, Rule] = {}


def _rule(
    *primitives: str, title: str, qualifies: str, nonnegative: str, hint: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        rule = Rule(primitives, title, qualifies, nonnegative, apply, hint)
        RULES.append(rule)
        _BY_NAME.update(dict.fromkeys(primitives, rule))
        return apply

    return register


def rule_of(primitive: Any) -> Rule | None:
    """The rule for a primitive, if it has one."""
    return _BY_NAME.get(primitive.name)


def eqn_facts(eqn: Any, facts: Sequence[Facts]) -> list[Facts]:
    """Facts of the results of a first-order equation, from those of its operands."""
    known: list[Facts] = []
    if (rule := _BY_NAME.get(eqn.primitive.name)) is not None:
        result = rule.apply(eqn, facts)
        known = [result] if isinstance(result, Facts) else result
    else:
        # Whatever has no operand with a gradient has none itself, unless something else flows in through a jaxpr.
        fixed = all(f.fixed for f in facts) and not _compat.jaxprs_in_params(eqn.params)
        known = [
            fixed_facts(v.aval) if isinstance(v.aval, jax.core.ShapedArray) and fixed else NOTHING for v in eqn.outvars
        ]
    return [
        of_type(v.aval) if no_gradient(v.aval) and not f.fixed else f for v, f in zip(eqn.outvars, known, strict=True)
    ]


def _all(facts: Sequence[Facts]) -> Facts:
    """Every element of the result is an element of one of the operands, and its gradient goes to that one."""
    result = facts[0]
    for other in facts[1:]:
        result = meet(result, other)
    return result


def _scaled(dtype: Any, value: Facts, low: float) -> Facts:
    """A value with a gradient, times numbers of at least ``low``: no (normal) number may become zero by that."""
    shrunk = value.shrunk * min(low, 1.0)
    enough = shrunk >= _SMALLEST_FACTOR and jnp.finfo(dtype).minexp <= jnp.finfo(jnp.float32).minexp
    if not (value.qualifies and (shrunk == 1 or enough)):
        return NOTHING
    return Facts(True, shrunk=shrunk)


@_rule(
    "custom_jvp_call",
    title="ReLU: a `jax.custom_jvp` function such as `jax.nn.relu`, `jax.nn.relu6`, recognised by its rule",
    qualifies="if it computes max(x, 0) (perhaps capped from above) and its derivative is a select on x > 0, else zero",
    nonnegative="likewise",
    hint="its rule is not a ReLU's",
)
def _custom_jvp(eqn: Any, facts: Sequence[Facts]) -> list[Facts]:
    if is_relu(eqn):
        return [Facts(True, True)]
    return [fixed_facts(v.aval) if all(f.fixed for f in facts) else NOTHING for v in eqn.outvars]


RELU = _BY_NAME["custom_jvp_call"]


@_rule(
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "copy", "tile", "slice"),
    *("split", "name", "optimization_barrier", "device_put", "sharding_constraint", "reshard", "mesh_cast"),
    *("pvary", "pcast"),
    title="Moving and copying elements",
    qualifies="if the operand does",
    nonnegative="if the operand is",
)
def _move(eqn: Any, facts: Sequence[Facts]) -> list[Facts]:
    return list(facts) if len(facts) == len(eqn.outvars) else [facts[0]] * len(eqn.outvars)


@_rule(
    *("dynamic_slice", "gather"),
    title="Picking elements by index",
    qualifies="if the operand does; a fill value has no gradient",
    nonnegative="if the operand is, and no fill value is given",
)
def _pick(eqn: Any, facts: Sequence[Facts]) -> Facts:
    operand = facts[0]
    if eqn.params.get("fill_value") is None:  # out of bounds is NaN or undefined, neither of which counts
        return operand
    return replace(operand, nonnegative=False, magnitude=_ANY_MAGNITUDE if operand.fixed else None)


@_rule(
    *("concatenate", "stack", "pad"),
    title="Joining arrays, and padding with any value",
    qualifies="if every operand does",
    nonnegative="if every operand is",
)
def _join(eqn: Any, facts: Sequence[Facts]) -> Facts:
    return _all(facts)


@_rule(
    "dynamic_update_slice",
    title="Writing a slice",
    qualifies="if both arrays do",
    nonnegative="if both are",
)
def _write(eqn: Any, facts: Sequence[Facts]) -> Facts:
    return _all(facts[:2])


@_rule(
    "select_n",
    title="Choosing elements by a predicate, as `jnp.where` and Flax's Dropout do",
    qualifies="if every case does",
    nonnegative="if every case is",
    hint="every case must qualify",
)
def _select(eqn: Any, facts: Sequence[Facts]) -> Facts:
    return _all(facts[1:])


@_rule(
    *("reduce_window_max", "reduce_max"),
    title="Max-pooling: a window's gradient goes to elements that equal its maximum",
    qualifies="if the operand does",
    nonnegative="if the operand is and no window lies in the padding",
)
def _max_pool(eqn: Any, facts: Sequence[Facts]) -> Facts:
    params = eqn.params
    if 0 in eqn.invars[0].aval.shape:
        inside = False
    elif eqn.primitive.name == "reduce_max":
        inside = True
    else:
        inside = all(
            max(pads) < window and 1 == base == dilation
            for pads, window, base, dilation in zip(
                *(params[k] for k in ("padding", "window_dimensions", "base_dilation", "window_dilation")), strict=True
            )
        )
    (operand,) = facts
    return replace(operand, nonnegative=operand.nonnegative and inside, magnitude=operand.magnitude and _ANY_MAGNITUDE)


@_rule(
    *("max", "min"),
    title="The larger or smaller of two: at ties each gets half of the gradient",
    qualifies="if both operands do (so `jnp.maximum(x, 0)` does not make a value qualify)",
    nonnegative="if both operands are, for max if one is",
    hint="jax.numpy.maximum(x, 0) passes half of the gradient at x = 0; use jax.nn.relu",
)
def _max_min(eqn: Any, facts: Sequence[Facts]) -> Facts:
    result = _all(facts)
    if eqn.primitive.name == "max" and any(f.nonnegative for f in facts):
        return replace(result, nonnegative=True)
    return result


@_rule(
    "convert_element_type",
    title="Casts to a floating-point type that holds all values of the old one",
    qualifies="if the operand does; narrowing casts do not keep it (1e-8 becomes 0 in float16)",
    nonnegative="if the operand is, in narrowing casts too",
    hint="a narrowing cast turns small numbers into zeros that ReLU does not know of; cast before the ReLU",
)
def _cast(eqn: Any, facts: Sequence[Facts]) -> Facts:
    (operand,) = facts
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(new, jnp.floating):
        return of_type(eqn.outvars[0].aval)
    if operand.magnitude is not None:
        return Facts(True, operand.nonnegative, _representable(new, *operand.magnitude))
    if not jnp.issubdtype(old, jnp.floating):
        return NOTHING
    before, after = jnp.finfo(old), jnp.finfo(new)
    wider = after.minexp <= before.minexp and after.nmant >= before.nmant
    return replace(operand, qualifies=operand.qualifies and wider)


@_rule(
    "neg",
    title="Change of sign",
    qualifies="if the operand does",
    nonnegative="never",
)
def _neg(eqn: Any, facts: Sequence[Facts]) -> Facts:
    return replace(facts[0], nonnegative=False)


@_rule(
    "mul",
    title="Products with a constant, or with a mask or other factor that has no gradient",
    qualifies="if the operand does and the factor's elements are zero or at least 2^-20 in magnitude (1 in float16); "
    "all factors since the ReLU together",
    nonnegative="if both factors are",
    hint="the other factor has a gradient, or may be so small that the product underflows",
)
def _mul(eqn: Any, facts: Sequence[Facts]) -> Facts:
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return of_type(eqn.outvars[0].aval)
    first, second = facts
    nonnegative = first.nonnegative and second.nonnegative
    if first.magnitude and second.magnitude:
        return fixed_facts(eqn.outvars[0].aval, _product(dtype, first.magnitude, second.magnitude), nonnegative)
    value, factor = (first, second) if second.fixed else (second, first)
    scaled = _scaled(dtype, value, factor.magnitude[0]) if factor.magnitude else NOTHING
    return replace(scaled, nonnegative=nonnegative)


def _representable(dtype: Any, low: float, high: float) -> tuple[float, float]:
    """(low, high), without a bound where numbers of that size may over- or underflow in ``dtype``."""
    info = jnp.finfo(dtype)
    return (low if low >= float(info.smallest_normal) else 0.0, high if high <= float(info.max) else math.inf)


def _product(dtype: Any, first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return _representable(dtype, first[0] * second[0], first[1] * second[1])


@_rule(
    "div",
    title="Quotients by a constant or other divisor that has no gradient",
    qualifies="if the operand does and the divisor's magnitude is at most 2^20 (1 in float16); as for factors",
    nonnegative="if both are",
    hint="the divisor has a gradient, or may be so large that the quotient underflows",
)
def _div(eqn: Any, facts: Sequence[Facts]) -> Facts:
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return of_type(eqn.outvars[0].aval)
    value, divisor = facts
    nonnegative = value.nonnegative and divisor.nonnegative
    if divisor.magnitude is None:
        return Facts(False, nonnegative)
    low, high = divisor.magnitude
    inverse = (1 / high if high else math.inf, 1 / low if low else math.inf)
    if value.magnitude is not None:
        return fixed_facts(eqn.outvars[0].aval, _product(dtype, value.magnitude, inverse), nonnegative)
    return replace(_scaled(dtype, value, inverse[0]), nonnegative=nonnegative)


@_rule(
    *("add", "add_any"),
    title="Sums of values",
    qualifies="if every operand qualifies and is non-negative: values of both signs can cancel",
    nonnegative="if every operand is, and integers are unsigned (signed ones may wrap around)",
    hint="every operand must qualify and be non-negative",
)
def _add(eqn: Any, facts: Sequence[Facts]) -> Facts:
    result = _all(facts)
    if result.magnitude is not None:
        return _fixed_sum(eqn, _magnitude_of_sum(eqn, facts), result.nonnegative)
    return replace(result, qualifies=result.qualifies and result.nonnegative)


@_rule(
    "sub",
    title="Differences of values without gradient",
    qualifies="always; of other values never: they can cancel",
    nonnegative="never",
    hint="values that have a gradient can cancel",
)
def _sub(eqn: Any, facts: Sequence[Facts]) -> Facts:
    if all(f.fixed for f in facts):
        return _fixed_sum(eqn, _magnitude_of_sum(eqn, facts), False)
    return of_type(eqn.outvars[0].aval)


def _magnitude_of_sum(eqn: Any, facts: Sequence[Facts]) -> tuple[float, float]:
    """Of sums and differences of values without gradient: what cancels may leave anything near zero."""
    dtype = eqn.outvars[0].aval.dtype
    high = math.fsum(f.magnitude[1] for f in facts if f.magnitude is not None)
    return _representable(dtype, 0.0, high) if jnp.issubdtype(dtype, jnp.floating) else _ANY_MAGNITUDE


@_rule(
    *("reduce_sum", "reduce_window_sum", "cumsum"),
    title="Sums over dimensions and windows: average pooling",
    qualifies="if the operand qualifies and is non-negative",
    nonnegative="if the operand is, and integers are unsigned",
    hint="the operand must qualify and be non-negative",
)
def _sum(eqn: Any, facts: Sequence[Facts]) -> Facts:
    (operand,) = facts
    if operand.magnitude is not None:
        low, high = operand.magnitude
        high *= _terms_of_sum(eqn)
        magnitude = (low, high) if operand.nonnegative and math.isfinite(high) else _ANY_MAGNITUDE
        return _fixed_sum(eqn, magnitude, operand.nonnegative)
    return replace(operand, qualifies=operand.qualifies and operand.nonnegative)


def _fixed_sum(eqn: Any, magnitude: tuple[float, float], nonnegative: bool) -> Facts:
    """Facts of a sum without gradient. Signed integers may wrap around."""
    aval = eqn.outvars[0].aval
    wraps = jnp.issubdtype(aval.dtype, jnp.integer)
    return fixed_facts(aval, _ANY_MAGNITUDE if wraps else magnitude, nonnegative and not wraps)


def _terms_of_sum(eqn: Any) -> int:
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if "window_dimensions" in params:
        return math.prod(params["window_dimensions"])
    return math.prod(shape[axis] for axis in params.get("axes", (params.get("axis"),)))


@_rule(
    "stop_gradient",
    title="`jax.lax.stop_gradient`: no gradient at all",
    qualifies="always",
    nonnegative="if the operand is",
)
def _stop(eqn: Any, facts: Sequence[Facts]) -> Facts:
    return fixed_facts(eqn.outvars[0].aval, facts[0].magnitude or _ANY_MAGNITUDE, facts[0].nonnegative)


# ---------------------------------------------------------------------------------------------------------------------
# ReLU, by its rule


def is_relu(eqn: Any) -> bool:
    """Whether a ``custom_jvp_call`` is a ReLU: what it computes and how it is differentiated, whatever its name.

    It must compute ``max(x, 0)``, the same capped by a positive constant, or ``select(x > 0, x, 0)``; its derivative
    must select zero wherever not ``x > 0``. Then the result is zero exactly where its derivative is.
    """
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1 or eqn.params.get("num_consts"):
        return False
    aval = eqn.invars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.floating) or aval.shape != eqn.outvars[0].aval.shape:
        return False
    body = eqn.params["call_jaxpr"]
    if not _positive_where_x_is(_terms(body.jaxpr, body.consts, [_X])[0]):
        return False
    try:
        with _compat.within(eqn.ctx, [aval]):
            rule, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(False)
    except Exception:  # the user's rule; if it is needed, JAX reports what is wrong with it
        return False
    if list(zeros) != [False]:
        return False
    result, tangent = _terms(rule, consts, [_X, _TANGENT])
    return (
        _positive_where_x_is(result)
        and tangent[0] == "select_n"
        and tangent[2] == _ZERO
        and _implies_positive_x(tangent[1])
    )


# Terms are nested tuples: an operation's name and its operands.
_X, _TANGENT, _ZERO = ("x",), ("tangent",), ("constant", 0.0)


def _positive_where_x_is(term: Any) -> bool:
    """Whether a term is positive where x > 0, and zero elsewhere."""
    name, *operands = term
    if name == "select_n":
        return operands[1] == _ZERO and operands[2] == _X and _implies_positive_x(operands[0], exactly=True)
    if name == "max":
        return _ZERO in operands and any(o == _X or _capped(o, _X) for o in operands)
    return any(_positive_where_x_is(o) and _capped(term, o) for o in operands if name == "min")


def _capped(term: Any, inner: Any) -> bool:
    """Whether a term is the minimum of ``inner`` and a positive constant."""
    name, *operands = term
    return name == "min" and inner in operands and any(o[0] == "constant" and o[1] > 0 for o in operands)


def _implies_positive_x(term: Any, exactly: bool = False) -> bool:
    """Whether a predicate implies x > 0 (``exactly``: is x > 0)."""
    if term in (("gt", _X, _ZERO), ("lt", _ZERO, _X)):
        return True
    return not exactly and term[0] == "and" and any(map(_implies_positive_x, term[1:]))


def _terms(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr as terms of its arguments; inner functions expanded, elementwise all along.

    Whatever is not understood becomes a term that equals no other.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    env.update((v, _constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Any:
        return _constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        operands, name, out = [read(a) for a in eqn.invars], eqn.primitive.name, eqn.outvars[0]
        inner = eqn.params.get({"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}.get(name, ""))
        if inner is not None:
            env.update(zip(eqn.outvars, _terms(inner.jaxpr, inner.consts, operands), strict=True))
        elif name in _IDENTITIES:
            env[out] = _same_or_constant(eqn.invars[0].aval, out.aval, operands[0])
        elif name == "transpose":
            env[out] = _transposed(tuple(map(int, eqn.params["permutation"])), operands[0])
        elif name in ("max", "min", "gt", "lt", "and", "select_n"):
            env[out] = _elementwise(name, operands)
        else:
            env.update((v, (object(),)) for v in eqn.outvars)
    return [read(v) for v in jaxpr.outvars]


def _transposed(axes: tuple[int, ...], term: Any) -> Any:
    if term[0] == "constant":
        return term
    if term[0] == "transpose":
        axes, term = tuple(term[1][a] for a in axes), term[2]
    return term if axes == tuple(range(len(axes))) else ("transpose", axes, term)


def _elementwise(name: str, operands: Sequence[Any]) -> Any:
    """The transposition of an operation rather than an operation on transposed operands: ``vmap`` makes those."""
    arrays = [o for o in operands if o[0] != "constant"]
    axes = {o[1] if o[0] == "transpose" else None for o in arrays}
    if len(axes) == 1 and None not in axes:
        inner = [o if o[0] == "constant" else o[2] for o in operands]
        return _transposed(arrays[0][1], (name, *inner))
    return (name, *operands)


#: Primitives that return their operand, but for its shape and type.
_IDENTITIES = ("broadcast_in_dim", "convert_element_type", "copy", "pcast", "pvary", "reshape")


def _same_or_constant(before: Any, after: Any, term: Any) -> Any:
    """Constants may be broadcast and cast; everything else has to stay what it is."""
    if term[0] == "constant":
        return _constant(np.asarray(term[1]).astype(after.dtype))
    return term if before.shape == after.shape and before.dtype == after.dtype else (object(),)


def _constant(value: Any) -> Any:
    """A number, or an array that holds one, as a term."""
    if isinstance(value, jax.core.Tracer) or np.size(value) != 1:
        return (object(),)
    dtype = np.asarray(value).dtype
    known = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return ("constant", float(np.asarray(value).reshape(()))) if known else (object(),)


def table() -> list[tuple[str, str, str, str]]:
    """The rules as rows of the documentation's table: operation, primitives, qualifies, non-negative."""
    return [(r.title, ", ".join(f"`{name}`" for name in r.primitives), r.qualifies, r.nonnegative) for r in RULES]
