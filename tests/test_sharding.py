"""Several devices: each computes its own shard, without gathering activations.

The tests of this file run in one other process, which has four host devices; each is a check there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[..., None], *args: Any, name: str = "") -> None:
    CHECKS[name or function.__name__] = lambda: function(*args)


def collectives(compiled: Any) -> dict[str, int]:
    text = compiled.as_text()
    names = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: count for name, count in counts.items() if count}


def data() -> tuple[Any, Any]:
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = ((8, 8, 6, 8), (3, 3, 8, 8))
    lhs, rhs = (jnp.asarray(rng.choice([-1, 1], shape) * (rng.random(shape) > 0.5), jnp.float32) for shape in shapes)
    return lhs, rhs


def same(conv: Callable[..., Any], lhs: Any, rhs: Any, out_sharding: Any = None) -> Any:
    """A function with the arguments of ``conv_general_dilated``, as a layer calls it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=numbers, out_sharding=out_sharding)


def functions() -> dict[str, Callable[[Any, Any], Any]]:
    import sparsetrain_jax as st

    return {
        "general": lambda lhs, rhs: same(st.conv_general_dilated, lhs, rhs),
        "relu_input": lambda lhs, rhs: st.sparse_conv(lhs, rhs, relu_input=True),
        "bfloat16": lambda lhs, rhs: st.sparse_conv(lhs.astype("bfloat16"), rhs.astype("bfloat16")),
        "bfloat16_relu_input": lambda lhs, rhs: st.sparse_conv(
            lhs.astype("bfloat16"), rhs.astype("bfloat16"), relu_input=True
        ),
    }


def everything(conv: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    import jax

    def run(lhs: Any, rhs: Any) -> Any:
        return conv(lhs, rhs), jax.grad(lambda lhs, rhs: (conv(lhs, rhs).astype("float32") ** 2).sum(), (0, 1))(
            lhs, rhs
        )

    return jax.jit(run)


def assert_equal(got: Any, want: Any) -> None:
    import jax
    import numpy as np

    jax.tree.map(lambda g, w: np.testing.assert_array_equal(np.asarray(g), np.asarray(w)), got, want)


# mesh sizes, lhs spec, rhs spec, collectives of forward and both gradients
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...], int]] = {
    "batch": ((4,), ("a",), (), 1),  # psum of drhs
    "batch_over_two_axes": ((2, 2), (("a", "b"),), (), 1),
    "output_features": ((4,), (), (None, None, None, "a"), 1),  # psum of dlhs
    "batch_and_output_features": ((2, 2), ("a",), (None, None, None, "b"), 2),
    "input_features": ((4,), (None, None, None, "a"), (None, None, "a"), 1),  # psum of out
}


def sharded_calls_compute_their_own_shard(layout: str, kind: str, function: str) -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    sizes, lhs_spec, rhs_spec, reductions = LAYOUTS[layout]
    lhs, rhs = data()
    run = everything(functions()[function])
    want = run(lhs, rhs)
    mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(getattr(AxisType, kind),) * len(sizes))
    with jax.set_mesh(mesh):
        lhs = jax.device_put(lhs, NamedSharding(mesh, P(*lhs_spec)))
        rhs = jax.device_put(rhs, NamedSharding(mesh, P(*rhs_spec)))
        if layout == "input_features" and kind == "Explicit":
            with pytest.raises(Exception, match="must not be sharded"):
                run(lhs, rhs)
            return
        compiled = run.lower(lhs, rhs).compile()
        assert collectives(compiled) == {"all-reduce": reductions}, collectives(compiled)
        got = run(lhs, rhs)
        assert_equal(got, want)
        assert got[1][1].sharding.is_equivalent_to(rhs.sharding, 4), got[1][1].sharding
        assert got[1][0].sharding.is_equivalent_to(lhs.sharding, 4), got[1][0].sharding


