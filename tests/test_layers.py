"""``SparseConv`` for linen and nnx: the stock layer's arguments, parameters and results, and training with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import sparsetrain_jax as st
from sparsetrain_jax import native


def inputs(*shape: int, seed: int = 0) -> jax.Array:
    return jax.nn.relu(jax.random.normal(jax.random.key(seed), shape))


def close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    """Equal up to the order of summation; ``rtol`` is of the largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype), path
        scale = np.abs(np.asarray(w, np.float64)).max(initial=0)
        narrow = {"bfloat16": 2.0**-7, "float16": 2.0**-9}.get(str(w.dtype), 0)
        np.testing.assert_allclose(
            np.asarray(g, np.float64),
            np.asarray(w, np.float64),
            rtol=0,
            atol=max(rtol, narrow) * scale,
            err_msg=str(path),
        )


def equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"strides": 2},
    {"strides": (1, 2), "padding": "VALID"},
    {"strides": None, "padding": 1},
    {"padding": ((2, 1), (0, 3))},
    {"padding": (1, 2)},
    {"padding": "CIRCULAR"},
    {"padding": "REFLECT"},
    {"input_dilation": 2, "padding": ((1, 1), (2, 2))},
    {"kernel_dilation": (2, 1)},
    {"feature_group_count": 2},
    {"use_bias": False},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16, "param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"precision": "highest"},
    {"kernel_init": nn.initializers.ones, "bias_init": nn.initializers.ones},
    {"mask": np.arange(3 * 3 * 4 * 6).reshape(3, 3, 4, 6) % 3 == 0},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_linen_layers_have_the_parameters_and_results_of_conv(arguments: dict[str, Any]) -> None:
    x = inputs(2, 9, 10, 4)
    if "feature_group_count" in arguments and "mask" in arguments:
        raise AssertionError("the mask is for one group")
    ours, stock = (cls(6, (3, 3), name="conv", **arguments) for cls in (st.SparseConv, nn.Conv))
    variables = stock.init(jax.random.key(1), x)
    equal(ours.init(jax.random.key(1), x), variables)
    close(ours.apply(variables, x), stock.apply(variables, x))

    def gradients(layer: nn.Module) -> Any:
        return jax.grad(lambda v, x: (layer.apply(v, x).astype(jnp.float32) ** 2).sum(), (0, 1))(variables, x)

    close(gradients(ours), gradients(stock))


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_nnx_layers_have_the_parameters_and_results_of_conv(arguments: dict[str, Any]) -> None:
    x = inputs(2, 9, 10, 4)
    ours, stock = (cls(4, 6, (3, 3), rngs=nnx.Rngs(3), **arguments) for cls in (st.nnx.SparseConv, nnx.Conv))
    equal(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(stock)))
    close(ours(x), stock(x))

    def gradients(layer: nnx.Module) -> Any:
        return nnx.to_pure_dict(nnx.grad(lambda layer: (layer(x).astype(jnp.float32) ** 2).sum())(layer))

    close(gradients(ours), gradients(stock))


@pytest.mark.parametrize("shape", [(9, 4), (2, 9, 4), (3, 2, 9, 4)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"padding": "CAUSAL"}, {"kernel_dilation": 2}, {"strides": 2}], ids=str)
def test_one_dimensional_layers_equal_conv(arguments: dict[str, Any], shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    ours, stock = (cls(6, (3,), name="conv", **arguments) for cls in (st.SparseConv, nn.Conv))
    variables = stock.init(jax.random.key(1), x)
    close(ours.apply(variables, x), stock.apply(variables, x))
    ours, stock = (cls(4, 6, 3, rngs=nnx.Rngs(3), **arguments) for cls in (st.nnx.SparseConv, nnx.Conv))
    close(ours(x), stock(x))


@pytest.mark.parametrize("shape", [(9, 10, 4), (2, 3, 9, 10, 4)], ids=str)
def test_layers_take_any_number_of_batch_dimensions(shape: tuple[int, ...]) -> None:
    x = inputs(*shape)
    ours, stock = (cls(6, (3, 3), name="conv") for cls in (st.SparseConv, nn.Conv))
    variables = stock.init(jax.random.key(1), x)
    close(ours.apply(variables, x), stock.apply(variables, x))


def test_three_dimensional_layers_equal_conv() -> None:
    x = inputs(2, 4, 5, 6, 3)
    ours, stock = (cls(6, (3, 2, 3), name="conv") for cls in (st.SparseConv, nn.Conv))
    variables = stock.init(jax.random.key(1), x)
    close(ours.apply(variables, x), stock.apply(variables, x))


def test_nnx_preferred_element_type_is_the_dtype_of_the_result() -> None:
    x = inputs(2, 9, 10, 4)
    arguments = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32, "use_bias": False}
    ours, stock = (cls(4, 6, (3, 3), rngs=nnx.Rngs(3), **arguments) for cls in (st.nnx.SparseConv, nnx.Conv))
    assert ours(x).dtype == stock(x).dtype == jnp.float32
    close(ours(x), stock(x))


