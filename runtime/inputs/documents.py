"""Files as documents, and documents as jobs of bounded size for encoder processes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from runtime.inputs.files import MAX_LINE_BYTES, DataFile
from runtime.inputs.sniffing import Kind
from runtime.inputs.text_encoder import CONTEXT_BYTES, PIECE_BYTES, Near, Piece, Stitched
from runtime.inputs.workers import Answer, Encoders, in_order

LINE_START = re.compile(rb"\n(?=[^\s\x80-\xbf])")
FILES_IN_A_JOB = 256

Job = dict[str, Any]


def jobs_of(files: Sequence[DataFile]) -> Iterator[Job]:
    """Jobs in the order of the files: several small texts, a part of a large one, or some lines of JSON."""
    small: list[DataFile] = []
    for file in files:
        fits = file.kind is Kind.TEXT and file.size_bytes <= PIECE_BYTES
        if small and (not fits or len(small) == FILES_IN_A_JOB or sum(each.size_bytes for each in small) > PIECE_BYTES // 2):
            yield _texts(small)
            small = []
        if fits:
            small.append(file)
        elif file.kind is Kind.JSON_LINES:
            yield from _lines(file)
        else:
            yield from _pieces(file)
    if small:
        yield _texts(small)


def _described(file: DataFile) -> Job:
    return {"path": str(file.path), "name": file.name, "size": file.size_bytes, "modified_ns": file.modified_ns}


def _texts(files: list[DataFile]) -> Job:
    return {"kind": "texts", "files": [_described(file) for file in files], "size": sum(file.size_bytes for file in files)}


def _lines(file: DataFile) -> Iterator[Job]:
    """Whole lines, as many as are about a piece. Raises ValueError for a line that is too long to be held."""
    with file.path.open("rb", buffering=0) as stream:
        start = 0
        while start < file.size_bytes:
            end = min(start + PIECE_BYTES, file.size_bytes)
            while end < file.size_bytes:
                block = os.pread(stream.fileno(), CONTEXT_BYTES, end)
                place = block.find(b"\n")
                end = end + place + 1 if place >= 0 else end + max(1, len(block))
                if place >= 0 or not block:
                    break
                if end - start > MAX_LINE_BYTES:
                    longest = f"{MAX_LINE_BYTES >> 20} MiB"
                    raise ValueError(
                        f"--data {file.name}: a line behind byte {start} is longer than {longest}; divide its text"
                    )
            yield {"kind": "lines", "files": [_described(file)], "start": start, "end": end, "size": end - start}
            start = end


def _pieces(file: DataFile) -> Iterator[Job]:
    """Parts of a large text, cut where a line starts, if there is one, and never inside a character."""
    with file.path.open("rb", buffering=0) as stream:
        start = 0
        while start < file.size_bytes:
            end = start + PIECE_BYTES
            if end + PIECE_BYTES // 4 >= file.size_bytes:
                end = file.size_bytes
            else:
                end = _good_cut(os.pread(stream.fileno(), PIECE_BYTES // 4, end - PIECE_BYTES // 4), end)
            yield {
                "kind": "piece", "files": [_described(file)], "start": start, "end": end, "size": end - start,
                "before": CONTEXT_BYTES, "after": CONTEXT_BYTES,
            }  # fmt: skip
            start = end


def _good_cut(before: bytes, end: int) -> int:
    """Where to cut at the latest at `end`, before which these bytes lie."""
    starts = [match.end() for match in LINE_START.finditer(before)]
    if starts:
        return end - len(before) + starts[-1]
    # Text in another encoding, which has no characters here, is cut anywhere.
    inside = next((back for back in range(1, 5) if before[-back:][:1] and before[-back] & 0xC0 != 0x80), 1)
    return end - inside


class Encoded:
    """Tokens of files, part by part, and afterwards counts of what was encoded.

    documents: with any text; empty: without; rough: cuts inside documents where tokens may differ from those of the whole
    largest: the largest token
    """

    def __init__(self, files: Sequence[DataFile], encoders: Encoders, done: Callable[[int], None]) -> None:
        self.documents = self.empty = self.rough = self.largest = 0
        self._files = files
        self._encoders = encoders
        self._done = done

    def __iter__(self) -> Iterator[np.ndarray]:
        answers = in_order(self._encoders, jobs_of(self._files))
        for job, answer in answers:
            if job["kind"] != "piece" or "head" not in answer.head:  # bytes need no joining
                self._count(job, answer)
                yield answer.tokens
            else:
                yield from self._joined(job, answer, answers)

    def _joined(self, job: Job, answer: Answer, answers: Iterator[tuple[Job, Answer]]) -> Iterator[np.ndarray]:
        """All pieces of the document that begins with this job."""
        jobs: list[Job] = []

        def pieces() -> Iterator[Piece]:
            following, encoded = job, answer
            while True:
                jobs.append(following)
                self._count(following, encoded)
                yield _piece(encoded)
                if following["end"] == following["files"][0]["size"]:
                    return
                following, encoded = next(answers)

        def again(number: int, left: bool, right: bool) -> Piece:
            context = {"before": CONTEXT_BYTES * left, "after": CONTEXT_BYTES * right}
            return _piece(self._encoders.submit(jobs[number] | context).result())

        stitched = Stitched(pieces(), again)
        yield from stitched
        self.rough += stitched.rough

    def _count(self, job: Job, answer: Answer) -> None:
        self.documents += answer.head["documents"]
        self.empty += answer.head.get("empty", 0)
        self.rough += answer.head.get("rough", 0)
        self.largest = max(self.largest, answer.head["largest"])
        self._done(job["size"])


def _piece(answer: Answer) -> Piece:
    head, tail = (None if near is None else Near(*near) for near in (answer.head["head"], answer.head["tail"]))
    return Piece(answer.tokens, head, tail)
