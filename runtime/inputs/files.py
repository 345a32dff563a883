"""What a path holds: files to read, in a stable order, and files left out, each with the reason."""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from runtime.inputs.sniffing import BINARY, HEAD_BYTES, Kind, Other, not_utf8, sniff
from slideplan.machine.host import usable_cores
from slideplan.progress import Progress, Show

BLOCK_BYTES = 1 << 20
FILES_AT_ONCE = 256
SHOW_AFTER_S = 0.5
MAX_LINE_BYTES = 64 << 20  # a line of JSON is held whole, and more than once, while it is read

HIDDEN = Other("hidden")
# Folders of what tools have installed or compiled: not what a folder of texts is about.
TOOL_FOLDERS = {"site-packages", "node_modules", "__pycache__"}
ENVIRONMENT = "pyvenv.cfg"  # lies in every virtual environment of Python, whatever its name
# Files that describe the data beside them.
DESCRIPTIONS = ("readme", "license", "licence", "citation", "dataset_info")
DATA_SUFFIXES = frozenset(
    [".parquet", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".tar", ".zip"]
)
# The default text: what of Python's standard library is read, by its names.
LIBRARY_SUFFIXES = frozenset(
    [".txt", ".md", ".py", ".rst", ".json", ".jsonl", ".csv", ".html", ".c", ".h", ".cpp", ".java", ".js", ".tex"]
)


class DataFile(NamedTuple):
    """A file that is read.

    name: as messages have it; modified_ns: as the system says; sha256: of its content, in hex
    """

    path: Path
    name: str
    kind: Kind
    size_bytes: int
    modified_ns: int
    sha256: str


class LeftOut(NamedTuple):
    """A file or folder that is not read. `folder`: it is one, and nobody looked inside."""

    name: str
    why: Other
    folder: bool = False


@dataclass(frozen=True)
class Found:
    """What a path holds: files that are read, in the order in which they are, and all others."""

    source: str
    files: tuple[DataFile, ...]
    left_out: tuple[LeftOut, ...]


