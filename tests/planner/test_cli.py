from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from builders import GB_PER_S, tiny_machine
from planner import cli
from planner.catalogue import machines as catalogue
from planner.catalogue.here import ThisMachine
from slideplan import codec
from slideplan.machine.profile import MachineProfile, Spread
from slideplan.plan import Plan
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes, format_ns
from wording import says


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs `planner ...` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    here = ThisMachine(gpus=("test gpu",), cpu="test cpu", cores=4, host_memory_bytes=4 << 30)  # that of `tiny_machine`
    monkeypatch.setattr(catalogue, "this_machine", lambda: here)

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["planner", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run


def test_simulate_prints_verdict_and_names_the_profile_taken(planner: Any) -> None:
    outcome = planner("simulate", "--model", "tiny")
    assert outcome.code == 0
    assert outcome.out.startswith("tiny: fits on the GPU without offloading, ")
    assert "tokens/s predicted, bound by" in outcome.out
    assert "taking the shipped rtx4090-256gib" in outcome.err
    assert "planner profile" in outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_simulate_says_what_saves_cost(planner: Any) -> None:
    """From the drive's rate to what `--save-every` adds, of a checkpoint and of weights alone; figures as in the plan."""
    common = ("simulate", "--model", "tiny", "--placement", "host", "--machine", "h100-80gb-125gib")
    outcome = planner(*common, "-o", "plan.json")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 100
    plan = codec.load("plan.json", Plan)
    save, step_ns = plan.prediction.save, plan.prediction.record.step_ns
    assert save is not None
    head = next(line for line in outcome.out.splitlines() if "training pauses" in line)
    assert re.split(r"  +", head.strip()) == [
        "size",
        "drive writes",
        "training pauses",
        "copied aside",
        "every 500",
        "every 100",
    ]
    for name, size in (("checkpoint", save.checkpoint_bytes), ("weights alone", save.weights_bytes)):
        line = next(line for line in outcome.out.splitlines() if line.startswith(f"{name} "))
        assert re.split(r"  +", line.strip()) == [
            name, format_bytes(size), format_ns(save.write_ns(size)), format_ns(save.pause_ns(size)), format_bytes(size),
            *(f"+{save.added(size, every, step_ns):.1%}" for every in (500, 100)),
        ]  # fmt: skip
    assert "the drive takes 2.83 GiB/s" in outcome.out
    assert "what `--save-every 500`, or `--save-weights-every 500`, adds to the run" in outcome.out
    document = json.loads(planner(*common, "--json").out)
    assert document["prediction"]["save"] == msgspec.to_builtins(save)


def test_simulate_without_a_drive_says_what_to_do(planner: Any) -> None:
    outcome = planner("simulate", "--model", "tiny", "--machine", "rtx4090-2tib")
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("checkpoint "))
    assert re.split(r"  +", line.strip())[2:4] == ["-", "-"]
    said = " ".join(outcome.out.split())
    assert "no drive was measured, so what a save takes is not known: run `planner profile` on the drive and plan again" in said
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_simulate_writes_a_plan_that_loads_and_repeats(planner: Any) -> None:
    for name in ("a.json", "b.json"):
        assert planner("simulate", "--model", "tiny", "--placement", "host", "-o", name).code == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    plan = codec.load("a.json", Plan)
    plan.check("a.json")
    assert plan.offloads
    assert plan.workload.seq_len == 512  # the default, cut to what the model takes


def test_norms_of_gradients_are_planned_where_asked_for(planner: Any) -> None:
    steps = []
    for flags in ((), ("--gradient-norms",)):
        outcome = planner("simulate", "--model", "tiny", "--global-batch", "4", *flags, "-o", "plan.json")
        assert outcome.code == 0
        plan = codec.load("plan.json", Plan)
        assert plan.policy.gradient_norms == bool(flags) == ("their norm is measured" in " ".join(outcome.out.split()))
        steps.append(plan.prediction.record.step_ns)
    assert steps[0] < steps[1] < 1.2 * steps[0]


def test_simulate_json_is_all_that_stdout_holds(planner: Any) -> None:
    outcome = planner("simulate", "--model", "tiny", "--json", "--machine", "rtx4090-128gib")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["document"] == "plan"


