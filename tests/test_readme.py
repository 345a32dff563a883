"""The README and the docs: nothing left to fill in, no dead links, only commands that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path) -> None:
    assert not re.findall(r"^[A-Z_]{4,}$", page.read_text(), flags=re.M)


def test_commands_of_the_readme_exist() -> None:
    from planner.cli import app as planner
    from runtime.cli import app as runtime

    known = {
        name: {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
        for name, app in (("planner", planner), ("runtime", runtime))
    }
    used = re.findall(r"(?:\$ |^    )(planner|runtime) ([a-z]+)", (REPOSITORY / "README.md").read_text(), flags=re.M)
    assert len(used) >= 5
    assert all(command in known[program] for program, command in used)
