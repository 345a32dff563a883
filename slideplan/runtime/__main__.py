"""`python -m slideplan.runtime` is the `runtime` command."""

from slideplan.runtime.cli import main

main()
