"""Fixtures: every instruction set that this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sparsetrain_jax import native

# Read once: sub-processes of tests start from the same.
BEST_ISA = os.environ.get("SPARSETRAIN_ISA") or native.available_isas()[0]


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the kernels of each available instruction set, and restore the one before."""
    before = native.isa()
    native.set_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.set_isa(before)
