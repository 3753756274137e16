"""``sparsify``: what it replaces, what it proves, that nothing else changes, and what it reports."""

from __future__ import annotations

import functools
import gc
import inspect
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as hs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import sparsetrain_jax as st
from sparsetrain_jax import _compat, facts, transform

NHWC = ("NHWC", "HWIO", "NHWC")
TABLE = np.array([1, 2, 3])


def integers(seed: int, *shape: int, zeros: float = 0.3, dtype: Any = jnp.float32) -> jax.Array:
    """-1, 0 and 1: sums of their products are exact in whatever order, and often exactly zero."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.choice([-1, 1], shape) * (rng.random(shape) >= zeros), dtype)


def conv(x: jax.Array, w: jax.Array, strides: int = 1, padding: Any = "SAME", **arguments: Any) -> jax.Array:
    return lax.conv_general_dilated(x, w, (strides, strides), padding, dimension_numbers=NHWC, **arguments)


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a jaxpr, each followed by those inside it."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for inner in _compat.jaxprs_in_params(eqn.params):
            found += equations(inner)
    return found


def names(fun: Callable[..., Any], *args: Any) -> list[str]:
    """Names of all primitives in ``fun``'s jaxpr."""
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fun)(*args).jaxpr)]


def proven(fun: Callable[..., Any], *args: Any) -> list[bool]:
    """Of each convolution, whether ``relu_input`` was proven."""
    return [report.relu_input for report in st.sparsify(fun, explain=True)(*args)]


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    """``fun`` under jit, compiled in a hurry: these functions run once."""
    return jax.jit(fun, compiler_options={"xla_backend_optimization_level": 0})


def assert_same_gradients(fun: Callable[..., jax.Array], *args: Any) -> None:
    """The gradients of the sparse function, for all arguments, equal those of the function in every bit."""

    def both(*args: Any) -> tuple[Any, Any]:
        which = tuple(range(len(args)))
        return jax.grad(st.sparsify(fun), which)(*args), jax.grad(fun, which)(*args)

    assert_equal(*compiled(both)(*args))


X = integers(0, 2, 6, 6, 4)
W = integers(1, 3, 3, 4, 4)
V = integers(2, 3, 3, 8, 4)
SQUARE = integers(3, 4, 4)
KEY = jax.random.key(0)


def energy(y: jax.Array) -> jax.Array:
    """A number whose derivatives for the elements of ``y`` are various small integers."""
    return jnp.sum(y * (jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) % 5 - 2))


# ---------------------------------------------------------------------------------------------------------------------
# What is proven


def chain(
    between: Callable[[jax.Array], jax.Array], second: Callable[[jax.Array, jax.Array], jax.Array] = conv
) -> Callable[..., jax.Array]:
    """A convolution, ``between``, and a ``second`` one, whose proof depends on ``between``."""

    def fun(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        h = between(conv(x, w))
        return energy(second(h, v[:, :, : h.shape[-1]]))

    return fun


relu = jax.nn.relu


@jax.custom_jvp
def own_relu(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 0)


own_relu.defjvps(lambda t, ans, x: jnp.where((x > 0) & (x < 4), t, 0))


def max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def enlarge(x: jax.Array) -> jax.Array:
    return x.repeat(2, 1).repeat(2, 2)


PROVEN = {
    "relu": relu,
    "relu6": jax.nn.relu6,
    "own relu, its derivative zero not only for x <= 0": own_relu,
    "relu under jit": jax.jit(relu),
    "relu under vmap": jax.vmap(relu),
    "relu under vmap of the last axis": jax.vmap(relu, -1, -1),
    "relu under checkpoint": jax.checkpoint(relu),
    "max-pool": lambda x: max_pool(relu(x)),
    "max-pool that overlaps": lambda x: nn.max_pool(relu(x), (3, 3), strides=(1, 1), padding="SAME"),
    "max-pool of values that are not positive": lambda x: max_pool(-relu(x)),
    "maximum over a dimension": lambda x: relu(x).max(1, keepdims=True),
    "average-pool": lambda x: nn.avg_pool(relu(x), (2, 2), strides=(2, 2)),
    "average-pool without counting padding": lambda x: nn.avg_pool(
        relu(x), (2, 2), strides=(1, 1), padding=((0, 1), (0, 1)), count_include_pad=False
    )[:, 1::2, 1::2],
    "mean over a dimension": lambda x: relu(x)[:, :4].mean(1, keepdims=True),
    "sum of two": lambda x: relu(x) + relu(-x),
    "sum with a positive constant": lambda x: relu(x) + 1,
    "cumulative sum": lambda x: jnp.cumsum(relu(x), 1),
    "reshape and transpose": lambda x: relu(x).reshape(2, 3, 12, 4).transpose(0, 2, 1, 3),
    "slices and reversal": lambda x: relu(x)[:, 1:5, ::-1, :],
    "gather": lambda x: jnp.take(relu(x), jnp.array([3, 1, 1]), axis=1),
    "dynamic slice": lambda x: lax.dynamic_slice_in_dim(relu(x), 1, 3, 1),
    "dynamic update": lambda x: lax.dynamic_update_slice(relu(x), relu(-x)[:, :3], (0, 1, 0, 0)),
    "zero padding": lambda x: jnp.pad(relu(x), ((0, 0), (1, 2), (0, 1), (0, 0))),
    "reflected padding": lambda x: jnp.pad(relu(x), ((0, 0), (1, 2), (0, 1), (0, 0)), "reflect"),
    "concatenation": lambda x: jnp.concatenate([relu(x), enlarge(max_pool(relu(-x)))], -1),
    "concatenation with constants": lambda x: jnp.concatenate([relu(x), jnp.full_like(x, -1)], -1),
    "split": lambda x: jnp.split(relu(x), 2, -1)[1],
    "tile": lambda x: jnp.tile(relu(x), (1, 2, 1, 1)),
    "dropout": lambda x: nn.Dropout(0.5, deterministic=False).apply({}, relu(x), rngs={"dropout": KEY}),
    "dropout by a product": lambda x: relu(x) * jax.random.bernoulli(KEY, 0.5, x.shape) / 0.5,
    "dropout by a difference": lambda x: relu(x) * (x > 1) / (1 - lax.stop_gradient(0.75)),
    "mask made of the values themselves": lambda x: relu(x) * (x > 1),
    "where": lambda x: jnp.where(x > 1, relu(x), 0),
    "where between two": lambda x: jnp.where(x > 1, relu(x), relu(-x)),
    "constant factors": lambda x: relu(x) * 4 / 2,
    "a negative factor": lambda x: relu(x) * -2,
    "maximum of two": lambda x: jnp.maximum(relu(x), relu(-x)),
    "minimum with a constant": lambda x: jnp.minimum(relu(x), 3),
    "sum with a value without gradient": lambda x: relu(x) + lax.stop_gradient(relu(-x)),
    "a wider dtype": lambda x: relu(x.astype(jnp.bfloat16)).astype(jnp.float32),
    "checkpoint_name": lambda x: checkpoint_name(relu(x), "h"),
    "optimization_barrier": lambda x: lax.optimization_barrier(relu(x)),
    "cond": lambda x: lax.cond(x.sum() > 0, max_pool, lambda h: h[:, ::2, ::2], relu(x)),
    "scan": lambda x: lax.scan(lambda h, _: (enlarge(max_pool(h))[..., ::-1], None), relu(x), length=2)[0],
    "a factor that does not add up in a loop": lambda x: lax.scan(
        lambda h, _: (relu(h) * 0.5 + 1, None), relu(x), length=2
    )[0],
    "scan over slices": lambda x: lax.scan(lambda _, h: (None, max_pool(h)), None, relu(x)[None])[1][0],
    "a reader besides the convolution": lambda x: (h := relu(x)) + enlarge(max_pool(h)),
}


@pytest.mark.parametrize("name", PROVEN)
def test_the_proof_holds_and_gradients_are_those_of_the_function(name: str) -> None:
    fun = chain(PROVEN[name])
    assert proven(fun, X, W, V) == [False, True]
    assert "sparse_conv_bwd_input_masked" in names(jax.grad(st.sparsify(fun)), X, W, V)
    assert_same_gradients(fun, X, W, V)


def relu_by_name_only() -> Callable[[jax.Array], jax.Array]:
    @jax.custom_jvp
    def relu(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0)

    relu.defjvps(lambda t, ans, x: jnp.where(x >= 0, t, 0))
    return relu


@jax.custom_jvp
def shifted_relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 1) - 1


