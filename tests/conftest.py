"""Eight host devices for every test, made before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the tests' time is compilation, and LLVM's part of it a fifth of theirs.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
# Twice as many threads as devices: with fewer, jax 0.10 can deadlock in a plain training loop.
os.environ["NPROC"] = "16"

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile("signopt", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("signopt")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Otherwise a run of all tests holds several gigabytes of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def devices():
    found = jax.devices()
    assert len(found) >= 8, "JAX was imported before tests/conftest.py could ask for 8 devices."
    return found[:8]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
