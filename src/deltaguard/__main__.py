"""`python -m deltaguard`."""

from deltaguard.cli import main

main()
