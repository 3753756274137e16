"""What the benchmarks share: layers, operands with zeros, competitors, interleaved timing and a tuned process.

One `Case` is one component (FWD, BWI or BWW) of one `Layer` at given sparsities. `measure` runs a list of them: for
each it checks our answer against the baselines', then times all of them in turn, so that a ratio compares neighbours in
time on a machine whose speed drifts. Times are medians over rounds; a ratio is the median over rounds of the ratio of
that round's two times.

Nothing here imports jax or torch at module level: the parent process only parses arguments and prints tables, and the
child that measures must be started with its environment and CPU affinity already set (`run_child`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fnmatch
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

# Large blocks are mapped afresh on each call unless malloc keeps them (and XLA's temporaries even then, unless its
# threads share one heap), and spinning OpenMP threads slow whatever runs next: both are switched off for all
# competitors, and a second pass without this shows what it was worth.
TUNING = {
    "OMP_WAIT_POLICY": "passive",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=2147483648:glibc.malloc.trim_threshold=8589934592"
    ":glibc.malloc.arena_max=1",
}

FWD, BWI, BWW_LHS, BWW_G, BWI_MASKED = "fwd", "bwd_input", "bwd_weights_lhs", "bwd_weights_g", "bwd_input_masked"
BOTH = "bwd_both"
COMPONENTS = (FWD, BWI, BWW_LHS, BWW_G, BWI_MASKED, BOTH)
COMPONENT_TITLES = {
    FWD: "FWD (lhs checked)",
    BWI: "BWI (output gradient checked)",
    BWW_LHS: "BWW (lhs has the zeros)",
    BWW_G: "BWW (output gradient has the zeros)",
    BWI_MASKED: "BWI computed only where lhs != 0 (relu_input=True)",
    BOTH: "BWI where lhs != 0 and BWW, in one call (relu_input=True)",
}
OURS, ONEDNN, XLA = "ours", "onednn", "xla"
FORCED = ("sparse", "dense")  # our own modes, as competitors of the mode that is measured
MASKS = ("iid", "blobs", "images", "rows", "channels")


# --------------------------------------------------------------------------------------------------------------- layers


@dataclasses.dataclass(frozen=True)
class Layer:
    """A square 2-D convolution, NHWC x HWIO, padded by kernel // 2 on every side.

    Attributes:
      size: height and width of the input. in_features, features: C and K. kernel, stride: both dimensions alike.
      tags: networks and tables the shape belongs to, for `--shapes`.
    """

    size: int
    in_features: int
    features: int
    kernel: int
    stride: int = 1
    tags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        stride = "" if self.stride == 1 else f"s{self.stride}"
        return f"{self.kernel}x{self.kernel}{stride}_{self.size}x{self.size}_{self.in_features}to{self.features}"

    @property
    def pad(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def group(self) -> str:
        """Row of the summary table the shape counts for."""
        if self.in_features <= 4:
            return "stem"
        if self.in_features % 16 or self.features % 16:
            return "odd channels"
        if self.stride > 1:
            return f"stride {self.stride}"
        return f"{self.kernel}x{self.kernel}"

    def batch(self, requested: int | None) -> int:
        return requested if requested is not None else (4 if self.size >= 112 else 16)

    def gflop(self, batch: int) -> float:
        """Dense-equivalent 1e9 floating-point operations of one gradient; padding counts as work, zeros too."""
        return 2e-9 * batch * self.out_size**2 * self.in_features * self.features * self.kernel**2


def _layers() -> dict[str, Layer]:
    tags: dict[Layer, list[str]] = {}

    def add(tag: str, *shapes: tuple[int, int, int, int] | tuple[int, int, int, int, int]) -> None:
        for size, in_features, features, kernel, *rest in shapes:
            stride = rest[0] if rest else 1
            tags.setdefault(Layer(size, in_features, features, kernel, stride), []).append(tag)

    add("vgg16", (224, 3, 64, 3), (224, 64, 64, 3), (112, 64, 128, 3), (112, 128, 128, 3), (56, 128, 256, 3))
    add("vgg16", (56, 256, 256, 3), (28, 256, 512, 3), (28, 512, 512, 3), (14, 512, 512, 3))
    add("resnet34", (224, 3, 64, 7, 2), (56, 64, 64, 3), (28, 128, 128, 3), (14, 256, 256, 3), (7, 512, 512, 3))
    add("resnet34", (56, 64, 128, 3, 2), (28, 128, 256, 3, 2), (14, 256, 512, 3, 2))
    add("resnet34", (56, 64, 128, 1, 2), (28, 128, 256, 1, 2), (14, 256, 512, 1, 2))
    add("resnet50", (224, 3, 64, 7, 2), (56, 64, 64, 3), (28, 128, 128, 3), (14, 256, 256, 3), (7, 512, 512, 3))
    add("resnet50", (56, 128, 128, 3, 2), (28, 256, 256, 3, 2), (14, 512, 512, 3, 2))
    for size, narrow in ((56, 64), (28, 128), (14, 256), (7, 512)):
        add("resnet50", (size, narrow, 4 * narrow, 1), (size, 4 * narrow, narrow, 1))
    add("resnet50", (56, 64, 64, 1), (56, 256, 128, 1), (28, 512, 256, 1), (14, 1024, 512, 1))
    add("resnet50", (56, 256, 512, 1, 2), (28, 512, 1024, 1, 2), (14, 1024, 2048, 1, 2))
    # The shapes by which the kernels are judged.
    add("table", (224, 64, 64, 3), (112, 128, 128, 3), (56, 64, 64, 3), (56, 256, 256, 3), (28, 128, 128, 3))
    add("table", (28, 512, 512, 3), (14, 256, 256, 3), (14, 512, 512, 3), (7, 512, 512, 3))
    add("table", (56, 64, 256, 1), (56, 256, 64, 1), (28, 512, 128, 1), (28, 128, 512, 1))
    add("table", (14, 1024, 256, 1), (14, 256, 1024, 1), (7, 2048, 512, 1), (7, 512, 2048, 1))
    add("table", (56, 128, 128, 3, 2), (28, 256, 256, 3, 2), (14, 512, 512, 3, 2), (56, 256, 512, 1, 2))
    add("table", (28, 128, 128, 5), (28, 64, 64, 7))
    add("stem", (224, 3, 64, 7, 2), (224, 3, 64, 3))
    for channels in (24, 40, 48, 96, 100, 250):
        add("channels", (28, channels, channels, 3), (28, channels, channels, 1))
    add("channels", (28, 112, 112, 3), (28, 256, 256, 3))  # the next multiples of 16, to price the tails
    add("quick", (56, 256, 256, 3), (14, 256, 256, 3), (14, 1024, 256, 1), (14, 256, 1024, 1))
    return {layer.name: dataclasses.replace(layer, tags=tuple(dict.fromkeys(t))) for layer, t in tags.items()}


LAYERS = _layers()
_NAME = re.compile(r"(\d+)x\1(?:s(\d+))?_(\d+)x\3_(\d+)to(\d+)")


def select_layers(filters: str) -> list[Layer]:
    """Layers for a comma-separated list of tags (`vgg16`), groups (`stride 2`), name patterns (`3x3_56*`) or names.

    A name need not be a listed one: `3x3s2_30x30_20to40` is any layer of that shape. `all` is all listed layers.

    Raises:
      ValueError: an item selects nothing, or there is none.
    """
    chosen: dict[str, Layer] = {}
    for item in filter(None, (part.strip() for part in filters.split(","))):
        found = {
            name: layer
            for name, layer in LAYERS.items()
            if item in ("all", layer.group) or item in layer.tags or fnmatch.fnmatch(name, item)
        }
        if not found and (match := _NAME.fullmatch(item)):
            kernel, stride, size, in_features, features = match.groups()
            found = {item: Layer(int(size), int(in_features), int(features), int(kernel), int(stride or 1))}
        if not found:
            tags = sorted({tag for layer in LAYERS.values() for tag in (*layer.tags, layer.group)})
            raise ValueError(
                f"--shapes: {item!r} selects nothing; accepted are all, {', '.join(tags)}, names and patterns"
            )
        chosen.update(found)
    if not chosen:
        raise ValueError("--shapes: nothing is given")
    return list(chosen.values())


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One component of one layer. Sparsity is the fraction of zeros in lhs and in the output gradient."""

    layer: Layer
    batch: int
    component: str
    lhs_sparsity: float = 0.0
    g_sparsity: float = 0.0

    @property
    def skippable(self) -> float:
        """Fraction of the multiplications that a kernel of this component can skip by checking one operand."""
        if self.component == FWD:
            return self.lhs_sparsity
        if self.component == BWI:
            return self.g_sparsity
        return max(self.lhs_sparsity, self.g_sparsity)

    @property
    def key(self) -> tuple[Any, ...]:
        """What `Record.key` of this case's record is."""
        return self.layer.name, self.batch, self.component, self.lhs_sparsity, self.g_sparsity

    def describe(self) -> str:
        return f"{self.component} {self.layer.name} N={self.batch} s={self.skippable:g}"