def test_a_sparse_conv_is_a_conv() -> None:
    assert issubclass(st.SparseConv, nn.Conv) and issubclass(st.nnx.SparseConv, nnx.Conv)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_the_layer_s_mode_is_the_path_that_runs(mode: str, isa: str) -> None:
    x = inputs(2, 9, 10, 4)
    linen_layer = st.SparseConv(6, (3, 3), mode=mode)
    variables = linen_layer.init(jax.random.key(0), x)
    nnx_layer = st.nnx.SparseConv(4, 6, (3, 3), mode=mode, rngs=nnx.Rngs(0))
    for relu_input in (False, True):
        nnx_layer.relu_input = relu_input
        masked = linen_layer.clone(relu_input=relu_input)
        calls: list[Callable[[jax.Array], jax.Array]] = [
            lambda x, layer=masked: layer.apply(variables, x),
            nnx_layer,
        ]
        for call in calls:
            native.reset_counters()
            jax.block_until_ready(jax.grad(lambda x, call=call: (call(x) ** 2).sum())(x))
            ran = {key for key, count in native.counters().items() if count}
            assert ran and all(key.endswith(f"/{mode}") for key in ran), ran


def test_relu_input_zeroes_the_input_s_gradient_at_zeros() -> None:
    x = inputs(2, 9, 10, 4)
    layer = st.SparseConv(6, (3, 3), relu_input=True)
    variables = layer.init(jax.random.key(0), x)
    nnx_layer = st.nnx.SparseConv(4, 6, (3, 3), relu_input=True, rngs=nnx.Rngs(0))
    for call in (lambda x: layer.apply(variables, x), nnx_layer):
        gradient = np.asarray(jax.grad(lambda x, call=call: (call(x) ** 2).sum())(x))
        assert np.all(gradient[np.asarray(x) == 0] == 0) and np.any(gradient)


def test_an_unknown_mode_is_an_error() -> None:
    x = inputs(1, 5, 5, 4)
    with pytest.raises(ValueError, match=r"mode must be one of .*'fast'"):
        st.SparseConv(6, (3, 3), mode="fast").init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"mode must be one of .*'fast'"):
        st.nnx.SparseConv(4, 6, (3, 3), mode="fast", rngs=nnx.Rngs(0))(x)


def test_sparse_mode_without_sparse_kernels_is_an_error() -> None:
    x = inputs(1, 5, 5, 4)
    with pytest.raises(ValueError, match=r"mode='sparse'.*feature_group_count"):
        st.SparseConv(6, (3, 3), mode="sparse", feature_group_count=2).init(jax.random.key(0), x)


def test_a_hook_that_the_user_supplies_wins() -> None:
    calls: list[str] = []

    def hook(*args: Any, **kwargs: Any) -> jax.Array:
        calls.append("hook")
        kwargs.pop("out_sharding", None)
        return lax.conv_general_dilated(*args, **kwargs)

    x = inputs(1, 5, 5, 4)
    for arguments in ({"conv_general_dilated": hook}, {"conv_general_dilated_cls": lambda: hook}):
        for layer in (
            st.SparseConv(6, (3, 3), relu_input=True, **arguments),
            st.SparseConv(6, (3, 3), relu_input=True).clone(**arguments),
        ):
            calls.clear()
            layer.init(jax.random.key(0), x)
            assert calls == ["hook"]
    calls.clear()
    module = st.nnx.SparseConv(4, 6, (3, 3), conv_general_dilated=hook, rngs=nnx.Rngs(0))
    module(x)
    assert calls == ["hook"]
    st.nnx.sparsify(module)
    module(x)
    assert calls == ["hook", "hook"]


def test_conv_general_dilated_serves_as_both_layers_hook() -> None:
    x = inputs(2, 9, 10, 4)
    layer = nn.Conv(6, (3, 3), conv_general_dilated_cls=lambda: st.conv_general_dilated)
    variables = nn.Conv(6, (3, 3)).init(jax.random.key(0), x)
    assert "sparse_conv_fwd" in str(jax.make_jaxpr(lambda x: layer.apply(variables, x))(x))
    close(layer.apply(variables, x), nn.Conv(6, (3, 3)).apply(variables, x))
    module = nnx.Conv(4, 6, (3, 3), conv_general_dilated=st.conv_general_dilated, rngs=nnx.Rngs(0))
    assert "sparse_conv_fwd" in str(jax.make_jaxpr(module)(x))


