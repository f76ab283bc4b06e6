"""Tests of the pipelines that read every format."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.benchmarks import formats
from mixer_jax.benchmarks.formats import LabeledImage, measure_formats
from mixer_jax.benchmarks.pipelines import PipelineConfig, sample_jpegs

FILES = sample_jpegs(12)
CONFIG = PipelineConfig(
    files=FILES,
    image_size=16,
    batch_size=4,
    num_threads=2,
    our_num_threads=2,
    our_num_workers=1,
    images_per_round=8,
)
IMAGES = [LabeledImage(file, f"class {index % 2}") for index, file in enumerate(FILES)]


@pytest.fixture
def streams(tmp_path: Path) -> dict[str, Any]:
    """Streams of the libraries."""
    formats.write_shards({"train": IMAGES}, tmp_path / "wds", 4)
    formats.write_hugging_face({"train": IMAGES}, tmp_path / "arrow", tmp_path / "parquet", 4)
    named = {"webdataset": formats._webdataset_streams, "datasets": formats._datasets_streams}
    return {
        f"{library} {stream.name}": stream
        for library, make_streams in named.items()
        for stream in make_streams(tmp_path)
    }


# webdataset leaves a shard open when its stream is not read to the end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_libraries_read_all_images_shuffled_and_without_an_end(streams: dict[str, Any]) -> None:
    assert len(streams) == 3
    for stream in streams.values():
        # webdataset samples shards, and shuffles in a buffer.
        read = [stream.read(sample) for sample in itertools.islice(stream.open(), 200)]
        assert len(read) == 200
        assert set(read) == set(FILES)
        assert read[:12] != FILES


def test_baselines_decode_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    cropped: Counter[bytes] = Counter()

    def crop_image(file: bytes, rng: Any, image_size: int) -> Any:
        cropped[file] += 1
        return original(file, rng, image_size)

    original = formats.crop_image
    monkeypatch.setattr(formats, "crop_image", crop_image)
    samples = itertools.cycle(FILES)
    arrivals = list(formats._load_batches(CONFIG, lambda: samples, lambda sample: sample))
    assert arrivals == [4] * CONFIG.num_batches
    assert cropped.total() == 4 * CONFIG.num_batches


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_format_is_measured(tmp_path: Path) -> None:
    measurements = measure_formats(CONFIG, tmp_path, 1, baselines=True)
    relative = {measurement.name: measurement.relative_time for measurement in measurements}
    assert list(relative) == [
        "folder",
        "array_record",
        "manifest",
        "wds",
        "hf, Arrow",
        "hf, Parquet",
        "library webdataset, iterated",
        "library datasets, iterated",
        "library datasets, by index",
    ]
    assert relative["folder"] == 1
    assert all(ratio > 0 for ratio in relative.values())
