"""Values of keys: names in a table, checked against it and listed in the help as it then is; mappings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml
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


def mapping(value: Any) -> Any:
    """A mapping of a recipe, or of a flag's text in YAML or JSON, that config.yaml can hold; null is empty.

    Numbers such as 1e-4, which YAML takes for words, are numbers.
    """
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError("is no mapping in YAML, such as {width_mult: 0.5}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("is no mapping of names to values, such as {width_mult: 0.5}")
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"holds {value}, which is neither text nor a number")
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
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
