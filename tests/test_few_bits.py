"""What every codec sends, by its formula, in a program, and on a network card; and what a scale costs in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.common import compressed
from experiments.speed.bits import devices as in_one_process
from experiments.speed.bits import sent
import signopt
from signopt import codecs
import slow_links

M, SIZE = 4, 40_000
WORDS = 1000  # bits: every array of a message is filled up to a whole word


REASON = slow_links.reason_not_to()


@pytest.mark.parametrize("name", compressed.NAMES)
def test_what_a_program_sends_is_what_the_formula_of_its_codec_says(name):
    way = compressed.way(name, "worker", M)
    traced = 8 * signopt.wire.bytes_sent(jnp.zeros(SIZE), M, way.border)
    assert way.bits(SIZE) == pytest.approx(traced, rel=2e-3, abs=WORDS)


@pytest.mark.parametrize("name", [compressed.BASELINE, "scaled_sign"])
def test_the_compiled_program_sends_it_too(name, devices):
    mesh = jax.make_mesh((M,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:M])
    way = compressed.way(name, "worker", M)
    state = way.border.init(jnp.zeros(SIZE))
    specs = signopt.workers.partition_specs(state, "worker")
    step = jax.shard_map(
        lambda x, state: way.border.update(x[0], state),
        mesh=mesh,
        in_specs=(jax.P("worker"), specs),
        out_specs=(jax.P(), specs),
        check_vma=False,
    )
    text = jax.jit(step).lower(jnp.zeros((M, SIZE)), state).compile().as_text()
    assert compressed.bits_in(text, M) == pytest.approx(way.bits(SIZE), rel=2e-3, abs=WORDS)
    with pytest.raises(ValueError, match="collectives only, got collective-permute"):
        compressed.bits_in("%a = u8[8] collective-permute(%x)", M)


@pytest.mark.slow
@pytest.mark.skipif(bool(REASON), reason=REASON or "links can be made")
def test_the_network_card_counts_it_too():
    config = sent.Config(ways=("float32 mean", "scaled_sign"), hosts=2, parameters=2**20)
    found = list(sent.run(config))
    assert [record["way"] for record in found] == list(config.ways)
    assert all(sent.spread(record) < sent.LIMIT for record in found)


def test_a_memory_of_scaled_signs_takes_no_second_copy_of_the_parameters(devices):
    """On CPUs XLA writes down what has more than fifteen readers, and adds in place where shapes are equal."""
    del devices
    size = 2**18
    for block in (None, 256):
        codec = codecs.scaled_sign(block=block)
        border = signopt.mean("worker", uplink=codec, downlink=codec, num_workers=8)
        state = border.init(jnp.zeros(size))
        mesh = jax.make_mesh((8,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = signopt.workers.partition_specs(state, "worker")
        step = jax.shard_map(
            lambda x, state, border=border: border.update(x[0], state),
            mesh=mesh,
            in_specs=(jax.P("worker"), specs),
            out_specs=(jax.P(), specs),
            check_vma=False,
        )
        own = jax.NamedSharding(mesh, jax.P("worker"))
        held = jax.device_put(jnp.zeros((8, size)), own), signopt.workers.place(state, mesh, specs)
        compiled = jax.jit(step, donate_argnums=1).lower(*held).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 4 * size


def test_a_round_in_one_process_is_timed():
    config = dataclasses.replace(
        in_one_process.Config(), ways=("float32 mean", "scaled_sign"), parameters=1000, workers=2, rounds=2
    )
    found = list(in_one_process.run(config))
    assert [len(record["seconds"]) for record in found] == [2, 2]
