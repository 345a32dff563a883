"""Element-wise kernels and reductions against baselines and the device's copy rate, all in one run: GB/s.

    python benchmarks/element_kernels.py -o element_kernels.json                # on a GPU: a minute
    python benchmarks/element_kernels.py --device cpu --tokens 64               # a smoke test: torch and numba alone

Bytes are what has to be read and written at least, so rates of one row compare; torch's AdamW has a row of its own.
Baselines are torch's own operators, and liger-kernel's where that is installed and has one that does the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.benchmark import Timer

from runtime.compute import operators
from runtime.handlers import updates_of
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.optimizer.host_lossy import blank_state
from runtime.optimizer.rounding import Draws
from slideplan import __version__
from slideplan.lowering.sizes import update_bytes
from slideplan.placement import Tier
from slideplan.policy import STATE_FORMATS

HIDDEN, FFN, HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 128, 128256  # of an 8B model
LOSS_ROWS = 2048
LAYER_ELEMENTS = 218_112_000


class Kernel(NamedTuple):
    """What is timed, and what does the same. Bytes: read and written at least."""

    size_bytes: int
    run: Callable[[], object]
    baselines: dict[str, Callable[[], object]]


def kernels(tokens: int, scale: int, device: torch.device) -> dict[str, Kernel]:
    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    hidden, gradient, residual, out = (values(tokens, HIDDEN) for _ in range(4))
    weight = values(HIDDEN)
    _, factor = operators.rms_norm(hidden, weight, 1e-5)
    gate, up, product = (values(tokens, FFN) for _ in range(3))
    heads, angles = values(tokens, HEADS, HEAD_DIM), values(tokens, HEAD_DIM)
    rows = min(tokens, LOSS_ROWS)
    logits, labels = values(rows, VOCABULARY), torch.randint(0, VOCABULARY, (rows,), device=device)
    n = LAYER_ELEMENTS // scale // 256 * 256
    layer = values(n)
    norm = torch.zeros((), device=device)
    found = {
        "rms_norm": Kernel(
            4 * hidden.numel(),
            lambda: operators.rms_norm(hidden, weight, 1e-5),
            {"torch": lambda: functional.rms_norm(hidden, (HIDDEN,), weight, 1e-5)},
        ),
        "rms_norm_backward, with the residual": Kernel(
            8 * hidden.numel(), lambda: operators.rms_norm_backward(hidden, weight, factor, gradient, out, residual), {}
        ),
        "rotate, in place": Kernel(4 * heads.numel(), lambda: operators.rotate(heads, angles, angles), {}),
        "swiglu": Kernel(
            6 * gate.numel(), lambda: operators.swiglu(gate, up, product), {"torch": lambda: functional.silu(gate) * up}
        ),
        "swiglu_backward, in place": Kernel(12 * gate.numel(), lambda: operators.swiglu_backward(gate, up, product), {}),
        "cross_entropy, gradient in place": Kernel(
            4 * logits.numel(),
            lambda: operators.cross_entropy_in_place(logits, labels, 1e-4),
            {"torch, forward alone": lambda: functional.cross_entropy(logits, labels)},
        ),
        "square_sum": Kernel(
            2 * n,
            lambda: operators.square_sum(layer, norm),
            {"torch": lambda: torch.linalg.vector_norm(layer, dtype=torch.float32)},
        ),
    }
    for state in STATE_FORMATS:
        update = updates_of(state, device, HostUpdate(torch.get_num_threads()))[Tier.GPU]
        weights, *rest = blank_state(n, state, device)
        weights.copy_(layer)
        found[f"AdamW, {state} state"] = Kernel(
            update_bytes(n, "split", state, "bf16"),
            lambda update=update, kept=(weights, *rest): update(*kept, layer, AdamW(), 1, Draws(0)),
            {},
        )
    found["torch.optim.AdamW of fp32 weights"] = Kernel(28 * n, torch_adamw(n, device), {})
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # noqa: PLC0415 - may be absent
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # noqa: PLC0415
    except ImportError:
        return found
    if device.type == "cuda":
        found["rms_norm"].baselines["liger"] = lambda: LigerRMSNormFunction.apply(hidden, weight, 1e-5)
        found["swiglu"].baselines["liger"] = lambda: LigerSiLUMulFunction.apply(gate, up)
    return found


def torch_adamw(n: int, device: torch.device) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.zeros(n, device=device))
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], fused=device.type == "cuda").step


def seconds(action: Callable[[], object]) -> float:
    with torch.no_grad():
        return float(Timer("action()", globals={"action": action}).blocked_autorange(min_run_time=0.3).median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    source = torch.zeros((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    copy_gb_per_s = 2 * source.numel() / seconds(lambda: destination.copy_(source)) / 1e9
    rows = {}
    print(f"{'copy within the device':40s} {copy_gb_per_s:8.0f} GB/s")
    for name, kernel in kernels(options.tokens, 1 if device.type == "cuda" else 256, device).items():
        rates = {
            who: kernel.size_bytes / seconds(action) / 1e9 for who, action in {"GB/s": kernel.run, **kernel.baselines}.items()
        }
        rows[name] = {"size_bytes": kernel.size_bytes, "of_copy": round(rates["GB/s"] / copy_gb_per_s, 3)} | {
            who: round(rate, 1) for who, rate in rates.items()
        }
        others = "".join(f", {who} {rate:.0f}" for who, rate in rates.items() if who != "GB/s")
        print(f"{name:40s} {rates['GB/s']:8.0f} GB/s, {rates['GB/s'] / copy_gb_per_s:4.0%} of a copy{others}", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "python": platform.python_version(), "torch": torch.__version__, "slideplan": __version__,
        "command": " ".join(sys.argv), "tokens": options.tokens, "copy_gb_per_s": round(copy_gb_per_s, 1), "kernels": rows,
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
