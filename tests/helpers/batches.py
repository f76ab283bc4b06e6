"""Training batches of ten small images."""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from jax.sharding import Mesh

from mixer_jax.data.loader import BadImageCallback, Batch, train_batches
from mixer_jax.data.source import Example, Source
from mixer_jax.distributed.sharding import batch_sharding, make_mesh

SIZE = 8
IMAGES = np.random.default_rng(0).integers(256, size=(10, SIZE, SIZE, 3), dtype=np.uint8)
UNCHANGED: dict[str, Any] = {
    "train_crop": "resize",
    "min_area": 0.05,
    "max_shift": 1,
    "flip": False,
    "randaugment_layers": 0,
    "randaugment_magnitude": 10.0,
}
AUGMENTED = UNCHANGED | {
    "train_crop": "inception",
    "flip": True,
    "randaugment_layers": 2,
    "random_erasing": 0.5,
    "random_erasing_mode": "pixel",
}


class RecordingSource(Sequence[Example]):
    """Ten images with labels 0 to 9; records which examples are read."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: Any) -> Any:
        self.indices.append(index)
        encoded = cv2.imencode(".png", IMAGES[index][..., ::-1])[1].tobytes()
        return Example(image=encoded, labels=(index,), name=f"image {index}")


def make_source(examples: Sequence[Example] | None = None) -> Source:
    return Source("toy", examples or RecordingSource(), tuple("abcdefghij"))


def mesh_of(data: int, fsdp: int) -> Mesh:
    return make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def small_train_batches(
    start_step: int,
    num_steps: int,
    *,
    seed: int = 0,
    batch_size: int = 4,
    preprocess: dict[str, Any] = UNCHANGED,
    num_threads: int = 2,
    num_workers: int = 1,
    on_bad_images: BadImageCallback = print,
    mesh: Mesh | None = None,
    examples: Sequence[Example] | None = None,
) -> Iterator[Batch]:
    return train_batches(
        make_source(examples),
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
        batch_size=batch_size,
        image_size=SIZE,
        preprocess=preprocess,
        num_threads=num_threads,
        num_workers=num_workers,
        prefetch_batches=2,
        sharding=batch_sharding(mesh or mesh_of(1, 1)),
        on_bad_images=on_bad_images,
    )


def on_host(batches: Iterator[Batch]) -> list[dict[str, np.ndarray]]:
    return [jax.device_get(batch) for batch in batches]


def assert_identical(left: Iterator[Batch], right: Iterator[Batch]) -> None:
    for a, b in zip(on_host(left), on_host(right), strict=True):
        assert a.keys() == b.keys() == {"image", "label"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
