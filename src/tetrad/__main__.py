"""`python -m tetrad` is `tetrad`."""

import sys

from tetrad.cli import main

if __name__ == "__main__":
    sys.exit(main())
