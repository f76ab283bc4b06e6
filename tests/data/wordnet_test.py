"""Tests of WordNet IDs and their words."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax.data.wordnet import TABLE, describe_class, imagenet_wnids, label_class


def test_wnids_are_in_the_order_of_the_outputs() -> None:
    for num_classes in (1_000, 11_221, 21_843):
        wnids = imagenet_wnids(num_classes)
        assert len(set(wnids)) == len(wnids) == num_classes
        assert wnids == tuple(sorted(wnids))
    # "tench" is 0, "toilet tissue" is 999.
    assert (imagenet_wnids(1_000)[0], imagenet_wnids(1_000)[-1]) == ("n01440764", "n15075141")
    # As published with the weights; two of the classes have no images in the releases of ImageNet.
    assert describe_class(imagenet_wnids(21_843)[2037]) == "sea swallow, Sterna hirundo"
    assert {"n03931044", "n09859684"} < {*imagenet_wnids(21_843)}
    # Only one class of ImageNet-1k is not in ImageNet-21k.
    assert {*imagenet_wnids(1_000)} - {*imagenet_wnids(21_843)} == {"n04399382"}


@pytest.mark.parametrize("num_classes", [0, 1, 10, 100, 999, 1_001, 21_841, 21_844])
def test_other_numbers_of_classes_have_no_wnids(num_classes: int) -> None:
    assert imagenet_wnids(num_classes) == ()


def test_wnids_match_the_tfds_dataset(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    features = tfds.builder("imagenet2012", data_dir=tmp_path).info.features
    assert tuple(features["label"].names) == imagenet_wnids(1_000)


@pytest.mark.parametrize(
    ("name", "words", "label"),
    [
        ("n01440764", "tench, Tinca tinca", "tench (n01440764)"),
        # Two classes with equal words.
        ("n02012849", "crane", "crane (n02012849)"),
        ("n03126707", "crane", "crane (n03126707)"),
        # The last one.
        ("n15102894", "knothole", "knothole (n15102894)"),
        ("n00000000", "", "n00000000"),
        ("n1440764", "", "n1440764"),
        (" n01440764", "", " n01440764"),
        ("n01440764\n", "", "n01440764\n"),
        # Digits of another script.
        ("n٠١٤٤٠٧٦٤", "", "n٠١٤٤٠٧٦٤"),
        ("n99999999", "", "n99999999"),
        ("tench", "", "tench"),
        ("", "", ""),
    ],
)
def test_wordnet_ids_are_described(name: str, words: str, label: str) -> None:
    assert (describe_class(name), label_class(name)) == (words, label)


def test_every_class_has_words_and_no_two_labels_are_equal() -> None:
    wnids = {*imagenet_wnids(1_000), *imagenet_wnids(21_843)}
    assert len(wnids) == 21_844
    assert all(map(describe_class, wnids))
    assert len({label_class(wnid) for wnid in wnids}) == len(wnids)


def test_table_is_read_only_for_wordnet_ids() -> None:
    code = (
        "from mixer_jax.data import wordnet; wordnet.label_class('cat'); "
        "print(wordnet._read_table.cache_info().currsize); "
        "wordnet.label_class('n01440764'); print(wordnet._read_table.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


def test_table_is_small_and_has_no_time_of_writing() -> None:
    content = TABLE.read_bytes()
    assert len(content) < 300_000
    # RFC 1952: no flags, so no file name, and time 0.
    assert content[:2] == b"\x1f\x8b"
    assert content[3:8] == bytes(5)
    gzip.decompress(content).decode("ascii")
