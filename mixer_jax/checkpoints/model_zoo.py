"""Published weights, as data. NOTES says which facts are unverified."""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES, list_model_names


class PretrainedModel(NamedTuple):
    """Published weights.

    Attributes:
        source: Name to pass as --checkpoint.
        model: Full name of the model.
        pretrain_data: Datasets in order of training; empty if unverified.
        num_classes: Outputs of the head; 0 means no head, None unverified.
        mebibytes: Size of the file; None if unknown.
        accuracy: Percent on ImageNet, measured by timm: top-1, top-5, and top-1 with ReaL labels.
        note: Number of an entry of `NOTES`, from 1; 0 for none.
        image_size: Side of the images in pixels; 0 if the weights fit any size.
    """

    source: str
    model: str
    pretrain_data: str
    num_classes: int | None
    mebibytes: float | None = None
    accuracy: tuple[float, float, float] | None = None
    note: int = 0
    image_size: int = 224


NOTES = (
    "In spite of their names these two are the ImageNet-1k models, as one of the authors said.",
    "The bucket has these weights; the names of their files, their training data and their classes "
    "are unverified.",
    "The head is all zeros: these weights are for fine-tuning, features and probes.",
    "The file is three times as large as the parameters. What else it holds is unverified.",
)

_BUCKET = "gs://mixer_models"
_VIT_BUCKET, _BIT_BUCKET = "gs://vit_models", "gs://bit_models"
_HUB = "hf:timm"
_I1K, _I21K = "ImageNet-1k", "ImageNet-21k"
_I21KP_I1K = f"{_I21K}-P, then -1k"
_I21K_I1K = f"{_I21K}, then -1k"


def _vit_models() -> Iterator[PretrainedModel]:
    """Yields ViTs: of the paper, SAM (arXiv 2106.01548), AugReg (arXiv 2106.10270), and timm's."""
    sizes = {"B_32": 400.01, "B_16": 393.69, "B_8": 393.72}
    sizes |= {"L_32": 1254.84, "L_16": 1246.42, "H_14": 2519.17}
    for model, size in sizes.items():
        source = f"{_VIT_BUCKET}/imagenet21k/ViT-{model}.npz"
        yield PretrainedModel(source, _vit(model), _I21K, 21_843, size, note=3)
    folder = f"{_VIT_BUCKET}/imagenet21k+imagenet2012"
    fine_tuned = {"B_32": 336.89, "B_16": 331.4, "B_8": 334.78, "L_32": 1169.71, "L_16": 1162.40}
    for model, size in fine_tuned.items():
        source = f"{folder}/ViT-{model}.npz"
        yield PretrainedModel(source, _vit(model), _I21K_I1K, 1_000, size, image_size=384)
    for model, size in {"B_16": 330.29, "L_16": 1160.91}.items():
        yield PretrainedModel(f"{folder}/ViT-{model}-224.npz", _vit(model), _I21K_I1K, 1_000, size)
    sam = {"B_32": 336.61, "B_16": 330.3, "L_32": None, "L_16": None, "S_16": 252.57}
    for model, sam_size in sam.items():
        source, note = f"{_VIT_BUCKET}/sam/ViT-{model}.npz", 4 if model == "S_16" else 0
        yield PretrainedModel(source, _vit(model), _I1K, 1_000, sam_size, note=note)
    # The choice of the authors: the best on a part of the training set.
    augreg = {
        "Ti_16": ("none", "0.03", 37),
        "S_32": ("none", "0.1", 118),
        "S_16": ("light1", "0.03", 115),
        "B_32": ("light1", "0.1", 398),
        "B_16": ("medium1", "0.1", 391),
        "B_8": ("medium2", "0.1", None),
        "L_16": ("strong1", "0.1", 1243),
    }
    for model, (augmentation, decay, file_size) in augreg.items():
        name = f"{model}-i21k-300ep-lr_0.001-aug_{augmentation}-wd_{decay}-do_0.0-sd_0.0.npz"
        source = f"{_VIT_BUCKET}/augreg/{name}"
        yield PretrainedModel(source, _vit(model), _I21K, 21_843, file_size)
    for name, accuracy in _TIMM_VITS.items():
        width, patch, image_size = _TIMM_VIT_NAME.findall(name)[0]
        source = f"{_HUB}/{name}"
        data = _I21K_I1K if "ft_in1k" in name else _I1K
        model = f"ViT-{_TIMM_VIT_SIZES[width]}/{patch}"
        yield PretrainedModel(
            source, model, data, 1_000, accuracy=accuracy, image_size=int(image_size)
        )
    for name in ("base_patch32", "base_patch16", "large_patch32", "large_patch16", "huge_patch14"):
        width, _, patch = name.partition("_patch")
        source = f"{_HUB}/vit_{name}_224.orig_in21k"
        yield PretrainedModel(source, f"ViT-{_TIMM_VIT_SIZES[width]}/{patch}", _I21K, 0)


def _vit(name: str) -> str:
    return f"ViT-{name.replace('_', '/')}"


