from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import msgspec
import pytest

from builders import tiny_machine
from slideplan import __version__, codec
from slideplan.machine.profile import MachineProfile


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.json"
    codec.save(path, tiny_machine())
    return path


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refusal(file: Path) -> str:
    with pytest.raises(ValueError) as raised:
        codec.load(file, MachineProfile)
    message = str(raised.value)
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def test_round_trip(file: Path):
    assert codec.load(file, MachineProfile) == tiny_machine()
    assert json.loads(file.read_text())["document"] == "machine_profile"


def test_digest_follows_content_only():
    assert codec.digest(tiny_machine()) == codec.digest(tiny_machine())
    assert codec.digest(tiny_machine()) != codec.digest(tiny_machine(name="other"))


def test_unknown_field(file: Path):
    rewrite(file, colour="blue")
    assert "unknown field `colour`" in refusal(file)


def test_unknown_field_deep_inside(file: Path):
    host = json.loads(file.read_text())["host"] | {"sockets": 2}
    rewrite(file, host=host)
    assert "unknown field `sockets` - at `$.host`" in refusal(file)


def test_missing_and_mistyped_field(file: Path):
    rewrite(file, host={"cpu": "x"})
    assert "missing required field `cores`" in refusal(file)
    rewrite(file, name=3)
    assert "Expected `str`, got `int` - at `$.name`" in refusal(file)


def test_value_out_of_bounds_names_the_field(file: Path):
    host = json.loads(file.read_text())["host"] | {"cores": 0}
    rewrite(file, host=host)
    assert "host.cores is 0, must be positive" in refusal(file)


def test_other_version(file: Path):
    rewrite(file, format_version=99)
    assert refusal(file) == "field `format_version` is 99, this version reads 1; make the machine_profile anew"


@pytest.mark.parametrize("document", ["plan", ""])
def test_other_document(file: Path, document: str):
    rewrite(file, document=document)
    assert refusal(file) == f"expected a 'machine_profile' document, field `document` says {document!r}"


@pytest.mark.parametrize("content", [b"", b"{", b'{"document": "machine_pro', b"\xff\xfe", b"[]", b"3"])
def test_not_a_document_at_all(file: Path, content: bytes):
    file.write_bytes(content)
    assert refusal(file).startswith(("not valid JSON: ", "not a valid machine_profile: "))


def test_truncated(file: Path):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert refusal(file).startswith("not valid JSON: ")


def test_values_nested_too_deep(file: Path):
    file.write_bytes(b'{"document": "machine_profile", "a": ' + b"[" * 200_000)
    assert refusal(file) == "not a valid machine_profile: its values are nested too deep"


def test_what_is_larger_than_any_document_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec, "LARGEST_BYTES", 1 << 20)
    os.truncate(file, 1 << 40)  # a sparse terabyte
    assert refusal(file) == "is larger than 1 MiB, which no machine_profile is; name another file"


def test_missing_file(tmp_path: Path):
    assert refusal(tmp_path / "absent.json") == "cannot be read: No such file or directory"


def test_directory(tmp_path: Path):
    assert refusal(tmp_path) == "is a folder; name the machine_profile file in it"


def test_save_makes_folders_and_leaves_nothing_else(tmp_path: Path):
    codec.save(tmp_path / "a" / "b" / "m.json", tiny_machine())
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["m.json"]


@pytest.mark.parametrize("number, raised", [(errno.EACCES, ValueError), (errno.ENOSPC, OSError), (errno.EDQUOT, OSError)])
def test_failed_save_leaves_the_old_file(file: Path, number: int, raised: type, monkeypatch: pytest.MonkeyPatch):
    before = file.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", fail)
    # A full disk is not what the user got wrong.
    with pytest.raises(raised) as told:
        codec.save(file, tiny_machine(name="new"))
    assert str(file) in str(told.value)
    assert os.strerror(number) in str(told.value)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_save_below_a_file_is_refused(file: Path):
    with pytest.raises(ValueError, match=r"cannot be written: (Not a directory|File exists)"):
        codec.save(file / "below.json", tiny_machine())


def test_specs_are_immutable():
    with pytest.raises(AttributeError):
        tiny_machine().name = "other"
    assert msgspec.structs.replace(tiny_machine(), name="other").name == "other"


def test_a_document_of_another_version_says_which(file: Path):
    provenance = json.loads(file.read_text())["provenance"] | {"versions": {"slideplan": "0.5.0"}}
    rewrite(file, provenance=provenance, name=3)
    assert f"it was made by slideplan 0.5.0, this is {__version__}: if it was not edited, make it anew" in refusal(file)
    rewrite(file, provenance=provenance | {"versions": {"slideplan": __version__}})
    assert "made by" not in refusal(file)
