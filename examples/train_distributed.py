"""Trains a ReLU CNN with SparseConv on scikit-learn's digits, data-parallel over several processes and hosts.

    python examples/train_distributed.py --local 2                             # two processes on this machine
    python examples/train_distributed.py --coordinator host0:9876 --num-processes 2 --process-id 0     # on host0
    python examples/train_distributed.py --coordinator host0:9876 --num-processes 2 --process-id 1     # on host1

Every process computes its part of each batch; `jax.distributed` connects them, and `jit` over a mesh of all devices
sums the gradients with XLA's CPU collectives (gloo). With `--checkpoints DIR`, which all hosts must share, orbax saves
every `--save-every` steps, and the same command resumes where the last checkpoint was made, with the bits of a run that
was never interrupted, if each process has one CPU (as with `--local 2` on two): with more threads XLA:CPU itself does
not always repeat its bits (https://github.com/jax-ml/jax/issues/39741). SIGTERM to any process saves a checkpoint and
ends the run in order.

A run that loses a process ends with an error within a minute: a closed connection fails the collective that waits on it
at once, and a silent one (a host without power, a stopped process) is found by the heartbeats of `jax.distributed`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

import sparsetrain_jax as st

# Seconds. JAX's own are 100 and 300. The first two and the collectives' own limit (30 in gloo) keep every way of losing
# a process under a minute.
HEARTBEAT_TIMEOUT = 20
SHUTDOWN_TIMEOUT = 20
JOIN_TIMEOUT = 50
SETTINGS = ("batch", "learning_rate", "seed", "steps", "widths")


class DigitNet(nn.Module):
    """3x3 convolutions with ReLU, a 2x2 max-pool between each and the next, and a dense layer: 10 logits.

    Attributes:
      widths: output features of each convolution.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images x [N, 16, 16, 1]."""
        for index, width in enumerate(self.widths):
            if index:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            # Every input but the first is a ReLU's output: its gradient where it is zero is thrown away.
            x = st.SparseConv(
                width,
                (3, 3),
                kernel_init=nn.initializers.he_normal(),
                relu_input=index > 0,
                sow_sparsity=True,
                name=f"conv{index + 1}",
            )(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class Data:
    """The digits in host memory, and global arrays of them, of which each process makes the part that it computes.

    Attributes:
      images: [1437, 16, 16, 1] float32 in [0, 1]. labels: [1437] int32. test_images, test_labels: the 360 others.
    """

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.images))
        images = np.repeat(np.repeat(digits.images / 16, 2, axis=1), 2, axis=2).astype(np.float32)[order, ..., None]
        labels = digits.target.astype(np.int32)[order]
        held_out = -(-len(images) // 5)
        self.test_images, self.images = images[:held_out], images[held_out:]
        self.test_labels, self.labels = labels[:held_out], labels[held_out:]
        self.seed = seed

    def batch(self, step: int, size: int, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
        """Images and labels of a step, sharded. A function of seed and step alone: nothing to save for a resume."""
        epoch, place = divmod(step, len(self.images) // size)
        chosen = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))[place * size :][:size]

        def make(array: np.ndarray) -> jax.Array:
            shape = (size, *array.shape[1:])
            return jax.make_array_from_callback(shape, sharding, lambda index: array[chosen][index])

        return make(self.images), make(self.labels)


def make_step(
    model: DigitNet, optimizer: optax.GradientTransformation, replicated: NamedSharding
) -> Callable[..., Any]:
    """(state, images, labels) -> (state, loss): one step of training, compiled for all processes."""

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        # The mean is over the batch of all processes, so jit puts the sum over processes where it belongs.
        value, gradient = jax.value_and_grad(loss)(state["params"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}, value

    return jax.jit(step, out_shardings=(replicated, replicated), donate_argnums=0)


def make_manager(directory: str | None) -> ocp.CheckpointManager | None:
    if directory is None:
        return None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(3), cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def restore(manager: ocp.CheckpointManager, step: int, like: Any, settings: dict[str, Any]) -> Any:
    """The state saved after `step`, on the devices of `like`. Ends the program if it is that of another training."""
    saved = manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))["settings"]
    if saved != settings:
        raise SystemExit(
            f"error: --checkpoints {manager.directory} has checkpoints of a run with {saved}, not {settings}"
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)))
    return manager.restore(step, args=args)["state"]


def train(arguments: argparse.Namespace, console: Console) -> None:
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    data = Data(arguments.seed)
    model = DigitNet(tuple(arguments.widths))
    optimizer = optax.sgd(optax.cosine_decay_schedule(arguments.learning_rate, arguments.steps), momentum=0.9)

    def initialize() -> Any:
        params = model.init(jax.random.key(arguments.seed), jnp.zeros((1, *data.images.shape[1:])))["params"]
        return {"params": params, "optimizer": optimizer.init(params)}

    # Runs once: optimising its random numbers would take seconds.
    unoptimized = {"xla_backend_optimization_level": 0}
    state = jax.jit(initialize, out_shardings=replicated, compiler_options=unoptimized)()
    first = 0
    manager = make_manager(arguments.checkpoints)
    if manager is not None and (latest := manager.latest_step()) is not None:
        state, first = restore(manager, latest, state, settings), latest
        console.print(f"Resumed after step {first}, from {manager.directory}.")
    step = make_step(model, optimizer, replicated)

    losses: dict[int, float] = {}
    seconds = []
    preempted = False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console, disable=jax.process_index() != 0) as progress:
        description = f"training on {jax.process_count()} processes"
        task = progress.add_task(description, total=arguments.steps, completed=first, loss=float("nan"))
        for done in range(first + 1, arguments.steps + 1):
            start = time.perf_counter()
            state, loss = step(state, *data.batch(done - 1, arguments.batch, sharded))
            losses[done] = float(loss)
            seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, loss=losses[done])
            if manager is not None:
                # SIGTERM to one process reaches all of them through `jax.distributed`, before the same step.
                preempted = done < arguments.steps and manager.reached_preemption(done)
                if preempted or done % arguments.save_every == 0 or done == arguments.steps:
                    args = ocp.args.Composite(state=ocp.args.StandardSave(state), settings=ocp.args.JsonSave(settings))
                    manager.save(done, args=args, force=True)
                if preempted:
                    break
    if manager is not None:
        manager.close()  # Waits for the last checkpoint.
    if jax.process_index() == 0 and arguments.losses:
        Path(arguments.losses).write_text(json.dumps(losses))
    if preempted:
        console.print(f"Ended by SIGTERM after step {done}, with a checkpoint. The same command resumes.")
        return

    @jax.jit
    def evaluate(params: Any, images: jax.Array, labels: jax.Array) -> Any:
        logits, sown = model.apply({"params": params}, images, mutable=["intermediates"])
        return jnp.mean(logits.argmax(-1) == labels), sown["intermediates"]

    accuracy, zeros = jax.device_get(evaluate(state["params"], data.test_images, data.test_labels))
    if jax.process_index() == 0:
        report(arguments, losses, seconds, float(accuracy), zeros, console)


def report(
    arguments: argparse.Namespace,
    losses: dict[int, float],
    seconds: list[float],
    accuracy: float,
    zeros: dict[str, Any],
    console: Console,
) -> None:
    layers = Table(title="Zeros in the input, after training", title_justify="left")
    for heading in ("layer", "features", "zeros"):
        layers.add_column(heading, justify="left" if heading == "layer" else "right")
    for index, width in enumerate(arguments.widths):
        name = f"conv{index + 1}"
        layers.add_row(name, str(width), f"{float(zeros[name]['input_sparsity'][0]):.0%}")
    console.print(layers)
    table = Table(title=f"Data-parallel training ({st.isa()} kernels)", title_justify="left")
    for heading in ("processes", "images a step", "ms a step (median)", "images/s", "last loss", "test accuracy"):
        table.add_column(heading, justify="right")
    median = float(np.median(seconds)) if seconds else float("nan")
    table.add_row(
        str(jax.process_count()),
        f"{arguments.batch} = {jax.process_count()} x {arguments.batch // jax.process_count()}",
        f"{1e3 * median:.1f}",
        f"{arguments.batch / median:.0f}",
        f"{losses[max(losses)]:.4f}" if losses else "-",
        f"{accuracy:.1%}",
    )
    console.print(table)


def run_process(arguments: argparse.Namespace) -> int:
    """One process of the run: joins, trains, leaves."""
    name = f"process {arguments.process_id} of {arguments.num_processes}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The oldest JAX that is supported has no limit of its own for leaving: there the heartbeats find who does not.
    limited = "shutdown_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
    limit: dict[str, Any] = {"shutdown_timeout_seconds": SHUTDOWN_TIMEOUT} if limited else {}
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=arguments.join_timeout,
        heartbeat_timeout_seconds=arguments.heartbeat_timeout,
        **limit,
    )
    try:
        train(arguments, Console(quiet=arguments.process_id != 0))
        jax.distributed.shutdown()
    except Exception as error:
        console = Console(stderr=True)
        if isinstance(error, jax.errors.JaxRuntimeError):
            console.print(f"{error}", markup=False, highlight=False, soft_wrap=True)
        else:
            console.print_exception()
        resume = " The same command on every host resumes from the last checkpoint." if arguments.checkpoints else ""
        console.print(
            f"error: {name} cannot go on; if it lost another process, that one's output says why.{resume}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.stdout.flush()
        # Without the handlers that wait for the others at exit: this closes our connections, which ends them.
        os._exit(1)
    return 0


def run_local(processes: int) -> int:
    """Starts the processes on loopback, each on its share of the CPUs; returns 0 if all of them did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    cpus = sorted(os.sched_getaffinity(0))
    children = []
    for index in range(processes):
        os.sched_setaffinity(0, cpus[index::processes] or cpus)
        place = ("--coordinator", coordinator, "--num-processes", str(processes), "--process-id", str(index))
        children.append(subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *place]))
    os.sched_setaffinity(0, cpus)
    # One is enough: it tells the others.
    signal.signal(signal.SIGTERM, lambda *_: children[0].terminate())
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.kill()
        Console().show_cursor()  # A process that was ended in its progress bar leaves it hidden.
    for index, code in enumerate(codes):
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print(f"error: process {index} of {processes} {how}", file=sys.stderr)
    return int(any(codes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=2, metavar="N", help="N processes here, without --coordinator")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, a free port that all hosts reach")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int, help="0 ... num-processes - 1; 0 shows the progress")
    parser.add_argument("--steps", type=int, default=440)
    parser.add_argument("--batch", type=int, default=32, help="images a step, of all processes together")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 64], help="features of the convolutions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", metavar="DIR", help="save here and resume from here; shared by all hosts")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--losses", metavar="FILE", help="write the loss of each step as JSON")
    parser.add_argument("--heartbeat-timeout", type=int, default=HEARTBEAT_TIMEOUT, metavar="SECONDS")
    parser.add_argument(
        "--join-timeout", type=int, default=JOIN_TIMEOUT, metavar="SECONDS", help="to wait for all processes to start"
    )
    arguments = parser.parse_args()
    processes = arguments.num_processes if arguments.coordinator else arguments.local
    if arguments.coordinator and (processes is None or arguments.process_id is None):
        parser.error("--coordinator needs --num-processes and --process-id")
    if processes < 1 or (arguments.coordinator and not 0 <= arguments.process_id < processes):
        parser.error("there must be at least 1 process, and --process-id be between 0 and --num-processes - 1")
    if not 1 <= arguments.batch <= 1024 or arguments.batch % processes:
        parser.error(
            f"--batch is {arguments.batch}; it must be between 1 and 1024 and divisible by {processes} processes"
        )
    if arguments.steps < 1 or arguments.save_every < 1:
        parser.error("--steps and --save-every must be at least 1")
    if not 1 <= len(arguments.widths) <= 4 or min(arguments.widths) < 1:
        parser.error("--widths takes 1 to 4 numbers of features, each at least 1")
    return run_process(arguments) if arguments.coordinator else run_local(processes)


if __name__ == "__main__":
    raise SystemExit(main())
