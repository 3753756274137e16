"""``sparse_conv`` and ``conv_general_dilated``: results, gradients and transformations against ``jax.lax``; errors."""

from __future__ import annotations

import functools
import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import sparsetrain_jax as st
from sparsetrain_jax.conv import ConvHook

NHWC = ("NHWC", "HWIO", "NHWC")


def data(seed: int, *shapes: tuple[int, ...], dtype: Any = jnp.float32, zeros: float = 0.5) -> list[jax.Array]:
    """Arrays of -1, 0 and 1: sums of their products are exact in whatever order, in second derivatives too."""
    rng = np.random.default_rng(seed)
    arrays = []
    for shape in shapes:
        array = rng.choice([-1, 1], shape) * (rng.random(shape) >= zeros)
        arrays.append(jnp.asarray(array, dtype))
    return arrays


def primitive_names(fun: Callable[..., Any], *args: Any) -> set[str]:
    """Names of all primitives in ``fun``'s jaxpr, inner ones included."""
    names: set[str] = set()

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            names.add(eqn.primitive.name)
            for value in eqn.params.values():
                for item in value if isinstance(value, (tuple, list)) else [value]:
                    inner = getattr(item, "jaxpr", item)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(fun)(*args).jaxpr)
    return names


SPARSE_NAMES = {
    *("sparse_conv_fwd", "sparse_conv_bwd_input", "sparse_conv_bwd_weights"),
    *("sparse_conv_bwd_input_masked", "sparse_conv_fwd_masked"),
    *("sparse_conv_bwd_input_masked_sparse_conv_bwd_weights", "sparse_conv_fwd_masked_sparse_conv_fwd"),
}

