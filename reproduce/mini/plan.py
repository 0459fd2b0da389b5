"""The trainings of Tables 4 and 5 in miniature, and their two data sets out of one folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from at_fused.visualize.images import class_folders
from reproduce.tables import RECIPES, Job, with_epochs
from trainer import run_folder
from trainer.config import make_config
from trainer.data.files import difference
from trainer.errors import ConfigError
from trainer.recipes import load_recipe

# Names of Imagenette's classes, for the pictures; other classes have the names of their folders.
IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
FEWEST_CLASSES = 5  # 3 and 2


@dataclass(frozen=True)
class Runs:
    """The trainings of both tables by their column, the teacher first; Table 4's start from Table 5's."""

    table5: dict[str, Job]
    table4: dict[str, Job]


def split(data_dir: Path, out: Path) -> tuple[Path, Path]:
    """Two data sets, as folders of links: the first classes of `data_dir` to pre-train on, the others to
    fine-tune on. Their numbers differ, so that the last layer has to be left out.

    Raises:
        ConfigError: `data_dir` is not what is expected, or `out` holds the links of another.
    """
    held_out = next((name for name in ("val", "test") if (data_dir / name).is_dir()), "val")
    try:
        names, held_out_names = (class_folders(data_dir / part)[0] for part in ("train", held_out))
    except OSError as error:
        raise ConfigError(f"data-dir {data_dir}: {error.filename}: {error.strerror}") from None
    differ = names != held_out_names
    if differ or len(names) < FEWEST_CLASSES:
        fault = difference(names, held_out_names, held_out)[1] if differ else f"{len(names)} classes"
        raise ConfigError(
            f"data-dir {data_dir}: expected the folders train and val (or test), each with the same "
            f"{FEWEST_CLASSES} or more folders of images ({fault})"
        )
    parts = out / "pretraining", out / "finetuning"
    for number, name in enumerate(names):
        part = parts[number > len(names) // 2]
        for source, target in (("train", "train"), (held_out, "val")):
            link = part / target / IMAGENETTE.get(name, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(data_dir / source / name)
            elif not link.samefile(data_dir / source / name):
                raise ConfigError(f"{out} links to other images than data-dir {data_dir}: choose another out")
    return parts


def plan(out: Path, pretraining: Path, finetuning: Path, epochs: int | None = None) -> Runs:
    """The trainings, in the recipes' epochs or `epochs`."""

    def job(recipe: str, data: Path, pretrained: Job | None = None, teacher: Job | None = None) -> Job:
        own = load_recipe(RECIPES / "mini" / f"{recipe}.yaml")
        if epochs is not None:
            own = with_epochs(own, epochs)
        own |= {"data-dir": str(data), "output-dir": str(out / recipe), "threads": 1}
        for key, source in (("pretrained", pretrained), ("teacher-checkpoint", teacher)):
            if source:
                own[key] = str(source.folder / run_folder.MODEL)
        return Job(recipe, make_config(own), teacher or pretrained)

    teacher, student = (job(f"table5/{name}", pretraining) for name in ("teacher", "student"))
    table5 = {"teacher": teacher, "student": student}
    table5["at"] = job("table5/at", pretraining, teacher=teacher)
    tuned = job("table4/teacher", finetuning, pretrained=teacher)
    table4 = {"teacher": tuned, "student": job("table4/student", finetuning, pretrained=student)}
    for name in ("kd", "at"):
        table4[name] = job(f"table4/{name}", finetuning, pretrained=student, teacher=tuned)
    return Runs(table5, table4)
