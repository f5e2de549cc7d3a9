"""1-bit data-parallel training for JAX: sign-based optimizers and the vote that carries them.

::

   on every worker, different                  | the only traffic |   on every worker, the same
   gradient > momentum > (+ residual) > sign --+-- majority vote -+--> weight decay > -learning rate > prox > parameters
              per-worker state                 |  1 bit / param   |    shared state
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