for layout_ in LAYOUTS:
    for kind_ in ("Auto", "Explicit"):
        narrow_ = ("bfloat16",) * (layout_ == "batch") + ("bfloat16_relu_input",) * (layout_ != "input_features")
        for function_ in ("general", "relu_input", *narrow_):
            check(
                sharded_calls_compute_their_own_shard,
                layout_,
                kind_,
                function_,
                name=f"sharded_calls_compute_their_own_shard[{layout_}-{kind_}-{function_}]",
            )


# lhs spec, rhs spec, out_sharding; all on a mesh of 2 x 2 Explicit axes. The last two need communication.
OUT_SHARDINGS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]] = {
    "batch": (("a",), (), ("a",)),
    "output_features": ((), (None, None, None, "b"), (None, None, None, "b")),
    "batch_and_output_features": (("a",), (None, None, None, "b"), ("a", None, None, "b")),
    "input_features": ((None, None, None, "a"), (None, None, "a"), ()),
    "of_its_own": (("a",), (), (None, "b")),
}


def out_sharding_is_that_of_lax_and_keeps_the_kernels(layout: str, relu_input: bool) -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from sparsetrain_jax.conv import ConvHook

    lhs_spec, rhs_spec, out_spec = OUT_SHARDINGS[layout]
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    lhs, rhs = data()

    def run(conv: Callable[..., Any], out_sharding: Any) -> Callable[[Any, Any], Any]:
        return everything(lambda lhs, rhs: same(conv, lhs, rhs, out_sharding))

    hook = ConvHook(relu_input=relu_input)
    want = run(hook, None)(lhs, rhs)  # not from lax: XLA gets the kernel gradient of "of_its_own" wrong
    for out_sharding in (P(*out_spec), NamedSharding(mesh, P(*out_spec))):
        with jax.set_mesh(mesh):
            a = jax.device_put(lhs, NamedSharding(mesh, P(*lhs_spec)))
            b = jax.device_put(rhs, NamedSharding(mesh, P(*rhs_spec)))
            got, stock = run(hook, out_sharding)(a, b), run(jax.lax.conv_general_dilated, out_sharding)(a, b)
            assert_equal(got, want)
            for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(stock), strict=True):
                assert g.sharding.is_equivalent_to(w.sharding, 4), (g.sharding, w.sharding)
            assert "sparse_conv_fwd" in str(jax.make_jaxpr(run(hook, out_sharding))(a, b))
            if layout not in ("input_features", "of_its_own"):
                assert "all-gather" not in collectives(run(hook, out_sharding).lower(a, b).compile())


for layout_ in OUT_SHARDINGS:
    for relu_input_ in (False, True):
        name_ = f"out_sharding_is_that_of_lax_and_keeps_the_kernels[{layout_}-relu_input={relu_input_}]"
        check(out_sharding_is_that_of_lax_and_keeps_the_kernels, layout_, relu_input_, name=name_)


def sparsify_keeps_shardings_and_exchanges_convolutions(kinds: str, out_sharding: bool) -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=tuple(getattr(AxisType, kind) for kind in kinds.split()))
    lhs, rhs = data()

    def conv(lhs: Any, rhs: Any) -> Any:
        return same(jax.lax.conv_general_dilated, lhs, rhs, P("a") if out_sharding else None)

    def loss(lhs: Any, rhs: Any) -> Any:
        return (conv(jax.nn.relu(conv(lhs, rhs)), rhs) ** 2).sum()

    step = jax.grad(loss, (0, 1))  # its kernel gradients have an out_sharding in any case
    want = step(lhs, rhs) if not out_sharding else None
    with jax.set_mesh(mesh):
        a, b = jax.device_put(lhs, NamedSharding(mesh, P("a"))), jax.device_put(rhs, NamedSharding(mesh, P()))
        stock = step(a, b)
        inside = jax.jit(jax.grad(st.sparsify(jax.jit(loss)), (0, 1)))
        for run in (st.sparsify(step), jax.jit(st.sparsify(step)), inside):
            got = run(a, b)
            assert_equal(got, stock if want is None else want)
            for g, w in zip(got, stock, strict=True):
                assert jax.typeof(g) == jax.typeof(w)
            assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(a, b))


