"""Published weights that are known, as data. Where PAPER leaves a fact open, it says so here."""

from typing import NamedTuple


class PretrainedModel(NamedTuple):
    """Published weights.

    Attributes:
        source: to be passed as --checkpoint.
        model: and its image size.
        trained_on: data sets, in order; empty: unverified.
        num_classes: of the head; None: unverified.
        mebibytes: of the file; None: not known here.
        scores: in percent, measured by timm on ImageNet: top-1, top-5, top-1 by ReaL's labels.
        note: number of one of `NOTES`; 0: none.
    """

    source: str
    model: str
    trained_on: str
    num_classes: int | None
    mebibytes: float | None = None
    scores: tuple[float, float, float] | None = None
    note: int = 0


_BUCKET = "gs://mixer_models"
_HUB = "hf:timm"
_I1K, _I21K = "ImageNet-1k", "ImageNet-21k"
_FT = f"{_I21K}-P, then -1k"

NOTES = (
    "In spite of their names these two are the ImageNet-1k models, as one of the authors said.",
    "The bucket has such weights; the names of their files, what they were trained on and their "
    "classes are unverified.",
)

# Sizes, tags and scores: section 6 of PAPER; ImageNet-21k's classes: its section 1, and for miil
# the settings in timm 1.0.31.
MODEL_ZOO = (
    PretrainedModel(f"{_BUCKET}/imagenet1k/Mixer-B_16.npz", "B/16", _I1K, 1_000, 228.47),
    PretrainedModel(f"{_BUCKET}/imagenet1k/Mixer-L_16.npz", "L/16", _I1K, 1_000, 794.29),
    PretrainedModel(f"{_BUCKET}/imagenet21k/Mixer-B_16.npz", "B/16", _I21K, 21_843, 289.61),
    PretrainedModel(f"{_BUCKET}/imagenet21k/Mixer-L_16.npz", "L/16", _I21K, 21_843, 875.78),
    *(
        PretrainedModel(
            f"{_BUCKET}/{way}/Mixer-{model}.npz",
            model.replace("_", "/"),
            "",
            None,
            note=2,
        )
        for way, models in (
            ("sam", ("B_16", "B_32")),
            ("gsam", ("B_16", "B_32", "S_16", "S_32", "S_8")),
        )
        for model in models
    ),
    PretrainedModel(
        f"{_HUB}/mixer_b16_224.goog_in21k_ft_in1k",
        "B/16",
        _I1K,
        1_000,
        scores=(76.616, 92.250, 82.012),
        note=1,
    ),
    PretrainedModel(
        f"{_HUB}/mixer_l16_224.goog_in21k_ft_in1k",
        "L/16",
        _I1K,
        1_000,
        scores=(72.084, 87.632, 77.306),
        note=1,
    ),
    PretrainedModel(f"{_HUB}/mixer_b16_224.goog_in21k", "B/16", _I21K, 21_843),
    PretrainedModel(f"{_HUB}/mixer_l16_224.goog_in21k", "L/16", _I21K, 21_843),
    PretrainedModel(f"{_HUB}/mixer_b16_224.miil_in21k", "B/16", f"{_I21K}-P", 11_221),
    PretrainedModel(f"{_HUB}/mixer_b16_224.miil_in21k_ft_in1k", "B/16", _FT, 1_000),
)
