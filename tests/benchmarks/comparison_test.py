"""Tests of what is made of times and rates: batch sizes, orders, ratios, pictures."""

import argparse
import itertools

import pytest

from mixer_jax.benchmarks.batch_size import Tried, search
from mixer_jax.benchmarks.contestants import ours
from mixer_jax.benchmarks.model_keys import add_model_keys, read_model_keys
from mixer_jax.benchmarks.picture import draw
from mixer_jax.benchmarks.rounds import order, order_apart, ratio, utilisation
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


def test_the_batch_grows_while_it_pays() -> None:
    rates = {8: 100.0, 16: 150.0, 32: 160.0, 64: 163.0, 128: 200.0}
    size, tried = search(rates.__getitem__, 8)
    assert size == 32
    assert tried == [Tried(8, 100.0), Tried(16, 150.0), Tried(32, 160.0), Tried(64, 163.0)]


def test_the_batch_ends_where_memory_does() -> None:
    fits = {64: 100.0, 128: 200.0, 256: 300.0, 512: None}
    size, tried = search(fits.__getitem__, 64)
    assert size == 256
    assert tried[-1] == Tried(512, None)


def test_a_start_that_does_not_fit_is_halved() -> None:
    size, tried = search(lambda size: 10.0 if size <= 16 else None, 64)
    assert size == 16
    # What has not fitted is not tried again.
    assert [trial.batch_size for trial in tried] == [64, 32, 16]
    assert search(lambda size: None, 4) == (0, [Tried(4, None), Tried(2, None), Tried(1, None)])


def test_everyone_has_every_place() -> None:
    orders = [order("abc", number) for number in range(3)]
    assert orders[0] == ["a", "b", "c"]
    for place in range(3):
        assert {names[place] for names in orders} == set("abc")


def test_groups_apart_meet_once_a_round() -> None:
    rounds = (order_apart("ab", "yz", number) for number in range(4))
    groups = ["ab" if name in "ab" else "yz" for name in itertools.chain(*rounds)]
    assert sum(one != next_one for one, next_one in itertools.pairwise(groups)) == 4
    assert order_apart("ab", "", 1) == ["b", "a"]


def test_ratios_are_of_the_same_round() -> None:
    # The machine becomes ten times slower; medians of times alone would say 10.
    assert ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2
    assert ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == 2
    # 30 FLOPs in 3 s, beside 20 FLOP/s; later all at half the speed.
    assert utilisation(30, [3.0, 6.0], [20.0, 10.0]) == 0.5


def test_a_picture_has_who_failed_too() -> None:
    row = {"name": "mixer_jax", "failed": "", "images_per_second": 100.0, "utilisation": 0.5}
    failed = {"name": "timm", "failed": "out of memory", "images_per_second": None}
    setting = {"variant": "B/16", "image_size": 224, "batch_size": 8, "dtype": "float32"}
    mode = {"mode": "train", **setting, "contestants": [row, failed]}
    report = {"device": "cpu", "jax": "0", "modes": [mode, mode | {"mode": "infer"}]}
    assert draw(report).startswith(b"\x89PNG")


def test_every_combination_of_settings_has_a_name() -> None:
    made = ours([1, 0], ["none", "dots"], {"gelu": ["exact"]})
    names = [contestant.name for contestant in made]
    assert len(set(names)) == 4
    settings = itertools.product(["1", "all"], ["none", "dots"])
    for name, (unroll, remat) in zip(names, settings, strict=True):
        assert mentions(name, "mixer_jax", "unroll", unroll, "remat", remat)
    assert {contestant.others for contestant in made} == {(("gelu", "exact"),)}
    assert [contestant.name for contestant in ours([0], ["none"], {})] == ["mixer_jax"]


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--model.gelu=exact,soft", ["--model.gelu", "soft", "tanh", "exact"]),
        ("--model.gelu=tanh,tanh", ["--model.gelu", "tanh,tanh"]),
        ("--model.dropout=2", ["--model.dropout", "2"]),
        ("--model.dropout=much", ["--model.dropout", "much"]),
    ],
)
def test_values_of_keys_are_checked(argument: str, parts: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_model_keys(parser)
    assert read_model_keys(parser.parse_args([])) == {}
    with raises(UserError, *parts):
        read_model_keys(parser.parse_args([argument]))
