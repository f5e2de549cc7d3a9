"""Eight host devices for every test, made before JAX is imported."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Twice as many threads as devices: with fewer, jax 0.10 can deadlock in a plain training loop.
os.environ["NPROC"] = "16"

import hypothesis
import jax
import numpy as np
import pytest

hypothesis.settings.register_profile("signopt", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("signopt")


# Most of the tests' time is compilation, and a third of that is LLVM's optimization. What promises bits is tested as XLA
# compiles it for users; these files promise a statistic, a limit or a number to some digits, and do without.
UNOPTIMIZED = {
    "test_adversary", "test_alias", "test_cost", "test_diagnostics", "test_docs", "test_estimators",
    "test_experiments", "test_fuzz", "test_geometry", "test_headroom", "test_loops", "test_neighbours", "test_pages",
    "test_prox", "test_rates", "test_recipes", "test_signprox", "test_step_size", "test_theory", "test_vote_cost",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _optimization_level(request):
    """Compile the programs of a file as users do, or quickly; and forget them: all together are several gigabytes."""
    jax.config.update("jax_disable_most_optimizations", request.path.stem in UNOPTIMIZED)
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