for kinds_ in ("Explicit Explicit", "Explicit Auto", "Auto Explicit", "Auto Auto"):
    for out_sharding_ in (False, True):
        if kinds_.startswith("Auto") and out_sharding_:
            continue  # an out_sharding over an axis that is not Explicit
        name_ = f"sparsify_keeps_shardings_and_exchanges_convolutions[{kinds_}-out_sharding={out_sharding_}]"
        check(sparsify_keeps_shardings_and_exchanges_convolutions, kinds_, out_sharding_, name=name_)


@check
def sparsify_leaves_shardings_that_only_lax_keeps_to_lax() -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    def conv(lhs: Any, rhs: Any) -> Any:
        return same(jax.lax.conv_general_dilated, lhs, rhs)

    lhs, rhs = data()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        a = jax.device_put(lhs, NamedSharding(mesh, P(None, "a")))
        for run in (st.sparsify(conv), jax.jit(st.sparsify(conv))):
            assert_equal(run(a, rhs), conv(a, rhs))
        (report,) = st.sparsify(conv, explain=True)(a, rhs)
        assert report.paths["fwd"].path == "lax"
        assert "spatial dimension" in report.paths["fwd"].reason


@check
def out_sharding_holds_where_other_axes_are_auto() -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    lhs, rhs = data()
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Auto))
    for spec in (P(), P("a"), P(None, None, None, "a")):
        with jax.set_mesh(mesh):
            a = jax.device_put(lhs, NamedSharding(mesh, spec))
            got, stock = (
                same(conv, a, rhs, P("a")) for conv in (st.conv_general_dilated, jax.lax.conv_general_dilated)
            )
            assert jax.typeof(got) == jax.typeof(stock)
            assert_equal(got, stock)


