"""Looking for words in messages."""

from __future__ import annotations

import re


def says(text: str, words: str) -> bool:
    """Whether the words stand in the text, and not in the middle of a number: "at most 48000" does not say "at most 48"."""
    before = r"(?<!\d)" if words[0].isdigit() else ""
    after = r"(?!\d)" if words[-1].isdigit() else ""
    return re.search(before + re.escape(words) + after, text) is not None
