"""Plans made by hand and plain in-memory training, for tests of the runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from builders import SSD, tiny_machine, tiny_save
from runtime.inputs.data import TokenWindows
from runtime.inputs.weights import RandomWeights, WeightSource
from runtime.lanes.backend import Backend
from runtime.lanes.threads import optimizer_share
from runtime.machine import identity
from runtime.memory.buffers import parameter_views
from runtime.memory.drive import Drive
from runtime.memory.parts import Part
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.optimizer.host_lossy import blank_state
from runtime.optimizer.lossy import update_lossy
from runtime.optimizer.rounding import Draws
from runtime.optimizer.split_master import join, split
from runtime.session import Session
from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.codec import digest
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.graph.replay import replay
from slideplan.hf_config import config_of
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.model import ModelSpec
from slideplan.plan import MachineReference, Plan, Prediction, SearchRecord
from slideplan.policy import Policy, Workload
from slideplan.timeline import step_record

SETTINGS = AdamW(lr=1e-3, weight_decay=0.01)

# Every mechanism at once, for four layers.
EVERYTHING = {
    "resident_state": (0,),
    "stream_state": (1,),
    "resident_weights": (4,),
    "keep": (4,),
    "offload_inner": (3,),
    "ssd_inner": (2,),
    "offload_boundaries": True,
    "ssd_boundaries": (0,),
    "window": 2,
    "update_order": (2, 3, 4, 5),
    "gradient_norms": True,
    "ssd_state": (3,),
    "ssd_moments": (4, 5),
    "ssd_weights": (2, 3),
}

# To be laid over that, where a test is not about the drive.
NO_DRIVE: dict[str, tuple[int, ...]] = {name: () for name in EVERYTHING if name.startswith("ssd_")}


def plan_for(model: ModelSpec, policy: Policy, workload: Workload, backend: Backend) -> Plan:
    """A plan of this policy for this machine; its prediction gives every task a microsecond."""
    machine, here = tiny_machine(ssd=SSD), identity(backend)
    footprint = Footprint(inner_bytes=1 << 16, workspace_bytes=1 << 20)
    graph = lower(model, policy, workload, footprint)
    memory = ledger(graph, machine)
    step_ns, spans = replay(graph, [1000] * len(graph.tasks))
    record = step_record(graph, workload, step_ns, spans, memory.peak_bytes())
    return Plan(
        version=__version__,
        model=model,
        model_digest=digest(model),
        machine=msgspec.structs.replace(
            MachineReference.of(machine), identity=here, optimizer_threads=optimizer_share(here.cores)
        ),
        workload=workload,
        policy=policy,
        footprint=footprint,
        graph=graph,
        ledger=memory,
        prediction=Prediction(
            record=record,
            lower_bound_ns=0,
            critical_ns={},
            cost_sources={},
            host_updates_ns=1000 * len(graph.queue(LaneKind.HOST_UPDATE)),
            save=tiny_save(model, policy, memory),
        ),
        search=SearchRecord(candidates=1, pruned_by_capacity=0, pruned_by_bound=0, simulated=1),
        offloads=True,
    )


def token_windows(model: ModelSpec, workload: Workload, seed: int = 0) -> TokenWindows:
    """Random tokens, some of them frequent, enough for a few epochs of small steps."""
    generator = np.random.default_rng(seed)
    tokens = generator.zipf(1.3, size=4096) % model.vocabulary
    return TokenWindows(tokens.astype(np.uint32), workload.seq_len, workload.global_batch, seed)


def session_for(plan: Plan, backend: Backend, settings: AdamW = SETTINGS) -> Session:
    windows = token_windows(plan.model, plan.workload)
    drive = Drive.for_graph(Disk(), [Path(tempfile.gettempdir())], plan.graph)
    session = Session(plan, backend, windows, settings, HostUpdate(plan.machine.optimizer_threads), drive=drive)
    session.begin(RandomWeights(plan.model, seed=1, device=backend.device))
    return session


def unit_tensors(source: WeightSource, unit: int) -> dict[str, torch.Tensor]:
    """Parameters of a unit, whole, by name within it."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, _, values in source.pieces(unit):
        parts.setdefault(name, []).append(values)
    return {name: torch.cat(found) for name, found in parts.items()}


