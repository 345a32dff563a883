from __future__ import annotations

import msgspec
import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.model import UnitRole
from slideplan.placement import Tier
from slideplan.policy import Policy, Workload
from wording import says

ON_SSD = {"remainder": Tier.SSD, "moments": Tier.SSD}
STATE_ON_GPU = {"remainder": Tier.GPU, "moments": Tier.GPU}
UPDATED = {"update": Tier.GPU}
KEPT = {"inner": Tier.GPU, "feed_forward": Tier.GPU}


def changed_unit(policy: Policy, unit: int, **fields) -> Policy:
    units = list(policy.units)
    units[unit] = msgspec.structs.replace(units[unit], **fields)
    return msgspec.structs.replace(policy, units=tuple(units))


def with_knobs(**knobs) -> Policy:
    return msgspec.structs.replace(tiny_policy(tiny_model()), **knobs)


def refusal(policy: Policy, workload: Workload | None = None, **model) -> str:
    with pytest.raises(ValueError) as raised:
        policy.check(tiny_model(**model), workload or tiny_workload())
    return str(raised.value)


def test_the_builders_policy_is_legal():
    tiny_policy(tiny_model()).check(tiny_model(), tiny_workload())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"units": ()}, "policy.units has 0 entries, tiny has 6 units"),
        ({"micro_batch": 3}, "policy.micro_batch x policy.micro_batches is 3 x 2, the global batch is 4"),
        ({"micro_batch": 0}, "policy.micro_batch x policy.micro_batches is 0 x 2"),
        ({"window": 1}, "policy.window is 1, streaming weights need at least 2 slots"),
        ({"prefetch_depth": 0}, "policy.prefetch_depth is 0, must be in 1..1 (window - 1)"),
        ({"prefetch_depth": 2}, "policy.prefetch_depth is 2, must be in 1..1 (window - 1)"),
        ({"gradient_slots": 0}, "policy.gradient_slots is 0, must be at least 1"),
        ({"host_gradient_slots": 0}, "policy.host_gradient_slots is 0 with 4 layers updated on the host"),
        ({"host_gradient_slots": -1}, "policy.host_gradient_slots is -1"),
        ({"boundary_slots": 3}, "policy.boundary_slots must be 0 where no boundary activation waits on another tier"),
        (
            {"inner_slots": 1},
            "policy.inner_slots is 1; it must be 1 or more where inner activations of a unit wait on another tier",
        ),
        ({"window": 10**9}, "policy.window is 1000000000, more than could be used; take at most 48"),
        ({"update_order": (5, 4, 3, 2, 1)}, "those are [0, 1, 2, 3, 4, 5], it names [5, 4, 3, 2, 1]"),
        ({"update_order": (5, 4, 3, 2, 1, 0, 0)}, "policy.update_order must name every unit"),
    ],
)
def test_refusals_name_the_knob(knobs: dict, message: str):
    assert says(refusal(with_knobs(**knobs)), message)


