"""What lossy state costs: a small model that learns, trained by the runtime with state of every format on the same data.

    python benchmarks/state_formats.py -o reports/state-formats-DATE [--steps 400] [--lr 1e-3]

The project's own documents are the text, one of them is held out. Every run has the same seed, so the same weights to start
from and the same order of sequences. The loss on the held-out text is that of the exported model in transformers. Where
torchao is installed, its AdamW8bit trains the same model in plain PyTorch, with weights in bf16.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoModelForCausalLM

from runtime.inputs.data import TokenWindows
from slideplan import __version__
from slideplan.policy import STATE_FORMATS

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
HELD_OUT = "checkpoints.md"
SEQ_LEN, BATCH, SEED = 128, 8, 0
SMOOTHED = 20  # steps of a mean in the plot


def documents() -> tuple[list[Path], Path]:
    """Texts to train on, and the one that is held out."""
    texts = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    return [text for text in texts if text.name != HELD_OUT], ROOT / "docs" / HELD_OUT


def command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def held_out_loss(model: torch.nn.Module, text: Path) -> float:
    """Mean loss of bytes, in windows as they are trained on."""
    tokens = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


def trained(state: str, folder: Path, model: str, steps: int, lr: float) -> dict[str, Any]:
    """Losses of a run by slideplan, and of what it exports to FOLDER/STATE-model on the held-out text."""
    plan, run = folder / f"{state}.json", folder / state
    machine = folder / "machine.json"
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for text in documents()[0]:
        shutil.copy(text, folder / "text")
    if not machine.exists():
        command("planner", "profile", "--quick", "--device", "cpu", "--model", model, "--seq-len", str(SEQ_LEN),
                "--micro-batch", str(BATCH), "--name", "here", "-o", str(machine))  # fmt: skip
    command("planner", "simulate", "--model", model, "--machine", str(machine), "--seq-len", str(SEQ_LEN),
            "--global-batch", str(BATCH), "--placement", "host", "--state", state, "-o", str(plan))  # fmt: skip
    command("runtime", "execute", str(plan), "--device", "cpu", "--steps", str(steps), "--lr", str(lr), "--seed", str(SEED),
            "--data", str(folder / "text"), "-o", str(run))  # fmt: skip
    command("runtime", "export", str(run), "-o", str(folder / f"{state}-model"))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    exported = AutoModelForCausalLM.from_pretrained(folder / f"{state}-model", dtype=torch.float32)
    return {"losses": losses, "held_out_loss": held_out_loss(exported, documents()[1])}


def torchao_trained(folder: Path, model: str, steps: int, lr: float) -> dict[str, Any] | None:
    """The same model from the same start by torchao's AdamW8bit on bf16 weights, rounded at random; None without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.optim import AdamW8bit  # noqa: PLC0415 - where it is installed

    torch.compiler.set_stance("force_eager")  # it compiles its step, which takes minutes on a CPU

    trained("exact", folder / "start", model, 1, 0.0)  # leaves the weights as they are drawn
    network = AutoModelForCausalLM.from_pretrained(folder / "start" / "exact-model", dtype=torch.bfloat16)
    optimizer = AdamW8bit(network.parameters(), lr=lr, weight_decay=0.0, bf16_stochastic_round=True)
    # As the runtime reads a folder: by name, documents end with two line feeds. The order of sequences is then the same.
    content = b"".join(text.read_bytes() + b"\n\n" for text in sorted(documents()[0], key=lambda text: text.name))
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).numpy().astype("uint32")
    windows = TokenWindows(tokens, SEQ_LEN, BATCH, SEED)
    losses = []
    for step in range(steps):
        batch = windows.micro_batch(step, 0, BATCH)
        logits = network(input_ids=batch.inputs.view(BATCH, -1)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "held_out_loss": held_out_loss(network.float(), documents()[1])}


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    exact = found["exact"]["losses"]
    for name, each in found.items():
        smooth = [sum(each["losses"][max(0, i - SMOOTHED) : i + 1]) / (i + 1 - max(0, i - SMOOTHED)) for i in range(len(exact))]
        left.plot(smooth, label=f"{name}: held out {each['held_out_loss']:.4f}", linewidth=1)
        if name != "exact":
            right.plot([a - b for a, b in zip(each["losses"], exact, strict=True)], label=name, linewidth=0.7)
    left.set(xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps")
    right.set(xlabel="step", ylabel="loss minus that of exact state")
    right.axhline(0, color="black", linewidth=0.5)
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=110)


def readme(result: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    exact = found["exact"]
    last = min(50, len(exact["losses"]))

    def end(losses: list[float]) -> float:
        return sum(losses[-last:]) / last

    rows = [
        f"| {name} | {each['losses'][0]:.4f} | {end(each['losses']):.4f} | {end(each['losses']) - end(exact['losses']):+.4f} "
        f"| {each['held_out_loss']:.4f} | {each['held_out_loss'] - exact['held_out_loss']:+.4f} |"
        for name, each in found.items()
    ]
    missing = "" if "torchao AdamW8bit" in found else "\ntorchao was not installed: its AdamW8bit is not compared.\n"
    return "\n".join(
        [
            f"# What lossy state costs, {result['date'][:10]}", "",
            f"`{result['command']}` on {result['device']}, slideplan {__version__}: {result['model']}, "
            f"{result['steps']} steps of {BATCH} x {SEQ_LEN} bytes, lr {result['lr']:g}.", "",
            f"| state | first loss | mean of the last {last} | against exact | held out | against exact |",
            "|---|---|---|---|---|---|", *rows, missing, "![losses](losses.png)", "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    wanted = parser.parse_args()
    wanted.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {state: trained(state, folder, wanted.model, wanted.steps, wanted.lr) for state in STATE_FORMATS}
        by_torchao = torchao_trained(folder, wanted.model, wanted.steps, wanted.lr)
        if by_torchao is not None:
            found["torchao AdamW8bit"] = by_torchao
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": platform.processor() or platform.machine(),
        "versions": {"slideplan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": wanted.model, "steps": wanted.steps, "lr": wanted.lr, "seed": SEED,
    }  # fmt: skip
    (wanted.output / "state_formats.json").write_text(json.dumps(result | {"runs": found}, indent=1) + "\n")
    (wanted.output / "README.md").write_text(readme(result, found))
    plot(found, wanted.output / "losses.png")
    print(readme(result, found))


if __name__ == "__main__":
    main()
