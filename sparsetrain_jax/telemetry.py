"""How many zeros there are: measuring, recording over a training run, plotting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from . import _compat

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


def tap_gradient(y: jax.Array, probe: jax.Array) -> jax.Array:
    """``y``; the gradient for ``probe``, a scalar that nothing depends on, is the sparsity of the gradient for ``y``.

    This is how a layer tells the zeros of a gradient that passes through it: differentiate for the probe too. Under
    ``vmap`` over ``probe`` each element has its own; otherwise elements are counted together.
    """
    return _tap_p.bind(*_compat.auto_match(y, probe))


# A primitive rather than a custom_vjp, which would take forward mode away. The probe's dimensions, none to begin with,
# are the leading ones of y.
_tap_p = _compat.standard_primitive(
    "tap_gradient", lambda y, probe: y.shape, lambda y, probe: y.dtype, lambda y, probe: y.sharding
)
mlir.register_lowering(_tap_p, lambda ctx, y, probe: [y])


def _tap_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    out, (tangent, of_probe) = tap_gradient(*primals), tangents
    if type(of_probe) is ad.Zero:
        return out, tangent
    return out, tap_gradient(ad.instantiate_zeros(tangent), of_probe)


def _tap_transpose(ct: Any, y: Any, probe: Any) -> tuple[Any, Any]:
    if type(ct) is ad.Zero:
        return None, None
    counted = probe.aval if ad.is_undefined_primal(probe) else probe
    zeros = sparsity(ct, tuple(range(counted.ndim, ct.ndim))).astype(counted.dtype)
    return (ct if ad.is_undefined_primal(y) else None), (zeros if ad.is_undefined_primal(probe) else None)


def _tap_batch(args: Sequence[Any], dims: Sequence[Any]) -> tuple[Any, int]:
    (y, probe), (dim, of_probe) = args, dims
    if of_probe is None:
        return tap_gradient(jnp.moveaxis(y, dim, probe.ndim), probe), probe.ndim
    probe = jnp.moveaxis(probe, of_probe, 0)
    y = jnp.broadcast_to(y, (len(probe), *y.shape)) if dim is None else jnp.moveaxis(y, dim, 0)
    return tap_gradient(y, probe), 0


ad.primitive_jvps[_tap_p] = _tap_jvp
ad.primitive_transposes[_tap_p] = _tap_transpose
batching.primitive_batchers[_tap_p] = _tap_batch


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
