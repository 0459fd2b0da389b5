"""The old name of `python -m benchmarks`, for one release."""

import sys

from benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
