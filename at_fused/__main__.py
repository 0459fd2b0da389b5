"""`python -m at_fused` is the command `at-fused`."""

from .command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