def sparse_case(layer: Layer, batch: int, component: str, sparsity: float) -> Case:
    """The case in which only the operand that `component` checks has zeros."""
    on_lhs = component in (FWD, BWW_LHS, BWI_MASKED, BOTH)
    return Case(layer, batch, component, sparsity if on_lhs else 0.0, 0.0 if on_lhs else sparsity)


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. `budget` is the time in seconds to spend on each competitor of each case."""

    mask: str = "iid"
    mode: str = "auto"
    threads: int = 1
    budget: float = 0.3
    seed: int = 0
    check: bool = True
    baselines: tuple[str, ...] = (ONEDNN, XLA)
    dtype: str = "float32"


@dataclasses.dataclass
class Record:
    """One measured case; times in seconds, speeds in GF/s dense-equivalent. None where a baseline is missing."""

    layer: str
    group: str
    batch: int
    component: str
    lhs_sparsity: float
    g_sparsity: float
    sparsity: float
    mask: str
    mode: str
    isa: str
    threads: int
    gflop: float
    ours_s: float
    ours_min_s: float
    gflops: float
    path: str
    peak_gflops: float | None = None
    roofline_fraction: float | None = None
    onednn_s: float | None = None
    onednn_min_s: float | None = None
    onednn_call: str | None = None
    x_onednn: float | None = None
    xla_s: float | None = None
    xla_min_s: float | None = None
    xla_kind: str | None = None
    x_xla: float | None = None
    x_forced: float | None = None
    error_over_bound: float | None = None
    dtype: str = "float32"
    untuned_gflops: float | None = None
    untuned_x_onednn: float | None = None
    untuned_x_xla: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.layer, self.batch, self.component, self.lhs_sparsity, self.g_sparsity


# ------------------------------------------------------------------------------------------------------------- operands


def mask_nonzero(shape: tuple[int, ...], sparsity: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """A boolean mask (NHWC) in which a fraction `sparsity` is False, up to rounding.

    Args:
      kind: "iid" draws every element by itself. So do "images", "rows" and "channels", but each image, row or channel
        has a sparsity of its own, evenly spread around the given one. "blobs" thresholds smoothed noise plus an offset
        for each channel, so that zeros cluster in space and channels differ in density, as in ReLU maps of a trained
        network.
    """
    if kind == "iid":
        return rng.random(shape, dtype=np.float32) >= sparsity
    if kind in ("images", "rows", "channels"):
        varies = {"images": (shape[0], 1, 1, 1), "rows": (1, shape[1], 1, 1), "channels": (1, 1, 1, shape[3])}[kind]
        spread = min(sparsity, 1 - sparsity)
        own = np.linspace(sparsity - spread, sparsity + spread, math.prod(varies), dtype=np.float32)
        return rng.random(shape, dtype=np.float32) >= rng.permutation(own).reshape(varies)
    if kind != "blobs":
        raise ValueError(f"mask: {kind!r} is not one of {', '.join(MASKS)}")
    from scipy import ndimage

    field = rng.standard_normal(shape, dtype=np.float32)
    window = [min(5, shape[1]), min(5, shape[2])]
    field = ndimage.uniform_filter(field, size=[1, *window, 1], mode="wrap")
    field /= field.std()
    field += rng.standard_normal((1, 1, 1, shape[3]), dtype=np.float32) * np.float32(0.5)
    rank = round(sparsity * field.size)
    if rank == 0:
        return np.ones(shape, bool)
    if rank == field.size:
        return np.zeros(shape, bool)
    return field > np.partition(field, rank - 1, axis=None)[rank - 1]


class Operands:
    """lhs, rhs and output gradient of a layer, drawn once; zeros are put in per case."""

    def __init__(self, layer: Layer, batch: int, options: Options) -> None:
        self._options = options
        rng = np.random.default_rng([options.seed, layer.size, layer.in_features, layer.features, layer.kernel])
        shape_x = (batch, layer.size, layer.size, layer.in_features)
        shape_g = (batch, layer.out_size, layer.out_size, layer.features)
        self._x = rng.standard_normal(shape_x, dtype=np.float32)
        self._g = rng.standard_normal(shape_g, dtype=np.float32)
        # Exact zeros are drawn now and then; a dense operand has none.
        for array in (self._x, self._g):
            array[array == 0] = 1.0
        scale = np.float32(1 / math.sqrt(layer.in_features * layer.kernel**2))
        self.w = (
            rng.standard_normal((layer.kernel, layer.kernel, layer.in_features, layer.features), np.float32) * scale
        )
        self._rng = rng

    def draw(self, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lhs, rhs, g) with the zeros of `case`; a sparse lhs is non-negative like a ReLU's output."""
        x, g = self._x, self._g
        if case.lhs_sparsity > 0:
            x = np.abs(x) * mask_nonzero(x.shape, case.lhs_sparsity, self._options.mask, self._rng)
        if case.g_sparsity > 0:
            g = g * mask_nonzero(g.shape, case.g_sparsity, self._options.mask, self._rng)
        dtype = _numpy_dtype(self._options.dtype)
        return x.astype(dtype, copy=False), self.w.astype(dtype, copy=False), g.astype(dtype, copy=False)


