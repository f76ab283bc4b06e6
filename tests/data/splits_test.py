"""Tests of splits that all formats but TFDS share."""

from collections import Counter

import numpy as np
import pytest

from mixer_jax.data.source import NO_LABEL, LabelArrays
from mixer_jax.data.splits import (
    SplitSlice,
    hash_order,
    hold_out,
    parse_split,
    select_rows,
    standard_split,
    standardize_splits,
    substitution_notes,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


def test_common_spellings_have_a_standard_name() -> None:
    for split, names in {
        "train": ["Training", "train-set"],
        "validation": ["val", "VALID", "dev", "Validation Set"],
        "test": ["testing", "TestSet"],
        None: ["holdout", "unlabeled", "trains", ""],
    }.items():
        assert {standard_split(name) for name in names} == {split}


def test_splits_of_the_data_have_standard_names_in_a_standard_order() -> None:
    found = standardize_splits(["extra", "Val", "training"], "data 'x'")
    assert list(found.items()) == [("train", "training"), ("validation", "Val"), ("extra", "extra")]
    with raises(UserError, "data 'x'", "val", "dev", "validation"):
        standardize_splits(["train", "val", "dev"], "data 'x'")


def test_specs_are_resolved_with_the_names_of_the_data() -> None:
    sizes = {"train": 200, "validation": 10, "extra": 7}
    for spec, expected in {
        "Training[:99%]": [("train", 0, 198)],
        "test": [("validation", 0, 10)],
        "extra+val[5:]": [("extra", 0, 7), ("validation", 5, 10)],
        "train[10:20]+train[-5:]": [("train", 10, 20), ("train", 195, 200)],
    }.items():
        assert parse_split(spec, sizes, "x") == [SplitSlice(*part) for part in expected]
    for spec in ("holdout", "", "train[", "train[:200%]", "train[:201]"):
        with raises(UserError, "data 'x'", repr(spec), "train, validation, extra"):
            parse_split(spec, sizes, "data 'x'")
    with raises(UserError, "'trian'", "mean train"):
        parse_split("trian", sizes, "data 'x'")


def test_a_split_that_stands_for_another_one_is_noted() -> None:
    (note,) = substitution_notes("test[:5]", ["train", "validation"], "/data")
    assert mentions(note, "/data", "validation", "'test[:5]'")
    assert not substitution_notes("val", ["train", "validation"], "/data")
    assert not substitution_notes("test", ["train", "validation", "test"], "/data")
    assert not substitution_notes("train", ["train"], "/data")


def test_the_order_is_a_permutation_that_ignores_the_unicode_form() -> None:
    paths = [f"caf\xe9/{number}" for number in range(100)]
    order = hash_order(paths)
    assert sorted(order.tolist()) == list(range(100)) != order.tolist()
    decomposed = [path.replace("\xe9", "e\u0301") for path in paths]
    assert (hash_order(decomposed) == order).all()
    assert hash_order(["\udcfc"]).tolist() == [0]
    assert hash_order([]).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_every_class_is_held_out(seed: int) -> None:
    labels = np.repeat(np.arange(6), [100, 34, 5, 2, 1, 15])
    np.random.default_rng(seed).shuffle(labels)
    # One class is that of examples without a label.
    rows = np.arange(len(labels))
    train, validation = hold_out(rows, LabelArrays(labels + NO_LABEL)).values()
    assert sorted([*train, *validation]) == rows.tolist()
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    # Half of 1.5 is rounded to the even number.
    assert Counter(labels[validation].tolist()) == {0: 10, 1: 3, 2: 1, 3: 1, 5: 2}
    # The first examples of a class, in the order of the hash.
    for label in range(6):
        held_out, rest = (part[labels[part] == label] for part in (validation, train))
        assert not len(held_out) or not len(rest) or held_out.max() < rest.min()
    # Rows keep their order.
    parts = hold_out(rows[::-1], LabelArrays(labels)).values()
    assert all((np.diff(part) < 0).all() for part in parts)
    no_rows = np.zeros(0, np.int64)
    assert [len(part) for part in hold_out(no_rows, LabelArrays(no_rows)).values()] == [0, 0]


def test_a_tenth_of_multi_label_examples_is_held_out() -> None:
    labels = LabelArrays(np.arange(60) % 7, np.arange(0, 120, 3)[:40] // 2)
    train, validation = hold_out(np.arange(40), labels).values()
    assert [validation.tolist(), len(train)] == [[0, 1, 2, 3], 36]


def test_rows_of_a_split_are_selected() -> None:
    rows_of = {"train": np.array([3, 1, 2]), "validation": np.array([0])}
    rows, used = select_rows("train[1:]+val", rows_of, "folder '/data'")
    assert (rows.tolist(), used) == ([1, 2, 0], {"train", "validation"})
    with raises(UserError, "'train[:0]'", "/data"):
        select_rows("train[:0]", rows_of, "folder '/data'")
