"""What tests of whole runs do in processes of their own."""

from __future__ import annotations

import dataclasses

from killing import Change, KillingDisk
from runtime import rehearsal, run
from runtime.checkpoints.resuming import candidates
from runtime.run import RunRequest
from slideplan.progress import silent


def train(disk: KillingDisk, request: RunRequest) -> list[Change]:
    """A run from its start; what it changed on the drive, in order."""
    rehearsal.LEAST_REHEARSAL_NS = 1
    run.execute(dataclasses.replace(request, disk=disk), silent)
    return disk.changes


def resume(disk: KillingDisk, request: RunRequest) -> list[Change]:
    """The same run from its newest checkpoint on."""
    return train(disk, dataclasses.replace(request, found=candidates(request.out, silent)))
