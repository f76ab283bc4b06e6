"""Placeholder datasets and configs resolved for absent accelerators."""

import pytest

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.data.registry import open_dataset
from mixer_jax.planning.dataset_specs import placeholder_datasets, resolve_for_platform


@pytest.mark.parametrize(("classes", "num_classes"), [("all", 10), ("low", 5), ("high", 5)])
def test_placeholder_datasets_match_digits(classes: str, num_classes: int, digits_dir: str) -> None:
    config = parse(load_config_with_overrides(f"configs/digits.py:{classes}", []))
    placeholder = placeholder_datasets(resolve_for_platform(config, "tpu")).train
    dataset = open_dataset(f"digits/{classes}", "train", digits_dir)
    assert (len(placeholder), placeholder.num_classes) == (len(dataset), num_classes)


@pytest.mark.parametrize(
    ("platform", "flags", "expected"),
    [
        ("tpu", [], (1, "dots")),
        ("tpu", ["--config.model.backend=mosaic"], (0, "none")),
        # Custom kernels do not support dropout.
        ("tpu", ["--config.model.backend=mosaic", "--config.model.dropout=0.1"], (1, "dots")),
        ("gpu", [], (0, "none")),
    ],
)
def test_resolve_for_platform_resolves_unroll_and_remat(
    platform: str, flags: list[str], expected: tuple[int, str]
) -> None:
    config = parse(load_config_with_overrides("configs/mixer_l16_i21k.py", flags))
    model = resolve_for_platform(config, platform).model
    assert (model.scan_unroll, model.remat) == expected