@pytest.mark.parametrize(
    ("unit", "fields", "message"),
    [
        (2, STATE_ON_GPU, "policy.units[2] (layer001): state on the gpu is updated there; set update to gpu"),
        (2, STATE_ON_GPU | UPDATED, "policy.units[2] (layer001): an update on the gpu needs weights on the gpu"),
        (2, UPDATED, "policy.units[2] (layer001): an update on the gpu needs weights on the gpu"),
        (2, {"moments": Tier.GPU}, "policy.units[2] (layer001): remainder and moments must lie on one tier"),
        (0, {"weights": Tier.GPU}, "policy.units[0] (embedding): weights must lie where they are updated"),
        (0, {"weights": Tier.GPU} | UPDATED, "policy.units[0] (embedding): only layers' state can pass through the gpu"),
        (5, KEPT, "policy.units[5] (head): has no inner activations to keep"),
        (2, {"inner": Tier.GPU}, "policy.units[2] (layer001): inner and feed_forward activations are kept together"),
        (2, {"feed_forward": Tier.GPU}, "policy.units[2] (layer001): inner and feed_forward activations are kept together"),
        (
            3,
            {"remainder": Tier.SSD},
            "policy.units[3] (layer002): remainder and moments must lie on one tier, or moments alone",
        ),
        (
            3,
            {"weights": Tier.SSD},
            "policy.host_weight_slots is 0; it must be 1 or more where weights of a unit lie on the ssd",
        ),
        (
            3,
            {"weights": Tier.SSD} | STATE_ON_GPU | UPDATED,
            "policy.units[3] (layer002): an update on the gpu needs weights on",
        ),
        (0, {"weights": Tier.SSD}, "policy.units[0] (embedding): weights must lie where they are updated"),
        (3, ON_SSD, "policy.ssd_slots is 0; it must be 1 or more where state of a unit lies on the ssd, updated by"),
        (
            3,
            {"moments": Tier.SSD},
            "policy.ssd_slots is 0; it must be 1 or more where state of a unit lies on the ssd, updated by",
        ),
        (
            3,
            {"moments": Tier.SSD, "weights": Tier.GPU} | UPDATED,
            "policy.units[3] (layer002): an update on the gpu needs remainder and moments on one tier",
        ),
        (
            0,
            ON_SSD | {"weights": Tier.GPU} | UPDATED,
            "policy.units[0] (embedding): only layers' state can pass through the gpu",
        ),
        (3, {"boundary": Tier.SSD}, "policy.boundary_slots is 0, must be at least micro_batches + 1 = 3"),
        (3, {"inner": Tier.HOST}, "policy.units[3] (layer002).inner is host; the runtime can have it on gpu or none"),
        (4, {"boundary": Tier.HOST}, "policy.units[4].boundary must be gpu: the head consumes it at once"),
        (5, {"boundary": Tier.HOST}, "policy.units[5].boundary must be gpu"),
        (2, {"boundary": Tier.HOST}, "policy.boundary_slots is 0, must be at least micro_batches + 1 = 3"),
    ],
)
def test_refusals_name_the_unit(unit: int, fields: dict, message: str):
    assert says(refusal(changed_unit(tiny_policy(tiny_model()), unit, **fields)), message)


def test_kept_activations_need_their_input_on_the_gpu():
    policy = changed_unit(changed_unit(with_knobs(boundary_slots=3), 1, boundary=Tier.HOST), 2, **KEPT)
    assert "set policy.units[1].boundary to gpu" in refusal(policy)