def test_a_model_that_does_not_fit_is_exit_code_3(planner: Any) -> None:
    outcome = planner("simulate", "--model", "123b", "--machine", "rtx4090-128gib", "--ssd-memory", "0", "-o", "plan.json")
    assert outcome.code == 3
    assert outcome.out.splitlines()[0].startswith("mistral-large-123b: does not fit: lacks ")
    assert "GiB of HOST memory" in outcome.out.splitlines()[0]
    assert "rtx4090-256gib" in " ".join(outcome.out.split())
    assert "rtx4090-2tib, rtx4090-64gib would do" in " ".join(outcome.out.split())  # with their drives
    assert not Path("plan.json").exists()
    assert "not written" in outcome.err
    as_json = planner("simulate", "--model", "123b", "--machine", "rtx4090-128gib", "--ssd-memory", "0", "--json")
    assert as_json.code == 3
    assert json.loads(as_json.out)["document"] == "does_not_fit"


def test_budgets_change_the_answer(planner: Any) -> None:
    model = ("simulate", "--model", "llama-3.2-1b", "--machine", "rtx4090-128gib", "--effort", "0.01")
    assert planner(*model, "--host-memory", "1GiB", "--gpu-memory", "12GiB").code == 3
    assert "fits, " in planner(*model, "--gpu-memory", "12GiB").out


