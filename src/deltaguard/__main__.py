"""`python -m deltaguard`, also by torchrun.

The command `deltaguard` works alone whatever started it, such as a training that torchrun started.
"""

from deltaguard.cli import main

main(shared=True)
