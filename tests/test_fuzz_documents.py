"""Plans and profiles that are broken in any way: refused in one line, never a traceback, a hang, or gigabytes."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from fuzzing import readings
from planner import cli
from planner.catalogue import machines as catalogue
from planner.catalogue.here import ThisMachine
from planner.catalogue.machines import DEFAULT_MACHINE, default_machine, find_machine
from running import plan_for
from runtime.lanes.backend import CpuBackend
from slideplan import codec
from slideplan.machine.profile import MachineProfile
from slideplan.plan import Plan

# What stands in fields that somebody has edited, or that another program wrote.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**30, -(2**63), 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", "../../x", "a" * 100_000, "\0", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "NaN"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


@cache
def plan() -> bytes:
    model = tiny_model(layers=2)
    return codec.encoded(plan_for(model, tiny_policy(model), tiny_workload(), CpuBackend()))


@cache
def profile() -> bytes:
    return codec.encoded(tiny_machine())


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inside for place in places(each, (*at, key)))]


@st.composite
def edited(draw: st.DrawFn, whole: bytes) -> bytes:
    """The document with up to three values changed, removed, doubled or renamed."""
    document = json.loads(whole)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from([place for place in places(document) if place]))
        inside = document
        for key in above:
            inside = inside[key]
        match draw(st.sampled_from(["change", "remove", "double", "rename"])):
            case "change":
                inside[last] = draw(VALUES)
            case "remove":
                del inside[last]
            case "double" if isinstance(inside, list):
                inside.insert(last, inside[last])
            case "rename" if isinstance(inside, dict):
                inside[draw(st.text(max_size=8))] = inside.pop(last)
    return json.dumps(document, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of the document: cut off, with some overwritten, or with something put in."""
    raw = bytearray(whole)
    at = draw(st.integers(0, len(raw)))
    match draw(st.sampled_from(["cut", "overwrite", "insert", "nest"])):
        case "cut":
            del raw[at:]
        case "overwrite":
            some = draw(st.binary(min_size=1, max_size=8))
            raw[at : at + len(some)] = some
        case "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=8))
        case "nest":
            raw[at:at] = draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([10, 2_000, 200_000]))
    return bytes(raw)


def broken(whole: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=200), damaged(whole), edited(whole))


def is_one_line(error: ValueError, file: str) -> None:
    message = str(error)
    assert file in message
    assert "Traceback" not in message


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Documents of these tests, in a working folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        Path("profiles").mkdir()
        here = ThisMachine(gpus=("test gpu",), cpu="test cpu", cores=4, host_memory_bytes=4 << 30)
        patch.setattr(catalogue, "this_machine", lambda: here)
        yield


@readings(60)
@given(st.deferred(lambda: broken(plan())))
def test_a_plan_is_whole_or_refused(raw: bytes) -> None:
    Path("plan.json").write_bytes(raw)
    try:
        found = codec.load("plan.json", Plan)
        found.check("plan.json")
    except ValueError as error:
        is_one_line(error, "plan.json")
    else:
        assert found.graph == msgspec.json.decode(plan(), type=Plan).graph


@readings(60)
@given(st.deferred(lambda: broken(profile())))
def test_a_profile_is_whole_or_refused_and_never_in_the_way(raw: bytes) -> None:
    Path("profiles/some.json").write_bytes(raw)
    try:
        find_machine("profiles/some.json")
    except ValueError as error:
        is_one_line(error, "profiles/some.json")
        choice = default_machine()
        assert choice.machine.name == DEFAULT_MACHINE
        assert choice.notes[0].startswith("left out: profiles/some.json: ")
        assert not any("\n" in note for note in choice.notes)
    else:
        assert not any(note.startswith("left out") for note in default_machine().notes)


@readings(20)
@given(st.deferred(lambda: edited(profile())))
@example(profile())
def test_a_model_is_planned_on_whatever_profile_is_read(raw: bytes) -> None:
    """By the command itself: figures that are possible and absurd lead to an answer, or to one line."""
    Path("absurd.json").write_bytes(raw)
    arguments = ["planner", "simulate", "--model", "tiny", "--machine", "absurd.json", "--effort", "0.001"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code in (0, 2, 3)


def test_random_bytes_of_any_length_are_no_document() -> None:
    generator = random.Random(0)
    for length in (0, 1, 10, 1000, 100_000):
        Path("noise.json").write_bytes(generator.randbytes(length))
        for kind in (Plan, MachineProfile):
            with pytest.raises(ValueError, match=r"noise\.json: not "):
                codec.load("noise.json", kind)
