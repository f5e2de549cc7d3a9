r"""Proximal operators: `prox(x, step_size) -> x`, on trees of parameters.

.. math::
  \operatorname{prox}_{\tau r}(y) = \operatorname*{argmin}_x \tfrac{1}{2\tau} \|x - y\|_2^2 + r(x)

Each function here makes a `Prox` for one penalty :math:`r`. Its docstring says what this minimum is. A `Prox` also knows
the value of its penalty, for reporting an objective. Most know their residual :math:`y - \operatorname{prox}(y)` too,
without the cancellation of a subtraction.

Leaves may have any floating-point dtype (the arithmetic is float32 at least) and may be empty; `None` and
`optax.MaskedNode` are passed over. Strengths may be traced. Operators are differentiable, in their strengths too,
wherever the function itself is. An entry that is NaN shows in all that depends on it, its group or its row, and nowhere
else.

===========================================  ==============================================================
what shall be zero, or small                 penalty
===========================================  ==============================================================
single entries                               `l1`, `elastic_net`, `mcp` (large entries stay unbiased)
rows, columns, channels, whole leaves        `group_l1`, `l2`
singular values                              `nuclear_norm`
jumps                                        `total_variation`
the distance to a set                        `box`, `non_negative`, `binary`, `from_projection`
everything a little                          `l2_squared`
===========================================  ==============================================================

`masked` applies one to some leaves, `sampled` is a mean of many of which each step draws a few, and `polish` finishes
parameters with one last operator.
"""

from signopt.prox.composed import from_projection as from_projection
from signopt.prox.composed import masked as masked
from signopt.prox.entrywise import binary as binary
from signopt.prox.entrywise import box as box
from signopt.prox.entrywise import elastic_net as elastic_net
from signopt.prox.entrywise import l1 as l1
from signopt.prox.entrywise import l2_squared as l2_squared
from signopt.prox.entrywise import mcp as mcp
from signopt.prox.entrywise import non_negative as non_negative
from signopt.prox.entrywise import zero as zero
from signopt.prox.penalty import Prox as Prox
from signopt.prox.sampling import sampled as sampled
from signopt.prox.step import polish as polish
from signopt.prox.structured import group_l1 as group_l1
from signopt.prox.structured import l2 as l2
from signopt.prox.structured import nuclear_norm as nuclear_norm
from signopt.prox.structured import total_variation as total_variation
