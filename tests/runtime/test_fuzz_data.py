"""Whatever lies in data files and beside weights: one line that names it, or tokens; never another exception."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import readings
from runtime.inputs.documents import jobs_of
from runtime.inputs.encoder import Worker
from runtime.inputs.files import find_files
from runtime.inputs.sniffing import MAGICS
from runtime.inputs.text_encoder import AUTO, TOKENIZER_FILES, ByteEncoder, TextEncoder, load_encoder
from slideplan.progress import silent
from tokenizers_made import WORDS, gpt2, llama2, unigram, wordpiece, write_tokenizer

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "\ud800"]), inner, max_size=3),
    max_leaves=6,
)
PIECES = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([magic for _, magic, _ in MAGICS]),
    VALUES.map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: json.dumps({"text": value}).encode() + b"\n"),
    st.sampled_from(
        [b"\n", b"\r\n", b"\0", b"{", b'{"text": "', b"[", b"\xef\xbb\xbf", b'{"text": "a"}\n', gzip.compress(b"a" * 99)]
    ),
)
NAMES = st.sampled_from(["a", "a.txt", "B.TXT", "a.json", "a.jsonl", "README.md", "a.parquet", ".hidden", "a.csv", "a\nb.txt"])


@contextlib.contextmanager
def one_line() -> Any:
    """Let through what a user is told: one line. Anything else fails the test."""
    try:
        yield
    except ValueError as error:
        assert not isinstance(error, UnicodeError)
        assert "\n" not in str(error).replace("a\nb.txt", "")  # the name of what was asked for is its user's own


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[TextEncoder | ByteEncoder]:
    folder = write_tokenizer(tmp_path_factory.mktemp("weights"), gpt2(), eos_token="</s>")
    return [load_encoder(folder, AUTO)[0], ByteEncoder(AUTO)]


@readings(60)
@given(st.dictionaries(NAMES, st.lists(PIECES, max_size=6).map(b"".join), min_size=1, max_size=4), st.booleans())
def test_any_folder_is_read_or_refused(
    encoders: list[TextEncoder | ByteEncoder],
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, bytes],
    bytes_are_tokens: bool,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    worker = Worker(encoders[bytes_are_tokens], 1000, "uint16")
    with one_line():
        found = find_files(folder, bytes_are_tokens, silent)
        assert len(found.files) + len(found.left_out) == len(contents)
        for job in jobs_of(found.files):
            head, tokens = worker.answer(json.loads(json.dumps(job)))
            assert head["largest"] == max(tokens.tolist(), default=0)
    for name in contents:  # each alone is the same file
        with one_line():
            find_files(folder / name, bytes_are_tokens, silent)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value, a few of each vocabulary."""
    inner = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [path] * bool(path) + [place for key, each in inner[:12] for place in places(each, (*path, key))]


SAVED = {make.__name__: json.loads(make().to_str()) for make in (gpt2, llama2, unigram, wordpiece)}
SETTINGS = {"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"1": {"content": "</s>", "special": True}, "9999": {}}}


@readings(60)
@given(st.data(), st.sampled_from(sorted(SAVED)), st.sampled_from(TOKENIZER_FILES[:2]))
def test_any_tokenizer_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, changed: str
) -> None:
    """With one value of its files replaced by another, left out, or the file cut."""
    folder = tmp_path_factory.mktemp("weights")
    contents = {TOKENIZER_FILES[0]: SAVED[kind], TOKENIZER_FILES[1]: SETTINGS}
    document = json.loads(json.dumps(contents[changed]))
    path = data.draw(st.sampled_from(places(document)))
    target = document
    for key in path[:-1]:
        target = target[key]
    if data.draw(st.booleans()):
        target[path[-1]] = data.draw(VALUES)
    else:
        del target[path[-1]]
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(document if name == changed else value))
    if data.draw(st.integers(0, 9)) == 0:
        raw = (folder / changed).read_bytes()
        (folder / changed).write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with one_line():
        loaded, _ = load_encoder(folder, AUTO)
        loaded.long_tokens(WORDS)


def test_a_name_with_a_line_feed_does_not_make_two_lines(tmp_path: Path) -> None:
    (tmp_path / "a\nb.gz").write_bytes(gzip.compress(b"a"))
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.gz")).write_bytes(gzip.compress(b"a"))
    with pytest.raises(ValueError, match="gzip") as caught:
        find_files(tmp_path, False, silent)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
