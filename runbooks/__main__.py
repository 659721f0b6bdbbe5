"""``python -m runbooks``."""

import sys

from runbooks.cli import main

if __name__ == "__main__":
    sys.exit(main())
