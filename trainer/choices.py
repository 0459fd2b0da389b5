"""Keys whose values are names in a table: checked against it and listed in the help as it then is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic_core import CoreSchema, core_schema


class Told:
    """Annotates a key of the configuration: `text()` ends its line in the help."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text


class OneOf(Told):
    """Annotates a key of the configuration: its value is one of `names()`."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        super().__init__(lambda: f" ({', '.join(names())})")
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> Any:
        names = list(self.names())
        if value not in names:
            *others, last = map(repr, names)
            raise ValueError(f"input should be {', '.join(others)} or {last}")
        return value
