"""`python -m vlmpack`: the command line, also under `torchrun -m vlmpack`."""

from vlmpack.cli import main

main()
