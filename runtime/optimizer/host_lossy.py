"""The host's fused multithreaded pass of AdamW over lossy state: `lossy.update_lossy`, compiled, bit for bit.

Every loop is one that a compiler turns into vector instructions: no tables, and maxima of bit patterns, since those of
floats would have to heed NaNs. Of lean state, codes become bf16 patterns and back in loops of 16-bit integers, which have
twice as many to an instruction, and the step takes elements by pairs: two 16-bit values in a word need one instruction
each to become floats.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload

from runtime.optimizer.adamw import ALONE_ELEMENTS, AdamW, HostUpdate, as_bits, as_float, as_gradient, bits_of, in_chunks, take
from runtime.optimizer.compiled import compiled
from runtime.optimizer.lossy import lean_parts, lossy_scalars
from runtime.optimizer.moments8 import CODES, DROPPED_BITS, INFINITE, LEAST_SCALE, OCTAVE
from runtime.optimizer.rounding import FIRST_FACTORS, SECOND_FACTOR, Draws
from slideplan.lowering.sizes import moment_bytes
from slideplan.policy import MOMENT_BLOCK, StateFormat

U, S, H = np.uint32, np.int32, np.uint16
BLOCK, PAIRS = MOMENT_BLOCK, MOMENT_BLOCK // 2
DROPPED, KEPT = U(DROPPED_BITS), U(32 - DROPPED_BITS)
LOW_DROPPED, LOW16, HIGH16 = U((1 << DROPPED_BITS) - 1), U(0xFFFF), U(0xFFFF0000)
SHORTER = H(DROPPED_BITS - 16)  # from a bf16 pattern to a short one
MAGNITUDE, SIGN = H(0x7FFF), H(128)
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
def _rounded(value, random):
    """bf16 bits of a float, up or down by 16 random bits."""
    return np.uint16(_raised(value, random) >> U(16))


@inline
def _raised(value, random):
    """The pattern of a float and 16 random bits: its upper half is bf16."""
    # In a NaN the carry would run into the sign and leave a zero: see `split_master.split`.
    up = random if value == value else U(0)  # noqa: PLR0124 - false for NaN alone
    return U(as_bits(value) + up)


@inline
def _base(scale, least, codes):
    """What a code lacks of its short pattern."""
    return H(max(S(as_bits(scale) >> DROPPED), S(least)) - S(codes))


@inline
def _scale(largest, least):
    """The short pattern of a block's scale, of the largest bf16 pattern in it."""
    return min(max(S(S(largest >> SHORTER) + S(OCTAVE - 1)) & S(-OCTAVE), S(least)), S(INFINITE))


@inline
def _lean_step(pattern_p, pattern_m, pattern_v, g, h, decay, w1, beta2, w2, inverse2, eps, size):
    """Patterns whose upper halves are the weight and the moments after a step: of fp32 patterns, and random bits."""
    m, v = as_float(pattern_m), as_float(pattern_v)
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    p = as_float(pattern_p) * decay
    p = p - size * m / (np.sqrt(v) * inverse2 + eps)
    raised_m, raised_v = U(as_bits(m) + U(h & LOW_DROPPED)), U(as_bits(v) + U(h >> KEPT))
    return _raised(p, U(U(h * C) >> U(16))), raised_m, raised_v


def _pairs_of(gradient):
    """Two elements of a gradient, bf16 patterns or fp32, in a word: an array half as long."""


def _lower(word):
    """The first of two elements, as fp32."""


def _upper(word):
    """The second of two elements, as fp32."""


@overload(_pairs_of, inline="always")
def _(gradient):
    if gradient.dtype == types.uint16:
        return lambda gradient: gradient.view(np.uint32)
    return lambda gradient: gradient.view(np.uint64)


@overload(_lower, inline="always")
def _(word):
    if word == types.uint32:
        return lambda word: as_float(U(word << U(16)))
    return lambda word: as_float(U(word))


@overload(_upper, inline="always")
def _(word):
    if word == types.uint32:
        return lambda word: as_float(U(word & HIGH16))
    return lambda word: as_float(U(word >> np.uint64(32)))


@inline
def _upper_halves(left, right):
    return U(U(left >> U(16)) | U(right & HIGH16))


