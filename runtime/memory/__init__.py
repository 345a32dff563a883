"""Slots as memory: arenas of exact size, page-locked where copies touch them."""
