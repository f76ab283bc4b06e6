"""Tests of the pipeline: batch n depends on (seed, n) alone, and no example is lost or doubled."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mixer_jax.data.pipeline import Batch, eval_batches, train_batches
from mixer_jax.data.sources import Example, Source
from mixer_jax.parallel.sharding import batch_sharding, make_mesh

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
AUGMENTED = UNCHANGED | {"train_crop": "inception", "flip": True, "randaugment_layers": 2}


class Reads(Sequence[Example]):
    """Ten images, each with its own label; remembers what was read."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: Any) -> Any:
        self.indices.append(index)
        encoded = cv2.imencode(".png", IMAGES[index][..., ::-1])[1].tobytes()
        return Example(image=encoded, label=index)


def source(examples: Sequence[Example] | None = None) -> Source:
    return Source("toy", examples or Reads(), tuple("abcdefghij"))


def mesh_of(data: int, fsdp: int) -> Mesh:
    return make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def train(
    first_step: int,
    num_steps: int,
    *,
    seed: int = 0,
    batch_size: int = 4,
    preprocess: dict[str, Any] = UNCHANGED,
    threads: int = 2,
    mesh: Mesh | None = None,
    examples: Sequence[Example] | None = None,
) -> Iterator[Batch]:
    return train_batches(
        source(examples),
        seed=seed,
        first_step=first_step,
        num_steps=num_steps,
        batch_size=batch_size,
        image_size=SIZE,
        preprocess=preprocess,
        threads=threads,
        prefetch_batches=2,
        sharding=batch_sharding(mesh or mesh_of(1, 1)),
    )


def on_host(batches: Iterator[Batch]) -> list[dict[str, np.ndarray]]:
    return [jax.device_get(batch) for batch in batches]


def assert_identical(left: Iterator[Batch], right: Iterator[Batch]) -> None:
    for a, b in zip(on_host(left), on_host(right), strict=True):
        assert a.keys() == b.keys() == {"image", "label"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("preprocess", [UNCHANGED, AUGMENTED], ids=["unchanged", "augmented"])
@pytest.mark.parametrize("first_step", [1, 5, 7])
def test_starting_later_gives_the_batches_of_running_to_there(
    first_step: int, preprocess: dict[str, Any]
) -> None:
    whole = train(0, 8, preprocess=preprocess)
    for _ in range(first_step):
        next(whole)
    assert_identical(train(first_step, 8, preprocess=preprocess), whole)


def test_threads_do_not_matter() -> None:
    one, three = (train(0, 8, preprocess=AUGMENTED, threads=threads) for threads in (1, 3))
    assert_identical(one, three)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (4, 2)])
def test_meshes_do_not_matter(data: int, fsdp: int) -> None:
    one, mesh = mesh_of(1, 1), mesh_of(data, fsdp)
    alone, together = (
        train(0, 3, batch_size=16, mesh=m, preprocess=AUGMENTED) for m in (one, mesh)
    )
    assert_identical(alone, together)
    batch = next(train(0, 1, batch_size=16, mesh=mesh))
    for array in batch.values():
        assert array.sharding == batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
        assert sorted(shard.index[0].start for shard in array.addressable_shards) == [
            *range(0, 16, 2)
        ]


def test_batches_have_the_types_and_shapes_they_promise() -> None:
    batches = on_host(train(2, 5))
    assert len(batches) == 3
    for batch in batches:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].shape == (4,)
        assert batch["label"].dtype == np.int32


def test_no_steps_are_no_batches() -> None:
    assert on_host(train(3, 3)) == []


def labels(batches: Iterator[Batch]) -> np.ndarray:
    return np.concatenate([batch["label"] for batch in on_host(batches)])


def test_every_epoch_is_every_example_once_in_its_own_order() -> None:
    # Batches of 4 run on across epochs of 10: 15 of them are 6 epochs.
    epochs = labels(train(0, 15)).reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 6


def test_images_stay_with_their_labels() -> None:
    for batch in on_host(train(0, 15)):
        np.testing.assert_array_equal(batch["image"], IMAGES[batch["label"]])


def test_far_steps_begin_at_once() -> None:
    began = time.monotonic()
    for step in (10**6, 10**9, 10**12):
        assert sorted(labels(train(step, step + 1, batch_size=10))) == list(range(10))
    assert time.monotonic() - began < 2


def test_another_seed_gives_another_order() -> None:
    orders = {labels(train(0, 5, seed=seed)).tobytes() for seed in range(3)}
    assert len(orders) == 3


def versions(batches: Iterator[Batch], label: int) -> list[bytes]:
    return [
        image.tobytes()
        for batch in on_host(batches)
        for image in batch["image"][batch["label"] == label]
    ]


def test_augmentation_differs_between_epochs_examples_and_seeds() -> None:
    crops = UNCHANGED | {"train_crop": "inception"}
    seen = [versions(train(0, 25, preprocess=crops, seed=seed), 3) for seed in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 10
    assert len({*seen[0], *seen[1]}) > 18
    # One image under ten labels: if all of an epoch were cropped alike, few would differ.
    same = [Example(image=Reads()[0]["image"], label=label) for label in range(10)]
    (batch,) = on_host(train(0, 1, batch_size=10, preprocess=crops, examples=same))
    assert len({image.tobytes() for image in batch["image"]}) > 8


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_is_bounded(threads: int) -> None:
    examples = Reads()
    batches = train(0, 10**6, threads=threads, examples=examples)
    for _ in range(3):
        next(batches)
    time.sleep(0.1)
    # Three taken, one on its way to the device, two ready on the host, one being put together.
    assert 3 * 4 <= len(examples.indices) <= 7 * 4


def broken() -> list[Example]:
    examples = [Reads()[index] for index in range(10)]
    examples[6]["image"] = b"broken"
    return examples


def test_an_unreadable_image_stops_training() -> None:
    with pytest.raises(ValueError, match="6 bytes that are no readable image"):
        on_host(train(0, 3, examples=broken()))


def evaluation(
    batch_size: int, mesh: Mesh, examples: Sequence[Example] | None = None
) -> Iterator[Batch]:
    return eval_batches(
        source(examples),
        batch_size=batch_size,
        image_size=SIZE,
        eval_crop="whole",
        threads=2,
        prefetch_batches=2,
        sharding=batch_sharding(mesh),
    )


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [(1, 1), (3, 1), (5, 1), (10, 1), (11, 1), (64, 1), (8, 8), (16, 8), (6, 2), (10, 2)],
)
def test_evaluation_sees_every_example_once_in_order(batch_size: int, devices: int) -> None:
    mesh = mesh_of(devices, 1)
    batches = list(evaluation(batch_size, mesh))
    assert len(batches) == -(-10 // batch_size)
    for batch in batches:
        assert {array.sharding for array in batch.values()} == {batch_sharding(mesh)}
    columns = {
        name: np.concatenate([batch[name] for batch in on_host(iter(batches))])
        for name in ("image", "label", "mask")
    }
    padding = len(batches) * batch_size - 10
    assert columns["mask"].tolist() == [True] * 10 + [False] * padding
    assert columns["label"].tolist() == [*range(10)] + [0] * padding
    np.testing.assert_array_equal(columns["image"][:10], IMAGES)
    assert not columns["image"][10:].any()
    assert [columns[name].dtype for name in columns] == [np.uint8, np.int32, np.bool_]


def test_an_unreadable_image_stops_evaluation() -> None:
    with pytest.raises(ValueError, match="6 bytes that are no readable image"):
        on_host(evaluation(4, mesh_of(1, 1), broken()))