def default_text() -> Path:
    """Text that is present wherever Python is: the sources of its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(path: Path | None, any_encoding: bool, show: Show) -> Found:
    """Look at every file at a path (None: the default text), whole, on all cores.

    any_encoding: bytes are tokens, so that text need not be UTF-8. Raises ValueError where nothing can be read: of a
    single file with its format and what would help.
    """
    library = path is None
    root = default_text() if path is None else path
    try:
        mode = root.stat().st_mode
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise ValueError(f"--data {root}: {what}; name a text file or a folder of them") from None
    if stat.S_ISDIR(mode):
        candidates, left_out = _walk(root)
        if library:
            candidates = [file for file in candidates if file.suffix in LIBRARY_SUFFIXES]
            left_out = []
    else:
        candidates, left_out = [root], []
    looks = _look_at_all(candidates, root, library, any_encoding, show)
    files = [look for look in looks if isinstance(look, DataFile)]
    left_out += [look for look in looks if isinstance(look, LeftOut)]
    if stat.S_ISDIR(mode) and not library:
        files, left_out = _without_descriptions(files, left_out)
    if not files:
        _refuse(root, left_out)
    return Found("Python's standard library" if library else str(root), tuple(files), tuple(left_out))


def _walk(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """Files below a folder, through links, each once, in a stable order; and what is not looked at."""
    files: list[Path] = []
    left_out: list[LeftOut] = []
    seen: set[tuple[int, int]] = set()

    def leave(path: Path, why: Other, folder: bool = False) -> None:
        left_out.append(LeftOut(_name(path, root), why, folder))

    def visit(folder: Path) -> list[Path]:
        """Sort out what lies in a folder; returns the folders in it."""
        folders: list[Path] = []
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            leave(folder, _unreadable(error), True)
            return []
        for entry in entries:
            try:
                found = entry.stat()
            except OSError as error:
                broken = isinstance(error, FileNotFoundError) and entry.is_symlink()
                leave(entry, Other("a broken link") if broken else _unreadable(error))
                continue
            is_folder = stat.S_ISDIR(found.st_mode)
            known = (found.st_dev, found.st_ino)
            if entry.name.startswith("."):
                leave(entry, HIDDEN, is_folder)
            elif is_folder and (entry.name in TOOL_FOLDERS or _is_environment(entry)):
                leave(entry, Other("installed or compiled"), True)
            elif known in seen:
                leave(entry, Other("the same again through a link"), is_folder)
            else:
                seen.add(known)
                (folders if is_folder else files).append(entry)
        return folders

    start = root.stat()
    seen.add((start.st_dev, start.st_ino))
    waiting = [root]
    while waiting:
        waiting += reversed(visit(waiting.pop()))
    return sorted(files), left_out


def _is_environment(folder: Path) -> bool:
    try:
        return (folder / ENVIRONMENT).exists()
    except OSError:  # nobody may look into it, and the visit will say so
        return False


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone meanwhile, say: the look will tell
        return 0


def _name(path: Path, root: Path) -> str:
    """A path as messages have it: below the root, in one line, and in characters that can be shown."""
    name = str(path if path == root else path.relative_to(root))
    return name if name.isprintable() else repr(name)[1:-1]


def _unreadable(error: OSError) -> Other:
    return Other(f"cannot be read: {error.strerror}")


def _look_at_all(candidates: list[Path], root: Path, library: bool, any_encoding: bool, show: Show) -> list[DataFile | LeftOut]:
    stop = threading.Event()
    sizes: list[int] = []  # of what has been looked at; threads append to it

    def look(file: Path) -> DataFile | LeftOut:
        name = _name(file, root)
        try:
            return _look(file, name, library, any_encoding, sizes, stop)
        except OSError as error:
            return LeftOut(name, _unreadable(error))

    pool = ThreadPoolExecutor(usable_cores())
    looks: list[DataFile | LeftOut] = []
    total = sum(map(_size_bytes, candidates))
    try:
        while len(looks) < len(candidates):
            batch = [pool.submit(look, file) for file in candidates[len(looks) : len(looks) + FILES_AT_ONCE]]
            while wait(batch, timeout=SHOW_AFTER_S).not_done:  # what takes no time is not worth a bar
                show(Progress("looking at data", sum(sizes), total))
            looks += [each.result() for each in batch]
        return looks
    finally:
        stop.set()  # after an interrupt no thread reads on
        pool.shutdown(cancel_futures=True)


def _look(
    file: Path, name: str, library: bool, any_encoding: bool, sizes: list[int], stop: threading.Event
) -> DataFile | LeftOut:
    """Tell what a file is and digest it: all of it, so that nothing has to be refused half-way."""
    if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
        return LeftOut(name, Other("no regular file"))
    with file.open("rb", buffering=0) as stream:
        before = os.fstat(stream.fileno())
        kind: Kind | Other = Kind.TEXT
        if not library:
            head, complete = _head(stream.fileno())
            kind = sniff(head, complete, file.suffix.lower(), any_encoding)
        if isinstance(kind, Other):
            return LeftOut(name, kind)
        found = hashlib.sha256()
        decoder = codecs.getincrementaldecoder("utf-8")()
        strict = kind is Kind.JSON_LINES or not any_encoding
        for at, block in _blocks(stream.fileno()):
            if stop.is_set():
                break
            found.update(block)
            sizes.append(len(block))
            if not library and kind is Kind.TEXT and b"\0" in block:
                return LeftOut(name, BINARY)
            if strict:
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    return LeftOut(name, not_utf8(at - pending + error.start))
        if strict and (pending := len(decoder.getstate()[0])):
            return LeftOut(name, not_utf8(before.st_size - pending))
    return DataFile(file, name, kind, before.st_size, before.st_mtime_ns, found.hexdigest())


def _head(descriptor: int) -> tuple[bytes, bool]:
    """The beginning of a file, and whether that is all of it. A first line of JSON is had whole."""
    head = os.pread(descriptor, HEAD_BYTES, 0)
    if b"\n" not in head and head.lstrip()[:1] == b"{":
        while len(head) < MAX_LINE_BYTES and b"\n" not in head[-BLOCK_BYTES:]:
            block = os.pread(descriptor, BLOCK_BYTES, len(head))
            if not block:
                break
            head += block
    return head, len(head) >= os.fstat(descriptor).st_size


def _blocks(descriptor: int) -> Iterator[tuple[int, bytes]]:
    at = 0
    while block := os.pread(descriptor, BLOCK_BYTES, at):
        yield at, block
        at += len(block)


def _without_descriptions(files: list[DataFile], left_out: list[LeftOut]) -> tuple[list[DataFile], list[LeftOut]]:
    """Leave out what describes a data set where there is one: its card, its licence.

    A data set is known by its formats, by their names or their content, and its card by the header that the hub reads.
    """
    names = [*(file.name for file in files), *(each.name for each in left_out if not each.folder)]
    data_set = any(Path(name).suffix.lower() in DATA_SUFFIXES for name in names) or any(
        file.kind is Kind.JSON_LINES for file in files
    )

    def describes(file: DataFile) -> bool:
        stem = Path(file.name).name.lower()
        if file.kind is not Kind.TEXT or not stem.startswith(DESCRIPTIONS) or Path(stem).suffix in DATA_SUFFIXES:
            return False
        return data_set or (stem == "readme.md" and _begins_with_header(file.path))

    kept = [file for file in files if not describes(file)]
    why = Other("describes the data set")
    return kept, [*left_out, *(LeftOut(file.name, why) for file in files if describes(file))]


def _begins_with_header(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4).rstrip(b"\r\n") == b"---"


def _refuse(root: Path, left_out: list[LeftOut]) -> None:
    """Raise ValueError: nothing at the path can be read."""
    any_text = "name a text file or a folder of them"
    if not left_out:
        raise ValueError(f"--data {root}: is an empty folder; {any_text}")
    first = max(left_out, key=lambda each: bool(each.why.advice))
    advice = first.why.advice or any_text
    if not root.is_dir():
        raise ValueError(f"--data {root}: is {' '.join(filter(None, (first.why.what, first.why.detail)))}; {advice}")
    all_of_them = listed(left_out)
    detail = "" if first.why.detail in all_of_them else f"; {first.name} is {first.why.what} {first.why.detail}"
    raise ValueError(f"--data {root}: holds nothing that can be read: {all_of_them}{detail}; {advice}")


def listed(left_out: Sequence[LeftOut], most: int = 8) -> str:
    """What was left out in one line: by suffix and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for each in left_out:
        label = "folders" if each.folder else Path(each.name).suffix.lower() or "files"
        groups.setdefault((label, each.why.what), []).append(each)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    parts = [_listed(label, group) for (label, _), group in ordered]
    if len(parts) > most:
        parts[most:] = [f"{sum(len(group) for _, group in ordered[most:])} others"]
    return ", ".join(parts)


def _listed(label: str, group: list[LeftOut]) -> str:
    """Those of one suffix that are left out for one reason, with what they all have of it."""
    details = {each.why.detail for each in group}
    why = " ".join(filter(None, (group[0].why.what, *(details if len(details) == 1 else ()))))
    return f"{group[0].name if len(group) == 1 else f'{len(group)} {label}'} ({why})"
