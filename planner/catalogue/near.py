"""Which known names somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST = 3  # names that are suggested at once
SIMILARITY = 0.6  # of difflib's, between 0 and 1


def near(word: str, known: Iterable[str]) -> list[str]:
    """At most three known names: those that contain the word, or all of its parts, else those spelled nearly like it."""
    names = sorted(known)
    plain = {name: _plain(name) for name in names}
    parts = [part for part in map(_plain, word.replace("_", "-").replace(" ", "-").split("-")) if part]
    whole = "".join(parts)
    if not whole:
        return []
    found = [name for name in names if whole in plain[name]] or [name for name in names if all(p in plain[name] for p in parts)]
    if not found:
        found = get_close_matches(word.casefold(), names, n=MOST, cutoff=SIMILARITY)
    return found[:MOST]


def hint(word: str, known: Iterable[str]) -> str:
    """A question to put into a message, with a space behind it; "" where nothing is near."""
    found = near(word, known)
    return f"did you mean {' or '.join(found)}? " if found else ""


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
