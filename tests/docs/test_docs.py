"""The documentation is true: it builds without a warning, its code runs, and what it names exists."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from paths import ROOT
from torch.nn.parallel import DistributedDataParallel

import at_fused
from models import torchvision_compat  # noqa: F401  (before torchvision)

PAGES = sorted((ROOT / "docs").glob("*.md"))
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
TEXTS = [*PAGES, *(ROOT / name for name in (*TOP, "benchmarks/README.md", "recipes/README.md"))]
TEXTS = [path for path in TEXTS if path.exists()]
WRAPPED = [*PAGES, ROOT / "README.md"]  # code in 80 columns, commands that are checked
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


# --- the site -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for package in ("at_fused", "models"):
        (tmp_path / package).symlink_to(ROOT / package)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    build = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert build.returncode == 0, build.stdout
    assert "griffe" not in build.stdout, (
        build.stdout
    )  # docstrings; these warnings are not covered by --strict
    reference = (tmp_path / "build" / "site" / "api" / "index.html").read_text()
    missing = [name for name in at_fused.__all__ if f'id="at_fused.{name}"' not in reference]
    assert missing == ["__version__"]


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(part)

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == [page.name for page in PAGES]


# --- what is named exists -------------------------------------------------------------------------


@each_text
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", prose(path))
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (path.parent / target).exists()] == []


@each_text
def test_files_exist(path: Path) -> None:
    folders = "at_fused|benchmarks|csrc|docs|examples|models|recipes|reproduce|tests|trainer"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", path.read_text())
    real = [name for name in named if "NAME" not in name]
    assert [name for name in real if not (ROOT / name).exists()] == []


@each_text
def test_names_exist(path: Path) -> None:
    names = set(re.findall(r"\bat_fused\.([A-Za-z]\w*)", path.read_text()))
    modules = {file.stem for file in (ROOT / "at_fused").iterdir()}
    assert [name for name in names - modules if not hasattr(at_fused, name)] == []


@each_text
def test_make_targets_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", path.read_text(), re.MULTILINE)) <= set(targets)


def test_the_examples_of_the_command_line_are_those_of_its_help() -> None:
    from at_fused.visualize.arguments import EXAMPLES

    codes = [code for _, code in FENCE.findall((ROOT / "docs/maps.md").read_text())]
    shown = "".join(code for code in codes if code.startswith("python -m at_fused.visualize"))
    assert shown.splitlines() == [line[4:] for line in EXAMPLES.splitlines() if line.startswith("    ")]


# --- the code runs --------------------------------------------------------------------------------


@pytest.fixture
def names_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the pages' code takes for granted, small: two networks, a batch, their features and logits."""
    pytest.importorskip("torchvision")
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    monkeypatch.chdir(tmp_path)
    student, teacher = (ResNet(block, [1, 1, 1, 1], num_classes=10) for block in (BasicBlock, Bottleneck))
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    layers = ["layer1", "layer2", "layer3", "layer4"]
    with at_fused.FeatureTaps(student, layers) as s_taps, at_fused.FeatureTaps(teacher, layers) as t_taps:
        logits, t_logits = student(images), teacher(images).detach()
        s_feats, t_feats = s_taps.features, [feat.detach() for feat in t_taps.features]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "DistributedDataParallel": DistributedDataParallel,
        "F": F,
        "at_fused": at_fused,
        "attention": at_fused.AttentionLoss(p=2, beta=1000),
        "images": images,
        "labels": labels,
        "loader": [(images, labels)],
        "logits": logits,
        "names": layers,
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
        "pictures": images.sigmoid(),
        "s_feats": s_feats,
        "step": 3,
        "student": student,
        "t_feats": t_feats,
        "t_logits": t_logits,
        "teacher": teacher,
        "torch": torch,
        "total_steps": 10,
    }
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda p: p.stem
)
def test_code_runs(page: Path, names_of_the_guide: dict[str, Any]) -> None:
    for number, (language, code) in enumerate(FENCE.findall(page.read_text())):
        if language == "python":
            exec(compile(code, f"{page.name}, block {number}", "exec"), names_of_the_guide)


@each_text
def test_code_is_python_and_fits_its_column(path: Path) -> None:
    for language, code in FENCE.findall(path.read_text()):
        if language == "python":
            ast.parse(code)
        if path in WRAPPED:
            assert [line for line in code.splitlines() if len(line) > 80] == []


