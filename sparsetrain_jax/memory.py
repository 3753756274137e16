"""Memory between training steps."""

from __future__ import annotations

import ctypes

from . import _compat

__all__ = ["keep_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_memory() -> bool:
    """Make malloc keep freed memory for the next training step. Call it once, before JAX computes anything.

    XLA:CPU takes the temporaries of a compiled function from malloc, anew in each call and on a thread of its own. By
    default glibc gives such blocks back to the kernel, which clears each of their pages again in the next step: 1.1 GB
    and a third of a training step of ResNet-50 at batch 8, whatever runs its convolutions. Afterwards all threads share
    one heap that only grows, to the process's peak and up to twice that where blocks of different sizes leave gaps.
    ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` in the environment gains most of the same with no such growth, where the
    kernel has transparent huge pages.

    Returns:
      Whether the C library could be told: False where it is not glibc.

    Raises:
      RuntimeError: JAX has computed already, so XLA's threads have heaps of their own.
    """
    if _compat.backends_started():
        raise RuntimeError("keep_memory must be called before JAX computes anything: XLA's threads have their heaps")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    options = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    taken = [mallopt(option, value) == 1 for option, value in options]
    return all(taken)
