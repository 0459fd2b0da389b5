"""The old name of `python -m reproduce`, for one release."""

import sys

from reproduce.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
