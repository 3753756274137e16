"""The compiled module: instruction sets, threads, and custom calls that contradict themselves."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsetrain_jax as st
from sparsetrain_jax import native, primitives
from sparsetrain_jax.shapes import ConvSpec


def python(code: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter; not with -c alone, which would find a checkout in the working directory."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check and run.returncode:
        raise AssertionError(run.stderr)
    return run


def test_the_portable_kernels_are_always_available() -> None:
    assert st.available_isas()[-1] == "portable"
    assert st.isa() in st.available_isas()
    assert set(st.available_isas()) <= {"avx512_vbmi2", "avx512", "avx2", "portable"}


def test_setting_an_unknown_isa_is_an_error_and_changes_nothing() -> None:
    before = st.isa()
    with pytest.raises(ValueError, match="sse9"):
        native.set_isa("sse9")
    assert st.isa() == before


def test_a_forced_isa_plans_for_its_vectors(isa: str) -> None:
    plan = native.plan("bwd_weights", [2, 14, 14, 64, 8 * lanes(isa), 1, 1], [1, 1, 0, 0, 0, 0])
    assert st.isa() == isa
    assert int(str(plan["tap_groups"]).split("x")[2]) % lanes(isa) == 0
    one, two = (
        native.plan("fwd", [2, 14, 14, 64, features, 3, 3], [1, 1, 1, 1, 1, 1], 1.0, 2)
        for features in (lanes(isa), lanes(isa) + 1)
    )
    assert (one["last_feature_vectors"], two["last_feature_vectors"]) == (1, 2)


def test_one_multiply_add_a_cycle_makes_skipping_pay_earlier(isa: str) -> None:
    dims, geometry = [16, 28, 28, 128, 128, 3, 3], [1, 1, 1, 1, 1, 1]

    def plans(component: str, density: float = 0.7) -> list[dict[str, Any]]:
        return [native.plan(component, dims, geometry, density, fmas) for fmas in (1, 2)]

    for component in ("fwd", "bwd_input", "bwd_weights"):
        one, two = plans(component)
        key = "break_even_density"
        assert one[key] > two[key] if isa.startswith("avx512") else one == two
    one, two = plans("bwd_input_masked", 0.75)
    assert two["path"] != "product"
    assert one["path"] == "product" if isa.startswith("avx512") else one == two
    assert plans("bwd_input_masked", 0.95)[0]["path"] != "product"


def lanes(isa: str) -> int:
    return 16 if isa.startswith("avx512") else 8 if isa == "avx2" else 4


@pytest.mark.parametrize("component", ["fwd", "bwd_input"])
def test_results_of_few_features_come_in_the_vectors_that_leave_fewer_lanes_idle(component: str, isa: str) -> None:
    def plan(features: int, fmas: int) -> dict[str, Any]:
        channels = (64, features) if component == "fwd" else (features, 64)
        return native.plan(component, [8, 28, 28, *channels, 3, 3], [1, 1, 1, 1, 1, 1], 0.5, fmas)

    for features in (1, 4, 8, 9, 16, 17, 24, 25, 32, 40, 100):
        half = isa.startswith("avx512") and features in (1, 4, 8, 17, 24)
        assert int(plan(features, 1)["lanes"]) == (8 if half else lanes(isa))
        assert int(plan(features, 2)["lanes"]) == lanes(isa)
        idle = features < (4 if half else lanes(isa) // 2)
        assert ("lax" in plan(features, 1)) == (isa == "portable" or (idle and component == "bwd_input"))


def test_visits_of_few_multiply_adds_of_eight_lanes_take_single_pixels(isa: str) -> None:
    def plan(features: int, stride: int, density: float) -> dict[str, Any]:
        return native.plan("fwd", [8, 32, 32, 64, features, 3, 3], [stride, stride, 1, 1, 1, 1], density, 1)

    for features, stride in itertools.product((8, 24), (1, 2)):
        few = plan(features, stride, 0.3)
        short = few["tall"] or int(few["taps"]) * int(few["feature_vectors"]) <= 6
        assert few["tall"] == ((features, stride) == (8, 1) and isa != "portable")
        assert float(few["pair_density"]) == (0.5 if few["lanes"] == 8 and short else 0.25)
    if isa.startswith("avx512") or isa == "avx2":
        assert float(plan(8, 2, 0.3)["pair_density"]) == 0.5
        assert 0.2 < float(plan(8, 2, 0.3)["break_even_density"]) < 0.45 < float(plan(8, 1, 0.3)["break_even_density"])


def test_visits_of_few_multiply_adds_pay_at_fewer_non_zeros(isa: str) -> None:
    # A 1x1 visit of one vector waits for the sums of the one before, and nothing hides the ends of lists.
    def dense_density(vectors: int, fmas: int) -> float:
        plan = native.plan("fwd", [16, 28, 28, 128, vectors * lanes(isa), 1, 1], [1, 1, 0, 0, 0, 0], 1.0, fmas)
        assert int(plan["feature_vectors"]) == vectors
        return float(plan["dense_density"])

    for fmas in (1, 2) if isa.startswith("avx512") else (1,):
        one, two, four = (dense_density(vectors, fmas) for vectors in (1, 2, 4))
        assert one < 0.4
        assert one < two < four or one == two == 0 < four


def test_features_that_half_fill_a_vector_halve_the_dense_cost_alone(isa: str) -> None:
    geometry = [1, 1, 3, 3, 3, 3]
    for fmas in (1, 2) if isa.startswith("avx512") else (1,):
        full, half = (
            native.plan("bwd_input_masked", [16, 18, 18, 32, features, 7, 7], geometry, 0.4, fmas)
            for features in (lanes(isa), lanes(isa) // 2)
        )
        assert float(half["dense_cost"]) < 0.6 * float(full["dense_cost"])
        assert float(half["product_cost"]) == float(full["product_cost"])


@pytest.mark.parametrize("density", [0.1, 0.3])
@pytest.mark.parametrize("fmas", [1, 2])
def test_the_break_even_density_does_not_fall_as_channels_grow_from_few(fmas: int, density: float, isa: str) -> None:
    # Pairs may not pay at densities at which single pixels, which are walked there, do.
    plans = [
        native.plan("bwd_input", [16, 28, 28, 16, k, 3, 3], [1, 1, 1, 1, 1, 1], density, fmas)
        for k in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
    ]
    found = [float(plan["dense_density"]) for plan in plans]
    assert found == sorted(found) and found[-1] > 0.4, found


@pytest.mark.parametrize("component", ["fwd", "bwd_input", "bwd_weights"])
@pytest.mark.parametrize("features", [(64, 64), (128, 16), (488, 16), (16, 128)], ids=str)
def test_the_break_even_density_is_where_the_path_changes(component: str, features: tuple[int, int], isa: str) -> None:
    checked = 0
    for density in (0.02, 0.3, 0.5, 0.7, 0.98):
        plan = native.plan(component, [16, 28, 28, *features, 1, 1], [1, 1, 0, 0, 0, 0], density)
        if plan.get("checked", "lhs") == "lhs" and abs(float(plan["break_even_density"]) - density) > 0.01:
            assert (plan["path"] == "sparse") == (density < float(plan["break_even_density"])), plan
            checked += 1
    assert checked >= (1 if component == "bwd_weights" else 3)  # whose checked operand may be g


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 1000, 32768, 32769, 100_000, 1_000_003])
def test_the_measured_density_is_right_however_zeros_are_spread(count: int, dtype: str, isa: str) -> None:
    rng = np.random.default_rng(count)
    size = 4 if dtype == "float32" else 2
    i = np.arange(count)
    for name, mask, tolerance in (
        ("none", np.zeros(count, bool), 0.0),
        ("all", np.ones(count, bool), 0.0),
        ("few, spread evenly", rng.random(count) < 0.1, 0.03),
        ("half, spread evenly", rng.random(count) < 0.5, 0.04),
        ("whole images", i * 16 // count % 4 == 0, 0.1),
        ("one image", i * 16 // count == 11, 0.06),
        ("channels", i % 128 < 32, 0.05),
        ("rows", i // 896 % 2 == 0, 0.1),
    ):
        ones = np.full(count, 0x3F, np.uint8)
        values = np.zeros((count, size), np.uint8)
        values[:, -1] = np.where(mask, ones, 0)
        measured = native._native.density(dtype, values.tobytes())
        exact = count <= 32768
        assert abs(measured - mask.mean()) <= (1e-9 if exact else tolerance), (name, measured, mask.mean())


@pytest.mark.parametrize("component", ["fwd", "bwd_input", "bwd_weights", "bwd_input_masked"])
def test_only_calls_too_small_for_threads_are_serial(component: str, isa: str) -> None:
    same = [1, 1, 1, 1, 1, 1]
    assert native.plan(component, [1, 7, 7, 16, 16, 3, 3], same)["serial"]
    for dims, density in (
        ([16, 56, 56, 64, 64, 3, 3], 0.5),
        ([16, 56, 56, 64, 64, 3, 3], 0.0),  # what is read and written whatever the zeros
        ([1, 1, 1, 1024, 1024, 3, 3], 0.5),  # the kernel alone
    ):
        assert not native.plan(component, dims, same, density)["serial"]


@pytest.mark.parametrize("density", [1.0, 0.65, 0.4, 0.35, 0.2, 0.1])
@pytest.mark.parametrize("component", ["fwd", "bwd_input"])
def test_two_threads_can_divide_the_work_of_any_call_finely(component: str, density: float, isa: str) -> None:
    for hw, channels, size in ((14, 256, 3), (7, 512, 3), (28, 128, 3), (7, 2048, 1), (28, 96, 5)):
        dims, geometry = [16, hw, hw, channels, channels, size, size], [1, 1, *[size // 2] * 4]
        plan = native.plan(component, dims, geometry, density)
        assert int(plan["shares_of_two_threads"]) >= 8, (dims, plan)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("channels", [32, 48, 64, 96, 250])
@pytest.mark.parametrize("hw,size", [(14, 3), (28, 3), (28, 1), (7, 5)])
def test_bwd_weights_leave_no_thread_without_work(hw: int, size: int, channels: int, density: float, isa: str) -> None:
    geometry = [1, 1, *[size // 2] * 4]
    for images in (4, 8, 16):
        dims = [images, hw, hw, channels, 2 * channels, size, size]
        plan = native.plan("bwd_weights", dims, geometry, density, threads=2)
        assert int(plan["serial"]) or int(plan["items"]) >= 2, (dims, plan)
        alone = native.plan("bwd_weights", dims, geometry, density)
        assert plan["chunks"] == alone["chunks"]  # the sums depend on them


def test_plans_are_cut_for_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="threads must be positive"):
        native.plan("bwd_weights", [1, 7, 7, 16, 16, 3, 3], [1, 1, 1, 1, 1, 1], threads=0)


@pytest.mark.parametrize("fmas", [-1, 0, 3])
def test_no_machine_has_such_a_number_of_multiply_adds(fmas: int) -> None:
    with pytest.raises(ValueError, match="fmas"):
        native.plan("fwd", [1, 7, 7, 16, 16, 3, 3], [1, 1, 1, 1, 1, 1], 0.5, fmas)


def test_sparsetrain_isa_is_read_at_import() -> None:
    for name in st.available_isas():
        assert python("import sparsetrain_jax as st; print(st.isa())", SPARSETRAIN_ISA=name).stdout.strip() == name


def test_an_unknown_sparsetrain_isa_raises_at_import_and_says_what_is_accepted() -> None:
    run = python("import sparsetrain_jax", check=False, SPARSETRAIN_ISA="sse9")
    assert run.returncode and "ValueError: SPARSETRAIN_ISA must be" in run.stderr
    assert "'sse9'" in run.stderr and "'portable'" in run.stderr


def test_without_the_compiled_module_the_import_fails_and_says_how_to_build_it() -> None:
    run = python("import sys; sys.modules['sparsetrain_jax._native'] = None; import sparsetrain_jax", check=False)
    assert run.returncode and "ImportError" in run.stderr and "pip install ." in run.stderr


def test_the_targets_are_those_of_the_versioned_interface() -> None:
    names = ("fwd", "bwd_input", "bwd_weights", "bwd_input_masked", "bwd_both")
    assert {f"sparsetrain_conv_{name}_v1" for name in names} == native.TARGETS


# Threads

THREADS = """
import hashlib, threading, os
import jax, jax.numpy as jnp, numpy as np
from sparsetrain_jax import native, primitives
from sparsetrain_jax.shapes import ConvSpec
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for n, h, w, c, k, r, stride in ((4, 28, 28, 64, 96, 3, 1), (3, 15, 17, 48, 80, 3, 2), (8, 14, 14, 128, 64, 1, 1),
                                 (2, 30, 30, 3, 64, 7, 2), (1, 7, 7, 512, 64, 3, 1), (2, 14, 14, 200, 70, 3, 1),
                                 (16, 7, 7, 64, 96, 3, 1), (16, 28, 28, 16, 32, 3, 1), (2, 14, 14, 32, 256, 3, 1)):
    pad = ((r - 1) // 2, r // 2)
    for mode in ("sparse", "dense", *(["auto"] if native.isa() != "portable" else [])):  # where auto is XLA's own
        spec = ConvSpec((h, w), (r, r), (stride, stride), (pad, pad), mode)
        p, q = spec.output_size
        lhs, rhs, g = (jnp.asarray(rng.standard_normal(s) * (rng.random(s) > 0.6), jnp.float32)
                       for s in ((n, h, w, c), (r, r, c, k), (n, p, q, k)))
        for out in (primitives.sparse_conv_fwd(lhs, rhs, spec=spec),
                    primitives.sparse_conv_bwd_input(g, rhs, spec=spec),
                    primitives.sparse_conv_bwd_weights(lhs, g, spec=spec),
                    primitives.sparse_conv_bwd_input_masked(g, rhs, lhs, spec=spec),
                    *primitives.sparse_conv_bwd_both(g, rhs, lhs, spec=spec)):
            digest.update(np.asarray(out).tobytes())
names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names), digest.hexdigest())
"""


@pytest.mark.parametrize("name", st.available_isas())
def test_one_and_two_threads_give_the_same_bits(name: str) -> None:
    results = [python(THREADS, NPROC=str(n), SPARSETRAIN_ISA=name).stdout.split() for n in (1, 2)]
    if sys.platform == "linux":
        assert [int(threads) for threads, _ in results] == [1, 2]
    assert len({digest for _, digest in results}) == 1


# Buffers and attributes that contradict each other

GOOD: dict[str, Any] = {"geometry": np.array([1, 1, 1, 1, 1, 1], np.int64), "mode": np.int64(0)}
TARGETS = {
    "sparsetrain_conv_fwd_v1": ((2, 5, 6, 8), (3, 3, 8, 4), (2, 5, 6, 4)),
    "sparsetrain_conv_bwd_input_v1": ((2, 5, 6, 4), (3, 3, 8, 4), (2, 5, 6, 8)),
    "sparsetrain_conv_bwd_weights_v1": ((2, 5, 6, 8), (2, 5, 6, 4), (3, 3, 8, 4)),
    "sparsetrain_conv_bwd_input_masked_v1": ((2, 5, 6, 4), (3, 3, 8, 4), (2, 5, 6, 8), (2, 5, 6, 8)),
    "sparsetrain_conv_bwd_both_v1": ((2, 5, 6, 4), (3, 3, 8, 4), (2, 5, 6, 8), (2, 5, 6, 8), (3, 3, 8, 4)),
}


def call(target: str, shapes: Any, dtype: Any = jnp.float32, **attributes: Any) -> list[jax.Array]:
    """The results, of which there are two if `target` is of both gradients, and which come last in `shapes`."""
    count = len(shapes) - (2 if "_both_" in target else 1)
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[count:]])
    return jax.jit(lambda *args: call(*args, **attributes))(*(jnp.ones(shape, dtype) for shape in shapes[:count]))


@pytest.mark.parametrize("target", TARGETS)
def test_a_consistent_custom_call_succeeds(target: str) -> None:
    for result in call(target, TARGETS[target], **GOOD):
        assert np.all(np.asarray(result) > 0)


@pytest.mark.parametrize(("target", "buffer"), [(name, i) for name in TARGETS for i in range(len(TARGETS[name]))])
def test_a_custom_call_with_buffers_that_contradict_each_other_is_an_error(target: str, buffer: int) -> None:
    for axis in range(4):
        shapes = [list(shape) for shape in TARGETS[target]]
        shapes[buffer][axis] += 1
        with pytest.raises(jax.errors.JaxRuntimeError, match="sparse_conv_"):
            jax.block_until_ready(call(target, shapes, **GOOD))


@pytest.mark.parametrize(
    "bad",
    [
        {"geometry": np.array([1, 1, 1, 1, 1], np.int64)},
        {"geometry": np.array([0, 1, 1, 1, 1, 1], np.int64)},
        {"geometry": np.array([1, 1, -1, 3, 1, 1], np.int64)},
        {"geometry": np.array([2, 1, 1, 1, 1, 1], np.int64)},
        {"geometry": np.array([1, 1, 1, 1, 1, 1], np.int32)},
        {"mode": np.int64(3)},
        {"mode": np.int64(-1)},
        {"mode": np.int32(0)},
        {"mode": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_custom_call_with_bad_attributes_is_an_error(target: str, bad: dict[str, Any]) -> None:
    attributes = {key: value for key, value in {**GOOD, **bad}.items() if value is not None}
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call(target, TARGETS[target], **attributes))


@pytest.mark.parametrize("target", TARGETS)
def test_a_custom_call_with_buffers_of_another_dtype_or_rank_is_an_error(target: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call(target, TARGETS[target], jnp.int32, **GOOD))
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.block_until_ready(call(target, [shape[1:] for shape in TARGETS[target]], **GOOD))


def test_a_primitive_with_operands_that_contradict_its_spec_is_a_python_error() -> None:
    spec = ConvSpec((5, 6), (3, 3), (1, 1), ((1, 1), (1, 1)))
    with pytest.raises(ValueError, match="sparse_conv_fwd"):
        primitives.sparse_conv_fwd(jnp.ones((2, 5, 7, 8)), jnp.ones((3, 3, 8, 4)), spec=spec)
    with pytest.raises(ValueError, match="sparse_conv_bwd_weights"):
        primitives.sparse_conv_bwd_weights(jnp.ones((2, 5, 6, 8)), jnp.ones((3, 5, 6, 4)), spec=spec)
    with pytest.raises(TypeError, match="one dtype"):
        primitives.sparse_conv_fwd(jnp.ones((2, 5, 6, 8)), jnp.ones((3, 3, 8, 4), jnp.bfloat16), spec=spec)


def test_auto_leaves_every_component_to_lax_where_only_the_portable_kernels_run() -> None:
    """They lose to XLA's vector code; forced modes still run them."""
    lhs, rhs = jnp.ones((1, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
    before = native.isa()
    native.set_isa("portable")
    try:
        for relu_input in (False, True):
            for part in st.explain(lhs, rhs, relu_input=relu_input).values():
                assert part.path == "lax" and "portable" in part.reason
            for mode, runs in (("auto", 0), ("dense", 3)):
                native.reset_counters()
                loss = functools.partial(_squares, mode=mode, relu_input=relu_input)
                jax.block_until_ready(jax.jit(jax.value_and_grad(loss, (0, 1)))(lhs, rhs))
                counted = {name.split("/")[0] for name, count in native.counters().items() if count}
                counted.discard("conv_bwd_input_masked")  # counted beside the ordinary one that it falls back to
                assert len(counted) == runs
    finally:
        native.set_isa(before)


def _squares(lhs: jax.Array, rhs: jax.Array, **arguments: Any) -> jax.Array:
    return (st.sparse_conv(lhs, rhs, **arguments) ** 2).sum()