def test_clones_follow_their_own_attributes() -> None:
    x = inputs(2, 9, 10, 4)
    layer = st.SparseConv(6, (3, 3)).clone(relu_input=True)
    variables = layer.init(jax.random.key(0), x)
    gradient = np.asarray(jax.grad(lambda x: (layer.apply(variables, x) ** 2).sum())(x))
    assert np.all(gradient[np.asarray(x) == 0] == 0)
    assert st.SparseConv(6, (3, 3)) == st.SparseConv(6, (3, 3))
    assert hash(st.SparseConv(6, (3, 3))) == hash(st.SparseConv(6, (3, 3)))
    assert st.SparseConv(6, (3, 3)) != st.SparseConv(6, (3, 3), mode="dense")


def test_equal_layers_do_not_make_nnx_jit_trace_again() -> None:
    x = inputs(2, 9, 10, 4)
    traces = []

    @nnx.jit
    def apply(layer: nnx.Module, x: jax.Array) -> jax.Array:
        traces.append(None)
        return layer(x)

    for seed in range(3):
        apply(st.nnx.SparseConv(4, 6, (3, 3), relu_input=True, rngs=nnx.Rngs(seed)), x)
    assert len(traces) == 1
    apply(st.nnx.SparseConv(4, 6, (3, 3), rngs=nnx.Rngs(0)), x)
    assert len(traces) == 2


@pytest.mark.parametrize("sow_sparsity", [False, True])
def test_a_call_of_a_linen_layer_is_one_call_to_flax(sow_sparsity: bool) -> None:
    x = inputs(2, 9, 10, 4)
    seen = []
    for layer in (st.SparseConv(6, (3, 3), sow_sparsity=sow_sparsity, name="conv"), nn.Conv(6, (3, 3), name="conv")):
        model = nn.Sequential([layer, nn.relu])
        variables = model.init(jax.random.key(0), x)
        _, state = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        calls: list[str] = []

        def intercept(f: Any, args: Any, kwargs: Any, context: Any, calls: list[str] = calls) -> Any:
            calls.append(context.method_name)
            return f(*args, **kwargs)

        with nn.intercept_methods(intercept):
            jaxpr = jax.make_jaxpr(lambda x, model=model, variables=variables: model.apply(variables, x))(x)
        scopes = {str(e.source_info.name_stack) for e in jaxpr.eqns if "conv" in e.primitive.name}
        rows = nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 300})(x).count("layers_0")
        seen.append((len(state["intermediates"]["layers_0"]["__call__"]), calls, scopes, rows))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("relu_input", [False, True])
def test_forward_mode_goes_through_layers(relu_input: bool) -> None:
    x = inputs(2, 9, 10, 4)  # out of a ReLU, and so are tangents that are a multiple of it
    layer = st.SparseConv(6, (3, 3), relu_input=relu_input, name="conv")
    variables = layer.init(jax.random.key(0), x)
    got = jax.jvp(lambda x: layer.apply(variables, x), (x,), (x,))
    close(got, jax.jvp(lambda x: nn.Conv(6, (3, 3), name="conv").apply(variables, x), (x,), (x,)))
    module = st.nnx.SparseConv(4, 6, (3, 3), relu_input=relu_input, rngs=nnx.Rngs(0))
    stock = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    close(jax.jacfwd(lambda t: module(x * t))(1.5), jax.jacfwd(lambda t: stock(x * t))(1.5))


# Lifted transformations


@pytest.mark.parametrize("lift", ["remat", "jit", "vmap", "scan"])
def test_linen_s_lifted_transformations_take_sparse_conv(lift: str) -> None:
    x = inputs(2, 9, 10, 4)

    def model(cls: type[nn.Module]) -> nn.Module:
        if lift == "remat":
            return nn.remat(cls)(4, (3, 3), name="conv")
        if lift == "jit":
            return nn.jit(cls)(4, (3, 3), name="conv")
        if lift == "vmap":
            return nn.vmap(cls, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)(
                4, (3, 3), name="conv"
            )

        class Body(nn.Module):
            @nn.compact
            def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
                return nn.relu(cls(4, (3, 3), name="conv")(carry)), None

        return nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="body")

    results = []
    for cls in (st.SparseConv, nn.Conv):
        layer = model(cls)
        args = (x, None) if lift == "scan" else (x,)
        variables = layer.init(jax.random.key(0), *args)

        def loss(variables: Any, layer: nn.Module = layer, args: Any = args) -> jax.Array:
            out = layer.apply(variables, *args)
            return (jax.tree.leaves(out)[0] ** 2).sum()

        results.append((variables, jax.value_and_grad(loss)(variables)))
    close(results[0], results[1])


