"""Recipes: YAML files of keys, over those of their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from at_fused.visualize.paths import UnknownHome, user_path
from trainer.errors import ConfigError


class _RecipeLoader(yaml.SafeLoader):
    """Refuses a key that occurs twice; YAML would silently take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("_", "-")
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe file: those of its `base`, overridden by its own.

    A base is a path relative to the file; of several, each overrides those before it.
    """
    path = path.resolve()
    if path in above:
        raise ConfigError(f"recipe {path} is its own base")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"recipe {path} is not valid YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if own is None:
        own = {}
    if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
        raise ConfigError(f"recipe {path} must be a mapping of keys to values")
    own = {key.replace("_", "-"): value for key, value in own.items()}
    bases = own.pop("base", None) or []
    keys: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        try:
            keys |= load_recipe(path.parent / user_path(str(base)), (*above, path))
        except UnknownHome as error:
            raise ConfigError(f"recipe {path}: base {base}: {error}") from None
    return keys | own
