"""The host's fused multithreaded pass of AdamW over lossy state: `lossy.update_lossy`, compiled, bit for bit.

Every loop is one that a compiler turns into vector instructions: 32-bit integers, no tables, and maxima of bit patterns,
since those of floats would have to heed NaNs.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from runtime.optimizer.adamw import ALONE_ELEMENTS, AdamW, HostUpdate, as_bits, as_float, as_gradient, bits_of, in_chunks, take
from runtime.optimizer.compiled import compiled
from runtime.optimizer.lossy import lean_parts, lossy_scalars
from runtime.optimizer.moments8 import CODES, DROPPED_BITS, EXPONENT, INVERSE, MANTISSA, ONE
from runtime.optimizer.rounding import FIRST_FACTORS, SECOND_FACTOR, Draws
from slideplan.lowering.sizes import moment_bytes
from slideplan.policy import MOMENT_BLOCK, StateFormat

U, S, F = np.uint32, np.int32, np.float32
BLOCK = MOMENT_BLOCK
OFF_M, OFF_V = U(ONE - CODES[0]), U(ONE - CODES[1])
MOST_M, MOST_V = S(CODES[0]), S(CODES[1])
DROPPED, KEPT = U(DROPPED_BITS), U(32 - DROPPED_BITS)
LOW_DROPPED, LOW16, SIGN, MAGNITUDE = U((1 << DROPPED_BITS) - 1), U(0xFFFF), U(1 << 31), U((1 << 31) - 1)
MANTISSA_BITS, EXPONENT_BITS, INVERSE_BITS = U(MANTISSA), U(EXPONENT), U(INVERSE)
A, B, C = U(FIRST_FACTORS[0]), U(FIRST_FACTORS[1]), U(SECOND_FACTOR)
HALF = U(0x8000)
inline = numba.njit(inline="always", error_model="numpy")


@inline
def _noise(element, salt):
    h = U(element ^ salt)
    h = U(U(h ^ (h >> U(16))) * A)
    h = U(U(h ^ (h >> U(15))) * B)
    return U(h ^ (h >> U(16)))


@inline
def _more_noise(h):
    h = U(h * C)
    return U(h ^ (h >> U(15)))


@inline
def _rounded(value, random):
    """bf16 bits of a float, up or down by 16 random bits."""
    # In a NaN the carry would run into the sign and leave a zero: see `split_master.split`.
    up = random if value == value else U(0)  # noqa: PLR0124 - false for NaN alone
    return np.uint16(U(as_bits(value) + up) >> U(16))


@inline
def _scale(largest):
    return U(U(largest + MANTISSA_BITS) & EXPONENT_BITS)


@compiled(nogil=True, error_model="numpy")
def _lean_chunk(high, code_m, code_v, scale_m, scale_v, gradient, first, salt, decay, w1, beta2, w2, inverse2, eps, size):
    new_m, new_v = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in range(scale_m.size):
        start = block * BLOCK
        n = min(BLOCK, high.size - start)
        here = slice(start, start + n)
        hb, mb, vb, gb = high[here], code_m[here], code_v[here], gradient[here]
        of_m, of_v = scale_m[block], scale_v[block]
        element = U(first + U(start))
        largest_m, largest_v = U(0), U(0)
        for i in range(n):
            c, d = U(mb[i]), U(vb[i])
            part = U(c & U(127))
            pattern = U(U(part + OFF_M) << DROPPED) if part else U(0)
            m = as_float(U(pattern | U(U(c & U(128)) << U(24)))) * of_m
            v = as_float(U(U(d + OFF_V) << DROPPED) if d else U(0)) * of_v
            g = as_gradient(gb[i])
            m = m + w1 * (g - m)
            v = v * beta2 + w2 * g * g
            p = as_float(U(U(hb[i]) << U(16))) * decay
            p = p - size * m / (np.sqrt(v) * inverse2 + eps)
            hb[i] = _rounded(p, U(_more_noise(_noise(U(element + U(i)), salt)) & LOW16))
            new_m[i], new_v[i] = m, v
            largest_m = max(largest_m, U(as_bits(m) & MAGNITUDE))
            largest_v = max(largest_v, U(as_bits(v) & MAGNITUDE))
        bits_m, bits_v = _scale(largest_m), _scale(largest_v)
        scale_m[block], scale_v[block] = as_float(bits_m), as_float(bits_v)
        over_m, over_v = as_float(U(INVERSE_BITS - bits_m)), as_float(U(INVERSE_BITS - bits_v))
        for i in range(n):
            h = _noise(U(element + U(i)), salt)
            m, v = new_m[i], new_v[i]
            bits = as_bits(m)
            relative = as_bits(as_float(U(bits & MAGNITUDE)) * over_m)
            code = S(U(relative + U(h & LOW_DROPPED)) >> DROPPED) - S(OFF_M)
            code = min(max(code, S(0)), MOST_M)
            sign = S(128) if m < F(0) else S(0)
            mb[i] = np.uint8(code | sign)
            code = S(U(as_bits(v * over_v) + U(h >> KEPT)) >> DROPPED) - S(OFF_V)
            code = min(max(code, S(1)), MOST_V)
            vb[i] = np.uint8(code if v > F(0) else S(0))


@compiled(nogil=True, error_model="numpy")
def _bf16_chunk(high, low, m16, v16, gradient, first, salt, decay, w1, beta2, w2, inverse2, eps, size):
    for i in range(high.size):
        g = as_gradient(gradient[i])
        m, v = as_float(U(U(m16[i]) << U(16))), as_float(U(U(v16[i]) << U(16)))
        m = m + w1 * (g - m)
        v = v * beta2 + w2 * g * g
        p = as_float(U(U(U(high[i]) << U(16)) + U(S(low[i])))) * decay
        p = p - size * m / (np.sqrt(v) * inverse2 + eps)
        bits = as_bits(p)
        half = HALF if p == p else U(0)  # noqa: PLR0124 - false for NaN alone
        rounded = U(U(bits + half) >> U(16))
        high[i] = np.uint16(rounded)
        low[i] = np.int16(S(U(bits - U(rounded << U(16)))))
        h = _noise(U(first + U(i)), salt)
        m16[i], v16[i] = _rounded(m, U(h & LOW16)), _rounded(v, U(h >> U(16)))


@compiled(parallel=True, nogil=True, error_model="numpy")
def _lean(
    threads,
    each,
    taken,
    high,
    code_m,
    code_v,
    scale_m,
    scale_v,
    gradient,
    first,
    salt,
    decay,
    w1,
    beta2,
    w2,
    inverse2,
    eps,
    size,
):
    for _ in numba.prange(threads):
        start = take(taken) * each
        while start < high.size:
            c = slice(start, min(start + each, high.size))
            b = slice(start // BLOCK, (c.stop + BLOCK - 1) // BLOCK)
            _lean_chunk(high[c], code_m[c], code_v[c], scale_m[b], scale_v[b], gradient[c], U(first + U(start)), salt,
                        decay, w1, beta2, w2, inverse2, eps, size)  # fmt: skip
            start = take(taken) * each


@compiled(parallel=True, nogil=True, error_model="numpy")
def _bf16(threads, each, taken, high, low, m16, v16, gradient, first, salt, decay, w1, beta2, w2, inverse2, eps, size):
    for _ in numba.prange(threads):
        start = take(taken) * each
        while start < high.size:
            c = slice(start, min(start + each, high.size))
            _bf16_chunk(high[c], low[c], m16[c], v16[c], gradient[c], U(first + U(start)), salt,
                        decay, w1, beta2, w2, inverse2, eps, size)  # fmt: skip
            start = take(taken) * each


class LossyHostUpdate:
    """The host's AdamW over lossy state, on the threads of the exact one."""

    def __init__(self, exact: HostUpdate) -> None:
        self.threads = exact.threads

    def __call__(
        self,
        weights: torch.Tensor,
        remainder: torch.Tensor | None,
        moments: torch.Tensor,
        gradient: torch.Tensor,
        settings: AdamW,
        step: int,
        draws: Draws,
    ) -> None:
        """One AdamW step in place on host tensors; shapes as in `lossy.update_lossy`."""
        scalars = [np.float32(value) for value in lossy_scalars(settings, step)]
        high, grad = bits_of(weights), gradient.numpy() if gradient.dtype is torch.float32 else bits_of(gradient)
        if remainder is None:
            codes, scales = lean_parts(moments, high.size)
            state = [*codes.numpy(), *scales.numpy()]
            one, all_of_them = _lean_chunk, _lean
        else:
            state = [remainder.numpy(), *map(bits_of, moments)]
            one, all_of_them = _bf16_chunk, _bf16
        arguments = high, *state, grad, np.uint32(draws.first), np.uint32(draws.salt), *scalars
        if high.size <= ALONE_ELEMENTS:
            one(*arguments)
        else:
            in_chunks(all_of_them, self.threads, BLOCK, *arguments)


def blank_state(n: int, state: StateFormat, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weights, remainder and moments of n elements in a format, all zero."""
    weights = torch.zeros(n, dtype=torch.bfloat16, device=device)
    if state == "lean":
        return weights, None, torch.zeros(moment_bytes(n, "8bit"), dtype=torch.uint8, device=device)
    moments = torch.zeros(2, n, dtype=torch.bfloat16 if state == "bf16-moments" else torch.float32, device=device)
    return weights, torch.zeros(n, dtype=torch.int16, device=device), moments
