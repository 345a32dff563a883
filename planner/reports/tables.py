"""What every report of the planner is made of."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 100


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; 100 columns where there is none."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal else Console(stderr=stderr, width=WIDTH)


def section(out: Console, title: str, body: RenderableType) -> None:
    """A title and what stands below it."""
    out.print(f"\n[bold]{title}[/bold]")
    out.print(body)


def new_table(*headers: str, left: int = 1) -> Table:
    """The first `left` columns are words, the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, header in enumerate(headers):
        table.add_column(header, justify="left" if place < left else "right", no_wrap=True)
    return table


def facts(rows: list[tuple[str, str]]) -> Table:
    """Names and what is said of them."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def parameter_count(parameters: int) -> str:
    """In billions, or in millions where there are few."""
    return f"{parameters / 1e9:,.3f} G" if parameters >= 10**7 else f"{parameters / 1e6:,.3f} M"
