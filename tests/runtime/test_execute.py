"""`runtime execute` and `runtime compare` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from checkpoints import random_state_dict, write_checkpoint
from commands import runtime
from running import plan_for
from runtime import run
from runtime.compute import handlers as compute
from runtime.lanes.backend import CpuBackend
from runtime.optimizer import adamw as optimizer
from runtime.optimizer.adamw import HostUpdate
from runtime.storage.files import Log
from slideplan.codec import save
from slideplan.plan import Plan
from slideplan.policy import OtherSystem
from wording import says

MODEL = tiny_model()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(MODEL, tiny_policy(MODEL), tiny_workload(), CpuBackend())


@pytest.fixture(scope="module")
def run_folder(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder / "plan.json", plan)
    done = runtime("execute", "plan.json", "--steps", 12, "--lr", 3e-3, "--device", "cpu", "-o", "out", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    comparison = json.loads(done.stdout)
    assert comparison["document"] == "comparison"
    assert "loss" in done.stderr
    return folder / "out"


def test_run_folder_holds_everything(run_folder: Path) -> None:
    names = {"plan.json", "run.json", "metrics.jsonl", "measurement.json"}
    names |= {"comparison.json", "comparison.txt", "trace.json", "lanes.png"}
    assert names <= {file.name for file in run_folder.iterdir()}
    losses = [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    measurement = json.loads((run_folder / "measurement.json").read_text())
    assert measurement["losses"] == pytest.approx(losses)
    assert len(measurement["step_ns"]) == 12
    assert measurement["steady_steps"] == list(range(2, 11))
    assert measurement["rehearsed_ns"] > 0
    assert "step, as rehearsed" in (run_folder / "comparison.txt").read_text()
    assert all(start <= end for start, end in measurement["record"]["spans"])


def test_trace_has_both_tracks_under_the_same_names(run_folder: Path) -> None:
    events = json.loads((run_folder / "trace.json").read_text())["traceEvents"]
    names = [{event["name"] for event in events if event["ph"] == "X" and event["pid"] == process} for process in (1, 2)]
    assert names[0] == names[1]
    assert "update host/layer002" in names[0]
    assert all(event.get("ts", 0) >= 0 for event in events)


def test_compare_again_from_the_files(run_folder: Path) -> None:
    before = (run_folder / "comparison.json").read_bytes()
    done = runtime("compare", run_folder, cwd=run_folder)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout
    assert "step time error" in done.stdout
    assert (run_folder / "comparison.json").read_bytes() == before


def test_compare_refuses_another_plans_run(run_folder: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "measurement.json").write_bytes((run_folder / "measurement.json").read_bytes())
    save(tmp_path / "plan.json", msgspec.structs.replace(plan, offloads=False))
    done = runtime("compare", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "the measurement is of plan" in done.stderr
    assert runtime("compare", tmp_path / "nothing", cwd=tmp_path).returncode == 2


def test_checkpoint_with_its_config(plan: Plan, tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan)
    write_checkpoint(tmp_path / "weights", MODEL)
    arguments = ("execute", "plan.json", "--steps", 2, "--weights", "weights", "--device", "cpu")
    done = runtime(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "has no tokenizer.json" in done.stderr
    done = runtime(*arguments, "--byte-tokens", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    write_checkpoint(tmp_path / "other", tiny_model(ffn=192))
    done = runtime("execute", "plan.json", "--steps", 2, "--weights", "other", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "ffn is 192, planned 128" in done.stderr


def test_run_folder_is_not_written_twice(run_folder: Path) -> None:
    before = {file: file.read_bytes() for file in run_folder.rglob("*") if file.is_file()}
    done = runtime("execute", run_folder / "plan.json", "--device", "cpu", "-o", run_folder, cwd=run_folder)
    assert done.returncode == 2
    assert "of an earlier run" in done.stderr
    assert {file: file.read_bytes() for file in run_folder.rglob("*") if file.is_file()} == before


def test_loss_that_is_not_finite_ends_the_run(plan: Plan, tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan)
    tensors = random_state_dict(MODEL)
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    write_checkpoint(tmp_path / "weights", MODEL, tensors)
    done = runtime(
        "execute", "plan.json", "--weights", "weights", "--byte-tokens", "--device", "cpu", "-o", "run", cwd=tmp_path
    )
    assert done.returncode == 1
    said = "runtime: step 0: the loss is nan; look for NaN in weights and data, or lower --lr"
    assert done.stderr.splitlines()[-1] == said, "nothing is saved that one could resume"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 0, "loss": None}
    assert not (tmp_path / "run" / "measurement.json").exists()


def test_norms_of_gradients_are_in_the_metrics(tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan_for(MODEL, tiny_policy(MODEL, gradient_norms=True), tiny_workload(), CpuBackend()))
    done = runtime("execute", "plan.json", "--steps", 3, "--device", "cpu", "-o", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "norm" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"step", "loss", "grad_norm"}] * 3
    assert all(row["grad_norm"] > 0 for row in rows)


def test_norm_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss alone would not have shown it."""
    save(tmp_path / "plan.json", plan_for(MODEL, tiny_policy(MODEL, gradient_norms=True), tiny_workload(), CpuBackend()))
    monkeypatch.setattr(compute, "square_sum", lambda values, out: out.fill_(torch.inf))
    done = runtime("execute", "plan.json", "--steps", 3, "--device", "cpu", "-o", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "runtime: step 0: the grad_norm is inf" in done.stderr
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (row["grad_norm"], row["loss"] > 0) == (None, True)


def changed(plan: Plan, **fields: object) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(plan, **fields))