_TIMM_VIT_NAME = re.compile(r"vit_(\w+)_patch(\d+)_(\d+)\.")
_TIMM_VIT_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_TIMM_VITS = {
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": (75.452, 92.858, 82.061),
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k": (78.438, 94.542, 84.822),
    "vit_small_patch32_224.augreg_in21k_ft_in1k": (76.010, 93.266, 82.503),
    "vit_small_patch32_384.augreg_in21k_ft_in1k": (80.476, 95.594, 86.310),
    "vit_small_patch16_224.augreg_in21k_ft_in1k": (81.402, 96.150, 86.854),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": (83.814, 97.106, 88.650),
    "vit_base_patch32_224.augreg_in21k_ft_in1k": (80.732, 95.574, 85.979),
    "vit_base_patch32_384.augreg_in21k_ft_in1k": (83.358, 96.828, 87.903),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": (84.534, 97.300, 88.887),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": (86.010, 97.998, 89.969),
    "vit_base_patch8_224.augreg_in21k_ft_in1k": (85.838, 97.776, 89.457),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": (85.856, 97.822, 89.318),
    "vit_large_patch16_384.augreg_in21k_ft_in1k": (87.096, 98.302, 90.219),
    "vit_small_patch16_224.augreg_in1k": (78.842, 94.280, 84.510),
    "vit_small_patch16_384.augreg_in1k": (81.130, 95.590, 86.502),
    "vit_base_patch32_224.augreg_in1k": (74.908, 91.770, 81.145),
    "vit_base_patch32_384.augreg_in1k": (78.750, 94.238, 84.717),
    "vit_base_patch16_224.augreg_in1k": (79.154, 94.108, 84.388),
    "vit_base_patch16_384.augreg_in1k": (81.102, 95.334, 86.214),
    "vit_base_patch16_224.orig_in21k_ft_in1k": (81.782, 96.122, 86.754),
    "vit_base_patch16_384.orig_in21k_ft_in1k": (84.212, 97.210, 88.398),
    "vit_large_patch32_384.orig_in21k_ft_in1k": (81.508, 96.086, 85.913),
    "vit_base_patch16_224.sam_in1k": (80.246, 94.764, 85.881),
    "vit_base_patch32_224.sam_in1k": (73.704, 91.012, 80.216),
}


def _bit_models() -> Iterator[PretrainedModel]:
    """Yields BiTs: S of ImageNet-1k, M of ImageNet-21k, fine-tuned and distilled ones, timm's."""
    # By model: MiB with 1,000 and with 21,843 classes.
    sizes = {
        "R50x1": (97, 260),
        "R50x3": (829, 1318),
        "R101x1": (170, 333),
        "R101x3": (1480, 1968),
        "R152x2": (902, 1227),
        "R152x4": (3573, 4224),
    }
    for files, data, num_classes in (
        ("BiT-S-{}", _I1K, 1_000),
        ("BiT-M-{}", _I21K, 21_843),
        ("BiT-M-{}-ILSVRC2012", _I21K_I1K, 1_000),
    ):
        for model, by_classes in sizes.items():
            source = f"{_BIT_BUCKET}/{files.format(model)}.npz"
            size = by_classes[num_classes != 1_000]
            yield PretrainedModel(source, f"BiT-{model}", data, num_classes, size, image_size=0)
    source = f"{_BIT_BUCKET}/BiT-M-R50x1-CIFAR10.npz"
    yield PretrainedModel(source, "BiT-R50x1", f"{_I21K}, CIFAR-10", 10, image_size=0)
    for name, image_size, accuracy in _TIMM_BITS:
        model = f"BiT-R{name.split('_')[1]}"
        data = _I1K if "distilled" in name else _I21K_I1K
        source = f"{_HUB}/{name}"
        yield PretrainedModel(source, model, data, 1_000, accuracy=accuracy, image_size=image_size)


_TIMM_BITS = (
    ("resnetv2_50x1_bit.goog_in21k_ft_in1k", 448, (80.386, 95.694, 86.464)),
    ("resnetv2_101x1_bit.goog_in21k_ft_in1k", 448, (82.332, 96.524, 87.678)),
    ("resnetv2_50x3_bit.goog_in21k_ft_in1k", 448, (83.982, 97.130, 88.400)),
    ("resnetv2_101x3_bit.goog_in21k_ft_in1k", 448, (84.430, 97.380, 88.445)),
    ("resnetv2_152x2_bit.goog_in21k_ft_in1k", 448, (84.468, 97.432, 88.710)),
    ("resnetv2_152x4_bit.goog_in21k_ft_in1k", 480, (84.936, 97.456, 88.567)),
    ("resnetv2_50x1_bit.goog_distilled_in1k", 224, (82.820, 96.526, 87.798)),
    ("resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k", 224, (82.918, 96.568, 87.491)),
    ("resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384", 384, (83.858, 97.130, 88.144)),
)

