"""A process that turns text into tokens: its memory and its time belong to nobody else, and it can be ended at any moment.

Run as a program by `runtime.inputs.workers`. It imports nothing of this project, which would load torch into every worker.
It reads jobs as lines of JSON and answers each with a line of JSON, followed by as many bytes of tokens as that line says.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# What is encoded at once. The library takes some 150 bytes for each byte of text.
PIECE_BYTES = 512 << 10
# A longer text is cut, each piece encoded with this much of its neighbours, and joined where both agree.
CONTEXT_BYTES = 8 << 10
# Characters on either side of a seam in which both encodings have to agree: far more than any token or rule reaches.
AGREEMENT = 512
# Ends a document where the tokenizer names no token for it.
SEPARATOR = "\n\n"
AUTO, NONE = "auto", "none"  # choices of what ends a document, beside a token's text
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Near(NamedTuple):
    """Tokens near a seam: the number of the first, and (start, end, token) of each, in characters from the seam."""

    first: int
    tokens: list[list[int]]


NOWHERE = Near(0, [])


@dataclass
class Piece:
    """Tokens of a part of a text with its context, and those near its two seams; no seam where the text begins or ends."""

    tokens: np.ndarray
    head: Near | None = None
    tail: Near | None = None


def seam(tail: Near, head: Near) -> tuple[int, int] | None:
    """Where two pieces meet: how many tokens of the first are kept, and how many of the second are dropped.

    None where their encodings of the text around the seam differ.
    """
    if not tail.tokens or tail.tokens != head.tokens:
        return None
    place = next((number for number, token in enumerate(tail.tokens) if token[0] >= 0), len(tail.tokens))
    return tail.first + place, head.first + place


def even_spans(size: int, piece: int) -> list[tuple[int, int]]:
    """Starts and ends of pieces of a text; the last one is longer rather than short."""
    starts = list(range(0, max(1, size - piece // 4), piece))
    return list(zip(starts, [*starts[1:], size], strict=True))


class Stitched:
    """The tokens of a long text from those of its pieces, part by part.

    pieces: in order, each with both contexts
    again: encodes the piece of this number anew, with its left and its right context or without
    rough: afterwards, the cuts where encodings did not agree: both pieces are encoded as if the text ended there
    """

    def __init__(self, pieces: Iterable[Piece], again: Callable[[int, bool, bool], Piece]) -> None:
        self.rough = 0
        self._pieces = pieces
        self._again = again

    def __iter__(self) -> Iterator[np.ndarray]:
        current, dropped, clean = None, 0, True
        for number, arrived in enumerate(self._pieces):
            following = arrived
            if current is None:
                current = following
                continue
            met = seam(current.tail or NOWHERE, following.head or NOWHERE)
            if met is None:
                self.rough += 1
                current = self._again(number - 1, clean, False)
                following = self._again(number, False, True)
            kept, next_dropped = met or (len(current.tokens), 0)
            yield current.tokens[dropped:kept]
            current, dropped, clean = following, next_dropped, met is not None
        if current is not None:
            yield current.tokens[dropped:]


@dataclass
class TextEncoder:
    """A tokenizer as transformers uses it: the truncation and padding saved with it are not applied.

    prefix, suffix: tokens that its own rules put around a text
    end: what ends a document: a token behind the suffix, or text before it
    """

    tokenizer: Any
    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)
    end_token: int | None = None
    end_text: str = ""

    def opening(self) -> list[int]:
        """Tokens before those of a document's text."""
        return self.prefix

    def closing(self) -> list[int]:
        """Tokens behind those of a document's text."""
        end = [] if self.end_token is None or self.suffix[-1:] == [self.end_token] else [self.end_token]
        return self.suffix + end

    def tokens(self, text: str) -> np.ndarray:
        """Tokens of a text that is short enough to be encoded at once, without any around it."""
        if not text:
            return np.empty(0, np.uint32)
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array(encoding.ids, dtype=np.uint32)

    def piece(self, left: str, core: str, right: str) -> Piece:
        """Tokens of left + core + right, and those near the seams between them, of which an empty context has none.

        Where tokens lie in a text takes as long to know as the tokens: it is asked for around the seams alone.
        """
        text = left + core + right
        ids = self.tokens(text)
        head = tail = None
        if left:
            around, head = self._near(text[: 2 * len(left)], len(left))
            known = head.first + len(head.tokens)
            if not np.array_equal(around[:known], ids[:known]):
                head = self._near(text, len(left))[1]
        if right:
            start = max(0, len(text) - 2 * len(right))
            around, tail = self._near(text[start:], len(left) + len(core) - start)
            known = len(around) - tail.first
            if np.array_equal(around[tail.first :], ids[len(ids) - known :]):
                tail = tail._replace(first=len(ids) - known)
            else:
                tail = self._near(text, len(left) + len(core))[1]
        return Piece(ids, head, tail)

    def _near(self, text: str, at: int) -> tuple[np.ndarray, Near]:
        """All tokens of a text, and those near a place in it."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids

        def start(number: int) -> int:
            return int(encoding.token_to_chars(number)[0])

        first = bisect.bisect_left(range(len(ids)), at - AGREEMENT, key=start)
        found = []
        for number in range(first, len(ids)):
            begins, ends = encoding.token_to_chars(number)
            if ends > at + AGREEMENT:
                break
            found.append([begins - at, ends - at, ids[number]])
        return np.array(ids, dtype=np.uint32), Near(first, found)

    def long_tokens(self, text: str) -> tuple[np.ndarray, int]:
        """Tokens of a text of any length, encoded in pieces, and the number of cuts where its pieces did not agree."""
        spans = even_spans(len(text), PIECE_BYTES // 4)  # a character has up to four bytes
        if len(spans) < 2:
            return self.tokens(text), 0
        context = CONTEXT_BYTES // 4

        def piece(number: int, left: bool = True, right: bool = True) -> Piece:
            start, end = spans[number]
            before = text[max(0, start - context) : start] if left else ""
            return self.piece(before, text[start:end], text[end : end + context] if right else "")

        stitched = Stitched(map(piece, range(len(spans))), piece)
        return np.concatenate(list(stitched)), stitched.rough


class ByteEncoder:
    """Bytes as tokens; documents end as the option says."""

    def __init__(self, end: str) -> None:
        self.end_bytes = {AUTO: SEPARATOR, NONE: ""}.get(end, end).encode()


def load_encoder(folder: Path, end: str) -> tuple[TextEncoder, dict[str, Any]]:
    """The tokenizer in a folder, and what is to be said of it. Raises ValueError naming the file and what to do."""
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILES[0]
    raw = path.read_bytes()
    _check_content(path, raw)
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
        saved = [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]
        tokenizer.no_truncation()
        tokenizer.no_padding()
        prefix, suffix = _around(tokenizer)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises bare Exception, and what its panics raise is none
        raise ValueError(f"{path}: not a tokenizer: {_first_line(error)}; download the file again") from None
    config = _json_object(folder / TOKENIZER_FILES[1])
    _add_tokens(tokenizer, config, folder / TOKENIZER_FILES[1])
    named = _end_token(config, folder)
    token = {AUTO: named, NONE: None}.get(end, end)
    encoder = TextEncoder(tokenizer, prefix, suffix)
    if token is not None:
        encoder.end_token = tokenizer.token_to_id(token)
        if encoder.end_token is None:
            source = folder / TOKENIZER_FILES[1] if end == AUTO else "--document-end"
            raise ValueError(f"{source}: the end-of-text token {token!r} is not in {path}; name another with --document-end")
    elif end == AUTO:
        encoder.end_text = SEPARATOR
    told = {
        "saved": saved,
        "opening": [tokenizer.id_to_token(number) for number in encoder.opening()],
        "closing": [tokenizer.id_to_token(number) for number in encoder.closing()],
        "separator": bool(encoder.end_text),
    }
    return encoder, told


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer's own rules put before and behind a text."""
    for probe in ("a", "1", "the", "\n", "."):
        encoding = tokenizer.encode(probe)
        own = [number for number, added in enumerate(encoding.special_tokens_mask) if not added]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    return [], []