def test_state_on_the_ssd_needs_slots_and_chunks_of_whole_pages():
    model = tiny_model()
    policy = tiny_policy(model, ssd_state=(0, 2), ssd_moments=(3, 5))
    policy.check(model, tiny_workload())
    assert "policy.ssd_slots is 0; it must be 1 or more" in refusal(msgspec.structs.replace(policy, ssd_slots=0))
    assert "policy.ssd_chunks is 0; it must be 1 or more" in refusal(msgspec.structs.replace(policy, ssd_chunks=0))
    assert says(refusal(msgspec.structs.replace(policy, ssd_chunks=65)), "take at most 64")
    blocks = -(-model.flat_elements(UnitRole.LAYER) // 2048)
    assert f"{blocks} blocks of a layer cannot be cut into as many" in refusal(
        msgspec.structs.replace(policy, ssd_chunks=blocks - 1)
    )
    assert "policy.ssd_slots is 1; it must be" in refusal(with_knobs(ssd_slots=1))


def test_state_that_passes_through_needs_slots_chunks_and_weights_on_the_gpu():
    model = tiny_model()
    policy = tiny_policy(model, stream_state=(2,))
    policy.check(model, tiny_workload())
    assert "policy.state_slots is 0; it must be 1 or more" in refusal(msgspec.structs.replace(policy, state_slots=0))
    assert "policy.state_chunks is 0; it must be 1 or more" in refusal(msgspec.structs.replace(policy, state_chunks=0))
    assert says(refusal(msgspec.structs.replace(policy, state_chunks=65)), "take at most 64")
    blocks = -(-model.flat_elements(UnitRole.LAYER) // 256)
    cut = next(chunks for chunks in range(2, 64) if -(-blocks // -(-blocks // chunks)) != chunks)
    assert "a layer cannot be cut into as many" in refusal(msgspec.structs.replace(policy, state_chunks=cut))
    assert "policy.state_slots is 1; it must be" in refusal(with_knobs(state_slots=1))
    for wrong, message in (
        ({"weights": Tier.HOST}, "policy.units[2] (layer001): an update on the gpu needs weights on the gpu"),
        (STATE_ON_GPU, "policy.state_slots is 2; it must be 1 or more where state of a unit passes through the gpu"),
    ):
        assert message in refusal(changed_unit(policy, 2, **wrong))
    assert "policy.update_order must name every unit that the host updates" in refusal(
        msgspec.structs.replace(policy, update_order=tuple(reversed(range(model.units))))
    )


def test_activations_on_the_ssd_need_host_slots_on_their_way():
    model = tiny_model()
    policy = tiny_policy(model, ssd_boundaries=(0,), ssd_inner=(3,), kernels="fused")
    policy.check(model, tiny_workload())
    for knob, what in (("host_boundary_slots", "boundary"), ("host_inner_slots", "inner")):
        message = f"policy.{knob} is 0; it must be 1 or more where {what} activations of a unit wait on the ssd"
        assert message in refusal(msgspec.structs.replace(policy, **{knob: 0}))
        assert f"policy.{knob} is 1; it must be" in refusal(with_knobs(**{knob: 1}))
    assert "feed_forward is on the ssd" in refusal(msgspec.structs.replace(policy, kernels="eager"))


def test_offloaded_inner_activations_need_a_slot_and_our_kernels():
    policy = tiny_policy(tiny_model(), offload_inner=(2,), kernels="fused")
    policy.check(tiny_model(), tiny_workload())
    assert says(refusal(msgspec.structs.replace(policy, inner_slots=0)), "policy.inner_slots is 0")
    message = refusal(msgspec.structs.replace(policy, kernels="eager"))
    assert "policy.units[2] (layer001): feed_forward is on the host" in message
    assert "set policy.kernels to fused" in message


def test_state_from_the_ssd_needs_host_slots_on_its_way_to_the_gpu():
    model = tiny_model()
    policy = tiny_policy(model, ssd_stream=(2,))
    policy.check(model, tiny_workload())
    assert "policy.host_state_slots is 0; it must be 1 or more where state of a unit passes from the ssd" in refusal(
        msgspec.structs.replace(policy, host_state_slots=0)
    )
    assert "policy.host_state_slots is 1; it must be" in refusal(with_knobs(host_state_slots=1))


def test_no_window_where_nothing_streams():
    policy = tiny_policy(tiny_model(), resident_weights=(1, 2, 3, 4))
    policy.check(tiny_model(), tiny_workload())
    message = refusal(msgspec.structs.replace(policy, window=2))
    assert message == "policy.window and prefetch_depth must be 0 where no weights stream"


def test_sequences_longer_than_the_model_allows():
    policy = tiny_policy(tiny_model())
    assert "seq_len 600 exceeds the 512 positions of tiny" in refusal(policy, tiny_workload(seq_len=600))
    assert says(refusal(policy, sliding_window=16), "exceeds the sliding attention window 16")


@pytest.mark.parametrize("fields", [{"seq_len": 0, "global_batch": 1}, {"seq_len": 1, "global_batch": -1}])
def test_workload_must_be_positive(fields: dict):
    with pytest.raises(ValueError, match=r"must be in 1\.\."):
        Workload(**fields)
