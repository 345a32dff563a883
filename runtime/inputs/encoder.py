"""A process that turns text into tokens: its memory and its time belong to nobody else, and it can be ended at any moment.

Started by `runtime.inputs.workers`. Of this project it imports nothing that would load torch into every worker.
It reads jobs as lines of JSON and answers each with a line of JSON, followed by as many bytes of tokens as that line says.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.inputs.sniffing import record_of
from runtime.inputs.text_encoder import ByteEncoder, TextEncoder, first_line, load_encoder


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
        record = record_of(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {first_line(error)}; mend it or leave it out") from None
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
