"""JAX around the convolutions: control flow, rematerialisation, export, compilation, debugging, telemetry."""

from __future__ import annotations

import functools
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

import sparsetrain_jax as st
from sparsetrain_jax import primitives
from sparsetrain_jax.shapes import ConvSpec

NHWC = ("NHWC", "HWIO", "NHWC")


def operands() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((2, 7, 8, 8), (3, 3, 8, 8))
    lhs, rhs = (jnp.asarray(rng.choice([-1, 1], shape) * (rng.random(shape) > 0.5), jnp.float32) for shape in shapes)
    return lhs, rhs


def stock(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def general(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return st.conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


OURS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"general": general, "sparse_conv": st.sparse_conv}


def equal(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(np.asarray(g), np.asarray(w)), got, want)


# Programs around a convolution. Small integers stay exact in all of them.

Conv = Callable[[jax.Array, jax.Array], jax.Array]


def in_scan(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    def body(carry: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.sign(conv(carry, rhs)) * weight + carry
        return carry, carry.sum()

    return lax.scan(body, lhs, jnp.array([1.0, 2.0, -1.0]))[1] @ jnp.arange(3.0)


def in_while(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    lhs = lax.stop_gradient(lhs)
    return lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sign(conv(c[1], lax.stop_gradient(rhs)))), (0, lhs)
    )[1].sum() + (rhs.sum())


def in_fori(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 2, lambda i, c: conv(c, rhs), lhs).sum()


def in_cond(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.cond(lhs.sum() > 0, lambda: conv(lhs, rhs), lambda: conv(lhs, 2 * rhs)).sum()


def in_switch_under_vmap(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    branches = [lambda x: conv(x, rhs), lambda x: conv(x, -rhs)]
    return jax.vmap(lambda i: lax.switch(i, branches, lhs).sum())(jnp.arange(2)) @ jnp.array([1.0, 2.0])


def in_checkpoint(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return (jax.checkpoint(lambda lhs, rhs: conv(conv(lhs, rhs), rhs))(lhs, rhs)).sum()


def in_nested_jit(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jax.jit(jax.jit(conv))(lhs, rhs).sum()


def in_map(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return lax.map(lambda image: conv(image[None], rhs), lhs).sum()


def in_custom_jvp(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    @jax.custom_jvp
    def f(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return conv(lhs, rhs)

    @f.defjvp
    def f_jvp(primals: Any, tangents: Any) -> Any:
        return conv(*primals), conv(tangents[0], primals[1]) + conv(primals[0], tangents[1])

    return f(lhs, rhs).sum()


def in_per_example_gradients(conv: Conv, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    def gradient(image: jax.Array) -> jax.Array:
        return jax.grad(lambda rhs: (conv(image[None], rhs) ** 2).sum())(rhs)

    return (jax.vmap(gradient)(lhs) * jnp.arange(2.0)[:, None, None, None, None]).sum()


PROGRAMS = {name: value for name, value in dict(globals()).items() if name.startswith("in_")}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("ours", OURS)
def test_programs_and_their_gradients_equal_lax_with_and_without_jit(ours: str, name: str) -> None:
    def run(conv: Conv, jit: Callable[[Any], Any]) -> Any:
        function = jit(lambda lhs, rhs: PROGRAMS[name](conv, lhs, rhs))
        argnums = (1,) if name == "in_while" else (0, 1)
        return function(*operands()), jit(jax.grad(function, argnums))(*operands())

    want = run(stock, jax.jit)
    equal(run(OURS[ours], jax.jit), want)
    equal(run(OURS[ours], lambda f: f), want)


def test_calls_with_jit_disabled_equal_lax() -> None:
    with jax.disable_jit():
        equal(jax.grad(lambda lhs, rhs: general(lhs, rhs).sum(), (0, 1))(*operands()),
              jax.grad(lambda lhs, rhs: stock(lhs, rhs).sum(), (0, 1))(*operands()))  # fmt: skip


# Rematerialisation


def saved(function: Callable[..., Any], policy: Any) -> int:
    """How many forward convolutions the gradient of the rematerialised function runs."""
    remat = jax.checkpoint(lambda lhs, rhs: jnp.sin(function(lhs, rhs)).sum(), policy=policy)
    return str(jax.make_jaxpr(jax.grad(remat, 1))(*operands())).count("sparse_conv_fwd")


@pytest.mark.parametrize("ours", OURS)
def test_dots_saveable_saves_our_convolutions_and_nothing_saveable_does_not(ours: str) -> None:
    assert saved(OURS[ours], st.dots_saveable) == 1
    assert saved(OURS[ours], jax.checkpoint_policies.nothing_saveable) == 2
    assert saved(OURS[ours], jax.checkpoint_policies.everything_saveable) == 1


@pytest.mark.parametrize("policy", [st.dots_saveable, None, "nothing_saveable", "dots_with_no_batch_dims_saveable"])
def test_checkpoint_policies_do_not_change_gradients(policy: Any) -> None:
    policy = getattr(jax.checkpoint_policies, policy) if isinstance(policy, str) else policy

    def gradients(conv: Conv, wrap: Callable[[Any], Any]) -> Any:
        return jax.jit(jax.grad(wrap(lambda lhs, rhs: (conv(jax.nn.relu(conv(lhs, rhs)), rhs)).sum()), (0, 1)))(
            *operands()
        )

    equal(gradients(st.sparse_conv, lambda f: jax.checkpoint(f, policy=policy)), gradients(stock, lambda f: f))


def test_dots_saveable_knows_all_of_our_primitives() -> None:
    eqns = jax.make_jaxpr(second_order)(*operands()).eqns
    ours = [eqn.primitive for eqn in eqns if eqn.primitive.name.startswith("sparse_conv")]
    assert len(set(ours)) == 5 and all(map(st.dots_saveable, ours))
    assert not st.dots_saveable(jax.lax.add_p)


# Both gradients with relu_input at once


BOTH, BOTH_FORWARD = "sparse_conv_bwd_input_masked_sparse_conv_bwd_weights", "sparse_conv_fwd_masked_sparse_conv_fwd"


def calls(function: Callable[..., Any], *args: Any) -> list[str]:
    """Names of our primitives in the function's jaxpr."""
    return re.findall(r"\bsparse_conv_\w+", str(jax.make_jaxpr(function)(*args)))


def promised(lhs: jax.Array, rhs: jax.Array, result: Any = None) -> jax.Array:
    return st.sparse_conv(lhs, rhs, relu_input=True, preferred_element_type=result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def promised_apart(lhs: jax.Array, rhs: jax.Array, result: Any = None) -> jax.Array:
    """``promised``, with a derivative that is a sum of two primitives."""
    return promised(lhs, rhs, result)


@promised_apart.defjvp
def promised_apart_jvp(result: Any, primals: Any, tangents: Any) -> Any:
    (lhs, rhs), (dlhs, drhs) = primals, tangents
    spec = ConvSpec(lhs.shape[1:3], (3, 3), (1, 1), ((1, 1), (1, 1)), result=result and result.name)
    of_lhs = primitives.sparse_conv_fwd_masked(dlhs, rhs, lhs, spec=spec)
    return promised_apart(lhs, rhs, result), of_lhs + promised_apart(lhs, drhs, result)


def energy(conv: Conv) -> Conv:
    return lambda lhs, rhs: (conv(lhs, rhs) ** 2).sum()


def gradient_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the sum of all results, each weighted by -1, 0 and 1."""

    def weighted(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(function(lhs, rhs))
        return sum((leaf * (jnp.arange(leaf.size).reshape(leaf.shape) % 3 - 1)).sum() for leaf in leaves)

    return jax.grad(weighted, (0, 1))


def tangent_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lhs, rhs: jax.jvp(function, (lhs, rhs), (jnp.flip(lhs, 1), jnp.flip(rhs, 2)))


def batch_of(function: Callable[..., Any], *axes: int | None) -> Callable[..., Any]:
    def run(lhs: jax.Array, rhs: jax.Array) -> Any:
        several = [
            x if axis is None else jnp.stack([x, -x, x[::-1]], axis) for x, axis in zip((lhs, rhs), axes, strict=True)
        ]
        return jax.vmap(function, axes)(*several)

    return run


DERIVATIVES: dict[str, Callable[[Conv], Callable[..., Any]]] = {
    "grad": lambda conv: jax.grad(energy(conv), (0, 1)),
    "jvp": lambda conv: tangent_of(conv),
    "jvp of jvp": lambda conv: tangent_of(tangent_of(conv)),
    "grad of grad": lambda conv: gradient_of(jax.grad(energy(conv), (0, 1))),
    "grad of grad for the input": lambda conv: gradient_of(jax.grad(energy(conv), 0)),
    "grad of grad for the kernel": lambda conv: gradient_of(jax.grad(energy(conv), 1)),
    "grad of grad of grad": lambda conv: gradient_of(gradient_of(jax.grad(energy(conv), (0, 1)))),
    "jvp of grad": lambda conv: tangent_of(jax.grad(energy(conv), (0, 1))),
    "grad of jvp": lambda conv: gradient_of(tangent_of(conv)),
    **{
        f"vmap over {axes} of {name}": lambda conv, axes=axes, of=of: batch_of(of(conv), *axes)
        for axes in ((0, None), (None, 1), (3, 3))
        for name, of in (("grad", lambda conv: jax.grad(energy(conv), (0, 1))), ("jvp", tangent_of))
    },
}


@pytest.mark.parametrize(("dtype", "result"), [("float32", None), ("bfloat16", "float32"), ("bfloat16", None)])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_both_operands_at_once_equal_those_of_each(name: str, dtype: str, result: str | None) -> None:
    lhs, rhs = (x[..., :3].astype(dtype) for x in (operands()[0], operands()[1][:, :, :3]))
    ours, want = (
        DERIVATIVES[name](lambda lhs, rhs, conv=conv: conv(lhs, rhs, result and jnp.dtype(result)))
        for conv in (promised, promised_apart)
    )
    assert {BOTH, BOTH_FORWARD} & {*calls(ours, lhs, rhs)} or "vmap" in name
    assert not {BOTH, BOTH_FORWARD} & {*calls(want, lhs, rhs)}
    got, expected = jax.jit(ours)(lhs, rhs), jax.jit(want)(lhs, rhs)
    equal(got, expected)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("argnums", "name"), [(0, "sparse_conv_bwd_input_masked"), (1, "sparse_conv_bwd_weights"), ((0, 1), BOTH)]
)
def test_a_gradient_for_one_operand_alone_is_that_ones_primitive(jit: Any, argnums: Any, name: str) -> None:
    assert calls(jax.grad(jit(energy(promised)), argnums), *operands()) == ["sparse_conv_fwd", name]
    frozen = jax.grad(lambda lhs, rhs: energy(promised)(lhs, lax.stop_gradient(rhs)), (0, 1))
    assert BOTH not in calls(frozen, *operands())


@pytest.mark.parametrize("used", ["sparsetrain_conv_bwd_input_masked_v1", "sparsetrain_conv_bwd_weights_v1"])
def test_of_a_gradient_that_is_not_used_nothing_is_compiled(used: str) -> None:
    index = int("weights" in used)
    step = jax.jit(lambda lhs, rhs: gradients(lhs, rhs)[index])
    assert {*re.findall(r"sparsetrain_conv_\w+", step.lower(*operands()).as_text())} == {
        "sparsetrain_conv_fwd_v1",
        used,
    }
    equal(step(*operands()), gradients(*operands())[index])
    # In a loop's body too.
    loop = jax.jit(lambda lhs, rhs: lax.scan(lambda c, _: (c, gradients(c, rhs)), lhs, None, 2)[1][index])
    assert {*re.findall(r"sparsetrain_conv_\w+", loop.lower(*operands()).as_text())} == {
        "sparsetrain_conv_fwd_v1",
        used,
    }


def test_vmap_folds_what_the_primitives_of_each_gradient_fold_and_batches_nothing_else() -> None:
    lhs, rhs = operands()
    spec = ConvSpec((7, 8), (3, 3), (1, 1), ((1, 1), (1, 1)))
    both = functools.partial(primitives.sparse_conv_bwd_both, spec=spec)
    stacked = jnp.stack([lhs, -lhs])
    # A batch of g and x: one call for dlhs, a loop for drhs.
    batched = jax.vmap(both, (0, None, 0))
    assert calls(batched, stacked, rhs, stacked) == ["sparse_conv_bwd_input_masked", "sparse_conv_bwd_weights"]
    equal([x[1] for x in batched(stacked, rhs, stacked)], [*both(-lhs, rhs, -lhs)])
    # A batch of rhs: drhs has none.
    kernels = jnp.stack([rhs, -rhs])
    dlhs, drhs = jax.vmap(both, (None, 0, None), (0, None))(lhs, kernels, lhs)
    equal((dlhs[1], drhs), both(lhs, -rhs, lhs))
    # A batch of the input features of rhs and x: one call for each.
    folded = jax.vmap(both, (None, 0, 0))
    assert "scan" not in str(jax.make_jaxpr(folded)(lhs, kernels, stacked))
    equal([x[1] for x in folded(lhs, kernels, stacked)], [*both(lhs, -rhs, -lhs)])


# Export and compilation


def gradients(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.grad(lambda lhs, rhs: (st.sparse_conv(lhs, rhs, relu_input=True) ** 2).sum(), (0, 1))(lhs, rhs)


def second_order(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient_of(gradients)(lhs, rhs)


def checks() -> list[Any]:
    return [export.DisabledSafetyCheck.custom_call(name) for name in st.custom_calls()]


LOAD = """
import sys, numpy as np, jax
from jax import export
import sparsetrain_jax
blob, data = open(sys.argv[1], "rb").read(), np.load(sys.argv[2])
for got, want in zip(export.deserialize(bytearray(blob)).call(data["lhs"], data["rhs"]), (data["dlhs"], data["drhs"])):
    np.testing.assert_array_equal(got, want)
print("equal")
"""


def test_an_exported_function_runs_in_another_process(tmp_path: Path) -> None:
    pytest.importorskip("flatbuffers")
    lhs, rhs = operands()
    blob = export.export(jax.jit(gradients), disabled_checks=checks())(lhs, rhs).serialize()
    (tmp_path / "blob").write_bytes(blob)
    dlhs, drhs = gradients(lhs, rhs)
    np.savez(tmp_path / "data.npz", lhs=lhs, rhs=rhs, dlhs=dlhs, drhs=drhs)
    command = [sys.executable, "-P", "-c", LOAD, str(tmp_path / "blob"), str(tmp_path / "data.npz")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert run.stdout.strip() == "equal", run.stderr


def test_export_refuses_our_calls_unless_they_are_named() -> None:
    with pytest.raises(ValueError, match="sparsetrain_conv_fwd_v1"):
        export.export(jax.jit(st.sparse_conv))(*operands())


def test_export_takes_a_symbolic_batch_and_other_platforms() -> None:
    lhs, rhs = operands()
    (batch,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((batch, *lhs.shape[1:]), lhs.dtype)
    for arguments, options in (((shape, rhs), {}), ((lhs, rhs), {"platforms": ["cpu", "cuda", "tpu"]})):
        exported = export.export(jax.jit(gradients), disabled_checks=checks(), **options)(*arguments)
        equal(exported.call(lhs, rhs), gradients(lhs, rhs))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_other_platforms_the_primitives_lower_to_lax(platform: str) -> None:
    text = jax.jit(gradients).trace(*operands()).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") >= 2 and "sparsetrain" not in text


def test_on_the_cpu_the_primitives_lower_to_the_custom_calls() -> None:
    text = jax.jit(gradients).lower(*operands()).as_text()
    assert "stablehlo.convolution" not in text
    called = {name for name in st.custom_calls() if name in text}
    assert {"sparsetrain_conv_bwd_weights_v1", "sparsetrain_conv_bwd_both_v1"} & called


def test_compiled_instructions_carry_the_primitives_names() -> None:
    def both(lhs: jax.Array, rhs: jax.Array) -> Any:
        return jax.value_and_grad(lambda lhs, rhs: (st.sparse_conv(lhs, rhs) ** 2).sum(), (0, 1))(lhs, rhs)

    text = jax.jit(both).lower(*operands()).compile().as_text()
    for name in ("sparse_conv_fwd", "sparse_conv_bwd_input", "sparse_conv_bwd_weights"):
        assert f"%{name}" in text


def test_ahead_of_time_compilation_eval_shape_and_donation() -> None:
    lhs, rhs = operands()
    equal(jax.jit(gradients).lower(lhs, rhs).compile()(lhs, rhs), gradients(lhs, rhs))
    shapes = jax.eval_shape(gradients, lhs, rhs)
    assert [(s.shape, s.dtype) for s in shapes] == [(x.shape, x.dtype) for x in (lhs, rhs)]
    donated = lhs + 0
    equal(jax.jit(st.sparse_conv, donate_argnums=0)(donated, rhs), stock(lhs, rhs))
    assert donated.is_deleted()


CACHED = """
import jax, jax.numpy as jnp, sparsetrain_jax as st, sys
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
lhs, rhs = jnp.ones((1, 5, 5, 16)), jnp.ones((3, 3, 16, 16))
grads = jax.jit(jax.grad(lambda l, r: (st.sparse_conv(l, r) ** 2).sum(), (0, 1)))(lhs, rhs)
print(float(grads[1].sum()), "/jax/compilation_cache/cache_hits" in hits)
"""


def test_the_persistent_compilation_cache_serves_another_process(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        command = [sys.executable, "-P", "-c", CACHED, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
        assert not run.returncode, run.stderr
        results.append(run.stdout.split())
    assert results[0][0] == results[1][0]
    assert results[1][1] == "True"


def test_jaxprs_are_readable() -> None:
    def strided(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return st.conv_general_dilated(lhs, rhs, (2, 1), "SAME", dimension_numbers=NHWC)

    text = str(jax.make_jaxpr(strided)(*operands()))
    assert "sparse_conv_fwd" in text and "3x3 on 7x8 strides 2x1 padding" in text
    assert len(text) < 300


def test_equal_calls_are_compiled_once() -> None:
    with jax.log_compiles(False):
        count = 0

        def listener(event: str, *_: Any, **__: Any) -> None:
            nonlocal count
            count += "backend_compile" in event

        lhs, rhs = operands()
        st.sparse_conv(lhs, rhs)
        jax.monitoring.register_event_duration_secs_listener(listener)
        for _ in range(3):
            st.sparse_conv(lhs, rhs)
            st.sparse_conv(lhs, rhs, strides=(1, 1), padding="same")
        assert count == 0


# Debugging


def test_debug_nans_finds_a_nan_and_leaves_numbers_alone() -> None:
    lhs, rhs = operands()
    with jax.debug_nans(True):
        equal(st.sparse_conv(lhs, rhs), stock(lhs, rhs))
        with pytest.raises(FloatingPointError):
            st.sparse_conv(lhs.at[0, 3, 3, 0].set(jnp.nan), rhs)


@pytest.mark.parametrize("x64", [False, True])
def test_results_do_not_depend_on_x64(x64: bool) -> None:
    lhs, rhs = operands()
    with jax.enable_x64(x64):
        lhs, rhs = jnp.asarray(np.asarray(lhs)), jnp.asarray(np.asarray(rhs))
        got = jax.jit(gradients)(lhs, rhs)
        assert {x.dtype.name for x in got} == {"float32"}
        want = jax.grad(lambda lhs, rhs: (stock(lhs, rhs) ** 2).sum(), (0, 1))(lhs, rhs)
        equal(got, (jnp.where(lhs == 0, 0, want[0]), want[1]))


def test_many_threads_may_trace_and_run_at_once() -> None:
    lhs, rhs = operands()
    want = stock(lhs, rhs)

    def work(i: int) -> jax.Array:
        return jax.jit(lambda lhs, rhs: st.sparse_conv(lhs, rhs) * i)(lhs, rhs)

    with ThreadPoolExecutor(8) as pool:
        for i, got in enumerate(pool.map(work, range(16))):
            equal(got, want * i)


def test_tracers_are_not_kept_alive() -> None:
    with jax.checking_leaks():
        equal(jax.jit(st.sparse_conv)(*operands()), stock(*operands()))
    gc.collect()


# Telemetry


class Net(nn.Module):
    tell: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(st.SparseConv(8, (3, 3), sow_sparsity=self.tell, name="first")(x))
        x = st.SparseConv(4, (3, 3), sow_sparsity=self.tell, relu_input=True, name="second")(x)
        return nn.relu(x)


def test_linen_layers_tell_the_sparsity_of_inputs_and_output_gradients() -> None:
    lhs, _ = operands()
    variables = Net().init(jax.random.key(0), lhs)
    assert set(variables) == {"params", "perturbations"}

    def loss(params: Any, perturbations: Any) -> Any:
        out, sown = Net().apply({"params": params, "perturbations": perturbations}, lhs, mutable=["intermediates"])
        return out.sum(), sown["intermediates"]

    (_, inputs), (grads, outputs) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        variables["params"], variables["perturbations"]
    )
    _, state = Net(tell=False).apply(variables, lhs, capture_intermediates=True, mutable=["intermediates"])
    activations = state["intermediates"]
    hidden = nn.relu(activations["first"]["__call__"][0])
    np.testing.assert_allclose(inputs["first"]["input_sparsity"][0], np.mean(np.asarray(lhs) == 0), rtol=1e-6)
    np.testing.assert_allclose(inputs["second"]["input_sparsity"][0], np.mean(np.asarray(hidden) == 0), rtol=1e-6)
    second = np.mean(np.asarray(activations["second"]["__call__"][0]) <= 0)  # where the ReLU after it is off
    np.testing.assert_allclose(outputs["second"]["output_gradient_sparsity"], second, rtol=1e-6)
    assert outputs["first"]["output_gradient_sparsity"] >= np.mean(np.asarray(hidden) == 0) - 1e-6
    silent = jax.grad(lambda params: Net(tell=False).apply({"params": params}, lhs).sum())(variables["params"])
    equal(grads, silent)


def test_telemetry_takes_forward_mode_and_vmap() -> None:
    lhs, _ = operands()
    variables = Net().init(jax.random.key(0), lhs)

    def model(x: jax.Array, variables: Any = variables, tell: bool = True) -> jax.Array:
        return Net(tell).apply(variables, x)

    equal(jax.jvp(model, (lhs,), (lhs,)), jax.jvp(lambda x: model(x, tell=False), (lhs,), (lhs,)))

    def zeros(probes: Any, x: jax.Array) -> jax.Array:
        loss = lambda probes: model(x, {**variables, "perturbations": probes}).sum()  # noqa: E731
        return jax.grad(loss)(probes)["second"]["output_gradient_sparsity"]

    each = [zeros(variables["perturbations"], image[None]) for image in lhs]
    assert each[0] != each[1]
    probes = jax.tree.map(lambda probe: jnp.zeros(2), variables["perturbations"])
    got = jax.vmap(zeros)(probes, lhs[:, None])
    np.testing.assert_allclose(got, each, rtol=1e-6)

    def together(probes: Any) -> jax.Array:
        return jax.vmap(lambda image: model(image[None], {**variables, "perturbations": probes}).sum())(lhs).sum()

    got = jax.grad(together)(variables["perturbations"])["second"]["output_gradient_sparsity"]
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-6)


def test_telemetry_costs_nothing_when_it_is_off() -> None:
    lhs, _ = operands()
    variables = Net(tell=False).init(jax.random.key(0), lhs)
    assert set(variables) == {"params"}

    def jaxpr(tell: bool) -> str:
        return str(
            jax.make_jaxpr(jax.grad(lambda params: Net(tell).apply({"params": params}, lhs).sum()))(variables["params"])
        )

    assert jaxpr(True) == jaxpr(False)  # on, but no collection asked for
    assert "eq " not in jaxpr(False)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="flax too old")
def test_nnx_layers_tell_the_sparsity_of_inputs_and_output_gradients() -> None:
    lhs, _ = operands()
    layer = st.nnx.SparseConv(8, 4, (3, 3), sow_sparsity=True, rngs=nnx.Rngs(0))
    want = nnx.relu(layer(lhs))
    _, perturbations = nnx.capture(layer, nnx.Perturbation)(lhs)

    def loss(layer: nnx.Module, perturbations: Any) -> Any:
        out, sown = nnx.capture(layer, nnx.Intermediate, init=perturbations)(lhs)
        return nnx.relu(out).sum(), sown

    (_, outputs), sown = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, perturbations)
    (inputs,) = jax.tree.leaves(nnx.to_pure_dict(sown))
    np.testing.assert_allclose(inputs, np.mean(np.asarray(lhs) == 0), rtol=1e-6)
    (gradient,) = jax.tree.leaves(nnx.to_pure_dict(outputs))
    np.testing.assert_allclose(gradient, np.mean(np.asarray(want) == 0), rtol=1e-6)
