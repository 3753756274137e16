"""How many zeros there are: measuring, recording over a training run, plotting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["plot_sparsity", "sparsity", "tap_gradient"]


def sparsity(x: Any, axis: int | Sequence[int] | None = None) -> jax.Array:
    """Fraction of the elements of ``x`` that are zero, from 0 to 1, in float32.

    Args:
      x: an array of any shape and dtype.
      axis: the axis or axes to count over; None counts over all. ``axis=(0, 1, 2)`` of an ``NHWC`` array gives the
        fraction per channel.

    Returns:
      The fractions, of the shape of ``x`` without ``axis``; NaN where there is nothing to count.
    """
    return jnp.mean(jnp.asarray(x) == 0, axis=axis, dtype=jnp.float32)


@jax.custom_vjp
def tap_gradient(y: jax.Array, probe: jax.Array) -> jax.Array:
    """``y``; the gradient for ``probe``, a scalar that nothing depends on, is the sparsity of the gradient for ``y``.

    This is how a layer tells the zeros of a gradient that passes through it: differentiate for the probe too.
    """
    return y


def _tap_fwd(y: jax.Array, probe: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, probe


def _tap_bwd(probe: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, sparsity(g).astype(probe.dtype)


tap_gradient.defvjp(_tap_fwd, _tap_bwd)


def plot_sparsity(records: Mapping[str, Sequence[float]] | Sequence[Mapping[str, Any]], *, ax: Any = None) -> Any:
    """Draw the sparsity of layers over training steps.

    Args:
      records: either ``{layer: [sparsity at step 0, 1, ...]}`` or one ``{layer: sparsity}`` per step (in which nested
        dictionaries are joined with "/").
      ax: a matplotlib ``Axes`` to draw into; a new figure if None.

    Returns:
      The ``Axes``.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if there are no records.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_sparsity needs matplotlib: pip install matplotlib") from error
    series: dict[str, list[tuple[int, float]]] = {}
    if isinstance(records, Mapping):
        for layer, values in records.items():
            series[layer] = [(step, float(value)) for step, value in enumerate(values)]
    else:
        for step, record in enumerate(records):
            for path, value in jax.tree_util.tree_leaves_with_path(record):
                layer = "/".join(
                    str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
                )
                series.setdefault(layer, []).append((step, float(jnp.mean(value))))
    if not series:
        raise ValueError(f"records must hold the sparsity of at least one layer, got {records!r}")
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    for layer, points in series.items():
        steps, values = zip(*points, strict=True) if points else ((), ())
        ax.plot(steps, [100 * v for v in values], label=layer)
    ax.set(xlabel="step", ylabel="zeros (%)", ylim=(0, 100))
    ax.legend(fontsize="small")
    return ax