shifted_relu.defjvps(lambda t, ans, x: jnp.where(x > 0, t, 0))


@jax.custom_vjp
def straight_through_relu(x: jax.Array) -> jax.Array:
    return relu(x)


straight_through_relu.defvjp(lambda x: (relu(x), None), lambda _, g: (g,))

#: The promise is false for all of these.
FALSE = {
    "identity": lambda x: x,
    "maximum(x, 0)": lambda x: jnp.maximum(x, 0),
    "clip(x, 0, 6)": lambda x: jnp.clip(x, 0, 6),
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.5),
    "a polynomial": lambda x: x * x + x,
    "a function named relu with another rule": relu_by_name_only(),
    "a relu's rule with another function": shifted_relu,
    "a custom_vjp that computes relu": straight_through_relu,
    "relu minus a constant": lambda x: relu(x) - 1,
    "difference": lambda x: relu(x) - relu(x[..., ::-1]),
    "sum with signed values": lambda x: relu(x) + x[..., ::-1],
    "sum with a negative factor": lambda x: relu(x) + relu(x[..., ::-1]) * -1,
    "average of signed values": lambda x: nn.avg_pool(-relu(x) + 2 * relu(x[..., ::-1]), (2, 2), strides=(2, 2)),
    "sum over a negated part": lambda x: (relu(x) * jnp.array([1.0, -1.0, 1.0, -1.0])).sum(3, keepdims=True),
    "cumulative sum of signed values": lambda x: jnp.cumsum(relu(x) - relu(x[..., ::-1]), 1),
    "gate with a gradient": lambda x: relu(x) * (x[..., ::-1] + 1),
    "relu as the gate of signed values": lambda x: (relu(x) - 1) * relu(x[..., ::-1]),
    "where with a signed branch": lambda x: jnp.where(x[..., ::-1] > 0, relu(x), x),
    "where that makes zeros look like others": lambda x: jnp.where(x == 1, 0, x),
    "maximum with signed values": lambda x: jnp.maximum(relu(x) - 1, x),
    "concatenation with signed values": lambda x: jnp.concatenate([relu(x), x], -1),
    "padding with a value that has a gradient": lambda x: lax.pad(
        relu(x), x[0, 0, 0, 0] - lax.stop_gradient(x[0, 0, 0, 0]), [(0, 0, 0), (1, 0, 0), (1, 0, 0), (0, 0, 0)]
    ),
    "writing signed values": lambda x: lax.dynamic_update_slice(relu(x), x[:, :3], (0, 1, 0, 0)),
    "matrix product": lambda x: jnp.einsum("nhwc,cd->nhwd", relu(x), SQUARE),
    "scatter": lambda x: relu(x).at[:, 0].add(x[:, 1]),
    "cond with a signed branch": lambda x: lax.cond(x.sum() > 1e9, relu, lambda x: x, x),
    "scan with a carry that becomes signed": lambda x: lax.scan(lambda h, _: (h - 1, None), relu(x), length=2)[0],
    "scan with a signed initial carry": lambda x: lax.scan(lambda h, _: (h, None), x, length=1)[0],
    "fori_loop": lambda x: lax.fori_loop(0, 2, lambda i, h: h - 1, relu(x)),
    "sorted signed values": lambda x: jnp.sort(x, 1),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_promise_is_not_proven_and_would_change_gradients(name: str) -> None:
    fun = chain(FALSE[name])
    assert proven(fun, X, W, V) == [False, False]
    assert_same_gradients(fun, X, W, V)
    promised = chain(FALSE[name], lambda h, v: st.sparse_conv(h, v, relu_input=True))
    got, want = compiled(lambda *args: [jax.grad(f, (0, 1))(*args) for f in (promised, fun)])(X, W, V)
    assert any((g != w).any() for g, w in zip(got, want, strict=True)), "the promise is true after all"


UNDERFLOWS = {
    "narrowing cast": (jnp.float32, lambda h: h.astype(jnp.float16)),
    "cast down and up": (jnp.float32, lambda h: h.astype(jnp.float16).astype(jnp.float32)),
    "tiny factor": (jnp.float32, lambda h: h * 1e-35),
    "tiny factor in an array": (jnp.float32, lambda h: h * jnp.full(h.shape[-1:], 1e-35)),
    "huge divisor": (jnp.float32, lambda h: h / 1e35),
    "huge difference as a divisor": (jnp.float32, lambda h: h / (1e35 - lax.stop_gradient(0.75))),
    "difference that nothing is known of": (jnp.float32, lambda h: h * (1e-35 - lax.stop_gradient(h * 1e-36))),
    "factor below 1 in float16": (jnp.float16, lambda h: h * jnp.float16(0.5)),
    "average in float16": (jnp.float16, lambda h: nn.avg_pool(h, (2, 2), strides=(2, 2))),
    "factors that are tiny together": (jnp.float32, lambda h: functools.reduce(lambda h, _: h * 2.0**-20, range(7), h)),
    "factors that add up in a loop": (
        jnp.float32,
        lambda h: lax.scan(lambda h, _: (h * 0.5, None), h, length=130)[0],
    ),
    "float that nothing is known of": (jnp.float32, lambda h: h * lax.stop_gradient(h * 1e-30)),
}


@pytest.mark.parametrize("name", UNDERFLOWS)
def test_what_makes_zeros_of_small_numbers_is_not_proven(name: str) -> None:
    dtype, between = UNDERFLOWS[name]
    fun = chain(lambda x: between(relu(x)), lambda h, v: conv(h, v.astype(h.dtype)))
    assert proven(fun, X.astype(dtype), W.astype(dtype), V) == [False, False]
    if dtype == jnp.float32:
        # Small numbers come out as zeros, while relu passes their gradient.
        h = between(relu(jnp.full(X.shape, 1e-8 if "cast" in name else 1e-7)))
        assert not h.astype(jnp.float32).any()


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))