def test_objectives_front_and_explanations_are_printed(planner: Any) -> None:
    common = ("simulate", "--model", "tiny", "--placement", "host", "--pareto", "--explain")
    fast = planner(*common, "--max-tokens-per-step", "1024")
    lean = planner(*common, "--objective", "least-host-memory", "--at-least", "50%")
    for outcome in (fast, lean):
        assert outcome.code == 0
        assert "What another value of each knob would cost" in outcome.out
        assert "Speed against memory" in outcome.out
        assert max(map(len, outcome.out.splitlines())) <= 100
    assert re.search(r"global batches +2, 1", fast.out)
    assert "least host memory at 50 % of the best speed or more" in lean.out
    assert "takes less host memory" in " ".join(lean.out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "tinny"), "model 'tinny' is neither in the catalogue"),
        (("--model", "tiny", "--machine", "nowhere"), "machine 'nowhere' is neither a known profile nor a file"),
        (("--model", "tiny", "--machine", "broken.json"), "broken.json: not valid JSON"),
        (("--model", "tiny", "--seq-len", "513"), "seq_len 513 exceeds the 512 positions of tiny"),
        (("--model", "tiny", "--seq-len", "0"), "seq_len is 0, must be in 1.."),
        (("--model", "tiny", "--global-batch", "-1"), "global_batch is -1, must be in 1.."),
        (("--model", "tiny", "--micro-batch", "3"), "micro-batch 3 does not divide the global batch 8"),
        (("--model", "tiny", "--gpu-memory", "lots"), "--gpu-memory: size 'lots' is not understood"),
        (("--model", "tiny", "--host-memory", "0"), "--host-memory is 0, must be positive"),
        (("--model", "tiny", "--effort", "0"), "--effort is 0.0, must be above 0"),
        (("--model", "tiny", "--max-tokens-per-step", "100"), "100 tokens per step are fewer than one sequence of 512"),
        (("--model", "tiny", "--max-tokens-per-step", "9999", "--global-batch", "2"), "searches the global batch"),
        (("--model", "tiny", "--at-least", "90%"), "--at-least belongs to --objective least-host-memory"),
        (("--model", "tiny", "--objective", "least-host-memory", "--at-least", "0"), "must be above 0% and at most 100%"),
        (("--model", "tiny", "--objective", "least-host-memory", "--at-least", "much"), "must be a percentage like 95%"),
        (("--model", "tiny", "-o", "broken.json/plan.json"), "broken.json/plan.json: cannot be written"),
        (("--model", "tiny", "-o", "."), ".: is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(planner: Any, arguments: tuple[str, ...], message: str) -> None:
    Path("broken.json").write_text("{")
    outcome = planner("simulate", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("planner: ")
    assert says(outcome.err, message)


def test_unknown_options_are_exit_code_2(planner: Any) -> None:
    assert planner("simulate", "--model", "tiny", "--fast").code == 2
    assert planner("simulate").code == 2


def test_help_has_examples_and_exit_codes(planner: Any) -> None:
    for command in ("profile", "simulate", "models", "machines", "compare"):
        assert "Examples:" in planner(command, "--help").out
    assert "3 the model does not fit" in planner("simulate", "--help").out


def test_catalogues_are_listed(planner: Any) -> None:
    models, known = planner("models"), planner("machines")
    assert "mistral-large-123b   122.610 G" in models.out
    assert "rtx4090-2tib" in known.out
    assert max(map(len, (models.out + known.out).splitlines())) <= 100
    drive = next(line for line in known.out.splitlines() if re.match(r"rtx4090-256gib +4\.00 TB", line))
    assert re.split(r"  +", drive.strip()) == ["rtx4090-256gib", "4.00 TB", "7.0", "1.8", "2.9", "6.0", "2,400.00 TB"]
    shapes = {model["name"]: model for model in json.loads(planner("models", "--json").out)}
    assert shapes["mistral-large-123b"]["parameters"] == 122_610_069_504
    assert "h200-503gib" in {machine["name"] for machine in json.loads(planner("machines", "--json").out)}


def test_a_broken_local_profile_does_not_hide_the_others(planner: Any) -> None:
    Path("profiles").mkdir()
    Path("profiles/mine.json").write_text("{")
    outcome = planner("machines")
    assert outcome.code == 0
    assert "rtx4090-2tib" in outcome.out
    assert "mine.json" in outcome.err


# -- compare -----------------------------------------------------------------------------------


def test_compare_names_the_gain_and_what_costs_each_system(planner: Any) -> None:
    outcome = planner("compare", "--model", "qwen3-0.6b", "--machine", "rtx4090-128gib", "--gpu-memory", "8GiB")
    assert outcome.code == 0
    assert "x the fastest other system that fits" in outcome.out.splitlines()[0]
    for name in ("slideplan", "slideformer", "zero3-offload", "megatrain"):
        assert f"\n{name}" in outcome.out
    assert "B of DRAM traffic per parameter" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_compare_json_is_all_that_stdout_holds(planner: Any) -> None:
    outcome = planner("compare", "--model", "tiny", "--machine", "rtx4090-128gib", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert found["document"] == "peer_comparison"
    assert found["contenders"][0]["name"] == "slideplan"
    assert found["contenders"][1]["policy"]["other"]["master"] == "fp32"


def test_compare_without_a_plan_is_exit_code_3_and_says_what_each_lacks(planner: Any) -> None:
    outcome = planner("compare", "--model", "123b", "--machine", "rtx4090-128gib", "--ssd-memory", "0")
    assert outcome.code == 3
    assert outcome.out.startswith("mistral-large-123b: does not fit, nor does any of the others")
    assert outcome.out.count("does not fit: lacks") >= 4


def test_compare_refuses_bad_input(planner: Any) -> None:
    outcome = planner("compare", "--model", "tiny", "--seq-len", "513")
    assert (outcome.code, outcome.out) == (2, "")
    assert "exceeds the 512 positions" in outcome.err


# -- profile -----------------------------------------------------------------------------------


@dataclass
class FakeRequest:
    name: str
    models: tuple[Any, ...]
    shapes: tuple[tuple[int, int], ...]
    kernels: tuple[str, ...]
    quick: bool
    device: str
    gpu_memory_bytes: int | None
    host_memory_bytes: int | None
    command: str
    ssd: Path | None


@pytest.fixture
def remeasured() -> dict[str, int]:
    """What the optimizer's rate turns out to be."""
    return {"host": 30 * GB_PER_S}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, remeasured: dict[str, int]) -> list[FakeRequest]:
    """Probes that measure nothing, and what they were asked for."""
    seen: list[FakeRequest] = []

    def profile_machine(request: FakeRequest, show: Show) -> MachineProfile:
        seen.append(request)
        show(Progress("links", 1, 2))
        optimizer = msgspec.structs.replace(tiny_machine().optimizer, host_bytes_per_s=Spread.exact(remeasured["host"]))
        return tiny_machine(name=request.name, optimizer=optimizer)

    probes = types.ModuleType("runtime.probes.profile")

    def measure_again(profile: MachineProfile, show: Show) -> dict[str, Spread]:
        show(Progress("links", 1, 1))
        return {"AdamW on the host": Spread.exact(remeasured["host"]), "AdamW on the device": Spread.exact(800 * GB_PER_S)}

    probes.ProfileRequest, probes.profile_machine = FakeRequest, profile_machine  # type: ignore[attr-defined]
    probes.measure_again = measure_again  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runtime.probes.profile", probes)
    return seen


def test_profile_writes_where_simulate_looks(planner: Any, requests: list[FakeRequest]) -> None:
    outcome = planner(
        "profile", "--device", "cpu", "--name", "here", "--micro-batch", "1", "--micro-batch", "2", "--seq-len", "64",
        "--gpu-memory", "1GiB",
    )  # fmt: skip
    assert outcome.code == 0
    (request,) = requests
    assert [model.name for model in request.models] == ["demo"]
    assert request.shapes == ((1, 64), (2, 64))
    assert (request.device, request.gpu_memory_bytes, request.host_memory_bytes) == ("cpu", 1 << 30, None)
    assert codec.load("profiles/here.json", MachineProfile) == tiny_machine(name="here")
    assert "p10" in outcome.out
    after = planner("simulate", "--model", "tiny", "--json")
    assert json.loads(after.out)["machine"]["name"] == "here"
    assert "taking the shipped" not in after.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model", "nope"), "model 'nope'"),
        (("--seq-len", "0"), "at least 1"),
        (("--seq-len", "100000"), "exceeds the 1024 positions of demo"),
        (("--name", "a/b"), "--name 'a/b'"),
        (("-o", "."), ".: is a folder"),
    ],
)
def test_profile_refuses_bad_input(planner: Any, requests: list[FakeRequest], arguments: tuple[str, ...], message: str) -> None:
    outcome = planner("profile", "--device", "cpu", *arguments)
    assert outcome.code == 2
    assert says(outcome.err, message)
    assert not requests


