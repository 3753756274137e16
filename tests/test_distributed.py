"""examples/train_distributed.py: several processes on loopback train like one, resume exactly and never hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("rich")
ocp = pytest.importorskip("orbax.checkpoint")

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_distributed.py"
WIDTHS = (4, 8)
BATCH = 32
STEPS = 60
SAVE_EVERY = 20
SETTINGS = (
    "--widths",
    *map(str, WIDTHS),
    "--learning-rate",
    "0.005",
    "--batch",
    str(BATCH),
    "--save-every",
    str(SAVE_EVERY),
)
MINUTE = 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def environment(directory: Path) -> dict[str, str]:
    """Runs share what they compile, and get loopback whatever proxy this machine has."""
    return {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }


def launch(environment: dict[str, str], processes: int, output: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a run one by one, as on so many hosts of one CPU; each writes to `output`.<index>.

    With more than one thread, XLA:CPU itself does not always repeat its bits (github.com/jax-ml/jax/issues/39741).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--num-processes", str(processes))
    started = []
    cpus = sorted(os.sched_getaffinity(0))
    try:
        for index in range(processes):
            os.sched_setaffinity(0, {cpus[index % len(cpus)]})  # which a process inherits
            command = [sys.executable, str(EXAMPLE), *place, "--process-id", str(index), *SETTINGS, *arguments]
            with output.with_suffix(f".{index}").open("w") as file:
                started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    finally:
        os.sched_setaffinity(0, cpus)
    return started


def complete(environment: dict[str, str], processes: int, output: Path, *arguments: str) -> dict[int, float]:
    """A run to its end: loss by step."""
    losses = output.with_suffix(".json")
    started = launch(environment, processes, output, "--losses", str(losses), *arguments)
    codes = [process.wait(300) for process in started]
    assert not any(codes), [output.with_suffix(f".{index}").read_text() for index in range(processes)]
    return {int(step): loss for step, loss in json.loads(losses.read_text()).items()}


def await_checkpoint(checkpoints: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    limit = time.monotonic() + 120
    while not (checkpoints / str(SAVE_EVERY)).exists():
        assert time.monotonic() < limit and all(process.poll() is None for process in processes), "no checkpoint"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], directory: Path) -> dict[int, float]:
    """Losses of two processes that nothing interrupts; saves to "whole"."""
    arguments = ("--steps", str(STEPS), "--checkpoints", str(directory / "whole"))
    return complete(environment, 2, directory / "whole_run", *arguments)


def saved(directory: Path, step: int) -> list[np.ndarray]:
    """The leaves of a checkpoint, read without the example's help."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = ocp.args.StandardRestore(fallback_sharding=here)
    state = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(directory / str(step) / "state", args=args)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


class Pair:
    """Two processes of a run that have saved their first checkpoint."""

    def __init__(self, environment: dict[str, str], checkpoints: Path, *arguments: str) -> None:
        output = checkpoints.with_name(f"{checkpoints.name}_run")
        self.outputs = [output.with_suffix(f".{index}") for index in range(2)]
        self.processes = launch(environment, 2, output, "--checkpoints", str(checkpoints), *arguments)
        try:
            await_checkpoint(checkpoints, self.processes)
        except AssertionError:
            self.end()
            pytest.fail(self.said())

    def said(self) -> str:
        return "\n".join(output.read_text() for output in self.outputs)

    def lose(self, victim: int, how: signal.Signals) -> tuple[int, str]:
        """Exit code and output of the other process."""
        self.processes[victim].send_signal(how)
        return self.wait(1 - victim, MINUTE)

    def wait(self, survivor: int, seconds: float) -> tuple[int, str]:
        try:
            code = self.processes[survivor].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end within a minute:\n{self.said()}")
        return code, self.outputs[survivor].read_text()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(environment: dict[str, str], directory: Path) -> Iterator[Any]:
    pairs: list[Pair] = []

    def make(name: str, *arguments: str) -> Pair:
        pairs.append(Pair(environment, directory / name, *arguments))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.end()


