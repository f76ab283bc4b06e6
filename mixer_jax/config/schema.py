"""Every configuration key, declared once: type, default, unit, range, choices and help.

Keys of the architecture are declared by the model families, as fields of their configs.

The dataclasses below are the parsed form of a config: `config.parse` builds a `RunConfig` once, and
all code below the commands reads that. `FIELDS` lists the same keys by their dotted paths, for
building, overriding and validating a ConfigDict. Imports nothing heavy.
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from mixer_jax.config.compat import RENAMED_VALUES
from mixer_jax.errors import UserError, suggest
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.registry import DEFAULT_FAMILY, FAMILIES, get_family

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Field:
    """Declaration of one configuration key.

    Attributes:
        type: int, float, bool or str.
        default: Value where a config does not set the key.
        help: One line, without the unit.
        example: Another value than the default, as it is written on the command line.
        unit: Unit of the value, e.g. "px"; empty for plain numbers and text.
        choices: Allowed values, if they can be listed.
        min: Smallest value allowed.
        max: Largest value allowed.
        resumable: Whether a resumed run may change the key without affecting its result.
    """

    type: type
    default: Any
    help: str
    example: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    min: float = -math.inf
    max: float = math.inf
    resumable: bool = False

    def parse(self, name: str, text: str) -> Any:
        """Parses a value of this type; ranges and choices are left to `check`.

        Raises:
            UserError: The text does not have this type; the message starts with `name`, e.g.
                "config.seed".
        """
        try:
            return BOOLEANS[text.lower()] if self.type is bool else self.type(text)
        except (ValueError, KeyError):
            raise UserError(f"{name} must be {_TYPE_NAMES[self.type]}, got {text!r}.") from None

    def check(self, name: str, value: Any) -> None:
        """Raises UserError unless a value has the type, and is in the choices and the range."""
        got = f"got {value!r}."
        if type(value) is not self.type:
            raise UserError(f"{name} must be {_TYPE_NAMES[self.type]}, {got}")
        if self.choices and value not in self.choices:
            renamed = RENAMED_VALUES.get(name.removeprefix("config."), {})
            if value in renamed:
                hint = f" It is now {renamed[value]!r}."
            else:
                hint = suggest(str(value), self.choices)
            choices = ", ".join(choice or "''" for choice in self.choices)
            raise UserError(f"{name} must be one of {choices}, {got}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be finite, {got}")
        if isinstance(value, int | float) and not self.min <= value <= self.max:
            limits = (
                f"between {self.min:g} and {self.max:.10g}"
                if self.max < math.inf
                else f"at least {self.min:g}"
            )
            raise UserError(f"{name} must be {limits}, {got}")


def key(default: Any, help_text: str, **declaration: Any) -> Any:
    """Declares a key as a dataclass field; the type and any choices follow from its annotation.

    `declaration` has other attributes of `Field`.
    """
    return dataclasses.field(default=default, metadata={"help": help_text, **declaration})


def _architecture_fields() -> dict[str, Field]:
    """Collects the fields of the architecture configs of all families."""
    found: dict[str, Field] = {}
    for family in FAMILIES.values():
        hints = typing.get_type_hints(family.config_class)
        for field in dataclasses.fields(family.config_class):
            hint, declaration = hints[field.name], dict(field.metadata)
            if typing.get_origin(hint) is Literal:
                hint, declaration["choices"] = str, ("", *typing.get_args(hint))
            found.setdefault(field.name, Field(hint, hint(), **declaration))
    return found


ARCHITECTURE_FIELDS = _architecture_fields()


def _architecture_defaults() -> dict[str, Any]:
    return {name: field.default for name, field in ARCHITECTURE_FIELDS.items()}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Model (Section 2, Table 1), and how it is executed."""

    family: str = key(DEFAULT_FAMILY, "model family", choices=tuple(FAMILIES))
    variant: str = key(
        "B/16",
        "; ".join(f"{f.display_name}: {' '.join(f.variants)}" for f in FAMILIES.values())
        + '; "custom"; or "init_from": the architecture of the checkpoint in init_from. The keys '
        f"from {next(iter(ARCHITECTURE_FIELDS))} to {list(ARCHITECTURE_FIELDS)[-1]} override it "
        "unless they are 0",
    )
    # Keys of all families, in their place among the others. 0 and "" keep the variant's value.
    overrides: Mapping[str, Any] = dataclasses.field(
        default_factory=_architecture_defaults, metadata={"keys": ARCHITECTURE_FIELDS}
    )
    gelu: Literal["tanh", "exact"] = key("tanh", "tanh approximation (authors), exact (timm)")
    stochastic_depth: float = key(
        0.0, "drop probability of the last block; grows linearly with depth", min=0, max=0.999
    )
    dropout: float = key(
        0.0,
        "dropout probability in MLPs; in a ViT also after attention and the position embedding",
        min=0,
        max=0.999,
    )
    head_bias: float = key(0.0, "initial bias of the head")
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "activations and matmuls; auto: bfloat16 on accelerators, float32 on CPU"
    )
    scan_unroll: int = key(
        -1,
        "blocks per scan iteration; 0 unrolls all; -1: 0 on GPUs and with custom kernels, else 1",
        min=-1,
        resumable=True,
    )
    remat: Literal["auto", "none", "dots", "mlp_hidden", "full"] = key(
        "auto",
        "recomputed in the backward pass: all but matmuls (dots), hidden activations of MLPs, or "
        "whole blocks (full); auto: dots if XLA scans over the blocks, else none",
        resumable=True,
    )
    backend: Literal["auto", "xla", "triton", "mosaic"] = key(
        "auto",
        "computes the blocks: XLA, or custom kernels for GPUs (triton) or TPUs (mosaic); auto: "
        "triton on GPUs, else xla",
        resumable=True,
    )

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> "ModelConfig":
        """Builds a model section from the values of its keys."""
        values = dict(section)
        overrides = {name: values.pop(name) for name in ARCHITECTURE_FIELDS if name in values}
        return cls(overrides=overrides, **values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of all keys, in their order."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            values |= value if field.name == "overrides" else {field.name: value}
        return values

    @property
    def settings(self) -> dict[str, Any]:
        """Values of the keys that do not belong to the architecture."""
        excluded = {"family", "variant", *self.overrides}
        return {name: value for name, value in self.to_dict().items() if name not in excluded}

    @functools.cached_property
    def architecture(self) -> Any:
        """Architecture config of the family; None for "init_from".

        Raises:
            UserError: The variant is unknown, or an override is invalid.
        """
        if self.variant == INIT_FROM:
            return None
        return get_family(self.family).get_config(self.variant, **self.overrides)


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Training data."""

    name: str = key(
        "imagenet2012",
        "TFDS name, optionally NAME@LABEL; folder:PATH; manifest:FILE; hf:NAME_OR_PATH; wds:PATH; "
        '"digits"; "synthetic"',
        example="hf:uoft-cs/cifar10",
    )
    data_dir: str = key("", "TFDS folder; empty: the default of TFDS", resumable=True)
    train_split: str = key("train", "training split, in TFDS syntax")
    num_classes: int = key(0, "classes of synthetic data (0: 1000), and for mixer_jax.plan", min=0)
    num_examples: int = key(
        0,
        "size of synthetic data (0: 1024), and for mixer_jax.plan",
        unit="images",
        min=0,
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Cropping and augmentation of images."""

    train_crop: Literal[
        "inception", "random_resized_crop", "random_crop", "bilinear_crop", "random_shift", "resize"
    ] = key(
        "inception",
        "inception, random_resized_crop: random area and aspect ratio, as in TensorFlow or timm; "
        "random_crop, bilinear_crop: resize to resize_size by area averaging or bilinearly, then "
        "crop; random_shift: resize, then shift",
    )
    resize_size: int = key(
        0,
        "height and width before random_crop and bilinear_crop; 0: 8/7 of image_size",
        unit="px",
        min=0,
    )
    min_area: float = key(
        0.05,
        "smallest inception or random_resized_crop, as a fraction of the image",
        min=0.0001,
        max=1,
    )
    max_shift: int = key(4, "largest shift of train_crop=random_shift", unit="px", min=0)
    flip: bool = key(True, "mirror half of the training images")
    randaugment_layers: int = key(0, "RandAugment operations per image; 0 disables it", min=0)
    randaugment_magnitude: float = key(
        10.0, "RandAugment magnitude, on a scale of 0 to 10; larger values extrapolate", min=0
    )
    random_erasing: float = key(
        0.0,
        "probability of erasing a box of a training image; 0 disables it",
        example="0.25",
        min=0,
        max=1,
    )
    random_erasing_mode: Literal["constant", "random", "pixel"] = key(
        "constant",
        "fill of the box of random_erasing: gray, one random color, or a random color per pixel",
        example="pixel",
    )
    eval_crop: Literal["shorter_side", "square", "bicubic", "bilinear", "resize"] = key(
        "shorter_side",
        "shorter_side, square: resize by area averaging, then center-crop; bicubic, bilinear: "
        "timm's crop; resize: no crop",
    )
    eval_crop_fraction: float = key(
        0.875,
        "side of the evaluation crop, as a fraction of the resized image; timm's crop_pct",
        min=0.01,
        max=1,
    )
    exif_orientation: bool = key(
        False, "apply the EXIF orientation of images, which TFDS and TensorFlow ignore"
    )
    permute: Literal["none", "patches", "pixels"] = key(
        "none",
        "a fixed permutation of all training and evaluation images, after augmentation (Figure 4); "
        "patches: of the patches, and of the pixels within them; pixels: of all pixels",
    )
    permute_patch_size: int = key(16, "patch size of permute=patches", unit="px", min=1)
    permute_seed: int = key(0, "seed of permute", min=0, max=2**32 - 1)


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """Input pipeline."""

    num_threads: int = key(
        0, "threads per worker process; 0: the cores, shared among workers", min=0, resumable=True
    )
    num_workers: int = key(
        0,
        "processes that load training images; 1: the main process; 0: one per 8 cores",
        min=0,
        resumable=True,
    )
    prefetch_batches: int = key(
        2, "batches prefetched on each host", unit="batches", min=1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class BadImagesConfig:
    """Images that cannot be decoded."""

    max_fraction: float = key(
        0.001,
        "fraction of the training images that may be unusable before the run stops",
        min=0,
        max=1,
        resumable=True,
    )
    max_count: int = key(
        10,
        "unusable training images that are tolerated even above max_fraction, unless they are "
        "more than half",
        min=0,
        resumable=True,
    )
    skip_in_evaluation: bool = key(
        False, "skip and count them in evaluations, which otherwise fail", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """Loss, regularization and averaging (Section 3, Appendix B)."""

    loss: Literal["sigmoid", "softmax"] = key("sigmoid", "cross-entropy")
    label_smoothing: float = key(0.0, "probability mass spread over all classes", min=0, max=0.999)
    min_target: float = key(
        0.0, "sigmoid: smallest target of a class; the largest is 1 minus it", min=0, max=0.499
    )
    mixup: float = key(0.0, "parameter p of Beta(p, p); 0 disables mixup", min=0)
    cutmix: float = key(
        0.0,
        "parameter p of Beta(p, p), 1 in the CutMix paper; 0 disables CutMix",
        example="1.0",
        min=0,
    )
    mixup_switch_prob: float = key(
        0.5,
        "probability that a step uses CutMix if both mixup and CutMix are on",
        example="0.3",
        min=0,
        max=1,
    )
    class_weights: Literal["none", "balanced"] = key(
        "none",
        "factor of the loss of an example, by its class; balanced: number of images / (number of "
        "classes × images of the class), which averages to 1",
        example="balanced",
    )
    grad_accum_steps: int = key(
        1, "microbatches that each batch is split into", min=1, resumable=True
    )
    ema_decay: float = key(
        0.0,
        "decay of averaged parameters, which evaluation uses; 0 disables averaging",
        min=0,
        max=0.999999,
    )


# Fractions, or numbers with an exponent of up to two digits: Python computes 1e-999999999 exactly,
# which would take hours.
_FRACTION = re.compile(r"\s*[0-9.]{1,30}(e-?[0-9]{1,2}|/[0-9]{1,30})?\s*", re.IGNORECASE)


def parse_decay_points(name: str, text: str) -> tuple[Fraction, ...]:
    """Parses fractions of a run, such as "0.3,0.6,0.9" or "30/90,60/90"; empty text is none.

    Raises:
        UserError: The text is not a list of increasing fractions; the message starts with `name`.
    """
    try:
        parts = text.split(",") if text.strip() else []
        if not all(map(_FRACTION.fullmatch, parts)):
            raise ValueError
        points = list(map(Fraction, parts))
    except (ValueError, ZeroDivisionError):
        points = [Fraction(0)]
    if points != sorted(set(points)) or not all(0 < point < 1 for point in points):
        raise UserError(
            f"{name} must list increasing fractions between 0 and 1, got {text!r}. "
            "30/90,60/90,80/90 are epochs 30, 60 and 80 of 90."
        )
    return tuple(points)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd", "lion", "lamb", "muon", "adafactor"] = key(
        "adamw",
        "update rule of optax; sgd: with momentum; muon: for matrices of blocks, and AdamW for all "
        "other parameters",
        example="lion",
    )
    learning_rate: float = key(1e-3, "peak learning rate, at the end of warmup", min=0)
    warmup_steps: int = key(10_000, "length of linear warmup from zero", unit="steps", min=0)
    decay_type: Literal["linear", "cosine", "staircase", "rsqrt", "none"] = key(
        "linear",
        "decay after warmup; staircase: to a tenth at each of decay_points; rsqrt: by "
        "1 / √(1 + steps since warmup / rsqrt_timescale)",
        example="cosine",
    )
    decay_points: str = key(
        "",
        "staircase: fractions of the steps, warmup included, as numbers or quotients",
        example="30/90,60/90,80/90",
    )
    rsqrt_timescale: int = key(
        10_000,
        "rsqrt: steps after which the rate is 1 / √2 of its peak",
        example="1000",
        unit="steps",
        min=1,
    )
    cooldown_steps: int = key(
        0,
        "rsqrt, none: length of the final linear decay to end_learning_rate; 0 disables it",
        example="5000",
        unit="steps",
        min=0,
    )
    end_learning_rate: float = key(
        0.0, "learning rate at the last step of linear or cosine decay, or of cooldown", min=0
    )
    weight_decay: float = key(
        0.0, "decoupled; multiplied by the learning rate; weight matrices only", min=0
    )
    b1: float = key(
        0.9,
        "adamw, lamb, muon: decay of AdamW's first moment; lion: weight of its momentum in the "
        "update",
        min=0,
        max=0.999999,
    )
    b2: float = key(
        0.999,
        "adamw, lamb, muon: decay of AdamW's second moment; lion: decay of its momentum, usually "
        "0.99",
        example="0.99",
        min=0,
        max=0.999999,
    )
    eps: float = key(
        1e-8,
        "adamw, lamb, muon: epsilon of AdamW and Muon; lamb: usually 1e-6",
        example="1e-6",
        min=0,
    )
    momentum: float = key(
        0.9,
        "sgd, muon, adafactor: decay of the momentum; muon: usually 0.95; adafactor: 0 disables "
        "it and saves its memory",
        example="0.95",
        min=0,
        max=0.999999,
    )
    clip_norm: float = key(1.0, "largest global gradient norm; 0 disables clipping", min=0)
    sam_rho: float = key(
        0.0,
        "sharpness-aware minimization (SAM): distance from the parameters at which the gradient is "
        "computed; doubles the time of a step; 0 disables it",
        example="0.1",
        min=0,
    )
    layer_decay: float = key(
        1.0,
        "factor of the learning rate from each layer to the one before it; the head has the full "
        "rate; 1 disables it",
        example="0.75",
        min=0.01,
        max=1,
    )
    freeze: str = key(
        "",
        "layers or parameters that are not trained, by name or with wildcards, separated by "
        "commas; empty: none",
        example="stem,blocks.0,*bias",
    )

    @property
    def freeze_patterns(self) -> tuple[str, ...]:
        """Patterns of `freeze`."""
        return tuple(pattern.strip() for pattern in self.freeze.split(",") if pattern.strip())

    @functools.cached_property
    def decay_fractions(self) -> tuple[Fraction, ...]:
        """Parsed `decay_points`. Raises UserError if they are not increasing fractions."""
        return parse_decay_points("config.optimizer.decay_points", self.decay_points)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh."""

    data: int = key(
        0,
        "size of the data axis; 0: all devices, divided by fsdp",
        unit="devices",
        min=0,
        resumable=True,
    )
    fsdp: int = key(
        1, "devices that weight matrices are sharded over", unit="devices", min=1, resumable=True
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run; one is always saved at the end."""

    every_steps: int = key(1000, "interval; 0: none", unit="steps", min=0, resumable=True)
    every_minutes: float = key(0.0, "interval; 0: none", unit="min", min=0, resumable=True)
    keep: int = key(2, "newest checkpoints to keep", min=1, resumable=True)
    best_metric: str = key(
        "",
        "metric, as EVAL/METRIC in metrics.jsonl, whose best checkpoint is kept as well; a "
        "checkpoint is saved at each of its evaluations; empty: none",
        example="test/top1",
        resumable=True,
    )


def parse_shots(name: str, text: str) -> tuple[int, ...]:
    """Parses a list of numbers of images per class, such as "1,5,10,25" or "(1, 5)".

    Raises:
        UserError: The text is not a list of positive integers; the message starts with `name`.
    """
    numbers = [number.strip() for number in text.strip("()[] ").split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", number) and int(number) for number in numbers):
        raise UserError(f"{name} must be a list of positive integers such as 1,5,10, got {text!r}.")
    return tuple(dict.fromkeys(map(int, numbers)))


def parse_profile_steps(name: str, text: str) -> range:
    """Parses steps such as "100:105", which are 100 to 104; empty text is no steps.

    Raises:
        UserError: The text has another form; the message starts with `name`.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps or not steps[0]:
        raise UserError(
            f"{name} must be START:STOP with 1 <= START < STOP, got {text!r}. "
            "100:105 profiles steps 100 to 104."
        )
    return steps


# Metrics of the head by which checkpoints can be selected: with one label per image, and with any
# number.
LABEL_METRICS = ("top1", "top5", "log_likelihood", "calibration_error")
MULTI_LABEL_METRICS = ("mean_average_precision", "micro_average_precision", "loss")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An entry of `config.evals`: a split that is evaluated under the name of the entry."""

    type: Literal["classify", "few_shot", "linear", "knn"] = key(
        "classify", "the model's head, or a probe of frozen features", resumable=True
    )
    dataset: str = key("", "dataset; empty: the training dataset", resumable=True)
    split: str = key("test", "evaluation split, in TFDS syntax", resumable=True)
    train_split: str = key("train", "split that a probe is fitted on", resumable=True)
    shots: str = key(
        "1,5,10,25", "few_shot: training images per class", unit="images", resumable=True
    )
    num_seeds: int = key(3, "few_shot: random draws of these images", min=1, resumable=True)
    every_steps: int = key(0, "interval; 0: only at the end", unit="steps", min=0, resumable=True)

    @functools.cached_property
    def shot_counts(self) -> tuple[int, ...]:
        """Parsed `shots`. Raises UserError if they are not positive integers."""
        return parse_shots("shots", self.shots)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics by which checkpoints can be selected; those of the head depend on the data.

        Raises:
            UserError: `shots` are not positive integers.
        """
        if self.type == "few_shot":
            return tuple(f"{shots}_shot" for shots in self.shot_counts)
        is_head = self.type == "classify"
        return LABEL_METRICS + MULTI_LABEL_METRICS if is_head else (self.type,)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """An entry of `config.mixture`: one of several datasets to train on instead of one."""

    dataset: str = key("", "dataset; empty: dataset.name")
    split: str = key("train", "training split, in TFDS syntax")
    weight: float = key(
        1.0, "sampling weight, relative to the other entries; rounded to 1 %", min=1e-6
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run."""

    seed: int = key(
        0,
        "root of all randomness: initialization, data order, augmentation, drop masks",
        min=0,
        max=2**32 - 1,
    )
    num_steps: int = key(0, "training steps; 0 computes them from num_epochs", unit="steps", min=0)
    num_epochs: float = key(
        0.0, "passes over the training split if num_steps is 0", unit="epochs", min=0
    )
    batch_size: int = key(4096, "training batch over all devices and hosts", unit="images", min=1)
    eval_batch_size: int = key(
        1024, "evaluation batch over all devices and hosts", unit="images", min=1, resumable=True
    )
    image_size: int = key(
        224, "side of the square images that the model sees", unit="px", min=1, max=2**16
    )
    init_from: str = key(
        "", "checkpoint to fine-tune: a workdir, a file or hf:OWNER/NAME, as --checkpoint"
    )
    init_head: Literal["auto", "keep", "new"] = key(
        "auto",
        "keep the pretrained head, or start from zeros (new); auto keeps it if the class names "
        "match",
    )
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    loader: LoaderConfig = LoaderConfig()
    bad_images: BadImagesConfig = BadImagesConfig()
    recipe: RecipeConfig = RecipeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: Literal["auto", "yes", "no"] = key(
        "auto", "multi-host run; auto detects a cluster", resumable=True
    )
    distributed_timeout: int = key(
        300,
        "time to wait for the other hosts at start-up",
        unit="s",
        min=1,
        max=86_400,
        resumable=True,
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stopping_patience: int = key(
        0,
        "stop after this many evaluations in a row without a better checkpoint.best_metric; 0: "
        "never",
        example="5",
        unit="evaluations",
        min=0,
        resumable=True,
    )
    early_stopping_min_delta: float = key(
        0.0,
        "smallest improvement of checkpoint.best_metric that counts; accuracies are fractions, so "
        "that 0.001 is 0.1 %",
        example="0.001",
        min=0,
        resumable=True,
    )
    log_every_steps: int = key(50, "interval of metrics", unit="steps", min=1, resumable=True)
    log_update_norm: bool = key(
        False,
        "log the norm of the parameter update; copies the parameters before each step",
        resumable=True,
    )
    tensorboard: bool = key(True, "write TensorBoard events", resumable=True)
    wandb: str = key(
        "", "Weights & Biases project that the run is also logged to; empty: none", resumable=True
    )
    profile_steps: str = key(
        "",
        "START:STOP, steps to profile: 100:105 writes an XProf trace of steps 100 to 104 to "
        "WORKDIR/profile; empty: none",
        resumable=True,
    )
    compilation_cache: str = key(
        "~/.cache/mixer_jax", "folder of compiled programs; empty: no cache", resumable=True
    )
    evals: Mapping[str, EvalConfig] = dataclasses.field(default_factory=dict)
    mixture: Mapping[str, MixtureConfig] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def profile_range(self) -> range:
        """Parsed `profile_steps`. Raises UserError if they are not steps."""
        return parse_profile_steps("config.profile_steps", self.profile_steps)

    def to_dict(self) -> dict[str, Any]:
        """Converts the config to nested dicts, as `ConfigDict.to_dict` does."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}


def _declared_fields(section: type, prefix: str = "") -> dict[str, Field]:
    """Collects the keys of a dataclass and of its sections, in order, by dotted path."""
    hints = typing.get_type_hints(section)
    found: dict[str, Field] = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            found |= _declared_fields(typing.cast(type, hint), f"{prefix}{field.name}.")
        elif keys := field.metadata.get("keys"):
            found |= {prefix + name: declared for name, declared in keys.items()}
        elif field.metadata:
            declaration = dict(field.metadata)
            if typing.get_origin(hint) is Literal:
                declaration["choices"] = typing.get_args(hint)
            found[prefix + field.name] = Field(type(field.default), field.default, **declaration)
    return found


FIELDS = _declared_fields(RunConfig)
EVAL_FIELDS = _declared_fields(EvalConfig)
MIXTURE_FIELDS = _declared_fields(MixtureConfig)
# Sections whose entries a config names itself.
NAMED_SECTIONS = {"evals": EVAL_FIELDS, "mixture": MIXTURE_FIELDS}
SECTION_TYPES: dict[str, type] = {
    field.name: type(field.default)
    for field in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(field.default)
}
ENTRY_TYPES: dict[str, type] = {"evals": EvalConfig, "mixture": MixtureConfig}


def get_field(path: str) -> Field | None:
    """Returns the declaration of a key such as "optimizer.b1" or "evals.test.split", if any."""
    section, _, rest = path.partition(".")
    if section in NAMED_SECTIONS:
        return NAMED_SECTIONS[section].get(rest.rpartition(".")[2])
    return FIELDS.get(path)


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Builds a `RunConfig` from nested dicts with every key, as `fill_defaults` returns them."""
    values = dict(data)
    for name, section in SECTION_TYPES.items():
        is_model = section is ModelConfig
        values[name] = ModelConfig.from_dict(data[name]) if is_model else section(**data[name])
    for name, entry in ENTRY_TYPES.items():
        values[name] = {k: entry(**v) for k, v in values.get(name, {}).items()}
    return RunConfig(**values)