#: Where ReLU and convolution are, one inside the other or both.
INSIDE = {
    "jit": lambda x, w: jax.jit(conv)(relu(x), w),
    "checkpoint": lambda x, w: jax.checkpoint(lambda x, w: conv(relu(x), w))(x, w),
    "checkpoint around the convolution": lambda x, w: jax.checkpoint(conv)(relu(x), w),
    "cond": lambda x, w: lax.cond(x.sum() > 0, conv, lambda h, w: conv(h, -w), relu(x), w)[..., :2],
    "scan": lambda x, w: lax.scan(lambda h, _: (relu(conv(h, w)), None), relu(x), length=2)[0],
    "scan with relu in it": lambda x, w: lax.scan(lambda h, _: (conv(relu(h), w), None), x, length=2)[0],
    "scan over kernels": lambda x, w: lax.scan(
        lambda h, w: (max_pool(enlarge(relu(conv(h, w)))), None), relu(x), w[None]
    )[0],
    "vmap": lambda x, w: jax.vmap(lambda x: conv(relu(x), w), 1, 1)(jnp.stack([x, -x], 1)),
    "shard_map": lambda x, w: jax.shard_map(
        lambda x, w: conv(relu(x), w),
        mesh=mesh(),
        in_specs=(PartitionSpec("devices"), PartitionSpec()),
        out_specs=PartitionSpec("devices"),
    )(x, w),
    "scan in checkpoint in jit": jax.jit(
        jax.checkpoint(lambda x, w: lax.scan(lambda h, _: (relu(conv(h, w)), None), relu(x), length=2)[0])
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_the_proof_reaches_into_other_transformations(name: str) -> None:
    fun = lambda x, w: energy(INSIDE[name](x, w))  # noqa: E731
    assert all(proven(fun, X, W))
    assert "sparse_conv_bwd_input_masked" in names(jax.grad(st.sparsify(fun)), X, W)
    assert_same_gradients(fun, X, W)


def test_a_carry_that_stops_qualifying_is_noticed_after_any_number_of_rounds() -> None:
    def fun(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, ...], _: None) -> Any:
            a, b, c = carry
            return (b, c, x), conv(a, w)  # what is signed takes three rounds to get to the convolution

        h = relu(x)
        return energy(lax.scan(body, (h, h, h), length=5)[1])

    assert proven(fun, X, W) == [False]
    assert_same_gradients(fun, X, W)


def test_layers_that_are_sparse_already_get_the_proof_too() -> None:
    ours = lambda x, w: st.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)  # noqa: E731
    fun = lambda x, w, v: energy(ours(relu(ours(x, w)), v))  # noqa: E731
    assert proven(fun, X, W, V[:, :, :4]) == [False, True]
    assert_same_gradients(fun, X, W, V[:, :, :4])
    assert not any(proven(jax.grad(fun, 1), X, W, V[:, :, :4]))


def test_an_argument_never_qualifies_and_its_relu_does() -> None:
    fun = lambda h, w: energy(conv(h, w)) + energy(conv(relu(h), w))  # noqa: E731
    assert proven(fun, X, W) == [False, True]
    # Not even where the argument is a relu's output outside.
    outer = lambda x, w: st.sparsify(fun)(relu(x), w)  # noqa: E731
    assert names(jax.grad(outer), X, W).count("sparse_conv_bwd_input_masked") == 1


def test_signed_integers_may_wrap_around() -> None:
    i = jnp.full((4,), 100, jnp.int8)
    for term in (lambda: i + i, lambda: jnp.cumsum(i, dtype=jnp.int8)):
        fun = lambda x, w, term=term: energy(conv(relu(x) + term().astype(x.dtype), w))  # noqa: E731
        assert proven(fun, X, W) == [False]
    assert proven(lambda x, w: energy(conv(relu(x) + i.astype(x.dtype), w)), X, W) == [True]


def test_a_value_that_is_returned_as_well_still_qualifies() -> None:
    def fun(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = relu(conv(x, w))
        return conv(h, w), h

    def total(fun: Callable[..., Any]) -> Callable[..., jax.Array]:
        return lambda x, w: sum(map(energy, fun(x, w)))  # h has a gradient from outside, also where it is zero

    assert proven(fun, X, W) == [False, True]
    assert_equal(jax.grad(total(st.sparsify(fun)), (0, 1))(X, W), jax.grad(total(fun), (0, 1))(X, W))


def test_closed_over_values_that_are_differentiated_outside_do_not_qualify() -> None:
    def outer(transform: Any, scale: jax.Array) -> jax.Array:
        return transform(lambda x: energy(conv(relu(x) * scale, W)))(X)

    # At scale 0 all products are zero, and the scale has a gradient all the same.
    want = jax.grad(lambda s: outer(lambda f: f, s))(jnp.float32(0))
    assert want != 0
    assert_equal(jax.grad(lambda s: outer(st.sparsify, s))(jnp.float32(0)), want)


def test_second_derivatives_through_a_proven_convolution() -> None:
    fun = lambda x: (conv(relu(conv(x, W)), W) ** 2).sum()  # noqa: E731
    tangent = integers(9, *X.shape)
    for derivative in (
        lambda f: jax.grad(lambda x: energy(jax.grad(f)(x)))(X),
        lambda f: jax.jvp(jax.grad(f), (X,), (tangent,)),
    ):
        assert_equal(derivative(st.sparsify(fun)), derivative(fun))


# ---------------------------------------------------------------------------------------------------------------------
# Random graphs

#: name -> (what it computes, the same for bounds of absolute values). All values have one shape; MASK is fixed.
SHAPE = (1, 4, 4, 2)
MASK = integers(5, *SHAPE) > 0
KERNELS = [integers(i, r, r, 2, 2, zeros=0.2) for i, r in enumerate((3, 1, 2))]


def pool(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return reduce(x, (2, 2), strides=(1, 1), padding="SAME")


def sum_pool(x: jax.Array) -> jax.Array:
    return pool(nn.avg_pool, x) * 4


UNARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (relu, lambda x: x),
    "maximum": (lambda x: jnp.maximum(x, 0), lambda x: x),
    "abs": (jnp.abs, lambda x: x),
    "neg": (lambda x: -x, lambda x: x),
    "max_pool": (lambda x: pool(nn.max_pool, x), sum_pool),
    "avg_pool": (sum_pool, sum_pool),
    "double": (lambda x: x * 2, lambda x: x * 2),
    "halve": (lambda x: x / 0.5, lambda x: x * 2),
    "up": (lambda x: x + 1, lambda x: x + 1),
    "down": (lambda x: x - 1, lambda x: x + 1),
    "drop": (lambda x: jnp.where(MASK, x, 0), lambda x: x),
    "mask": (lambda x: x * MASK, lambda x: x),
    "sign": (lambda x: x * jnp.where(MASK, 1, -1), lambda x: x),
    "clip": (lambda x: jnp.clip(x, 0, 2), lambda x: x),
    "cap": (lambda x: jnp.minimum(x, 2), lambda x: x + 2),
    "transpose": (lambda x: x.transpose(0, 2, 1, 3), lambda x: x.transpose(0, 2, 1, 3)),
    "reverse": (lambda x: x[..., ::-1], lambda x: x[..., ::-1]),
    "shift": (lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1],) * 2,
    "stop": (lax.stop_gradient, lambda x: x),
    "jit": (jax.jit(lambda x: relu(x) + 1), lambda x: x + 1),
    "scan": (
        lambda x: lax.scan(lambda h, m: (jnp.where(m, h, h[..., ::-1]), None), x, MASK)[0],
        lambda x: x + x[..., ::-1],
    ),
    "checkpoint": (jax.checkpoint(lambda x: relu(x - 1)), lambda x: x + 1),
}
BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (lambda x, y: x + y, lambda x, y: x + y),
    "sub": (lambda x, y: x - y, lambda x, y: x + y),
    "larger": (jnp.maximum, lambda x, y: x + y),
    "smaller": (jnp.minimum, lambda x, y: x + y),
    "gate": (lambda x, y: x * y, lambda x, y: x * y),
    "where": (lambda x, y: jnp.where(x > 0, x, y), lambda x, y: x + y),
    "mix": (lambda x, y: jnp.where(MASK, x, y), lambda x, y: x + y),
    "concatenate": (lambda x, y: jnp.concatenate([x[:, :2], y[:, 2:]], 1),) * 2,
    "cond": (lambda x, y: lax.cond(x.sum() > 0, lambda x, y: x, lambda x, y: y, x, y), lambda x, y: x + y),
}

