"""From files to tokens: looks at all files, tokenises what is text on all cores, and says what was read and what was not."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from runtime.inputs.documents import Encoded
from runtime.inputs.files import Found, find_files, listed
from runtime.inputs.text_encoder import AGREEMENT, CONTEXT_BYTES, PIECE_BYTES, TOKENIZER_FILES
from runtime.inputs.token_cache import TokenCache, TokenFile, TokenRecord
from runtime.inputs.workers import Encoders, EncoderSettings
from slideplan.progress import Progress, Show

PHASE = "tokenising"
# Counts up when other tokens come of the same text and options.
METHOD = 2


@dataclass(frozen=True)
class DataRequest:
    """What to read, and how it becomes tokens.

    data:       None: the default text
    weights:    folder of the model with its tokenizer.json; None: bytes are tokens
    vocabulary: of the model
    byte_tokens: bytes are tokens though there are weights
    document_end: "auto", "none", or the text of a token (of bytes: any text)
    cache:      folder in which tokens are kept; None: the default one
    host_bytes: memory that the preparation may take
    """

    data: Path | None
    weights: Path | None
    vocabulary: int
    byte_tokens: bool = False
    document_end: str = "auto"
    cache: Path | None = None
    host_bytes: int = 1 << 30

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer; None where bytes are tokens."""
        return None if self.byte_tokens else self.weights


@dataclass(frozen=True)
class PreparedData:
    """What was read: files with what was left out, and their tokens."""

    found: Found
    record: TokenRecord
    tokens: np.ndarray
    kept_in: Path | None
    bytes_are_tokens: bool

    def said(self, steps: int, windows_per_step: int, windows: int) -> str:
        """What of the data was read, and how often `steps` steps go through it, in one line."""
        return self.said_of_files(f", {steps * windows_per_step / windows:.2g} epochs in {_counted(steps, 'step')}")

    def said_of_files(self, behind: str = "") -> str:
        """What of the data was read and what was left out; `behind`: the number of tokens."""
        files, left_out = self.found.files, self.found.left_out
        total = len(files) + sum(not each.folder for each in left_out)
        kinds = sorted({file.kind for file in files})
        read = f"read {len(files)} of {total} files" if total > len(files) else f"read {_counted(len(files), 'file')}"
        empty = f", {_counted(self.record.empty, 'empty text')} skipped" if self.record.empty else ""
        return (
            f"{read} ({', '.join(kinds)}), {_counted(self.record.documents, 'document')}{empty}, "
            f"{_short(self.record.tokens)} tokens{behind}" + (f"; left out: {listed(left_out)}" if left_out else "")
        )

    def said_of_tokens(self) -> str:
        """How documents became tokens, in one line."""
        record = self.record
        opening, closing = (" ".join(names) for names in (record.opening, record.closing))
        parts = ["bytes are tokens"] if self.bytes_are_tokens else []
        if opening:
            parts.append(f"documents start with {opening}")
        if closing:
            parts.append(f"documents end with {closing}")
        elif record.separated:
            why = "" if self.bytes_are_tokens else ", for the tokenizer names no end-of-text token"
            parts.append(f"documents end with two line feeds{why}")
        else:
            parts.append("nothing ends a document: each runs into the next")
        if record.ignored:
            parts.append(f"the {' and '.join(record.ignored)} saved in tokenizer.json {_are(record.ignored)} not applied")
        if record.rough:
            parts.append(f"{_counted(record.rough, 'place')} inside long documents cut where their tokens may differ")
        if self.kept_in is None:
            parts.append("the tokens are not kept: the default folder for them cannot be written")
        return "; ".join(parts)


def prepare(request: DataRequest, show: Show) -> PreparedData:
    """Tokens of all text at a path, kept on disk and mapped from there.

    Its memory is that of processes which have ended when it returns. An interrupt ends them at once. Raises ValueError for
    what the user can mend: data without text, text that cannot be read, a tokenizer missing, broken or of another model.
    """
    tokenizer = _checked_tokenizer(request)
    found = find_files(request.data, tokenizer is None, show)
    settings = EncoderSettings(tokenizer, request.document_end, request.vocabulary, _dtype(request, tokenizer).name)
    cache = TokenCache(request.cache)
    with contextlib.closing(cache):
        key = _key(found, settings)
        file = cache.get(key, show)
        if file is None:
            file = _tokenise(found, settings, cache, key, request.host_bytes, show)
        elif (largest := file.record.largest) >= request.vocabulary:
            raise ValueError(f"the tokenizer gives token {largest}, the model's vocabulary has {request.vocabulary}")
    return PreparedData(found, file.record, file.tokens, cache.folder if cache.kept else None, tokenizer is None)


def _tokenise(found: Found, settings: EncoderSettings, cache: TokenCache, key: str, host_bytes: int, show: Show) -> TokenFile:
    total = max(1, sum(file.size_bytes for file in found.files))
    done = 0

    def more(size: int) -> None:
        nonlocal done
        done += size
        show(Progress(PHASE, done, total))

    with Encoders(settings, -(-total // PIECE_BYTES), host_bytes) as encoders:
        show(Progress(PHASE, 0, total))  # not before: what is refused gets its one line alone
        told = encoders.told
        encoded = Encoded(found.files, encoders, more)

        def record(count: int, digest: str) -> TokenRecord:
            return TokenRecord(
                tokens=count,
                dtype=settings.dtype,
                digest=digest,
                documents=encoded.documents,
                empty=encoded.empty,
                rough=encoded.rough,
                largest=encoded.largest,
                opening=tuple(told.get("opening", ())),
                closing=tuple(told.get("closing", ())),
                separated=told.get("separator", settings.end == "auto"),
                ignored=tuple(told.get("saved", ())),
            )

        return cache.put(key, settings.dtype, encoded, record)


def _checked_tokenizer(request: DataRequest) -> Path | None:
    folder = request.tokenizer
    if folder is None:
        if request.vocabulary < 256:
            raise ValueError(
                f"byte-level tokens need a vocabulary of 256, the model has {request.vocabulary}; "
                "put a tokenizer.json in --weights"
            )
        return None
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise ValueError(
            f"--weights {folder}: has no tokenizer.json, and other tokens than those it learned would ruin it; "
            "add the file, or pass --byte-tokens for a model that has learned bytes"
        )
    return folder


def _dtype(request: DataRequest, tokenizer: Path | None) -> np.dtype:
    """The smallest that holds the vocabulary."""
    return np.dtype(np.uint8) if tokenizer is None else np.min_scalar_type(request.vocabulary - 1)


def _key(found: Found, settings: EncoderSettings) -> str:
    """Digest of everything that the tokens depend on."""
    tokenizer = None
    if settings.tokenizer is not None:
        paths = [settings.tokenizer / name for name in TOKENIZER_FILES]
        tokenizer = [_digest(path.read_bytes()) if path.is_file() else None for path in paths]
    depends = {
        "files": [(file.kind, file.size_bytes, file.sha256) for file in found.files],
        "tokenizer": tokenizer,
        "tokenizers": version("tokenizers"),
        "document_end": settings.end,
        "dtype": settings.dtype,
        "method": [METHOD, PIECE_BYTES, CONTEXT_BYTES, AGREEMENT],
    }
    return _digest(json.dumps(depends).encode())[:32]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _are(names: tuple[str, ...]) -> str:
    return "is" if len(names) == 1 else "are"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _short(count: int) -> str:
    """1 234, 38.2 M, 1.5 G."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
