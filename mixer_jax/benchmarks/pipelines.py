"""Input pipelines that do the same work: JPEG decoding alone, mixer_jax's, and tf.data's.

The JPEG files are generated, or read from a folder.

The stream of every pipeline is timed between two arrivals in its middle, while the consumer only
waits: images prepared before the clock starts do not count, and each stream is exhausted before the
next one starts.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import jax
import numpy as np
import simplejpeg

from mixer_jax.data.loader import CHUNK_SIZE, Batch, available_cpus, train_batches
from mixer_jax.data.preprocess import train_image
from mixer_jax.data.randaugment import rand_augment
from mixer_jax.data.source import Example, Source
from mixer_jax.distributed.sharding import batch_sharding, make_mesh
from mixer_jax.errors import UserError

DECODE = "JPEG decoding alone"
CROP = "decoding, Inception crop, flip"
AUGMENT = "decoding, Inception crop, flip, RandAugment"
RANDAUGMENT = "RandAugment alone, one thread"
TASKS = [DECODE, CROP, AUGMENT, RANDAUGMENT]
OURS = "mixer_jax"

# RandAugment of the paper's ImageNet-1k recipe, and its smallest crop.
_LAYERS, _MAGNITUDE = 2, 15.0
_MIN_AREA = 0.05
# Images of ImageNet-1k. Shuffling costs more for short datasets: 0.01 ms per image at this length,
# 0.5 ms at 64.
_NUM_EXAMPLES = 1_281_167
_NUM_MEMORY_READINGS = 10

# ImageNet's most frequent image size, and about its usual file size: 92 to 115 kB.
_HEIGHT, _WIDTH = 375, 500
_MIN_BYTES = 92_000
# Files of a folder, all of which are held in memory.
_MAX_FILES = 1024


class PipelineConfig(NamedTuple):
    """Settings of all pipelines.

    Attributes:
        files: Encoded images, used repeatedly.
        image_size: Side of the square images, in pixels.
        num_threads: Threads of a pipeline.
        our_num_threads: Threads of mixer_jax's pipeline; 0 leaves the number to the pipeline.
        our_num_workers: Processes that share these threads; 0 leaves the number to the pipeline.
        images_per_round: Images that are timed in a round.
    """

    files: Sequence[bytes]
    image_size: int
    batch_size: int
    num_threads: int
    our_num_threads: int
    our_num_workers: int
    images_per_round: int

    @property
    def margin(self) -> int:
        """Batches that can be in preparation at any time in all threads, and one more."""
        return math.ceil(CHUNK_SIZE * self.num_threads / self.batch_size) + 1

    @property
    def num_batches(self) -> int:
        """Length of a stream: two margins of warmup, the timed part, and one margin after it."""
        return self.images_per_round // self.batch_size + 3 * self.margin

    @property
    def num_cores(self) -> int:
        """Cores that a pipeline can use."""
        return min(self.num_threads, available_cpus())


class Pipeline(NamedTuple):
    """One implementation of one of the `TASKS`.

    `open` starts a stream, which yields the number of images of every arrival.
    """

    task: str
    name: str
    num_cores: int
    open: Callable[[], Iterator[int]]


class Measurement(NamedTuple):
    """Speed of one pipeline, median over rounds.

    Attributes:
        images_per_second_per_core: Rate divided by the cores that the pipeline can use.
        milliseconds: Time of one core per image at that rate.
        relative_time: Time per image relative to that of a reference in the same round: mixer_jax
            for the same task, or, for decoding alone, its decoding, crop and flip; the folder for
            formats of datasets.
    """

    task: str
    name: str
    images_per_second: float
    images_per_second_per_core: float
    milliseconds: float
    relative_time: float

    @classmethod
    def from_rates(
        cls, pipeline: Pipeline, rates: np.ndarray, reference: np.ndarray
    ) -> "Measurement":
        """Summarizes the images/s of each round, and of the reference in the same rounds."""
        rate = float(np.median(rates))
        return cls(
            pipeline.task,
            pipeline.name,
            rate,
            rate / pipeline.num_cores,
            1000 * pipeline.num_cores / rate,
            float(np.median(reference / rates)),
        )


class RepeatedExamples(Sequence[Example]):
    """Dataset of the length of ImageNet-1k that repeats a few examples."""

    def __init__(self, examples: Sequence[Any]):
        self._examples = examples

    def __len__(self) -> int:
        return _NUM_EXAMPLES

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index % len(self._examples)]


def measure_pipelines(
    config: PipelineConfig, num_rounds: int, tf_data: ModuleType | None
) -> list[Measurement]:
    """Measures all pipelines, one after the other in every round, after a round of warmup.

    `tf_data` is the module `mixer_jax.benchmarks.tf_data`; None leaves tf.data out.
    """
    # A thread is one thread; mixer_jax's pipeline sets the same.
    cv2.setNumThreads(0)
    images = _cropped_images(config)
    pipelines = [*_decoders(config), *_our_pipelines(config, images)]
    if tf_data is not None:
        pipelines += _tf_data_pipelines(config, images, tf_data)
    pipelines.sort(key=lambda pipeline: TASKS.index(pipeline.task))
    rates = measure_rates(pipelines, config, num_rounds)
    our_rates = {p.task: r for p, r in zip(pipelines, rates, strict=True) if p.name == OURS}
    return [
        Measurement.from_rates(pipeline, by_round, our_rates.get(pipeline.task, our_rates[CROP]))
        for pipeline, by_round in zip(pipelines, rates, strict=True)
    ]


def measure_rates(
    pipelines: Sequence[Pipeline], config: PipelineConfig, num_rounds: int
) -> np.ndarray:
    """Measures images/s, (num_pipelines, num_rounds), after a round of warmup."""
    rounds = [[_measure_rate(p.open(), config) for p in pipelines] for _ in range(num_rounds + 1)]
    return np.array(rounds[1:]).T


def measure_memory_growth(config: PipelineConfig, num_images: int) -> dict[str, Any]:
    """Measures the memory of mixer_jax's training pipeline with RandAugment over a long run.

    `num_images` is rounded down to whole batches.

    Returns:
        The number of images until each reading, of which the first ends the warmup; the resident
        memory of this process and its workers at each reading; and its growth.
    """
    num_batches = num_images // config.batch_size
    readings = [
        num_batches * index // _NUM_MEMORY_READINGS for index in range(1, _NUM_MEMORY_READINGS + 1)
    ]
    mebibytes = []
    for count, _ in enumerate(our_batches(config, num_batches, randaugment=True), start=1):
        if count in readings:
            mebibytes.append(resident_bytes() / 2**20)
    growth = 100 * (mebibytes[-1] / mebibytes[0] - 1)
    return {
        "images": [count * config.batch_size for count in readings],
        "mebibytes": mebibytes,
        "growth_percent": growth,
    }


def our_batches(
    config: PipelineConfig,
    num_batches: int,
    *,
    randaugment: bool,
    examples: Sequence[Any] | None = None,
    first_step: int = 0,
) -> Generator[Batch, None, None]:
    """Yields batches of mixer_jax's training pipeline on the host, by default of the files."""
    if examples is None:
        examples = RepeatedExamples(
            [Example(image=file, labels=(0,), name="") for file in config.files]
        )
    num_threads, num_workers = config.our_num_threads, config.our_num_workers
    if num_threads:
        num_workers = num_workers or 1
        num_threads //= num_workers
    return train_batches(
        Source("benchmark", examples, ("",)),
        seed=0,
        start_step=first_step,
        num_steps=first_step + num_batches,
        batch_size=config.batch_size,
        image_size=config.image_size,
        preprocess=_preprocess_args(randaugment=randaugment),
        num_threads=num_threads,
        num_workers=num_workers,
        prefetch_batches=2,
        sharding=batch_sharding(make_mesh(1, 1, jax.devices()[:1])),
        on_bad_images=lambda step, bad: None,
    )