Step = tuple[str, int, int]


@hs.composite
def programs(draw: hs.DrawFn) -> list[Step]:
    """Steps (operation, operand, operand): 0 is the input, i > 0 the result of step i - 1.

    Two convolutions and their ReLUs; random operations on all of these and each other; a convolution of the last.
    """
    steps: list[Step] = [("conv0", 0, 0), ("conv1", 0, 0), ("relu", 1, 1), ("relu", 2, 2)]
    operations = ["relu", "conv1", *UNARY, *BINARY, *BINARY]
    for _ in range(draw(hs.integers(1, 4))):
        results = hs.integers(1, len(steps))
        steps.append((draw(hs.sampled_from(operations)), draw(results), draw(results)))
    return [*steps, ("conv2", len(steps), 0)]


def evaluate(steps: Sequence[Step], x: jax.Array, kernels: Sequence[jax.Array], bound: bool = False) -> jax.Array:
    values = [x]
    for name, first, second in steps:
        if name.startswith("conv"):
            values.append(conv(values[first], kernels[int(name[4])]))
        elif name in UNARY:
            values.append(UNARY[name][bound](values[first]))
        else:
            values.append(BINARY[name][bound](values[first], values[second]))
    return jnp.sum(values[-1]) if bound else energy(values[-1])


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(steps=programs())
def test_gradients_of_random_graphs_are_those_of_the_function(steps: list[Step]) -> None:
    fun = lambda x, kernels: evaluate(steps, x, kernels)  # noqa: E731
    x = integers(7, *SHAPE)
    if not any(proven(fun, x, KERNELS)):
        return  # then nothing but the summation order differs, which other tests see to
    # Everything is an integer, or half of one where a maximum met a tie: sums are exact in whatever order if those of
    # absolute values stay below 2^24. Energies weigh by 2 at most.
    bounds = jax.grad(lambda x, k: evaluate(steps, x, k, bound=True), (0, 1))(*jax.tree.map(jnp.abs, (x, KERNELS)))
    largest = max(float(b.max()) for b in jax.tree.leaves(bounds))
    hypothesis.assume(2 * largest * 2 ** len(steps) < 2**24)
    # Not compiled: all graphs share their operations.
    assert_equal(jax.grad(st.sparsify(fun), (0, 1))(x, KERNELS), jax.grad(fun, (0, 1))(x, KERNELS))


# ---------------------------------------------------------------------------------------------------------------------
# What is replaced


@jax.custom_jvp
def times_conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return conv(x, w)


@times_conv.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, w), (t, u) = primals, tangents
    return times_conv(x, w), 3 * conv(t, w) + 5 * conv(x, u)  # not the derivative: to see whose rule is used


@jax.custom_vjp
def own_rule(x: jax.Array, w: jax.Array) -> jax.Array:
    return conv(x, w)


def own_rule_bwd(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 3 * jax.vjp(conv, *saved)[1](g)[0], 5 * jax.vjp(conv, *saved)[1](g)[1]


own_rule.defvjp(lambda x, w: (conv(x, w), (x, w)), own_rule_bwd)


PLACES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "top level": conv,
    "jit": jax.jit(conv),
    "jit in jit": jax.jit(lambda x, w: jax.jit(conv)(x, w) + 1),
    "scan": lambda x, w: lax.scan(lambda h, _: (conv(h, w), None), x, length=2)[0],
    "scan over inputs": lambda x, w: lax.scan(lambda _, w: (None, conv(x, w)), None, jnp.stack([w, -w]))[1],
    "cond": lambda x, w: lax.cond(x.sum() > 0, conv, lambda x, w: conv(x, -w), x, w),
    "checkpoint": jax.checkpoint(conv),
    "checkpoint with a policy": jax.checkpoint(conv, policy=jax.checkpoint_policies.dots_saveable),
    "custom_jvp": times_conv,
    "custom_vjp": own_rule,
    "vmap over inputs": lambda x, w: jax.vmap(conv, (1, None))(jnp.stack([x, -x], 1), w),
    "custom_vjp under vmap": lambda x, w: jax.vmap(own_rule, (0, None))(x[None], w),
    "shard_map": lambda x, w: jax.shard_map(
        conv, mesh=mesh(), in_specs=(PartitionSpec("devices"), PartitionSpec()), out_specs=PartitionSpec("devices")
    )(x, w),
    "map": lambda x, w: lax.map(lambda x: conv(x[None], w)[0], x),
    "named_scope": jax.named_call(conv, name="scope"),
}


@pytest.mark.parametrize("place", PLACES)
def test_convolutions_are_replaced_with_their_gradients(place: str) -> None:
    fun = lambda x, w: energy(PLACES[place](x, w))  # noqa: E731
    found = names(st.sparsify(fun), X, W)
    assert "sparse_conv_fwd" in found and "conv_general_dilated" not in found
    backward = names(jax.grad(st.sparsify(fun), (0, 1)), X, W)
    assert {"sparse_conv_bwd_input", "sparse_conv_bwd_weights"} <= set(backward)
    assert "conv_general_dilated" not in backward
    assert_same_gradients(fun, X, W)
    assert_equal(compiled(st.sparsify(fun))(X, W), compiled(fun)(X, W))


def test_while_loops_keep_forward_mode() -> None:
    def fun(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda h: jnp.abs(h).sum() < 1e4, lambda h: conv(relu(h) - 1, W) + conv(relu(h), W), x)

    assert "conv_general_dilated" not in names(st.sparsify(fun), X)
    both = compiled(lambda x: [jax.jvp(f, (x,), (x,)) for f in (st.sparsify(fun), fun)])
    assert_equal(*both(X))


