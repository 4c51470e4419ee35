"""Entry point of ``python -m everest_ds``, ``deepspeed --module everest_ds`` and ``torchrun -m everest_ds``."""

import sys

from everest_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
