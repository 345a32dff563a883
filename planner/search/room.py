"""What candidates take of each tier, and the shared slots and the part of the drive that go with their choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from planner.search.candidate import Candidate, SlotBytes
from planner.search.counts import state_chunks
from simulator import footprint
from slideplan.footprint import Footprint
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import ComputeKnobs, Workload


class Room:
    """The memory of a machine, as candidates for a model and a workload fill it."""

    def __init__(self, model: ModelSpec, workload: Workload, machine: MachineProfile, capacity: Mapping[Tier, int]) -> None:
        """capacity: what the tiers offer to slots, in bytes"""
        self.model = model
        self.workload = workload
        self.capacity = capacity
        self.only_state = False  # whether nothing but state may lie on the drive
        self._machine = machine
        self._footprints: dict[ComputeKnobs, Footprint] = {}
        self._slot_bytes: dict[tuple[ComputeKnobs, int, int, bool], SlotBytes] = {}
        self._chunks = {tier: state_chunks(model, tier) for tier in (Tier.GPU, Tier.HOST)}

    def footprint(self, candidate: Candidate) -> Footprint:
        """What the candidate's kernels take on the GPU beside its slots."""
        key = ComputeKnobs.of(candidate)
        if key not in self._footprints:
            self._footprints[key] = footprint(self.model, candidate, self.workload.seq_len, self._machine)
        return self._footprints[key]

    def slot_bytes(self, candidate: Candidate) -> dict[Tier, int]:
        """What the candidate's slots take in each tier."""
        return self._sums(candidate).of(candidate)

    def _sums(self, candidate: Candidate) -> SlotBytes:
        key = ComputeKnobs.of(candidate), candidate.state_chunks, candidate.ssd_chunks, candidate.ssd_whole
        if key not in self._slot_bytes:
            self._slot_bytes[key] = SlotBytes(self.model, candidate, self.workload.seq_len, self.footprint(candidate))
        return self._slot_bytes[key]

    def spare(self, candidate: Candidate) -> dict[Tier, int]:
        """Bytes of each tier that the candidate leaves; negative where it does not fit."""
        return {tier: self.capacity[tier] - count for tier, count in self.slot_bytes(candidate).items()}

    def fits(self, candidate: Candidate) -> bool:
        """Whether every tier holds it."""
        return min(self.spare(candidate).values()) >= 0

    def with_slots(self, base: Candidate, spare_slots: Mapping[str, int]) -> Candidate:
        """As few shared slots as the order of tasks allows, and some to spare, so that work overlaps."""
        host_layers = self.model.layers - base.gpu_updated
        least = self._least_slots(base)
        slots = {knob: count + spare_slots[knob] if count else 0 for knob, count in least.items()}
        slots["host_gradient_slots"] = min(host_layers, slots["host_gradient_slots"])
        slots["gradient_slots"] = min(self.model.layers, slots["gradient_slots"])
        slots["state_chunks"] = self._chunks[Tier.GPU] if base.streamed_state else 0
        slots["state_slots"] = min(slots["state_chunks"] * base.streamed_state, slots["state_slots"])
        slots |= {"ssd_slots": 0, "host_weight_slots": 0, "host_boundary_slots": 0}
        on_host = msgspec.structs.replace(
            base, **slots, ssd_layers=0, ssd_ends=False, ssd_whole=False, ssd_chunks=0, ssd_weights=0, ssd_outputs=0
        )
        return self._with_ssd(on_host, spare_slots) if self.capacity[Tier.SSD] > 0 else on_host

    def _with_ssd(self, base: Candidate, spare_slots: Mapping[str, int]) -> Candidate:
        """With as much on the SSD as the host lacks room for, and no more: every byte there is read and written in each step.

        Moments go first; a byte of remainder costs as much, and takes the rest. Weights are read more than once. Boundaries
        are last, for they alone grow with the tokens of a step.
        """
        if self._host_spare(base) >= 0:
            return base
        found, counted = base, ""
        for stage, knob in self._ladder(base, spare_slots):
            found, counted = stage, knob
            if self._host_spare(found) >= 0:
                break
        if not counted or not getattr(found, counted):
            return found
        most = getattr(found, counted)
        lacking = -self._host_spare(msgspec.structs.replace(found, **{counted: 0}))
        each = (self._host_spare(found) + lacking) // most  # every layer gives back as many
        return msgspec.structs.replace(found, **{counted: min(most, max(0, -(-lacking // each)))})

    def _ladder(self, base: Candidate, spare_slots: Mapping[str, int]) -> Iterator[tuple[Candidate, str]]:
        """More and more on the SSD: each with all of one thing more, and by which count of units it may be less."""
        layers, streaming = self.model.layers - base.gpu_updated, self.model.layers - base.weight_layers
        found = base
        for knob, changes in (
            (
                "ssd_layers",
                {"ssd_layers": layers, "ssd_slots": 1 + spare_slots["ssd_slots"], "ssd_chunks": self._chunks[Tier.HOST]},
            ),
            ("ssd_layers", {"ssd_ends": True}),
            ("ssd_layers", {"ssd_whole": True}),
            ("ssd_weights", {"ssd_weights": streaming, "host_weight_slots": 1 + spare_slots["host_weight_slots"]}),
            (
                "ssd_outputs",
                {"ssd_outputs": base.offloaded_outputs, "host_boundary_slots": 1 + spare_slots["host_boundary_slots"]},
            ),
        ):
            stage = msgspec.structs.replace(found, **changes)
            if knob == "ssd_layers" and not stage.on_ssd(self.model):
                continue
            if knob != "ssd_layers" and (self.only_state or not getattr(stage, knob)):
                continue
            found = stage
            yield found, knob

    def _host_spare(self, candidate: Candidate) -> int:
        return self.capacity[Tier.HOST] - self._sums(candidate).on_host(candidate)

    def _least_slots(self, base: Candidate) -> dict[str, int]:
        host_layers = self.model.layers - base.gpu_updated
        # Deferred units are the first of all that the host updates: the embedding, layers, at last the head.
        waiting = min(host_layers, max(1, base.deferred_updates - (not base.embedding_on_gpu)))
        boundaries = base.micro_batches + 1 if base.offloaded_outputs else 0
        return {
            "gradient_slots": 1, "host_gradient_slots": waiting, "boundary_slots": boundaries,
            "inner_slots": min(1, base.offloaded_inner), "state_slots": min(1, base.streamed_state),
            "ssd_slots": int(bool(base.ssd_layers or base.ssd_ends)), "host_weight_slots": min(1, base.ssd_weights),
            "host_boundary_slots": min(1, base.ssd_outputs),
        }  # fmt: skip

    def spare_slots(self, candidate: Candidate) -> dict[str, int]:
        """How many shared slots the candidate has beyond what it needs; of those that it needs none of, what is good."""
        return {
            knob: max(0, getattr(candidate, knob) - count) if count else FIRST_SPARE_SLOTS[knob]
            for knob, count in self._least_slots(candidate).items()
        }


# Shared slots beyond the fewest: one more lets work overlap, and is where the search begins. With three host slots of
# weights, updates find what backward was loaded from.
NO_SPARE_SLOTS = {
    "gradient_slots": 0, "host_gradient_slots": 0, "boundary_slots": 0, "inner_slots": 0, "state_slots": 0, "ssd_slots": 0,
    "host_weight_slots": 0, "host_boundary_slots": 0,
}  # fmt: skip
# Of chunks from the drive, one is read, one updated and one written at a time. With two slots in all, a chunk that the drive
# is slow to read held up those to be written, and the other way round: its lanes were busy for 80 % of a step that they bound.
SPARE_SLOTS = dict.fromkeys(NO_SPARE_SLOTS, 1) | {"host_weight_slots": 2, "ssd_slots": 3}
# With one slot beside the one in use, a copy and the compute that waits for it take turns: inner activations take
# as long to copy as several layers to compute; of state, one chunk comes, one is updated and one leaves at a time.
FIRST_SPARE_SLOTS = SPARE_SLOTS | {"inner_slots": 2, "state_slots": 3}