# Whole networks, written as any user would, with the convolution class as an argument


class VGG(nn.Module):
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        for stage, features in enumerate((8, 16)):
            for layer in range(2):
                x = nn.relu(self.conv(features, (3, 3), name=f"conv{stage}{layer}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10, name="head")(x)


class ResNetBlock(nn.Module):
    conv: Any
    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        y = self.conv(self.features, (3, 3), self.strides, use_bias=False, name="conv1")(x)
        y = nn.relu(norm("norm1")(y))
        y = norm("norm2")(self.conv(self.features, (3, 3), use_bias=False, name="conv2")(y))
        if x.shape != y.shape:
            x = norm("norm_proj")(self.conv(self.features, (1, 1), self.strides, use_bias=False, name="proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = self.conv(8, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        for i, (features, strides) in enumerate(((8, 1), (16, 2), (16, 1))):
            x = ResNetBlock(self.conv, features, strides, name=f"block{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def train_linen(model: nn.Module, steps: int = 12) -> tuple[list[float], Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 16, 16, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 16))
    variables = model.init(jax.random.key(0), x)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any, opt_state: Any) -> tuple[Any, ...]:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = model.apply({"params": params, **state}, x, train=True, mutable=list(state))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), new, opt_state, value

    opt_state, losses = optimizer.init(params), []
    for _ in range(steps):
        params, state, opt_state, value = step(params, state, opt_state)
        losses.append(float(value))
    return losses, params


@pytest.mark.parametrize("relu_input", [False, True])
@pytest.mark.parametrize("network", [VGG, ResNet])
def test_networks_train_to_the_same_losses_with_sparse_conv(network: type[nn.Module], relu_input: bool) -> None:
    def sparse(features: int, *args: Any, name: str, **kwargs: Any) -> nn.Module:
        first = name in ("stem", "conv00")  # fed with images
        return st.SparseConv(features, *args, relu_input=relu_input and not first, name=name, **kwargs)

    stock_losses, stock_params = train_linen(network(nn.Conv))
    losses, params = train_linen(network(sparse))
    assert stock_losses[-1] < 0.7 * stock_losses[0]
    np.testing.assert_allclose(losses, stock_losses, rtol=1e-4)
    close(params, stock_params, rtol=2e-3)


class NnxNet(nnx.Module):
    def __init__(self, conv: Any, rngs: nnx.Rngs) -> None:
        self.conv1 = conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([conv(16, 16, (1, 1), rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv1(x)))
        x = nnx.relu(self.conv2(x))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.head(x.mean((1, 2)))


def train_nnx(model: NnxNet, steps: int = 12) -> list[float]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 16, 16, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 16))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxNet, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: NnxNet) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_nnx_networks_train_to_the_same_losses_with_sparse_conv_and_sparsified() -> None:
    stock = train_nnx(NnxNet(nnx.Conv, nnx.Rngs(0)))
    assert stock[-1] < stock[0]
    np.testing.assert_allclose(train_nnx(NnxNet(st.nnx.SparseConv, nnx.Rngs(0))), stock, rtol=1e-4)
    model = NnxNet(nnx.Conv, nnx.Rngs(0))
    assert st.nnx.sparsify(model) is model
    np.testing.assert_allclose(train_nnx(model), stock, rtol=1e-4)


def test_nnx_sparsify_reaches_every_conv_and_leaves_the_parameters() -> None:
    model = NnxNet(nnx.Conv, nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    st.nnx.sparsify(model)
    equal(nnx.to_pure_dict(nnx.state(model)), before)
    model.eval()
    jaxpr = str(jax.make_jaxpr(model)(inputs(1, 8, 8, 3)))
    assert jaxpr.count("sparse_conv_fwd") == 4 and "conv_general_dilated" not in jaxpr


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations([nn.Conv, st.SparseConv])))
def test_checkpoints_move_both_ways(source: Any, target: Any) -> None:
    x = inputs(2, 16, 16, 3)
    variables = ResNet(source).init(jax.random.key(0), x)
    got = ResNet(target).apply(variables, x, train=False)
    close(got, ResNet(source).apply(variables, x, train=False))


def test_unnamed_linen_layers_are_named_after_their_class() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return st.SparseConv(2, (1, 1), name="mine")(st.SparseConv(2, (1, 1))(x))

    assert set(Model().init(jax.random.key(0), inputs(1, 3, 3, 2))["params"]) == {"SparseConv_0", "mine"}
