"""signopt: JAX training over slow links.

Optax transformations whose workers agree by one bit per parameter or less. A chain has one border, and only there anything
travels::

   on every worker, different        |               the border                |   on every worker, the same
   gradient > momentum > ... --------+--> encode --> decide --> decode --------+--> weight decay > -learning rate > ...
   per-worker state                  |  memory: what was not sent is not lost  |    shared state

`signopt.border` says how borders work, and which there are.
"""

from signopt import adversary as adversary
from signopt import border as border
from signopt import codecs as codecs
from signopt import diagnostics as diagnostics
from signopt import precision as precision
from signopt import prox as prox
from signopt import theory as theory
from signopt import wire as wire
from signopt import workers as workers
from signopt.alias import lion as lion
from signopt.alias import mh_signsgd as mh_signsgd
from signopt.alias import signprox as signprox
from signopt.alias import signsgd as signsgd
from signopt.alias import signum as signum
from signopt.feedback import ef_signsgd as ef_signsgd
from signopt.feedback import ef_signum as ef_signum
from signopt.feedback import onebit_adam as onebit_adam
from signopt.gossip import gossip_mean as gossip_mean
from signopt.local import local_params as local_params
from signopt.local import local_steps as local_steps
from signopt.low_rank import low_rank_mean as low_rank_mean
from signopt.matrices import sign_muon as sign_muon
from signopt.means import mean as mean
from signopt.means import robust_mean as robust_mean
from signopt.momentum import finite_only as finite_only
from signopt.momentum import scale_by_sign as scale_by_sign
from signopt.momentum import scale_by_signum as scale_by_signum
from signopt.prox.step import prox_step as prox_step
from signopt.prox.step import scale_by_prox_gradient as scale_by_prox_gradient
from signopt.step_size import adaptive_majority_vote as adaptive_majority_vote
from signopt.step_size import measured_smoothness as measured_smoothness
from signopt.vote import majority_vote as majority_vote

__version__ = "0.1.0"
__all__ = [
    # left of the border
    "finite_only",
    "scale_by_prox_gradient",
    "scale_by_sign",
    "scale_by_signum",
    # the border
    "adaptive_majority_vote",
    "low_rank_mean",
    "majority_vote",
    "mean",
    "measured_smoothness",
    "robust_mean",
    # how often
    "gossip_mean",
    "local_params",
    "local_steps",
    # right of the border
    "prox_step",
    # ready optimizers
    "ef_signsgd",
    "ef_signum",
    "lion",
    "mh_signsgd",
    "onebit_adam",
    "sign_muon",
    "signprox",
    "signsgd",
    "signum",
    # modules
    "adversary",
    "border",
    "codecs",
    "diagnostics",
    "precision",
    "prox",
    "theory",
    "wire",
    "workers",
]


def __dir__() -> list[str]:
    """The API, and nothing else."""
    return sorted([*__all__, "__all__", "__doc__", "__name__", "__path__", "__spec__", "__version__"])
