"""Input pipelines that read the same JPEG files from datasets of every format.

mixer_jax reads each dataset as in training. The baselines are the libraries `webdataset` and
`datasets`: they read and shuffle in their own way, and images are decoded, cropped and flipped by
mixer_jax's function, in as many threads.
"""

import contextlib
import csv
import functools
import io
import itertools
import math
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mixer_jax.benchmarks.pipelines import (
    CROP,
    Measurement,
    Pipeline,
    PipelineConfig,
    RepeatedExamples,
    crop_image,
    measure_rates,
    our_batches,
)
from mixer_jax.data.conversion import convert_dataset
from mixer_jax.data.loader import CHUNK_SIZE
from mixer_jax.data.names import FOLDER, HUGGING_FACE, MANIFEST, WEB_DATASET
from mixer_jax.data.preparation import map_in_order
from mixer_jax.data.registry import open_dataset

# Name of the format that the others are relative to.
REFERENCE = "folder"
_DATASET_NAME = "benchmark_images"
# Images from which webdataset draws the next one; a common value.
_SHUFFLE_BUFFER = 1000


class LabeledImage(NamedTuple):
    """JPEG file and the name of its class."""

    image: bytes
    class_name: str


class DatasetLocation(NamedTuple):
    """Name of a dataset in a config, and the directory for TFDS datasets."""

    name: str
    data_dir: str = ""


def write_datasets(
    splits: Mapping[str, Sequence[LabeledImage]], folder: Path, shard_size: int = 128
) -> dict[str, DatasetLocation]:
    """Writes the same images in every format that mixer_jax reads.

    Formats of the library `datasets` are left out, with a line on standard error, if it is not
    installed.

    Args:
        splits: Images of each split, which must be "train" and "validation".
        folder: Folder to write to.
        shard_size: Images per shard of WebDataset, and per file of Parquet.

    Returns:
        The dataset of each format.
    """
    write_folder(splits, folder / "folder")
    convert_dataset(f"{FOLDER}{folder}/folder", _DATASET_NAME, str(folder / "array_record"))
    write_manifest(folder / "folder", folder / "manifest.csv")
    write_shards(splits, folder / "wds", shard_size)
    datasets = {
        REFERENCE: DatasetLocation(f"{FOLDER}{folder}/folder"),
        "array_record": DatasetLocation(_DATASET_NAME, str(folder / "array_record")),
        "manifest": DatasetLocation(f"{MANIFEST}{folder}/manifest.csv"),
        "wds": DatasetLocation(f"{WEB_DATASET}{folder}/wds"),
    }
    try:
        write_hugging_face(splits, folder / "arrow", folder / "parquet", shard_size)
    except ModuleNotFoundError as error:
        _print_missing(error, "datasets")
    else:
        datasets["hf, Arrow"] = DatasetLocation(f"{HUGGING_FACE}{folder}/arrow")
        datasets["hf, Parquet"] = DatasetLocation(f"{HUGGING_FACE}{folder}/parquet")
    return datasets


def write_folder(splits: Mapping[str, Sequence[LabeledImage]], folder: Path) -> None:
    """Writes an image folder."""
    for split, images in splits.items():
        for index, (image, class_name) in enumerate(images):
            path = folder / split / class_name / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)


def write_manifest(folder: Path, manifest: Path) -> None:
    """Lists the images of a folder in a CSV file next to it."""
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in sorted(folder.rglob("*.jpg")):
            split, class_name, _ = path.relative_to(folder).parts
            writer.writerow([path.relative_to(manifest.parent).as_posix(), class_name, split])


def write_shards(
    splits: Mapping[str, Sequence[LabeledImage]], folder: Path, shard_size: int
) -> None:
    """Writes WebDataset shards of `shard_size` images."""
    folder.mkdir()
    for split, images in splits.items():
        for number, start in enumerate(range(0, len(images), shard_size)):
            with tarfile.open(folder / f"{split}-{number:04d}.tar", "w") as shard:
                for index, (image, class_name) in enumerate(
                    images[start : start + shard_size], start
                ):
                    key = f"{split}{index:06d}"
                    _add_member(shard, f"{key}.jpg", image)
                    _add_member(shard, f"{key}.cls", class_name.encode())


