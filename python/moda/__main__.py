"""`python -m moda`: the `moda` command."""

from moda.cli import main

main()
