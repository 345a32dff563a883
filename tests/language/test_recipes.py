"""One table says which slots an operation uses: it has a row for all that is issued, and tasks keep to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.operations import COMPUTE_KINDS, Operation, TaskKind
from slideplan.graph.tasks import COPIED_AS, TENSOR_OF, Role, Task
from slideplan.lowering.lower import lower
from slideplan.lowering.recipes import COMPUTE, PASSES
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from strategies import FOOTPRINT, Case, cases, foreign_cases

# Together they issue every operation for every role that has it.
SCHEDULES = [
    {},
    {
        "resident_state": (0,), "stream_state": (1,), "resident_weights": (4,), "keep": (4,), "offload_inner": (3,),
        "offload_boundaries": True, "update_order": (2, 3, 4, 5), "gradient_norms": True, "kernels": "fused",
    },
    {"master": "fp32", "staging": "per_load", "step_barrier": True, "clipping": "serial", "host_gradient_slots": 4},
    {"master": "fp32", "staging": "per_update"},
]  # fmt: skip


def recipe(task: Task, model: ModelSpec) -> list[tuple[Role, Tier, set[str]]]:
    """Roles, tiers and modes that the task may use, in order. Raises KeyError where nothing is known of its operation."""
    operation = task.operation
    if operation.kind is TaskKind.COPY:
        roles = [COPIED_AS[tensor] for tensor in operation.tensors]
        return [(role, operation.source, {"r"}) for role in roles] + [(role, operation.target, {"w"}) for role in roles]
    table = COMPUTE[operation.kind, model.role(task.unit)] if operation.kind in COMPUTE_KINDS else PASSES[operation.kind]
    return [(role, operation.target, {"w", "rw"} if mode == "sum" else {mode}) for role, mode in table]


def accesses(task: Task) -> Iterator[tuple[Role, Tier, str]]:
    for access in task.accesses:
        if access.role is not Role.BARRIER:  # what waits for it depends on its place in the step, not on its operation
            yield access.role, access.tier, access.mode


@given(st.one_of(cases(), foreign_cases()))
def test_tasks_use_what_their_recipe_says_in_its_order(case: Case):
    graph = case.graph()
    for task in graph.tasks:
        rows = iter(recipe(task, case.model))
        for role, tier, mode in accesses(task):
            # Of a master that is not staged, the half that compute reads stands for it.
            wanted = {role, Role.MASTER} if task.kind is TaskKind.UPDATE and role is Role.WEIGHTS else {role}
            row = next((row for row in rows if row[0] in wanted), None)
            assert row is not None, f"{task.name}: {role} is not in its recipe, or not there"
            assert row[1] is tier
            assert mode in row[2]
        assert all(graph.pool[access.pool].tier is access.tier for access in task.accesses)
        assert {access.role for access in task.accesses} <= set(TENSOR_OF)


@pytest.mark.parametrize("knobs", SCHEDULES[:2], ids=["streamed", "every mechanism"])
def test_copies_read_what_they_move_on_one_tier_and_write_it_on_the_other(knobs: dict):
    model = tiny_model()
    copies = [
        task
        for task in lower(model, tiny_policy(model, **knobs), tiny_workload(), FOOTPRINT).tasks
        if task.kind is TaskKind.COPY
    ]
    assert copies
    for task in copies:
        assert [(role, tier, {mode}) for role, tier, mode in accesses(task)] == recipe(task, model)


def test_no_row_of_the_tables_is_there_for_nothing():
    found: dict[tuple[TaskKind, UnitRole] | TaskKind, set[Role]] = {}
    operations: set[Operation] = set()
    for tied in (False, True):
        model = tiny_model(tied_embeddings=tied)
        for knobs in SCHEDULES:
            for task in lower(model, tiny_policy(model, **knobs), tiny_workload(), FOOTPRINT).tasks:
                operations.add(task.operation)
                key = (task.kind, model.role(task.unit)) if task.kind in COMPUTE_KINDS else task.kind
                found.setdefault(key, set()).update(role for role, _, _ in accesses(task))
    assert len(operations) == 18
    assert found.pop(TaskKind.COPY) == set(COPIED_AS.values())
    assert found.keys() == COMPUTE.keys() | PASSES.keys()
    for key, roles in found.items():
        rows = COMPUTE[key] if isinstance(key, tuple) else PASSES[key]
        assert roles - {Role.WEIGHTS} == {role for role, _ in rows} - {Role.WEIGHTS}, key
