"""Keys whose values are names in a table: checked against it and listed in the help as it then is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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


def by_value(values: Mapping[str, str]) -> str:
    """The values by name in words, the commonest last: "1000 for at and at+kd, 10 for hints, else 1"."""
    commonest = Counter(values.values()).most_common(1)[0][0]
    words = []
    for value in dict.fromkeys(values.values()):
        *others, last = [name for name in values if values[name] == value]
        names = f"{', '.join(others)} and {last}" if others else last
        words += [f"{value} for {names}"] if value != commonest else []
    return ", ".join([*words, f"else {commonest}"])


def flag_text(value: Any) -> str:
    """A key's value as one types it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
