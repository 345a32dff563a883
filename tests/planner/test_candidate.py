"""Candidates count what their policies spell out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import tiny_model
from planner.search.candidate import AWAY, HOLDINGS, KEPT, RECOMPUTED, Candidate, SlotBytes
from slideplan.footprint import Footprint
from slideplan.graph.tasks import tier_bytes
from slideplan.lowering.lower import lower
from slideplan.lowering.pools import holders
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import Workload

SEQ_LEN = 32
TRANSIENTS = {
    f"{role}/{kind}": size
    for role, kind, size in (
        ("embedding", "forward", 700), ("embedding", "backward", 1500), ("head", "loss", 9000), ("layer", "forward", 3000),
        ("layer", "forward_keep", 6000), ("layer", "backward", 4000), ("layer", "backward_recompute", 12000),
    )
}  # fmt: skip


@st.composite
def candidates(draw: st.DrawFn) -> tuple[ModelSpec, Candidate]:
    """Any candidate whose policy is legal and whose order of tasks finds slots: more than searches meet."""
    model = tiny_model(layers=draw(st.integers(1, 7)), tied_embeddings=draw(st.booleans()))
    layers = model.layers
    state = draw(st.integers(0, layers))
    streamed = draw(st.integers(0, layers - state))
    weights = draw(st.integers(state + streamed, layers))
    outputs = draw(st.integers(0, layers))
    kept = draw(st.integers(0, layers - outputs))
    kernels = draw(st.sampled_from(["eager", "fused"]))
    away = 0 if kernels == "eager" else draw(st.integers(0, layers - outputs - kept))
    embedding, head = draw(st.booleans()), draw(st.booleans())
    hosted = layers - state - streamed
    window = draw(st.integers(2, layers + 2)) if weights < layers else 0
    micro_batches = draw(st.integers(1, 3))
    on_host = hosted + (not embedding) + (not head)
    ssd_layers, ssd_ends = draw(st.integers(0, hosted)), not (embedding and head) and draw(st.booleans())
    on_ssd = bool(ssd_layers or ssd_ends)
    ssd_weights, ssd_outputs = draw(st.integers(0, layers - weights)), draw(st.integers(0, outputs))
    return model, Candidate(
        micro_batch=draw(st.integers(1, 2)),
        micro_batches=micro_batches,
        gradient_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        kernels=kernels,
        state=draw(st.sampled_from(["exact", "bf16-moments", "lean"])),
        gradient_norms=draw(st.booleans()),
        window=window,
        prefetch_depth=draw(st.integers(1, window - 1)) if window else 0,
        gradient_slots=draw(st.integers(1, 4)),
        host_gradient_slots=hosted,
        boundary_slots=micro_batches + draw(st.integers(1, 4)) if outputs else 0,
        inner_slots=draw(st.integers(1, 4)) if away else 0,
        state_slots=draw(st.integers(1, 4)) if streamed else 0,
        state_chunks=draw(st.integers(1, 5)) if streamed else 0,
        state_layers=state,
        streamed_state=streamed,
        weight_layers=weights,
        embedding_on_gpu=embedding,
        head_on_gpu=head,
        offloaded_outputs=outputs,
        kept_layers=kept,
        offloaded_inner=away,
        deferred_updates=draw(st.integers(min(1, on_host), on_host)),
        ssd_slots=draw(st.integers(1, 4)) if on_ssd else 0,
        ssd_chunks=draw(st.integers(1, 5)) if on_ssd else 0,
        ssd_layers=ssd_layers,
        ssd_ends=ssd_ends,
        ssd_whole=on_ssd and draw(st.booleans()),
        ssd_weights=ssd_weights,
        ssd_outputs=ssd_outputs,
        host_weight_slots=draw(st.integers(1, 4)) if ssd_weights else 0,
        host_boundary_slots=draw(st.integers(1, 4)) if ssd_outputs else 0,
    )


@given(candidates())
def test_holdings_are_the_holders_of_the_policy_counted(case: tuple[ModelSpec, Candidate]):
    model, candidate = case
    counted = {holding: len(units) for holding, units in holders(model, candidate.policy(model)).items()}
    found = candidate.holdings(model)
    assert tuple(found) == HOLDINGS
    assert {holding: count for holding, count in found.items() if count} == counted
    assert min(found.values()) >= 0


@settings(deadline=None)
@given(candidates(), st.sampled_from([{}, TRANSIENTS]), st.data())
def test_bytes_of_slots_are_those_of_the_lowered_graph(
    case: tuple[ModelSpec, Candidate], transients: dict[str, int], data: st.DataObject
):
    """Counted for a candidate as for any other that computes alike and cuts state into as many chunks."""
    model, candidate = case
    footprint = Footprint(inner_bytes=data.draw(st.integers(20_000, 40_000)), workspace_bytes=500, transient_bytes=transients)
    workload = Workload(seq_len=SEQ_LEN, global_batch=candidate.micro_batch * candidate.micro_batches)
    graph = lower(model, candidate.policy(model), workload, footprint)
    expected = {tier: tier_bytes(graph.pools, tier) for tier in Tier}
    alike = msgspec.structs.replace(
        candidate, window=7, gradient_slots=9, host_gradient_slots=3, boundary_slots=5, inner_slots=2, state_slots=11,
        state_layers=0, streamed_state=0, weight_layers=1, kept_layers=1, offloaded_inner=0, offloaded_outputs=0,
        ssd_slots=5, ssd_layers=0, ssd_ends=False, ssd_weights=0, ssd_outputs=0, host_weight_slots=3, host_boundary_slots=2,
    )  # fmt: skip
    for asked in (candidate, alike):
        assert SlotBytes(model, asked, SEQ_LEN, footprint).of(candidate) == expected


@given(candidates())
def test_policies_of_candidates_are_legal_and_say_what_they_count(case: tuple[ModelSpec, Candidate]):
    model, candidate = case
    policy = candidate.policy(model)
    policy.check(model, Workload(seq_len=SEQ_LEN, global_batch=candidate.micro_batch * candidate.micro_batches))
    layers = policy.units[1 : model.head_unit]
    assert sum(layer.moments is Tier.GPU for layer in layers) == candidate.state_layers
    assert sum(bool(layer.passing) for layer in layers if layer.update is Tier.GPU) == candidate.streamed_state
    assert sum(layer.moments is Tier.SSD for layer in layers) == candidate.ssd_layers
    on_ssd = [unit for unit in policy.units if unit.moments is Tier.SSD]
    assert {unit.remainder for unit in on_ssd} <= {Tier.SSD if candidate.ssd_whole else Tier.HOST}
    assert sum(layer.weights is Tier.GPU for layer in layers) == candidate.weight_layers
    assert sum(layer.weights is Tier.SSD for layer in layers) == candidate.ssd_weights
    assert sum(unit.boundary is Tier.SSD for unit in policy.units) == candidate.ssd_outputs
    assert sum(unit.boundary is not Tier.GPU for unit in policy.units) == candidate.offloaded_outputs
    inner = [(layer.inner, layer.feed_forward) for layer in layers]
    assert inner == candidate.inner(model)
    assert (inner.count(KEPT), inner.count(AWAY)) == (candidate.kept_layers, candidate.offloaded_inner)
    assert inner.count(RECOMPUTED) == model.layers - candidate.kept_layers - candidate.offloaded_inner
    assert len(policy.update_order) == candidate.host_units(model)
    for field in Candidate.__struct_fields__:
        if field in policy.__struct_fields__ and field != "update_order":
            assert getattr(policy, field) == getattr(candidate, field), field


@pytest.mark.parametrize(
    ("outputs", "kept", "away", "expected"),
    [
        (0, 0, 0, "rrrrrr"),
        (0, 2, 0, "rrrrkk"),
        (0, 2, 4, "aaaakk"),
        (0, 2, 2, "rarakk"),
        (2, 1, 1, "rrrrak"),
        (2, 0, 2, "rrrara"),
        (0, 6, 0, "kkkkkk"),
    ],
)
def test_layers_with_activations_on_the_host_are_spread(outputs: int, kept: int, away: int, expected: str):
    base = Candidate(micro_batch=1, micro_batches=1, gradient_dtype="bf16", kernels="fused")
    candidate = msgspec.structs.replace(base, offloaded_outputs=outputs, kept_layers=kept, offloaded_inner=away)
    letters = {RECOMPUTED: "r", KEPT: "k", AWAY: "a"}
    assert "".join(letters[inner] for inner in candidate.inner(tiny_model(layers=6))) == expected
