"""Train a model, alone or as the student of a teacher: `python train.py --help` lists every key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from trainer.config import ConfigError, parse_args

    try:
        config, print_config = parse_args(argv)
        if print_config:
            print(config.to_yaml(), end="")
            return 0
        from trainer.engine import OutOfMemory, train  # slow to import, and needless for the above
        from trainer.watch import Diverged

        try:
            return train(config)
        except (Diverged, OutOfMemory) as error:
            return _fail(error, 1)
    except ConfigError as error:
        return _fail(error, 2)


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks of this machine fail alike
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
