"""Training steps of whole networks: stock Flax, ours and PyTorch, a step of each in turn.

    python bench/training.py                                        ResNet-50, batch 8, 224x224 pixels
    python bench/training.py --networks vgg16,resnet34,resnet50 --csv out.csv --plot out.png
    python bench/training.py --trace DIR                            and keep the traces, for TensorBoard or Perfetto

All take the same steps: forward, backward, SGD with momentum, float32, images and labels drawn at random. "ours" is the
stock Flax model with `st.sparsify` around the loss; "SparseConv" is the model with its class swapped and nothing said
of ReLU. PyTorch, if it is installed, runs the same network in channels_last through oneDNN.
Where a step's time goes is read from one more step under `jax.profiler` (or PyTorch's). Zeros are those of networks at
their random start, weighted by the work of the convolutions that meet them; training makes more of them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import common
import numpy as np
from common import OURS
from rich.console import Console
from rich.table import Table

STOCK, SWAPPED, TORCH = "nn.Conv", "SparseConv", "PyTorch"
NETWORKS = ("vgg16", "resnet34", "resnet50")
PARTS = ("FWD", "BWI + BWW", "the rest")
CLASSES = 1000


@dataclasses.dataclass
class Step:
    """Training steps of one competitor on one network; milliseconds, medians over rounds.

    `speed` is that of stock Flax's time over this one's, round by round; the three parts are those of the one step that
    a profiler watched. `zeros` is the share of the forward multiplications that meet a zero of the input.
    """

    network: str
    competitor: str
    batch: int
    size: int
    threads: int
    isa: str
    zeros: float
    step_ms: float
    min_ms: float
    speed: float
    fwd_ms: float
    backward_ms: float
    rest_ms: float
    loss: float
    untuned_step_ms: float | None = None
    untuned_speed: float | None = None

    @property
    def parts(self) -> tuple[float, float, float]:
        return self.fwd_ms, self.backward_ms, self.rest_ms


# ------------------------------------------------------------------------------------------------------------- networks


class Layers(Protocol):
    """What a network is made of; a framework's own activations go in and come out."""

    def conv(self, x: Any, features: int, kernel: int, stride: int = 1, bias: bool = False) -> Any: ...
    def norm(self, x: Any) -> Any: ...
    def relu(self, x: Any) -> Any: ...
    def max_pool(self, x: Any, window: int) -> Any:
        """Of stride 2; padded by window // 2 if that is odd."""

    def mean(self, x: Any) -> Any:
        """Over the pixels."""

    def flatten(self, x: Any) -> Any: ...
    def dense(self, x: Any, features: int) -> Any: ...


def vgg16(layers: Layers, x: Any) -> Any:
    """Logits; Simonyan and Zisserman, arXiv 1409.1556, configuration D."""
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            x = layers.relu(layers.conv(x, width, 3, bias=True))
        x = layers.max_pool(x, 2)
    x = layers.flatten(x)
    for _ in range(2):
        x = layers.relu(layers.dense(x, 4096))
    return layers.dense(x, CLASSES)


def resnet(layers: Layers, x: Any, bottleneck: bool) -> Any:
    """Logits of ResNet-34, or of ResNet-50 with `bottleneck`; He et al., arXiv 1512.03385, with strides in the 3x3."""
    x = layers.max_pool(layers.relu(layers.norm(layers.conv(x, 64, 7, 2))), 3)
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        features = 4 * width if bottleneck else width
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            y = x
            if bottleneck:
                y = layers.relu(layers.norm(layers.conv(y, width, 1)))
                y = layers.relu(layers.norm(layers.conv(y, width, 3, stride)))
                y = layers.norm(layers.conv(y, features, 1))
            else:
                y = layers.relu(layers.norm(layers.conv(y, width, 3, stride)))
                y = layers.norm(layers.conv(y, width, 3))
            if block == 0 and (stage > 0 or bottleneck):
                x = layers.norm(layers.conv(x, features, 1, stride))
            x = layers.relu(x + y)
    return layers.dense(layers.mean(x), CLASSES)


def network_of(name: str) -> Callable[[Layers, Any], Any]:
    return {
        "vgg16": vgg16,
        "resnet34": lambda layers, x: resnet(layers, x, bottleneck=False),
        "resnet50": lambda layers, x: resnet(layers, x, bottleneck=True),
    }[name]