@check
def a_bad_out_sharding_raises_what_lax_raises() -> None:
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    lhs, rhs = data()
    meshes = [jax.make_mesh((4,), ("a",), axis_types=(getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")]
    for mesh in (None, *meshes):
        for out_sharding in (P("a"), P("no such axis"), P("a", "a"), P(None, None, "a"), P(*"aaaaa"), "a"):
            raised = []
            for conv in (jax.lax.conv_general_dilated, st.conv_general_dilated):
                try:
                    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                        same(conv, lhs, rhs, out_sharding)
                    raised.append(None)
                except Exception as error:
                    raised.append(type(error))
            assert raised[0] is raised[1], (mesh, out_sharding, raised)


@check
def per_example_gradients_of_explicitly_sharded_examples_need_no_communication() -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    for conv in (functions()["general"], functions()["relu_input"]):
        gradients = jax.jit(
            jax.vmap(jax.grad(lambda x, rhs, conv=conv: (conv(x[None], rhs) ** 2).sum(), (0, 1)), (0, None))
        )
        want = gradients(lhs, rhs)
        for axes in ("a", ("a", "b")):
            with jax.set_mesh(mesh):
                sharded = jax.device_put(lhs, NamedSharding(mesh, P(axes)))
                assert collectives(gradients.lower(sharded, rhs).compile()) == {}
                assert_equal(gradients(sharded, rhs), want)


@check
def per_example_tangents_of_explicitly_sharded_examples_equal_those_of_whole_ones() -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    conv = functions()["relu_input"]
    tangents = jax.jit(
        jax.vmap(lambda x, rhs: jax.jvp(lambda x, rhs: conv(x[None], rhs), (x, rhs), (x, rhs)), (0, None))
    )
    want = tangents(lhs, rhs)
    with jax.set_mesh(mesh):
        assert_equal(tangents(jax.device_put(lhs, NamedSharding(mesh, P("a"))), rhs), want)


@check
def the_weight_gradient_is_one_all_reduce_and_the_other_components_none() -> None:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from sparsetrain_jax import primitives
    from sparsetrain_jax.shapes import ConvSpec

    spec = ConvSpec((8, 6), (3, 3), (1, 1), ((1, 1), (1, 1)))
    lhs, rhs = data()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    lhs, rhs = jax.device_put(lhs, NamedSharding(mesh, P("a"))), jax.device_put(rhs, NamedSharding(mesh, P()))
    for function, operands, want in (
        (primitives.sparse_conv_fwd, (lhs, rhs), {}),
        (primitives.sparse_conv_bwd_input, (lhs, rhs), {}),
        (primitives.sparse_conv_bwd_input_masked, (lhs, rhs, lhs), {}),
        (primitives.sparse_conv_bwd_weights, (lhs, lhs), {"all-reduce": 1}),
        (primitives.sparse_conv_bwd_both, (lhs, rhs, lhs), {"all-reduce": 1}),
        (primitives.sparse_conv_fwd_both, (lhs, rhs, lhs, rhs), {}),
    ):
        run = jax.jit(lambda *operands, function=function: function(*operands, spec=spec))
        assert collectives(run.lower(*operands).compile()) == want, function


@check
def eager_calls_of_sharded_arrays_equal_those_of_whole_ones() -> None:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    for conv in functions().values():
        assert_equal(conv(jax.device_put(lhs, NamedSharding(mesh, P("a"))), rhs), conv(lhs, rhs))


@check
def spatial_sharding_gathers_and_is_right() -> None:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    run = everything(functions()["general"])
    assert_equal(run(jax.device_put(lhs, NamedSharding(mesh, P(None, "a"))), rhs), run(lhs, rhs))


@check
def an_explicitly_sharded_spatial_dimension_is_an_error_that_says_what_to_do() -> None:
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(Exception, match="reshard"):
        functions()["general"](jax.device_put(lhs, NamedSharding(mesh, P(None, "a"))), rhs)


def shard_map_equals_the_whole(check_vma: bool, function: str, axes: str) -> None:
    import jax
    from jax.sharding import PartitionSpec as P

    lhs, rhs = data()
    conv = functions()[function]
    sizes = {"all": (4,), "some": (2, 2)}[axes]
    mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    mapped = jax.shard_map(
        conv, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=check_vma, axis_names={"a"}
    )
    assert_equal(everything(mapped)(lhs, rhs), everything(conv)(lhs, rhs))


for check_vma_ in (True, False):
    for function_ in ("general", "relu_input"):
        for axes_ in ("all", "some"):
            name_ = f"shard_map_equals_the_whole[check_vma={check_vma_}-{function_}-{axes_}]"
            check(shard_map_equals_the_whole, check_vma_, function_, axes_, name=name_)


@check
def a_function_that_shard_map_divides_can_be_exported() -> None:
    import jax
    from jax import export
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    lhs, rhs = data()
    conv = functions()["relu_input"]
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = everything(jax.shard_map(conv, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a")))
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in st.custom_calls()]
    blob = export.export(mapped, disabled_checks=checks)(lhs, rhs).serialize()
    with jax.set_mesh(mesh):
        assert_equal(jax.jit(export.deserialize(blob).call)(lhs, rhs), everything(conv)(lhs, rhs))


@check
def data_parallel_training_over_a_mesh_equals_one_device() -> None:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import sparsetrain_jax as st

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(st.SparseConv(8, (3, 3))(x))
            x = nn.relu(st.SparseConv(16, (3, 3), 2, relu_input=True)(x))
            return nn.Dense(5)(x.mean((1, 2)))

    lhs, _ = data()
    params = Model().init(jax.random.key(0), lhs)

    @jax.jit
    def step(params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(lambda p: (Model().apply(p, x) ** 2).sum())(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(lhs, NamedSharding(mesh, P("a")))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    assert "all-gather" not in collectives(step.lower(everywhere, sharded).compile())
    for _ in range(4):
        params, want = step(params, lhs)
        everywhere, got = step(everywhere, sharded)
        np.testing.assert_allclose(jnp.asarray(got), want, rtol=1e-5)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not run.returncode, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_devices(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def main() -> None:
    results = {}
    for name, run in CHECKS.items():
        try:
            run()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
