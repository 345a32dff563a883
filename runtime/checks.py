"""What can be refused before a run takes memory: the request, the machine."""

from __future__ import annotations

from pathlib import Path

import torch

from runtime.checkpoints.manifest import Saving
from runtime.lanes.backend import Backend
from runtime.machine import identity
from slideplan.graph.tasks import tier_bytes
from slideplan.hf_config import model_from_config
from slideplan.machine.host import available_host_bytes
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.quantities import format_bytes
from slideplan.saving import LEAST_STAGING_BYTES

# Beside its slots a run takes tokens, libraries and a part of a parameter in fp32 on its way into them.
MARGIN_BYTES = 1 << 30


def check_plan(plan: Plan, where: str) -> None:
    """Raise ValueError for a plan that cannot be executed, or is not what it says."""
    if plan.policy.other is not None:
        raise ValueError(
            f"{where}: policy.other is {plan.policy.other.name}: the plan describes how another system works, and "
            "can be priced but not executed; run a plan of `planner simulate`"
        )
    plan.check(where)


def check_numbers(steps: int, warmup_steps: int, seed: int) -> None:
    """Raise ValueError for a number that no run can have."""
    if steps < 1:
        raise ValueError(f"--steps is {steps}, must be at least 1")
    if warmup_steps < 0:
        raise ValueError(f"--warmup is {warmup_steps}, must be zero or more")
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"--seed is {seed}, must be in 0..{(1 << 31) - 1}")


def check_model(planned: ModelSpec, weights: Path, seq_len: int, option: str) -> None:
    """Raise ValueError where the folder's config describes another model than the planned one, for such sequences.

    option: by which the folder was named, for the message
    """
    found = model_from_config(weights)
    differing = [
        f"{name} is {getattr(found, name)}, planned {getattr(planned, name)}"
        for name in planned.__struct_fields__
        if name != "name"
        and getattr(found, name) != getattr(planned, name)
        # Up to how many positions a model is offered changes nothing below them: scaled frequencies are read without it.
        and not (name == "max_positions" and seq_len <= found.max_positions)
    ]
    if differing:
        raise ValueError(
            f"{option}{weights}: is not the model that was planned ({planned.name}): {'; '.join(differing)}; "
            f"plan for it with `planner simulate --model {weights}`"
        )


def check_machine(plan: Plan, backend: Backend, where: str) -> None:
    """Raise ValueError where the plan was made for another machine or does not fit in what is free."""
    differences = plan.machine.identity.differences(identity(backend))
    if differences:
        raise ValueError(
            f"{where}: was made for machine {plan.machine.name}, this one differs (planned, here): {'; '.join(differences)}; "
            "measure this machine with `planner profile` and plan again"
        )
    if plan.policy.kernels == "graphed" and backend.name == "cpu":
        raise ValueError(f'{where}: policy.kernels is "graphed": nothing can be captured on a CPU; plan with --kernels fused')
    free = {Tier.HOST: _free_host_bytes(plan)}
    if backend.name == "cuda":
        free[Tier.GPU] = torch.cuda.mem_get_info(backend.device)[0]
    for tier, available in free.items():
        need = _need_bytes(plan, tier)
        if need > available:
            raise ValueError(
                f"{where}: needs {format_bytes(need)} of {tier} memory, {format_bytes(max(0, available))} are free: lacks "
                f"{format_bytes(need - available)}; free some, or plan with a smaller --{tier}-memory"
            )


def staging_bytes(plan: Plan, saving: Saving | None) -> int:
    """Of the ring through which state is saved and read: as planned where training goes on meanwhile and so much is free."""
    if saving is None or not (saving.every or saving.weights_every):
        return LEAST_STAGING_BYTES
    cost = plan.prediction.save
    assert cost is not None, "plans that are executed have one"
    return min(cost.staging_bytes, max(LEAST_STAGING_BYTES, _free_host_bytes(plan) - _need_bytes(plan, Tier.HOST)))


def _free_host_bytes(plan: Plan) -> int:
    """What the host's slots may take; on the "cpu" backend the device's memory is RAM too."""
    on_cpu = plan.machine.identity.backend == "cpu"
    return available_host_bytes() - (tier_bytes(plan.graph.pools, Tier.GPU) if on_cpu else 0)


def _need_bytes(plan: Plan, tier: Tier) -> int:
    return tier_bytes(plan.graph.pools, tier) + (MARGIN_BYTES if tier is Tier.HOST else 0)
