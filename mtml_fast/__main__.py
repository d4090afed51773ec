"""python -m mtml_fast: the command line."""

import sys

from mtml_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