# window_strides, padding, lhs_dilation, rhs_dilation, feature groups, batch groups, lhs, rhs
GENERAL = {
    "1d": ((2,), "SAME", None, None, 1, 1, (2, 11, 6), (3, 6, 4), ("NHC", "HIO", "NHC")),
    "2d": ((1, 2), "SAME", None, None, 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "2d_lower": ((2, 2), "SAME_LOWER", None, None, 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "2d_valid": ((2, 2), "VALID", (1, 1), (1, 1), 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "2d_explicit": ((2, 3), ((0, 3), (2, 1)), None, None, 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "2d_crop": ((1, 1), ((-1, 1), (0, -2)), None, None, 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "3d": ((1, 2, 1), "SAME", None, None, 1, 1, (2, 4, 5, 6, 3), (3, 2, 1, 3, 4), ("NDHWC", "DHWIO", "NDHWC")),
    "0d": ((), (), None, None, 1, 1, (2, 6), (6, 4), ("NC", "IO", "NC")),
    "groups": ((1, 1), "SAME", None, None, 3, 1, (2, 7, 8, 6), (3, 2, 2, 9), NHWC),
    "depthwise": ((1, 1), "SAME", None, None, 6, 1, (2, 7, 8, 6), (3, 3, 1, 6), NHWC),
    "batch_groups": ((1, 1), "VALID", None, None, 1, 2, (4, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "atrous": ((1, 1), "SAME", None, (2, 1), 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "transposed": ((1, 1), ((2, 2), (1, 1)), (2, 3), None, 1, 1, (2, 7, 8, 6), (3, 2, 6, 4), NHWC),
    "empty_window": ((1, 1), "VALID", None, None, 1, 1, (2, 2, 2, 6), (3, 3, 6, 4), NHWC),
    "no_batch": ((1, 1), "SAME", None, None, 1, 1, (0, 7, 8, 6), (3, 2, 6, 4), NHWC),
}
GENERAL |= {
    f"2d_{'_'.join(numbers)}": ((2, 1), ((1, 0), (2, 1)), None, None, 1, 1, None, None, numbers)
    for numbers in (
        ("NCHW", "OIHW", "NCHW"),
        ("NCHW", "OIHW", "NHWC"),
        ("NHWC", "OIHW", "NHWC"),
        ("NHWC", "WHOI", "NWHC"),
        ("CHWN", "IHWO", "CNHW"),
        ("HNWC", "IWHO", "WCHN"),
    )
}


def general(name: str) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    strides, padding, lhs_dilation, rhs_dilation, groups, batch_groups, lhs, rhs, numbers = GENERAL[name]
    if lhs is None:  # sizes by letter
        sizes = {"N": 2, "C": 6, "H": 7, "W": 8}
        lhs = tuple(sizes[letter] for letter in numbers[0])
        rhs = tuple({"I": 6, "O": 4, "H": 3, "W": 2}[letter] for letter in numbers[1])
    return (
        lhs,
        rhs,
        {
            "window_strides": strides,
            "padding": padding,
            "lhs_dilation": lhs_dilation,
            "rhs_dilation": rhs_dilation,
            "dimension_numbers": numbers,
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        },
    )


SPARSE = {name for name in GENERAL if name.startswith(("1d", "2d")) and name != "2d_crop"} | {
    "empty_window",
    "no_batch",
}


def assert_same(got: Any, want: Any) -> None:
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree
    for g, w in zip(got_leaves, want_leaves, strict=True):
        assert (g.shape, g.dtype, g.weak_type) == (w.shape, w.dtype, w.weak_type)
        wide = np.complex128 if jnp.iscomplexobj(w) else np.float64
        np.testing.assert_array_equal(np.asarray(g, wide), np.asarray(w, wide))


@pytest.mark.parametrize("name", GENERAL)
def test_conv_general_dilated_equals_lax(name: str) -> None:
    if name == "2d_crop":
        pytest.skip("with negative padding XLA:CPU reads beyond the image: two runs of lax differ")
    lhs_shape, rhs_shape, arguments = general(name)
    lhs, rhs = data(1, lhs_shape, rhs_shape)
    assert_same(st.conv_general_dilated(lhs, rhs, **arguments), lax.conv_general_dilated(lhs, rhs, **arguments))


@pytest.mark.parametrize("name", GENERAL)
def test_conv_general_dilated_is_sparse_exactly_where_it_says(name: str) -> None:
    lhs_shape, rhs_shape, arguments = general(name)
    lhs, rhs = data(1, lhs_shape, rhs_shape)
    names = primitive_names(lambda lhs, rhs: st.conv_general_dilated(lhs, rhs, **arguments), lhs, rhs)
    assert ("sparse_conv_fwd" in names) == (name in SPARSE)
    assert ("conv_general_dilated" in names) == (name not in SPARSE)


@pytest.mark.parametrize("name", GENERAL)
def test_both_modes_and_orders_of_differentiation_equal_lax(name: str) -> None:
    if name == "2d_crop":
        pytest.skip("with negative padding XLA:CPU reads beyond the image: two runs of lax differ")
    lhs_shape, rhs_shape, arguments = general(name)
    lhs, rhs, dlhs, drhs = data(2, lhs_shape, rhs_shape, lhs_shape, rhs_shape)

    def derivatives(conv: Callable[..., jax.Array]) -> Callable[..., Any]:
        def all_of_them(lhs: jax.Array, rhs: jax.Array, dlhs: jax.Array, drhs: jax.Array) -> Any:
            def f(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
                return conv(lhs, rhs, **arguments)

            def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
                return (f(lhs, rhs) ** 2).sum()

            def norm(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
                return sum((g * t).sum() for g, t in zip(jax.grad(loss, (0, 1))(lhs, rhs), (dlhs, drhs), strict=True))

            return {
                "jvp": jax.jvp(f, (lhs, rhs), (dlhs, drhs)),
                "vjp": jax.grad(loss, (0, 1))(lhs, rhs),
                "jvp of grad": jax.jvp(jax.grad(loss, (0, 1)), (lhs, rhs), (dlhs, drhs)),
                "grad of grad": jax.grad(norm, (0, 1))(lhs, rhs),
                "linearize": jax.linearize(f, lhs, rhs)[1](dlhs, drhs),
                "linear_transpose": jax.linear_transpose(lambda lhs: f(lhs, rhs), lhs)(f(dlhs, drhs)),
            }

        return jax.jit(all_of_them)

    arrays = (lhs, rhs, dlhs, drhs)
    assert_same(derivatives(st.conv_general_dilated)(*arrays), derivatives(lax.conv_general_dilated)(*arrays))


def test_jacobians_of_both_modes_equal_lax() -> None:
    lhs, rhs = data(3, (1, 4, 3, 2), (2, 3, 2, 3))
    for transform in (jax.jacfwd, jax.jacrev, jax.hessian):

        def jacobian(conv: Callable[..., jax.Array], transform: Any = transform) -> Any:
            return transform(lambda rhs: conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC) ** 2)(rhs)

        assert_same(jacobian(st.conv_general_dilated), jacobian(lax.conv_general_dilated))


DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "complex64", "bool"]


@pytest.mark.parametrize("preferred", [None, "float32", "int32", "float64", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_preferred_element_type_are_as_in_lax(dtype: str, preferred: str | None) -> None:
    lhs, rhs = data(4, (2, 5, 6, 3), (3, 3, 3, 4), dtype=dtype)
    arguments = ((1, 1), "SAME")
    keywords = {"dimension_numbers": NHWC, "preferred_element_type": preferred}
    assert_same_or_same_exception(
        lambda conv: conv(lhs, rhs, *arguments, **keywords), st.conv_general_dilated, lax.conv_general_dilated
    )


def assert_same_or_same_exception(call: Callable[[Any], Any], ours: Any, stock: Any) -> None:
    try:
        want = call(stock)
    except Exception as error:
        with pytest.raises(type(error)):
            call(ours)
    else:
        assert_same(call(ours), want)


def test_x64_goes_through_lax() -> None:
    with jax.enable_x64(True):
        lhs, rhs = data(4, (2, 5, 6, 3), (3, 3, 3, 4), dtype=jnp.float64)
        got = st.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)
        assert got.dtype == jnp.float64
        assert_same(got, lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC))
        narrow = st.sparse_conv(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
        assert narrow.dtype == jnp.float32
        np.testing.assert_array_equal(narrow, got)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_narrow_dtypes_keep_their_dtype(dtype: str) -> None:
    lhs, rhs = data(5, (2, 5, 6, 3), (3, 3, 3, 4), dtype=dtype)
    for preferred in (None, jnp.float32):

        def gradients(conv: Any, preferred: Any = preferred) -> Any:
            def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
                out = conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=preferred)
                return out.astype(jnp.float32).sum()

            return jax.grad(loss, (0, 1))(lhs, rhs)

        try:
            want = gradients(lax.conv_general_dilated)
        except TypeError:  # JAX 0.8 has no gradient for preferred_element_type
            want = gradients(in_float32)
        assert_same(gradients(st.conv_general_dilated), want)


def in_float32(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return lax.conv_general_dilated(lhs.astype(jnp.float32), rhs.astype(jnp.float32), *args, **kwargs)


@pytest.mark.parametrize("change", [
    {"window_strides": (1,)},
    {"window_strides": (0, 1)},
    {"window_strides": (1, -1)},
    {"padding": "FULL"},
    {"padding": ((1, 1),)},
    {"padding": (1, 1)},
    {"padding": ((0.5, 1), (1, 1))},
    {"dimension_numbers": ("NHWC", "HWIO")},
    {"dimension_numbers": ("NHWC", "HWIO", "NHWD")},
    {"dimension_numbers": 3},
    {"feature_group_count": 0},
    {"feature_group_count": 4},
    {"batch_group_count": 3},
    {"batch_group_count": 0},
    {"precision": "no such precision"},
    {"precision": 1.0},
    {"precision": ("highest", None)},
    {"precision": ("highest", lax.Precision.HIGHEST)},
    {"precision": ["highest"]},
    {"preferred_element_type": "int8"},
    {"lhs_dilation": (2, 2), "padding": "SAME"},
    {"lhs_dilation": (0, 1)},
    {"rhs_dilation": (1,)},
    {"out_sharding": "x"},
    {"rhs": (3, 3, 5, 4)},
    {"rhs": (3, 3, 4)},
    {"lhs": (2, 6, 3)},
], ids=str)  # fmt: skip
def test_bad_arguments_raise_the_exception_that_lax_raises(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "dimension_numbers": NHWC}
    arguments |= change
    lhs, rhs = data(6, arguments.pop("lhs", (2, 5, 6, 3)), arguments.pop("rhs", (3, 3, 3, 4)))
    assert_same_or_same_exception(
        lambda conv: conv(lhs, rhs, **arguments), st.conv_general_dilated, lax.conv_general_dilated
    )


def test_mixed_dtypes_raise_what_lax_raises() -> None:
    (lhs,), (rhs,) = data(6, (2, 5, 6, 3)), data(7, (3, 3, 3, 4), dtype=jnp.bfloat16)
    assert_same_or_same_exception(
        lambda conv: conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC),
        st.conv_general_dilated,
        lax.conv_general_dilated,
    )


def test_numpy_operands_and_lists_are_accepted_as_by_lax() -> None:
    lhs, rhs = (np.asarray(x) for x in data(6, (2, 5, 6, 3), (3, 3, 3, 4)))
    arguments = ([2, np.int64(1)], [(1, 0), [np.int32(2), 1]])
    assert_same(
        st.conv_general_dilated(lhs, rhs, *arguments, dimension_numbers=NHWC),
        lax.conv_general_dilated(lhs, rhs, *arguments, dimension_numbers=NHWC),
    )
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    assert_same(
        st.conv_general_dilated(lhs, rhs, *arguments, dimension_numbers=numbers),
        lax.conv_general_dilated(lhs, rhs, *arguments, dimension_numbers=NHWC),
    )


# sparse_conv


SPARSE_CONV = {
    "default": ({}, {"window_strides": (1, 1), "padding": "SAME"}),
    "strides": ({"strides": 2}, {"window_strides": (2, 2), "padding": "SAME"}),
    "strides_pair": ({"strides": [2, 1], "padding": "valid"}, {"window_strides": (2, 1), "padding": "VALID"}),
    "pad_all": ({"padding": 2}, {"window_strides": (1, 1), "padding": ((2, 2), (2, 2))}),
    "pad_axis": ({"padding": (2, (0, 1))}, {"window_strides": (1, 1), "padding": ((2, 2), (0, 1))}),
    "lower": ({"padding": "SAME_LOWER", "strides": 2}, {"window_strides": (2, 2), "padding": "SAME_LOWER"}),
    "atrous": ({"kernel_dilation": 2}, {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)}),
    "transposed": (
        {"input_dilation": (1, 2), "padding": 1},
        {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (1, 2)},
    ),
    "crop": ({"padding": ((-1, 0), (0, 0))}, {"window_strides": (1, 1), "padding": ((-1, 0), (0, 0))}),
}


@pytest.mark.parametrize("name", SPARSE_CONV)
def test_sparse_conv_and_its_gradients_equal_lax(name: str) -> None:
    ours, stock = SPARSE_CONV[name]
    lhs, rhs, dlhs, drhs = data(8, *((2, 7, 8, 6), (3, 2, 6, 4)) * 2)

    def everything(conv: Callable[..., jax.Array]) -> Any:
        def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return (conv(lhs, rhs) ** 2).sum()

        gradient = jax.grad(loss, (0, 1))
        # Operands are arguments: XLA once folded constants into wrong results of the stock convolution (jaxlib 0.8.0).
        return jax.jit(
            lambda lhs, rhs, dlhs, drhs: (
                conv(lhs, rhs),
                gradient(lhs, rhs),
                jax.jvp(gradient, (lhs, rhs), (dlhs, drhs)),
                jax.grad(lambda lhs, rhs: (gradient(lhs, rhs)[1] * drhs).sum(), (0, 1))(lhs, rhs),
            )
        )(lhs, rhs, dlhs, drhs)

    assert_same(
        everything(lambda lhs, rhs: st.sparse_conv(lhs, rhs, **ours)),
        everything(lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, dimension_numbers=NHWC, **stock)),
    )


def test_sparse_conv_takes_one_and_three_dimensions_and_groups() -> None:
    for lhs_shape, rhs_shape, numbers, groups in (
        ((2, 9, 4), (3, 4, 6), ("NHC", "HIO", "NHC"), 1),
        ((2, 4, 5, 6, 3), (2, 3, 1, 3, 4), ("NDHWC", "DHWIO", "NDHWC"), 1),
        ((2, 5, 6, 8), (3, 3, 4, 6), NHWC, 2),
    ):
        lhs, rhs = data(9, lhs_shape, rhs_shape)
        want = lax.conv_general_dilated(
            lhs, rhs, (1,) * (lhs.ndim - 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )
        assert_same(st.sparse_conv(lhs, rhs, feature_group_count=groups), want)


def test_arguments_for_each_dimension_may_be_any_sequence() -> None:
    lhs, rhs = data(3, (2, 7, 8, 6), (3, 3, 6, 4))
    want = st.sparse_conv(lhs, rhs, strides=(2, 1), padding=((1, 0), (2, 2)))
    for strides, padding in (
        ([2, 1], [[1, 0], 2]),
        (np.array([2, 1]), np.array([[1, 0], [2, 2]])),
        (np.array([2, 1]), ((np.int64(1), 0), np.int64(2))),
    ):
        assert_same(st.sparse_conv(lhs, rhs, strides=strides, padding=padding), want)


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"mode": "fast"}, ValueError, ["mode", "'fast'", "'auto'", "'sparse'", "'dense'"]),
        ({"mode": None}, ValueError, ["mode", "None", "'auto'"]),
        ({"strides": 0}, ValueError, ["strides", "0", "at least 1"]),
        ({"strides": (1, -2)}, ValueError, ["strides", "(1, -2)", "at least 1"]),
        ({"strides": (1, 1, 1)}, ValueError, ["strides", "(1, 1, 1)", "sequence of 2"]),
        ({"strides": 1.5}, TypeError, ["strides", "1.5", "integer"]),
        ({"strides": "2"}, TypeError, ["strides", "'2'", "integer"]),
        ({"padding": "FULL"}, ValueError, ["padding", "'FULL'", "'SAME'", "'VALID'"]),
        ({"padding": ((1, 1),)}, ValueError, ["padding", "((1, 1),)", "sequence of 2"]),
        ({"padding": ((1, 1, 1), (1, 1))}, ValueError, ["padding", "((1, 1, 1), (1, 1))", "(low, high)"]),
        ({"padding": 0.5}, TypeError, ["padding", "0.5", "integer"]),
        ({"input_dilation": 0}, ValueError, ["input_dilation", "0", "at least 1"]),
        ({"input_dilation": 2}, ValueError, ["padding", "input_dilation", "'SAME'"]),
        ({"kernel_dilation": (1, 0)}, ValueError, ["kernel_dilation", "(1, 0)", "at least 1"]),
        ({"feature_group_count": 0}, ValueError, ["feature_group_count", "0", "positive"]),
        ({"feature_group_count": 4}, ValueError, ["feature_group_count", "4", "divide"]),
        ({"feature_group_count": "2"}, TypeError, ["feature_group_count", "'2'", "integer"]),
        ({"mode": "sparse", "kernel_dilation": 2}, ValueError, ["mode='sparse'", "rhs_dilation", "'auto'"]),
        (
            {"mode": "sparse", "feature_group_count": 2, "rhs": (3, 3, 3, 4)},
            ValueError,
            ["mode='sparse'", "feature_gr"],
        ),
        ({"strides": 2**31}, ValueError, ["strides", str(2**31), str(2**31 - 1)]),
        ({"padding": ((0, 2**70), (0, 0))}, ValueError, ["padding", str(2**70), str(2**31 - 1)]),
        ({"relu_input": "False"}, TypeError, ["relu_input", "'False'", "True or False"]),
        ({"precision": {}}, ValueError, ["Precision"]),
        ({"rhs": (3, 3, 5, 4)}, ValueError, ["rhs", "6 features", "(3, 3, 5, 4)"]),
        ({"rhs": (3, 3, 6)}, ValueError, ["rhs", "rank", "(3, 3, 6)"]),
        ({"lhs": (5, 6)}, ValueError, ["lhs", "rank", "(5, 6)"]),
        ({"rhs": (0, 3, 6, 4)}, ValueError, ["rhs", "kernel size", "(0, 3, 6, 4)"]),
    ],
    ids=str,
)
def test_bad_arguments_raise_naming_the_argument_what_was_given_and_what_is_accepted(
    arguments: dict[str, Any], exception: type[Exception], pieces: list[str]
) -> None:
    arguments = dict(arguments)
    lhs, rhs = data(10, arguments.pop("lhs", (2, 7, 8, 6)), arguments.pop("rhs", (3, 3, 6, 4)))
    for call in (st.sparse_conv, jax.jit(lambda lhs, rhs: st.sparse_conv(lhs, rhs, **arguments))):
        with pytest.raises(exception) as caught:
            call(lhs, rhs, **(arguments if call is st.sparse_conv else {}))
        assert all(piece in str(caught.value) for piece in pieces), caught.value


@pytest.mark.parametrize("stride", [10**7, 2**31 - 1])
def test_work_does_not_grow_with_a_stride_beyond_the_input(stride: int) -> None:
    lhs, rhs = data(12, (2, 6, 5, 8), (3, 3, 8, 4))

    def gradients(conv: Callable[..., jax.Array]) -> Any:
        return jax.grad(lambda lhs, rhs: (conv(lhs, rhs) ** 2).sum(), (0, 1))(lhs, rhs)

    start = time.perf_counter()
    got = gradients(lambda lhs, rhs: st.sparse_conv(lhs, rhs, strides=(stride, 1), mode="sparse"))
    assert time.perf_counter() - start < 20  # a minute for the smaller stride, before; about half a second now
    want = gradients(lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, (stride, 1), "SAME", dimension_numbers=NHWC))
    for ours, stock in zip(got, want, strict=True):
        assert_same(ours, stock)


def test_mixed_dtypes_are_a_type_error_that_names_both() -> None:
    (lhs,), (rhs,) = data(10, (2, 7, 8, 6)), data(11, (3, 3, 6, 4), dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match=r"lhs and rhs .* float32 and bfloat16"):
        st.sparse_conv(lhs, rhs)


@pytest.mark.parametrize("arguments", [{}, {"strides": 2}, {"kernel_dilation": 2}], ids=str)
@pytest.mark.parametrize("relu_input", [False, True])
def test_forward_mode_of_sparse_conv_equals_lax(relu_input: bool, arguments: dict[str, Any]) -> None:
    x, rhs, dx, drhs = data(10, *((2, 7, 8, 6), (3, 3, 6, 4)) * 2, zeros=0.1)
    (strides, dilation) = ((arguments.get(name, 1),) * 2 for name in ("strides", "kernel_dilation"))

    def stock(x: jax.Array, rhs: jax.Array) -> jax.Array:
        relu = jax.nn.relu(x)
        return lax.conv_general_dilated(relu, rhs, strides, "SAME", None, dilation, NHWC)

    def ours(x: jax.Array, rhs: jax.Array) -> jax.Array:
        return st.sparse_conv(jax.nn.relu(x), rhs, relu_input=relu_input, **arguments)

    def derivatives(conv: Callable[..., jax.Array]) -> Any:
        def forward(x: jax.Array, rhs: jax.Array) -> jax.Array:
            return jax.jvp(lambda x, rhs: conv(x, rhs) ** 2, (x, rhs), (dx, drhs))[1]

        return jax.jit(
            lambda x, rhs: (
                jax.jvp(conv, (x, rhs), (dx, drhs)),
                jax.linearize(conv, x, rhs)[1](dx, drhs),
                jax.jvp(forward, (x, rhs), (dx, drhs)),
                jax.grad(lambda x, rhs: forward(x, rhs).sum(), (0, 1))(x, rhs),
                jax.vmap(lambda dx: jax.jvp(lambda x: conv(x, rhs), (x,), (dx,))[1])(jnp.stack([dx, -dx])),
                jax.jacfwd(lambda scale: conv(x, scale * rhs))(2.0),
            )
        )(x, rhs)

    assert_same(derivatives(ours), derivatives(stock))


@pytest.mark.parametrize("groups", [1, 2])
def test_with_relu_input_forward_mode_is_the_transpose_of_reverse_mode(groups: int) -> None:
    lhs, rhs, tangent, g = data(11, (2, 7, 8, 6), (3, 3, 6 // groups, 4), (2, 7, 8, 6), (2, 7, 8, 4))

    def conv(lhs: jax.Array) -> jax.Array:
        return st.sparse_conv(lhs, rhs, relu_input=True, feature_group_count=groups)

    forward, reverse = jax.jvp(conv, (lhs,), (tangent,))[1], jax.vjp(conv, lhs)[1](g)[0]
    assert (forward * g).sum() == (tangent * reverse).sum() != 0
    assert not np.any(np.asarray(reverse)[np.asarray(lhs) == 0])


# relu_input


@pytest.mark.parametrize("mode", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("arguments", [{}, {"strides": 2}, {"kernel_dilation": 2}, {"feature_group_count": 2}], ids=str)
def test_with_relu_input_the_input_gradient_is_the_dense_one_where_the_input_is_nonzero_and_zero_elsewhere(
    arguments: dict[str, Any], mode: str
) -> None:
    if mode == "sparse" and ("kernel_dilation" in arguments or "feature_group_count" in arguments):
        pytest.skip("no sparse kernels")
    groups = arguments.get("feature_group_count", 1)
    lhs, rhs = data(12, (2, 7, 8, 6), (3, 3, 6 // groups, 4))

    def gradients(**more: Any) -> tuple[jax.Array, jax.Array]:
        def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return (st.sparse_conv(lhs, rhs, **arguments, **more) ** 2).sum()

        return jax.grad(loss, (0, 1))(lhs, rhs)

    dlhs, drhs = gradients()
    assert_same(gradients(relu_input=True, mode=mode), (jnp.where(lhs == 0, 0.0, dlhs), drhs))


def test_with_relu_input_gradients_through_a_relu_equal_lax_to_any_order() -> None:
    x, rhs, dx, drhs = data(13, *((2, 7, 8, 6), (3, 3, 6, 4)) * 2, zeros=0.1)

    def everything(conv: Callable[..., jax.Array]) -> Any:
        def loss(x: jax.Array, rhs: jax.Array) -> jax.Array:
            return (conv(jax.nn.relu(x), rhs) ** 2).sum()

        gradient = jax.grad(loss, (0, 1))

        def product(x: jax.Array, rhs: jax.Array, dx: jax.Array, drhs: jax.Array) -> jax.Array:
            return sum((g * t).sum() for g, t in zip(gradient(x, rhs), (dx, drhs), strict=True))

        return jax.jit(
            lambda x, rhs, dx, drhs: (
                gradient(x, rhs),
                jax.jvp(gradient, (x, rhs), (dx, drhs)),
                jax.grad(product, (0, 1))(x, rhs, dx, drhs),
            )
        )(x, rhs, dx, drhs)

    assert_same(
        everything(lambda lhs, rhs: st.sparse_conv(lhs, rhs, relu_input=True)),
        everything(lambda lhs, rhs: lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)),
    )


def test_a_false_promise_of_relu_input_loses_gradients() -> None:
    lhs, rhs = data(14, (1, 5, 5, 3), (3, 3, 3, 4))

    def gradient(relu_input: bool) -> jax.Array:
        return jax.grad(lambda lhs: st.sparse_conv(lhs, rhs, relu_input=relu_input).sum())(lhs)

    assert np.any((np.asarray(gradient(False)) != 0) & (np.asarray(lhs) == 0))
    assert not np.any((np.asarray(gradient(True)) != 0) & (np.asarray(lhs) == 0))


# vmap


CONVOLUTIONS: dict[str, Callable[..., jax.Array]] = {
    "conv_general_dilated": lambda lhs, rhs: st.conv_general_dilated(lhs, rhs, (2, 1), "SAME", dimension_numbers=NHWC),
    "sparse_conv": lambda lhs, rhs: st.sparse_conv(lhs, rhs, strides=(2, 1)),
}


def stock(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(lhs, rhs, (2, 1), "SAME", dimension_numbers=NHWC)


def batched(shape: tuple[int, ...], axis: int | None, size: int) -> tuple[int, ...]:
    return shape if axis is None else (*shape[:axis], size, *shape[axis:])


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize("axes", [(0, None), (3, None), (None, 0), (None, 4), (0, 0), (2, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_vmap_of_the_convolution_and_of_its_gradients_equals_lax(
    name: str, axes: tuple[int | None, int | None], size: int
) -> None:
    lhs, rhs = data(15, batched((2, 5, 6, 3), axes[0], size), batched((3, 2, 3, 4), axes[1], size))

    def everything(conv: Callable[..., jax.Array]) -> Any:
        def loss(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return (conv(lhs, rhs) ** 2).sum()

        return jax.jit(
            lambda lhs, rhs: (
                jax.vmap(conv, axes, out_axes=1)(lhs, rhs),
                jax.vmap(jax.grad(loss, (0, 1)), axes)(lhs, rhs),
            )
        )(lhs, rhs)

    assert_same(everything(CONVOLUTIONS[name]), everything(stock))


def test_nested_vmaps_equal_lax() -> None:
    lhs, rhs = data(16, (2, 3, 2, 5, 6, 3), (3, 4, 3, 2, 3, 4))
    for outer, inner in itertools.product([(0, None), (None, 1), (1, 0)], [(0, None), (None, 0), (0, 0)]):
        drop_lhs = sum(axes[0] is None for axes in (outer, inner))
        drop_rhs = sum(axes[1] is None for axes in (outer, inner))
        a, b = lhs, rhs
        for _ in range(drop_lhs):
            a = a[0]
        for _ in range(drop_rhs):
            b = b[:, 0] if b.ndim == 6 and outer[1] == 1 else b[0]
        if outer[0] is not None and inner[0] is not None and outer[1] is not None and inner[1] is not None:
            b = b[:2]  # inner axis of both: sizes 2 (a) and 3 (b)
        try:
            want = jax.vmap(jax.vmap(stock, inner), outer)(a, b)
        except ValueError:
            continue  # sizes that do not match
        assert_same(jax.vmap(jax.vmap(CONVOLUTIONS["sparse_conv"], inner), outer)(a, b), want)


def test_vmap_over_no_elements_gives_no_elements() -> None:
    lhs, rhs = data(15, (0, 2, 5, 6, 3), (0, 3, 2, 3, 4))
    for axes in ((0, None), (None, 0), (0, 0)):
        a, b = (lhs if axes[0] == 0 else jnp.zeros(lhs.shape[1:])), (rhs if axes[1] == 0 else jnp.zeros(rhs.shape[1:]))
        assert_same(jax.vmap(CONVOLUTIONS["sparse_conv"], axes)(a, b), jax.vmap(stock, axes)(a, b))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_never_leaves_the_sparse_kernels(axes: tuple[int | None, int | None]) -> None:
    lhs, rhs = data(15, batched((2, 5, 6, 3), axes[0], 3), batched((3, 2, 3, 4), axes[1], 3))

    def gradients(lhs: jax.Array, rhs: jax.Array) -> Any:
        return jax.vmap(
            jax.grad(lambda lhs, rhs: (st.sparse_conv(lhs, rhs, relu_input=True) ** 2).sum(), (0, 1)), axes
        )(lhs, rhs)

    names = primitive_names(gradients, lhs, rhs)
    assert {"sparse_conv_fwd", "sparse_conv_bwd_input_masked", "sparse_conv_bwd_weights"} <= names
    assert not {"conv_general_dilated", "dot_general"} & names


def test_vmap_over_the_input_folds_into_one_call_and_over_both_loops() -> None:
    lhs, rhs = data(15, (3, 2, 5, 6, 3), (3, 3, 2, 3, 4))
    folded = primitive_names(jax.vmap(CONVOLUTIONS["sparse_conv"], (0, None)), lhs, rhs[0])
    assert "scan" not in folded and "while" not in folded
    assert "scan" in primitive_names(jax.vmap(CONVOLUTIONS["sparse_conv"]), lhs, rhs)


# explain


def test_explain_names_a_path_and_a_reason_for_each_component() -> None:
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 28, 28, 64), (3, 3, 64, 64)))
    components = {"fwd", "bwd_input", "bwd_weights"}
    for density, path in ((0.02, "sparse"), (None, "sparse")):
        explanation = st.explain(lhs, rhs, density=density)
        assert set(explanation) == components
        for component in explanation.values():
            assert component.path == path and component.reason
    for mode in ("sparse", "dense"):
        assert {c.path for c in st.explain(lhs, rhs, mode=mode).values()} == {mode}
    for relu_input in (False, True):
        explanation = st.explain(lhs, rhs, density=0.25, relu_input=relu_input)
        lines = str(explanation).splitlines()
        assert [line.split()[:2] for line in lines] == [[name, c.path] for name, c in explanation.items()]
        for component in explanation.values():
            assert component.plan["dense_gflop"] == pytest.approx(2e-9 * 4 * 28**2 * 9 * 64**2)
            assert component.plan["expected_gflop"] == pytest.approx(0.25 * 2e-9 * 4 * 28**2 * 9 * 64**2)


@pytest.mark.parametrize("features", [(64, 64), (256, 16), (16, 16), (24, 250)], ids=str)
@pytest.mark.parametrize("size", [1, 3])
def test_explain_says_how_many_zeros_make_a_call_sparse(features: tuple[int, int], size: int, isa: str) -> None:
    shapes = ((4, 28, 28, features[0]), (size, size, *features))
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    for name, component in st.explain(lhs, rhs).items():
        if component.path == "lax":
            assert isa == "portable"
            continue
        limit = float(component.plan["break_even_density"])
        assert 0 <= limit <= 1
        if not 0 < limit < 1:
            assert f"{component.path}, however {'few' if limit else 'many'}" in component.reason
        else:
            assert component.path == "sparse" and f" {100 * (1 - limit):.0f} % zeros" in component.reason
        for density, path in ((limit - 0.01, "sparse"), (limit + 0.01, "dense")):
            if 0 <= density <= 1:
                assert st.explain(lhs, rhs, density=density)[name].path == path, (name, limit)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"feature_group_count": 2, "rhs": (3, 3, 3, 4)}, "feature_group_count"),
        ({"input_dilation": 2, "padding": 1}, "lhs_dilation"),
        ({"kernel_dilation": 2}, "rhs_dilation"),
        ({"padding": -1}, "padding"),
        ({"dtype": jnp.int32}, "int32"),
        ({"lhs": (2, 4, 5, 6, 6), "rhs": (3, 3, 3, 6, 4)}, "spatial dimensions"),
    ],
    ids=str,
)
def test_explain_says_lax_and_why_where_lax_computes(arguments: dict[str, Any], reason: str) -> None:
    arguments = dict(arguments)
    dtype = arguments.pop("dtype", jnp.float32)
    lhs, rhs = data(10, arguments.pop("lhs", (2, 7, 8, 6)), arguments.pop("rhs", (3, 3, 6, 4)), dtype=dtype)
    for component in st.explain(lhs, rhs, **arguments).values():
        assert component.path == "lax" and reason in component.reason


def test_explain_says_lax_where_auto_leaves_a_component_to_lax() -> None:
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 28, 28, 3), (3, 3, 3, 64)))
    explanation = st.explain(lhs, rhs)
    assert explanation["bwd_input"].path == "lax" and "few input features" in explanation["bwd_input"].reason
    assert explanation["fwd"].path != "lax" and explanation["bwd_weights"].path != "lax"
    assert st.explain(lhs, rhs, mode="sparse")["bwd_input"].path == "sparse"


def test_auto_runs_the_path_that_explain_says() -> None:
    for features, size, relu_input in itertools.product((3, 16), (1, 3), (False, True)):
        lhs, rhs = data(17, (2, 9, 9, features), (size, size, features, 16))
        fun = functools.partial(st.sparse_conv, relu_input=relu_input)
        gradient = jax.jit(jax.grad(lambda lhs, rhs, fun=fun: (fun(lhs, rhs) ** 2).sum()))
        says = st.explain(lhs, rhs, relu_input=relu_input)["bwd_input"].path
        text = gradient.lower(lhs, rhs).as_text()
        ours = (features, size, relu_input) != (3, 3, False)
        target = f"sparsetrain_conv_bwd_input{'_masked' * relu_input}_v1"
        assert (target in text) == (says != "lax") == ours
        want = jax.grad(lambda lhs, rhs: (stock_same(lhs, rhs) ** 2).sum())(lhs, rhs)
        assert_same(gradient(lhs, rhs), jnp.where(lhs == 0, 0, want) if relu_input else want)


def stock_same(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def test_explain_raises_for_bad_arguments() -> None:
    lhs, rhs = data(10, (2, 7, 8, 6), (3, 3, 6, 4))
    for density in (-0.1, 1.1):
        with pytest.raises(ValueError, match="density"):
            st.explain(lhs, rhs, density=density)
    with pytest.raises(TypeError, match="density must be a fraction"):
        st.explain(lhs, rhs, density="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode"):
        st.explain(lhs, rhs, mode="fast")
    with pytest.raises(TypeError):
        st.explain(lhs, rhs, stride=2)


# telemetry


def test_sparsity_is_the_fraction_of_zeros_overall_and_per_axis() -> None:
    x = jnp.array([[0.0, 1.0, -0.0], [0.0, 2.0, 3.0]])
    np.testing.assert_allclose(st.sparsity(x), 0.5)
    np.testing.assert_allclose(st.sparsity(x, axis=0), [1.0, 0.0, 0.5])
    np.testing.assert_allclose(st.sparsity(x, axis=(0, 1)), 0.5)
    assert st.sparsity(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_plot_sparsity_draws_a_line_per_layer() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = st.plot_sparsity({"a": [0.1, 0.2], "b": [0.5, 0.6]})
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [50, 60])
    ax = st.plot_sparsity([{"block": {"conv": jnp.float32(0.25)}}, {"block": {"conv": jnp.float32(0.75)}}])
    assert [line.get_label() for line in ax.lines] == ["block/conv"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [25, 75])
    with pytest.raises(ValueError, match="records"):
        st.plot_sparsity([])


def test_ours_may_be_put_in_place_of_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any of its places. What falls back must reach the stock convolution, not itself, in its gradients too."""
    lhs, rhs, grouped = data(20, (2, 7, 8, 6), (3, 2, 6, 4), (3, 2, 3, 4))
    signal, window = data(21, (40,), (5,))

    def everything() -> Any:
        def loss(lhs: jax.Array, rhs: jax.Array, groups: int) -> jax.Array:
            call = lax.conv_general_dilated
            return (call(lhs, rhs, (1, 2), "SAME", None, None, NHWC, feature_group_count=groups) ** 2).sum()

        return (
            jax.grad(loss, (0, 1))(lhs, rhs, 1),
            jax.grad(loss, (0, 1))(lhs, grouped, 2),
            jax.vmap(jax.grad(loss, (0, 1)), (0, None, None))(lhs[:, None], grouped, 2),
            lax.conv_transpose(lhs, rhs, (2, 1), "SAME"),
            jnp.convolve(signal, window),
            jax.scipy.signal.convolve2d(lhs[0, :, :, 0], rhs[:, :, 0, 0]),
            st.nnx.sparsify(nnx.Conv(6, 4, 3, rngs=nnx.Rngs(0))).conv_general_dilated is not lax.conv_general_dilated,
        )

    want = jax.tree.map(np.asarray, everything())
    for module in (lax, importlib.import_module("jax._src.lax.convolution")):
        monkeypatch.setattr(module, "conv_general_dilated", st.conv_general_dilated)
        jax.tree.map(np.testing.assert_array_equal, everything(), want)
    assert isinstance(st.nnx.sparsify(nnx.Conv(6, 4, 3, rngs=nnx.Rngs(0))).conv_general_dilated, ConvHook)