def _numpy_dtype(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)


# ---------------------------------------------------------------------------------------------------------- competitors


class Competitor(NamedTuple):
    """`run()` computes and waits; `results()` returns the answers as numpy arrays in our layout; `label` names it."""

    run: Callable[[], Any]
    results: Callable[[], list[np.ndarray]]
    label: str


def _component_of(conv: Callable[[Any, Any], Any], component: str) -> Callable[[Any, Any, Any], Any]:
    """(x, w, g) -> results of the asked component of `conv` alone: what others need is dead code that jit removes."""
    import jax

    if component == FWD:
        return lambda x, w, g: (conv(x, w),)
    if component in (BWI, BWI_MASKED):
        return lambda x, w, g: jax.vjp(lambda lhs: conv(lhs, w), x)[1](g)
    if component == BOTH:
        return lambda x, w, g: jax.vjp(conv, x, w)[1](g)
    return lambda x, w, g: jax.vjp(lambda rhs: conv(x, rhs), w)[1](g)


class Compiled(NamedTuple):
    call: Callable[..., Any]
    text: str


def compile_jax(layer: Layer, batch: int, component: str, which: str, mode: str, dtype: str = "float32") -> Compiled:
    """Compile one component through the public API: XLA's (`lax.conv_general_dilated`) or ours (`sparse_conv`)."""
    import jax
    from jax import lax

    strides, padding = (layer.stride,) * 2, ((layer.pad,) * 2,) * 2
    if which != XLA:
        import sparsetrain_jax as st

        def conv(x: Any, w: Any) -> Any:
            masked = component in (BWI_MASKED, BOTH)
            return st.sparse_conv(x, w, strides=strides, padding=padding, relu_input=masked, mode=mode)
    else:

        def conv(x: Any, w: Any) -> Any:
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers)

    shapes = [
        (batch, layer.size, layer.size, layer.in_features),
        (layer.kernel, layer.kernel, layer.in_features, layer.features),
        (batch, layer.out_size, layer.out_size, layer.features),
    ]
    avals = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    compiled = jax.jit(_component_of(conv, component)).lower(*avals).compile()
    return Compiled(compiled, compiled.as_text() or "")


