"""The `runtime` command; `python -m runtime` is the same."""

from slideplan.entry import enter


def main() -> None:
    """Load the command and run it."""
    enter("runtime", "runtime.cli", "slideplan[runtime]")


if __name__ == "__main__":
    main()