@compiled(nogil=True, error_model="numpy")
def _lean_blocks(high, code_m, code_v, scale_m, scale_v, gradient, first, salt, decay, w1, beta2, w2, inverse2, eps, size):
    """One step of whole blocks."""
    m16, v16 = np.empty(BLOCK, np.uint16), np.empty(BLOCK, np.uint16)
    # Views of whole arrays: made of slices, they cost a seventh of the speed.
    m32, v32, p32, g32 = m16.view(np.uint32), v16.view(np.uint32), high.view(np.uint32), _pairs_of(gradient)
    for block in range(scale_m.size):
        here, pairs = slice(block * BLOCK, (block + 1) * BLOCK), slice(block * PAIRS, (block + 1) * PAIRS)
        pb, mb, vb, gb = p32[pairs], code_m[here], code_v[here], g32[pairs]
        element = U(first + U(block * BLOCK))
        base_m, base_v = _base(scale_m[block], LEAST_SCALE[0], CODES[0]), _base(scale_v[block], LEAST_SCALE[1], CODES[1])
        for i in range(BLOCK):
            c, d = H(mb[i]), H(vb[i])
            part = H(c & H(127))
            pattern = H(H(part + base_m) << SHORTER)
            m16[i] = H((pattern if part != H(0) else H(0)) | H(H(c & SIGN) << H(8)))
            pattern = H(H(d + base_v) << SHORTER)
            v16[i] = pattern if d != H(0) else H(0)
        for i in range(PAIRS):
            h = _noise(U(element + U(2 * i)), salt)
            k = _noise(U(element + U(2 * i + 1)), salt)
            p, m, v, left, right = pb[i], m32[i], v32[i], _lower(gb[i]), _upper(gb[i])
            p0, m0, v0 = _lean_step(
                U(p << U(16)), U(m << U(16)), U(v << U(16)), left, h, decay, w1, beta2, w2, inverse2, eps, size
            )
            p1, m1, v1 = _lean_step(
                U(p & HIGH16), U(m & HIGH16), U(v & HIGH16), right, k, decay, w1, beta2, w2, inverse2, eps, size
            )
            pb[i], m32[i], v32[i] = _upper_halves(p0, p1), _upper_halves(m0, m1), _upper_halves(v0, v1)
        largest_m, largest_v = H(0), H(0)
        for i in range(BLOCK):
            largest_m, largest_v = max(largest_m, H(m16[i] & MAGNITUDE)), max(largest_v, H(v16[i] & MAGNITUDE))
        top_m, top_v = _scale(largest_m, LEAST_SCALE[0]), _scale(largest_v, LEAST_SCALE[1])
        scale_m[block], scale_v[block] = as_float(U(U(top_m) << DROPPED)), as_float(U(U(top_v) << DROPPED))
        base_m, base_v = H(top_m - S(CODES[0])), H(top_v - S(CODES[1]))
        for i in range(BLOCK):
            pattern = H(H(m16[i] & MAGNITUDE) >> SHORTER)
            code = min(H(max(pattern, base_m) - base_m), H(CODES[0]))
            mb[i] = np.uint8(code | H(H(m16[i] >> H(8)) & SIGN))
            pattern = H(H(v16[i] & MAGNITUDE) >> SHORTER)
            code = min(H(max(pattern, H(base_v + H(1))) - base_v), H(CODES[1]))
            vb[i] = np.uint8(code if pattern != H(0) else H(0))


@compiled(nogil=True, error_model="numpy")
def _lean_chunk(high, code_m, code_v, scale_m, scale_v, gradient, first, salt, decay, w1, beta2, w2, inverse2, eps, size):
    whole = high.size // BLOCK
    n = whole * BLOCK
    _lean_blocks(high[:n], code_m[:n], code_v[:n], scale_m[:whole], scale_v[:whole], gradient[:n], first, salt,
                 decay, w1, beta2, w2, inverse2, eps, size)  # fmt: skip
    left = high.size - n
    if left:  # a block that is cut off: in copies filled up with zeros
        high2, m2, v2 = np.zeros(BLOCK, np.uint16), np.zeros(BLOCK, np.uint8), np.zeros(BLOCK, np.uint8)
        gradient2 = np.zeros(BLOCK, gradient.dtype)
        high2[:left], m2[:left], v2[:left], gradient2[:left] = high[n:], code_m[n:], code_v[n:], gradient[n:]
        _lean_blocks(high2, m2, v2, scale_m[whole:], scale_v[whole:], gradient2, U(first + U(n)), salt,
                     decay, w1, beta2, w2, inverse2, eps, size)  # fmt: skip
        high[n:], code_m[n:], code_v[n:] = high2[:left], m2[:left], v2[:left]


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
