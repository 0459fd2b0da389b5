"""The configuration of a run: one model, from which the recipe keys and the command-line flags both come.

`trainer.recipes` reads recipes, `trainer.command_line` flags.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

import models
from at_fused import reference
from at_fused.visualize.paths import expand, user_path
from trainer import taps
from trainer.checks import check
from trainer.choices import OneOf, Told, by_value, flag_text, mapping
from trainer.data import DATASETS
from trainer.errors import ConfigError, did_you_mean
from trainer.hardware import computes
from trainer.methods import METHODS, Method
from trainer.optimizers import OPTIMIZERS, Choice
from trainer.taps import Taps


def _by_method(text: Callable[[type[Method]], str]) -> str:
    """What `text` says of each method that has a transfer term."""
    return by_value({name: text(method) for name, method in METHODS.items() if method.has_term})


def _by_optimizer(value: Callable[[Choice], float]) -> str:
    """What `value` is of each optimizer."""
    return by_value({name: f"{value(choice):g}" for name, choice in OPTIMIZERS.items()})


def _without_folder() -> str:
    names = [name for name, data_set in DATASETS.items() if not data_set.needs_folder]
    return f" (not needed: {', '.join(names)})"


class Config(BaseModel):
    """Every key of a recipe. Defaults are the CIFAR-10 schedule of the paper's authors (section 4.1)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    dataset: Annotated[str, OneOf(lambda: DATASETS)] = "cifar10"
    """what to train on"""
    data_dir: Annotated[Path | None, Told(_without_folder)] = None
    """folder that contains the data set's own folder; of imagefolder: train and val"""
    image_size: int = Field(224, ge=1)
    """height and width of the images of a data set of files"""
    augment: Literal["crop-flip", "flip", "none"] = "crop-flip"
    """random crops, and flips where the data allow them"""
    augment_cycle: int = Field(0, ge=0)
    """epochs after which each image's crops and flips are repeated, in a new order; 0: never"""
    crop_padding: Literal["reflect", "zeros"] = "reflect"
    """what borders the images of a data set in memory before they are cropped: their reflection, or black"""
    max_unreadable: int = Field(100, ge=0)
    """image files that may be unreadable, and are skipped, before the run ends"""
    limit_train: int | None = Field(None, ge=1)
    """train on this many images (stratified, chosen by seed)"""
    limit_test: int | None = Field(None, ge=1)
    """test on this many images (stratified, the same for every seed)"""

    student: str
    """model to train: wrn-16-1, torchvision:NAME, timm:NAME, package.module:factory or file.py:factory"""
    student_args: dict[str, Any] = {}
    """more arguments of its own, such as {width_mult: 0.5}"""
    pretrained: bool | Path = False
    """start from a file of weights or, true, those published; of other classes the last layer is new"""
    freeze: list[str] = []
    """modules, or groups or blocks, whose parameters do not train"""
    freeze_bn: bool = False
    """BatchNorm stays in eval mode while training"""
    sync_bn: bool = False
    """BatchNorm statistics over all ranks (CUDA only)"""
    teacher: str | None = None
    """model to learn from, named as the student"""
    teacher_args: dict[str, Any] = {}
    """more arguments of the teacher's own"""
    teacher_checkpoint: Path | Literal[True] | None = None
    """the teacher's weights: model.pt or checkpoint.pt of its run, another file, or true: those published"""
    teacher_cache: Literal["off", "memory"] | Path = "off"
    """off, memory, or a folder that runs may share: the teacher runs in one augment-cycle alone"""
    teacher_cache_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """what teacher-cache keeps the teacher's maps and logits in"""

    method: Annotated[str, OneOf(lambda: METHODS)] = "none"
    """how the student learns from the teacher"""
    taps: Taps = "groups"
    """features compared by AT and hints: groups, blocks, convs (NIN), names of modules in both, pairs"""
    p: float = Field(2.0, ge=1, allow_inf_nan=False)
    """exponent of the attention map"""
    mapping: Annotated[str, OneOf(lambda: reference.MAPPINGS)] = "sum"
    """reduction over channels of the attention map"""
    normalize: Annotated[str, OneOf(lambda: [*reference.NORMS, "none"])] = "l2"
    """normalisation of the attention map"""
    distance: Annotated[str, OneOf(lambda: reference.DISTANCES)] = "mse"
    """distance of normalised maps: the authors' mean of squares, or Eq. 2 as printed"""
    norm_order: float = Field(2.0, ge=1)
    """order of the norm where distance is norm"""
    beta: Annotated[float, Told(lambda: f"; default {_by_method(lambda m: f'{m.default_beta:g}')}")] = Field(
        Method.default_beta, ge=0, allow_inf_nan=False
    )
    """weight of the transfer term"""
    beta_schedule: Annotated[
        Literal["constant", "linear", "cosine", "step"] | None,
        Told(lambda: f"; unset: {_by_method(lambda method: method.default_schedule)}"),
    ] = None
    """decay of beta, to 0 for linear and cosine"""
    beta_milestones: list[NonNegativeInt] = []
    """epochs at which beta-schedule step multiplies beta by beta-gamma"""
    beta_gamma: float = Field(0.1, ge=0, allow_inf_nan=False)
    """factor of beta-schedule step"""
    at_start_epoch: int = Field(0, ge=0)
    """first epoch (counted from 0) with the transfer term"""
    output_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    """weight, inside beta, of symmetry's term on the outputs, besides 1/2 of that on the gradients"""
    gradient_layer: str | None = None
    """module at whose output the gradient-based methods take the gradient; unset: the input"""
    gradient_bn: Literal["batch", "running", "update"] = "batch"
    """BatchNorm in their passes: the batch's statistics, the running ones, or as batch and updating those"""
    temperature: float = Field(4.0, gt=0, allow_inf_nan=False)
    """temperature of distillation"""
    alpha: float = Field(0.9, ge=0, le=1)
    """weight of the soft targets in distillation"""

    epochs: int = Field(200, ge=1)
    """passes over the training images"""
    batch_size: int = Field(128, ge=1)
    """images per step, over all ranks together"""
    accumulate: int = Field(1, ge=1, le=2**31)
    """parts in which each rank's share of a batch is computed: less memory, the same mean gradient"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of weights, data order and augmentation"""
    skip_nonfinite: bool = False
    """leave out steps whose gradients are not finite, instead of ending the run"""

    optimizer: Annotated[str, OneOf(lambda: OPTIMIZERS)] = "sgd"
    """torch's"""
    lr: Annotated[float, Told(lambda: f"; default {_by_optimizer(lambda choice: choice.lr)}")] = Field(
        OPTIMIZERS["sgd"].lr, gt=0, allow_inf_nan=False
    )
    """learning rate (of onecycle: the peak)"""
    lr_schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    """step changes at epochs; cosine and onecycle change at every step"""
    lr_milestones: list[NonNegativeInt] = [60, 120, 160]
    """epochs at which lr-schedule step multiplies the rate by lr-gamma"""
    lr_gamma: float = Field(0.2, gt=0, allow_inf_nan=False)
    """factor of lr-schedule step"""
    lr_warmup: float = Field(0.3, ge=0, lt=1)
    """share of onecycle's steps in which the rate rises"""
    warmup_epochs: float = Field(0.0, ge=0, allow_inf_nan=False)
    """epochs in which the rate of the other schedules rises linearly; cosine falls after them"""
    momentum: float = Field(0.9, ge=0, lt=1)
    """momentum of SGD"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    adam_betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay of the means of the gradients and of their squares"""
    weight_decay: Annotated[
        float, Told(lambda: f"; default {_by_optimizer(lambda choice: choice.weight_decay)}")
    ] = Field(OPTIMIZERS["sgd"].weight_decay, ge=0, allow_inf_nan=False)
    """weight decay, on every parameter; that of adamw is decoupled from the gradient"""
    clip_grad_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    """most that the norm of a step's gradients, all together, may be: a larger one is scaled down to it"""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """share of the labels' probability that is spread evenly over all classes, in cross-entropy"""
    mixup: float = Field(0.0, ge=0, allow_inf_nan=False)
    """mix images and labels in pairs, with weights from Beta(VALUE, VALUE); 0: never"""
    cutmix: float = Field(0.0, ge=0, allow_inf_nan=False)
    """paste a rectangle of one image into another, likewise; with mixup a draw chooses for each step"""
    ema: float = Field(0.0, ge=0, lt=1)
    """decay, such as 0.999, of a moving average of the student, tested and saved beside it; 0: none"""

    amp: Literal["none", "bf16", "fp16", "auto"] = "none"
    """autocast dtype; auto becomes bf16 on devices with instructions for it, else none"""
    precision: Literal["fp32", "fp64"] = "fp32"
    """arithmetic without autocast: fp32 (TF32 in a GPU's convolutions), or fp64, to compare last digits"""
    channels_last: bool = False
    """memory format of images and activations"""
    compile: bool = False
    """compile the models with torch.compile"""
    cuda_graphs: bool = False
    """replay each pass of a compiled model as one CUDA graph; without effect on CPUs"""
    deterministic: bool = True
    """deterministic CUDA kernels (the CPU's are in any case); false: whichever prove fastest"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one"""
    backend: str = "auto"
    """backend of at_fused"""
    workers: int = Field(0, ge=0)
    """data-loading processes per rank, of a data set of files; 0 loads in the training process"""
    threads: int = Field(0, ge=0, le=2**15)
    """CPU threads per rank; 0 leaves PyTorch's choice"""
    test_batch_size: int = Field(500, ge=1)
    """images per step of the evaluation, on each rank"""

    output_dir: Path | None = None
    """where the run writes"""
    resume: str = "auto"
    """auto: go on with the run in output-dir; never: that is empty; a path: begin with that checkpoint"""
    checkpoint_every: int = Field(0, ge=0)
    """steps between checkpoints; 0: at the end of each epoch"""
    max_steps: int | None = Field(None, ge=1)
    """stop after this many steps; schedules still span epochs"""

    @field_validator("*", mode="before")
    @classmethod
    def _unset(cls, value: Any, info: Any) -> Any:
        """On the command line an optional key is unset with the word null."""
        return None if value == "null" else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_choices(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Where they are unset: beta by the method, lr and weight-decay by the optimizer."""
        method = METHODS.get(str(values.get("method")), Method)
        optimizer = OPTIMIZERS.get(str(values.get("optimizer")), OPTIMIZERS["sgd"])
        defaults = {
            "beta": method.default_beta,
            "lr": optimizer.lr,
            "weight-decay": optimizer.weight_decay,
        }
        unset = [
            key for key in defaults if values.get(key, values.get(key.replace("-", "_"))) in (None, "null")
        ]
        return values | {key: defaults[key] for key in unset}

    @field_validator("lr_milestones", "beta_milestones", "freeze", "adam_betas", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("taps", mode="before")
    @classmethod
    def _parse_taps(cls, value: Any) -> Any:
        return taps.parse(value)

    @field_validator("student_args", "teacher_args", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        return mapping(value)

    @field_validator("student", "teacher")
    @classmethod
    def _found_from_everywhere(cls, value: str | None) -> str | None:
        return value and models.resolved(value)

    @field_validator("teacher_checkpoint", mode="before")
    @classmethod
    def _word_true(cls, value: Any) -> Any:
        return True if str(value).lower() == "true" else value

    @field_validator("data_dir", "teacher_checkpoint", "output_dir", "resume", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value == "":  # else the current folder, where a variable of the shell is not set
            raise ValueError("is empty")
        if "\0" in str(value):
            raise ValueError("holds a null character")
        return expand(str(value)) if isinstance(value, (str, Path)) else value

    @field_validator("teacher_cache", mode="before")
    @classmethod
    def _off_or_named(cls, value: Any) -> Any:
        return "off" if value is False else value if value in ("off", "memory") else cls._named(value)

    @field_validator("pretrained", mode="before")
    @classmethod
    def _word_or_path(cls, value: Any) -> Any:
        words = {"true": True, "false": False, "null": False, "none": False}
        word = str(value).lower()
        return words[word] if word in words else user_path(str(value))

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Config:
        if self.amp == "auto":
            fast = self.precision == "fp32" and computes("bf16", self.uses_cuda)
            object.__setattr__(self, "amp", "bf16" if fast else "none")
        if self.beta_schedule is None:
            object.__setattr__(self, "beta_schedule", METHODS[self.method].default_schedule)
        check(self, paths=not (info.context and info.context["to_print"]))
        return self

    @property
    def uses_cuda(self) -> bool:
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def to_yaml(self) -> str:
        """The resolved configuration; reads back as a recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)


KEYS = [name.replace("_", "-") for name in Config.model_fields]

EXAMPLES = {"student": ", such as wrn-16-1; or a recipe that names one"}  # of what is required


def make_config(values: dict[str, Any], *, to_print: bool = False) -> Config:
    """Validate `values`; a mistake raises ConfigError with one line for all of them.

    One that is only to be printed may lack the paths of data and teacher, as recipes do.
    """
    try:
        return Config.model_validate(values, context={"to_print": to_print})
    except ValidationError as error:
        raise ConfigError("; ".join(map(_line, error.errors()))) from None


def _line(error: Any) -> str:
    """One pydantic error as `key: what is wrong (got ...)`."""
    key = str(error["loc"][0]).replace("_", "-") if error["loc"] else ""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}{did_you_mean(key, KEYS)}"
    if error["type"] == "missing":
        return f"{key} is required{EXAMPLES.get(key, '')}"
    if not key:
        return message
    return f"{key}: {message[0].lower() + message[1:]} (got {flag_text(error['input'])!r})"
