"""Tests of the names of ImageNet's classes."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax.data.imagenet_classes import imagenet1k_wnids


def test_names_are_in_the_order_of_the_class_numbers() -> None:
    names = imagenet1k_wnids()
    assert len(set(names)) == len(names) == 1000
    assert (names[0], names[-1]) == ("n01440764", "n15075141")
    # Numbered by the ids in their order: "tench" is 0, "toilet tissue" 999.
    assert names == tuple(sorted(names))


def test_names_are_those_of_the_data_set(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    features = tfds.builder("imagenet2012", data_dir=tmp_path).info.features
    assert tuple(features["label"].names) == imagenet1k_wnids()


def test_tfds_is_not_imported() -> None:
    code = (
        "import sys; from mixer_jax.data.imagenet_classes import imagenet1k_wnids; "
        "print(len(imagenet1k_wnids()), 'tensorflow_datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "False"]


@pytest.mark.parametrize("installed", [True, False])
def test_without_tfds_or_its_file(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("tensorflow_datasets", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if installed else None)
    assert imagenet1k_wnids() == ()
