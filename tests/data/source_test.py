"""Tests of sources: mixing proportions, epochs of each component, and classes merged by name."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from mixer_jax.data.readers import shuffled_indices
from mixer_jax.data.source import (
    Example,
    Examples,
    Source,
    mix_sources,
    relabel,
    sort_class_names,
    subset,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import raises


def make_source(name: str, count: int, class_names: tuple[str, ...] = ("a", "b")) -> Source:
    examples = [
        Example(image=b"", labels=(k % len(class_names),), name=f"{name}{k}") for k in range(count)
    ]
    return Source(name, examples, class_names)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, 99.0)])
def test_mix_sources_samples_in_proportion_to_weights_at_any_position(
    weights: tuple[float, float],
) -> None:
    mixed = mix_sources([make_source("x", 500), make_source("y", 1000)], weights)
    indices = shuffled_indices(mixed, 0)
    for start in (0, 10**12):
        fraction = sum(indices[start + k] < 500 for k in range(2_000)) / 2_000
        assert fraction == pytest.approx(weights[0] / sum(weights), abs=2e-3)


def test_mix_sources_repeats_no_example_before_its_component_is_complete() -> None:
    mixed = mix_sources([make_source("x", 100), make_source("y", 70)], (0.75, 0.25))
    indices = shuffled_indices(mixed, 3)
    seen = [indices[k] for k in range(600)]
    for component, num_epochs in ((range(100), 4), (range(100, 170), 2)):
        own = [index for index in seen if index in component]
        size = len(component)
        epochs = [own[k : k + size] for k in range(0, num_epochs * size, size)]
        assert all(sorted(epoch) == list(component) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == num_epochs


def test_mix_sources_shuffles_components_independently() -> None:
    mixed = mix_sources([make_source("x", 100), make_source("y", 100)], (1.0, 1.0))
    indices = shuffled_indices(mixed, 0)
    seen = [indices[k] for k in range(200)]
    assert [k for k in seen if k < 100] != [k - 100 for k in seen if k >= 100]


def test_mix_sources_merges_classes_with_the_same_name() -> None:
    mixed = mix_sources(
        [make_source("x", 4, ("cat", "dog")), make_source("y", 3, ("bird", "cat", "emu"))], (1, 2)
    )
    assert mixed.class_names == ("cat", "dog", "bird", "emu")
    assert mixed.name == "1 × x + 2 × y"
    examples = [mixed.examples[k] for k in range(len(mixed))]
    assert [(e["name"], mixed.class_names[e["labels"][0]]) for e in examples] == [
        ("x0", "cat"),
        ("x1", "dog"),
        ("x2", "cat"),
        ("x3", "dog"),
        ("y0", "bird"),
        ("y1", "cat"),
        ("y2", "emu"),
    ]
    with pytest.raises(IndexError):
        mixed.examples[7]


def test_mix_sources_accepts_three_sources_or_one() -> None:
    three = mix_sources([make_source(name, 500) for name in "xyz"], (1, 2, 1))
    indices = shuffled_indices(three, 0)
    counts = Counter(indices[k] // 500 for k in range(400))
    assert counts == {0: 100, 1: 200, 2: 100}
    one = mix_sources([make_source("x", 500)], (0.1,))
    assert [shuffled_indices(one, 0)[k] for k in range(20)] == [
        shuffled_indices(make_source("x", 500), 0)[k] for k in range(20)
    ]


def test_a_mixture_with_a_multi_label_source_is_multi_label() -> None:
    several = Source("y", [Example(image=b"", labels=(1, 0), name="")], ("dog", "cat"), True)
    mixed = mix_sources([make_source("x", 2, ("cat", "emu")), several], (1, 1))
    assert mixed.multi_label
    assert [example["labels"] for example in mixed.examples] == [(0,), (1,), (0, 2)]
    assert not mix_sources([make_source("x", 2)], (1,)).multi_label


def test_relabel_maps_labels_by_class_name() -> None:
    relabeled = relabel(make_source("x", 4, ("dog", "cat")), ("ant", "cat", "dog"))
    assert relabeled.class_names == ("ant", "cat", "dog")
    assert [relabeled.examples[k]["labels"] for k in range(4)] == [(2,), (1,), (2,), (1,)]


def test_relabel_keeps_multiple_labels() -> None:
    examples = [Example(image=b"", labels=(1, 0), name="")]
    relabeled = relabel(Source("r", examples, ("dog", "cat"), True), ("ant", "cat", "dog"))
    assert relabeled.examples[0]["labels"] == (1, 2)
    assert relabeled.multi_label


def test_relabel_rejects_unknown_classes() -> None:
    with raises(UserError, "x", "2", "dog", "emu", "cat"):
        relabel(make_source("x", 4, ("dog", "emu")), ("cat", "dog"))


def test_class_names_are_compared_and_stored_in_one_unicode_form() -> None:
    nfc, nfd = ("caf\xe9", "eau"), ("cafe\u0301", "eau")
    assert make_source("x", 4, nfd).class_names == nfc
    mixed = mix_sources([make_source("x", 2, nfc), make_source("y", 2, nfd)], (1, 1))
    assert mixed.class_names == nfc
    assert [mixed.examples[k]["labels"] for k in range(4)] == [(0,), (1,), (0,), (1,)]
    # Checkpoints of other programs may store the other form.
    assert relabel(make_source("x", 4, nfc), ("eau", "cafe\u0301")).class_names == nfc[::-1]


def test_class_names_that_are_integers_are_sorted_by_value() -> None:
    assert sort_class_names(map(str, range(12, -1, -1))) == tuple(map(str, range(13)))
    assert sort_class_names(["10", "-1", "9"]) == ("-1", "9", "10")
    assert sort_class_names(["10", "9", "09"]) == ("09", "10", "9")
    assert sort_class_names(["10", "9", "cat"]) == ("10", "9", "cat")


def test_sources_derived_from_others_keep_their_notes() -> None:
    sources = [
        dataclasses.replace(make_source(name, 4), notes=notes)
        for name, notes in (("x", ("one", "two")), ("y", ("two", "three")))
    ]
    assert mix_sources(sources, (1, 1)).notes == ("one", "two", "three")
    assert relabel(sources[0], ("b", "a")).notes == ("one", "two")
    assert subset(sources[0], [0]).notes == ("one", "two")


class LabelsOnly(Examples):
    """Examples whose images must not be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError(index)

    def read_labels(self, index: int) -> tuple[int, ...]:
        return (index % 2,)


def test_labels_of_derived_sources_are_read_without_images() -> None:
    plain, source = make_source("x", 3), Source("y", LabelsOnly(), ("a", "b"))
    mixed = mix_sources([plain, relabel(source, ("b", "a", "c"))], (1.0, 1.0))
    selected = subset(mixed, [4, 0, 6, 3])
    classes = [selected.class_names[selected.read_labels(index)[0]] for index in range(4)]
    assert classes == ["b", "a", "b", "a"]


def test_subset_selects_examples_in_the_given_order() -> None:
    selected = subset(make_source("x", 5), [4, 0, 4])
    assert [selected.examples[k]["name"] for k in range(len(selected))] == ["x4", "x0", "x4"]
