"""Where tensors of a unit lie between their uses, and by which copies bytes get from tier to tier."""

from __future__ import annotations

import pytest
from hypothesis import given

from slideplan.lowering.pools import holders
from slideplan.placement import STATE, Placement, TensorClass, Tier, hops
from strategies import Case, cases

GPU, HOST, SSD = Tier


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(), {TensorClass.WEIGHTS: (HOST,), TensorClass.MOMENTS: (HOST,), TensorClass.BOUNDARY: (GPU,)}),
        # The update writes weights where it runs, and compute reads those of the GPU.
        (Placement(weights=GPU), {TensorClass.WEIGHTS: (GPU, HOST), TensorClass.REMAINDER: (HOST,)}),
        (Placement(weights=GPU, update=GPU), {TensorClass.WEIGHTS: (GPU,), TensorClass.MOMENTS: (HOST,)}),
        (Placement(weights=SSD), {TensorClass.WEIGHTS: (SSD,)}),
        (Placement(moments=SSD), {TensorClass.MOMENTS: (SSD,), TensorClass.REMAINDER: (HOST,)}),
        (Placement(), {TensorClass.INNER: (), TensorClass.FEED_FORWARD: ()}),
        (Placement(inner=GPU, feed_forward=HOST), {TensorClass.INNER: (GPU,), TensorClass.FEED_FORWARD: (HOST,)}),
        (Placement(boundary=HOST), {TensorClass.BOUNDARY: (HOST,)}),
    ],
)
def test_tiers_on_which_a_unit_has_slots_of_its_own(placement: Placement, expected: dict):
    assert {tensor: placement.tiers(tensor) for tensor in expected} == expected


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (Placement(), ()),
        (Placement(weights=GPU), ()),
        (Placement(weights=GPU, update=GPU), STATE),
        (Placement(weights=GPU, remainder=GPU, moments=GPU, update=GPU), ()),
        (Placement(weights=GPU, remainder=GPU, update=GPU), (TensorClass.MOMENTS,)),
        (Placement(moments=SSD), (TensorClass.MOMENTS,)),
        (Placement(remainder=SSD, moments=SSD), STATE),
    ],
)
def test_state_that_lies_elsewhere_than_its_update_passes_through(placement: Placement, expected: tuple):
    assert placement.passing == expected


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (GPU, GPU, ()),
        (GPU, HOST, ((GPU, HOST),)),
        (GPU, SSD, ((GPU, HOST), (HOST, SSD))),
        (SSD, GPU, ((SSD, HOST), (HOST, GPU))),
        (SSD, HOST, ((SSD, HOST),)),
    ],
)
def test_between_gpu_and_ssd_everything_passes_through_the_host(source: Tier, target: Tier, expected: tuple):
    assert hops(source, target) == expected


def test_a_unit_keeps_inner_activations_wherever_they_lie():
    assert not Placement().keeps
    assert Placement(inner=GPU, feed_forward=GPU).keeps
    assert Placement(inner=GPU, feed_forward=HOST).keeps


@given(cases())
def test_units_have_slots_of_their_own_where_their_placement_says(case: Case):
    """Weights aside, of which embedding and head have slots on the GPU in any case; the head has no boundary."""
    model, policy = case.model, case.policy
    found: dict[tuple[TensorClass, int], set[Tier]] = {}
    for holding, units in holders(model, policy).items():
        for unit in units:
            found.setdefault((holding.tensor, unit), set()).add(holding.tier)
    for unit, placement in enumerate(policy.units):
        for tensor in (*STATE, TensorClass.BOUNDARY, TensorClass.INNER, TensorClass.FEED_FORWARD):
            if tensor is TensorClass.BOUNDARY and unit == model.head_unit:
                assert (tensor, unit) not in found
                continue
            expected = set(placement.tiers(tensor))
            if tensor is TensorClass.FEED_FORWARD and placement.feed_forward is GPU:
                expected = set()  # a part of what is kept there anyway
            assert found.get((tensor, unit), set()) == expected, (tensor, unit)
        if 0 < unit < model.head_unit:
            assert found[TensorClass.WEIGHTS, unit] == set(placement.tiers(TensorClass.WEIGHTS))
        else:
            assert found[TensorClass.WEIGHTS, unit] == {GPU, placement.update}
