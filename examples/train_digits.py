"""Trains a ReLU CNN on scikit-learn's digits with SparseConv and, from the same seed, with stock nn.Conv beside it.

    python examples/train_digits.py [--norm batch] [--no-compare] [--epochs 6] [--plot train_digits.png]

1797 real images, scaled up to 32x32, a fifth of them held out. The two models take their steps in turn, so the time per
step is compared side by side; the loss curves must lie on each other, because skipping a zero changes nothing but the
order of a sum. Prints the sparsity of each layer, time per step and accuracy, and draws all of it into a PNG.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

import sparsetrain_jax as st

Batch = tuple[jax.Array, jax.Array]
WIDTHS = (32, 32, 64, 64, 128, 128)
COMPARED_STEPS = 50
TOLERANCE = 1e-4


class DigitNet(nn.Module):
    """Three blocks of two 3x3 convolutions and a max-pool, then a dense layer that starts at zero: 10 logits.

    Attributes:
      conv: the convolution layer: `st.SparseConv` or `nn.Conv`. Swapping the class is all it takes.
      norm: "none" or "batch".
    """

    conv: Callable[..., nn.Module]
    norm: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images x [N, 32, 32, 1]."""
        for index, width in enumerate(WIDTHS, start=1):
            name = f"conv{index}"
            # What the kernels check: the layer's input and, through the perturbation, the gradient of its output.
            self.sow("intermediates", f"{name}_input", st.sparsity(x))
            x = self.conv(
                width, (3, 3), use_bias=self.norm == "none", kernel_init=nn.initializers.he_normal(), name=name
            )(x)
            x = self.perturb(f"{name}_output", x)
            if self.norm == "batch":
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
            if index % 2 == 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10, kernel_init=nn.initializers.zeros)(x.reshape(len(x), -1))


def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Trainer:
    """One model in training: compiled step, state, and what it recorded.

    Attributes:
      losses: loss of each batch before its step. seconds: time of each step. accuracy: of the last batch.
    """

    def __init__(self, model: DigitNet, optimizer: optax.GradientTransformation, example: Batch, seed: int) -> None:
        self.model = model
        variables = jax.jit(lambda key: model.init(key, example[0], train=False))(jax.random.key(seed))
        self.params = variables["params"]
        self.statistics = variables.get("batch_stats", {})
        self.optimizer_state = optimizer.init(self.params)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy = 0.0

        def step(params: Any, statistics: Any, state: Any, batch: Batch) -> Any:
            def loss(params: Any) -> Any:
                variables = {"params": params, "batch_stats": statistics}
                logits, updates = model.apply(variables, batch[0], train=True, mutable=["batch_stats"])
                return loss_of(logits, batch[1]), (logits, updates.get("batch_stats", {}))

            (value, (logits, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state, params)
            accuracy = jnp.mean(logits.argmax(-1) == batch[1])
            return optax.apply_updates(params, updates), statistics, state, value, accuracy

        arguments = (self.params, self.statistics, self.optimizer_state, example)
        self._step = jax.jit(step).lower(*arguments).compile()

        def probe(params: Any, statistics: Any, batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            variables = {"params": params, "batch_stats": statistics}
            shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch[0], train=False))["perturbations"]
            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

            def loss(perturbations: Any) -> Any:
                everything = {**variables, "perturbations": perturbations}
                logits, sown = model.apply(everything, batch[0], train=True, mutable=["intermediates", "batch_stats"])
                return loss_of(logits, batch[1]), sown["intermediates"]

            gradients, inputs = jax.grad(loss, has_aux=True)(zeros)
            return {name: value[0] for name, value in inputs.items()}, jax.tree.map(st.sparsity, gradients)

        self._probe = jax.jit(probe)
        self._logits = jax.jit(
            lambda params, statistics, x: model.apply({"params": params, "batch_stats": statistics}, x, train=False)
        )

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        outputs = self._step(self.params, self.statistics, self.optimizer_state, batch)
        jax.block_until_ready(outputs)
        self.seconds.append(time.perf_counter() - start)
        self.params, self.statistics, self.optimizer_state, loss, accuracy = outputs
        self.losses.append(float(loss))
        self.accuracy = float(accuracy)

    def sparsities(self, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
        """Fractions of zeros by layer: in its input, in the gradient of its output."""
        inputs, gradients = jax.device_get(self._probe(self.params, self.statistics, batch))
        return (
            {name.removesuffix("_input"): float(value) for name, value in inputs.items()},
            {name.removesuffix("_output"): float(value) for name, value in gradients.items()},
        )

    def test_accuracy(self, x: jax.Array, labels: jax.Array) -> float:
        return float(jnp.mean(self._logits(self.params, self.statistics, x).argmax(-1) == labels))


def load(seed: int) -> tuple[Batch, Batch]:
    """(train, test): images [N, 32, 32, 1] in [0, 1] and labels [N], shuffled with `seed` and split 4:1."""
    digits = load_digits()
    images = jnp.asarray(digits.images / 16, jnp.float32)[..., None]
    images = jax.image.resize(images, (len(images), 32, 32, 1), "bilinear")
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    labels = jnp.asarray(digits.target)
    return (images[train], labels[train]), (images[test], labels[test])


def batches(data: Batch, size: int, epochs: int, seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data[0]))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield data[0][chosen], data[1][chosen]