def test_two_processes_get_the_losses_of_one_with_the_whole_batch(
    environment: dict[str, str], directory: Path, whole: dict[int, float]
) -> None:
    alone = complete(environment, 1, directory / "alone", "--steps", str(STEPS))
    assert list(alone) == list(whole) == list(range(1, STEPS + 1))
    # Only the order of sums over the batch differs. The longest, of the first kernel's gradient, has batch x 16 x 16
    # terms; roundings of random sign differ by about the root of that many units, four times that for the tail. Such
    # an error of the gradients moves the loss by that fraction of what training itself does to it, and what training
    # did in all is at most the largest loss.
    # The learning rate is low, so that training does not amplify what it is given.
    terms = BATCH * 16 * 16
    tolerance = 4 * terms**0.5 * 2.0**-24 * max(alone.values())
    np.testing.assert_allclose(list(whole.values()), list(alone.values()), rtol=0, atol=tolerance)
    # The comparison can fail: training does over ten times more than that in any ten steps.
    tenth = np.array(list(alone.values()))[::10]
    assert np.abs(np.diff(tenth)).min() > 10 * tolerance


def test_a_run_that_lost_a_process_says_so_and_resumes_to_the_same_bits(
    environment: dict[str, str], directory: Path, whole: dict[int, float], start: Any
) -> None:
    checkpoints = directory / "killed"
    # The first checkpoint of many steps is there long before the last, so the signal meets a run in training.
    pair = start("killed", "--steps", str(STEPS))
    code, output = pair.lose(1, signal.SIGKILL)
    pair.end()
    assert code == 1, output
    assert "error: process 0 of 2 cannot go on" in output
    assert "Gloo" in output or "coordination service" in output, output

    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert SAVE_EVERY <= last < STEPS
    resumed = complete(environment, 2, directory / "resumed", "--steps", str(STEPS), "--checkpoints", str(checkpoints))
    assert resumed == {step: loss for step, loss in whole.items() if step > last}
    for got, want in zip(saved(checkpoints, STEPS), saved(directory / "whole", STEPS), strict=True):
        np.testing.assert_array_equal(got, want)


def test_however_a_process_is_lost_the_other_ends_within_a_minute(start: Any) -> None:
    # Stopped, its connections stay open, as those of a host without power. Meanwhile another pair loses process 0,
    # which is the one that tells of losses.
    silent = start("silent", "--steps", "100000")
    silent.processes[1].send_signal(signal.SIGSTOP)
    limit = time.monotonic() + MINUTE
    led = start("led", "--steps", "100000")
    ends = {1: led.lose(0, signal.SIGKILL), 0: silent.wait(0, max(0.0, limit - time.monotonic()))}
    for survivor, (code, output) in ends.items():
        assert code, output
        assert "another task died" in output or f"error: process {survivor} of 2 cannot go on" in output, output


def test_sigterm_saves_and_ends_all_processes_in_order(environment: dict[str, str], directory: Path) -> None:
    checkpoints = directory / "terminated"
    command = [sys.executable, str(EXAMPLE), "--local", "2", "--steps", "100000", "--checkpoints", str(checkpoints)]
    run = subprocess.Popen([*command, *SETTINGS], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        await_checkpoint(checkpoints, [run])
        run.terminate()
        output, _ = run.communicate(timeout=MINUTE)
    finally:
        run.kill()
    assert run.returncode == 0, output
    last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert f"Ended by SIGTERM after step {last}" in output


def test_a_checkpoint_of_another_training_is_refused(
    environment: dict[str, str], directory: Path, whole: dict[int, float]
) -> None:
    arguments = ("--checkpoints", str(directory / "whole"), "--steps", str(STEPS + 1))
    (process,) = launch(environment, 1, directory / "refused", *arguments)
    assert process.wait(300)
    assert "has checkpoints of a run with" in (directory / "refused.0").read_text()
