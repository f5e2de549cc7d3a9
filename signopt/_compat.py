"""What this library takes from JAX's inside, in one place.

None of this is promised by JAX. `tests/test_compat.py` fails when it changes.
"""

from collections.abc import Hashable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import unsafe_get_axis_names_DO_NOT_USE  # pyright: ignore[reportPrivateImportUsage]
from jax.interpreters import ad
from jax.interpreters import batching
from jax.interpreters import mlir


def gather_vmapped(x: jax.Array, name: Hashable) -> jax.Array:
    """Everybody's `x`, joined along its first axis, over one vmapped axis. The result is unbatched.

    The primitive, because under `check_vma` the functions of `lax` assert that an axis is one of the mesh.
    """
    return lax.all_gather_p.bind(
        x,
        all_gather_dimension=0,
        axis_name=(name,),
        axis_index_groups=None,
        axis_size=lax.axis_size(name),
        tiled=True,
    )


def varying(x: Any) -> frozenset:
    """The device axes along which the type of `x` says that it varies."""
    return jax.typeof(x).manual_axis_type.varying


def varying_type(aval: Any) -> frozenset:
    """The same for a type, as a variable of a program has one."""
    return aval.manual_axis_type.varying


def acts(eqn: Any) -> bool:
    """Whether an equation of a program does something beside computing its results, such as printing."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def says_that_workers_differ(error: ValueError) -> bool:
    """Whether `jax.vmap` refused to return a value once for all workers because they have different ones."""
    return "out_axes is None" in str(error) or "axis spec None" in str(error)


def bound_names() -> list[Hashable]:
    """The axes that a collective could name where this is traced. It goes into errors only."""
    return unsafe_get_axis_names_DO_NOT_USE()


def after_all(tree: Any) -> Any:
    """The same tree; the compiler lets nothing read a leaf before all leaves are there.

    `lax.optimization_barrier`, except that each leaf keeps its type: in jax 0.10 that one makes what workers share vary.
    """
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, _after_all_p.bind(*leaves))


_after_all_p = Primitive("after_all")
_after_all_p.multiple_results = True
_after_all_p.def_impl(lambda *args: lax.optimization_barrier(args))
_after_all_p.def_abstract_eval(lambda *args: args)
mlir.register_lowering(_after_all_p, mlir.lower_fun(lambda *args: lax.optimization_barrier(args), True))
batching.primitive_batchers[_after_all_p] = lambda args, dims: (_after_all_p.bind(*args), dims)
ad.primitive_jvps[_after_all_p] = lambda primals, tangents: (_after_all_p.bind(*primals), tangents)
