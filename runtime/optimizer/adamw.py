"""AdamW: its settings, and the host's fused multithreaded pass over split master weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from runtime.optimizer.compiled import compiled


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of decoupled weight decay Adam (Loshchilov & Hutter, 2019), as in torch.optim.AdamW.

    `weight_decay` applies to every parameter, as torch.optim.AdamW(model.parameters()) would.
    """

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr is {self.lr}, must be zero or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be in [0, 1)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps is {self.eps}, must be positive and finite")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay is {self.weight_decay}, must be zero or more")

    def scalars(self, step: int) -> tuple[float, ...]:
        """What the kernels take, for the update that ends step `step` (counted from 0).

        (decay factor, 1 - beta1, beta2, 1 - beta2, sqrt of the second bias correction, eps, step size):
        m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g g;
        p = decay p - step_size m / (sqrt(v) / sqrt(1 - beta2^t) + eps), step_size = lr / (1 - beta1^t).
        """
        t = step + 1
        return (
            1 - self.lr * self.weight_decay,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            math.sqrt(1 - self.beta2**t),
            self.eps,
            self.lr / (1 - self.beta1**t),
        )


class Rehearsal(AdamW):
    """A step that leaves weights and moments as they are, and takes as long as any: gradients must be finite.

    All that can change is the sign of a zero.
    """

    def scalars(self, step: int) -> tuple[float, ...]:
        """As of AdamW: nothing decays, nothing is averaged in, no step is taken."""
        return (1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0)


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def as_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as fp32, in a register."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def as_bits(typing_context: Any, value: Any) -> Any:
    """Reinterpret fp32 as 32 bits, in a register."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def as_gradient(typing_context: Any, raw: Any) -> Any:
    """fp32 gradient of an fp32 value, or of a bf16 bit pattern."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if raw == types.float32:
            return arguments[0]
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(raw), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def take(typing_context: Any, counter: Any) -> Any:
    """The first element of an int64 array, which grows by one; no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), generate


@numba.njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator, unused-ignore]
def _update(i, high, remainder, m, v, g, decay, w1, beta2, w2, root2, eps, step_size):  # type: ignore[no-untyped-def]
    bits = (np.uint32(high[i]) << np.uint32(16)) + np.uint32(np.int32(remainder[i]))
    p = as_float(bits) * decay  # type: ignore[call-arg]
    m_new = m[i] + w1 * (g - m[i])
    v_new = v[i] * beta2 + w2 * g * g
    denominator = np.sqrt(v_new) / root2 + eps
    p = p - step_size * m_new / denominator
    m[i] = m_new
    v[i] = v_new
    bits = as_bits(p)
    # In a NaN the carry would run into the sign and leave a zero weight: see `split_master.split`.
    half = np.uint32(0x8000) if p == p else np.uint32(0)  # noqa: PLR0124 - false for NaN alone
    rounded = (bits + half) >> np.uint32(16)
    high[i] = np.uint16(rounded)
    remainder[i] = np.int16(np.int32(bits - (rounded << np.uint32(16))))


# fastmath stays off: results must not depend on how the compiler contracts or reorders.
@compiled(nogil=True, error_model="numpy")
def _chunk(high, remainder, m, v, gradient, decay, w1, beta2, w2, root2, eps, step_size):  # type: ignore[no-untyped-def]
    for i in range(high.size):
        _update(i, high, remainder, m, v, as_gradient(gradient[i]), decay, w1, beta2, w2, root2, eps, step_size)  # type: ignore[call-arg]


@compiled(parallel=True, nogil=True, error_model="numpy")
def _adamw(threads, size, taken, high, remainder, m, v, gradient, decay, w1, beta2, w2, root2, eps, step_size):  # type: ignore[no-untyped-def]
    for _ in numba.prange(threads):
        start = take(taken) * size  # type: ignore[call-arg]
        while start < high.size:
            c = slice(start, min(start + size, high.size))
            _chunk(high[c], remainder[c], m[c], v[c], gradient[c], decay, w1, beta2, w2, root2, eps, step_size)
            start = take(taken) * size


# Elements that a thread takes at once: it comes back for more when done, so that one which the system holds up
# does not hold up the others. Larger ones leave threads idle at the end, smaller ones break the stream of memory.
CHUNK_ELEMENTS = 1 << 16
CHUNKS_PER_THREAD = 4  # at least, where that leaves them long enough
LEAST_CHUNK_ELEMENTS = 1 << 12
# What one thread does before others are awake: norms and biases alone, such as a tied head's.
ALONE_ELEMENTS = 1 << 15


def in_chunks(loop: Any, threads: int, block: int, high: np.ndarray, *arguments: Any) -> None:
    """Run a compiled loop over the arrays of an update on these threads, in chunks of whole blocks of elements."""
    of_torch = torch.get_num_threads()
    numba.set_num_threads(threads)  # numba keeps this per calling thread
    size = min(CHUNK_ELEMENTS, max(LEAST_CHUNK_ELEMENTS, high.size // (threads * CHUNKS_PER_THREAD))) // block * block
    loop(threads, size, np.zeros(1, np.int64), high, *arguments)
    # Both count threads in the OpenMP library of the calling thread, and numba leaves all cores there.
    torch.set_num_threads(of_torch)


class HostUpdate:
    """The host's AdamW on a fixed number of threads."""

    def __init__(self, threads: int) -> None:
        self.threads = min(threads, int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]

    def __call__(
        self,
        weights: torch.Tensor,
        remainder: torch.Tensor,
        moments: torch.Tensor,
        gradient: torch.Tensor,
        settings: AdamW,
        step: int,
    ) -> None:
        """One AdamW step in place on host tensors of n elements.

        weights: bf16 [n]; remainder: int16 [n]; moments: fp32 [2, n]; gradient: bf16 or fp32 [n].
        Every operation is an IEEE fp32 operation in the order that `AdamW.scalars` writes down.
        """
        scalars = (np.float32(value) for value in settings.scalars(step))
        high = bits_of(weights)
        of_gradient = gradient.numpy() if gradient.dtype is torch.float32 else bits_of(gradient)
        arrays = high, remainder.numpy(), moments[0].numpy(), moments[1].numpy(), of_gradient
        if high.size <= ALONE_ELEMENTS:
            _chunk(*arrays, *scalars)
            return
        in_chunks(_adamw, self.threads, 1, *arrays, *scalars)

    def compile(self) -> None:
        """Compile for both gradient dtypes now, so that no measured task pays for it.

        Raises ValueError where numba's threads must not be used from two lanes at once.
        """
        for dtype, n in product((torch.bfloat16, torch.float32), (64, ALONE_ELEMENTS + 1)):
            weights, remainder = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int16)
            self(weights, remainder, torch.zeros(2, n), torch.zeros(n, dtype=dtype), AdamW(), step=0)
        if numba.threading_layer() == "workqueue":  # type: ignore[attr-defined]  # it would end the process
            raise ValueError(
                'numba runs its threads by "workqueue", which two lanes cannot use at once; unset NUMBA_THREADING_LAYER, and '
                "install an OpenMP library (libgomp) or tbb where there is none"
            )


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Bit patterns of a bf16 tensor, in its memory."""
    return tensor.view(torch.int16).numpy().view(np.uint16)
