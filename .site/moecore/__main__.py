"""`python -m moecore`: the command line."""

import sys

from moecore.cli import main

if __name__ == "__main__":
    sys.exit(main())