@dataclasses.dataclass
class Run:
    """What a run recorded; `stock` is None with --no-compare. Sparsities: (step, {layer: fraction})."""

    sparse: Trainer
    stock: Trainer | None
    inputs: list[tuple[int, dict[str, float]]]
    gradients: list[tuple[int, dict[str, float]]]

    @property
    def disagreement(self) -> float:
        """Largest relative difference of the two losses over the first steps."""
        if self.stock is None:
            return 0.0
        pairs = zip(self.sparse.losses[:COMPARED_STEPS], self.stock.losses[:COMPARED_STEPS], strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)


def train(arguments: argparse.Namespace, data: Batch, console: Console) -> Run:
    steps = len(data[0]) // arguments.batch * arguments.epochs
    # A slow start and a large epsilon: otherwise the early steps of a deep ReLU network amplify a difference in the
    # last bit of one sum a millionfold, whatever computed it, and two runs could not be told to agree.
    warmup = min(COMPARED_STEPS, steps // 2)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, arguments.learning_rate / 10, warmup),
            optax.cosine_onecycle_schedule(steps - warmup, arguments.learning_rate, div_factor=10),
        ],
        [warmup],
    )
    optimizer = optax.adam(schedule, b2=0.99, eps=1e-4)
    example = (data[0][: arguments.batch], data[1][: arguments.batch])
    with console.status("compiling"):
        sparse = Trainer(DigitNet(st.SparseConv, arguments.norm), optimizer, example, arguments.seed)
        stock = (
            Trainer(DigitNet(nn.Conv, arguments.norm), optimizer, example, arguments.seed)
            if arguments.compare
            else None
        )
        run = Run(sparse, stock, [], [])
        run.sparse.sparsities(example)
    text = "{task.fields[loss]}  accuracy {task.fields[accuracy]:4.0%}  zeros {task.fields[zeros]:3.0%}"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn(text),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss="", accuracy=0.0, zeros=0.0)
        zeros = 0.0
        for index, batch in enumerate(batches(data, arguments.batch, arguments.epochs, arguments.seed)):
            if index % 5 == 0:
                inputs, gradients = sparse.sparsities(batch)
                run.inputs.append((index, inputs))
                run.gradients.append((index, gradients))
                zeros = float(np.mean([*inputs.values()]))
            # In turn, and in alternating order, so that neither is always the one with warm caches.
            for trainer in filter(None, (sparse, stock) if index % 2 else (stock, sparse)):
                trainer.step(batch)
            loss = f"loss {sparse.losses[-1]:.4f}" + (f" (nn.Conv {stock.losses[-1]:.4f})" if stock else "")
            progress.update(task, advance=1, loss=loss, accuracy=sparse.accuracy, zeros=zeros)
    return run


