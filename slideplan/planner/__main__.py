"""`python -m slideplan.planner` is the `planner` command."""

from slideplan.planner.cli import main

main()