def test_a_profile_is_held_against_the_one_that_it_replaces(
    planner: Any, requests: list[FakeRequest], remeasured: dict[str, int]
) -> None:
    assert "differ" not in planner("profile", "--device", "cpu", "--name", "here").out
    assert "all 5 figures agree" in planner("profile", "--device", "cpu", "--name", "here").out
    remeasured["host"] = 20 * GB_PER_S
    out = planner("profile", "--device", "cpu", "--name", "here").out
    assert "1 of 5 figures differ" in out
    (row,) = [line for line in out.splitlines() if "-33.3%" in line]
    assert row.split() == ["AdamW", "on", "the", "host", "30.00", "30.00-30.00", "20.00", "20.00-20.00", "G/s", "-33.3%"]


def test_the_drive_of_a_folder_is_measured(planner: Any, requests: list[FakeRequest], tmp_path: Path) -> None:
    assert planner("profile", "--device", "cpu", "--name", "here", "--ssd", str(tmp_path)).code == 0
    assert requests[-1].ssd == (tmp_path,)
    outcome = planner("profile", "--device", "cpu", "--name", "here", "--ssd", "nowhere")
    assert outcome.code == 2
    assert "--ssd nowhere: is not a folder; name one on the drive to measure" in outcome.err


def test_check_says_what_holds_and_writes_nothing(
    planner: Any, requests: list[FakeRequest], remeasured: dict[str, int]
) -> None:
    assert planner("profile", "--device", "cpu", "--name", "here").code == 0
    written = Path("profiles/here.json").read_bytes()
    outcome = planner("profile", "--check")
    assert (outcome.code, outcome.out.count("yes")) == (0, 2)
    assert "all 2 figures hold" in outcome.err
    remeasured["host"] = 20 * GB_PER_S
    for which in ((), ("profiles/here.json",), ("here",)):
        outcome = planner("profile", "--check", *which)
        assert (outcome.code, outcome.out.count("yes"), outcome.out.count("NO")) == (4, 1, 1)
        assert "1 of 2 figures do not hold" in outcome.err
    assert Path("profiles/here.json").read_bytes() == written
    assert "4 a figure checked does not hold" in " ".join(planner("profile", "--help").out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--check",), "no profile of this machine in profiles/"),
        (("--check", "rtx4090-2tib"), "figures from datasheets, there is nothing to check"),
        (("--check", "nowhere"), "machine 'nowhere'"),
        (("here.json",), "only --check takes a profile"),
    ],
)
def test_check_needs_a_measured_profile(
    planner: Any, requests: list[FakeRequest], arguments: tuple[str, ...], message: str
) -> None:
    outcome = planner("profile", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says(outcome.err, message)


WITHOUT_TORCH = """
import importlib.abc, pkgutil, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numba", "transformers"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import slideplan, simulator
for package in (slideplan, simulator):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        __import__(module.name)
from planner.cli import main
sys.argv = ["planner", *sys.argv[1:]]
main()
"""


def _without_torch(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )


def test_simulates_where_torch_is_absent(tmp_path: Path) -> None:
    run = _without_torch(tmp_path, "simulate", "--model", "tiny")
    assert run.returncode == 0, run.stderr
    assert "tokens/s predicted" in run.stdout


def test_profile_without_the_runtime_says_what_to_install(tmp_path: Path) -> None:
    run = _without_torch(tmp_path, "profile")
    assert run.returncode == 2
    assert "install slideplan[runtime]" in run.stderr
    assert len(run.stderr.splitlines()) == 1
