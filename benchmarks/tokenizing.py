"""Text to tokens: MiB/s, memory and the answer to Ctrl-C of this project's preparation, beside `datasets.map`.

    python benchmarks/tokenizing.py FOLDER [--mib 256] [--cores 2]

The text is that of the Python packages that are installed here: sources and documentation, as JSON lines of one document
a file, and again as one large text. The tokenizer is a byte-level BPE of 32 000 tokens, trained on a part of it. Both
sides read the same JSON lines with the same tokenizer, and neither finds anything kept. `datasets` is measured if it is
installed. CPU seconds are those of all processes: they say more than wall-clock time where others use the machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

MIB = 1 << 20
SAMPLE_BYTES = 12 * MIB
SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst", ".html", ".h", ".c", ".cpp", ".js", ".css", ".xml", ".decTest"}

OURS = """
import signal, sys
from pathlib import Path
from runtime.inputs.prepare import DataRequest, prepare
from slideplan.progress import silent
signal.signal(signal.SIGINT, signal.default_int_handler)
data, weights, cache = map(Path, sys.argv[1:])
try:
    found = prepare(DataRequest(data, weights, 32_000, cache=cache, host_bytes=1 << 40), silent)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
print(len(found.tokens), found.record.rough)
"""

THEIRS = """
import sys
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast
data, weights, cache, cores = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast.from_pretrained(weights)
texts = load_dataset("json", data_files=data, split="train", cache_dir=cache)
def encode(batch):
    return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}
encoded = texts.map(encode, batched=True, num_proc=int(cores), remove_columns=texts.column_names)
print(sum(map(len, encoded.with_format("numpy")["input_ids"])), 0)
"""


def texts(size: int) -> Iterator[str]:
    """Documents of together `size` bytes: files in a stable order, from the beginning again where they do not reach."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    files = sorted(file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    taken = 0
    while taken < size:
        for file in files:
            try:
                text = file.read_text()
            except (UnicodeDecodeError, OSError):
                continue
            if text and "\0" not in text:
                yield text
                taken += len(text.encode())
            if taken >= size:
                return


def make_inputs(folder: Path, size: int) -> int:
    """The corpus in both forms, and the tokenizer; returns the bytes of text."""
    written = 0
    with (folder / "texts.jsonl").open("w") as lines, (folder / "text.txt").open("w") as whole:
        for text in texts(size):
            lines.write(json.dumps({"text": text}) + "\n")
            whole.write(text)
            written += len(text.encode())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(SAMPLE_BYTES), trainer)
    (folder / "weights").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "weights" / "tokenizer.json"))
    (folder / "weights" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return written


class PeakMemory:
    """Largest resident set of a process, and of it and its children together, looked at every 50 ms."""

    def __init__(self, process: int) -> None:
        self.main = self.together = 0
        self._process = psutil.Process(process)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            try:
                main = self._process.memory_info().rss
                # What processes share is counted once.
                children = [child.memory_full_info().uss for child in self._process.children(recursive=True)]
            except psutil.Error:
                if not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE:
                    return
                continue
            self.main, self.together = max(self.main, main), max(self.together, main + sum(children))
            time.sleep(0.05)

    def join(self) -> None:
        self._thread.join()


def measured(name: str, size: int, script: str, *arguments: object) -> None:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    memory = PeakMemory(process.pid)
    output, _ = process.communicate()
    memory.join()
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        print(f"{name}: failed with exit code {process.returncode}", flush=True)
        return
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tokens, rough = output.split()[-2:]
    mib, peak, peak_of_all = size / MIB, memory.main / MIB, memory.together / MIB
    print(
        f"{name}: {mib:.0f} MiB, {int(tokens):,} tokens in {seconds:.1f} s, {mib / seconds:.2f} MiB/s, "
        f"{cpu_seconds:.1f} CPU s, {mib / cpu_seconds:.2f} MiB per CPU s; peak memory {peak:.0f} MiB in its process, "
        f"{peak_of_all:.0f} MiB with all others; rough cuts {rough}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def interrupted(folder: Path, after_s: float) -> None:
    """Seconds from Ctrl-C to the answer, when all workers have ended, and to the end of the process, which torch takes down."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    arguments = [folder / "text.txt", folder / "weights", folder / "cache"]
    process = subprocess.Popen([sys.executable, "-c", OURS, *map(str, arguments)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    time.sleep(after_s)
    workers = len(psutil.Process(process.pid).children(recursive=True))
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    answer = process.stdout.readline().decode().strip()
    answered_s = time.monotonic() - started
    code = process.wait()
    print(
        f"Ctrl-C {after_s:.0f} s after the start, {workers} workers: {answer!r} after {answered_s:.2f} s, "
        f"exit code {code} after {time.monotonic() - started:.2f} s; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the text, the tokenizer and what is kept")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--cores", type=int, default=2)
    wanted = parser.parse_args()
    folder = wanted.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[: wanted.cores]
    os.sched_setaffinity(0, cores)
    size = make_inputs(folder, wanted.mib * MIB)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    measured("this project, JSON lines", size, OURS, folder / "texts.jsonl", folder / "weights", folder / "cache")
    measured("this project, one file", size, OURS, folder / "text.txt", folder / "weights", folder / "cache")
    measured("this project, kept", size, OURS, folder / "text.txt", folder / "weights", folder / "cache")
    shutil.rmtree(folder / "datasets", ignore_errors=True)
    measured("datasets.map", size, THEIRS, folder / "texts.jsonl", folder / "weights", folder / "datasets", len(cores))
    for after_s in (8, 12, 16):
        interrupted(folder, after_s)


if __name__ == "__main__":
    main()