# Sizes are those in the buckets, or computed from the number of parameters where they list GiB or
# none; accuracies are those in timm's results. The papers have 21,843 classes of ImageNet-21k; the
# classes of miil are those in the configs of timm 1.0.31.
MODEL_ZOO = (
    PretrainedModel(f"{_BUCKET}/imagenet1k/Mixer-B_16.npz", "Mixer-B/16", _I1K, 1_000, 228.47),
    PretrainedModel(f"{_BUCKET}/imagenet1k/Mixer-L_16.npz", "Mixer-L/16", _I1K, 1_000, 794.29),
    PretrainedModel(f"{_BUCKET}/imagenet21k/Mixer-B_16.npz", "Mixer-B/16", _I21K, 21_843, 289.61),
    PretrainedModel(f"{_BUCKET}/imagenet21k/Mixer-L_16.npz", "Mixer-L/16", _I21K, 21_843, 875.78),
    *(
        PretrainedModel(
            f"{_BUCKET}/{optimizer}/Mixer-{model}.npz",
            f"Mixer-{model.replace('_', '/')}",
            "",
            None,
            note=2,
        )
        for optimizer, models in (
            ("sam", ("B_16", "B_32")),
            ("gsam", ("B_16", "B_32", "S_16", "S_32", "S_8")),
        )
        for model in models
    ),
    PretrainedModel(
        f"{_HUB}/mixer_b16_224.goog_in21k_ft_in1k",
        "Mixer-B/16",
        _I1K,
        1_000,
        accuracy=(76.616, 92.250, 82.012),
        note=1,
    ),
    PretrainedModel(
        f"{_HUB}/mixer_l16_224.goog_in21k_ft_in1k",
        "Mixer-L/16",
        _I1K,
        1_000,
        accuracy=(72.084, 87.632, 77.306),
        note=1,
    ),
    PretrainedModel(f"{_HUB}/mixer_b16_224.goog_in21k", "Mixer-B/16", _I21K, 21_843),
    PretrainedModel(f"{_HUB}/mixer_l16_224.goog_in21k", "Mixer-L/16", _I21K, 21_843),
    PretrainedModel(f"{_HUB}/mixer_b16_224.miil_in21k", "Mixer-B/16", f"{_I21K}-P", 11_221),
    PretrainedModel(f"{_HUB}/mixer_b16_224.miil_in21k_ft_in1k", "Mixer-B/16", _I21KP_I1K, 1_000),
    *_vit_models(),
    *_bit_models(),
)


def list_models(filter: str | Sequence[str] = "", *, pretrained: bool = False) -> list[str]:
    """Lists models by name, e.g. "Mixer-B/16", or published weights.

    Args:
        filter: Pattern with shell wildcards, such as "vit-b*" or "*/16", or several, of which any
            must match. Case is ignored. Empty: no filter. Weights are listed if the pattern matches
            their own name or that of their model.
        pretrained: Whether to list published weights, by the names that `load_pretrained` takes,
            instead of models.

    Returns:
        Names in the order of families and sizes; [] if no name matches.

    Raises:
        UserError: `filter` is not text.
    """
    patterns = [filter] if isinstance(filter, str) else filter
    if not isinstance(patterns, Sequence) or not all(isinstance(text, str) for text in patterns):
        raise UserError(f"filter must be a pattern or a list of patterns, got {filter!r}.")
    patterns = [text.lower() for text in patterns if text]
    # Each with the names that a pattern can match.
    names: dict[str, tuple[str, ...]] = {name: (name,) for name in list_model_names()}
    if pretrained:
        names = {entry.source: (entry.source, entry.model) for entry in MODEL_ZOO}

    def matches(candidates: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(c.lower(), text) for c in candidates for text in patterns)

    return [name for name, candidates in names.items() if not patterns or matches(candidates)]


def format_model_zoo(family: str = "all") -> str:
    """Formats the model zoo as one table per family, or as that of one family."""
    prefixes = [f"{f.display_name}-" for f in FAMILIES.values() if family in ("all", f.name)]
    entries = [[e for e in MODEL_ZOO if e.model.startswith(prefix)] for prefix in prefixes]
    tables = [_format_table(rows) for rows in entries if rows]
    found = {entry.note for rows in entries for entry in rows}
    notes = [f"[{number}] {note}" for number, note in enumerate(NOTES, 1) if number in found]
    legend = "top-1, top-5 and ReaL: percent on ImageNet, as measured by timm."
    return "\n\n".join([*tables, "\n".join([legend, *notes])])


def _format_table(entries: list[PretrainedModel]) -> str:
    header = ("pass as --checkpoint", "model", "px", "classes", "MiB", "top-1", "top-5", "ReaL")
    rows: list[tuple[str, ...]] = [(*header, "trained on")]
    for entry in entries:
        rows.append(
            (
                entry.source,
                entry.model,
                str(entry.image_size or "any"),
                _format_classes(entry.num_classes),
                f"{entry.mebibytes:,.0f}" if entry.mebibytes else "",
                *([f"{value:.2f}" for value in entry.accuracy] if entry.accuracy else [""] * 3),
                (entry.pretrain_data or "?") + (f" [{entry.note}]" if entry.note else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    alignments = "<<>>>>>><"
    lines = []
    for row in rows:
        cells = zip(row, alignments, widths, strict=True)
        lines.append("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip())
    return "\n".join(lines)


def _format_classes(num_classes: int | None) -> str:
    return {None: "?", 0: "none"}.get(num_classes) or f"{num_classes:,}"
