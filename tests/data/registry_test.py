"""Tests of opening datasets by name."""

from pathlib import Path

from mixer_jax.data.registry import open_dataset
from tests.helpers.images import encode, noise


def test_synthetic_sizes_can_be_set_and_have_defaults() -> None:
    custom = open_dataset("synthetic", "any", num_classes=7, num_examples=5)
    default = open_dataset("synthetic", "any")
    assert (len(custom), custom.num_classes) == (5, 7)
    assert (len(default), default.num_classes) == (1024, 1000)


def test_names_select_folders_and_tfds_datasets(tmp_path: Path, digits_dir: str) -> None:
    (tmp_path / "cat").mkdir()
    for number in range(3):
        (tmp_path / "cat" / f"{number}.png").write_bytes(encode(noise(2, 2), "PNG"))
    assert open_dataset(f"folder:{tmp_path}", "train").class_names == ("cat",)
    assert open_dataset("digits/low", "test", digits_dir).class_names == tuple("01234")
