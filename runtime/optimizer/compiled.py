"""Compiled loops whose machine code is kept for the next process where that can be, and made anew where it cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pickle import PickleError
from typing import Any

import numba
from numba.core.caching import FunctionCache

# Of a folder that became read-only, a full disk, a file that another process or a crash left half written.
_FAULTS = (OSError, EOFError, PickleError, ValueError, TypeError, AttributeError, ImportError, IndexError, KeyError)


class _Kept(FunctionCache):  # type: ignore[misc, unused-ignore]
    """Numba's cache, as a convenience: what cannot be read is compiled, what cannot be written is not kept."""

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except _FAULTS:
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except _FAULTS:
            self.disable()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit`, with its machine code kept beside the package or in the user's cache, if one of them can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # where there is no place
            dispatcher._cache = _Kept(function)  # what `cache=True` does, which insists on one
        return dispatcher

    return decorate
