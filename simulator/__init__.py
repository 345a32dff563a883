"""Prices a task graph on a machine profile and runs it as a discrete-event simulation with contention."""

from simulator.analysis import carried_cycle, critical_path, lower_bound, resource_time
from simulator.costs import TaskCost, layer_launch_ns, layer_ns, price
from simulator.engine import DeadlockError, simulate, trace
from simulator.footprint import footprint
from simulator.predict import predict
from simulator.resources import capacities, sharing
from simulator.verify import VerificationError, verify
from slideplan.machine.sharing import Resource, fair_speeds

__all__ = [
    "DeadlockError",
    "Resource",
    "TaskCost",
    "VerificationError",
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
    "verify",
]
