"""Names of features: a module, its input or output, and a position within it."""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch.fx
from torch import Tensor, nn

_INPUT, _OUTPUT = ":input", ":output"
_GRID = re.compile(r":grid(?:\((\d+), *(\d+)\))?$")


class Selector(NamedTuple):
    """Where a feature is: `path` leads from a module's output (or input) to a tensor, or a part of one."""

    name: str  # as the user wrote it
    module: str
    of_input: bool
    path: tuple[Any, ...]


class Grid(NamedTuple):
    """The last of a path: tokens (B, N, C) become (B, rows, columns, C); 0 and 0 mean a square."""

    rows: int = 0
    columns: int = 0

    def of(self, tokens: Tensor, name: str) -> Tensor:
        if tokens.ndim != 3:
            raise ValueError(f"tap {name!r}: {tuple(tokens.shape)} are no tokens (B, N, C) to fill a grid")
        count = tokens.shape[1]
        side = int(count**0.5 + 0.5)  # not math.isqrt: it may be a symbol
        rows, columns = self if self.rows else (side, side)
        if rows * columns != count:
            grid = f"a grid of {rows} x {columns}" if self.rows else "a square grid"
            raise ValueError(
                f"tap {name!r}: the {count} tokens of {tuple(tokens.shape)} do not fill {grid}: leave out "
                "those that have no place in the image, as in 'block[:, 1:]:grid', or say which grid, as in "
                "'block:grid(7, 10)'"
            )
        return tokens.unflatten(1, (rows, columns))


def parse(name: str, modules: Mapping[str, nn.Module]) -> Selector:
    """The selector that `name` spells: "layer3", "fpn['0']", "block[0]", "block:input", "block[:, 1:]:grid".

    Raises:
        TypeError: `name` is not a string.
        ValueError: there is no such module, or the brackets can't be read.
    """
    if not isinstance(name, str):
        raise TypeError(f"names must be strings, got {name!r}")
    if name in modules:
        return Selector(name, name, False, ())
    grid = _GRID.search(name)
    head, bracket, rest = name[: grid.start() if grid else None].partition("[")
    module = head.removesuffix(_INPUT).removesuffix(_OUTPUT)
    if module not in modules:
        raise ValueError(unknown_name(module, list(modules)))
    try:
        path = _indices(ast.parse(f"_{bracket}{rest}", mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{name!r} can't be read: after a module's name may stand ':input', then indices such as "
            "[0], ['key'] or [:, 1:], then ':grid' or ':grid(rows, columns)'"
        ) from None
    if grid:
        path = *path, Grid(*(int(size or 0) for size in grid.groups()))
    return Selector(name, module, head.endswith(_INPUT), path)


def _indices(node: ast.expr) -> tuple[Any, ...]:
    if isinstance(node, ast.Name) and node.id == "_":
        return ()
    if isinstance(node, ast.Subscript):
        return *_indices(node.value), _index(node.slice)
    raise ValueError


def _index(node: ast.expr) -> Any:
    if isinstance(node, ast.Slice):
        parts = (node.lower, node.upper, node.step)
        return slice(*(None if part is None else ast.literal_eval(part) for part in parts))
    if isinstance(node, ast.Tuple):
        return tuple(_index(element) for element in node.elts)
    return ast.literal_eval(node)


def select(value: Any, selector: Selector) -> Any:
    """Returns the part of a module's output or input that `selector` selects.

    Raises:
        TypeError: it leads nowhere, or not to a tensor; the message lists what is there.
        ValueError: tokens that do not fill the grid.
    """
    found = value
    for index in selector.path:
        if isinstance(index, Grid):
            found = index.of(found, selector.name) if isinstance(found, Tensor) else found
            continue
        try:
            found = found[index] if not _is_attribute(found, index) else getattr(found, index)
        except (LookupError, TypeError, AttributeError):
            raise TypeError(f"tap {selector.name!r}: there is no [{index!r}] in {_contents(found)}") from None
    if not isinstance(found, (Tensor, torch.fx.Proxy)):
        what = "received" if selector.of_input else "returned"
        raise TypeError(
            f"tapped module {selector.name!r} {what} {_contents(found)}, not a tensor: select one with an "
            f"index, such as {_example(selector, found)!r}"
        )
    return found


def replaced(value: Any, path: tuple[Any, ...], tensor: Tensor) -> Any:
    """`value` with `tensor` at `path`: containers on the way are copied, not changed."""
    if not path:
        return tensor
    index, rest = path[0], path[1:]
    if _is_attribute(value, index):
        changed = copy.copy(value)
        setattr(changed, index, replaced(getattr(value, index), rest, tensor))
        return changed
    inner = replaced(value[index], rest, tensor)
    if isinstance(value, tuple):
        items = [*value]
        items[index] = inner
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    changed = copy.copy(value)
    changed[index] = inner
    return changed


def leads_to_a_part(value: Any, path: tuple[Any, ...]) -> bool:
    """Whether the path ends inside a tensor, as [:, 1:] does."""
    for index in path:
        if isinstance(value, Tensor):
            return True
        value = getattr(value, index) if _is_attribute(value, index) else value[index]
    return False


def _is_attribute(value: Any, index: Any) -> bool:
    return isinstance(index, str) and not isinstance(value, Mapping) and hasattr(value, index)


def _contents(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with keys {list(value)}"
    if dataclasses.is_dataclass(value):
        return f"{kind} with fields {[field.name for field in dataclasses.fields(value)]}"
    if isinstance(value, (tuple, list)):
        return f"{kind} of {len(value)}"
    return kind


def _example(selector: Selector, value: Any) -> str:
    index: Any = 0
    if isinstance(value, Mapping):
        index = next(iter(value), 0)
    elif dataclasses.is_dataclass(value):
        index = dataclasses.fields(value)[0].name
    return f"{selector.name}[{index!r}]"


def unknown_name(name: str, known: list[str]) -> str:
    """The message for a `name` that is not among the `known` modules."""
    known = [candidate for candidate in known if candidate]
    if close := close_names(name, known):
        return f"no submodule named {name!r}; close names: {', '.join(close)}"
    few = [*known[:10], "…"] if len(known) > 10 else known
    return f"no submodule named {name!r}; its modules: {', '.join(few) or 'none'}"


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The `known` names that `name` may be a misspelling of, the closest first."""
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=4)
