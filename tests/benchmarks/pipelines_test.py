"""Tests of input pipelines: their work, their images, the clock and the JPEG files."""

import io
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixer_jax.benchmarks import pipelines
from mixer_jax.benchmarks.pipelines import (
    AUGMENT,
    CROP,
    DECODE,
    OURS,
    RANDAUGMENT,
    Measurement,
    Pipeline,
    PipelineConfig,
    read_jpegs,
    sample_jpegs,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import raises

DECODE_WHOLE, DECODE_CROP = "tf.data, decode and crop", "tf.data, decode the crop only"
CONFIG = PipelineConfig(
    files=[b"first", b"second"],
    image_size=32,
    batch_size=4,
    num_threads=3,
    our_num_threads=3,
    our_num_workers=0,
    images_per_round=20,
)
IMAGES = np.stack([np.full((2, 2, 3), value, np.uint8) for value in range(3)])


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "available_cpus", lambda: 4)


def pipeline_of_rates(task: str, name: str, num_cores: int, *rates: int) -> Pipeline:
    """Makes a pipeline whose stream yields its rate of the round; the warmup has another one."""
    remaining = iter([10**9, *rates])
    return Pipeline(task, name, num_cores, lambda: iter([next(remaining)]))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces all pipelines by those of known rates in three rounds."""
    decoders = [pipeline_of_rates(DECODE, "simplejpeg", 4, 800, 400, 100)]
    ours = [
        pipeline_of_rates(CROP, OURS, 4, 100, 200, 800),
        pipeline_of_rates(AUGMENT, OURS, 4, 50, 50, 50),
        pipeline_of_rates(RANDAUGMENT, OURS, 1, 500, 500, 500),
    ]
    tf_data = [
        pipeline_of_rates(CROP, DECODE_WHOLE, 4, 50, 100, 400),
        pipeline_of_rates(AUGMENT, DECODE_WHOLE, 2, 100, 25, 100),
        pipeline_of_rates(CROP, DECODE_CROP, 4, 400, 25, 100),
        pipeline_of_rates(RANDAUGMENT, "tf.data", 1, 250, 250, 125),
    ]
    monkeypatch.setattr(pipelines, "_cropped_images", lambda config: IMAGES)
    monkeypatch.setattr(pipelines, "_decoders", lambda config: list(decoders))
    monkeypatch.setattr(pipelines, "_our_pipelines", lambda config, images: list(ours))
    monkeypatch.setattr(pipelines, "_tf_data_pipelines", lambda *args: list(tf_data))
    monkeypatch.setattr(pipelines, "_measure_rate", lambda stream, config: next(stream))


@pytest.mark.usefixtures("rates")
def test_measure_pipelines() -> None:
    assert pipelines.measure_pipelines(CONFIG, 3, types.ModuleType("tf_data")) == [
        # Relative to decoding, crop and flip, not to RandAugment: 1/8, 1/2 and 8.
        Measurement(DECODE, "simplejpeg", 400.0, 100.0, 10.0, 0.5),
        Measurement(CROP, OURS, 200.0, 50.0, 20.0, 1.0),
        Measurement(CROP, DECODE_WHOLE, 100.0, 25.0, 40.0, 2.0),
        # In the same round, 1/4, 8 and 8; the ratio of the medians would be 2.
        Measurement(CROP, DECODE_CROP, 100.0, 25.0, 40.0, 8.0),
        Measurement(AUGMENT, OURS, 50.0, 12.5, 80.0, 1.0),
        Measurement(AUGMENT, DECODE_WHOLE, 100.0, 50.0, 20.0, 0.5),
        Measurement(RANDAUGMENT, OURS, 500.0, 500.0, 2.0, 1.0),
        Measurement(RANDAUGMENT, "tf.data", 250.0, 250.0, 4.0, 2.0),
    ]


@pytest.mark.usefixtures("rates")
def test_measure_pipelines_without_tf_data() -> None:
    measurements = pipelines.measure_pipelines(CONFIG, 3, None)
    assert [(m.task, m.name, m.relative_time) for m in measurements] == [
        (DECODE, "simplejpeg", 0.5),
        (CROP, OURS, 1.0),
        (AUGMENT, OURS, 1.0),
        (RANDAUGMENT, OURS, 1.0),
    ]


# Whole batches, and chunks that divide neither the warmup nor the timed images.
@pytest.mark.parametrize("chunk_size", [4, 3])
def test_measure_rate_times_the_middle(monkeypatch: pytest.MonkeyPatch, chunk_size: int) -> None:
    now = 0.0
    num_warmup = math.ceil(2 * CONFIG.margin * CONFIG.batch_size / chunk_size)
    num_timed = math.ceil(CONFIG.images_per_round / chunk_size)

    def stream() -> Iterator[int]:
        nonlocal now
        for index in range(CONFIG.num_batches * CONFIG.batch_size // chunk_size):
            now += 0.5 if num_warmup <= index < num_warmup + num_timed else 64.0
            yield chunk_size

    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(pipelines, "time", clock)
    arrivals = stream()
    assert pipelines._measure_rate(arrivals, CONFIG) == chunk_size / 0.5
    assert next(arrivals, None) is None
    # The stream has an end that is not timed.
    assert now > 64.0 * num_warmup + 0.5 * num_timed


@pytest.mark.usefixtures("four_cores")
def test_our_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def our_batches(
        config: PipelineConfig, num_batches: int, *, randaugment: bool
    ) -> Iterator[None]:
        calls.append((config, num_batches, randaugment))
        return iter([None] * num_batches)

    def rand_augment(image: np.ndarray, rng: Any, *, num_layers: int, magnitude: float) -> None:
        calls.append((int(image[0, 0, 0]), num_layers, magnitude))

    monkeypatch.setattr(pipelines, "our_batches", our_batches)
    monkeypatch.setattr(pipelines, "rand_augment", rand_augment)
    num_batches = CONFIG.num_batches
    expected: dict[str, tuple[int, list[tuple[Any, ...]]]] = {
        CROP: (3, [(CONFIG, num_batches, False)]),
        AUGMENT: (3, [(CONFIG, num_batches, True)]),
        # The paper's two layers of magnitude 15, on repeated images.
        RANDAUGMENT: (1, [(index % 3, 2, 15.0) for index in range(4 * num_batches)]),
    }
    candidates = pipelines._our_pipelines(CONFIG, IMAGES)
    assert [candidate.task for candidate in candidates] == list(expected)
    for task, name, num_cores, open_stream in candidates:
        calls.clear()
        assert list(open_stream()) == [4] * num_batches
        assert name == OURS
        assert (num_cores, calls) == expected[task]


@pytest.mark.usefixtures("four_cores")
def test_tf_data_pipelines() -> None:
    calls: list[tuple[Any, dict[str, Any]]] = []

    def record(function: str) -> Callable[..., Iterator[None]]:
        def dataset(data: Any, **kwargs: Any) -> Iterator[None]:
            calls.append((data, {"function": function, **kwargs}))
            yield from [None] * kwargs["num_batches"]

        return dataset

    tf_data = types.ModuleType("tf_data")
    for function in ("train_batches", "augmented_batches"):
        setattr(tf_data, function, record(function))
    size = {"num_batches": CONFIG.num_batches, "batch_size": 4}
    train = {"function": "train_batches", "image_size": 32, "min_area": 0.05, **size}
    augmented = {"function": "augmented_batches", "num_threads": 1, **size}
    off = {"randaugment_layers": 0, "randaugment_magnitude": 0.0}
    # The paper's.
    on = {"randaugment_layers": 2, "randaugment_magnitude": 15.0}
    expected: list[tuple[str, int, dict[str, Any]]] = [
        (CROP, 3, {**train, "num_threads": 3, "decode_full_image": True, **off}),
        (CROP, 3, {**train, "num_threads": 3, "decode_full_image": False, **off}),
        (AUGMENT, 3, {**train, "num_threads": 3, "decode_full_image": True, **on}),
        (AUGMENT, 3, {**train, "num_threads": 3, "decode_full_image": False, **on}),
        (RANDAUGMENT, 1, {**augmented, **on}),
    ]
    candidates = pipelines._tf_data_pipelines(CONFIG, IMAGES, tf_data)
    assert all(candidate.name.startswith("tf.data") for candidate in candidates)
    assert len({candidate[:2] for candidate in candidates}) == len(expected)
    for candidate, expected_call in zip(candidates, expected, strict=True):
        calls.clear()
        assert list(candidate.open()) == [4] * CONFIG.num_batches
        ((data, kwargs),) = calls
        assert data is (IMAGES if candidate.task == RANDAUGMENT else CONFIG.files)
        assert (candidate.task, candidate.num_cores, kwargs) == expected_call


@pytest.mark.usefixtures("four_cores")
def test_pipelines_use_no_more_cores_than_available() -> None:
    tf_data = types.ModuleType("tf_data")
    vars(tf_data).update(train_batches=lambda *_, **__: (), augmented_batches=lambda *_, **__: ())
    config = CONFIG._replace(num_threads=9)
    candidates = [
        *pipelines._decoders(config),
        *pipelines._our_pipelines(config, IMAGES),
        *pipelines._tf_data_pipelines(config, IMAGES, tf_data),
    ]
    for candidate in candidates:
        assert candidate.num_cores == (1 if candidate.task == RANDAUGMENT else 4)


def test_sample_jpegs_have_the_size_of_imagenet() -> None:
    files = sample_jpegs(12)
    assert len(set(files)) == 12
    assert files[:2] == sample_jpegs(2)
    for file in files:
        assert 92_000 < len(file) < 115_000
        assert Image.open(io.BytesIO(file)).size == (500, 375)


def test_read_jpegs_reads_subfolders_by_name(tmp_path: Path) -> None:
    files = sample_jpegs(2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.JPEG").write_bytes(files[1])
    (tmp_path / "a.jpg").write_bytes(files[0])
    (tmp_path / "list.txt").write_text("two images")
    assert read_jpegs(str(tmp_path)) == files


def test_read_jpegs_names_a_file_of_another_format(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(tmp_path / "wrong.jpg", format="PNG")
    with raises(UserError, str(tmp_path / "wrong.jpg"), "JPEG"):
        read_jpegs(str(tmp_path))
