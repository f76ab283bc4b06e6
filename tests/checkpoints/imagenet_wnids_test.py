"""Tests of the WordNet IDs of the ImageNet-1k classes."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax.checkpoints.load import imagenet1k_wnids


def test_wnids_are_in_the_order_of_the_class_indices() -> None:
    wnids = imagenet1k_wnids()
    assert len(set(wnids)) == len(wnids) == 1000
    assert (wnids[0], wnids[-1]) == ("n01440764", "n15075141")
    # Class indices follow the sorted IDs: "tench" is 0, "toilet tissue" is 999.
    assert wnids == tuple(sorted(wnids))


def test_wnids_match_the_tfds_dataset(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    features = tfds.builder("imagenet2012", data_dir=tmp_path).info.features
    assert tuple(features["label"].names) == imagenet1k_wnids()


def test_wnids_are_read_without_importing_tfds() -> None:
    code = (
        "import sys; from mixer_jax.checkpoints.load import imagenet1k_wnids; "
        "print(len(imagenet1k_wnids()), 'tensorflow_datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000", "False"]


@pytest.mark.parametrize("installed", [True, False])
def test_wnids_are_empty_without_tfds_or_its_file(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("tensorflow_datasets", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if installed else None)
    assert imagenet1k_wnids() == ()
