"""The documentation is true: it builds without a warning, its code runs, and what it names exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"))]
TEXTS = [path for path in TEXTS if path.exists()]
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
