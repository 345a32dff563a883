"""Any bit of a shard's header may be wrong when it is read: its hash is known at the end of the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from builders import tiny_model
from commands import runtime
from running import session_for
from runtime import rehearsal
from runtime.checkpoints.contents import contents_of
from runtime.checkpoints.keeper import Stored, checkpoints
from runtime.checkpoints.layout import DTYPE_BYTES, entries, header_bytes
from runtime.checkpoints.manifest import DamagedError, Saving, read_manifest
from runtime.checkpoints.reading import _Reader
from runtime.checkpoints.staging import Staging
from runtime.checkpoints.writing import ShardFile
from runtime.lanes.backend import CpuBackend
from runtime.storage.disk import Disk
from saved_runs import UNTIED, Run, check_same, planned
from slideplan.saving import LEAST_STAGING_BYTES

SMALL = tiny_model(hidden=32, layers=1, heads=2, kv_heads=1, ffn=32)
PLANS = {"fp32": planned(SMALL), "8bit": planned(SMALL, resident_state=(1,), state="lean")}


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


class Memory:
    """A drive that holds one file, for who opens it and reads."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def open(self, path: Path) -> Memory:
        return self

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def read(self, block: memoryview, offset: int) -> None:
        block[:] = self.content[offset : offset + len(block)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "moments"), [(1, "fp32"), (1, "8bit"), (-2, "fp32")])
def test_every_bit_of_a_header_that_differs_is_damage(tmp_path: Path, number: int, moments: str) -> None:
    done = Run(tmp_path / "run", PLANS[moments])
    done.train(steps=1)
    folder = done.folder / "checkpoints" / "step-00000001"
    backend = CpuBackend()
    states = session_for(PLANS[moments], backend).states
    shard = Stored(SMALL, states, contents_of(SMALL)).shards(optimizer=True)[number]
    content = (folder / shard.name).read_bytes()
    staging = Staging(backend, LEAST_STAGING_BYTES, page_locked=False)
    stored = {file.name: file for file in read_manifest(folder).files}

    def read(changed: bytes, wanted: ShardFile) -> None:
        disk = cast(Disk, Memory(changed))
        _Reader(disk, folder, stored, [wanted], staging, backend, lambda size: None)._read(wanted)

    read(content, shard)
    length = header_bytes(content)
    parsed = 0
    for bit in range(8 * length):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match=shard.name):
            read(bytes(flipped), shard)
        try:
            found = entries(bytes(flipped[:length]), len(content))
        except ValueError:
            continue
        parsed += 1
        assert all(type(each.first_byte) is int and length <= each.first_byte for each in found.values())
        assert sum(each.size_bytes for each in found.values()) == len(content) - length
    assert parsed > 0, "a letter of a name, say"


WRONG = {
    "an offset that is no whole number": (b"[0,8192]", b"[0.8192]"),
    "an offset that is another": (b"[0,8192]", b"[0,8193]"),
    "a dtype that nobody knows": (b'"F32"', b'"F33"'),
    "a dtype of another size": (b'"F32"', b'"I16"'),
    "a dtype that is no text": (b'"F32"', b"[333]"),
    "a length below zero": (b'"shape":[2048]', b'"shape":[-048]'),
    "a length of one more": (b'"shape":[2048]', b'"shape":[2049]'),
    "a length in words": (b'"shape":[2048]', b'"shape":"2048"'),
    "a field more": (b'"shape":', b'"shape":[2048],"more":'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_header_describes_tensors_that_fill_the_file_or_is_refused(wrong: str) -> None:
    text = b'{"exp_avg":{"dtype":"F32","shape":[2048],"data_offsets":[0,8192]}}'

    def header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text

    whole = header(text)
    found = entries(whole, len(whole) + 8192)["exp_avg"]
    assert (found.shape, found.first_byte, found.size_bytes) == ((2048,), len(whole), 2048 * DTYPE_BYTES["F32"])
    for size_bytes in (0, 8191, 8193):
        with pytest.raises(ValueError, match="has a header of tensors of 8192 bytes"):
            entries(whole, len(whole) + size_bytes)
    changed = header(text.replace(*WRONG[wrong]))
    assert changed != whole
    with pytest.raises(ValueError, match="has a header"):
        entries(changed, len(changed) + 8192)


def test_an_offset_that_became_a_fraction_costs_one_checkpoint_and_no_more(tmp_path: Path) -> None:
    """By the commands: it is named and called damaged, and the checkpoint before is taken."""
    plan = planned(UNTIED)
    whole, cut = Run(tmp_path / "whole", plan), Run(tmp_path / "run", plan, Saving(every=2))
    whole.train()
    cut.train(steps=4)
    path = cut.folder / "checkpoints" / "step-00000004" / "optimizer-00002-of-00006.safetensors"
    content = path.read_bytes()
    start = content.index(b'"data_offsets":[0,') + len(b'"data_offsets":[0')
    path.write_bytes(content[:start] + b"." + content[start + 1 :])
    assert content[start] ^ ord(".") == 2, "one bit"

    def said(*arguments: Any) -> str:
        done = runtime(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stderr.replace("\n", " ")

    named = f"{path.relative_to(tmp_path)}: has a header that describes no tensors"
    assert f"warning: {named}; the checkpoint before is taken" in said("export", "run", "-o", "out")
    assert f"warning: {named}; it is called damaged-step-00000004 now, and the one before is taken" in said(
        "resume", "run", "--steps", 5, "--device", "cpu"
    )
    check_same(whole, cut)
    assert [step for step, _ in checkpoints(cut.folder / "checkpoints")] == [4, 5]
