"""From policy to task graph, in small passes.

1. compute order   `order.compute_order`   units x micro-batches, vertical
2. transfers       `order.with_transfers`  loads, offloads, fetches, updates where they are issued; and
                   `order.with_host_weights`, reads and writes of the weights that lie on the SSD
3. pools           `pools.PoolLayout`      every buffer a pool
4. slots           `slots.tasks_of`        every action its slots, by the recipes of its operation
5. edges           `edges.derive`          dependencies, carried ones too, from slot accesses
"""

from __future__ import annotations

from slideplan.footprint import Footprint
from slideplan.graph.tasks import TaskGraph
from slideplan.lowering.edges import derive
from slideplan.lowering.order import compute_order, visits, window_slots, with_host_weights, with_transfers
from slideplan.lowering.pools import PoolLayout
from slideplan.lowering.slots import tasks_of
from slideplan.model import ModelSpec
from slideplan.policy import Policy, Workload


def lower(model: ModelSpec, policy: Policy, workload: Workload, footprint: Footprint) -> TaskGraph:
    """The task graph of one training step.

    Raises ValueError, naming the knob, for a policy that does not fit model and workload.
    """
    policy.check(model, workload)
    order = compute_order(model, policy)
    windows = window_slots(model, policy, visits(order))
    layout = PoolLayout(model, policy, workload, footprint)
    actions = with_host_weights(policy, with_transfers(model, policy, order, windows))
    tasks = tasks_of(layout, actions, windows)
    graph = TaskGraph(pools=tuple(layout.pools.values()), tasks=tuple(tasks))
    return TaskGraph(pools=graph.pools, tasks=derive(graph))