def _preprocess_args(*, randaugment: bool) -> dict[str, Any]:
    """Returns the keyword arguments of `train_image`."""
    return {
        "train_crop": "inception",
        "min_area": _MIN_AREA,
        "max_shift": 0,
        "flip": True,
        "randaugment_layers": _LAYERS if randaugment else 0,
        "randaugment_magnitude": _MAGNITUDE,
    }


def _decoders(config: PipelineConfig) -> list[Pipeline]:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    decoders: dict[str, Callable[[bytes], Any]] = {
        # As in mixer_jax's pipeline; OpenCV offers only the slower, more accurate transform.
        "simplejpeg": lambda file: simplejpeg.decode_jpeg(file, fastdct=True, strict=False),
        "OpenCV": lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), flags),
    }
    return [
        Pipeline(DECODE, name, config.num_cores, functools.partial(_decode, config, decode))
        for name, decode in decoders.items()
    ]


def _decode(config: PipelineConfig, decode: Callable[[bytes], Any]) -> Iterator[int]:
    def decode_chunk(chunk: Sequence[bytes]) -> int:
        for file in chunk:
            decode(file)
        return len(chunk)

    files = itertools.islice(itertools.cycle(config.files), config.num_batches * config.batch_size)
    chunks = iter(lambda: list(itertools.islice(files, CHUNK_SIZE)), [])
    with concurrent.futures.ThreadPoolExecutor(config.num_threads) as pool:
        yield from pool.map(decode_chunk, chunks)