def our_calls(text: str) -> list[str]:
    """Targets of our custom calls in compiled HLO, e.g. ["sparsetrain_conv_fwd_v1"]."""
    return re.findall(r'custom_call_target="(sparsetrain_\w+)"', text)


def xla_kind(text: str) -> str:
    """Which of XLA:CPU's convolutions the baseline met: "ynn" (YNNPACK fusion), "thunk" (Eigen or loops) or "dot"."""
    if "__ynn_fusion" in text:
        return "ynn"
    return "thunk" if re.search(r"\bconvolution\(", text) else "dot"


def jax_competitor(compiled: Compiled, label: str, arrays: Sequence[Any]) -> Competitor:
    import jax

    return Competitor(
        run=lambda: jax.block_until_ready(compiled.call(*arrays)),
        results=lambda: [np.asarray(result) for result in compiled.call(*arrays)],
        label=label,
    )


def torch_competitors(case: Case, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Competitor]:
    """The ways PyTorch has to oneDNN for this component, channels_last; [] when PyTorch is not installed.

    `conv2d` and `convolution_backward` sometimes leave oneDNN on 1x1 kernels, so FWD and BWI are also asked of
    `mkldnn_convolution` (BWI with the transposed filter, which is prepared in advance: a gift to the baseline). Both
    gradients are asked for in one call and in two.
    """
    try:
        import torch
    except ImportError:
        return []
    layer = case.layer
    channels_last, dtype = torch.channels_last, getattr(torch, str(arrays[0].dtype))
    x, w, g = (torch.from_numpy(array.astype(np.float32)).to(dtype) for array in arrays)
    tx, tg = x.permute(0, 3, 1, 2), g.permute(0, 3, 1, 2)
    tw = w.permute(3, 2, 0, 1).contiguous(memory_format=channels_last)
    pads, strides, ones = [layer.pad] * 2, [layer.stride] * 2, [1, 1]

    def backward(which: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(tg, tx, tw, None, strides, pads, ones, False, [0, 0], 1, which)

    def competitor(run: Callable[[], Sequence[Any]], label: str, *orders: tuple[int, ...]) -> Competitor:
        """`orders`: of the dimensions of each tensor that `run` returns, to get ours."""

        def results() -> list[np.ndarray]:
            tensors = zip(run(), orders, strict=True)
            return [tensor.permute(*order).contiguous().float().numpy() for tensor, order in tensors]

        return Competitor(run, results, label)

    nhwc, hwio = (0, 2, 3, 1), (2, 3, 1, 0)
    if case.component == FWD:
        ways = [
            competitor(
                lambda: [torch.mkldnn_convolution(tx, tw, None, pads, strides, ones, 1)], "mkldnn_convolution", nhwc
            )
        ]
        if layer.kernel > 1:
            ways.append(competitor(lambda: [torch.conv2d(tx, tw, None, strides, pads)], "conv2d", nhwc))
        return ways
    of_input = [competitor(lambda: backward([True, False, False])[:1], "convolution_backward", nhwc)]
    if layer.kernel == 1 and layer.stride == 1:
        twt = tw.transpose(0, 1).contiguous(memory_format=channels_last)
        transposed = lambda: [torch.mkldnn_convolution(tg, twt, None, [0, 0], ones, ones, 1)]  # noqa: E731
        of_input.append(competitor(transposed, "mkldnn_convolution", nhwc))
    if case.component in (BWI, BWI_MASKED):
        return of_input
    of_weights = competitor(lambda: backward([False, True, False])[1:2], "convolution_backward", hwio)
    if case.component != BOTH:
        return [of_weights]

    def one_after_the_other(way: Competitor) -> Competitor:
        return Competitor(
            lambda: (way.run(), of_weights.run()),
            lambda: [*way.results(), *of_weights.results()],
            f"{way.label}, {of_weights.label}",
        )

    at_once = competitor(lambda: backward([True, True, False])[:2], "convolution_backward", nhwc, hwio)
    return [at_once, *map(one_after_the_other, of_input)]


def _clock(run: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _fastest(ways: list[Competitor]) -> Competitor | None:
    if len(ways) < 2:
        return ways[0] if ways else None
    for way in ways:
        way.run()
    return min(ways, key=lambda way: min(_clock(way.run) for _ in range(3)))


class Timing(NamedTuple):
    median: float
    minimum: float
    rounds: list[float]


def interleave(runs: dict[str, Callable[[], Any]], budget: float) -> dict[str, Timing]:
    """Time all `runs` in turn, round after round, for about `budget` seconds each (untimed calls come on top).

    The order is drawn anew for each round: what a competitor leaves in the caches (one that transposes large tensors
    leaves megabytes to be written back) costs the next one up to a third of its speed. An untimed call comes before
    each sample: a thread that wakes up after other work may share the caller's core until the next tick of the
    scheduler, which doubles the time of that call. Short calls are repeated inside a sample until it lasts a few
    milliseconds. Three rounds at least, at any cost.
    """
    single = {}
    for name, run in runs.items():
        run()
        single[name] = _clock(run)
    repeats = {name: max(1, math.ceil(0.004 / max(t, 1e-7))) if t < 0.002 else 1 for name, t in single.items()}
    one_round = sum(single[name] * repeats[name] for name in runs)
    rounds = int(min(25, max(3, budget * len(runs) / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(runs)):
            runs[name]()
            samples[name].append(_clock(runs[name], repeats[name]))
    return {name: Timing(float(np.median(values)), min(values), values) for name, values in samples.items()}


def _ratio(base: Timing, ours: Timing) -> float:
    return float(np.median([b / o for b, o in zip(base.rounds, ours.rounds, strict=True)]))


def error_over_bound(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, terms: int) -> float:
    """max |got - want| over 8 eps sqrt(terms) sum|a||b|, plus one rounding of `got` if it is narrow.

    Each of two float32 sums in different orders strays from the true one by about eps sqrt(terms) of the largest
    partial sum, itself at most sum|a||b| (`magnitude`). An answer of all zeros fails.
    """
    import jax.numpy as jnp

    bound = 8 * np.finfo(np.float32).eps * math.sqrt(terms) * magnitude + np.finfo(np.float32).tiny
    if got.dtype != np.float32:
        limits = jnp.finfo(got.dtype)
        bound += float(limits.eps) * (np.abs(want) + bound) / 2 + float(limits.smallest_subnormal)
        got = got.astype(np.float32)
    return float(np.max(np.abs(got - want) / bound, initial=0.0)) if got.shape == want.shape else math.inf


# ------------------------------------------------------------------------------------------------------------ measuring


def measure_peak(threads: int, seconds: float = 0.5) -> float:
    """GF/s of back-to-back float32 FMAs on `threads` cores at once."""
    import sparsetrain_jax._native as native

    results = [0.0] * threads

    def work(index: int) -> None:
        results[index] = native.measure_peak(seconds)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(results)


class _Counters:
    """Names the path of a call by the native counters: "sparse", "dense", "sparse 75%", or "lax" when none ran."""

    def __init__(self) -> None:
        import sparsetrain_jax._native as native

        self._native = native

    def path_of(self, run: Callable[[], Any], targets: Sequence[str]) -> str:
        self._native.reset_counters()
        run()
        operations = {re.sub(r"^sparsetrain_|_v\d+$", "", target) for target in targets}
        by_path: dict[str, int] = {}
        for name, count in self._native.counters().items():
            operation, path = name.rsplit("/", 1)
            if operation in operations:
                by_path[path] = by_path.get(path, 0) + count
        total = sum(by_path.values())
        if not total:
            return "lax"
        best = max(by_path, key=lambda path: by_path[path])
        return best if by_path[best] == total else f"{best} {100 * by_path[best] // total}%"


def measure(
    cases: Iterable[Case], options: Options, each: Callable[[list[Record]], None] | None = None
) -> list[Record]:
    """Check and time `cases` in this process. Call it in a child made by `run_child`.

    `each` is called after each case with all records so far, whose peak and share of the roofline are still open.

    Raises:
      RuntimeError: an answer is wrong, or a compiled function holds more than the one asked component.
    """
    import jax
    import jax.numpy as jnp
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import sparsetrain_jax as st

    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(options.threads)
        torch.set_grad_enabled(False)

    counters = _Counters()
    peaks = [measure_peak(options.threads)]
    records: list[Record] = []
    compiled: dict[tuple[Any, ...], Compiled] = {}
    operands: tuple[Any, Operands] | None = None

    def compiled_for(case: Case, which: str, dtype: str) -> Compiled:
        component = case.component
        if which == XLA:  # one dense program serves both ways to check BWW, and BWI with and without the mask
            component = {BWW_G: BWW_LHS, BWI_MASKED: BWI}.get(component, component)
        key = (case.layer.name, case.batch, component, which, dtype)
        if key not in compiled:
            mode = which if which in FORCED else options.mode
            compiled[key] = compile_jax(case.layer, case.batch, component, which, mode, dtype)
        return compiled[key]

    ordered = sorted(cases, key=lambda case: list(LAYERS).index(case.layer.name) if case.layer.name in LAYERS else -1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("starting", total=len(ordered))
        for case in ordered:
            progress.update(task, description=case.describe())
            layer = case.layer
            if operands is None or operands[0] != (layer.name, case.batch):
                operands = (layer.name, case.batch), Operands(layer, case.batch, options)
                compiled.clear()
            arrays = operands[1].draw(case)
            on_device = [jnp.asarray(array) for array in arrays]
            ours_compiled = compiled_for(case, OURS, options.dtype)
            targets = our_calls(ours_compiled.text)
            if len(targets) > 1:
                raise RuntimeError(
                    f"{case.describe()}: compiled to {len(targets)} custom calls {targets}, expected one"
                )
            entries = {OURS: jax_competitor(ours_compiled, ",".join(targets), on_device)}
            if ONEDNN in options.baselines and (way := _fastest(torch_competitors(case, arrays))):
                entries[ONEDNN] = way
            for mode in set(FORCED) & set(options.baselines):
                entries[mode] = jax_competitor(compiled_for(case, mode, options.dtype), mode, on_device)
            if XLA in options.baselines:
                program = compiled_for(case, XLA, options.dtype)
                entries[XLA] = jax_competitor(program, xla_kind(program.text), on_device)
            error = _check(case, entries, arrays, compiled_for(case, XLA, "float32")) if options.check else None
            path = counters.path_of(entries[OURS].run, targets)
            times = interleave({name: entry.run for name, entry in entries.items()}, options.budget)
            records.append(_record(case, options, st.isa(), entries, times, path, error))
            if each is not None:
                each(records)
            progress.advance(task)
        del on_device
    peaks.append(measure_peak(options.threads))
    known = [peak for peak in peaks if peak]
    if known:
        for record in records:
            record.peak_gflops = float(np.median(known))
            record.roofline_fraction = record.gflops * (1 - record.sparsity) / record.peak_gflops
    jax.clear_caches()
    return records


def _check(case: Case, entries: dict[str, Competitor], arrays: Sequence[np.ndarray], dense: Compiled) -> float:
    """Compare our answer with every baseline's (`dense` if there are none); the worst error relative to its bound.

    Narrow answers are compared with `dense` on the same operands in float32: baselines may accumulate in less.
    """
    layer = case.layer
    of_input, of_weights = layer.kernel**2 * layer.features, case.batch * layer.out_size**2
    terms = {
        FWD: [layer.kernel**2 * layer.in_features],
        BWI: [of_input],
        BWI_MASKED: [of_input],
        BOTH: [of_input, of_weights],
    }.get(case.component, [of_weights])
    narrow = arrays[0].dtype != np.float32
    arrays = [array.astype(np.float32, copy=False) for array in arrays]
    # float32 sums of non-negative terms are accurate enough for a bound.
    magnitudes = [np.asarray(result) for result in dense.call(*(np.abs(array) for array in arrays))]
    got = entries[OURS].results()
    wanted = {} if narrow else {name: entry.results() for name, entry in entries.items() if name != OURS}
    if not wanted:
        wanted[XLA] = [np.asarray(result) for result in dense.call(*arrays)]

    def masked(results: list[np.ndarray]) -> list[np.ndarray]:
        if case.component not in (BWI_MASKED, BOTH):
            return results
        return [np.where(arrays[0] != 0, results[0], 0), *results[1:]]

    worst = 0.0
    for name, want in wanted.items():
        answers = zip(got, masked(want), masked(magnitudes), terms, strict=True)
        worst = max(worst, *(error_over_bound(*answer) for answer in answers))
        if not worst <= 1:
            raise RuntimeError(f"{case.describe()}: our answer differs from {name}'s by {worst:.3g} times the bound")
    return worst


def _record(
    case: Case,
    options: Options,
    isa: str,
    entries: dict[str, Competitor],
    times: dict[str, Timing],
    path: str,
    error: float | None,
) -> Record:
    layer, ours = case.layer, times[OURS]
    gflop = layer.gflop(case.batch) * (2 if case.component == BOTH else 1)
    record = Record(
        layer=layer.name,
        group=layer.group,
        batch=case.batch,
        component=case.component,
        lhs_sparsity=case.lhs_sparsity,
        g_sparsity=case.g_sparsity,
        sparsity=case.skippable,
        mask=options.mask,
        mode=options.mode,
        isa=isa,
        threads=options.threads,
        gflop=gflop,
        ours_s=ours.median,
        ours_min_s=ours.minimum,
        gflops=gflop / ours.median,
        path=path,
        error_over_bound=error,
        dtype=options.dtype,
    )
    if onednn := times.get(ONEDNN):
        record.onednn_s, record.onednn_min_s, record.x_onednn = onednn.median, onednn.minimum, _ratio(onednn, ours)
        record.onednn_call = entries[ONEDNN].label
    if forced := [times[mode] for mode in FORCED if mode in times]:
        record.x_forced = min(_ratio(timing, ours) for timing in forced)
    if xla := times.get(XLA):
        record.xla_s, record.xla_min_s, record.x_xla = xla.median, xla.minimum, _ratio(xla, ours)
        record.xla_kind = entries[XLA].label
    return record


# ---------------------------------------------------------------------------------------------------------- the options


def positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """A type of argparse: a number above 0."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__})") from None
        if not (0 < value < math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    return parse


def fraction(text: str) -> float:
    """A type of argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def comma_list(item: Callable[[str], Any], empty: bool = False) -> Callable[[str], list[Any]]:
    """A type of argparse: items separated by commas, at least one unless ``empty``."""

    def parse(text: str) -> list[Any]:
        items = [item(part.strip()) for part in text.split(",") if part.strip()]
        if not items and not empty:
            raise argparse.ArgumentTypeError("nothing is given")
        return items

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """A type of argparse: one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def output_file(text: str) -> str:
    """A type of argparse: a file that can be written when the work is done."""
    if not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent} is not a directory")
    return text


def add_options(parser: argparse.ArgumentParser, budget: float) -> None:
    """The options of all benchmarks."""
    parser.add_argument("--mask", choices=MASKS, default="iid", help="how zeros are spread")
    parser.add_argument("--mode", choices=("auto", *FORCED), default="auto")
    parser.add_argument(
        "--budget", type=positive(float), default=budget, help="seconds for each competitor of each case"
    )
    add_process_options(parser)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Those of the options of all benchmarks that say nothing of layers."""
    parser.add_argument("--threads", type=positive(int), default=2)
    parser.add_argument("--plot", type=output_file, metavar="FILE")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)


def print_missing_onednn(console: Console) -> None:
    """Why there are no figures of oneDNN, if it is for want of PyTorch."""
    if importlib.util.find_spec("torch") is None:
        console.print("No oneDNN columns: PyTorch is not installed (pip install '.\\[bench]').")


# ---------------------------------------------------------------------------------------------------------- the process


def limit_threads(script: str, threads: int) -> None:
    """Bind this process and its children to `threads` CPUs: XLA sizes its pool by the affinity it starts with.

    Raises:
      SystemExit: there are not as many; the message names `script`.
    """
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < threads:
            problem = f"--threads: {threads} asked for, this process may use {len(cpus)} CPUs"
            raise SystemExit(f"{Path(script).name}: error: {problem}")
        os.sched_setaffinity(0, cpus[-threads:])


def run_child(script: str, argv: Sequence[str], *, tuned: bool, threads: int) -> Any:
    """Run `script argv --child FILE` with the benchmark's environment and return the JSON that it left in FILE.

    Raises:
      SystemExit: the child failed; its own message is on the terminal already.
    """
    environment = {**os.environ, **(TUNING if tuned else {}), "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    if not tuned:
        for name in TUNING:
            environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        child = subprocess.run([sys.executable, script, *argv, "--child", str(path)], env=environment, check=False)
        if child.returncode:
            raise SystemExit(child.returncode)
        return json.loads(path.read_text())


def write_json(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value))


def merge_untuned(records: list[Record], untuned: list[Record]) -> None:
    """Copy the figures of the pass without `TUNING` into the tuned records."""
    by_key = {record.key: record for record in untuned}
    for record in records:
        if other := by_key.get(record.key):
            record.untuned_gflops = other.gflops
            record.untuned_x_onednn = other.x_onednn
            record.untuned_x_xla = other.x_xla


# -------------------------------------------------------------------------------------------------------------- results


def geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def colored_ratio(value: float | None) -> str:
    """A ratio as rich markup: green when we win, red when we lose by more than measurement noise."""
    if value is None:
        return "-"
    color = "green" if value >= 1.05 else "red" if value < 0.95 else "yellow"
    return f"[{color}]{value:.2f}[/{color}]"


def write_csv(path: str, records: Sequence[Any]) -> None:
    """One line for each record (a dataclass instance), columns named after its fields."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(records[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(record) for record in records)


def console() -> Console:
    """A rich console that does not wrap tables to 80 columns when the output is a file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=150)
