"""How the tests themselves are compiled."""

import os
import pathlib

import jax
from jax._src import compiler
import pytest

import conftest

FOLDER = pathlib.Path(__file__).parent


def level():
    """What XLA is told about a program that is compiled now."""
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    return options.executable_build_options.debug_options.xla_backend_optimization_level


def test_no_module_that_is_collected_changes_the_environment():
    """What tests start inherits it: one module that set `XLA_FLAGS` gave every process of a whole run one device."""
    assert os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=8")
    assert os.environ["NPROC"] == "16"


def test_what_promises_bits_is_compiled_as_users_compile_it():
    promising = ("bits", "checkpoints", "conformance", "momentum", "precision", "processes", "runners", "shards")
    promising += ("stacked", "state", "sync", "timings", "vote", "workers")
    assert not {f"test_{name}" for name in promising} & conftest.UNOPTIMIZED
    assert level() > 0  # of this file, which is not there either


def test_the_switch_of_the_other_files_reaches_the_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert level() == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", sorted(conftest.UNOPTIMIZED))
def test_a_file_that_is_compiled_quickly_exists(name):
    assert (FOLDER / f"{name}.py").exists()
