"""Workers: a gradient that is one worker's own, state that belongs to one worker, and what runs a step for all of them."""

from signopt.workers._layout import place as place
from signopt.workers._shared import shared as shared
from signopt.workers.check import assert_alike as assert_alike
from signopt.workers.check import assert_in_sync as assert_in_sync
from signopt.workers.gradient import split_batch as split_batch
from signopt.workers.gradient import value_and_grad as value_and_grad
from signopt.workers.modules import nnx_value_and_grad as nnx_value_and_grad
from signopt.workers.partial_sums import unreduced as unreduced
from signopt.workers.plain_jit import in_jit as in_jit
from signopt.workers.run import on_mesh as on_mesh
from signopt.workers.run import simulate as simulate
from signopt.workers.shards import on_shards as on_shards
from signopt.workers.state import PerWorkerState as PerWorkerState
from signopt.workers.state import partition_specs as partition_specs
from signopt.workers.state import per_worker as per_worker
from signopt.workers.state import resize as resize
from signopt.workers.survivors import elastic as elastic
from signopt.workers.zeroth_order import zeroth_order_gradient as zeroth_order_gradient
