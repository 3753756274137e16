"""The tables of docs/jax.md say what is so. ``python tests/test_docs.py`` writes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from test_conv import SPARSE_NAMES
from test_sharding import LAYOUTS

import sparsetrain_jax as st
from sparsetrain_jax import primitives
from sparsetrain_jax.shapes import ConvSpec

PAGE = Path(__file__).parents[1] / "docs" / "jax.md"
SPEC = ConvSpec((5, 6), (3, 2), (1, 1), ((1, 1), (0, 1)))
SHAPES = {"lhs": (2, 5, 6, 8), "rhs": (3, 2, 8, 4), "g": (2, 5, 6, 4)}

Bilinear = Callable[[jax.Array, jax.Array], jax.Array]


def stock_fwd(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        lhs, rhs, SPEC.strides, SPEC.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def stock_bwd_input(g: jax.Array, rhs: jax.Array) -> jax.Array:
    return jax.vjp(lambda lhs: stock_fwd(lhs, rhs), jnp.zeros(SHAPES["lhs"]))[1](g)[0]


def stock_bwd_weights(lhs: jax.Array, g: jax.Array) -> jax.Array:
    return jax.vjp(lambda rhs: stock_fwd(lhs, rhs), jnp.zeros(SHAPES["rhs"]))[1](g)[0]


MASK = np.random.default_rng(1).integers(0, 2, SHAPES["lhs"]).astype(np.float32)

COMPONENTS: dict[str, tuple[tuple[str, str], Bilinear, Bilinear]] = {
    "forward": (("lhs", "rhs"), lambda a, b: primitives.sparse_conv_fwd(a, b, spec=SPEC), stock_fwd),
    "input gradient": (("g", "rhs"), lambda a, b: primitives.sparse_conv_bwd_input(a, b, spec=SPEC), stock_bwd_input),
    "input gradient, `relu_input`": (
        ("g", "rhs"),
        lambda a, b: primitives.sparse_conv_bwd_input_masked(a, b, jnp.asarray(MASK), spec=SPEC),
        lambda a, b: stock_bwd_input(a, b) * MASK,
    ),
    "kernel gradient": (
        ("lhs", "g"),
        lambda a, b: primitives.sparse_conv_bwd_weights(a, b, spec=SPEC),
        stock_bwd_weights,
    ),
}


def exported(f: Bilinear) -> Bilinear:
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in st.custom_calls()]
    return lambda a, b: export.export(jax.jit(f), disabled_checks=checks)(a, b).call(a, b)


def twice(x: jax.Array) -> jax.Array:
    return jnp.stack([x, 2 * x, -x])


TRANSFORMATIONS: dict[str, Callable[[Bilinear], Callable[[jax.Array, jax.Array], Any]]] = {
    "`jit`": lambda f: jax.jit(f),
    "`jvp`, `jacfwd`, `linearize`": lambda f: lambda a, b: jax.linearize(f, a, b)[1](a, b),
    "`vjp`, `grad`": lambda f: lambda a, b: jax.grad(lambda a, b: (f(a, b) ** 2).sum(), (0, 1))(a, b),
    "`grad` of `grad`": lambda f: lambda a, b: jax.grad(lambda b: jax.grad(lambda a: (f(a, b) ** 2).sum())(a).sum())(b),
    "`jvp` of `grad` (Hessian-vector product)": lambda f: (
        lambda a, b: jax.jvp(jax.grad(lambda b: (f(a, b) ** 2).sum()), (b,), (b,))
    ),
    "`linear_transpose`": lambda f: lambda a, b: jax.linear_transpose(lambda a: f(a, b), a)(f(a, b)),
    "`vmap` over the first operand": lambda f: lambda a, b: jax.vmap(f, (0, None))(twice(a), b),
    "`vmap` over the second operand": lambda f: lambda a, b: jax.vmap(f, (None, 0))(a, twice(b)),
    "`vmap` over both": lambda f: lambda a, b: jax.vmap(f)(twice(a), twice(b)),
    "`checkpoint`": lambda f: lambda a, b: jax.grad(jax.checkpoint(lambda a: (f(a, b) ** 2).sum()))(a),
    "`scan`, `while_loop`, `cond`": lambda f: (
        lambda a, b: lax.cond(
            a.sum() > -1e9, lambda: lax.fori_loop(0, 2, lambda i, s: s + f(a, b), f(a, b)), lambda: f(a, b)
        )
    ),
    "`export`": exported,
    "`lower().compile()`": lambda f: lambda a, b: jax.jit(f).lower(a, b).compile()(a, b),
}


def names_and_loops(function: Callable[..., Any], *args: Any) -> tuple[set[str], bool]:
    text = str(jax.make_jaxpr(function)(*args))
    return set(re.findall(r"\b(sparse_conv_\w+|conv_general_dilated|dot_general)\b", text)), "scan[" in text


def status(transformation: str, component: str) -> str:
    """What the page says: "sparse", "sparse, in a loop", "lax" or "no". Raises if the result is wrong."""
    (first, second), ours, stock = COMPONENTS[component]
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-1, 2, SHAPES[name]), jnp.float32) for name in (first, second))
    transform = TRANSFORMATIONS[transformation]
    try:
        got = transform(ours)(a, b)
    except (TypeError, NotImplementedError):
        return "no"
    jax.tree.map(np.testing.assert_array_equal, got, transform(stock)(a, b))
    if transformation in ("`export`", "`lower().compile()`"):
        return "sparse" if "sparsetrain_conv" in jax.jit(ours).lower(a, b).as_text() else "lax"
    names, loops = names_and_loops(transform(ours), a, b)
    assert names, "no convolution at all"
    if not names <= SPARSE_NAMES:
        return "lax"
    return "sparse, in a loop" if loops and "vmap" in transformation else "sparse"


def support_table() -> str:
    rows = [["", *COMPONENTS], ["---"] * (len(COMPONENTS) + 1)]
    rows += [[name, *(status(name, component) for component in COMPONENTS)] for name in TRANSFORMATIONS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def sharding_table() -> str:
    meaning = {
        "batch": "the batch",
        "batch_over_two_axes": "the batch, over two mesh axes",
        "output_features": "output features",
        "batch_and_output_features": "batch and output features",
        "input_features": "input features (Auto axes; an error with Explicit ones)",
    }
    rows = [["sharded dimension", "all-gathers", "all-reduces in forward and both gradients"], ["---"] * 3]
    rows += [[meaning[name], "0", str(reductions)] for name, (_, _, _, reductions) in LAYOUTS.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


TABLES = {"support": support_table, "sharding": sharding_table}


def sections(text: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- table: (\w+) -->\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_page_on_jax_say_what_is_so(name: str) -> None:
    if not PAGE.exists():
        pytest.skip("the documentation is not here")
    assert sections(PAGE.read_text())[name] == TABLES[name]()


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n\n).*?(\n\n<!-- end -->)"
        page, count = re.subn(pattern, lambda m, table=table: m[1] + table() + m[2], page, flags=re.DOTALL)
        assert count == 1, name
    PAGE.write_text(page)
    sys.stdout.write("\n\n".join(sections(page).values()) + "\n")
