"""What of a path is read, and what is left out and why."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from runtime.inputs.files import Found, LeftOut, default_text, find_files, listed
from runtime.inputs.sniffing import MAGICS, SHORT_LINE_BYTES, Kind, Other, record_of, sniff
from slideplan.progress import silent

PROSE = "The planner waits for the cold table, and every unit outlives it.\n"


def looked_at(path: Path, any_encoding: bool = False) -> tuple[list[str], dict[str, str]]:
    found = find_files(path, any_encoding, silent)
    return [file.name for file in found.files], {each.name: each.why.what for each in found.left_out}


def refusal(path: Path, any_encoding: bool = False) -> str:
    with pytest.raises(ValueError, match="--data") as caught:
        find_files(path, any_encoding, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_content_counts_and_not_the_name(tmp_path: Path) -> None:
    for name in ("a.txt", "B.TXT", "without", "deep/er/c.rs", "d.conf", "e.jsonl.txt", "f.log"):
        write(tmp_path / name, PROSE)
    write(tmp_path / "lines", json.dumps({"text": PROSE}) + "\n" + json.dumps({"text": "b", "id": 1}) + "\n")
    write(tmp_path / "picture.txt", b"\x89PNG\r\n\x1a\n" + bytes(100))
    found = find_files(tmp_path, False, silent)
    assert [file.name for file in found.files] == sorted(
        ["a.txt", "B.TXT", "without", "deep/er/c.rs", "d.conf", "e.jsonl.txt", "f.log", "lines"],
        key=lambda name: Path(name).parts,
    )
    assert [file.name for file in found.files if file.kind is Kind.JSON_LINES] == ["lines"]
    assert listed(found.left_out) == "picture.txt (a picture)"


def test_what_tools_and_version_control_put_there_is_not_data(tmp_path: Path) -> None:
    for name in (".git/HEAD", ".venv/lib/a.py", "env/pyvenv.cfg", "env/lib/b.py", "x/node_modules/c.js", "__pycache__/d.txt",
                 "lib/site-packages/e.py", ".gitattributes", "a.txt"):  # fmt: skip
        write(tmp_path / name, PROSE)
    names, left_out = looked_at(tmp_path)
    assert names == ["a.txt"]
    assert set(left_out) == {".git", ".venv", "env", "x/node_modules", "__pycache__", "lib/site-packages", ".gitattributes"}
    # A folder below one of them that is named is data.
    assert looked_at(tmp_path / "lib" / "site-packages") == (["e.py"], {})


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    write(other / "a.txt", PROSE)
    write(data / "b.txt", PROSE + "b")
    (data / "linked").symlink_to(other)
    (data / "loop").symlink_to(data)
    (data / "twice").symlink_to(other)
    (data / "same.txt").symlink_to(data / "b.txt")
    (data / "broken").symlink_to(tmp_path / "nothing")
    names, left_out = looked_at(data)
    assert names == ["b.txt", "linked/a.txt"]
    again = "the same again through a link"
    assert left_out == {"loop": again, "twice": again, "same.txt": again, "broken": "a broken link"}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "a.txt", PROSE)
    assert looked_at(tmp_path) == (["a.txt"], {"pipe": "no regular file"})
    assert "no regular file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", PROSE)
    write(tmp_path / "b.txt", PROSE).chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    denied = "cannot be read: Permission denied"
    assert looked_at(tmp_path)[1] == {"b.txt": denied, "closed": denied}


def test_a_folder_that_nobody_may_look_into_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the one above, for whom nothing is closed."""
    write(tmp_path / "a.txt", PROSE)
    write(tmp_path / "closed" / "b.txt", PROSE)
    usual = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert looked_at(tmp_path) == (["a.txt"], {"closed/b.txt": "cannot be read: Permission denied"})


def test_clone_of_a_data_set_is_not_its_card(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "---\nlicense: mit\n---\n# Card\n")
    write(tmp_path / ".gitattributes", "*.parquet filter=lfs\n")
    write(tmp_path / "data/train-00000-of-00001.parquet", b"PAR1" + bytes(50) + b"PAR1")
    message = refusal(tmp_path)
    for part in ("train-00000-of-00001.parquet (Parquet)", "README.md (describes the data set)", ".gitattributes (hidden)"):
        assert part in message
    assert "JSON lines with a field `text`" in message
    # Files of a data set that are to be read do not make its card text.
    write(tmp_path / "data/train.jsonl", json.dumps({"text": PROSE}))
    assert looked_at(tmp_path)[0] == ["data/train.jsonl"]
    # The card alone is known by its header; any other README is text among texts.
    write(tmp_path / "cards/README.md", "---\r\ntags: [a]\r\n---\r\n")
    assert "describes the data set" in refusal(tmp_path / "cards")
    write(tmp_path / "sources/README.md", "# Sources\n")
    assert looked_at(tmp_path / "sources") == (["README.md"], {})


