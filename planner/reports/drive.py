"""What a plan does to the drive that state lies on, in words. In powers of ten, as drives are sold."""

from __future__ import annotations

from slideplan.wear import DriveWear


def drive_wear(wear: DriveWear) -> list[tuple[str, str]]:
    """Bytes a step and a day, and how long the drive is made for that."""
    daily, capacity = format_drive_bytes(wear.written_bytes_per_day), format_drive_bytes(wear.capacity_bytes)
    return [
        ("in a step", f"{format_drive_bytes(wear.read_bytes)} read, {format_drive_bytes(wear.write_bytes)} written"),
        ("in a day", f"{daily} written where training never rests: {wear.writes_per_day:,.2f} times its {capacity}"),
        ("lasts", _lasts(wear)),
    ]


def _lasts(wear: DriveWear) -> str:
    if wear.endurance_bytes is None or wear.endurance_days is None:
        return "not known: the profile does not say how much may be written to the drive"
    limit = format_drive_bytes(wear.endurance_bytes)
    return f"{wear.endurance_days:,.1f} days of that, until a new drive has written the {limit} of its warranty"


def format_drive_bytes(count: int) -> str:
    """``4.00 TB``, ``235.0 GB``, or ``1.5 MB``."""
    if count >= 10**12:
        return f"{count / 1e12:,.2f} TB"
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
