"""Input pipelines, side by side: JPEG decoding alone, ours, and tf.data.

Each one's stream of images is timed between two arrivals in its midst, while the consumer only
waits: what had been prepared ahead before the clock started is not counted as fast, and nothing of
a stream is left over to disturb the next.
"""

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from mixer_jax.benchmarks.ours import (
    LAYERS,
    MAGNITUDE,
    MIN_AREA,
    Setting,
    our_batches,
    preprocess,
)
from mixer_jax.data.loader import CHUNK_SIZE, available_cpus
from mixer_jax.data.preprocess import train_image
from mixer_jax.data.randaugment import rand_augment

DECODING = "JPEG decoding alone"
CROPPING = "decoding, Inception crop, flip"
AUGMENTING = "the same with RandAugment"
AUGMENTING_ALONE = "RandAugment alone, one thread"
_TASKS = [DECODING, CROPPING, AUGMENTING, AUGMENTING_ALONE]
OURS = "mixer_jax"


class Competitor(NamedTuple):
    """One way to do one task.

    Attributes:
        task: what is done.
        name: who does it.
        cores: that it may use.
        open: starts a stream and yields the number of images of every arrival.
    """

    task: str
    name: str
    cores: int
    open: Callable[[], Iterator[int]]


class Measurement(NamedTuple):
    """How fast one competitor is.

    Attributes:
        task: of the competitor.
        name: of the competitor.
        images_per_second: median over rounds.
        images_per_second_per_core: the same, over the cores it may use.
        milliseconds: that one core takes for one image at that rate.
        ratio: median over rounds of our rate at the same task to its rate in the same round; of
            decoding alone, of our decoding, crop and flip to it.
    """

    task: str
    name: str
    images_per_second: float
    images_per_second_per_core: float
    milliseconds: float
    ratio: float


def measure(setting: Setting, rounds: int, tf_data: ModuleType | None) -> list[Measurement]:
    """Returns how fast the pipelines are, task by task.

    Args:
        setting: of the pipelines.
        rounds: to time; one more warms up.
        tf_data: our module of that name, or None to leave tf.data out.
    """
    # One thread is one thread. Our pipeline sets the same.
    cv2.setNumThreads(0)
    images = _cropped(setting)
    competitors = _limits(setting) + _ours(setting, images)
    if tf_data is not None:
        competitors += _peers(setting, images, tf_data)
    competitors.sort(key=lambda competitor: _TASKS.index(competitor.task))
    rates = [[_rate(c.open(), setting) for c in competitors] for _ in range(rounds + 1)][1:]
    by_competitor = np.array(rates).T
    ours = {
        competitor.task: own
        for competitor, own in zip(competitors, by_competitor, strict=True)
        if competitor.name == OURS
    }
    measurements = []
    for (task, name, cores, _), own in zip(competitors, by_competitor, strict=True):
        rate = float(np.median(own))
        ratio = float(np.median(ours.get(task, ours[CROPPING]) / own))
        measurements.append(Measurement(task, name, rate, rate / cores, 1000 * cores / rate, ratio))
    return measurements


def _limits(setting: Setting) -> list[Competitor]:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    decoders: dict[str, Callable[[bytes], Any]] = {
        # As our pipeline decodes; OpenCV has only the slower, more accurate transform.
        "simplejpeg": lambda file: simplejpeg.decode_jpeg(file, fastdct=True, strict=False),
        "OpenCV": lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), flags),
    }
    cores = min(setting.threads, available_cpus())
    return [
        Competitor(DECODING, name, cores, functools.partial(_decoded, setting, decode))
        for name, decode in decoders.items()
    ]


def _ours(setting: Setting, images: np.ndarray) -> list[Competitor]:
    def stream(randaugment: bool) -> Iterator[int]:
        for _ in our_batches(setting, setting.num_batches, randaugment=randaugment):
            yield setting.batch_size

    def augmented() -> Iterator[int]:
        rng = np.random.default_rng(0)
        endless = itertools.cycle(images)
        for _ in range(setting.num_batches):
            for image in itertools.islice(endless, setting.batch_size):
                rand_augment(image, rng, num_layers=LAYERS, magnitude=MAGNITUDE)
            yield setting.batch_size

    cores = min(setting.threads, available_cpus())
    return [
        Competitor(CROPPING, OURS, cores, functools.partial(stream, False)),
        Competitor(AUGMENTING, OURS, cores, functools.partial(stream, True)),
        Competitor(AUGMENTING_ALONE, OURS, 1, augmented),
    ]


def _peers(setting: Setting, images: np.ndarray, tf_data: ModuleType) -> list[Competitor]:
    size = {"num_batches": setting.num_batches, "batch_size": setting.batch_size}
    randaugment = {"randaugment_layers": LAYERS, "randaugment_magnitude": MAGNITUDE}
    off = {"randaugment_layers": 0, "randaugment_magnitude": 0.0}

    def stream(dataset: Any) -> Iterator[int]:
        for _ in dataset:
            yield setting.batch_size

    cores = min(setting.threads, available_cpus())
    competitors = []
    for (task, layers), (name, whole) in itertools.product(
        [(CROPPING, off), (AUGMENTING, randaugment)],
        [("tf.data, decode and crop", True), ("tf.data, decode the crop only", False)],
    ):
        dataset = tf_data.training_batches(
            setting.files,
            image_size=setting.image_size,
            min_area=MIN_AREA,
            decode_whole=whole,
            threads=setting.threads,
            **size,
            **layers,
        )
        competitors.append(Competitor(task, name, cores, functools.partial(stream, dataset)))
    alone = tf_data.augmented_batches(images, threads=1, **size, **randaugment)
    competitors.append(Competitor(AUGMENTING_ALONE, "tf.data", 1, functools.partial(stream, alone)))
    return competitors


def _decoded(setting: Setting, decode: Callable[[bytes], Any]) -> Iterator[int]:
    def decode_piece(piece: Sequence[bytes]) -> int:
        for file in piece:
            decode(file)
        return len(piece)

    files = itertools.islice(
        itertools.cycle(setting.files), setting.num_batches * setting.batch_size
    )
    pieces = iter(lambda: list(itertools.islice(files, CHUNK_SIZE)), [])
    with concurrent.futures.ThreadPoolExecutor(setting.threads) as pool:
        yield from pool.map(decode_piece, pieces)


def _rate(stream: Iterator[int], setting: Setting) -> float:
    """Returns the images/s of a stream in its midst, and exhausts it."""
    arrived = 0
    while arrived < 2 * setting.margin * setting.batch_size:
        arrived += next(stream)
    first, start = arrived, time.perf_counter()
    while arrived < first + setting.timed_images:
        arrived += next(stream)
    rate = (arrived - first) / (time.perf_counter() - start)
    for _ in stream:
        pass
    return rate


def _cropped(setting: Setting) -> np.ndarray:
    """Returns one training image of each file, as RandAugment is given them."""
    rng = np.random.default_rng(0)
    settings = {"image_size": setting.image_size, **preprocess(randaugment=False)}
    return np.stack([train_image(file, rng, **settings) for file in setting.files])
