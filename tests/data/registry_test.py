"""Tests of opening datasets by name."""

from pathlib import Path

import numpy as np
import pytest

from mixer_jax.data.readers import shuffled_indices
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


@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_fractions_of_the_training_data_are_nested(
    kind: str, digits_dir: str, tmp_path: Path
) -> None:
    """Every epoch of a fraction has each of its images once, and no other images."""
    name, size = "digits", 1_437
    if kind == "folder":
        for index in range(100):
            path = tmp_path / "train" / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(np.full((2, 2, 3), index, np.uint8), "PNG"))
        (tmp_path / "test" / "a").mkdir(parents=True)
        (tmp_path / "test" / "a" / "0.png").write_bytes(encode(noise(2, 2), "PNG"))
        name, size = f"folder:{tmp_path}", 100
    splits = ("train[:3%]", "train[:10%]", "train[:30%]", "train")
    sources = [open_dataset(name, split, digits_dir) for split in splits]
    assert [len(source) for source in sources] == [
        round(size * fraction) for fraction in (0.03, 0.1, 0.3, 1)
    ]
    rest = open_dataset(name, "train[30%:]", digits_dir)
    previous: set[bytes] = set()
    for source in sources:
        order = shuffled_indices(source, seed=0)
        positions = range(2 * len(source))
        images = [source.examples[order[position]]["image"] for position in positions]
        first, second = images[: len(source)], images[len(source) :]
        assert sorted(first) == sorted(second)
        assert len(set(first)) == len(source)
        assert previous < set(first)
        previous = set(first)
    thirty, others = (
        {source.examples[index]["image"] for index in range(len(source))}
        for source in (sources[2], rest)
    )
    assert not thirty & others
    assert thirty | others == previous
