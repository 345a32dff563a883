"""Bytes and nanoseconds as people read and type them. Inside the package both are plain integers."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": GIB << 10, "tib": GIB << 10, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Read ``24GiB``, ``80 GB``, ``512m`` or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"size {text!r} is not understood; write it like 24GiB, 80GB or 1500000")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: int) -> str:
    """Three to four significant digits in the binary unit that fits."""
    size = float(abs(count))
    sign = "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:.0f} {unit}" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:,.2f} GiB"


def format_ns(duration_ns: int) -> str:
    """A duration in the unit that fits."""
    if abs(duration_ns) < 10_000:
        return f"{duration_ns} ns"
    if abs(duration_ns) < 10_000_000:
        return f"{duration_ns / 1e3:,.1f} us"
    if abs(duration_ns) < 10_000_000_000:
        return f"{duration_ns / 1e6:,.1f} ms"
    return f"{duration_ns / 1e9:,.2f} s"
