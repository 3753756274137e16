"""Memory that stays with the process between calls."""

from __future__ import annotations

import jax
import pytest
from test_native import python

import sparsetrain_jax as st

# Prints what keep_memory returned, and page faults of a third call over the pages of its temporaries.
FAULTS = """
import resource
import jax, jax.numpy as jnp
import sparsetrain_jax as st

kept = st.keep_memory()
x, a, b = jnp.ones((8192, 8)), jnp.ones((8, 4096)), jnp.ones((4096, 1))
step = jax.jit(lambda x, a, b: (x @ a) @ b)
pages = step.lower(x, a, b).compile().memory_analysis().temp_size_in_bytes / resource.getpagesize()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x, a, b).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults / pages)
"""


def test_kept_memory_is_not_mapped_again_by_the_next_call() -> None:
    kept, share = python(FAULTS, GLIBC_TUNABLES="").stdout.split()
    if kept == "False":
        pytest.skip("not glibc's malloc")
    assert float(share) < 0.1


def test_keeping_memory_too_late_is_an_error() -> None:
    jax.devices()
    with pytest.raises(RuntimeError, match="before JAX computes"):
        st.keep_memory()
