"""`python -m moda`: the `moda` command."""

from moda.cli.app import main

main()
