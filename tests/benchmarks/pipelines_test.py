"""Tests of what the input benchmark times: the right work, the right images, the right clock."""

import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mixer_jax.benchmarks import pipelines
from mixer_jax.benchmarks.ours import Setting
from mixer_jax.benchmarks.pipelines import (
    AUGMENTING,
    AUGMENTING_ALONE,
    CROPPING,
    DECODING,
    OURS,
    Competitor,
    Measurement,
)

WHOLE, PART = "tf.data, decode and crop", "tf.data, decode the crop only"
SETTING = Setting(
    files=[b"first", b"second"],
    image_size=32,
    batch_size=4,
    threads=3,
    our_num_threads=3,
    our_processes=0,
    timed_images=20,
)
IMAGES = np.stack([np.full((2, 2, 3), value, np.uint8) for value in range(3)])


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "available_cpus", lambda: 4)


def competitor(task: str, name: str, cores: int, *rates: int) -> Competitor:
    """Returns one that has a rate each time that it is opened: first a nonsensical one."""
    remaining = iter([10**9, *rates])
    return Competitor(task, name, cores, lambda: iter([next(remaining)]))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Competitors of known rates in three rounds, and in a fourth one that warms up."""
    limits = [competitor(DECODING, "simplejpeg", 4, 800, 400, 100)]
    ours = [
        competitor(CROPPING, OURS, 4, 100, 200, 800),
        competitor(AUGMENTING, OURS, 4, 50, 50, 50),
        competitor(AUGMENTING_ALONE, OURS, 1, 500, 500, 500),
    ]
    peers = [
        competitor(CROPPING, WHOLE, 4, 50, 100, 400),
        competitor(AUGMENTING, WHOLE, 2, 100, 25, 100),
        competitor(CROPPING, PART, 4, 400, 25, 100),
        competitor(AUGMENTING_ALONE, "tf.data", 1, 250, 250, 125),
    ]
    monkeypatch.setattr(pipelines, "_cropped", lambda setting: IMAGES)
    monkeypatch.setattr(pipelines, "_limits", lambda setting: list(limits))
    monkeypatch.setattr(pipelines, "_ours", lambda setting, images: list(ours))
    monkeypatch.setattr(pipelines, "_peers", lambda setting, images, tf_data: list(peers))
    monkeypatch.setattr(pipelines, "_rate", lambda stream, setting: next(stream))


@pytest.mark.usefixtures("rates")
def test_measure() -> None:
    assert pipelines.measure(SETTING, 3, types.ModuleType("tf_data")) == [
        # Of our decoding, crop and flip, not of our RandAugment: 1/8, 1/2 and 8.
        Measurement(DECODING, "simplejpeg", 400.0, 100.0, 10.0, 0.5),
        Measurement(CROPPING, OURS, 200.0, 50.0, 20.0, 1.0),
        Measurement(CROPPING, WHOLE, 100.0, 25.0, 40.0, 2.0),
        # Of the same round, 1/4, 8 and 8; the ratio of the medians would be 2.
        Measurement(CROPPING, PART, 100.0, 25.0, 40.0, 8.0),
        Measurement(AUGMENTING, OURS, 50.0, 12.5, 80.0, 1.0),
        Measurement(AUGMENTING, WHOLE, 100.0, 50.0, 20.0, 0.5),
        Measurement(AUGMENTING_ALONE, OURS, 500.0, 500.0, 2.0, 1.0),
        Measurement(AUGMENTING_ALONE, "tf.data", 250.0, 250.0, 4.0, 2.0),
    ]


@pytest.mark.usefixtures("rates")
def test_measure_without_peers() -> None:
    measurements = pipelines.measure(SETTING, 3, None)
    assert [(m.task, m.name, m.ratio) for m in measurements] == [
        (DECODING, "simplejpeg", 0.5),
        (CROPPING, OURS, 1.0),
        (AUGMENTING, OURS, 1.0),
        (AUGMENTING_ALONE, OURS, 1.0),
    ]


# A batch at a time, and pieces that divide neither the warming up nor the timed images.
@pytest.mark.parametrize("arriving", [4, 3])
def test_rate_is_of_the_midst(monkeypatch: pytest.MonkeyPatch, arriving: int) -> None:
    now = 0.0
    warm = math.ceil(2 * SETTING.margin * SETTING.batch_size / arriving)
    timed = math.ceil(SETTING.timed_images / arriving)

    def stream() -> Iterator[int]:
        nonlocal now
        for index in range(SETTING.num_batches * SETTING.batch_size // arriving):
            now += 0.5 if warm <= index < warm + timed else 64.0
            yield arriving

    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(pipelines, "time", clock)
    arrivals = stream()
    assert pipelines._rate(arrivals, SETTING) == arriving / 0.5
    assert next(arrivals, None) is None
    # What came after was there, and was not timed.
    assert now > 64.0 * warm + 0.5 * timed


@pytest.mark.usefixtures("four_cores")
def test_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Any, ...]] = []

    def our_batches(setting: Setting, num_batches: int, *, randaugment: bool) -> Iterator[None]:
        opened.append((setting, num_batches, randaugment))
        return iter([None] * num_batches)

    def rand_augment(image: np.ndarray, rng: Any, *, num_layers: int, magnitude: float) -> None:
        opened.append((int(image[0, 0, 0]), num_layers, magnitude))

    monkeypatch.setattr(pipelines, "our_batches", our_batches)
    monkeypatch.setattr(pipelines, "rand_augment", rand_augment)
    batches = SETTING.num_batches
    expected: dict[str, tuple[int, list[tuple[Any, ...]]]] = {
        CROPPING: (3, [(SETTING, batches, False)]),
        AUGMENTING: (3, [(SETTING, batches, True)]),
        # The paper's two layers of magnitude 15, of the images over and over.
        AUGMENTING_ALONE: (1, [(index % 3, 2, 15.0) for index in range(4 * batches)]),
    }
    competitors = pipelines._ours(SETTING, IMAGES)
    assert [c.task for c in competitors] == list(expected)
    for task, name, cores, open_stream in competitors:
        opened.clear()
        assert list(open_stream()) == [4] * batches
        assert name == OURS
        assert (cores, opened) == expected[task]


@pytest.mark.usefixtures("four_cores")
def test_peers_tasks() -> None:
    opened: list[tuple[Any, dict[str, Any]]] = []

    def recorder(function: str) -> Callable[..., Iterator[None]]:
        def dataset(data: Any, **settings: Any) -> Iterator[None]:
            opened.append((data, {"function": function, **settings}))
            yield from [None] * settings["num_batches"]

        return dataset

    tf_data = types.ModuleType("tf_data")
    for function in ("training_batches", "augmented_batches"):
        setattr(tf_data, function, recorder(function))
    size = {"num_batches": SETTING.num_batches, "batch_size": 4}
    training = {"function": "training_batches", "image_size": 32, "min_area": 0.05, **size}
    alone = {"function": "augmented_batches", "threads": 1, **size}
    off = {"randaugment_layers": 0, "randaugment_magnitude": 0.0}
    # The paper's.
    on = {"randaugment_layers": 2, "randaugment_magnitude": 15.0}
    expected: list[tuple[str, int, dict[str, Any]]] = [
        (CROPPING, 3, {**training, "threads": 3, "decode_whole": True, **off}),
        (CROPPING, 3, {**training, "threads": 3, "decode_whole": False, **off}),
        (AUGMENTING, 3, {**training, "threads": 3, "decode_whole": True, **on}),
        (AUGMENTING, 3, {**training, "threads": 3, "decode_whole": False, **on}),
        (AUGMENTING_ALONE, 1, {**alone, **on}),
    ]
    competitors = pipelines._peers(SETTING, IMAGES, tf_data)
    assert all(competitor.name.startswith("tf.data") for competitor in competitors)
    assert len({competitor[:2] for competitor in competitors}) == len(expected)
    for competitor, wanted in zip(competitors, expected, strict=True):
        task, _, cores, open_stream = competitor
        opened.clear()
        assert list(open_stream()) == [4] * SETTING.num_batches
        ((data, settings),) = opened
        assert data is (IMAGES if task == AUGMENTING_ALONE else SETTING.files)
        assert (task, cores, settings) == wanted


@pytest.mark.usefixtures("four_cores")
def test_no_more_cores_than_there_are() -> None:
    tf_data = types.ModuleType("tf_data")
    vars(tf_data).update(
        training_batches=lambda *_, **__: (), augmented_batches=lambda *_, **__: ()
    )
    many = SETTING._replace(threads=9)
    competitors = (
        pipelines._limits(many)
        + pipelines._ours(many, IMAGES)
        + pipelines._peers(many, IMAGES, tf_data)
    )
    for task, _, cores, _ in competitors:
        assert cores == (1 if task == AUGMENTING_ALONE else 4)