def state_dict(source: WeightSource, model: ModelSpec) -> dict[str, torch.Tensor]:
    """All parameters of a model under their Hugging Face names."""
    return {
        model.unit_prefix(unit) + name: value
        for unit in range(model.units)
        for name, value in unit_tensors(source, unit).items()
    }


def masters(session: Session) -> dict[str, torch.Tensor]:
    """fp32 master weights of the whole model under their Hugging Face names, on the CPU."""
    model = session.plan.model
    return {
        model.unit_prefix(unit) + name: value.cpu()
        for unit in range(model.units)
        for name, value in session.states[unit].master().items()
    }


def bytes_of(part: Part) -> torch.Tensor:
    """All bytes of a part, copied, on the host."""
    found = torch.empty(part.nbytes, dtype=torch.uint8)
    part.read(0, found)
    return found


def results_of(session: Session, step: int) -> list[float]:
    """Loss, and where it is measured the norm, of a step whose compute is over."""
    fetched = session.compute.results.pop(step)
    session.backend.wait(fetched.marker)
    return fetched.values.tolist()


def loss_of(session: Session, step: int) -> float:
    """Loss of a step whose compute is over."""
    return results_of(session, step)[0]


def train(session: Session, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the next steps of the real executor, and master weights after them."""
    return [loss for loss, *_ in steps_of(session, steps)], masters(session)


def steps_of(session: Session, steps: int) -> list[list[float]]:
    """Results of the next steps of the real executor."""
    first = session.steps_done
    return [results_of(session, first + step) for step in session.executor(steps)]


def plain_training(
    model: ModelSpec,
    policy: Policy,
    workload: Workload,
    steps: int,
    device: torch.device,
    settings: AdamW = SETTINGS,
    norms: list[dict[str, float]] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without slideplan's runtime: one whole Hugging Face model in memory, plain PyTorch.

    Tied weights are two parameters of equal value here, whose gradients are summed in the runtime's order.
    bf16 weights compute, fp32 masters are updated by AdamW written in elementary operations, gradients are
    summed over micro-batches in the policy's dtype. Weights are rounded to bf16 with ties away from zero,
    which is the one place where the split master differs from torch's conversion. Sums of squares of every parameter's
    gradient, by step, go into `norms`.
    """
    arguments = config_of(msgspec.structs.replace(model, tied_embeddings=False))
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments, attn_implementation="sdpa")
    # Built in bf16, not converted: a conversion would round the rotary frequencies too.
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).train()
    parameters = dict(network.named_parameters())
    source = RandomWeights(model, seed=1, device=device)
    master = {name: value.float() for name, value in state_dict(source, model).items()}
    assert master.keys() | {"lm_head.weight"} == parameters.keys()
    first = {name: np.zeros(value.shape, np.float32) for name, value in master.items()}
    second = {name: np.zeros(value.shape, np.float32) for name, value in master.items()}
    dtype = torch.float32 if policy.gradient_dtype == "fp32" else torch.bfloat16
    lossy = [_lossy_state(model, policy, unit, master) for unit in range(model.units)] if policy.state != "exact" else []
    windows = token_windows(model, workload)
    losses = []
    for step in range(steps):
        sums: dict[str, torch.Tensor] = {}
        embedding: list[torch.Tensor] = []
        loss_sum = torch.zeros((), device=device)
        with torch.no_grad():
            for name, value in master.items():
                parameters[name].copy_(rounded_away(value))
            if model.tied_embeddings:
                parameters["lm_head.weight"].copy_(parameters["model.embed_tokens.weight"])
        for micro in range(policy.micro_batches):
            batch = windows.micro_batch(step, micro, policy.micro_batch)
            logits = network(input_ids=batch.inputs.view(policy.micro_batch, -1).to(device), use_cache=False).logits
            logits = logits.float().view(-1, model.vocabulary)
            loss = torch.nn.functional.cross_entropy(logits, batch.labels.to(device), reduction="sum") / workload.tokens
            loss.backward()
            loss_sum += loss.detach()
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                gradient = parameter.grad.to(dtype)
                parameter.grad = None
                if model.tied_embeddings and name == "model.embed_tokens.weight":
                    embedding.append(gradient)  # vertical order: the head's micro-batches all come first
                else:
                    sums[name] = sums[name] + gradient if name in sums else gradient
        losses.append(loss_sum.item())
        if model.tied_embeddings:
            sums["model.embed_tokens.weight"] = sum(embedding, start=sums.pop("lm_head.weight"))
        if norms is not None:
            norms.append({name: value.double().square().sum().item() for name, value in sums.items()})
        if policy.state != "exact":
            for unit, state in enumerate(lossy):
                _update_lossy(model, policy, unit, state, sums, settings, step, master)
            continue
        for name, gradient in sums.items():
            g, p = gradient.float().cpu().numpy(), master[name].cpu().numpy()
            p, first[name], second[name] = elementary_adamw(p, first[name], second[name], g, settings, step)
            master[name] = torch.from_numpy(p).to(device)
    return losses, {name: value.cpu() for name, value in master.items()}


