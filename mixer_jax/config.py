"""Every configuration key, once: its default, its meaning, its rules.

A file in configs/ starts from `get_default()` and changes what differs; `--config.KEY=VALUE` on the
command line (see command_line.py) changes it once more; `validate()` then checks the whole before a
device is touched.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mixer_jax.errors import UserError, did_you_mean
from mixer_jax.model.variants import check_image_size, resolve_widths


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        default: its value where a config says nothing; its type is the key's type.
        meaning: one line for people, with the unit.
        choices: the values allowed, if they can be listed.
        low: smallest value allowed.
        high: largest value allowed.
        resumable: whether a run may be resumed with another value without harm to its result.
    """

    default: Any
    meaning: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    resumable: bool = False


KEYS: dict[str, Key] = {
    "seed": Key(0, "the one source of randomness: weights, order, augmentation, masks", low=0),
    "num_steps": Key(0, "training steps; 0: as many as num_epochs makes", low=0),
    "num_epochs": Key(0.0, "passes over the training split, where num_steps is 0", low=0),
    "batch_size": Key(4096, "training images a step, over all devices and hosts", low=1),
    "eval_batch_size": Key(1024, "evaluation images a step, likewise", low=1, resumable=True),
    "image_size": Key(224, "side of the square image the model sees, pixels", low=1),
    "init_from": Key("", "run or checkpoint to take weights from; the head starts afresh"),
    # Model (Section 2, Table 1).
    "model.variant": Key("B/16", 'S/32 S/16 B/32 B/16 L/32 L/16 H/14, or "custom"'),
    "model.num_blocks": Key(0, "0: the variant's own, as for the four keys below", low=0),
    "model.patch_size": Key(0, "side of a patch, pixels", low=0),
    "model.hidden_dim": Key(0, "channels of a token", low=0),
    "model.tokens_mlp_dim": Key(0, "hidden units of the token-mixing MLPs", low=0),
    "model.channels_mlp_dim": Key(0, "hidden units of the channel-mixing MLPs", low=0),
    "model.gelu": Key("tanh", "tanh as the authors, exact as timm", ("tanh", "exact")),
    "model.stochastic_depth": Key(0.0, "drop probability of the last block", low=0, high=0.999),
    "model.dropout": Key(0.0, "probability, in both MLPs", low=0, high=0.999),
    "model.head_bias": Key(0.0, "initial bias of the head"),
    "model.dtype": Key(
        "auto",
        "of the computation; auto: bfloat16 on accelerators, float32 on CPU",
        ("auto", "float32", "bfloat16"),
    ),
    "model.unroll": Key(0, "blocks per iteration of the scan; 0: all", low=0, resumable=True),
    "model.remat": Key(
        "none",
        "what the backward pass recomputes: none, dots (all but products), full",
        ("none", "dots", "full"),
        resumable=True,
    ),
    # Data.
    "dataset.name": Key("imagenet2012", 'TFDS name, "digits", or "synthetic" (no disk needed)'),
    "dataset.data_dir": Key("", "where TFDS keeps data; empty: TFDS's default", resumable=True),
    "dataset.train_split": Key("train", "split to train on, in TFDS syntax"),
    "dataset.num_classes": Key(0, "nominal; used by synthetic data, 0: 1000", low=0),
    "dataset.num_examples": Key(
        0, "nominal; used by synthetic data, 0: 1024", low=0, resumable=True
    ),
    "preprocess.train_crop": Key(
        "inception",
        "inception (random area and aspect), shift (resize, then shift), resize",
        ("inception", "shift", "resize"),
    ),
    "preprocess.min_area": Key(
        0.05, "smallest inception crop, share of the image", low=0.0001, high=1
    ),
    "preprocess.max_shift": Key(4, "largest shift of train_crop=shift, pixels", low=0),
    "preprocess.flip": Key(True, "flip half of the training images left to right"),
    "preprocess.randaugment_layers": Key(0, "operations an image; 0: off", low=0),
    "preprocess.randaugment_magnitude": Key(10.0, "on the scale 0-10; more extrapolates", low=0),
    "preprocess.eval_crop": Key(
        "shorter_side",
        "shorter_side or square (resize to 8/7, central crop), whole (resize only)",
        ("shorter_side", "square", "whole"),
    ),
    "loader.threads": Key(
        0, "threads that prepare images; 0: by the machine", low=0, resumable=True
    ),
    "loader.prefetch_batches": Key(2, "batches kept ready on the host", low=1, resumable=True),
    # Recipe (Section 3, Appendix B).
    "recipe.loss": Key("sigmoid", "cross-entropy", ("sigmoid", "softmax")),
    "recipe.label_smoothing": Key(
        0.0, "share of a label spread over all classes", low=0, high=0.999
    ),
    "recipe.mixup": Key(0.0, "parameter of Beta(p, p); 0: off", low=0),
    "recipe.accumulation_steps": Key(
        1, "pieces a batch is computed in, one after the other", low=1, resumable=True
    ),
    "recipe.ema_decay": Key(
        0.0, "of averaged parameters, used in evaluation; 0: off", low=0, high=0.999999
    ),
    "optimizer.name": Key("adam", "adam or momentum (SGD)", ("adam", "momentum")),
    "optimizer.learning_rate": Key(1e-3, "at the end of warmup", low=0),
    "optimizer.warmup_steps": Key(10_000, "linear from zero", low=0),
    "optimizer.decay": Key("linear", "after warmup", ("linear", "cosine", "none")),
    "optimizer.end_learning_rate": Key(0.0, "at the last step", low=0),
    "optimizer.weight_decay": Key(0.0, "decoupled, times the learning rate, kernels only", low=0),
    "optimizer.b1": Key(0.9, "Adam's first moment", low=0, high=0.999999),
    "optimizer.b2": Key(0.999, "Adam's second moment", low=0, high=0.999999),
    "optimizer.eps": Key(1e-8, "Adam's epsilon", low=0),
    "optimizer.momentum": Key(0.9, "of momentum SGD", low=0, high=0.999999),
    "optimizer.clip_norm": Key(1.0, "largest global gradient norm; 0: no clipping", low=0),
    # Run.
    "mesh.data": Key(
        0, "devices along the data axis; 0: all that fsdp leaves", low=0, resumable=True
    ),
    "mesh.fsdp": Key(1, "devices each parameter is split over", low=1, resumable=True),
    "distributed": Key(
        "auto", "join a multi-host run: auto detects one", ("auto", "yes", "no"), resumable=True
    ),
    "checkpoint.every_steps": Key(1000, "0: only by time and at the end", low=0, resumable=True),
    "checkpoint.every_minutes": Key(0.0, "0: only by steps and at the end", low=0, resumable=True),
    "checkpoint.keep": Key(2, "checkpoints kept, the newest", low=1, resumable=True),
    "log_every_steps": Key(50, "metrics are written this often", low=1, resumable=True),
    "compilation_cache": Key(
        "~/.cache/mixer_jax", "folder of compiled programs; empty: off", resumable=True
    ),
}

KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}

# Every entry of `config.evals`, a named split scored exactly, has these keys.
EVAL_KEYS: dict[str, Key] = {
    "dataset": Key("", "data set; empty: the one trained on", resumable=True),
    "split": Key("test", "in TFDS syntax", resumable=True),
    "every_steps": Key(0, "0: only at the end", low=0, resumable=True),
}


def get_default() -> ConfigDict:
    """Returns a locked config with every key at its default and no evaluations."""
    tree: dict[str, Any] = {}
    for path, key in KEYS.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = key.default
    return ConfigDict(tree | {"evals": {}}).lock()


def evals(**splits: dict[str, Any]) -> ConfigDict:
    """Returns a value for `config.evals`, e.g. `evals(test=dict(split="test", every_steps=100))`.

    Raises:
        UserError: an entry has a key that `EVAL_KEYS` lacks.
    """
    entries = {}
    for name, given in splits.items():
        for key in given:
            check_known(f"evals.{name}.{key}", [f"evals.{name}.{known}" for known in EVAL_KEYS])
        entries[name] = {key: given.get(key, spec.default) for key, spec in EVAL_KEYS.items()}
    return ConfigDict(entries).lock()


def validate(config: ConfigDict) -> None:
    """Checks types, ranges and the rules between keys; touches no device and no disk.

    Raises:
        UserError: the first rule broken, naming key, value and fix.
    """
    values = flatten(config)
    if "evals" not in config:
        raise UserError("config.evals is missing; start from config.get_default()")
    for path, value in values.items():
        _check_value(path, value)
    declared = [*KEYS, *(f"evals.{name}.{key}" for name in config.evals for key in EVAL_KEYS)]
    for path in declared:
        if path not in values:
            raise UserError(
                f"config.{path} is missing; start from config.get_default() and config.evals()"
            )
    widths = resolve_widths(config.model.variant, **width_overrides(config.model))
    check_image_size(config.image_size, config.image_size, widths.patch_size)
    if config.model.unroll > widths.num_blocks:
        raise UserError(
            f"config.model.unroll={config.model.unroll} is more than the model's "
            f"{widths.num_blocks} blocks; pass 1 to {widths.num_blocks}, or 0 for all"
        )
    if not config.num_steps and not config.num_epochs:
        raise UserError("config.num_steps=0 and config.num_epochs=0; set one of them")
    if config.batch_size % config.recipe.accumulation_steps:
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by "
            f"config.recipe.accumulation_steps={config.recipe.accumulation_steps}; "
            "choose a divisor of the batch"
        )
    if config.preprocess.max_shift >= config.image_size:
        raise UserError(
            f"config.preprocess.max_shift={config.preprocess.max_shift} moves the whole image out "
            f"of sight; pass less than config.image_size={config.image_size}"
        )
    if config.recipe.mixup and config.batch_size < 2:
        raise UserError("config.recipe.mixup needs a partner; set config.batch_size to 2 or more")
    if config.num_steps or config.dataset.num_examples:
        check_warmup(config, resolve_num_steps(config, config.dataset.num_examples))


