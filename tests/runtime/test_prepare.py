"""From files to tokens on disk: every token, in order, in bounded memory, kept, and ended at once when asked."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from runtime.inputs import prepare as preparing
from runtime.inputs import token_cache, workers
from runtime.inputs.files import default_text
from runtime.inputs.prepare import DataRequest, PreparedData, prepare
from runtime.inputs.text_encoder import PIECE_BYTES
from runtime.lanes.clock import RunError
from slideplan.progress import Progress, silent
from tokenizers_made import KINDS, WORDS, gpt2, llama3, write_tokenizer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "weights", llama3(), eos_token="</s>")


def ready(data: Path | None, folder: Path | None, cache: Path, **more: object) -> PreparedData:
    return prepare(DataRequest(data, folder, 1000, cache=cache, **more), silent)  # type: ignore[arg-type]


def test_documents_of_all_kinds_in_order(tmp_path: Path, weights: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("one slow link")
    (data / "b.txt").write_bytes("\ufeffthe even slot\r\n".encode())
    (data / "c.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "every unit", "n": NaN}\r\n\n  \n{"text": ""}\n'
        b'{"n": [1, {"text": "no"}], "text": "two \\u6a21 \\ud83d\\ude00"}'
    )
    (data / "d.txt").write_text("last")
    found = ready(data, weights, tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(weights / "tokenizer.json"))
    texts = ["one slow link", "the even slot\r\n", "every unit", "two 模 😀", "last"]
    assert found.tokens.tolist() == [token for text in texts for token in [*tokenizer.encode(text).ids, 1]]
    assert found.tokens.dtype == np.uint16
    assert (found.record.documents, found.record.empty) == (5, 1)
    assert found.said(100, 2, 50) == (
        f"read 4 files (JSON lines, text), 5 documents, 1 empty text skipped, {len(found.tokens)} tokens, 4 epochs in 100 steps"
    )
    assert found.said_of_tokens() == "documents start with <s>; documents end with </s>"


@pytest.mark.parametrize("kind", KINDS)
def test_large_file_has_the_tokens_of_the_whole(kind: str, tmp_path: Path) -> None:
    """Cut where lines start, where there are none, and inside characters of several bytes."""
    folder = write_tokenizer(tmp_path / "weights", KINDS[kind]())
    lines = "".join(WORDS[start:] for start in range(0, 400, 3))
    text = lines * (1 + PIECE_BYTES * 2 // len(lines.encode())) + lines.replace("\n", " ").replace("\r", "") * 20
    (tmp_path / "large.txt").write_bytes(text.encode())
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, documents in (("large.txt", [text]), ("lines.jsonl", [text, "short"])):
        found = ready(tmp_path / name, folder, tmp_path / "cache", document_end="none")
        assert found.record.rough == 0
        assert found.tokens.tolist() == [token for each in documents for token in tokenizer.encode(each).ids]


def test_rough_cuts_in_files_are_said_and_lose_nothing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "weights", gpt2())
    text = "=" * (3 * PIECE_BYTES + 77)
    (tmp_path / "a.txt").write_text("=" + text)
    found = ready(tmp_path / "a.txt", folder, tmp_path / "cache", document_end="none")
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).decode(found.tokens.tolist()) == "=" + text
    if found.record.rough:
        assert "inside long documents cut where their tokens may differ" in found.said_of_tokens()


def test_bytes_are_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_bytes(b"\xe9t\xe9" * PIECE_BYTES)
    (tmp_path / "c.jsonl").write_text('{"text": "\\u00e9"}\n')
    cache = tmp_path / "cache"
    expected = b"hello\n\n" + b"\xe9t\xe9" * PIECE_BYTES + b"\n\n" + "é\n\n".encode()
    found = ready(tmp_path, None, cache)
    assert found.tokens.tobytes() == expected
    assert found.tokens.dtype == np.uint8
    assert found.said_of_tokens() == "bytes are tokens; documents end with two line feeds"
    none = ready(tmp_path, None, cache, document_end="none")
    assert none.tokens.tobytes() == expected.replace(b"\n\n", b"")
    assert "each runs into the next" in none.said_of_tokens()
    assert ready(tmp_path / "a.txt", None, cache, document_end="<end>").tokens.tobytes() == b"hello<end>"


def test_default_text_is_bytes_as_they_were(tmp_path: Path) -> None:
    found = ready(None, None, tmp_path)
    root = default_text()
    assert found.tokens.tobytes() == b"".join((root / file.name).read_bytes() + b"\n\n" for file in found.found.files)
    assert len(found.tokens) > 1_000_000


def test_nothing_is_beyond_reach(tmp_path: Path) -> None:
    """More than 2^26 tokens: all of them are there."""
    with (tmp_path / "a.txt").open("wb") as file:
        for number in range(65):
            file.write(bytes([33 + number]) * (1 << 20))
        file.write(b"end")
    found = ready(tmp_path / "a.txt", None, tmp_path / "cache")
    assert len(found.tokens) == (65 << 20) + 5
    assert found.tokens[-5:].tobytes() == b"end\n\n"


def test_kept_tokens_are_taken_where_nothing_has_changed(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "a.txt").write_text("one slow link")
    (data / "b.txt").write_text("the even slot")
    first = ready(data, weights, cache)
    entries = set(cache.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(workers, "Encoders", None)
        patch.setattr(preparing, "Encoders", None)
        again = ready(data, weights, cache)
        assert again.tokens.tobytes() == first.tokens.tobytes()
        assert again.record == first.record
        # By content, not by name or time.
        (data / "a.txt").rename(data / "a2.txt")
        os.utime(data / "b.txt", (0, 0))
        ready(data, weights, cache)
    assert set(cache.iterdir()) == entries
    for change in (
        lambda: (data / "b.txt").write_text("the even slut"),
        lambda: (weights / "tokenizer_config.json").write_text('{"eos_token": "<s>"}'),
        lambda: write_tokenizer(weights, gpt2()),
    ):
        change()
        count = len(list(cache.glob("*.npy")))
        ready(data, weights, cache)
        assert len(list(cache.glob("*.npy"))) == count + 1
    assert ready(data, weights, cache, document_end="none").tokens.tobytes() != first.tokens.tobytes()


def test_kept_tokens_have_to_fit_the_model_too(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "a.txt").write_text("one slow link")
    largest = ready(tmp_path / "a.txt", weights, tmp_path / "cache").record.largest
    assert largest > 256  # a vocabulary just too small has the same dtype, and so the same tokens
    with pytest.raises(ValueError, match=f"gives token {largest}, the model's vocabulary has {largest}"):
        prepare(DataRequest(tmp_path / "a.txt", weights, largest, cache=tmp_path / "cache"), silent)


def test_damaged_tokens_are_made_again(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "a.txt").write_text("one slow link doubles the odd gradient")
    cache = tmp_path / "cache"
    first = ready(tmp_path / "a.txt", weights, cache).tokens.tobytes()
    (path,) = cache.glob("*.npy")
    whole = path.read_bytes()
    (record,) = cache.glob("*.json")
    for damaged in (whole[:-1] + b"\x7f", whole[:-2], whole + b"xx", whole[:50], b""):
        path.unlink()
        path.write_bytes(damaged)
        assert ready(tmp_path / "a.txt", weights, cache).tokens.tobytes() == first
        assert path.read_bytes() == whole
    for words in ("", "{}", record.read_text().replace("uint16", "object"), record.read_text().replace("uint16", "nonsense")):
        record.write_text(words)
        assert ready(tmp_path / "a.txt", weights, cache).tokens.tobytes() == first


def test_tokens_are_a_numpy_file(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "a.txt").write_text("one slow link")
    tokens = ready(tmp_path / "a.txt", weights, tmp_path / "cache").tokens
    (path,) = (tmp_path / "cache").glob("*.npy")
    assert np.array_equal(np.load(path), tokens)


def test_folder_for_tokens_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"--token-cache .*a\.txt: cannot be written"):
        ready(tmp_path / "a.txt", None, tmp_path / "a.txt")
    # The default one is a matter of convenience.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.txt"))
    found = prepare(DataRequest(tmp_path / "a.txt", None, 256), silent)
    assert found.tokens.tobytes() == b"text\n\n"
    assert "the tokens are not kept" in found.said_of_tokens()


def test_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def full(file: object, raw: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache, "_write", full)
    with pytest.raises(OSError, match="No space left on device; make room") as caught:
        ready(tmp_path / "a.txt", None, tmp_path / "cache")
    assert str(caught.value.filename).startswith(str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_half_written_tokens_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "0123.abc.partial").write_bytes(b"half")
    (tmp_path / "a.txt").write_text("text")
    ready(tmp_path / "a.txt", None, cache)
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".json"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', r"the line at byte 14 has no field `text` \(fields: 'txt'\)"),
        ('{"text": null}', "the line at byte 14: field `text` is no string but null"),
        ('{"text": "a"', "the line at byte 14 is not valid JSON"),
        ("[1]", "the line at byte 14 is no JSON object"),
        ('{"text": "\\ud800"}', "the line at byte 14: field `text` holds half of a surrogate pair"),
        ("[" * 100_000, "the line at byte 14 is not valid JSON"),
    ],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path, weights: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + '\n{"text": "b"}\n')
    for folder in (weights, None):
        with pytest.raises(ValueError, match=f"a.jsonl: {message}") as caught:
            ready(tmp_path / "a.jsonl", folder, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_line_that_is_too_long_to_hold_is_named(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(66):
            file.write(b"x" * (1 << 20))
    with pytest.raises(ValueError, match=r"a\.jsonl: a line behind byte 0 is longer than 64 MiB"):
        ready(tmp_path / "a.jsonl", None, tmp_path / "cache")


def test_tokenizer_has_to_fit_the_model(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "a.txt").write_text("one slow link doubles")
    with pytest.raises(ValueError, match=r"gives token \d+, the model's vocabulary has 50"):
        prepare(DataRequest(tmp_path / "a.txt", weights, 50, cache=tmp_path / "cache"), silent)
    assert (
        len(prepare(DataRequest(tmp_path / "a.txt", weights, 256, byte_tokens=True, cache=tmp_path / "c"), silent).tokens) == 23
    )
    with pytest.raises(ValueError, match="byte-level tokens need a vocabulary of 256"):
        prepare(DataRequest(tmp_path / "a.txt", None, 100), silent)
    (weights / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        ready(tmp_path / "a.txt", weights, tmp_path / "cache")
    (weights / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        ready(tmp_path / "a.txt", weights, tmp_path / "cache")


def test_what_is_saved_with_the_tokenizer_is_said(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=512)
    (tmp_path / "a.txt").write_text("one slow link doubles")
    found = ready(tmp_path / "a.txt", write_tokenizer(tmp_path / "w", tokenizer), tmp_path / "cache")
    assert 2 < len(found.tokens) < 50
    assert found.said_of_tokens() == (
        "documents end with two line feeds, for the tokenizer names no end-of-text token; "
        "the truncation and padding saved in tokenizer.json are not applied"
    )


def test_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one slow link")
    real = preparing.find_files

    def then_changed(*arguments: object) -> object:
        found = real(*arguments)  # type: ignore[arg-type]
        path.write_text("one slow lynx")
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(preparing, "find_files", then_changed)
    with pytest.raises(ValueError, match=r"a\.txt: has changed while it was read"):
        ready(path, None, tmp_path / "cache")


def test_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one slow link")
    killed = "import os, signal, sys\nsys.stdin.readline()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    monkeypatch.setattr(workers, "START", killed)
    with pytest.raises(RunError, match="a tokenising process has ended with signal 9"):
        ready(tmp_path / "a.txt", None, tmp_path / "cache")
    monkeypatch.setattr(workers, "START", "raise SystemExit('out of order')\n")
    with pytest.raises(RunError, match="exit code 1: out of order"):
        ready(tmp_path / "a.txt", None, tmp_path / "cache")


def large_text(path: Path, size: int) -> Path:
    """Words drawn at random, and the same again until the file is of this size."""
    generator = np.random.default_rng(0)
    words = WORDS.split()
    block = " ".join(generator.choice(words, 50_000)) + "\n"
    with path.open("w") as file:
        while file.tell() < size:
            file.write(block)
    return path


def test_memory_is_bounded_and_none_of_it_stays(tmp_path: Path, weights: Path) -> None:
    """8 MiB of text: this process grows by no more than a few buffers, its workers by no more than a piece each."""
    data = large_text(tmp_path / "a.txt", 8 << 20)
    me = psutil.Process()
    ready(large_text(tmp_path / "b.txt", 1 << 20), weights, tmp_path / "cache")
    before = me.memory_info().rss
    peaks = {"here": 0, "workers": 0}
    others = set(me.children())  # of other tests

    def watch(progress: Progress) -> None:
        peaks["here"] = max(peaks["here"], me.memory_info().rss)
        children = [child.memory_info().rss for child in set(me.children()) - others]
        peaks["workers"] = max([peaks["workers"], *children])

    prepare(DataRequest(data, weights, 1000, cache=tmp_path / "cache"), watch)
    assert peaks["here"] - before < 48 << 20
    assert 0 < peaks["workers"] < 256 << 20
    assert set(me.children()) <= others
    assert me.memory_info().rss - before < 48 << 20


def test_no_more_processes_than_there_is_memory_for(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "usable_cores", lambda: 3)
    settings = workers.EncoderSettings(weights, "auto", 1000, "uint16")
    for jobs, host_bytes, expected in ((8, 1 << 40, 3), (2, 1 << 40, 2), (8, 0, 1), (8, 600 << 20, 2)):
        with workers.Encoders(settings, jobs, host_bytes) as encoders:
            assert encoders.count == expected


PREPARE = """
import signal
import sys
from pathlib import Path
from runtime.inputs.prepare import DataRequest, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has started in the background
def show(progress):
    if progress.phase == "tokenising" and progress.done:
        print("under way", flush=True)
