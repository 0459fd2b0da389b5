"""Train a model, alone or as the student of a teacher: `python train.py --help` lists every key."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from trainer.config import ConfigError, parse_args

    try:
        config, print_config = parse_args(argv)
        if print_config:
            print(config.to_yaml(), end="")
            return 0
        from trainer.engine import train

        return train(config)
    except ConfigError as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