def threads(plan: Plan, count: int) -> bytes:
    """The plan with this many threads for the optimizer."""
    document = msgspec.json.decode(msgspec.json.encode(plan))
    document["machine"]["optimizer_threads"] = count
    return msgspec.json.encode(document)


BAD = {
    "truncated": (lambda plan: msgspec.json.encode(plan)[:-100], "not valid JSON"),
    "other version": (lambda plan: changed(plan, format_version=99), "`format_version` is 99"),
    "unknown field": (lambda plan: msgspec.json.encode(plan)[:-1] + b',"speed":9}', "unknown field `speed`"),
    "another document": (lambda plan: b'{"document":"machine_profile"}', "expected a 'plan' document"),
    "another machine": (
        lambda plan: changed(
            plan,
            machine=msgspec.structs.replace(
                plan.machine, identity=msgspec.structs.replace(plan.machine.identity, gpu="RTX 9090")
            ),
        ),
        "gpu: RTX 9090",
    ),
    "another model": (
        lambda plan: changed(plan, model=msgspec.structs.replace(plan.model, hidden=128)),
        "`model` was changed after planning",
    ),
    "other release": (lambda plan: changed(plan, version="0.0.1"), "was made by slideplan 0.0.1"),
    "another policy": (
        lambda plan: changed(plan, policy=msgspec.structs.replace(plan.policy, gradient_slots=1)),
        "is not what `policy` lowers to",
    ),
    "smaller slots": (
        lambda plan: changed(
            plan,
            graph=msgspec.structs.replace(
                plan.graph, pools=tuple(msgspec.structs.replace(pool, slot_bytes=128) for pool in plan.graph.pools)
            ),
        ),
        "is not what `policy` lowers to",
    ),
    "another ledger": (
        lambda plan: changed(plan, ledger=msgspec.structs.replace(plan.ledger, tiers={})),
        "`ledger` does not sum up",
    ),
    "a prediction of no time": (
        lambda plan: changed(plan, prediction=msgspec.structs.replace(plan.prediction, host_updates_ns=0)),
        "`prediction` has a step, a task or host updates that take no time",
    ),
    "no threads": (lambda plan: threads(plan, 0), "optimizer_threads is 0, must be in 1.."),
    "more threads than cores": (lambda plan: threads(plan, 1000), "optimizer_threads is 1000, must be in 1.."),
    "no room for its ledger": (
        lambda plan: changed(
            plan,
            ledger=msgspec.structs.replace(
                plan.ledger,
                tiers={tier: msgspec.structs.replace(part, capacity_bytes=1) for tier, part in plan.ledger.tiers.items()},
            ),
        ),
        "`ledger` lacks",
    ),
    "another system's knob": (
        lambda plan: changed(
            plan, policy=msgspec.structs.replace(plan.policy, other=OtherSystem(name="theirs", copy_lanes="shared"))
        ),
        "policy.other is theirs: the plan describes how another system works",
    ),
    "unsafe graph": (
        lambda plan: changed(
            plan,
            graph=msgspec.structs.replace(
                plan.graph, tasks=tuple(msgspec.structs.replace(task, dependencies=()) for task in plan.graph.tasks)
            ),
        ),
        "without waiting for",
    ),
}