@pytest.mark.parametrize("activation", [relu, lambda x: jnp.maximum(x, 0)], ids=["proven", "unproven"])
def test_convolutions_keep_forward_mode(activation: Callable[[jax.Array], jax.Array]) -> None:
    fun = lambda x: conv(activation(conv(x, W)), W)  # noqa: E731
    for derivative in (lambda f: jax.jvp(f, (X,), (X,)), lambda f: jax.linearize(f, X)[1](X), lambda f: f(X)):
        assert_equal(derivative(st.sparsify(fun)), derivative(fun))


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, -x])).sum(),
    "checkpoint": jax.checkpoint,
    "vmap of jit under jit": lambda f: jax.jit(lambda x: jax.vmap(jax.jit(f), 1)(jnp.stack([x, -x], 1)).sum()),
    "scan": lambda f: lambda x: lax.scan(lambda c, x: (c + f(x), None), jnp.float32(0), jnp.stack([x, -x]))[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_sparse_function_can_be_transformed(name: str) -> None:
    fun = lambda x: energy(conv(relu(conv(x, W)), W))  # noqa: E731
    assert_equal(*compiled(lambda x: tuple(jax.grad(TRANSFORMS[name](f))(x) for f in (st.sparsify(fun), fun)))(X))


UNSUPPORTED = {
    "groups": lambda x, w: conv(x, w[:, :, :1], feature_group_count=4),
    "kernel dilation": lambda x, w: conv(x, w, rhs_dilation=(2, 2)),
    "integers": lambda x, w: conv(x.astype(jnp.int32), w.astype(jnp.int32)).astype(jnp.float32),
    "negative padding": lambda x, w: conv(x, w, padding=((-1, 0), (0, 0))),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_sparse_kernel_stays_the_equation_that_it_is(name: str) -> None:
    fun = UNSUPPORTED[name]
    assert str(jax.make_jaxpr(st.sparsify(fun))(X, W)) == str(jax.make_jaxpr(fun)(X, W))
    (report,) = st.sparsify(fun, explain=True)(X, W)
    assert {c.path for c in report.paths.values()} == {"lax"} and all(c.reason for c in report.paths.values())


def test_higher_order_primitives_that_it_does_not_know_are_left_alone() -> None:
    def fun(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv(lax.composite(conv, name="test.conv")(relu(x), w), w)

    closed = jax.make_jaxpr(st.sparsify(fun))(X, W)
    (left,) = (eqn for eqn in closed.eqns if eqn.primitive.name == "composite")
    (body,) = _compat.jaxprs_in_params(left.params)
    assert [eqn.primitive.name for eqn in body.eqns] == ["conv_general_dilated"]
    reports = st.sparsify(fun, explain=True)(X, W)
    assert reports[0].paths["fwd"].path == "lax" and "composite" in reports[0].proof
    assert not reports[1].relu_input
    assert_equal(st.sparsify(fun)(X, W), fun(X, W))


def test_checkpoint_policies_see_our_convolutions_as_convolutions() -> None:
    def save_convolutions(primitive: Any, *_: Any, **params: Any) -> bool:
        return primitive is lax.conv_general_dilated_p and params["feature_group_count"] == 1

    def fun(x: jax.Array, policy: Any) -> jax.Array:
        return jax.checkpoint(lambda x: (conv(jnp.sin(conv(x, W)), W) ** 2).sum(), policy=policy)(x)

    for policy, count in ((save_convolutions, 2), (None, 4)):
        gradient = jax.grad(st.sparsify(lambda x, policy=policy: fun(x, policy)))
        text = gradient_names = names(gradient, X)
        assert text.count("sparse_conv_fwd") == count, gradient_names


# ---------------------------------------------------------------------------------------------------------------------
# What stays as it is


def test_a_function_without_convolutions_stays_the_same() -> None:
    def fun(x: jax.Array, key: jax.Array) -> jax.Array:
        h = jax.jit(lambda x: jax.nn.gelu(x) * jax.random.normal(key, x.shape))(x)
        h = lax.scan(lambda c, y: (c + y, jnp.sort(c)), jnp.zeros(6), h[0, 0].T)[0]
        return jax.checkpoint(own_relu)(h)

    assert str(jax.make_jaxpr(st.sparsify(fun))(X, KEY)) == str(jax.make_jaxpr(fun)(X, KEY))


def test_arguments_and_results_that_are_not_jax_arrays_pass_through() -> None:
    def fun(x: jax.Array, scale: int, table: np.ndarray, *, train: bool, mutable: Sequence[str]) -> dict[str, Any]:
        assert isinstance(scale, int) and isinstance(table, np.ndarray) and train is True and mutable == ["stats"]
        return {"y": conv(x, W) * scale, "name": "conv", "count": 3, "none": None, "table": table}

    arguments = (X, 2, np.ones(3))
    got = st.sparsify(fun)(*arguments, train=True, mutable=["stats"])
    want = fun(*arguments, train=True, mutable=["stats"])
    assert_equal(got.pop("y"), want.pop("y"))
    assert got["table"] is arguments[2]
    assert {**got, "table": 0} == {**want, "table": 0}


def test_scopes_and_source_lines_are_kept() -> None:
    def fun(x: jax.Array) -> jax.Array:
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return conv(relu(conv(x, W)), W)

    eqns = [e for e in jax.make_jaxpr(st.sparsify(fun))(X).eqns if e.primitive.name == "sparse_conv_fwd"]
    assert [str(e.source_info.name_stack) for e in eqns] == ["outer/inner"] * 2
    reports = st.sparsify(fun, explain=True)(X)
    assert [r.scope for r in reports] == ["outer/inner"] * 2
    text = jax.jit(st.sparsify(fun)).lower(X).as_text(debug_info=True)
    assert "fun)/outer/inner/" in text


def test_a_promise_that_a_layer_makes_is_kept_and_reported() -> None:
    fun = lambda x: st.sparse_conv(jnp.maximum(x, 0), W, relu_input=True)  # noqa: E731
    (report,) = st.sparsify(fun, explain=True)(X)
    assert report.relu_input and report.proof == "promised by the layer"
    assert "sparse_conv_bwd_input_masked" in names(jax.grad(lambda x: st.sparsify(fun)(x).sum()), X)


def test_effects_happen_once_and_in_order() -> None:
    seen: list[float] = []

    def fun(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0, 0, 0], ordered=True)
        y = conv(x, W)
        jax.debug.callback(lambda v: seen.append(float(v)), y[0, 0, 0, 0], ordered=True)
        return y

    for run in (st.sparsify(fun), jax.jit(st.sparsify(fun))):
        seen.clear()
        run(X)
        jax.effects_barrier()
        assert seen == [float(X[0, 0, 0, 0]), float(conv(X, W)[0, 0, 0, 0])]


def test_the_signature_and_documentation_are_those_of_the_function() -> None:
    @st.sparsify
    def fun(x: jax.Array, *, scale: float = 2.0) -> jax.Array:
        """Scaled."""
        return conv(x, W) * scale

    assert fun.__name__ == "fun" and fun.__doc__ == "Scaled."
    assert list(inspect.signature(fun).parameters) == ["x", "scale"]
    assert_equal(fun(X, scale=3.0), conv(X, W) * 3)
    with pytest.raises(TypeError, match="fn must be a function"):
        st.sparsify(3)  # type: ignore[call-overload]


def test_exceptions_are_those_of_the_function() -> None:
    with pytest.raises(ValueError) as plain:
        conv(X, W[:, :, :3])
    with pytest.raises(type(plain.value)) as sparse:
        st.sparsify(conv)(X, W[:, :, :3])
    assert str(sparse.value) == str(plain.value)


def test_exceptions_name_the_function_and_not_ours() -> None:
    def branches_on_values(x: jax.Array) -> jax.Array:
        return x if x.sum() > 0 else conv(x, W)

    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        st.sparsify(branches_on_values)(X)
    line = inspect.getsourcelines(branches_on_values)[1]
    assert f"branches_on_values at {__file__}:{line}" in str(error.value)


def test_inner_functions_are_rewritten_once() -> None:
    inner = jax.jit(conv)
    fun = st.sparsify(lambda x: inner(x, W))
    first, second = ([e.params["jaxpr"] for e in jax.make_jaxpr(fun)(X).eqns if "jaxpr" in e.params] for _ in range(2))
    assert first == second and len(first) == 1  # the same object, so that XLA compiles it once


# ---------------------------------------------------------------------------------------------------------------------
# Functions that take gradients themselves

LAYOUTS = {"NHWC": NHWC, "NCHW": ("NCHW", "OIHW", "NCHW"), "mixed": ("NHWC", "OIHW", "NCHW")}
GEOMETRIES = {
    "3x3": (3, 3, (1, 1), "SAME"),
    "3x3 stride 2": (3, 3, (2, 2), "SAME"),
    "3x3 stride 2 valid, a column unused": (3, 3, (2, 2), "VALID"),
    "1x1": (1, 1, (1, 1), "VALID"),
    "1x1 stride 2": (1, 1, (2, 2), "VALID"),
    "2x3 strides 1, 3": (2, 3, (1, 3), ((0, 1), (2, 2))),
    "5x5 explicit": (5, 5, (1, 1), ((3, 2), (2, 4))),
    "as large as the image": (6, 8, (1, 1), "VALID"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_taken_inside_run_on_their_primitives(geometry: str, layout: str) -> None:
    r, s, strides, padding = GEOMETRIES[geometry]
    numbers = LAYOUTS[layout]
    x = integers(0, 3, 6, 8, 5).transpose([("NHWC").index(d) for d in numbers[0]])
    w = integers(1, r, s, 5, 4).transpose([("HWIO").index(d) for d in numbers[1]])

    def step(x: jax.Array, w: jax.Array) -> Any:
        fun = lambda x, w: energy(lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers))  # noqa: E731
        return jax.value_and_grad(fun, (0, 1))(x, w)

    found = [n for n in names(st.sparsify(step), x, w) if "_conv_" in n or n == "conv_general_dilated"]
    assert sorted(found) == ["sparse_conv_bwd_input", "sparse_conv_bwd_weights", "sparse_conv_fwd"]
    assert_equal(*compiled(lambda x, w: (st.sparsify(step)(x, w), step(x, w)))(x, w))


def test_gradients_of_one_dimension_run_on_their_primitives() -> None:
    x, w = integers(0, 3, 9, 5), integers(1, 3, 5, 4)

    def step(x: jax.Array, w: jax.Array) -> Any:
        fun = lambda x, w: energy(lax.conv_general_dilated(x, w, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")))  # noqa: E731
        return jax.value_and_grad(fun, (0, 1))(x, w)

    found = [n for n in names(st.sparsify(step), x, w) if "_conv_" in n or n == "conv_general_dilated"]
    assert sorted(found) == ["sparse_conv_bwd_input", "sparse_conv_bwd_weights", "sparse_conv_fwd"]
    assert_equal(st.sparsify(step)(x, w), step(x, w))


def test_a_convolution_with_channels_first_of_all_is_no_gradient() -> None:
    numbers = ("CHWN", "IHWO", "CHWN")
    x, w = integers(2, 16, 8, 8, 4), integers(3, 16, 3, 3, 16)

    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(2):
            x = lax.conv_general_dilated(relu(x), w, (1, 1), "SAME", dimension_numbers=numbers)
        return (x**2).sum()

    assert proven(twice, x, w) == [True, True]
    assert_same_gradients(twice, x, w)


def test_transposed_convolutions_run_on_the_input_gradient() -> None:
    fun = lambda x, w: energy(lax.conv_transpose(x, w, (2, 2), "SAME"))  # noqa: E731
    assert "sparse_conv_bwd_input" in names(st.sparsify(fun), X, W)
    assert_same_gradients(fun, X, W)


def test_a_training_step_says_that_the_proof_needs_sparsify_inside() -> None:
    step = jax.grad(lambda w: energy(conv(relu(conv(X, w)), w)))
    reports = st.sparsify(step, explain=True)(W)
    assert [tuple(r.paths) for r in reports].count(("bwd_weights",)) == 2
    assert [tuple(r.paths) for r in reports].count(("bwd_input",)) == 1
    assert not any(r.relu_input for r in reports)
    assert all("jax.grad(st.sparsify(loss))" in r.proof for r in reports)
    assert not any("sparse_conv_bwd_input_masked" in name for name in names(st.sparsify(step), W))
    assert_equal(*compiled(lambda w: (st.sparsify(step)(w), step(w)))(W))


# ---------------------------------------------------------------------------------------------------------------------
# Explanation


@pytest.mark.parametrize("first", [True, False])
def test_explain_names_the_relu_where_a_value_without_gradient_is_the_other_way_there(first: bool) -> None:
    def fun(x: jax.Array, w: jax.Array) -> jax.Array:
        ways = (lambda x: jnp.zeros_like(x), jax.nn.relu) if first else (jax.nn.relu, lambda x: jnp.zeros_like(x))
        return conv(lax.cond(x.sum() > 0, *ways, x), w)

    (report,) = st.sparsify(fun, explain=True)(X, W)
    assert report.relu_input
    assert report.proof.startswith("relu at test_sparsify.py")


def test_the_explanation_names_source_lines_paths_and_reasons() -> None:
    def fun(x: jax.Array) -> jax.Array:
        h = max_pool(relu(conv(x, W)))
        h = jnp.maximum(conv(h, W), 0)  # here it fails
        return conv(conv(h, W), W[:, :, :1], feature_group_count=4)

    reports = st.sparsify(fun, explain=True)(X)
    first = inspect.getsourcelines(fun)[1]
    file = pathlib.Path(__file__).name
    assert [r.relu_input for r in reports] == [False, True, False, False]
    assert f"{file}:{first + 1}" in reports[1].proof and "reduce_window_max" in reports[1].proof
    assert f"max, {file}:{first + 2}" in reports[2].proof and "jax.nn.relu" in reports[2].proof
    assert all(r.source.startswith(file) for r in reports)
    assert "feature_group_count" in reports[3].paths["fwd"].reason
    table = str(reports)
    assert all(report.proof in line for report, line in zip(reports, table.splitlines()[1:5], strict=True))
    assert f"lax: {reports[3].paths['fwd'].reason}" in table.splitlines()[5:]
    assert str(st.sparsify(lambda x: x, explain=True)(X)) == "no convolutions"


def test_the_explanation_says_what_is_compiled_for_few_features() -> None:
    x, w = integers(0, 1, 9, 9, 3), integers(1, 3, 3, 3, 16)
    for fun, path, target in (
        (lambda x, w: energy(conv(relu(x), w)), "sparse", "bwd_input_masked_v1"),
        (lambda x, w: energy(conv(x, w)), "lax", "convolution"),
    ):
        (report,) = st.sparsify(fun, explain=True)(x, w)
        assert report.paths["bwd_input"].path == path
        assert target in jax.jit(jax.grad(st.sparsify(fun))).lower(x, w).as_text()


def test_the_explanation_takes_shapes_alone() -> None:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, W)]
    fun = lambda x, w: conv(relu(x), w)  # noqa: E731
    assert st.sparsify(fun, explain=True)(*shapes) == st.sparsify(fun, explain=True)(X, W)
    like = shapes[0]
    assert st.sparsify(lambda x, s: (conv(x, W), s))(X, like)[1] is like  # no array but for an explanation


def test_the_documentation_lists_the_rules_of_the_code() -> None:
    text = (pathlib.Path(__file__).parents[1] / "docs" / "sparsify.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    documented = [row for row in rows if len(row) == 4 and row[0] != "operation"]
    assert documented == [list(row) for row in facts.table()]
    assert len(documented) > 10


# ---------------------------------------------------------------------------------------------------------------------
# Models of several frameworks


class Block(nn.Module):
    """Two convolutions with batch normalization, and a way around them."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(h: jax.Array, scale: Any = nn.initializers.ones) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, scale_init=scale)(h)

        h = nn.relu(norm(nn.Conv(self.features, (3, 3), (self.strides,) * 2, use_bias=False)(x)))
        h = norm(nn.Conv(self.features, (3, 3), use_bias=False)(h))
        if x.shape != h.shape:
            x = norm(nn.Conv(self.features, (1, 1), (self.strides,) * 2, use_bias=False, name="shortcut")(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    """A small ResNet in the manner of Flax's example."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for features, strides in ((8, 1), (16, 2)):
            x = Block(features, strides)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


def assert_as_accurate(sparse: Any, plain: Any, exact: Any, terms: int) -> None:
    """The sparse result is as far from float64's as the plain one is, but for the luck of rounding.

    Both add up the same products in float32. Granted: twice the largest error of the plain one in the same array, or
    sqrt(terms) roundings of the array's largest number, with the terms of all sums on the way to it: each sum of n
    numbers of either sign strays by about sqrt(n) roundings of its result, and hands on what came in.
    """
    for a, b, c in zip(*map(jax.tree.leaves, (sparse, plain, exact)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        allowed = max(2 * np.abs(b - c).max(), terms**0.5 * 2.0**-24 * np.abs(c).max())
        assert np.abs(a - c).max() <= allowed


def in_float64(fun: Callable[..., Any], *args: Any) -> Any:
    """``fun`` of the same numbers."""
    with jax.enable_x64(True):
        return compiled(fun)(*jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), args))


def test_a_linen_resnet_trains_the_same() -> None:
    model, x = ResNet(), jax.random.normal(KEY, (4, 32, 32, 3))
    variables = compiled(model.init)(KEY, x)
    assert_equal(compiled(st.sparsify(model.init))(KEY, x), variables)

    def step(apply: Callable[..., Any]) -> Callable[..., Any]:
        def loss(params: Any, stats: Any, x: jax.Array) -> Any:
            logits, updates = apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)].mean(), updates

        return lambda v, x: jax.value_and_grad(loss, has_aux=True)(v["params"], v["batch_stats"], x)

    sparse, plain = (compiled(step(apply))(variables, x) for apply in (st.sparsify(model.apply), model.apply))
    assert jax.tree.structure(sparse) == jax.tree.structure(plain)
    # To the gradient of the stem: its own sum over pixels and its BatchNorm's four, two of them backwards; then four
    # more convolutions, forwards and backwards, with theirs.
    terms = 5 * (4 * 16 * 16) + 4 * (4 * (4 * 8 * 8) + 2 * (9 * 16))
    assert_as_accurate(sparse, plain, in_float64(step(model.apply), variables, x), terms)
    # The stem reads the image. Everything else reads what comes out of a ReLU, BatchNorm or not.
    reports = st.sparsify(model.apply, explain=True)(variables, x, train=False)
    assert [r.relu_input for r in reports] == [False] + 5 * [True]
    assert reports[2].scope == "ResNet/Block_0/Conv_1"
    found = names(step(st.sparsify(model.apply)), variables, x)
    assert sum("sparse_conv_bwd_input_masked" in name for name in found) == 5
    assert sum("sparse_conv_bwd_weights" in name for name in found) == 6


class Pyramid(nnx.Module):
    """An nnx model with batch normalization and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.drop(jax.nn.relu(self.norm(self.first(x))))
        return self.head(jax.nn.relu(self.second(h)).mean((1, 2)))


def test_an_nnx_model_trains_the_same_and_keeps_its_state() -> None:
    x = jax.random.normal(KEY, (4, 8, 8, 3))

    def loss(model: Pyramid, x: jax.Array) -> jax.Array:
        return (model(x) ** 2).mean()

    assert proven(loss, Pyramid(nnx.Rngs(0)), x) == [False, True]
    outcomes = []
    for fun in (st.sparsify(loss), loss):
        model = Pyramid(nnx.Rngs(0))
        outcomes.append((nnx.jit(nnx.value_and_grad(fun))(model, x), nnx.state(model)))
        assert np.asarray(model.norm.mean[...]).any()  # it was all zeros
    sparse, plain = outcomes
    assert jax.tree.structure(sparse) == jax.tree.structure(plain)
    for a, b in zip(*map(jax.tree.leaves, (sparse, plain)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            a, b = np.asarray(a), np.asarray(b)
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2.0**-24 * np.abs(b).max())
        else:
            assert a.dtype == b.dtype and (a == b).all()


def test_a_split_nnx_model_trains_the_same() -> None:
    graph, params, rest = nnx.split(Pyramid(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(KEY, (2, 4, 4, 3))

    def loss(params: Any, rest: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        return (model(x) ** 2).mean(), nnx.state(model, nnx.BatchStat)

    assert proven(loss, params, rest, x) == [False, True]
    sparse, plain = (
        jax.eval_shape(jax.value_and_grad(f, has_aux=True), params, rest, x) for f in (st.sparsify(loss), loss)
    )
    assert jax.tree.flatten(sparse) == jax.tree.flatten(plain)


def test_tracing_takes_less_than_twice_as_long() -> None:
    model, x = ResNet(), jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)

    def seconds(apply: Callable[..., Any]) -> float:
        jax.clear_caches()
        transform._jaxpr_of.cache_clear()
        loss = lambda v, x: (apply(v, x, train=True, mutable=["batch_stats"])[0] ** 2).mean()  # noqa: E731
        start = time.process_time()
        jax.jit(jax.grad(loss)).trace(variables, x)
        return time.process_time() - start

    applies = (model.apply, st.sparsify(model.apply))
    plain, sparse = np.min([[seconds(apply) for apply in applies] for _ in range(3)], axis=0)
    assert sparse < 2 * plain


def test_nothing_is_kept_of_functions_that_are_gone() -> None:
    def trace() -> int:
        jax.make_jaxpr(jax.grad(st.sparsify(lambda x: energy(conv(relu(jax.jit(conv)(x, W)), W)))))(X)
        gc.collect()
        return len(transform._MEMO)

    assert trace() == trace()


def test_a_pure_jax_network_trains_the_same() -> None:
    params = [jax.random.normal(k, (3, 3, 4, 4)) * 0.2 for k in jax.random.split(KEY, 3)]
    x = jax.random.normal(KEY, (2, 16, 16, 4))

    def loss(params: Sequence[jax.Array], x: jax.Array) -> jax.Array:
        for i, w in enumerate(params):
            x = jax.nn.relu(conv(x, w, strides=1 + i % 2))
        return (x**2).mean()

    assert proven(loss, params, x) == [False, True, True]
    sparse, plain = (compiled(jax.grad(f))(params, x) for f in (st.sparsify(loss), loss))
    assert_as_accurate(sparse, plain, in_float64(jax.grad(loss), params, x), 2 * 16 * 16)


# ---------------------------------------------------------------------------------------------------------------------
# nnx objects among the arguments


def trained(wrap: Callable[..., Any], make: Callable[[], Any], fun: Callable[..., Any]) -> tuple[Any, Any]:
    """What ``wrap(fun)`` returns for the nnx objects that ``make`` makes, and their state afterwards."""
    objects = make()
    result = wrap(fun)(*objects)
    kept = nnx.state([node for node in objects if isinstance(node, nnx.Pytree)])
    return result, [leaf for leaf in jax.tree.leaves(kept) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def assert_nnx_same(make: Callable[[], Any], fun: Callable[..., Any]) -> None:
    plain, sparse = (trained(wrap, make, fun) for wrap in (lambda f: f, st.sparsify))
    assert jax.tree.structure(plain) == jax.tree.structure(sparse)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(sparse), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


class Shares(nnx.Module):
    """Layers that share a kernel, a normalization and a source of random numbers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(2))
        self.second.kernel = self.first.kernel
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs)] * 2)
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
        self.rngs = nnx.List([rngs, rngs])
        self.calls = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls += 1
        h = self.norms[1](jax.nn.relu(self.norms[0](self.first(x))))
        noise = [jax.random.normal(rngs(), (4,)) for rngs in self.rngs]
        return self.drops[1](self.drops[0](jax.nn.relu(self.second(h)))) + noise[0] - noise[1]