# ---------------------------------------------------------------------------------------------------------- competitors


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One competitor: takes a step and returns the loss before it; takes another step and returns where its time goes.

    `parts` gives shares of FWD, of BWI and BWW, and of the rest. `zeros` is None where nobody counted them.
    """

    step: Callable[[], float]
    parts: Callable[[], tuple[float, float, float]]
    parameters: int
    zeros: float | None = None


def flax_trainer(name: str, images: np.ndarray, labels: np.ndarray, competitor: str, trace: Path) -> Trainer:
    """Compiles the step of `OURS`, `SWAPPED` or `STOCK`. A profiled step leaves its trace in the directory `trace`."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    import sparsetrain_jax as st

    network, layer = network_of(name), st.SparseConv if competitor == SWAPPED else nn.Conv

    class FlaxLayers:
        def __init__(self, module: nn.Module) -> None:
            self._module, self._names = module, collections.Counter[str]()

        def _name(self, kind: str) -> str:
            self._names[kind] += 1
            return f"{kind}{self._names[kind]}"

        def conv(self, x: Any, features: int, kernel: int, stride: int = 1, bias: bool = False) -> Any:
            name, padding = self._name("conv"), [(kernel // 2,) * 2] * 2
            init = nn.initializers.he_normal()
            y = layer(features, (kernel,) * 2, stride, padding, use_bias=bias, kernel_init=init, name=name)(x)
            work = float(y.size * kernel**2 * x.shape[-1])
            self._module.sow("zeros", f"{name}_zeros", jnp.array([work, work * st.sparsity(x)]))
            return y

        def norm(self, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=False, momentum=0.9, name=self._name("norm"))(x)

        def relu(self, x: Any) -> Any:
            return nn.relu(x)

        def max_pool(self, x: Any, window: int) -> Any:
            return nn.max_pool(x, (window,) * 2, (2, 2), [(window // 2 * (window % 2),) * 2] * 2)

        def mean(self, x: Any) -> Any:
            return x.mean((1, 2))

        def flatten(self, x: Any) -> Any:
            return x.reshape(len(x), -1)

        def dense(self, x: Any, features: int) -> Any:
            return nn.Dense(features, kernel_init=nn.initializers.he_normal(), name=self._name("dense"))(x)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return network(FlaxLayers(self), x)

    model, optimizer = Network(), optax.sgd(1e-3, momentum=0.9)

    def loss_of(params: Any, statistics: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        logits, updates = model.apply(variables, images, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates.get("batch_stats", {})

    gradient = jax.value_and_grad(st.sparsify(loss_of) if competitor == OURS else loss_of, has_aux=True)

    def one_step(params: Any, statistics: Any, momentum: Any, images: Any, labels: Any) -> Any:
        (loss, statistics), gradients = gradient(params, statistics, images, labels)
        updates, momentum = optimizer.update(gradients, momentum, params)
        return optax.apply_updates(params, updates), statistics, momentum, loss

    batch = jnp.asarray(images), jnp.asarray(labels)
    variables = jax.jit(model.init)(jax.random.key(0), batch[0])
    state = [variables["params"], variables.get("batch_stats", {}), optimizer.init(variables["params"])]
    work, skipped = np.sum(jax.tree.leaves(variables["zeros"]), axis=0)
    compiled = jax.jit(one_step, donate_argnums=(0, 1, 2)).lower(*state, *batch).compile()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    del variables

    def step() -> float:
        *state[:], loss = compiled(*state, *batch)
        return float(loss)

    def parts() -> tuple[float, float, float]:
        with jax.profiler.trace(str(trace)):
            step()
        return parts_of_trace(trace, compiled.as_text() or "")

    return Trainer(step, parts, parameters, float(skipped / work))


def parts_of_trace(trace: Path, program: str) -> tuple[float, float, float]:
    """Shares of FWD, of BWI and BWW, and of the rest, in the newest trace below a directory.

    Events name instructions of the compiled `program`, whose metadata says which operation of the model they are of.
    XLA drops that of convolutions which it rewrites for BWI and BWW, and of the transposed copies for these: then the
    names of instructions tell.
    """
    from jax.profiler import ProfileData

    operations = dict(re.findall(r"%([\w.-]+) = [^\n]* metadata=\{op_name=\"([^\"]+)\"", program))
    totals = [0.0, 0.0, 0.0]
    newest = max(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if instruction is None:
                    continue
                operation = operations.get(str(instruction))
                if operation is None:
                    part = 1 if re.search("convolution|ynn|transpose|reverse", str(instruction)) else 2
                elif re.search("conv_general_dilated|sparse_conv_", operation):
                    part = 1 if "transpose(" in operation else 0
                else:
                    part = 2
                totals[part] += event.duration_ns
    fwd, backward, rest = (total / sum(totals) for total in totals)
    return fwd, backward, rest


def torch_trainer(name: str, images: np.ndarray, labels: np.ndarray) -> Trainer | None:
    """PyTorch's; None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    network, functional = network_of(name), torch.nn.functional

    class TorchLayers(torch.nn.Module):
        """Makes its modules on the first pass, by the shapes it sees, and takes them in the same order in the next."""

        def __init__(self) -> None:
            super().__init__()
            self.modules_made, self.taken = torch.nn.ModuleList(), 0

        def forward(self, x: Any) -> Any:
            self.taken = 0
            return network(self, x)

        def _next(self, make: Callable[[], Any]) -> Any:
            if self.taken == len(self.modules_made):
                self.modules_made.append(make().to(memory_format=torch.channels_last))
            self.taken += 1
            return self.modules_made[self.taken - 1]

        def conv(self, x: Any, features: int, kernel: int, stride: int = 1, bias: bool = False) -> Any:
            shape = (x.shape[1], features, kernel, stride, kernel // 2)
            return self._next(lambda: self._drawn(torch.nn.Conv2d(*shape, bias=bias)))(x)

        def dense(self, x: Any, features: int) -> Any:
            return self._next(lambda: self._drawn(torch.nn.Linear(x.shape[1], features)))(x)

        def _drawn(self, module: Any) -> Any:
            torch.nn.init.kaiming_normal_(module.weight)
            return module

        def norm(self, x: Any) -> Any:
            return self._next(lambda: torch.nn.BatchNorm2d(x.shape[1], momentum=0.1))(x)

        def relu(self, x: Any) -> Any:
            return functional.relu(x)

        def max_pool(self, x: Any, window: int) -> Any:
            return functional.max_pool2d(x, window, 2, window // 2 * (window % 2))

        def mean(self, x: Any) -> Any:
            return x.mean((2, 3))

        def flatten(self, x: Any) -> Any:
            return x.flatten(1)

    model = TorchLayers()
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def parts() -> tuple[float, float, float]:
        start = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
            whole = time.perf_counter() - start
        of = {event.key: event.cpu_time_total / 1e6 / whole for event in profile.key_averages()}
        fwd, backward = of.get("aten::convolution", 0.0), of.get("aten::convolution_backward", 0.0)
        return fwd, backward, 1 - fwd - backward

    return Trainer(step, parts, sum(p.numel() for p in model.parameters()))


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(arguments: argparse.Namespace) -> list[Step]:
    """Steps of all competitors on all asked networks, in this process. Call it in a child made by `common.run_child`.

    Raises:
      RuntimeError: our first loss differs from stock Flax's, or PyTorch's network has other parameters.
    """
    import jax
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    import sparsetrain_jax as st

    rng, steps = np.random.default_rng(0), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("starting", total=len(arguments.networks) * (4 + arguments.rounds + 1))
        for name in arguments.networks:
            images = rng.standard_normal((arguments.batch, arguments.size, arguments.size, 3), dtype=np.float32)
            labels = rng.integers(0, CLASSES, arguments.batch)
            trainers: dict[str, Trainer] = {}
            for competitor in (STOCK, SWAPPED, OURS, TORCH):
                progress.update(task, description=f"{name}: compiling {competitor}")
                trace = Path(arguments.trace or scratch) / f"{name}-{competitor}"
                if competitor != TORCH:
                    trainers[competitor] = flax_trainer(name, images, labels, competitor, trace)
                elif trainer := torch_trainer(name, images, labels):
                    trainers[competitor] = trainer
                progress.advance(task)
            check_parameters(trainers)
            check_losses({competitor: trainer.step() for competitor, trainer in trainers.items()})
            seconds: dict[str, list[float]] = {competitor: [] for competitor in trainers}
            losses: dict[str, float] = {}
            for index in range(arguments.rounds):
                progress.update(task, description=f"{name}: round {index + 1}")
                for competitor in rng.permutation(list(trainers)):
                    start = time.perf_counter()
                    losses[competitor] = trainers[competitor].step()
                    seconds[competitor].append(time.perf_counter() - start)
                progress.advance(task)
            progress.update(task, description=f"{name}: profiling")
            for competitor, trainer in trainers.items():
                times = np.array(seconds[competitor])
                milliseconds = 1e3 * float(np.median(times))
                fwd, backward, rest = trainer.parts()
                steps.append(
                    Step(
                        network=name,
                        competitor=competitor,
                        batch=arguments.batch,
                        size=arguments.size,
                        threads=arguments.threads,
                        isa=st.isa(),
                        zeros=trainers[STOCK].zeros or 0.0,
                        step_ms=milliseconds,
                        min_ms=1e3 * float(times.min()),
                        speed=float(np.median(np.array(seconds[STOCK]) / times)),
                        fwd_ms=milliseconds * fwd,
                        backward_ms=milliseconds * backward,
                        rest_ms=milliseconds * rest,
                        loss=losses[competitor],
                    )
                )
            progress.advance(task)
            del trainers, trainer
            jax.clear_caches()
    return steps


def check_parameters(trainers: dict[str, Trainer]) -> None:
    counts = {competitor: trainer.parameters for competitor, trainer in trainers.items()}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"the networks differ: {counts} parameters")


def check_losses(losses: dict[str, float]) -> None:
    """The first losses of the same Flax model, which differ by roundings alone."""
    for competitor in (OURS, SWAPPED):
        if not abs(losses[competitor] - losses[STOCK]) <= 1e-4 * abs(losses[STOCK]):
            raise RuntimeError(f"the first loss of {competitor} is {losses[competitor]}, stock Flax's {losses[STOCK]}")


# -------------------------------------------------------------------------------------------------------------- results


def print_steps(steps: list[Step], console: Console) -> None:
    first = steps[0]
    console.print(
        f"\nTraining steps, batch {first.batch}, {first.size}x{first.size} pixels; {first.isa}, {first.threads} threads"
    )
    table = Table()
    headings = ["network", "competitor", "ms a step", f"x {STOCK}", *(f"{part}, ms" for part in PARTS)]
    note = "Parts: of a profiled step, scaled to the median."
    if first.untuned_speed is not None:
        headings.append(f"x {STOCK}, untuned")
        note += " Untuned: default malloc and OpenMP settings."
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for index, step in enumerate(steps):
        last = index + 1 == len(steps) or steps[index + 1].network != step.network
        head = index == 0 or steps[index - 1].network != step.network
        cells = [
            f"{step.network} ({step.zeros:.0%} zeros)" if head else "",
            step.competitor,
            f"{step.step_ms:.0f}",
            common.colored_ratio(step.speed),
            *(f"{part:.0f}" for part in step.parts),
            common.colored_ratio(step.untuned_speed),
        ]
        style = "bold" if step.competitor == OURS else None
        table.add_row(*cells[: len(headings)], style=style, end_section=last)
    console.print(table)
    console.print(note)


def plot(steps: list[Step], path: str) -> None:
    """Stacked parts of a step of each competitor, a group of bars for each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(step.network for step in steps))
    competitors = list(dict.fromkeys(step.competitor for step in steps))
    figure, axis = plt.subplots(figsize=(2 + 2.6 * len(networks), 4.5))
    width = 0.8 / len(competitors)
    for step in steps:
        group, column = networks.index(step.network), competitors.index(step.competitor)
        x, bottom = group + (column - (len(competitors) - 1) / 2) * width, 0.0
        for part, height, alpha in zip(PARTS, step.parts, (1.0, 0.7, 0.35), strict=True):
            label = f"{step.competitor}: {part}" if group == 0 else None
            axis.bar(x, height, width * 0.9, bottom=bottom, color=f"C{column}", alpha=alpha, label=label)
            bottom += height
        axis.text(x, bottom, f"{step.speed:.2f}x", ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(networks)), networks)
    axis.set_ylabel("ms a step")
    axis.set_title(f"Training steps, batch {steps[0].batch}; labels: speed over {STOCK}", fontsize=9)
    axis.legend(fontsize=7, ncols=len(competitors), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = common.comma_list(common.one_of(*NETWORKS))
    parser.add_argument("--networks", type=networks, default=["resnet50"], metavar="A,B", help=", ".join(NETWORKS))
    parser.add_argument("--batch", type=common.positive(int), default=8)
    parser.add_argument("--size", type=common.positive(int), default=224, help="height and width of the images")
    parser.add_argument("--rounds", type=common.positive(int), default=5, help="timed steps of each")
    parser.add_argument("--no-untuned", action="store_true", help="skip the pass with default malloc settings")
    parser.add_argument("--trace", type=common.output_file, metavar="DIR", help="keep the profiler's traces there")
    parser.add_argument("--csv", type=common.output_file, metavar="FILE")
    common.add_process_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.size < 32:
        parser.error("--size: these networks halve an image five times, so at least 32")
    return arguments


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    if arguments.child:
        common.write_json(arguments.child, [dataclasses.asdict(step) for step in measure(arguments)])
        return
    console = common.console()
    common.limit_threads(__file__, arguments.threads)

    def run(tuned: bool) -> list[Step]:
        return [Step(**step) for step in common.run_child(__file__, argv, tuned=tuned, threads=arguments.threads)]

    steps = run(tuned=True)
    if not arguments.no_untuned:
        for step, untuned in zip(steps, run(tuned=False), strict=True):
            step.untuned_step_ms, step.untuned_speed = untuned.step_ms, untuned.speed
    print_steps(steps, console)
    common.print_missing_onednn(console)
    if arguments.csv:
        common.write_csv(arguments.csv, steps)
    if arguments.plot:
        plot(steps, arguments.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
