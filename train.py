"""Train a model, alone or as the student of a teacher: `python train.py --help` lists every key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, which no output that can't be written changes."""
    from at_fused._terminal import lenient_output  # imports torch, as all below does

    with lenient_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    from at_fused._terminal import require_output
    from trainer.command_line import parse_args
    from trainer.errors import ConfigError, RankError

    try:
        config, action = parse_args(argv)
        if action.print_config:
            print(config.to_yaml(), end="")
            require_output()
            return 0
        from trainer.data.workers import WorkerDied
        from trainer.run import OutOfMemory, train  # slow to import, and needless for the above
        from trainer.trained import export, test
        from trainer.watch import Diverged

        try:
            if action.weights is None:
                return train(config)
            if action.eval_only:
                test(config, action.weights)
            if action.export:
                export(config, action.weights, action.export)
            return 0
        except (Diverged, OutOfMemory) as error:
            return _fail(error, 1)
        except WorkerDied as error:
            return _fail(error, 1, alone=True)
    except RankError as error:
        return _fail(error, 2, alone=True)
    except ConfigError as error:
        return _fail(error, 2)
    except OSError as error:  # a path that can't be looked at, or a full disk behind stdout
        if error.errno is None:
            raise
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror) if part), 2, alone=True)
    except KeyboardInterrupt:  # before or after the training, which answers itself
        return _fail("interrupted", 130)


def _fail(error: object, code: int, *, alone: bool = False) -> int:
    """Say what is wrong in one line; unless a rank fails `alone`, all of a machine would say the same."""
    if alone or "WORLD_SIZE" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
