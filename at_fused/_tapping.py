"""What `FeatureTaps` and `AttentionTransfer` share: hooks that live until the end of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import TypeVar

from ._hooks import ModelTaps

_Self = TypeVar("_Self", bound="Tapping")


class Tapping:
    """A context manager over the taps of one or more models."""

    @property
    def _models(self) -> tuple[ModelTaps, ...]:
        raise NotImplementedError

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context passes are not recorded and cost nothing; for an evaluation between two steps.

        What was recorded before is kept. The backward pass of a checkpointed pass belongs within it, too.
        """
        passes = [taps.pass_ for taps in self._models]
        before = [pass_.paused for pass_ in passes]
        for pass_ in passes:
            pass_.paused = True
        try:
            yield
        finally:
            for pass_, was in zip(passes, before, strict=True):
                pass_.paused = was

    def clear(self) -> None:
        """Forgets what was recorded, so that it does not outlive the step."""
        for taps in self._models:
            taps.clear()

    def close(self) -> None:
        """Removes the hooks and forgets what they recorded."""
        for taps in self._models:
            taps.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
