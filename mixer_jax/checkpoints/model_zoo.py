"""Published weights, as data. NOTES says which facts are unverified."""

from typing import NamedTuple


class PretrainedModel(NamedTuple):
    """Published weights.

    Attributes:
        source: Name to pass as --checkpoint.
        model: Full name of the model.
        pretrain_data: Datasets in order of training; empty if unverified.
        num_classes: Outputs of the head; None if unverified.
        mebibytes: Size of the file; None if unknown.
        accuracy: Percent on ImageNet, measured by timm: top-1, top-5, and top-1 with ReaL labels.
        note: Number of an entry of `NOTES`, from 1; 0 for none.
    """

    source: str
    model: str
    pretrain_data: str
    num_classes: int | None
    mebibytes: float | None = None
    accuracy: tuple[float, float, float] | None = None
    note: int = 0


NOTES = (
    "In spite of their names these two are the ImageNet-1k models, as one of the authors said.",
    "The bucket has these weights; the names of their files, their training data and their classes "
    "are unverified.",
)

_BUCKET = "gs://mixer_models"
_HUB = "hf:timm"
_I1K, _I21K = "ImageNet-1k", "ImageNet-21k"
_I21KP_I1K = f"{_I21K}-P, then -1k"

# Sizes are those in the bucket, accuracies those in timm's results. The paper has 21,843 classes of
# ImageNet-21k; the classes of miil are those in the configs of timm 1.0.31.
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
)


def format_model_zoo() -> str:
    """Formats the model zoo as a table."""
    header = ("pass as --checkpoint", "model", "classes", "MiB", "top-1", "top-5", "ReaL")
    rows: list[tuple[str, ...]] = [(*header, "trained on")]
    for entry in MODEL_ZOO:
        rows.append(
            (
                entry.source,
                entry.model,
                f"{entry.num_classes:,}" if entry.num_classes else "?",
                f"{entry.mebibytes:.2f}" if entry.mebibytes else "",
                *([f"{value:.2f}" for value in entry.accuracy] if entry.accuracy else [""] * 3),
                (entry.pretrain_data or "?") + (f" [{entry.note}]" if entry.note else ""),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    alignments = "<<>>>>><"
    lines = []
    for row in rows:
        cells = zip(row, alignments, widths, strict=True)
        lines.append("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip())
    notes = [f"[{number}] {note}" for number, note in enumerate(NOTES, 1)]
    legend = "top-1, top-5 and ReaL: percent on ImageNet, as measured by timm."
    return "\n".join([*lines, "", legend, *notes])