def mean_of(records: list[tuple[int, dict[str, float]]], layer: str) -> float:
    return float(np.mean([values[layer] for _, values in records]))


def report(run: Run, test: Batch, console: Console) -> None:
    layers = Table(title="Zeros: mean over training (first -> last)", title_justify="left")
    for heading in ("layer", "features", "input", "gradient of the output"):
        layers.add_column(heading, justify="left" if heading == "layer" else "right")
    for index, width in enumerate(WIDTHS, start=1):
        name = f"conv{index}"
        cells = [
            f"{mean_of(records, name):.0%} ({records[0][1][name]:.0%} -> {records[-1][1][name]:.0%})"
            for records in (run.inputs, run.gradients)
        ]
        layers.add_row(name, str(width), *cells)
    console.print(layers)

    results = Table(title=f"Training ({st.isa()} kernels)", title_justify="left")
    for heading in ("convolution", "ms a step (median)", "speed", "last loss", "test accuracy"):
        results.add_column(heading, justify="left" if heading == "convolution" else "right")
    reference = np.array((run.stock or run.sparse).seconds)
    for name, trainer in (("SparseConv", run.sparse), ("nn.Conv", run.stock)):
        if trainer:
            speed = float(np.median(reference / np.array(trainer.seconds)))
            accuracy = trainer.test_accuracy(*test)
            milliseconds = 1e3 * float(np.median(trainer.seconds))
            results.add_row(
                name, f"{milliseconds:.0f}", f"{speed:.2f}x", f"{trainer.losses[-1]:.4f}", f"{accuracy:.1%}"
            )
    console.print(results)
    if run.stock:
        verdict = "agree" if run.disagreement <= TOLERANCE else "[red]DISAGREE[/red]"
        console.print(
            f"Losses of the first {COMPARED_STEPS} steps {verdict}: at most {run.disagreement:.1e} apart (relative)."
        )


def plot(run: Run, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, zeros, seconds) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    losses.plot(run.sparse.losses, linewidth=3, alpha=0.5, label="SparseConv")
    if run.stock:
        losses.plot(run.stock.losses, "k--", linewidth=1, label="nn.Conv")
    losses.set(title="loss", xlabel="step", yscale="log")
    losses.legend()
    for index in range(len(WIDTHS)):
        name = f"conv{index + 1}"
        for records, style in ((run.inputs, "-"), (run.gradients, ":")):
            steps, values = zip(*((step, 100 * fractions[name]) for step, fractions in records), strict=True)
            zeros.plot(steps, values, style, color=f"C{index}", label=name if style == "-" else None)
    zeros.set(
        title="zeros in a layer's input (line) and output gradient (dots)", xlabel="step", ylabel="%", ylim=(0, 100)
    )
    zeros.legend(fontsize=8, ncols=2)
    for name, trainer in (("SparseConv", run.sparse), ("nn.Conv", run.stock)):
        if trainer:
            milliseconds = 1e3 * np.array(trainer.seconds)
            label = f"{name}: median {np.median(milliseconds):.0f} ms"
            seconds.plot(milliseconds, ".", markersize=4, label=label)
    seconds.set(title="time per step", xlabel="step", ylabel="ms")
    seconds.set_ylim(bottom=0)
    seconds.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("none", "batch"), default="none")
    parser.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, default=True, help="train nn.Conv beside it"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="train_digits.png", metavar="FILE")
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.batch) < 1:
        parser.error("--epochs and --batch must be positive")
    if not Path(arguments.plot).resolve().parent.is_dir():
        parser.error(f"--plot: {Path(arguments.plot).parent} is not a directory")
    console = Console()
    training, test = load(arguments.seed)
    if arguments.epochs < 1 or not 1 <= arguments.batch <= len(training[0]):
        parser.error(f"--epochs must be at least 1 and --batch between 1 and {len(training[0])}")
    run = train(arguments, training, console)
    report(run, test, console)
    plot(run, arguments.plot)
    console.print(f"Curves: {arguments.plot}")
    return 0 if run.disagreement <= TOLERANCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