def _add_tokens(tokenizer: Any, config: dict[str, Any], path: Path) -> None:
    """Tokens that only tokenizer_config.json has, as transformers adds them."""
    from tokenizers import AddedToken

    added = config.get("added_tokens_decoder")
    for number, entry in sorted((added if isinstance(added, dict) else {}).items(), key=lambda item: item[0].zfill(20)):
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or tokenizer.token_to_id(content) is not None:
            continue
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(content, **flags)])
        if str(tokenizer.token_to_id(content)) != number:
            raise ValueError(
                f"{path}: added_tokens_decoder gives {content!r} the number {number}, behind the tokens of tokenizer.json it "
                f"would have {tokenizer.token_to_id(content)}; the two files are of different tokenizers"
            )


def _end_token(config: dict[str, Any], folder: Path) -> str | None:
    """The end-of-text token that the tokenizer's files name, read as transformers reads them."""
    named = config
    if "added_tokens_decoder" not in config:
        named = config | _json_object(folder / TOKENIZER_FILES[2])
    token = named.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none. Raises ValueError where it holds something else."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    _check_content(path, raw)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {_first_line(error)}; download the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object; download the file again")
    return found


def _check_content(path: Path, raw: bytes) -> None:
    if raw.startswith(LFS_POINTER):
        what = "is a Git LFS pointer, the file itself was not downloaded"
        raise ValueError(f"{path}: {what}; run `git lfs pull` in {path.parent}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Worker:
    """Answers jobs one after the other."""

    def __init__(self, encoder: TextEncoder | ByteEncoder, vocabulary: int, dtype: str) -> None:
        self.encoder = encoder
        self.vocabulary = vocabulary
        self.dtype = np.dtype(dtype)

    def answer(self, job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """What a job gives. Raises ValueError for what is wrong with its text."""
        answers = {"texts": self._texts, "lines": self._lines, "piece": self._piece}
        head, tokens = answers[job["kind"]](job)
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= self.vocabulary:
            raise ValueError(f"the tokenizer gives token {largest}, the model's vocabulary has {self.vocabulary}")
        return head | {"largest": largest}, tokens.astype(self.dtype)

    def _texts(self, job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Small files, each a document."""
        raws = [_read(file, 0, file["size"]) for file in job["files"]]
        if isinstance(self.encoder, ByteEncoder):
            return {"documents": len(raws)}, np.frombuffer(b"".join(raw + self.encoder.end_bytes for raw in raws), np.uint8)
        return self._documents([raw.decode("utf-8-sig") for raw in raws])

    def _lines(self, job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Lines of JSON, each a document in its field `text`."""
        (file,) = job["files"]
        texts, empty = [], 0
        at = job["start"]
        for line in _read(file, job["start"], job["end"]).split(b"\n"):
            body = line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
            if body.strip():
                text = _text_of(body, file["name"], at)
                if text:
                    texts.append(text)
                else:
                    empty += 1
            at += len(line) + 1
        if isinstance(self.encoder, ByteEncoder):
            joined = b"".join(text.encode() + self.encoder.end_bytes for text in texts)
            return {"documents": len(texts), "empty": empty}, np.frombuffer(joined, np.uint8)
        head, tokens = self._documents(texts)
        return head | {"empty": empty}, tokens

    def _documents(self, texts: list[str]) -> tuple[dict[str, Any], np.ndarray]:
        assert isinstance(self.encoder, TextEncoder)
        parts: list[np.ndarray] = [np.empty(0, np.uint32)]
        rough = 0
        for text in texts:
            inner, cuts = self.encoder.long_tokens(text + self.encoder.end_text)
            rough += cuts
            parts += [np.array(self.encoder.opening(), np.uint32), inner, np.array(self.encoder.closing(), np.uint32)]
        return {"documents": len(texts), "rough": rough}, np.concatenate(parts)

    def _piece(self, job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """A part of a large file; what opens and closes a document is at its first and last."""
        (file,) = job["files"]
        start, end, size = job["start"], job["end"], file["size"]
        if isinstance(self.encoder, ByteEncoder):
            closing = self.encoder.end_bytes if end == size else b""
            return {"documents": int(end == size)}, np.frombuffer(_read(file, start, end) + closing, np.uint8)
        before, after = max(0, start - job["before"]), min(size, end + job["after"])
        raw = _read(file, before, after)
        # Contexts may begin and end inside a character; a piece does not.
        left = raw[: start - before].decode(errors="ignore")
        core = raw[start - before : end - before].decode("utf-8-sig" if start == 0 else "utf-8")
        right = raw[end - before :].decode(errors="ignore")
        piece = self.encoder.piece(left, core + (self.encoder.end_text if end == size else ""), right)
        opening = np.array(self.encoder.opening() if start == 0 else [], np.uint32)
        closing_tokens = np.array(self.encoder.closing() if end == size else [], np.uint32)
        shifted = None if piece.tail is None else piece.tail._replace(first=piece.tail.first + len(opening))
        head = {"documents": int(end == size), "head": piece.head, "tail": shifted}
        return head, np.concatenate([opening, piece.tokens, closing_tokens])


def _read(file: dict[str, Any], start: int, end: int) -> bytes:
    """Bytes of a file that is still the one that was looked at."""
    with Path(file["path"]).open("rb", buffering=0) as stream:
        parts, at = [], start
        while at < end and (part := os.pread(stream.fileno(), end - at, at)):
            parts.append(part)
            at += len(part)
        now = os.fstat(stream.fileno())
    if at < end or [now.st_size, now.st_mtime_ns] != [file["size"], file["modified_ns"]]:
        raise ValueError(f"--data {file['name']}: has changed while it was read; start again when it is complete")
    return b"".join(parts)


def _text_of(line: bytes, name: str, at: int) -> str:
    """The text of a JSON line. Raises ValueError naming the file, the line's place and what is wrong."""
    where = f"--data {name}: the line at byte {at}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {_first_line(error)}; mend it or leave it out") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object; only lines with a field `text` are read")
    if "text" not in record:
        fields = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"{where} has no field `text` (fields: {fields}); only lines with a field `text` are read")
    text = record["text"]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field `text` is no string but {json.dumps(text)[:40]}; mend it or leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: field `text` holds half of a surrogate pair, which is no character; mend it") from None
    return text


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    """Load what the first line names, then answer every line that follows; returns when there are no more."""

    def reply(head: dict[str, Any], tokens: np.ndarray | None = None) -> None:
        raw = b"" if tokens is None else tokens.tobytes()
        answers.write(json.dumps(head | {"bytes": len(raw)}).encode() + b"\n" + raw)
        answers.flush()

    settings = json.loads(jobs.readline() or b"null")
    if settings is None:
        return
    try:
        told: dict[str, Any] = {}
        encoder: TextEncoder | ByteEncoder = ByteEncoder(settings["end"])
        if settings["tokenizer"] is not None:
            encoder, told = load_encoder(Path(settings["tokenizer"]), settings["end"])
        worker = Worker(encoder, settings["vocabulary"], settings["dtype"])
        reply(told | {"resident_bytes": _resident_bytes()})
    except (ValueError, OSError) as error:
        reply({"error": str(error)})
        return
    for line in jobs:
        try:
            head, tokens = worker.answer(json.loads(line))
            reply(head, tokens)
        except (ValueError, OSError) as error:
            reply({"error": str(error)})
        except MemoryError:
            reply({"error": "a worker is out of memory; give more --host-memory, or shorter lines"})


def main() -> None:
    """Serve on standard input and output, which no library may write to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker of its own
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for answers any more
        serve(sys.stdin.buffer, answers)
    os._exit(0)  # nothing is left to do, and freeing a vocabulary takes time


if __name__ == "__main__":
    main()
