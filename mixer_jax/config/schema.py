"""Every configuration key, once: its default, its meaning, its range."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
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


FIELDS: dict[str, Field] = {
    "seed": Field(
        0,
        "the one source of randomness: weights, order, augmentation, masks",
        low=0,
        high=2**32 - 1,
    ),
    "num_steps": Field(0, "training steps; 0: as many as num_epochs makes", low=0),
    "num_epochs": Field(0.0, "passes over the training split, where num_steps is 0", low=0),
    "batch_size": Field(4096, "training images a step, over all devices and hosts", low=1),
    "eval_batch_size": Field(1024, "evaluation images a step, likewise", low=1, resumable=True),
    "image_size": Field(224, "side of the square image the model sees, pixels", low=1),
    "init_from": Field("", "weights to begin with: a run, a file, or hf:NAME, as --checkpoint"),
    "init_head": Field(
        "auto",
        "of these: keep, new (zeros); auto: keep if their class names are the data's",
        ("auto", "keep", "new"),
    ),
    # Model (Section 2, Table 1).
    "model.family": Field("mixer", "family of models", ("mixer",)),
    "model.variant": Field(
        "B/16", 'S/32 S/16 B/32 B/16 L/32 L/16 H/14, "custom", or "init_from": that of the weights'
    ),
    "model.num_blocks": Field(0, "0: the variant's own, as for the four keys below", low=0),
    "model.patch_size": Field(0, "side of a patch, pixels", low=0),
    "model.hidden_dim": Field(0, "channels of a token", low=0),
    "model.tokens_mlp_dim": Field(0, "hidden units of the token-mixing MLPs", low=0),
    "model.channels_mlp_dim": Field(0, "hidden units of the channel-mixing MLPs", low=0),
    "model.gelu": Field("tanh", "tanh as the authors, exact as timm", ("tanh", "exact")),
    "model.stochastic_depth": Field(0.0, "drop probability of the last block", low=0, high=0.999),
    "model.dropout": Field(0.0, "probability, in both MLPs", low=0, high=0.999),
    "model.head_bias": Field(0.0, "initial bias of the head"),
    "model.dtype": Field(
        "auto",
        "of the computation; auto: bfloat16 on accelerators, float32 on CPU",
        ("auto", "float32", "bfloat16"),
    ),
    "model.scan_unroll": Field(
        -1,
        "blocks per iteration of the loop over them; 0: all, no loop; -1: 0 on GPUs and with "
        "kernels of our own, else 1",
        low=-1,
        resumable=True,
    ),
    "model.remat": Field(
        "auto",
        "what the backward pass recomputes: none, dots (all but products), mlp_hidden, full; auto: "
        "dots in a loop of XLA's, else none",
        ("auto", "none", "dots", "mlp_hidden", "full"),
        resumable=True,
    ),
    "model.backend": Field(
        "auto",
        "xla; hand-written ones: triton on GPUs, mosaic on TPUs; auto: triton on GPUs, else xla",
        ("auto", "xla", "triton", "mosaic"),
        resumable=True,
    ),
    # Data.
    "dataset.name": Field(
        "imagenet2012", 'TFDS name, perhaps NAME@LABEL; folder:PATH; "digits"; "synthetic"'
    ),
    "dataset.data_dir": Field("", "where TFDS keeps data; empty: TFDS's default", resumable=True),
    "dataset.train_split": Field("train", "split to train on, in TFDS syntax"),
    "dataset.num_classes": Field(0, "nominal; used by synthetic data, 0: 1000", low=0),
    "dataset.num_examples": Field(
        0, "nominal; used by synthetic data, 0: 1024", low=0, resumable=True
    ),
    "preprocess.train_crop": Field(
        "inception",
        "inception (random area, aspect), random_crop (resize to 8/7), random_shift (of resize), "
        "resize",
        ("inception", "random_crop", "random_shift", "resize"),
    ),
    "preprocess.min_area": Field(
        0.05, "smallest inception crop, share of the image", low=0.0001, high=1
    ),
    "preprocess.max_shift": Field(4, "largest shift of train_crop=random_shift, pixels", low=0),
    "preprocess.flip": Field(True, "flip half of the training images left to right"),
    "preprocess.randaugment_layers": Field(0, "operations an image; 0: off", low=0),
    "preprocess.randaugment_magnitude": Field(10.0, "on the scale 0-10; more extrapolates", low=0),
    "preprocess.eval_crop": Field(
        "shorter_side",
        "shorter_side, square, timm's bicubic, bilinear: resize to 8/7, crop; resize: no crop",
        ("shorter_side", "square", "bicubic", "bilinear", "resize"),
    ),
    "preprocess.exif_orientation": Field(
        False, "turn images as their camera says, which TFDS and TensorFlow never do"
    ),
    "loader.num_threads": Field(
        0, "that prepare images, in each process; 0: by the machine", low=0, resumable=True
    ),
    "loader.num_workers": Field(
        0,
        "that prepare training images; 1: the main one; 0: one for every 8 cores",
        low=0,
        resumable=True,
    ),
    "loader.prefetch_batches": Field(2, "batches kept ready on the host", low=1, resumable=True),
    "bad_images.max_fraction": Field(
        0.001,
        "of the training images that may be unusable before the run stops",
        low=0,
        high=1,
        resumable=True,
    ),
    "bad_images.skip_in_evaluation": Field(
        False, "leave them out of evaluations and count them, rather than stop", resumable=True
    ),
    # Recipe (Section 3, Appendix B).
    "recipe.loss": Field("sigmoid", "cross-entropy", ("sigmoid", "softmax")),
    "recipe.label_smoothing": Field(
        0.0, "share of a label spread over all classes", low=0, high=0.999
    ),
    "recipe.mixup": Field(0.0, "parameter of Beta(p, p); 0: off", low=0),
    "recipe.grad_accum_steps": Field(
        1, "pieces a batch is computed in, one after the other", low=1, resumable=True
    ),
    "recipe.ema_decay": Field(
        0.0, "of averaged parameters, used in evaluation; 0: off", low=0, high=0.999999
    ),
    "optimizer.name": Field("adam", "adam or momentum (SGD)", ("adam", "momentum")),
    "optimizer.learning_rate": Field(1e-3, "at the end of warmup", low=0),
    "optimizer.warmup_steps": Field(10_000, "linear from zero", low=0),
    "optimizer.decay_type": Field("linear", "after warmup", ("linear", "cosine", "none")),
    "optimizer.end_learning_rate": Field(0.0, "at the last step", low=0),
    "optimizer.weight_decay": Field(0.0, "decoupled, times the learning rate, kernels only", low=0),
    "optimizer.b1": Field(0.9, "Adam's first moment", low=0, high=0.999999),
    "optimizer.b2": Field(0.999, "Adam's second moment", low=0, high=0.999999),
    "optimizer.eps": Field(1e-8, "Adam's epsilon", low=0),
    "optimizer.momentum": Field(0.9, "of momentum SGD", low=0, high=0.999999),
    "optimizer.clip_norm": Field(1.0, "largest global gradient norm; 0: no clipping", low=0),
    # Run.
    "mesh.data": Field(
        0, "devices along the data axis; 0: all that fsdp leaves", low=0, resumable=True
    ),
    "mesh.fsdp": Field(1, "devices the kernels are split over", low=1, resumable=True),
    "distributed": Field(
        "auto", "join a multi-host run: auto detects one", ("auto", "yes", "no"), resumable=True
    ),
    "distributed_timeout": Field(
        300, "seconds to wait for the other hosts to join", low=1, high=86_400, resumable=True
    ),
    "checkpoint.every_steps": Field(1000, "0: only by time and at the end", low=0, resumable=True),
    "checkpoint.every_minutes": Field(
        0.0, "0: only by steps and at the end", low=0, resumable=True
    ),
    "checkpoint.keep": Field(2, "checkpoints kept, the newest", low=1, resumable=True),
    "log_every_steps": Field(50, "metrics are written this often", low=1, resumable=True),
    "log_update_norm": Field(
        False,
        "write the norm of the update, too, for which the parameters are copied before the step",
        resumable=True,
    ),
    "tensorboard": Field(
        True, "write TensorBoard events too, which takes TensorFlow", resumable=True
    ),
    "compilation_cache": Field(
        "~/.cache/mixer_jax", "folder of compiled programs; empty: off", resumable=True
    ),
}

# Every entry of `config.evals`, a named split scored exactly, has these keys.
EVAL_FIELDS: dict[str, Field] = {
    "type": Field(
        "classify",
        "classify by the head, or a probe of the features before it: few_shot, linear, knn",
        ("classify", "few_shot", "linear", "knn"),
        resumable=True,
    ),
    "dataset": Field("", "data set; empty: the one trained on", resumable=True),
    "split": Field("test", "in TFDS syntax", resumable=True),
    "train_split": Field("train", "likewise; what a probe learns from", resumable=True),
    "shots": Field("1,5,10,25", "of few_shot: training images a class", resumable=True),
    "num_seeds": Field(3, "of few_shot: draws of these images", low=1, resumable=True),
    "every_steps": Field(0, "0: only at the end", low=0, resumable=True),
}

# Likewise of `config.mixture`, data sets to train on together in place of one.
MIXTURE_FIELDS: dict[str, Field] = {
    "dataset": Field("", "data set; empty: config.dataset.name"),
    "split": Field("train", "in TFDS syntax"),
    "weight": Field(1.0, "share of the images, to 1 % of the smallest weight", low=1e-6),
}

# The sections that a config fills with entries of its own names.
NAMED_SECTIONS = {"evals": EVAL_FIELDS, "mixture": MIXTURE_FIELDS}


def get_field(path: str) -> Field | None:
    """Returns the declaration of a key such as "optimizer.b1" or "evals.test.split", if any."""
    section, _, rest = path.partition(".")
    if section in NAMED_SECTIONS:
        return NAMED_SECTIONS[section].get(rest.rpartition(".")[2])
    return FIELDS.get(path)
