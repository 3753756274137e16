"""The compiled module: loading it, registering its FFI targets with XLA, and choosing the instruction set.

``SPARSETRAIN_ISA`` is read when this module is first imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

try:
    from . import _native
except ImportError as error:
    raise ImportError(
        "sparsetrain_jax: the compiled module sparsetrain_jax._native cannot be loaded "
        f"({error}). Build it by installing the package: pip install ."
    ) from error

__all__ = ["TARGETS", "available_isas", "counters", "custom_calls", "isa", "plan", "reset_counters", "set_isa"]

_registrations = _native.registrations()

#: Names of the FFI targets that the compiled module offers; together with their attributes a versioned interface.
TARGETS = frozenset(_registrations)

for _name, _handler in _registrations.items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu", api_version=1)


def custom_calls() -> list[str]:
    """Names of our custom calls, as ``jax.export`` wants them: a versioned interface, attributes included.

    ``jax.export.export(f, disabled_checks=[DisabledSafetyCheck.custom_call(name) for name in st.custom_calls()])``
    """
    return sorted(TARGETS)


def isa() -> str:
    """The instruction set whose kernels run: ``"avx512_vbmi2"``, ``"avx512"``, ``"avx2"`` or ``"portable"``."""
    return _native.isa()


def available_isas() -> list[str]:
    """The instruction sets that this machine and its operating system can run, the best first."""
    return list(_native.available_isas())


def set_isa(name: str) -> None:
    """Make the kernels of instruction set ``name`` run from now on, in every thread. For tests.

    Raises:
      ValueError: if ``name`` is unknown or this machine cannot run it.
    """
    _native.set_isa(name)


def counters() -> dict[str, int]:
    """How often each path ran since :func:`reset_counters`: ``{"conv_fwd/sparse": 3, ...}``. For tests."""
    return dict(_native.counters())


def reset_counters() -> None:
    """Set every counter to 0."""
    _native.reset_counters()


def plan(
    component: str,
    dims: Sequence[int],
    geometry: Sequence[int],
    density: float = 0.5,
    fmas: int | None = None,
    threads: int = 1,
) -> dict[str, int | float | str]:
    """What the handler of ``component`` would do: blocking, loop order, the densities at which it changes kernels.

    Args:
      component: ``"fwd"``, ``"bwd_input"``, ``"bwd_weights"``, ``"bwd_input_masked"`` or ``"bwd_both"``: the last
        two at once.
      dims: sizes [N, H, W, C, K, R, S], all positive.
      geometry: :attr:`~sparsetrain_jax.shapes.ConvSpec.geometry`.
      density: fraction of non-zeros of the operand whose zeros are skipped; for the weights, and with a mask, of lhs.
      fmas: 512-bit multiply-adds a cycle, 1 or 2, of the machine to plan for. ``None``: those of this machine.
      threads: that share the call, for the weights and with a mask; they change how work is cut, never a sum.
    """
    plan = _native.plan(component, list(dims), list(geometry), density, fmas, threads)
    return {key: _number(value) for key, value in plan.items()}


def _number(text: int | float | str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def _apply_environment() -> None:
    requested = os.environ.get("SPARSETRAIN_ISA", "")
    if not requested:
        return
    try:
        _native.set_isa(requested)
    except ValueError as error:
        raise ValueError(
            f"SPARSETRAIN_ISA must be, on this machine, one of {', '.join(map(repr, available_isas()))}; "
            f"got {requested!r}"
        ) from error


_apply_environment()
