"""Tests of mixtures: shares, whole epochs of every part, classes joined by their names."""

from collections import Counter

import pytest

from mixer_jax.data.mixture import mix_sources, relabel
from mixer_jax.data.readers import shuffled_indices
from mixer_jax.data.source import Example, Source
from mixer_jax.errors import UserError
from tests.helpers.messages import raises


def source(name: str, count: int, class_names: tuple[str, ...] = ("a", "b")) -> Source:
    examples = [
        Example(image=b"", labels=(k % len(class_names),), name=f"{name}{k}") for k in range(count)
    ]
    return Source(name, examples, class_names)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, 99.0)])
def test_shares_follow_the_weights_from_any_place(weights: tuple[float, float]) -> None:
    mixed = mix_sources([source("x", 500), source("y", 1000)], weights)
    order = shuffled_indices(mixed, 0)
    for start in (0, 10**12):
        share = sum(order[start + k] < 500 for k in range(2_000)) / 2_000
        assert share == pytest.approx(weights[0] / sum(weights), abs=2e-3)


def test_every_part_is_seen_whole_before_it_comes_again() -> None:
    mixed = mix_sources([source("x", 100), source("y", 70)], (0.75, 0.25))
    order = shuffled_indices(mixed, 3)
    seen = [order[k] for k in range(600)]
    for part, epochs in ((range(100), 4), (range(100, 170), 2)):
        own = [index for index in seen if index in part]
        turns = [own[k : k + len(part)] for k in range(0, epochs * len(part), len(part))]
        assert all(sorted(turn) == list(part) for turn in turns)
        assert len({tuple(turn) for turn in turns}) == epochs


def test_the_parts_are_shuffled_apart() -> None:
    mixed = mix_sources([source("x", 100), source("y", 100)], (1.0, 1.0))
    order = shuffled_indices(mixed, 0)
    seen = [order[k] for k in range(200)]
    assert [k for k in seen if k < 100] != [k - 100 for k in seen if k >= 100]


def test_classes_of_one_name_are_one() -> None:
    mixed = mix_sources(
        [source("x", 4, ("cat", "dog")), source("y", 3, ("bird", "cat", "emu"))], (1, 2)
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


def test_three_parts_and_one() -> None:
    three = mix_sources([source(name, 500) for name in "xyz"], (1, 2, 1))
    order = shuffled_indices(three, 0)
    counts = Counter(order[k] // 500 for k in range(400))
    assert counts == {0: 100, 1: 200, 2: 100}
    alone = mix_sources([source("x", 500)], (0.1,))
    assert [shuffled_indices(alone, 0)[k] for k in range(20)] == [
        shuffled_indices(source("x", 500), 0)[k] for k in range(20)
    ]


def test_relabelling_for_a_model_that_knows_more() -> None:
    some = relabel(source("x", 4, ("dog", "cat")), ("ant", "cat", "dog"))
    assert some.class_names == ("ant", "cat", "dog")
    assert [some.examples[k]["labels"] for k in range(4)] == [(2,), (1,), (2,), (1,)]
    real = Source("r", [Example(image=b"", labels=(1, 0), name="")], ("dog", "cat"), True)
    relabelled = relabel(real, ("ant", "cat", "dog"))
    assert relabelled.examples[0]["labels"] == (1, 2)
    assert relabelled.multi_label
    with raises(UserError, "x", "2", "dog", "emu", "cat"):
        relabel(source("x", 4, ("dog", "emu")), ("cat", "dog"))