def _our_pipelines(config: PipelineConfig, images: np.ndarray) -> list[Pipeline]:
    def augment() -> Iterator[None]:
        rng = np.random.default_rng(0)
        repeated = itertools.cycle(images)
        for _ in range(config.num_batches):
            for image in itertools.islice(repeated, config.batch_size):
                rand_augment(image, rng, num_layers=_LAYERS, magnitude=_MAGNITUDE)
            yield

    stream = functools.partial(our_batches, config, config.num_batches)
    return [
        _batch_pipeline(CROP, OURS, config, functools.partial(stream, randaugment=False)),
        _batch_pipeline(AUGMENT, OURS, config, functools.partial(stream, randaugment=True)),
        _batch_pipeline(RANDAUGMENT, OURS, config, augment),
    ]


def _tf_data_pipelines(
    config: PipelineConfig, images: np.ndarray, tf_data: ModuleType
) -> list[Pipeline]:
    size = {"num_batches": config.num_batches, "batch_size": config.batch_size}
    randaugment = {"randaugment_layers": _LAYERS, "randaugment_magnitude": _MAGNITUDE}
    off = {"randaugment_layers": 0, "randaugment_magnitude": 0.0}
    pipelines = []
    for (task, layers), (name, decode_full_image) in itertools.product(
        [(CROP, off), (AUGMENT, randaugment)],
        [("tf.data, decode and crop", True), ("tf.data, decode the crop only", False)],
    ):
        dataset = tf_data.train_batches(
            config.files,
            image_size=config.image_size,
            min_area=_MIN_AREA,
            decode_full_image=decode_full_image,
            num_threads=config.num_threads,
            **size,
            **layers,
        )
        pipelines.append(_batch_pipeline(task, name, config, dataset.__iter__))
    augmented = tf_data.augmented_batches(images, num_threads=1, **size, **randaugment)
    return [*pipelines, _batch_pipeline(RANDAUGMENT, "tf.data", config, augmented.__iter__)]


def _batch_pipeline(
    task: str, name: str, config: PipelineConfig, open_batches: Callable[[], Iterator[Any]]
) -> Pipeline:
    num_cores = 1 if task == RANDAUGMENT else config.num_cores
    return Pipeline(task, name, num_cores, lambda: (config.batch_size for _ in open_batches()))


def _measure_rate(stream: Iterator[int], config: PipelineConfig) -> float:
    """Measures images/s in the middle of a stream, and exhausts the stream."""
    arrived = 0
    while arrived < 2 * config.margin * config.batch_size:
        arrived += next(stream)
    first, start = arrived, time.perf_counter()
    while arrived < first + config.images_per_round:
        arrived += next(stream)
    rate = (arrived - first) / (time.perf_counter() - start)
    for _ in stream:
        pass
    return rate


def _cropped_images(config: PipelineConfig) -> np.ndarray:
    """Prepares one training image of each file, as the input of RandAugment."""
    rng = np.random.default_rng(0)
    return np.stack([crop_image(file, rng, config.image_size) for file in config.files])


def crop_image(file: bytes, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Decodes a random Inception crop and flips it at random."""
    return train_image(file, rng, image_size=image_size, **_preprocess_args(randaugment=False))


def resident_bytes() -> int:
    """Returns the resident memory of this process and its workers."""
    resident = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        # A worker may have just finished.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            resident += num_pages * os.sysconf("SC_PAGE_SIZE")
    return resident


def sample_jpegs(count: int) -> list[bytes]:
    """Encodes random 500×375 crops of scikit-learn's two sample photographs as JPEG files."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = itertools.cycle(load_sample_images().images)
    files = []
    for image in itertools.islice(photographs, count):
        top = rng.integers(image.shape[0] - _HEIGHT + 1)
        left = rng.integers(image.shape[1] - _WIDTH + 1)
        files.append(_encode(image[top : top + _HEIGHT, left : left + _WIDTH]))
    return files


def _encode(image: np.ndarray) -> bytes:
    """Encodes an image at the lowest quality, from 80 on, that exceeds `_MIN_BYTES`."""
    for quality in range(80, 101):
        params = [cv2.IMWRITE_JPEG_QUALITY, quality]
        encoded = cv2.imencode(".jpg", image[..., ::-1], params)[1].tobytes()
        if len(encoded) > _MIN_BYTES:
            break
    return encoded


def read_jpegs(folder: str) -> list[bytes]:
    """Reads the JPEG files in a folder and its subfolders, by name, at most `_MAX_FILES`.

    Raises:
        UserError: There are none, or one of them is not a JPEG file.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"--images must be a folder with .jpg or .jpeg files, got {folder}.")
    files = []
    for path in paths[:_MAX_FILES]:
        files.append(path.read_bytes())
        try:
            simplejpeg.decode_jpeg(files[-1], strict=False)
        except ValueError:
            raise UserError(f"--images={folder}: {path} is not a readable JPEG file.") from None
    return files
