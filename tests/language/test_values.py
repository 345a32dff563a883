"""Described things are values: equal where their fields are, never changed, and refused with a field that none knows."""

from __future__ import annotations

import importlib
import pkgutil

import msgspec
import pytest

import simulator
import slideplan
from builders import tiny_model
from slideplan.codec import Spec
from slideplan.machine.profile import Interference, LaneSpeed, LayerShape, Spread
from slideplan.machine.sharing import LaneKind, Sharing
from slideplan.model import UnitRole
from slideplan.policy import OtherSystem, Policy, Workload

for package in (slideplan, simulator):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def kinds(base: type = Spec) -> list[type]:
    return [base, *(kind for each in base.__subclasses__() for kind in kinds(each))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_no_described_thing_can_be_changed(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields


def test_there_are_many() -> None:
    assert len(kinds()) > 30


def test_the_shape_of_a_unit_holds_what_its_cost_depends_on_and_nothing_else() -> None:
    model = tiny_model(tied_embeddings=True, qk_norm=True, attention_bias="qkv")
    nothing = {"heads": 0, "kv_heads": 0, "head_dim": 0, "ffn": 0, "architecture": "", "attention_bias": "", "qk_norm": False}
    assert LayerShape.of(model, UnitRole.LAYER) == LayerShape(
        role=UnitRole.LAYER, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocabulary=0, architecture="llama",
        attention_bias="qkv", qk_norm=True, tied_embeddings=False,
    )  # fmt: skip
    ends = {role: LayerShape.of(model, role) for role in (UnitRole.EMBEDDING, UnitRole.HEAD)}
    assert ends[UnitRole.EMBEDDING] == LayerShape(
        role=UnitRole.EMBEDDING, hidden=64, vocabulary=256, tied_embeddings=False, **nothing
    )
    assert ends[UnitRole.HEAD] == LayerShape(role=UnitRole.HEAD, hidden=64, vocabulary=256, tied_embeddings=True, **nothing)


@pytest.mark.parametrize(("off", "mean", "largest"), [((), 0.0, 0.0), ((-0.25,), 0.25, 0.25), ((0.5, -0.25), 0.375, 0.5)])
def test_residuals_of_a_fitted_model(off: tuple[float, ...], mean: float, largest: float) -> None:
    lanes = tuple(
        LaneSpeed(lane=LaneKind.H2D, rate=Spread.exact(1), speed=0.5, predicted=0.5 + each) for each in off
    )  # fmt: skip
    found = Interference(alone={}, together=(lanes,), fitted=Sharing(capacities={}, usage={}))
    assert found.residuals == list(off)
    assert (found.mean_residual, found.max_residual) == (mean, largest)


@pytest.mark.parametrize(
    ("interval", "kept", "again"),
    [(1, [0, 1, 2, 3, 4, 5, 6], []), (2, [0, 2, 4, 6], [1, 3, 5]), (3, [0, 3, 6], [1, 2, 4, 5]), (4, [0, 4, 6], [1, 2, 3, 5])],
)
def test_every_how_many_layers_an_output_is_kept(interval: int, kept: list[int], again: list[int]) -> None:
    """Six layers between embedding, unit 0, and head, unit 7; the last layer's output is always there."""
    policy = Policy(
        micro_batch=1, micro_batches=1, window=2, prefetch_depth=1, gradient_slots=1, host_gradient_slots=1, boundary_slots=0,
        inner_slots=0, state_slots=0, state_chunks=0, gradient_dtype="bf16", kernels="eager", state="exact",
        gradient_norms=False, update_order=(), units=(None,) * 8,  # type: ignore[arg-type]
        other=OtherSystem(name="other", checkpoint_interval=interval),
    )  # fmt: skip
    assert [unit for unit in range(7) if policy.keeps_boundary(unit)] == kept
    assert [unit for unit in range(7) if policy.runs_again(unit)] == again


def test_tokens_of_a_step() -> None:
    assert Workload(seq_len=7, global_batch=3).tokens == 21
