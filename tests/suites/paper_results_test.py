"""Tests of the paper's results and of inferring the pre-training data."""

import pytest

from mixer_jax.models.registry import list_model_names
from mixer_jax.suites.paper_results import PAPER, find_row, infer_pretrain_dataset


def test_find_row_prefers_table_2() -> None:
    row = find_row("i21k", "Mixer-L/16", 448)
    assert row is not None
    # VTAB-1k was measured for Table 2 only.
    assert (row.table, row.imagenet, row.avg5, row.vtab) == (2, 84.15, 93.91, 74.95)


def test_find_row_of_table_3() -> None:
    row = find_row("i21k", "Mixer-B/16", 224)
    assert row is not None
    assert (row.table, row.imagenet, row.real, row.avg5, row.vtab) == (3, 80.64, 85.8, 92.5, None)
    assert (row.images_per_second, row.core_days) == (1384, 150)


@pytest.mark.parametrize(
    ("dataset", "model", "image_size"),
    [
        ("i21k", "Mixer-S/16", 224),
        ("", "Mixer-B/16", 224),
        ("i21k", "Mixer-B/16", 448),
        ("i21k", "B/16", 224),
        ("i21k", "ViT-H/14", 518),
    ],
)
def test_find_row_of_other_models(dataset: str, model: str, image_size: int) -> None:
    assert find_row(dataset, model, image_size) is None


def test_paper_rows_are_unique() -> None:
    keys = [(row.table, row.data, row.model, row.image_size) for row in PAPER]
    assert len(set(keys)) == len(keys) == 31
    assert all(row.real > row.imagenet for row in PAPER if row.real)


# BASELINES: C.1 and C.2, in another order of columns.
@pytest.mark.parametrize(
    ("model", "data", "size", "scores", "images_per_second", "core_days"),
    [
        ("ViT-B/16", "i1k", 224, (79.67, 84.97, 90.79, None), 861, 20),
        ("ViT-L/16", "i21k", 224, (84.46, 88.35, 94.49, None), 280, 550),
        ("ViT-L/16", "i21k", 512, (85.3, 88.62, 94.39, 72.72), 32, 180),
        ("ViT-L/16", "jft", 512, (87.76, 90.54, 95.63, None), 32, 650),
        ("ViT-H/14", "jft", 518, (88.55, 90.72, 95.97, 77.63), 15, 2_300),
        ("BiT-R152x4", "i21k", 480, (85.39, None, 94.04, 70.64), 26, 940),
        ("BiT-R152x4", "jft", 480, (87.54, 90.54, 95.33, 76.29), 26, 9_900),
        ("BiT-R50x1", "jft", 224, (73.69, 81.92, None, None), 2_159, 80),
        ("BiT-R200x3", "jft", 224, (84.73, 89.58, None, None), 141, 1_780),
    ],
)
def test_find_row_distinguishes_families(
    model: str,
    data: str,
    size: int,
    scores: tuple[float | None, ...],
    images_per_second: int,
    core_days: int,
) -> None:
    row = find_row(data, model, size)
    assert row is not None
    assert (row.imagenet, row.real, row.avg5, row.vtab) == scores
    assert (row.images_per_second, row.core_days) == (images_per_second, core_days)


def test_models_of_the_rows_exist() -> None:
    assert {row.model for row in PAPER} <= {*list_model_names()}


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("imagenet2012", "i1k"),
        ("imagenet2012:5.1.0", "i1k"),
        ("imagenet21k", "i21k"),
        ("imagenet2012_subset", ""),
        ("imagenet2012_subset/1pct:5.0.0", ""),
        ("imagenet2012_real", ""),
        ("folder:/data/imagenet2012", ""),
        ("digits/low", ""),
    ],
)
def test_infer_pretrain_dataset_by_name(dataset: str, expected: str) -> None:
    assert infer_pretrain_dataset(dataset, "", 1_000) == expected
    # Trained on other data as well.
    assert infer_pretrain_dataset(dataset, "", 1_000, mixture=True) == ""
    assert infer_pretrain_dataset(dataset, "Mixer-L_16.npz", 1_000) == ""


@pytest.mark.parametrize(("num_classes", "expected"), [(21_843, "i21k"), (1_000, "i1k"), (37, "")])
def test_infer_pretrain_dataset_by_number_of_classes(num_classes: int, expected: str) -> None:
    assert infer_pretrain_dataset("", "", num_classes) == expected