def test_folder_of_save_to_disk_is_not_its_metadata(tmp_path: Path) -> None:
    write(tmp_path / "data-00000-of-00001.arrow", b"\xff\xff\xff\xff" + bytes(60))
    write(tmp_path / "dataset_info.json", json.dumps({"citation": "", "features": {}}, indent=2))
    write(tmp_path / "state.json", json.dumps({"_data_files": [], "_fingerprint": "0"}, indent=2))
    message = refusal(tmp_path)
    assert "data-00000-of-00001.arrow (Arrow)" in message
    assert "2 .json (JSON over several lines)" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt.gz", gzip.compress(PROSE.encode() * 100), ["gzip", "unpack"]),
        ("a.txt", gzip.compress(PROSE.encode()), ["gzip"]),
        ("utf16.txt", PROSE.encode("utf-16"), ["UTF-16", "iconv"]),
        ("utf16le.txt", PROSE.encode("utf-16-le"), ["UTF-16", "iconv -f UTF-16LE"]),
        ("utf16be.txt", PROSE.encode("utf-16-be"), ["UTF-16", "iconv -f UTF-16BE"]),
        ("utf32.txt", PROSE.encode("utf-32"), ["UTF-32"]),
        ("latin1.txt", ("Übergröße " * 9).encode("latin-1"), ["not UTF-8 text at byte 0", "iconv"]),
        ("late.txt", PROSE.encode() * 40_000 + b"\xe9\n", ["not UTF-8 text at byte 2640000"]),
        ("cut.txt", PROSE.encode() + "é".encode()[:1], ["not UTF-8 text at byte 66"]),
        ("zeros.txt", PROSE.encode() * 2000 + bytes(8), ["binary"]),
        ("program", b"\x7fELF" + bytes(99), ["a program"]),
        ("model.safetensors", (99).to_bytes(8, "little") + b'{"a":{}}' + bytes(9), ["safetensors"]),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ["Git LFS pointer", "lfs pull"]),
        ("a.parquet", b"PAR1" + bytes(9), ["Parquet"]),
        ("empty.txt", b"", ["empty"]),
        ("blank.txt", b" \n\r\n\t", ["blank"]),
        ("a.json", b'{"title": "t", "body": "b"}', ["JSON with fields 'title', 'body'", "`text`"]),
        ("a.json", b'{\n  "title": "t",\n  "text": "b"\n}', ["JSON over several lines"]),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', ["a JSON array of records with the field 'text'"]),
        ("a.json", b"[1, 2]", ["a JSON array"]),
        ("list.txt", b'["one", "two"]', ["a JSON array"]),
        ("chat.jsonl", b'{"messages": [{"role": "user"}]}\n' * 3, ["JSON lines with the field 'messages'", "chat"]),
        ("plain.jsonl", PROSE.encode(), ["named .jsonl, but its first line is no JSON object"]),
        ("notes.ipynb", json.dumps({"cells": [], "nbformat": 4}, indent=1).encode(), ["'cells', 'nbformat'"]),
        ("large.json", b'{\n "model": {' + b'"a": 1,\n' * 20_000, ["JSON with the field 'model'"]),
    ],
)  # fmt: skip
def test_what_is_not_text_is_refused_by_its_format(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    path = write(tmp_path / "alone" / name, content)
    for message in (refusal(path), refusal(path.parent)):
        for word in words:
            assert word in message
    # In a folder with text it is left out, and named.
    write(path.parent / "z.txt", PROSE)
    names, left_out = looked_at(path.parent)
    assert names == ["z.txt"]
    assert set(left_out) == {name}


@pytest.mark.parametrize(
    "content",
    [
        "{ not json }\n", "[WARNING] disk full\n", "[1] A reference.\n[2] Another.\n", "[[link]] to\n",
        "{\\bf TeX}\n", '{% raw %}\n"a": 1\n',
        "\ufeffWith a mark.\n", "12\n", "\x1b[31mred\x1b[0m\n", "a\fb\n", "{'python': 1}\n", "{}\n", "GIF is it\n",
        "GIF89 is a format, GIF8 none.\n", "ORCHIDS bloom.\n", "GGUF holds weights.\n", "PAR1 is a road.\n", "BZh? No.\n",
        "ARROW1 and ARROW2\n", "GGUF: Umlaute ä\n",
    ],
)  # fmt: skip
def test_text_that_begins_oddly_is_text(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.txt", content)
    if content == "{}\n":
        assert "JSON" in refusal(path)
    else:
        assert looked_at(path) == ([str(path)], {})


def test_zip_in_all_its_forms(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("a.xml", PROSE)
    assert "a zip archive or a document in one" in refusal(tmp_path / "a.docx")
    shutil.make_archive(str(tmp_path / "b"), "tar", tmp_path, "a.docx")
    assert "a tar archive" in refusal(tmp_path / "b.tar")


def test_every_format_is_known_by_its_bytes() -> None:
    for offset, magic, other in MAGICS:
        assert sniff(b"x" * offset + magic + b"\1" * 20, True, ".txt", False).what == other.what


def test_json_lines_are_known_by_their_first_line(tmp_path: Path) -> None:
    one = json.dumps({"text": PROSE})
    late = json.dumps({"meta": "m" * 200_000, "text": PROSE})
    for number, content in enumerate(
        [one, one + "\n", "\n\n" + one, "\ufeff" + one, late, late + "\n" + one, one.replace(" ", "")]
    ):
        path = write(tmp_path / f"{number}.json", content)
        (file,) = find_files(path, False, silent).files
        assert file.kind is Kind.JSON_LINES


def test_bytes_may_be_text_in_any_encoding(tmp_path: Path) -> None:
    latin = write(tmp_path / "latin1.txt", ("Übergröße\n" * 9).encode("latin-1"))
    assert looked_at(latin, any_encoding=True) == ([str(latin)], {})
    noise = write(tmp_path / "noise", bytes(range(1, 256)) * 4)
    assert "binary" in refusal(noise, any_encoding=True)
    lines = write(tmp_path / "a.jsonl", b'{"text": "\xe9"}\n')
    assert "not UTF-8 text at byte 10" in refusal(lines, any_encoding=True)


def test_a_terabyte_of_nothing_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(1 << 40)  # sparse: nothing of it lies anywhere
    assert "binary" in refusal(tmp_path / "large.txt")


def test_missing_and_empty(tmp_path: Path) -> None:
    assert "nothing: does not exist" in refusal(tmp_path / "nothing")
    assert "empty folder" in refusal(tmp_path)


def test_left_out_in_one_line() -> None:
    found = Found("x", (), ())
    assert listed(found.left_out) == ""
    write_many = [Other("Parquet")] * 3
    many = [LeftOut(f"{number}.parquet", why) for number, why in enumerate(write_many)]
    assert listed([*many, LeftOut(".git", Other("hidden"), True)]) == "3 .parquet (Parquet), .git (hidden)"
    chats = [
        LeftOut(f"{number}.jsonl", Other("JSON lines", detail=detail)) for number, detail in enumerate(["with a", "with a"])
    ]
    assert listed(chats) == "2 .jsonl (JSON lines with a)"
    assert listed([*chats, LeftOut("3.jsonl", Other("JSON lines", detail="with b"))]) == "3 .jsonl (JSON lines)"
    assert listed([LeftOut(f"a.{number}", Other(str(number))) for number in range(12)]).endswith("a.7 (7), 4 others")


def test_default_text_is_what_it_was() -> None:
    """The same files in the same order, by their names alone, whatever they hold."""
    root = default_text()
    suffixes = {".txt", ".md", ".py", ".rst", ".json", ".jsonl", ".csv", ".html", ".c", ".h", ".cpp", ".java", ".js", ".tex"}
    expected = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in suffixes and file.is_file() and "site-packages" not in file.relative_to(root).parts
    )
    found = find_files(None, True, silent)
    assert [file.path for file in found.files] == expected
    assert sum(file.size_bytes for file in found.files) > 1_000_000
    assert not found.left_out


PADDING = " " * SHORT_LINE_BYTES


@pytest.mark.parametrize("padding", ["", PADDING], ids=["short", "long"])
@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a\\u00e9\\n", "b": [{}, 1]}', '{"b": NaN, "text": "c"}', '{"b": "\\ud800", "text": "c"}',
        '{"b": 1e999, "text": "d"}',
        '{"text": "one", "text": "two"}', '{"a": {"text": 1}}', '{"text": [1, {"a": "b"}]}', '{"\\ud800": 1, "text": "a"}',
    ],
)  # fmt: skip
def test_a_long_line_is_the_record_that_a_short_one_is(line: str, padding: str) -> None:
    record, plain = record_of((padding + line).encode()), json.loads(line)
    assert list(record) == list(plain)
    assert record.get("text") == plain.get("text")


@pytest.mark.parametrize(
    "line", ['{"text": "a"', '{"text" "a"}', '{"text": "a"}]', "{1: 2}", '{"text": \x00}', '{"a": ' + "[" * 200_000]
)
def test_a_long_line_that_is_no_json_is_none(line: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        record_of((PADDING + line).encode())


def test_fields_that_nobody_asks_for_take_no_memory(tmp_path: Path) -> None:
    """Where they were read they took thirty times their bytes."""
    nested = '"a": [' + "{}," * (4 << 20) + "{}]"
    for name, line in (("other.json", f"{{{nested}}}"), ("lines.jsonl", f'{{{nested}, "text": "b"}}')):
        path = write(tmp_path / name, line)
        tracemalloc.start()
        try:
            sniff(path.read_bytes(), True, path.suffix, False)
            record = record_of(line.encode())
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert record.get("text") == ("b" if name == "lines.jsonl" else None)
        assert peak_bytes < 6 * len(line)
