"""Encoder processes of this run: started with the first job, ended with the run, at the latest when an interrupt comes."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.lanes.clock import RunError
from slideplan.machine.host import usable_cores

ROOT = Path(__file__).parents[2]
# The package of this process and no other of its name; what else lies beside it must not hide Python's own modules.
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import runtime; del sys.path[0]\n"
    "from runtime.inputs.encoder import main; main()"
)
# What a worker takes beside what it holds when it is ready: text, tokens and the library's own of one piece.
WORKING_BYTES = 192 << 20


class Answer(NamedTuple):
    """What an encoder answers: the head of its answer, as `encoder` writes it, and tokens."""

    head: dict[str, Any]
    tokens: np.ndarray


@dataclass(frozen=True)
class EncoderSettings:
    """What encoder processes load. tokenizer: the folder of tokenizer.json; None: bytes are tokens."""

    tokenizer: Path | None
    end: str
    vocabulary: int
    dtype: str


class _Process:
    """One encoder process, spoken to by one thread at a time."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._dtype = np.dtype(settings.dtype)
        self._process = subprocess.Popen(
            # -P: nothing in the folder that the user is in takes the place of a library.
            [sys.executable, "-P", "-c", START, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            process_group=0,  # Ctrl-C at the terminal goes to this process, which ends them
        )
        folder = None if settings.tokenizer is None else str(settings.tokenizer)
        start = {"tokenizer": folder, "end": settings.end, "vocabulary": settings.vocabulary, "dtype": settings.dtype}
        try:
            self.told = self.ask(start).head
        except BaseException:
            self.end()
            raise

    def ask(self, job: dict[str, Any]) -> Answer:
        """Raises ValueError for what is wrong with the text or tokenizer, RunError where the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        head = json.loads(line)
        raw = self._process.stdout.read(head["bytes"])
        if len(raw) < head["bytes"]:
            raise self._died()
        if "error" in head:
            raise ValueError(head["error"])
        return Answer(head, np.frombuffer(raw, dtype=self._dtype))

    def _died(self) -> RunError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        why = f"signal {-code}, as the system sends it where memory is short" if code < 0 else f"exit code {code}"
        return RunError(f"a tokenising process has ended with {why}" + (f": {said[-1][:200]}" if said else ""))

    def end(self) -> None:
        """Nothing of it is left afterwards."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


class Encoders:
    """Encoder processes, as many as there are cores, jobs, and room for in `host_bytes` of memory.

    told: what the first of them says of its tokenizer. Raises ValueError where it cannot be used.
    """

    def __init__(self, settings: EncoderSettings, jobs: int, host_bytes: int) -> None:
        self._settings = settings
        self._processes: list[_Process] = []
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        try:
            self._start()
            self.told = self._processes[0].told
            room = host_bytes // (self.told["resident_bytes"] + WORKING_BYTES)
            self.count = max(1, min(usable_cores(), jobs, room))
            self._threads = ThreadPoolExecutor(self.count)
            for started in [self._threads.submit(self._start) for _ in range(self.count - 1)]:
                started.result()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        process = _Process(self._settings)
        self._processes.append(process)
        self._free.put(process)

    def submit(self, job: dict[str, Any]) -> Future[Answer]:
        """The answer to a job, as soon as a process is free for it."""
        assert self._threads is not None
        return self._threads.submit(self._ask, job)

    def _ask(self, job: dict[str, Any]) -> Answer:
        process = self._free.get()
        try:
            return process.ask(job)
        finally:
            self._free.put(process)

    def close(self) -> None:
        """End all processes at once, whatever they are doing."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()
        if self._threads is not None:
            self._threads.shutdown()
        for process in self._processes:  # one more may have been about to start
            process.end()

    def __enter__(self) -> Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_order(encoders: Encoders, jobs: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Answer]]:
    """Jobs with their answers, in the order of the jobs; no more of them are under way than keep the processes busy."""
    waiting: list[tuple[dict[str, Any], Future[Answer]]] = []
    for job in jobs:
        waiting.append((job, encoders.submit(job)))
        if len(waiting) > 2 * encoders.count + 2:
            first, answer = waiting.pop(0)
            yield first, answer.result()
    for first, answer in waiting:
        yield first, answer.result()
