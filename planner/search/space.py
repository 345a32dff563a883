"""Which policies are considered. Layers are alike, so a candidate says how many, not which.

Inner activations and GPU boundaries are kept on the last layers, where they live shortest. Weights and
state stay on the GPU for the first layers: their gradients arrive last and they are needed first in the
next step, so they are the ones that the host would update too late. Sizes of copies are no knob: the runtime
moves a unit in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from planner.search.candidate import Candidate
from planner.search.counts import evenly, micro_batch_sizes
from planner.search.kernels import check_kernels, faster_kernels
from planner.search.room import NO_SPARE_SLOTS, SPARE_SLOTS, Room
from slideplan.codec import Spec
from slideplan.ledger import slot_capacities
from slideplan.lowering.sizes import TRAINING_BYTES, WEIGHT_BYTES, state_bytes
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from slideplan.policy import GradientDtype, Kernels, StateFormat, Workload, check_seq_len

WINDOWS = (2, 3, 4, 6)
GRID = 4  # values tried for how many layers keep weights, and how many keep state
DEFERRALS = 5  # update orders, from order of arrival to order of next need


class SearchOptions(Spec, frozen=True):
    """What the user fixes, and how much the search may cost.

    placement:      "host" keeps weights and state of every unit on the host, so that all is streamed
    kernels:        "auto" decides by what was measured, see `planner.kernels`; they are no part of the search
    gradient_dtype: "auto" sums over several micro-batches in fp32, and takes bf16 for one alone
    state:          how state is kept. All but "exact" are lossy, and need less of every memory
    gradient_norms: measure the gradients' global norm in every step
    micro_batch:    None tries every divisor of the global batch
    lowered_tasks:  size of all task graphs made to bound a step by its longest path
    simulated_tasks: size of all task graphs simulated
    tolerance:      candidates that cannot be faster by more than this share are not looked at
    max_tokens_per_step: search the global batch too, up to this many tokens a step
    least_host_memory: seek the least host memory at which the speed is at least `at_least_percent` of the best
    pareto:         look for fast policies at smaller memories too
    explain:        look for the next-best value of each knob
    """

    placement: Literal["auto", "host"] = "auto"
    kernels: Kernels | Literal["auto"] = "auto"
    gradient_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    state: StateFormat = "exact"
    gradient_norms: bool = False
    micro_batch: int | None = None
    lowered_tasks: int = 200_000
    simulated_tasks: int = 120_000
    tolerance: float = 0.005
    max_tokens_per_step: int | None = None
    least_host_memory: bool = False
    at_least_percent: float = 95.0
    pareto: bool = False
    explain: bool = False


class Space(Spec, frozen=True):
    """Candidates that fit, and how many were dropped because they do not."""

    fitting: tuple[Candidate, ...]
    too_large: int
    offloads: bool


class SpaceBuilder(Room):
    """Enumerates candidates for a model, a workload and what the tiers offer to slots, in bytes."""

    def __init__(
        self,
        model: ModelSpec,
        workload: Workload,
        sizes: Sequence[int],
        machine: MachineProfile,
        capacity: Mapping[Tier, int],
        options: SearchOptions,
    ) -> None:
        """`sizes`: micro-batch sizes to be tried, as of `micro_batch_sizes`."""
        super().__init__(model, workload, machine, capacity)
        self._sizes = sorted(sizes)
        self.options = options
        self._too_large = 0
        self._layer = model.flat_elements(UnitRole.LAYER)

    @classmethod
    def on(
        cls,
        model: ModelSpec,
        workload: Workload,
        machine: MachineProfile,
        options: SearchOptions,
        more: Mapping[Tier, int] | None = None,
    ) -> SpaceBuilder:
        """What may be planned for this workload on this machine. Raises ValueError where nothing may.

        more: capacities in bytes that replace what the machine offers to slots
        """
        check_seq_len(model, workload.seq_len)
        check_kernels(options.kernels, machine)
        sizes = micro_batch_sizes(workload, options.micro_batch)
        return cls(model, workload, sizes, machine, {**slot_capacities(machine), **(more or {})}, options)

    def build(self) -> Space:
        """Without offloading if anything fits so; otherwise all that fits with it; of what lies on the drive, state alone
        if anything fits so.
        """
        resident = [*self._resident()] if self.options.placement == "auto" else []
        fitting = [candidate for candidate in resident if candidate is not None]
        if fitting:
            return Space(fitting=tuple(fitting), too_large=len(resident) - len(fitting), offloads=False)
        for self.only_state in (True, False):
            self._too_large = 0
            found = dict.fromkeys(self._offloaded())
            if found or not self.capacity[Tier.SSD] > 0:
                break
        fitting = list(found)
        return Space(fitting=tuple(fitting), too_large=self._too_large + len(resident), offloads=True)

    def least_demanding(self) -> Iterator[Candidate]:
        """The policies with the fewest slots, one for each split of state between GPU and host."""
        layers = self.model.layers
        free = self.options.placement == "auto"
        for base in self._micro_batches():
            for embedding, head in _ENDS if free else _ENDS[:1]:
                for state in range(layers + 1 if free else 1):
                    for offloaded in evenly(0, layers, 3):
                        placed = msgspec.structs.replace(
                            base, embedding_on_gpu=embedding, head_on_gpu=head, state_layers=state, weight_layers=state,
                            window=2 if state < layers else 0, prefetch_depth=1 if state < layers else 0,
                            offloaded_outputs=offloaded,
                        )  # fmt: skip
                        deferred = min(1, placed.host_units(self.model))
                        yield self.with_slots(msgspec.structs.replace(placed, deferred_updates=deferred), NO_SPARE_SLOTS)

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Candidates that differ from this one in one choice, and fit; what follows from a choice follows."""
        free = self.options.placement == "auto"
        layers = self.model.layers
        changed: list[dict[str, int | bool]] = []
        changed += self._passing(candidate) if free else []
        for step in (-5, -2, -1, 1, 2, 5):
            changed.append({"deferred_updates": candidate.deferred_updates + step})
            changed.append({"offloaded_outputs": min(layers, max(0, candidate.offloaded_outputs + step))})
            changed.append({"offloaded_inner": candidate.offloaded_inner + step})
            if free:
                changed.append({"weight_layers": candidate.weight_layers + step})
                changed.append({"state_layers": candidate.state_layers + step})
                changed.append({"state_layers": candidate.state_layers + step, "weight_layers": candidate.weight_layers + step})
        changed += [{"offloaded_outputs": offloaded} for offloaded in evenly(0, layers, 5)]
        changed += [{"offloaded_inner": offloaded} for offloaded in evenly(0, layers - candidate.offloaded_outputs, 5)]
        changed += [{"embedding_on_gpu": embedding, "head_on_gpu": head} for embedding, head in _ENDS] if free else []
        streaming = layers - candidate.weight_layers
        changed += [{"window": window, "prefetch_depth": depth} for window, depth in self._windows(streaming)]
        spare_slots = self.spare_slots(candidate)
        moves = [(change, spare_slots) for change in changed]
        for knob, spare in spare_slots.items():
            moves += [({}, spare_slots | {knob: count}) for count in {max(0, spare - 1), spare + 1, spare + 2, 2 * spare + 4}]
        for change, spares in moves:
            moved = msgspec.structs.replace(candidate, kept_layers=0, **change)
            streaming = layers - moved.weight_layers
            # Layers whose state passes through the GPU follow those whose state stays there; both have weights there.
            passing = min(moved.streamed_state, moved.weight_layers - moved.state_layers)
            moved = msgspec.structs.replace(moved, streamed_state=max(0, passing))
            if not 0 <= moved.state_layers <= moved.weight_layers <= layers:
                continue
            window = min(moved.window or 2, max(2, streaming)) if streaming else 0
            depth = min(moved.prefetch_depth or 1, window - 1) if streaming else 0
            deferred = min(moved.host_units(self.model), max(1, moved.deferred_updates))
            # Autograd's own tensors cannot leave the GPU; and what keeps activations has its input there.
            away = 0 if moved.kernels == "eager" else min(layers - moved.offloaded_outputs, max(0, moved.offloaded_inner))
            found = self._keeping(
                msgspec.structs.replace(
                    moved, window=window, prefetch_depth=depth, deferred_updates=deferred, offloaded_inner=away
                ),
                spares,
            )
            if found is not None and found != candidate:
                yield found
        for kept in {0, candidate.kept_layers // 2, candidate.kept_layers - 1} - {candidate.kept_layers, -1}:
            fewer = msgspec.structs.replace(candidate, kept_layers=kept)
            if self.fits(fewer):
                yield fewer

    def _passing(self, candidate: Candidate) -> Iterator[dict[str, int | bool]]:
        """State of more or fewer layers passes through the GPU, whose slots may take the place of state that stays."""
        for fewer in range(3):
            state = candidate.state_layers - fewer
            most = self.model.layers - state
            near = (candidate.streamed_state + step for step in (-2, -1, 1, 2))
            for passing in sorted({*evenly(0, most, 5), *(count for count in near if 0 <= count <= most)}):
                weights = max(candidate.weight_layers, state + passing)
                yield {"state_layers": state, "streamed_state": passing, "weight_layers": weights}

    def leaner(self, candidate: Candidate) -> Candidate:
        """The same with as few shared slots as the order of tasks allows: slower, if anything, and smaller."""
        return self.with_slots(candidate, NO_SPARE_SLOTS)

    def dtype(self, micro_batches: int) -> GradientDtype:
        """In which gradients are summed."""
        wanted = self.options.gradient_dtype
        return wanted if wanted != "auto" else "bf16" if micro_batches == 1 else "fp32"

    def may_choose(self, candidate: Candidate) -> bool:
        """Whether the search may answer with it: gradients in the other type are the user's to choose."""
        return candidate.gradient_dtype == self.dtype(candidate.micro_batches)

    def other_dtype(self, candidate: Candidate) -> Candidate | None:
        """The same with gradients in the other type; None where it does not fit, or where the user fixed the type."""
        if self.options.gradient_dtype != "auto":
            return None
        other: GradientDtype = "bf16" if candidate.gradient_dtype == "fp32" else "fp32"
        base = msgspec.structs.replace(candidate, gradient_dtype=other, kept_layers=0)
        return self._keeping(base, self.spare_slots(candidate))

    # -- enumeration ---------------------------------------------------------------------------

    def _micro_batches(self) -> Iterator[Candidate]:
        for size in self._sizes:
            count = self.workload.global_batch // size
            kernels = self.options.kernels
            if kernels == "auto":
                kernels = faster_kernels(self.model, size, self.workload.seq_len, self._machine)
            yield Candidate(
                micro_batch=size,
                micro_batches=count,
                gradient_dtype=self.dtype(count),
                kernels=kernels,
                state=self.options.state,
                gradient_norms=self.options.gradient_norms,
            )

    def _resident(self) -> Iterator[Candidate | None]:
        layers = self.model.layers
        for base in self._micro_batches():
            yield self._keeping(
                msgspec.structs.replace(
                    base, state_layers=layers, weight_layers=layers, embedding_on_gpu=True, head_on_gpu=True
                )
            )

    def _offloaded(self) -> Iterator[Candidate]:
        layers = self.model.layers
        free = self.options.placement == "auto"
        for base in self._micro_batches():
            for embedding, head in _ENDS if free else _ENDS[:1]:
                for offloaded in evenly(0, layers, 3):
                    ends = msgspec.structs.replace(
                        base, embedding_on_gpu=embedding, head_on_gpu=head, offloaded_outputs=offloaded
                    )
                    for state in self._state_counts(ends) if free else (0,):
                        yield from self._streaming(msgspec.structs.replace(ends, state_layers=state, weight_layers=state))

    def _state_counts(self, base: Candidate) -> list[int]:
        """From as many as the host cannot hold to as many as the GPU can."""
        layers, on_host = self.model.layers, TRAINING_BYTES * self._layer
        on_gpu = WEIGHT_BYTES * self._layer + state_bytes(self._layer, base.state)
        spare = self.spare(self.with_slots(msgspec.structs.replace(base, window=2, prefetch_depth=1), NO_SPARE_SLOTS))
        fewest = min(layers, max(0, -(spare[Tier.HOST] // on_host)))
        most = max(0, min(layers, spare[Tier.GPU] // on_gpu))
        if most + 2 >= layers:  # without any streaming layer the window is spared
            most = layers
        return evenly(fewest, max(fewest, most), GRID)

    def _streaming(self, base: Candidate) -> Iterator[Candidate]:
        """Windows, resident weights and update orders for a given split of state."""
        layers = self.model.layers
        free = self.options.placement == "auto"
        for window, depth in self._windows(layers - base.state_layers):
            windowed = msgspec.structs.replace(base, window=window, prefetch_depth=depth)
            spare = self.spare(self.with_slots(windowed, NO_SPARE_SLOTS))[Tier.GPU]
            most = min(layers - window, base.state_layers + max(0, spare) // (WEIGHT_BYTES * self._layer))
            for weights in evenly(base.state_layers, max(base.state_layers, most), GRID) if free else (0,):
                placed = msgspec.structs.replace(windowed, weight_layers=weights)
                hosted = placed.host_units(self.model)
                for deferred in evenly(min(1, hosted), hosted, DEFERRALS):
                    candidate = self._keeping(msgspec.structs.replace(placed, deferred_updates=deferred))
                    if candidate is None:
                        self._too_large += 1
                    else:
                        yield candidate

    def _windows(self, streaming: int) -> Iterator[tuple[int, int]]:
        """Window and prefetch depth. As many slots as streaming layers load every layer once a step."""
        if not streaming:
            yield 0, 0
            return
        sizes = {2, *(window for window in WINDOWS if window <= streaming)}
        if self.options.placement == "auto":
            sizes.add(max(2, streaming))
        for window in sorted(sizes):
            for depth in sorted({window - 1, max(1, window // 2)}):
                yield window, depth

    def _keeping(self, base: Candidate, spare_slots: Mapping[str, int] | None = None) -> Candidate | None:
        """With slots, and inner activations kept on as many layers as fit; None where not even none fit.

        Where the spare slots do not fit, there are none.
        """
        for spares in (spare_slots or SPARE_SLOTS, NO_SPARE_SLOTS):
            candidate = self.with_slots(base, spares)
            spare = self.spare(candidate)
            if min(spare.values()) < 0:
                continue
            inner = self.footprint(base).inner_bytes * base.micro_batches
            room = self.model.layers - base.offloaded_outputs - base.offloaded_inner
            kept = min(room, spare[Tier.GPU] // inner) if inner else room
            # What works beside fewer kept layers may take more, or less, than beside none: from there, down or up.
            while kept and not self.fits(msgspec.structs.replace(candidate, kept_layers=kept)):
                kept -= 1
            while kept < room and self.fits(msgspec.structs.replace(candidate, kept_layers=kept + 1)):
                kept += 1
            return msgspec.structs.replace(candidate, kept_layers=kept)
        return None


# Embedding and head on the GPU or not. The embedding comes first: nothing hides its update.
_ENDS = ((False, False), (True, False), (True, True))