def test_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """Pasted into an empty file, and without a checkout around it."""
    codes = [
        code for language, code in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"
    ]
    assert codes
    program = "\n".join(codes)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, with fewer epochs; no outputs are committed."""
    pytest.importorskip("sklearn")
    import matplotlib

    matplotlib.use("agg")
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        code = code.replace("EPOCHS = 30", "EPOCHS = 1").replace("epochs=6, batch=25", "epochs=1, batch=100")
        exec(compile(code, f"cell {number}", "exec"), names)
    assert set(names["curves"]) == {"alone", "with AT"}
    told = [text.get_text() for text in names["figure"].texts]
    assert told.count("cosine to teacher") == 4
    assert names["EPOCHS"] == len(names["curves"]["with AT"]) == 1


# --- the commands can be run ------------------------------------------------------------------------


STARTED = re.compile(r"(?:[A-Z_]+=\S* )*((?:python|torchrun|make|pip|pytest|at-fused|\.venv/bin/\w+) .*)")
EXPORT = re.compile(r"export (?:[A-Z_]+=\S*\s*)+$")


def commands(path: Path) -> list[list[str]]:
    """The words of each command in the blocks of no language, without the variables before it."""
    found = []
    for language, code in FENCE.findall(path.read_text()):
        if language or "│" in code:  # a drawing
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if line.strip() and not EXPORT.match(line):
                command = STARTED.match(line)
                assert command, f"{path.name}: not a command that this test knows: {line}"
                found.append(shlex.split(command[1], comments=True))
    return found


def parse_train(words: list[str]) -> None:
    from trainer import command_line

    others = ["--student", "wrn-16-1", "--teacher", "wrn-16-2"] if "..." in words else []
    words = [word for word in words if word != "..."] + others
    if {"--eval-only", "--export"} & set(words):  # of a run that is not here
        command_line._parser().parse_args(words)
    else:
        command_line.parse_args([*words, "--print-config"])


def parse_reproduce(words: list[str]) -> None:
    from reproduce import __main__ as reproduce

    reproduce._parse(words)


def parse_maps(words: list[str]) -> None:
    from at_fused.visualize import arguments

    arguments.parse(words)


def parse_taps(words: list[str]) -> None:
    from at_fused.taps import __main__ as taps

    taps._parse(words)


def parse_benchmarks(words: list[str]) -> None:
    from benchmarks import __main__ as benchmarks

    benchmarks.arguments(words)


PARSERS: dict[str, Callable[[list[str]], None]] = {
    "train.py": parse_train,
    "train": parse_train,
    "reproduce": parse_reproduce,
    "maps": parse_maps,
    "at_fused.visualize": parse_maps,
    "taps": parse_taps,
    "at_fused.taps": parse_taps,
    "benchmarks": parse_benchmarks,
}


def check(words: list[str]) -> None:
    """That what is started exists and understands its flags."""
    program, *rest = words
    if program == "at-fused":
        return PARSERS[rest[0]](rest[1:])
    if program == "torchrun":
        return PARSERS["train.py"](rest[rest.index("train.py") + 1 :])
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
        return None
    if program == "pytest":
        return None
    if program.endswith("pip") or rest[:2] == ["-m", "pip"]:
        extras = set(re.findall(r"\[([\w,]+)\]", " ".join(rest)))
        known = re.findall(r"^(\w+) = \[$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {extra for group in extras for extra in group.split(",")} <= set(known)
        return None
    if rest[0] == "-c":
        ast.parse(rest[1])
        return None
    module = rest[1] if rest[0] == "-m" else rest[0]
    if module in PARSERS:
        return PARSERS[module](rest[2:] if rest[0] == "-m" else rest[1:])
    file = ROOT / (module.replace(".", "/") + ".py" if rest[0] == "-m" else module)
    assert module == "pytest" or file.exists() or file.with_suffix("").is_dir(), words
    return None


@each_text
def test_commands_exist_and_understand_their_flags(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where recipes are found, and nothing can be overwritten
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "runs/student").mkdir(parents=True)
    shutil.copy(ROOT / "recipes/demo/base.yaml", tmp_path / "runs/student/config.yaml")
    with (tmp_path / "runs/student/config.yaml").open("a") as config:
        config.write("student: wrn-16-1\n")
    for words in commands(path):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"{' '.join(words)}: {error}") from error


def test_the_forms_of_taps_are_taken() -> None:
    from trainer.config import make_config

    blocks = [code for language, code in FENCE.findall((ROOT / "docs/models.md").read_text()) if language]
    forms = [
        yaml.safe_load(form)
        for code in blocks
        for form in re.split(r"^(?=taps:)", code, flags=re.M)
        if form[:4] == "taps"
    ]
    assert len(forms) == 4
    run = {"student": "wrn-16-1", "teacher": "wrn-16-2", "method": "at", "teacher-checkpoint": "model.pt"}
    for form in forms:
        config = make_config(run | {"dataset": "digits", "output-dir": "runs/x"} | form)
        if "student" in next(iter(form["taps"])):  # a list of pairs
            assert [pair.student for pair in config.taps] == [pair["student"] for pair in form["taps"]]
        else:
            assert config.taps == form["taps"]


def test_the_page_of_keys_is_the_configurations() -> None:
    from trainer import keys

    assert (ROOT / "docs/keys.md").read_text() == keys.page(), "python -m trainer.keys docs/keys.md writes it"


# --- the figures are those of the results -------------------------------------------------------------


def test_the_table_of_the_loss_is_measured() -> None:
    """docs/performance.md, cell by cell, from the committed rows."""
    rows = json.loads((ROOT / "benchmarks/results/amd-epyc/loss-cpu.json").read_text())["rows"]
    table = {
        cells[0]: cells[1:]
        for line in (ROOT / "docs/performance.md").read_text().splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
        and cells[0].endswith(("fp32", "bf16"))
    }
    assert len(table) == 8
    names = ["authors", "vecdot", "compile", "compile-vecdot", "ours-cpu", "ours-cpu-two-pass"]
    for line, cells in table.items():
        cell = line.lower().replace("channels-last", "channels_last").replace(", ", "-")
        measured = {row["provider"]: row for row in rows if row["cell"] == cell}
        expected = [measured["authors"]["floor_ms"], *(measured[name]["times_floor"] for name in names)]
        assert cells == [f"{value:.2f}" for value in expected]