def model_and_image() -> tuple[Shares, jax.Array]:
    return Shares(nnx.Rngs(0)), X


def test_what_nnx_objects_share_stays_shared() -> None:
    assert_nnx_same(model_and_image, lambda model, x: model(x))
    assert_nnx_same(lambda: (model := Shares(nnx.Rngs(0)), model, X), lambda a, b, x: a(x) + b(x))


def test_a_train_step_with_tied_weights_trains_the_same() -> None:
    def make() -> Any:
        model = Shares(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), X

    def step(model: Shares, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
        loss, gradient = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, gradient)
        return loss

    assert_nnx_same(make, step)


def test_variables_by_themselves_are_changed() -> None:
    def count(variables: list[nnx.Variable], x: jax.Array) -> jax.Array:
        variables[0][...] += 1
        return conv(x, W)

    variable = nnx.Variable(jnp.float32(0))
    st.sparsify(count)([variable], X)
    assert variable[...] == 1


def test_attributes_that_fn_changes_are_changed() -> None:
    model, x = model_and_image()

    def evaluate(model: Shares, x: jax.Array) -> jax.Array:
        model.eval()
        model.extra = nnx.Param(jnp.ones(3))
        del model.norms
        return model.first(x)

    st.sparsify(evaluate)(model, x)
    assert model.drops[0].deterministic and not hasattr(model, "norms")
    assert model.extra.shape == (3,) and model.calls == 0
    st.sparsify(lambda model: setattr(model, "calls", 7))(model)
    assert model.calls == 7