LossyState = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def _lossy_state(model: ModelSpec, policy: Policy, unit: int, master: dict[str, torch.Tensor]) -> LossyState:
    """A unit's state in the plan's format, on the host; `master` becomes what of it is kept."""
    layout = model.parameters(model.role(unit))
    weights, remainder, moments = blank_state(model.flat_elements(model.role(unit)), policy.state, torch.device("cpu"))
    low = torch.zeros_like(weights, dtype=torch.int16)
    for name, high in parameter_views(weights, layout).items():
        split(master[model.unit_prefix(unit) + name].cpu(), high, parameter_views(low, layout)[name])
    if remainder is not None:
        remainder.copy_(low)
    return weights, remainder, moments


def _update_lossy(
    model: ModelSpec,
    policy: Policy,
    unit: int,
    state: LossyState,
    gradients: dict[str, torch.Tensor],
    settings: AdamW,
    step: int,
    master: dict[str, torch.Tensor],
) -> None:
    """A unit's update by torch's operations alone; `master` takes what comes of it."""
    weights, remainder, moments = state
    layout, prefix = model.parameters(model.role(unit)), model.unit_prefix(unit)
    flat = torch.zeros(weights.numel(), dtype=torch.float32 if policy.gradient_dtype == "fp32" else torch.bfloat16)
    for name, view in parameter_views(flat, layout).items():
        view.copy_(gradients[prefix + name])
    update_lossy(weights, remainder, moments, flat, settings, step, Draws.of(0, step, unit))
    low = torch.zeros_like(weights, dtype=torch.int16) if remainder is None else remainder
    for name, high in parameter_views(weights, layout).items():
        master[prefix + name] = join(high, parameter_views(low, layout)[name]).view(high.shape).to(master[prefix + name].device)


def check_near(start: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]) -> None:
    """Weights that other kernels have trained from the same start. Raises AssertionError.

    AdamW's first steps are of one size whatever the gradient's, so rounding shows where gradients are near zero.
    """
    apart, moved = (
        sum((each[parameter] - other[parameter]).square().sum().item() for parameter in start)
        for each, other in ((weights, eager), (eager, start))
    )
    assert apart < 0.06**2 * moved


def check_norms(session: Session, norms: list[float], expected: list[dict[str, float]], rel: float) -> None:
    """Hold norms of a session's steps against these sums of squares, and of the last step those of every unit."""
    assert norms == pytest.approx([sum(squares.values()) ** 0.5 for squares in expected], rel=rel)
    model, squares = session.plan.model, expected[-1]
    of_units = [
        sum(squares[model.unit_prefix(unit) + each.name] for each in model.parameters(model.role(unit)))
        for unit in range(model.units)
    ]
    assert session.buffers["gpu.norm", 0].tolist() == pytest.approx(of_units, rel=2 * rel)


def elementary_adamw(
    p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, settings: AdamW, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AdamW in fp32, one IEEE operation at a time (torch divides by a scalar as a product with its inverse)."""
    decay, w1, beta2, w2, root2, eps, step_size = (np.float32(value) for value in settings.scalars(step))
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    return p * decay - step_size * m / (np.sqrt(v) / root2 + eps), m, v


def rounded_away(master: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, to nearest, ties away from zero."""
    bits = (master.contiguous().view(torch.int32) + 0x8000) & ~0xFFFF
    return bits.view(torch.float32).bfloat16()
