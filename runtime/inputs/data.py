"""Real text as token windows: files or folders, a tokenizer if there is one, bytes otherwise."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst", ".json", ".jsonl", ".csv", ".html", ".c", ".h", ".cpp", ".java", ".js", ".tex"}
DOCUMENT_SEPARATOR = b"\n\n"
# Text beyond this many tokens is not read: it keeps memory and start-up time bounded, whatever the number of steps.
MAX_TOKENS = 1 << 26


class MicroBatch(NamedTuple):
    """One micro-batch of a step. All int64, flattened to [micro_batch x seq_len].

    inputs and labels are shifted by one token; `distinct` are the token numbers that occur and
    `positions_in_distinct` says for each input which of them it is.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    distinct: torch.Tensor
    positions_in_distinct: torch.Tensor


class TokenWindows:
    """A token sequence cut into windows of seq_len + 1, dealt out in a new random order each epoch.

    Which windows a step gets depends on the seed and the step number alone.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, global_batch: int, seed: int = 0) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._global_batch = global_batch
        self._seed = seed
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise ValueError(f"the data holds {len(tokens)} tokens, one sequence needs {seq_len + 1}; give more text")
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def micro_batch(self, step: int, micro: int, size: int) -> MicroBatch:
        """Micro-batch `micro` of `size` sequences of a step."""
        first = step * self._global_batch + micro * size
        rows = [self._window(first + index) for index in range(size)]
        block = np.stack(rows).astype(np.int64)
        inputs = np.ascontiguousarray(block[:, :-1]).reshape(-1)
        distinct, inverse = np.unique(inputs, return_inverse=True)
        return MicroBatch(
            inputs=torch.from_numpy(inputs),
            labels=torch.from_numpy(np.ascontiguousarray(block[:, 1:]).reshape(-1)),
            distinct=torch.from_numpy(distinct),
            positions_in_distinct=torch.from_numpy(inverse.reshape(-1)),
        )

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self.windows)
        start = int(self._order[place]) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]


def default_text() -> Path:
    """Text that is present wherever Python is: the sources of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(path: Path) -> list[Path]:
    """The text files at a path, in a stable order. Raises ValueError if there are none."""
    if not path.exists():
        raise ValueError(f"--data {path}: does not exist; name a text file or a folder of them")
    if path.is_file():
        return [path]
    # Installed packages are not part of the text that a folder holds.
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in TEXT_SUFFIXES and file.is_file() and "site-packages" not in file.relative_to(path).parts
    )
    if not found:
        raise ValueError(f"--data {path}: holds no text files (looked for {', '.join(sorted(TEXT_SUFFIXES))})")
    return found


def tokenize(path: Path, weights: Path | None, vocabulary: int, byte_tokens: bool = False) -> np.ndarray:
    """Tokens of the text at `path`, at most MAX_TOKENS, in the smallest dtype that holds the vocabulary.

    With a `tokenizer.json` in the weights directory that tokenizer is used, without weights bytes are
    tokens. Raises ValueError for missing or empty text, weights without a tokenizer (unless
    `byte_tokens`), or a vocabulary too small.
    """
    files = text_files(path)
    tokenizer = None if byte_tokens else _tokenizer(weights)
    if tokenizer is None and vocabulary < 256:
        raise ValueError(
            f"byte-level tokens need a vocabulary of 256, the model has {vocabulary}; put a tokenizer.json in --weights"
        )
    dtype = np.uint8 if tokenizer is None else np.min_scalar_type(vocabulary - 1)
    parts: list[np.ndarray] = []
    count = 0
    for file in files:
        try:
            with file.open("rb") as text:
                raw = text.read(16 * MAX_TOKENS) + DOCUMENT_SEPARATOR
        except OSError as error:
            raise ValueError(f"--data {file}: cannot be read: {error.strerror}") from None
        if tokenizer is None:
            part = np.frombuffer(raw, dtype=np.uint8)
        else:
            part = np.array(tokenizer.encode(raw.decode("utf-8", errors="replace")).ids, dtype=np.int64)
            if len(part) and int(part.max()) >= vocabulary:
                raise ValueError(f"the tokenizer gives token {int(part.max())}, the model's vocabulary has {vocabulary}")
        parts.append(part.astype(dtype))
        count += len(part)
        if count >= MAX_TOKENS:
            break
    return np.concatenate(parts)[:MAX_TOKENS]


def _tokenizer(weights: Path | None):  # type: ignore[no-untyped-def]
    if weights is None:
        return None
    file = weights / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"--weights {weights}: has no tokenizer.json, and other tokens than those it learned would ruin it; "
            "add the file, or pass --byte-tokens for a model that has learned bytes"
        )
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