def resolve_num_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the number of training steps: `num_steps`, or whole batches in `num_epochs`."""
    return config.num_steps or max(1, int(config.num_epochs * num_examples / config.batch_size))


def check_warmup(config: ConfigDict, num_steps: int) -> None:
    """Raises UserError if warmup would outlast the run."""
    warmup = config.optimizer.warmup_steps
    if warmup > num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} is more than the run's {num_steps} steps; "
            "lower it or train for longer"
        )


def width_overrides(model: ConfigDict) -> dict[str, int]:
    """Returns the five width keys of the model section, as `resolve_widths` takes them."""
    names = ("num_blocks", "patch_size", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    return {name: model[name] for name in names}


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns every leaf by its dotted path, in the config's order."""

    def leaves(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, ConfigDict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(leaves(config, ""))


def describe() -> str:
    """Returns every key with default and meaning, for `--help`."""
    lines = [f"  {path}={key.default!r:<22} {key.meaning}" for path, key in KEYS.items()]
    lines += [
        f"  evals.NAME.{name}={key.default!r:<9} {key.meaning}" for name, key in EVAL_KEYS.items()
    ]
    return "\n".join(lines)


def check_known(path: str, known: list[str]) -> None:
    """Raises UserError, with the nearest known key, if `path` is not one of `known`."""
    if path not in known:
        hint = did_you_mean(path, known, otherwise="; --help lists them all")
        if path.startswith("evals.") and not any(key.startswith("evals.") for key in known):
            hint = "; a config file declares its evaluations, and this one has none"
        raise UserError(f"config.{path} is no configuration key{hint}")


def _check_value(path: str, value: Any) -> None:
    if path.startswith("evals."):
        name = path.split(".")[-1]
        check_known(path, [path.removesuffix(name) + known for known in EVAL_KEYS])
        key = EVAL_KEYS[name]
    else:
        check_known(path, list(KEYS))
        key = KEYS[path]
    kind = type(key.default)
    if type(value) is not kind:
        raise UserError(f"config.{path}={value!r} is not {KIND_NAMES[kind]}; change it to one")
    if key.choices and value not in key.choices:
        raise UserError(f"config.{path}={value!r} is unknown; choose {' or '.join(key.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path}={value} is not finite; pass a finite number")
    if isinstance(value, int | float) and not key.low <= value <= key.high:
        raise UserError(
            f"config.{path}={value!r} is out of range; pass {key.low:g} to {key.high:g}"
            if key.high < math.inf
            else f"config.{path}={value!r} is out of range; pass {key.low:g} or more"
        )
