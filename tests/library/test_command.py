"""The command `at-fused`: finds what it runs, or says in a line what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

import at_fused
from at_fused import command_line


def test_every_command_is_found_and_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in command_line.COMMANDS:
        assert f"\n  {name}" in told
        assert callable(command_line._find(name))


def test_a_command_gets_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["train", "--recipe", "recipes/demo/student.yaml", "--print-config"]) == 0
    assert "student: wrn-10-1\n" in capsys.readouterr().out
    assert command_line.main(["reproduce", "table9", "--data-dir", ".", "--out", "x"]) == 2
    assert "table9" in capsys.readouterr().err
    assert command_line.main(["maps", "--model", "x", "--images", "none.jpg", "--out", "x.png"]) == 2
    assert capsys.readouterr().err.startswith("visualize: error: ")
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"at_fused {at_fused.__version__}\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "which command? (train, maps, taps, reproduce;"),
        (["trian"], "there is no command 'trian' (train, "),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"at-fused: error: {message}")
    assert error.count("\n") == 1


def test_outside_a_checkout_training_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "site-packages/at_fused/command_line.py"))
    for name in ("train", "reproduce"):
        assert command_line.main([name, "--help"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"at-fused {name}: error: not part of the installed package")
        assert error.count("\n") == 1


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(command_line.importlib, "import_module", missing)
    assert command_line.main(["train"]) == 2
    assert capsys.readouterr().err == "at-fused train: error: needs pydantic: pip install 'at_fused[train]'\n"
