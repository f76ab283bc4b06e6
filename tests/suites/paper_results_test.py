"""Tests of what weights were pre-trained on, as their runs and classes tell."""

import pytest

from mixer_jax.suites.paper_results import infer_pretrain_dataset


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
    ],
)
def test_data_sets_are_known_by_their_whole_name(dataset: str, expected: str) -> None:
    assert infer_pretrain_dataset(dataset, "", 1_000) == expected
    # Not that alone.
    assert infer_pretrain_dataset(dataset, "", 1_000, mixture=True) == ""
    assert infer_pretrain_dataset(dataset, "weights", 1_000) == ""
