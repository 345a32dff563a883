"""Prices a task graph on a machine profile and runs it as a discrete-event simulation with contention."""

from slideplan.plan.sharing import Resource, fair_speeds
from slideplan.simulator.analysis import carried_cycle, critical_path, lower_bound, resource_time
from slideplan.simulator.costs import TaskCost, layer_launch_ns, layer_ns, price
from slideplan.simulator.engine import DeadlockError, simulate, trace
from slideplan.simulator.footprint import footprint
from slideplan.simulator.predict import predict
from slideplan.simulator.resources import capacities, sharing

__all__ = [
    "DeadlockError",
    "Resource",
    "TaskCost",
    "capacities",
    "carried_cycle",
    "critical_path",
    "fair_speeds",
    "footprint",
    "layer_launch_ns",
    "layer_ns",
    "lower_bound",
    "predict",
    "price",
    "resource_time",
    "sharing",
    "simulate",
    "trace",
]