def test_values_that_variables_exchange_or_reshape_are_changed() -> None:
    a, b, c = nnx.Variable(None), nnx.Variable(jnp.ones(3)), nnx.Variable({"old": jnp.ones(2)})

    def fn(a: nnx.Variable, b: nnx.Variable, c: nnx.Variable, x: jax.Array) -> jax.Array:
        one, other = _compat.raw_value(a), _compat.raw_value(b)
        _compat.set_raw_value(a, other)
        _compat.set_raw_value(b, one)
        _compat.set_raw_value(c, {"new": _compat.raw_value(c)["old"]})
        return conv(x, W)

    st.sparsify(fn)(a, b, c, X)
    assert _compat.raw_value(a).shape == (3,) and _compat.raw_value(b) is None
    assert list(_compat.raw_value(c)) == ["new"]


class Sows(nnx.Module):
    """Sows a sum and the telemetry of its layer, and changes a dictionary in place."""

    def __init__(self) -> None:
        self.conv = st.nnx.SparseConv(4, 4, (3, 3), rngs=nnx.Rngs(0), sow_sparsity=True)
        self.kept = nnx.Variable({"times": jnp.ones(2)})

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.perturb("y", self.conv(x))
        self.sow(nnx.Intermediate, "sum", y.sum())
        kept = _compat.raw_value(self.kept)
        kept["times"] = kept["times"] * 2
        return y


