"""Layer and loss kernels against their baselines on the same machine in the same run: times, TFLOP/s, ratios.

    python benchmarks/kernels.py --model llama-3.1-8b --shape 16x1024 -o kernels.json

Baselines are the Hugging Face layer run by autograd, the same with liger-kernel's operators where that is installed,
and the same through torch.compile; for the loss, torch's cross-entropy a chunk at a time and liger's fused linear
cross-entropy. `issue_us` is the host's time to issue the work; TFLOP/s count the products and attention of forward and
backward, and stand beside those of a large product measured in the same run. What is recomputed is no work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from planner.catalogue.models import find_model
from runtime.compute.eager import EagerHead, EagerLayer, rotary_positions, skeleton
from runtime.compute.fused_layer import FusedLayer
from runtime.compute.gradients import GradientSlot
from runtime.compute.head import FusedHead
from slideplan import __version__
from slideplan.lowering.sizes import loss_chunk_tokens
from slideplan.model import ModelSpec, UnitRole

REPEATS = 12
Action = Callable[[], object]


def measured(action: Action, repeats: int = REPEATS) -> dict[str, float]:
    """Median device time, and host time to issue on an idle device. Milliseconds and microseconds."""
    for _ in range(3):
        action()
    torch.cuda.synchronize()
    took, issued = [], []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # the queue is never empty, so that issuing is no part of the time
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end))
        before = time.perf_counter()
        action()
        issued.append((time.perf_counter() - before) * 1e6)
        torch.cuda.synchronize()
    return {"ms": round(statistics.median(took), 4), "issue_us": round(statistics.median(issued), 1)}


def product_flops_per_s() -> float:
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    return 2 * 8192**3 / measured(lambda: a @ a)["ms"] * 1e3


class LayerCase:
    """One decoder layer at one shape, by every implementation."""

    def __init__(self, model: ModelSpec, batch: int, seq_len: int) -> None:
        layout = model.parameters(UnitRole.LAYER)
        elements = model.flat_elements(UnitRole.LAYER)
        self.model, self.tokens, self.seq_len = model, batch * seq_len, seq_len
        self.flat = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        parts = skeleton(model)
        positions = rotary_positions(parts, seq_len, model.hidden, torch.device("cuda"))
        self.eager = EagerLayer(parts.layer, self.flat, layout, positions)
        self.fused = FusedLayer(model, self.flat, positions[0][0], positions[1][0])
        shape = batch, seq_len, model.hidden
        self.entered, self.left, self.gradient, self.fresh = (torch.randn(shape, device="cuda").bfloat16() for _ in range(4))
        self.slots = {dtype: torch.zeros(elements, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32)}

    def actions(self, layer: Any) -> dict[str, Action]:
        def keep_and_backward(into: GradientSlot) -> None:
            self.gradient.copy_(self.fresh)  # what a backward leaves there would grow or vanish over repeats
            kept = layer.forward_keep(self.entered, self.left)
            layer.backward(kept, self.entered, self.gradient, into)

        def recompute(into: GradientSlot) -> None:
            self.gradient.copy_(self.fresh)
            layer.backward_recompute(self.entered, self.gradient, into)

        modes = {
            "bf16": GradientSlot(self.slots[torch.bfloat16], False), "bf16+": GradientSlot(self.slots[torch.bfloat16], True),
            "fp32": GradientSlot(self.slots[torch.float32], False), "fp32+": GradientSlot(self.slots[torch.float32], True),
        }  # fmt: skip
        found: dict[str, Action] = {"forward": lambda: layer.forward(self.entered, self.left)}
        found["keep+backward bf16"] = lambda: keep_and_backward(modes["bf16"])
        for name, into in modes.items():
            found[f"recompute {name}"] = partial(recompute, into)
        return found

    def rated(self, name: str, times: dict[str, float]) -> dict[str, float]:
        flops = self.model.matmul_flops(UnitRole.LAYER, self.tokens) + self.model.attention_flops(self.tokens, self.seq_len)
        return times | {"tflops": round(flops * (1 if name == "forward" else 3) / times["ms"] / 1e9, 1)}

    def results(self, layer: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with torch.no_grad():
            for name, action in self.actions(layer).items():
                found[name] = self.rated(name, measured(action))
            before = torch.cuda.memory_allocated()
            kept = layer.forward_keep(self.entered, self.left)
            found["saved_bytes_per_token"] = (torch.cuda.memory_allocated() - before) / self.tokens
            del kept
        return found

    def graphed(self) -> dict[str, Any]:
        """The fused layer replayed from CUDA graphs."""
        found = {}
        with torch.no_grad():
            for name, action in self.actions(self.fused).items():
                graph = torch.cuda.CUDAGraph()
                before = time.perf_counter()
                with torch.cuda.graph(graph):
                    action()
                capture_ms = (time.perf_counter() - before) * 1e3
                found[name] = self.rated(name, measured(graph.replay)) | {"capture_ms": round(capture_ms, 2)}
                del graph
        return found


def with_liger(case: LayerCase) -> EagerLayer | None:
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # noqa: PLC0415 - may be absent
    except ImportError:
        return None
    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    parts = skeleton(case.model)
    positions = rotary_positions(parts, case.seq_len, case.model.hidden, torch.device("cuda"))
    return EagerLayer(parts.layer, case.flat, case.model.parameters(UnitRole.LAYER), positions)


def head_results(model: ModelSpec, tokens: int) -> dict[str, Any]:
    layout, elements = model.parameters(UnitRole.HEAD), model.flat_elements(UnitRole.HEAD)
    flat = torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    entered = torch.randn(tokens, model.hidden, device="cuda").bfloat16()
    labels = torch.randint(0, model.vocabulary, (tokens,), device="cuda")
    gradient = torch.empty_like(entered)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            slot = GradientSlot(torch.zeros(elements, dtype=dtype, device="cuda"), False)
            heads = {
                "eager": EagerHead(skeleton(model).norm, flat, layout, loss_chunk_tokens(model.vocabulary, "eager")),
                **{f"fused {chunk}": FusedHead(model, flat, chunk)
                   for chunk in (1024, loss_chunk_tokens(model.vocabulary, "fused"), 4096)},
            }  # fmt: skip
            for name, head in heads.items():
                found[f"{name} {dtype}"] = measured(partial(head.loss, entered, labels, None, slot, gradient, 1e-4), 5)
            del slot
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415 - may be absent
    except ImportError:
        return found
    weight = torch.nn.Parameter(flat[model.hidden :].view(model.vocabulary, model.hidden))
    inputs = entered.clone().requires_grad_()

    def liger() -> None:
        LigerFusedLinearCrossEntropyLoss()(weight, inputs, labels).backward()
        weight.grad = inputs.grad = None

    found["liger"] = measured(liger, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--shape", default="16x1024", help="micro-batch x sequence length")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the layer too: a minute more")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    model = find_model(options.model)
    try:
        batch, seq_len = map(int, options.shape.split("x"))
    except ValueError:
        parser.error(f"--shape is {options.shape!r}, must be like 16x1024")
    case = LayerCase(model, batch, seq_len)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "python": platform.python_version(), "torch": torch.__version__,
        "slideplan": __version__, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv), "product_tflops": round(product_flops_per_s() / 1e12, 1),
    }  # fmt: skip
    result["eager"] = case.results(case.eager)
    result["fused"] = case.results(case.fused)
    result["fused, CUDA graph"] = case.graphed()
    if options.compile:
        case.eager._module = torch.compile(case.eager._module)
        result["compiled"] = case.results(case.eager)
    if (liger := with_liger(case)) is not None:  # last: it changes the classes of the modules
        result["liger"] = case.results(liger)
    result["loss"] = head_results(model, case.tokens)
    for name, row in result.items():
        print(f"{name}: {json.dumps(row)}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
