r"""Does a model like signs? What to measure, and what it means.

Signs throw magnitudes away. That costs much where a few coordinates carry the gradient. It costs little where the gradient
is dense, all of about one size, compared with its noise and with the curvature. The density of a vector v of d entries,

.. math::
  \phi(v) = \frac{\|v\|_1^2}{d \, \|v\|_2^2} \in \Big[\frac1d, 1\Big],

of the gradient g, of its standard deviation :math:`\sigma` and of the curvature L says which is the case: see `geometry`
and `regime`. Everything here is a pure function of trees. `optax.snapshot("density", density)` records inside a chain, and
`majority_vote(..., report=True)` keeps what servers see of a vote.
"""

from signopt.diagnostics.curvature import hessian_diagonal as hessian_diagonal
from signopt.diagnostics.densities import density as density
from signopt.diagnostics.moments import Moments as Moments
from signopt.diagnostics.moments import deviation as deviation
from signopt.diagnostics.moments import gradient_moments as gradient_moments
from signopt.diagnostics.moments import init_moments as init_moments
from signopt.diagnostics.moments import share_above as share_above
from signopt.diagnostics.moments import sign_error_probability as sign_error_probability
from signopt.diagnostics.moments import signal_to_noise as signal_to_noise
from signopt.diagnostics.moments import update_moments as update_moments
from signopt.diagnostics.moments import variance as variance
from signopt.diagnostics.regimes import MUCH_MORE as MUCH_MORE
from signopt.diagnostics.regimes import Geometry as Geometry
from signopt.diagnostics.regimes import explain as explain
from signopt.diagnostics.regimes import geometry as geometry
from signopt.diagnostics.regimes import regime as regime
from signopt.diagnostics.votes import VoteStatistics as VoteStatistics
from signopt.diagnostics.votes import vote_statistics as vote_statistics
from signopt.diagnostics.votes import warn_if_unanimous as warn_if_unanimous