def _add_member(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_hugging_face(
    splits: Mapping[str, Sequence[LabeledImage]], arrow: Path, parquet: Path, shard_size: int
) -> None:
    """Writes a dataset of the library `datasets` as Arrow, and as Parquet of `shard_size` images.

    Raises:
        ModuleNotFoundError: The library is not installed.
    """
    import datasets

    datasets.disable_progress_bars()
    names = sorted({image.class_name for images in splits.values() for image in images})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    parts = {
        split: datasets.Dataset.from_dict(
            {
                "image": [{"bytes": image.image, "path": None} for image in images],
                "label": [image.class_name for image in images],
            },
            features=features,
        )
        for split, images in splits.items()
    }
    parquet.mkdir()
    for split, part in parts.items():
        num_shards = math.ceil(len(part) / shard_size)
        for index in range(num_shards):
            shard = part.shard(num_shards, index, contiguous=True)
            shard.to_parquet(parquet / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")
    datasets.DatasetDict(parts).save_to_disk(arrow)


def measure_formats(
    config: PipelineConfig, folder: Path, num_rounds: int, *, baselines: bool
) -> list[Measurement]:
    """Measures training pipelines that read each format, one after the other in every round.

    Args:
        config: Settings of all pipelines; the files are written to `folder` in every format.
        folder: Empty folder.
        num_rounds: Timed rounds, after one of warmup.
        baselines: Whether to measure the libraries `webdataset` and `datasets`.
    """
    cv2.setNumThreads(0)
    with contextlib.suppress(ModuleNotFoundError):
        import datasets

        # It converts Parquet to Arrow there.
        datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    images = [LabeledImage(file, f"class {i % 10}") for i, file in enumerate(config.files)]
    locations = write_datasets({"train": images, "validation": images[:10]}, folder)
    pipelines = [_our_pipeline(name, location, config) for name, location in locations.items()]
    if baselines:
        pipelines += _baseline_pipelines(config, folder)
    # The ratios to the folder are taken in the same round.
    rates = measure_rates(pipelines, config, num_rounds)
    reference = rates[[pipeline.name for pipeline in pipelines].index(REFERENCE)]
    return [
        Measurement.from_rates(pipeline, by_round, reference)
        for pipeline, by_round in zip(pipelines, rates, strict=True)
    ]


def _our_pipeline(name: str, location: DatasetLocation, config: PipelineConfig) -> Pipeline:
    source = open_dataset(location.name, "train", location.data_dir)
    examples = RepeatedExamples(source.examples)

    def open_stream() -> Iterator[int]:
        for _ in our_batches(config, config.num_batches, randaugment=False, examples=examples):
            yield config.batch_size

    return Pipeline(CROP, name, config.num_cores, open_stream)


def _baseline_pipelines(config: PipelineConfig, folder: Path) -> list[Pipeline]:
    pipelines = []
    for library, make_streams in (
        ("webdataset", _webdataset_streams),
        ("datasets", _datasets_streams),
    ):
        try:
            streams = make_streams(folder)
        except ModuleNotFoundError as error:
            _print_missing(error, library)
            continue
        pipelines += [
            Pipeline(
                CROP,
                f"library {library}, {name}",
                config.num_cores,
                functools.partial(_load_batches, config, open_samples, read),
            )
            for name, open_samples, read in streams
        ]
    return pipelines


class _Stream(NamedTuple):
    """Endless stream of a library.

    Attributes:
        name: Access pattern.
        open: Function that starts a stream of samples, which one thread reads.
        read: Function from a sample to the bytes of an image, for any thread.
    """

    name: str
    open: Callable[[], Iterable[Any]]
    read: Callable[[Any], bytes]


def _webdataset_streams(folder: Path) -> list[_Stream]:
    import webdataset

    shards = sorted(map(str, (folder / "wds").glob("train-*.tar")))

    def open_samples() -> Iterable[Any]:
        # Shards are sampled without an end; otherwise the buffer would run empty in every epoch.
        dataset = webdataset.WebDataset(shards, resampled=True, shardshuffle=False, seed=0)
        return dataset.shuffle(_SHUFFLE_BUFFER, seed=0).to_tuple("jpg", "cls")

    return [_Stream("iterated", open_samples, lambda sample: sample[0])]


def _datasets_streams(folder: Path) -> list[_Stream]:
    import datasets

    dataset = datasets.load_from_disk(folder / "arrow")["train"]
    dataset = dataset.cast_column("image", datasets.Image(decode=False))

    def iterate() -> Iterator[Any]:
        for epoch in itertools.count():
            yield from dataset.shuffle(seed=epoch)

    def sample_indices() -> Iterator[int]:
        for epoch in itertools.count():
            yield from np.random.default_rng(epoch).permutation(len(dataset)).tolist()

    return [
        _Stream("iterated", iterate, lambda row: row["image"]["bytes"]),
        _Stream("by index", sample_indices, lambda index: dataset[index]["image"]["bytes"]),
    ]


def _load_batches(
    config: PipelineConfig,
    open_samples: Callable[[], Iterable[Any]],
    read: Callable[[Any], bytes],
) -> Iterator[int]:
    """Yields the number of images of every batch; threads read and crop the images."""
    samples = itertools.islice(open_samples(), config.num_batches * config.batch_size)
    chunks = iter(lambda: list(itertools.islice(samples, CHUNK_SIZE)), [])

    def load_chunk(item: tuple[int, list[Any]]) -> np.ndarray:
        number, chunk = item
        rng = np.random.default_rng(number)
        return np.stack([crop_image(read(sample), rng, config.image_size) for sample in chunk])

    loaded: list[np.ndarray] = []
    num_loaded = 0
    for images in map_in_order(load_chunk, enumerate(chunks), config.num_threads):
        loaded.append(images)
        num_loaded += len(images)
        while num_loaded >= config.batch_size:
            joined = np.concatenate(loaded)
            loaded, num_loaded = [joined[config.batch_size :]], num_loaded - config.batch_size
            yield config.batch_size


def _print_missing(error: ModuleNotFoundError, library: str) -> None:
    if error.name != library:
        raise error
    print(f"{library} is not installed: what needs it is skipped", file=sys.stderr)
