"""What a user sees of the package, and what it takes from JAX's inside."""

import importlib
import pathlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import signopt
from signopt import _compat

DESIGN = {
    "scale_by_sign", "scale_by_signum", "scale_by_prox_gradient", "finite_only", "majority_vote", "mean", "robust_mean",
    "low_rank_mean", "adaptive_majority_vote", "gossip_mean", "local_steps", "local_params", "prox_step", "signsgd", "signum", "lion",
    "signprox", "mh_signsgd", "sign_muon", "ef_signsgd", "ef_signum", "onebit_adam", "workers", "codecs", "wire", "prox",
    "diagnostics", "theory", "adversary", "precision", "border", "measured_smoothness",
}  # fmt: skip


def test_completion_shows_the_api_and_nothing_else():
    assert {name for name in dir(signopt) if not name.startswith("_")} == DESIGN == set(signopt.__all__)
    assert all(hasattr(signopt, name) for name in signopt.__all__)


def test_no_module_has_the_name_of_a_function_beside_it():
    packages = [signopt, *(m for m in vars(signopt).values() if hasattr(m, "__path__"))]
    for package in packages:
        modules = {name for _, name, _ in pkgutil.iter_modules(package.__path__) if not name.startswith("_")}
        for name in modules & set(dir(package)):
            found = getattr(package, name)
            assert found is sys.modules[f"{package.__name__}.{name}"], f"{package.__name__}.{name}"


def test_the_library_needs_jax_optax_and_jaxtyping_only():
    program = (
        "import sys, signopt; found = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(found & {'flax', 'orbax', 'sklearn', 'matplotlib', 'rich', 'scipy.stats', 'chex', 'equinox'}))"
    )
    root = pathlib.Path(signopt.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert set(eval(out.stdout)) <= {"chex"}  # which optax may import


def test_every_module_starts_with_what_it_is_for():
    for module in pkgutil.walk_packages(signopt.__path__, "signopt."):
        if not module.name.endswith("__main__"):
            assert importlib.import_module(module.name).__doc__, module.name


# ---- JAX's inside: these fail loudly when JAX changes -----------------------------------------------------------------


def test_what_waits_for_others_keeps_its_type_its_batch_and_its_derivative(devices):
    mesh = jax.make_mesh((8,), ("w",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    seen = []

    def body(x, shared):
        found = _compat.after_all((x, shared))
        seen.append([_compat.varying(y) for y in found])
        return found

    found = jax.shard_map(body, mesh=mesh, in_specs=(jax.P("w"), jax.P()), out_specs=(jax.P("w"), jax.P()))
    x, shared = jax.jit(found)(jnp.arange(8.0), jnp.float32(3.0))
    assert (x.tolist(), float(shared)) == ([*range(8)], 3.0)
    assert seen[0] == [{"w"}, frozenset()]
    assert jax.vmap(_compat.after_all, ((0, None),), (0, None))((jnp.arange(2.0), 3.0))[1] == 3
    assert jax.grad(lambda x: _compat.after_all((x**2, x))[0])(3.0) == 6
    assert "optimization_barrier" in jax.jit(_compat.after_all).lower((1.0, 2.0)).as_text()


def test_a_gather_over_a_vmapped_axis_is_unbatched():
    found = jax.vmap(lambda x: _compat.gather_vmapped(x[None], "w"), out_axes=None, axis_name="w")(jnp.arange(3.0))
    assert found.tolist() == [0, 1, 2]


def test_types_say_what_varies():
    mesh = jax.make_mesh((1,), ("w",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def body(x, y):
        seen.append((_compat.varying(x), _compat.varying(y)))
        return x

    jax.shard_map(body, mesh=mesh, in_specs=(jax.P("w"), jax.P()), out_specs=jax.P("w"))(jnp.ones(1), jnp.ones(1))
    assert seen == [(frozenset({"w"}), frozenset())]


def test_vmap_says_when_workers_differ():
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        jax.vmap(lambda x: x, out_axes=None)(jnp.ones(2))
    assert _compat.says_that_workers_differ(caught.value)
    assert not _compat.says_that_workers_differ(ValueError("another"))


def test_bound_axes_are_known_by_name():
    seen = []
    jax.vmap(lambda x: seen.extend(_compat.bound_names()) or x, axis_name="w")(jnp.ones(2))
    assert "w" in seen