def test_a_run_takes_the_threads_of_its_plan(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = plan.machine.identity.cores
    (tmp_path / "plan.json").write_bytes(threads(plan, cores))
    made: list[HostUpdate] = []

    def host_update(count: int) -> HostUpdate:
        made.append(HostUpdate(count))
        return made[-1]

    monkeypatch.setattr(run, "HostUpdate", host_update)
    done = runtime("execute", "plan.json", "--steps", 3, "--device", "cpu", "-o", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [update.threads for update in made] == [cores]
    monkeypatch.setattr(optimizer.numba.config, "NUMBA_NUM_THREADS", cores - 1)
    done = runtime("execute", "plan.json", "--steps", 3, "--device", "cpu", "-o", "refused", cwd=tmp_path)
    assert done.returncode == 2
    assert f"plan.json: machine.optimizer_threads is {cores}, numba gives this process {cores - 1}; unset NUMBA" in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_refused_in_one_line(name: str, plan: Plan, tmp_path: Path) -> None:
    make, message = BAD[name]
    (tmp_path / "plan.json").write_bytes(make(plan))
    done = runtime("execute", "plan.json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says(done.stderr, message)
    assert done.stderr.startswith("runtime: plan.json: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "--data nothing: does not exist"),
        (["--weights", "nothing"], "nothing"),
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--eps", "inf"], "eps is inf"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, plan: Plan, tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan)
    done = runtime("execute", "plan.json", "--device", "cpu", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says(done.stderr, message)
    assert done.stderr.count("\n") == 1


def test_missing_plan(tmp_path: Path) -> None:
    done = runtime("execute", "plan.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "plan.json: cannot be read: No such file" in done.stderr


def test_a_run_that_was_not_finished_says_so(plan: Plan, tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan)
    done = runtime("compare", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no measurement.json yet: its run was not finished; `runtime resume .` goes on" in done.stderr


def test_a_captured_plan_is_refused_on_a_cpu_before_anything_is_written(plan: Plan, tmp_path: Path) -> None:
    graphed = msgspec.structs.replace(plan.policy, kernels="graphed")
    save(tmp_path / "plan.json", msgspec.structs.replace(plan, policy=graphed))
    done = runtime("execute", "plan.json", "--device", "cpu", "-o", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing can be captured on a CPU" in done.stderr
    assert not (tmp_path / "run" / "plan.json").exists()


def test_plan_that_needs_more_memory_than_is_free(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.checks.available_host_bytes", lambda: 1 << 20)
    save(tmp_path / "plan.json", plan)
    done = runtime("execute", "plan.json", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "of host memory" in done.stderr
    assert "lacks" in done.stderr


@pytest.mark.parametrize(
    ("spared", "message"),
    [
        (
            "adamw.Rehearsal",
            "all lanes stopped: lane host_update, step 0, task update host/head, unit 5: RuntimeError: memory",
        ),
        ("str", "runtime: rehearsing update host/head: RuntimeError: memory chip missing"),
    ],
)
def test_failure_in_a_lane_is_exit_code_1(tmp_path: Path, plan: Plan, spared: str, message: str) -> None:
    save(tmp_path / "plan.json", plan)
    broken = (
        "import sys\n"
        "from runtime import handlers, cli\n"
        "from runtime.optimizer import adamw\n"
        "def fail(*arguments):\n"
        f"    if not any(isinstance(each, {spared}) for each in arguments): raise RuntimeError('memory chip missing')\n"
        "handlers.HostUpdate.__call__, handlers.HostUpdate.compile = fail, lambda self: None\n"
        "sys.argv = ['runtime', 'execute', 'plan.json', '--device', 'cpu']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr.replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in done.stderr


def test_run_folder_that_cannot_be_made_is_refused_before_anything_else(plan: Plan, tmp_path: Path) -> None:
    save(tmp_path / "plan.json", plan)
    (tmp_path / "file").write_text("")
    done = runtime("execute", "plan.json", "--device", "cpu", "-o", "file/run", cwd=tmp_path)
    assert done.returncode == 2
    assert "file/run: cannot be written" in done.stderr
    assert runtime("execute", "plan.json", "--seed", "-1", "--device", "cpu", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("losses", [False, True])
def test_interrupt_says_where_the_losses_are(losses: bool, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(session: object, steps: int, log: Log, *_: object) -> None:
        if losses:
            log.append(b'{"step": 0, "loss": 5.5}\n')
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.run.train", interrupt)
    save(tmp_path / "plan.json", plan)
    done = runtime("execute", "plan.json", "--device", "cpu", "-o", "run", cwd=tmp_path)
    assert done.returncode == 130
    assert ("interrupted; losses so far are in run/metrics.jsonl" in done.stderr) == losses
    assert (tmp_path / "run").exists() == losses
