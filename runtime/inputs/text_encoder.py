"""A tokenizer as transformers uses it: what lies in its files, and texts of any length as tokens."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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
        raise ValueError(f"{path}: not a tokenizer: {first_line(error)}; download the file again") from None
    settings = folder / TOKENIZER_FILES[1]
    config = _json_object(settings)
    named = _named_tokens(config, folder)
    _add_tokens(tokenizer, config, named, settings)
    token = {AUTO: named.get("eos_token"), NONE: None}.get(end, end)
    encoder = TextEncoder(tokenizer, prefix, suffix)
    if token is not None:
        encoder.end_token = tokenizer.token_to_id(token)
        if encoder.end_token is None:
            source = settings if end == AUTO else "--document-end"
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
    """Tokens that the tokenizer's own rules put before and behind a text.

    As for transformers those of tokenizer.json count, whatever `add_bos_token` of tokenizer_config.json says.
    """
    for probe in ("a", "1", "the", "\n", "."):
        encoding = tokenizer.encode(probe)
        own = [number for number, added in enumerate(encoding.special_tokens_mask) if not added]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    return [], []


def _add_tokens(tokenizer: Any, config: dict[str, Any], named: dict[str, str], path: Path) -> None:
    """Tokens that only tokenizer_config.json has, and tokens that it names as special ones, as transformers adds them."""
    from tokenizers import AddedToken

    added = config.get("added_tokens_decoder")
    for number, entry in sorted((added if isinstance(added, dict) else {}).items(), key=lambda item: item[0].zfill(20)):
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or tokenizer.token_to_id(content) is not None:
            continue
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {name: entry[name] for name in names if isinstance(entry.get(name), bool)}
        tokenizer.add_tokens([AddedToken(content, **flags)])
        if str(tokenizer.token_to_id(content)) != number:
            raise ValueError(
                f"{path}: added_tokens_decoder gives {content!r} the number {number}, behind the tokens of tokenizer.json it "
                f"would have {tokenizer.token_to_id(content)}; the two files are of different tokenizers"
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content in sorted(set(named.values()) - known):
        # Of a name that is no token transformers would make one, behind all that the model has learned.
        if tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _named_tokens(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Special tokens by their names, read from the tokenizer's files as transformers reads them."""
    values = config
    if "added_tokens_decoder" not in config:
        values = config | _json_object(folder / TOKENIZER_FILES[2])
    named = {}
    for name in SPECIAL_NAMES:
        token = values.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            named[name] = token
    return named


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none. Raises ValueError where it holds something else."""
    if not path.exists():
        return {}
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: is not a file; download it again")
    raw = path.read_bytes()
    _check_content(path, raw)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {first_line(error)}; download the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object; download the file again")
    return found


def _check_content(path: Path, raw: bytes) -> None:
    if raw.startswith(LFS_POINTER):
        what = "is a Git LFS pointer, the file itself was not downloaded"
        raise ValueError(f"{path}: {what}; run `git lfs pull` in {path.parent}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
