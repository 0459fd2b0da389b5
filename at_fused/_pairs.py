"""Student and teacher side by side: the pairs of names, what the models share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ._hooks import ModelTaps


def pair_names(
    names: Iterable[str] | Mapping[str, str], t_names: Iterable[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the student's and the teacher's names, equally many."""
    for what, value in (("names", names), ("t_names", t_names)):
        if isinstance(value, str):
            raise TypeError(f"{what} must be a sequence of module names, got the single string {value!r}")
    if isinstance(names, Mapping):
        if t_names is not None:
            raise TypeError("names is a mapping of student's to teacher's names: t_names can't be given, too")
        s_names, teachers = tuple(names.keys()), tuple(names.values())
    else:
        s_names = tuple(names)
        teachers = s_names if t_names is None else tuple(t_names)
    if len(s_names) != len(teachers):
        raise ValueError(
            f"names and t_names must be of the same number: got {len(s_names)} {list(s_names)} and "
            f"{len(teachers)} {list(teachers)}"
        )
    if not s_names:
        raise ValueError("names are empty: at least one pair is needed")
    return s_names, teachers


def settle_what_is_shared(student: ModelTaps, teacher: ModelTaps) -> None:
    """Keeps the passes of models that share modules apart.

    Raises:
        ValueError: a feature would be compared with itself.
    """
    s_model, t_model = student.model(), teacher.model()
    if s_model is None or t_model is None:
        return
    if s_model is t_model:
        for s, t in zip(student.selectors, teacher.selectors, strict=True):
            if student.hooked[s.name]() is teacher.hooked[t.name]() and s[2:] == t[2:]:
                raise ValueError(
                    f"student and teacher are the same model, whose latest pass is that of both: {s.name!r} "
                    "would be compared with itself; to compare two passes of one model, give their features "
                    "to attention_loss"
                )
        return
    s_modules, t_modules = set(s_model.modules()), set(t_model.modules())
    if s_model in t_modules or t_model in s_modules:
        return
    tapped = [module() for taps in (student, teacher) for module in taps.hooked.values()]
    if any(module in s_modules and module in t_modules for module in tapped):
        student.pass_.own_calls_only = teacher.pass_.own_calls_only = True
