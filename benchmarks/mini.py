"""The old name of `python -m reproduce.mini`, for one release."""

import sys

from reproduce.mini.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