try:
    prepare(DataRequest(Path(sys.argv[1]), Path(sys.argv[2]), 1000, cache=Path(sys.argv[3])), show)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupt_ends_everything(number: signal.Signals, tmp_path: Path, weights: Path) -> None:
    data = large_text(tmp_path / "a.txt", 64 << 20)
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, data, weights, tmp_path / "cache"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"under way\n"
    children = psutil.Process(process.pid).children()
    assert children
    process.send_signal(number)
    code = process.wait(10)  # benchmarks/tokenizing.py says how long it takes on a machine that has nothing else to do
    if number is signal.SIGINT:
        assert code == 130, process.stderr.read()
        assert not list((tmp_path / "cache").iterdir())
    # What was killed could end nothing: its processes end when they find nobody to answer.
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_two_runs_may_prepare_the_same_at_once(tmp_path: Path, weights: Path) -> None:
    data = large_text(tmp_path / "a.txt", 2 << 20)
    found: list[bytes] = []

    def one() -> None:
        found.append(ready(data, weights, tmp_path / "cache").tokens.tobytes())

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_bar_moves_with_the_bytes_that_are_done(tmp_path: Path, weights: Path) -> None:
    data = large_text(tmp_path / "a.txt", 3 << 20)
    seen: list[Progress] = []
    prepare(replace(DataRequest(data, weights, 1000), cache=tmp_path / "cache"), seen.append)
    bar = [each for each in seen if each.phase == "tokenising"]
    assert [each.done for each in bar] == sorted(each.done for each in bar)
    assert bar[0].done == 0
    assert bar[-1].done == bar[-1].total == data.stat().st_size
    assert len(bar) > 4
