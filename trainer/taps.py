"""Which features are compared: the key `taps` in each of its forms, and the names that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

import at_fused
import models
from at_fused.taps.grid import Grid, find_grid
from at_fused.taps.suggest import Level, levels, pair_up, written
from trainer.choices import flag_text
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config

FORMS = (
    "groups, blocks, names of modules, {student's: teacher's}, or a list of pairs {student, teacher, weight}"
)


class Pair(BaseModel):
    """A feature of the student's, the one of the teacher's that it is compared with, and how."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    student: str
    teacher: str | None = None  # unset: of the same name
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    channel_dim: int | None = None  # unset: found from the shape
    teacher_channel_dim: int | None = None  # unset: found, or channel_dim where that does not tell


Taps = str | dict[str, str] | list[str | Pair]


def parse(value: Any) -> Any:
    """The value of the key `taps`, of a recipe or as text: a word, names, a mapping or a list of pairs.

    Text that begins with a brace, or with one in a bracket, is YAML; in other text commas part names, except
    within the brackets of a selector.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("{") and not value.replace(" ", "").startswith("[{"):
            names = split(value)
            return names[0] if len(names) == 1 else names
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"is no YAML ({getattr(error, 'problem', None) or error}); it may be {FORMS}"
            ) from None
    if isinstance(value, dict):
        return {_name(s): _name(t) for s, t in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pair(item) if isinstance(item, dict) else _name(item) for item in value]
    raise ValueError(f"is to be {FORMS}")


def split(text: str) -> list[str]:
    """Its parts between commas, except those within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _name(value: Any) -> str:
    if isinstance(value, (str, Pair)):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # nn.Sequential names its modules 0, 1, ...
    raise ValueError(f"{value!r} is no name of a module (in quotes it would be one)")


def _pair(value: dict[Any, Any]) -> Pair:
    keys = {str(key).replace("_", "-"): item for key, item in value.items()}
    for key in ("student", "teacher"):
        if keys.get(key) is not None:
            keys |= {key: _name(keys[key])}
    try:
        return Pair.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = first["loc"][0] if first["loc"] else ""
        known = ", ".join(str(field.alias) for field in Pair.model_fields.values())
        reason = {"missing": "is missing", "extra_forbidden": f"is unknown (there are {known})"}
        raise ValueError(
            f"pair {flag_text(value)}: {wrong} {reason.get(first['type'], first['msg'].lower())}"
        ) from None


# --- which features they are ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """The pairs of features; in `dims` and `t_dims` None stands for what is to be found."""

    names: list[str]
    t_names: list[str]
    weights: list[float]
    dims: Sequence[int | None]
    t_dims: Sequence[int | None]


def compared(config: Config, student: nn.Module, teacher: nn.Module, example: Tensor) -> Compared:
    """The features that `taps` stands for.

    Raises:
        ConfigError: a word stands for different numbers in both; says what to write.
    """
    taps = config.taps
    if isinstance(taps, list):
        pairs = [item if isinstance(item, Pair) else Pair(student=item, weight=1) for item in taps]
    else:
        names = taps if isinstance(taps, dict) else _by_word(taps, config, student, teacher, example)
        pairs = [Pair(student=s, teacher=t, weight=1) for s, t in names.items()]
    return Compared(
        [pair.student for pair in pairs],
        [pair.teacher or pair.student for pair in pairs],
        [pair.weight for pair in pairs],
        [pair.channel_dim for pair in pairs],
        [pair.teacher_channel_dim for pair in pairs],
    )


def _by_word(
    word: str, config: Config, student: nn.Module, teacher: nn.Module, example: Tensor
) -> dict[str, str]:
    """What a word names in both networks, else the module that it is in both."""
    both = (("student", student), ("teacher", teacher))
    if word == "groups":
        found = [_groups(key, model, config, example) for key, model in both]
        names = [[level.name for level in group] for group in found]
        advice = f"write pairs, such as taps {written(pair_up(*found))}"
    elif any(word in models.named_taps(model) for _, model in both):
        names = [models.named_taps(model).get(word, []) for _, model in both]
        advice = "name the modules, or use groups"
    else:
        return {word: word}
    if len(names[0]) != len(names[1]):
        raise ConfigError(
            f"taps {word}: {config.student} has {len(names[0])} and {config.teacher} {len(names[1])}; "
            f"{advice}"
        )
    return dict(zip(*names, strict=True))


def _groups(key: str, model: nn.Module, config: Config, example: Tensor) -> list[Level]:
    """Those that a model names, else the modules that end its resolutions."""
    if names := models.named_taps(model).get("groups"):
        shapes = [feature.shape for feature in features(model, names, example)]
        no_grid = Grid(1, 0, 0)
        return [
            Level(n, "", s, find_grid(s, example.shape) or no_grid)
            for n, s in zip(names, shapes, strict=True)
        ]
    try:
        return levels(model, example)
    except ValueError as error:
        raise ConfigError(f"taps groups, {key} {getattr(config, key)}: {error}") from None


@torch.no_grad()
def features(model: nn.Module, names: Sequence[str], image: Tensor) -> list[Tensor]:
    with at_fused.FeatureTaps(model, names) as taps:
        model.eval()(image)
        return taps.features


def text(taps: Taps) -> str:
    """As a user would type it, with pairs in their short form."""
    if isinstance(taps, list):
        return ",".join(
            item if isinstance(item, str) else f"{item.student} <- {item.teacher or item.student}"
            for item in taps
        )
    return flag_text(taps)