@pytest.mark.parametrize("transform", [st.sparsify, lambda fn: nnx.jit(st.sparsify(fn))], ids=["sparsify", "jit"])
def test_containers_that_fn_changes_in_place_are_changed(transform: Callable[..., Any]) -> None:
    model = Sows()
    for times in (2, 4):
        transform(lambda model, x: model(x))(model, X)
        np.testing.assert_array_equal(_compat.raw_value(model.kept)["times"], [times, times])


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="before nnx.capture, what is sown stays in the model")
@pytest.mark.parametrize("transform", [st.sparsify, lambda fn: nnx.jit(st.sparsify(fn))], ids=["sparsify", "jit"])
def test_what_fn_sows_is_captured_around_it(transform: Callable[..., Any]) -> None:
    def run(transform: Callable[..., Any]) -> Any:
        fn = transform(lambda model, x: model(x))
        _, *captured = nnx.capture(lambda model: fn(model, X), nnx.Intermediate, nnx.Perturbation)(Sows())
        return list(map(nnx.to_pure_dict, captured))

    got, want = run(transform), run(lambda fn: fn)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert got[0].keys() == {"conv", "sum", "y"}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("make", [
    lambda x: jnp.asarray(x.size),
    lambda x: jnp.asarray(2.5),
    lambda x: jnp.asarray(True),
    lambda x: jnp.asarray(1j),
    lambda x: jnp.float32(0.1),
    lambda x: jnp.zeros(()),
    lambda x: jnp.asarray(TABLE),
    lambda x: jax.random.key(0),
], ids=["int", "float", "bool", "complex", "typed", "zeros", "table", "key"])  # fmt: skip
def test_results_that_depend_on_no_argument_are_arrays_as_without(make: Callable[[jax.Array], jax.Array]) -> None:
    def fn(x: jax.Array) -> Any:
        return conv(x, W), make(x)

    want = make(X)
    for got in (st.sparsify(fn)(X)[1], jax.jit(st.sparsify(fn))(X)[1]):
        assert isinstance(got, jax.Array)
        assert got.aval == want.aval
        assert bool((got == want).all())
    # Where another function goes on with them, too.
    assert jax.jit(lambda x: st.sparsify(fn)(x)[1].reshape(-1))(X).shape == (want.size,)


def test_results_do_not_share_the_memory_of_an_array_of_the_caller() -> None:
    table = np.arange(1024.0, dtype=np.float32)
    got = st.sparsify(lambda x: (conv(x, W), jnp.asarray(table)))(X)[1]
    table[:] = -1
    np.testing.assert_array_equal(got, np.arange(1024.0))


def test_only_what_fn_changes_is_written() -> None:
    # Parameters of an outer trace must not be written to, statistics of this one may be.
    graph, params, rest = nnx.split(Shares(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def step(rest: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, rest)
        y, same = st.sparsify(lambda model, x: (model.norms[0](model.first(x)), model))(model, x)
        assert same is model
        return y, nnx.state(model, nnx.BatchStat)

    y, statistics = step(rest, X)
    assert y.shape == X.shape and any(np.asarray(leaf).any() for leaf in jax.tree.leaves(statistics))


def test_a_partial_keeps_arrays_closed_over() -> None:
    def fn(count: jax.Array, mask: jax.Array, x: jax.Array) -> jax.Array:
        return energy(conv(relu(x) * mask, W)) * int(count)

    mask = (jnp.arange(4) % 2).astype(X.dtype)
    for partial in (functools.partial, jax.tree_util.Partial):
        assert proven(partial(fn, jnp.int32(3), mask), X) == [True]


def test_an_nnx_object_that_fn_returns_is_the_argument_or_a_new_one() -> None:
    model, x = model_and_image()
    same, new, _ = st.sparsify(lambda m, x: (m, nnx.Param(conv(x, W)), m(x)))(model, x)
    assert same is model and isinstance(new, nnx.Param)
    made = st.sparsify(lambda x: nnx.Param(conv(x, W)))(x)
    np.testing.assert_allclose(made[...], conv(x, W), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", ["model", "method", "partial"])
def test_a_model_that_fn_is_bound_to_is_an_argument(bound: str) -> None:
    def call(model: Shares, x: jax.Array) -> jax.Array:
        return model(x)

    outcomes = []
    for wrap in (lambda f: f, st.sparsify):
        model, x = model_and_image()
        fn = {"model": model, "method": model.__call__, "partial": functools.partial(call, model)}[bound]
        outcomes.append((wrap(fn)(x), jax.tree.leaves(nnx.state(model, nnx.BatchStat))))
    for a, b in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
