"""``python -m dvla_fast``: the command line without the installed console script."""

import sys

from dvla_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
