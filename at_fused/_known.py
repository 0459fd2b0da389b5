"""What is known of features of a kind: the same question is not answered at every step of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Answer = TypeVar("_Answer")
_MOST = 1000  # a network with images of many sizes has many kinds


def kinds(feats: Iterable[Tensor]) -> Hashable:
    """All of the features that a check or the choice of a backend depends on.

    The dispatch keys tell dense from sparse, and what functorch or a wrapper has made.
    """
    return tuple(
        [
            (type(x), x.shape, x.stride(), x.dtype, x.device, torch._C._dispatch_keys(x).raw_repr())
            for x in feats
        ]
    )


class Known(Generic[_Answer]):
    """Answers by question. One that can't be hashed (of lists, or symbolic sizes) has none."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, _Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, question: Hashable) -> _Answer | None:
        try:
            return self._answers.get(question)
        except TypeError:
            return None

    def keep(self, question: Hashable, answer: _Answer) -> None:
        if len(self._answers) >= _MOST:
            self._answers.clear()
        with contextlib.suppress(TypeError):
            self._answers[question] = answer
