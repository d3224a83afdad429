"""`python -m certify_cli` is `curvcert` (so that launchers such as torchrun can start it)."""

import sys

from certify_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
