"""`python -m foveate`: the command."""

from foveate.cli import main

main()
