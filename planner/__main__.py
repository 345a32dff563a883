"""The `planner` command; `python -m planner` is the same."""

from slideplan.entry import enter


def main() -> None:
    """Load the command and run it."""
    enter("planner", "planner.cli", "slideplan")


if __name__ == "__main__":
    main()
