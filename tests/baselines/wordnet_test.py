"""Comparisons of WordNet IDs and their words with timm."""

from pathlib import Path
from typing import Any

import pytest

from mixer_jax.data.wordnet import TABLE, describe_class, imagenet_wnids
from tests.baselines.write_wordnet import compress, format_table, timm_folder

pytestmark = pytest.mark.baselines


@pytest.mark.usefixtures("timm")
def test_table_is_that_of_timm() -> None:
    folder = timm_folder()
    assert folder is not None
    assert TABLE.read_bytes() == compress(format_table(folder))


@pytest.mark.parametrize(
    ("subset", "num_classes"),
    [("imagenet-1k", 1_000), ("imagenet-21k-goog", 21_843), ("imagenet-21k-miil", 11_221)],
)
def test_words_of_each_output_are_those_of_timm(timm: Any, subset: str, num_classes: int) -> None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    assert infer_imagenet_subset({"num_classes": num_classes}) == subset
    info = ImageNetInfo(subset)
    assert tuple(info.label_names()) == imagenet_wnids(num_classes)
    for index, wnid in enumerate(imagenet_wnids(num_classes)):
        assert describe_class(wnid) == info.index_to_description(index)


def test_lists_in_another_order_are_refused(tmp_path: Path) -> None:
    for name in ("imagenet21k_goog_synsets", "imagenet21k_miil_synsets"):
        (tmp_path / f"{name}.txt").write_text("n00000001\nn00000002\n")
    (tmp_path / "imagenet_synset_to_lemma.txt").write_text("n00000001\tone\nn00000002\ttwo, 2\n")
    (tmp_path / "imagenet_synsets.txt").write_text("n00000002\n")
    assert format_table(tmp_path) == "1\t2 2\tone\n1\t1 2 2\ttwo, 2\n"
    (tmp_path / "imagenet_synsets.txt").write_text("n00000002\nn00000001\n")
    with pytest.raises(ValueError, match="imagenet_synsets"):
        format_table(tmp_path)
