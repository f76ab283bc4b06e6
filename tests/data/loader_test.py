"""Tests of the pipeline: batch n depends on (seed, n) alone, and no example is lost or doubled."""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from mixer_jax.data.chunks import CHUNK_SIZE, Chunks
from mixer_jax.data.loader import BadImageCallback, Batch, eval_batches
from mixer_jax.data.readers import BadImage, TrainReader
from mixer_jax.data.source import Example
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.errors import RunError
from tests.helpers.bad_images import reason_of
from tests.helpers.batches import (
    AUGMENTED,
    IMAGES,
    SIZE,
    UNCHANGED,
    RecordingSource,
    assert_identical,
    mesh_of,
    on_host,
    source,
    train,
)
from tests.helpers.messages import raises


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
    assert len({*seen[0], *seen[1]}) > 15
    # One image under ten labels: if all of an epoch were cropped alike, few would differ.
    same = [
        Example(image=RecordingSource()[0]["image"], labels=(label,), name="")
        for label in range(10)
    ]
    (batch,) = on_host(train(0, 1, batch_size=10, preprocess=crops, examples=same))
    assert len({image.tobytes() for image in batch["image"]}) > 8


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_is_bounded(threads: int) -> None:
    examples = RecordingSource()
    batches = train(0, 10**6, threads=threads, examples=examples)
    for _ in range(3):
        next(batches)
    time.sleep(0.1)
    # Three taken, one on its way to the device, two ready on the host or one for every thread, and
    # one being put together.
    assert 3 * 4 <= len(examples.indices) <= (5 + max(2, threads)) * 4


BAD = (3, 6)


def with_bad() -> list[Example]:
    """Ten examples, of which those in `BAD` are no images."""
    examples = [RecordingSource()[index] for index in range(10)]
    for index in BAD:
        examples[index]["image"] = b"broken"
    return examples


def test_bad_images_are_replaced_and_reported_with_their_step() -> None:
    reports: dict[int, list[BadImage]] = {}
    batches = train(0, 15, examples=with_bad(), report=reports.__setitem__)
    plain = labels(train(0, 15))
    seen = labels(batches)
    bad_places = np.isin(plain, BAD)
    # All other places hold what they would hold; at the bad ones stand good examples.
    assert (seen[~bad_places] == plain[~bad_places]).all()
    assert bad_places.sum() == 12
    assert not np.isin(seen, BAD).any()
    assert len(set(seen[bad_places])) > 3
    for step, bad in reports.items():
        expected = {f"image {label}" for label in plain.reshape(15, 4)[step - 1] if label in BAD}
        # A substitute may be bad as well, and is then replaced in its turn.
        assert expected <= {name for name, _ in bad} <= {"image 3", "image 6"}
        assert {reason for _, reason in bad} == {reason_of(b"broken")}
    assert reports.keys() == {step + 1 for step in np.flatnonzero(bad_places.reshape(15, 4).any(1))}


def test_substitutes_are_the_same_from_anywhere() -> None:
    far = train(5, 8, examples=with_bad(), preprocess=AUGMENTED)
    near = train(0, 8, examples=with_bad(), preprocess=AUGMENTED, threads=1, batch_size=4)
    for _ in range(5):
        next(near)
    assert_identical(far, near)


def test_nothing_but_bad_images_is_an_error_and_no_hang() -> None:
    examples = [Example(image=b"broken", labels=(0,), name=f"image {i}") for i in range(10)]
    with raises(RunError, "toy", "100", reason_of(b"broken")) as caught:
        next(train(0, 3, examples=examples))
    assert re.search(r"\bimage \d\b", str(caught.value))


def evaluation(
    batch_size: int,
    mesh: Mesh,
    examples: Sequence[Example] | None = None,
    report: BadImageCallback = print,
    image_size: tuple[int, int] = (SIZE, SIZE),
) -> Iterator[Batch]:
    return eval_batches(
        source(examples),
        batch_size=batch_size,
        image_size=image_size,
        eval_crop="whole",
        exif_orientation=False,
        threads=2,
        prefetch_batches=2,
        sharding=batch_sharding(mesh),
        report=report,
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


def test_evaluation_images_need_not_be_square() -> None:
    (batch,) = evaluation(10, mesh_of(1, 1), image_size=(6, 4))
    assert batch["image"].shape == (10, 6, 4, 3)


def test_bad_images_are_left_out_of_evaluation_and_reported() -> None:
    met: list[BadImage] = []
    batches = evaluation(4, mesh_of(1, 1), with_bad(), lambda step, bad: met.extend(bad))
    masks = np.concatenate([batch["mask"] for batch in on_host(batches)])
    assert [name for name, _ in met] == ["image 3", "image 6"]
    assert masks.tolist() == [index not in BAD for index in range(10)] + [False, False]


def test_hosts_have_disjoint_shards_that_make_the_whole_batch() -> None:
    """What 1, 2 or 4 hosts prepare, each for the rows that its devices hold."""
    reader = TrainReader(source(), 0, SIZE, AUGMENTED)
    steps = range(2, 5)

    def prepared(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.concatenate([piece.positions for piece in Chunks(steps, rows, 20)])
        return places, reader(places).arrays["image"]

    _, alone = prepared(np.arange(20))
    for hosts in (2, 4):
        shards = [prepared(rows) for rows in np.split(np.arange(20), hosts)]
        places, together = (np.concatenate(column) for column in zip(*shards, strict=True))
        assert sorted(places) == list(range(40, 100))
        np.testing.assert_array_equal(together[np.argsort(places)], alone)


def test_pieces_fill_the_rows_of_their_batch() -> None:
    pieces = Chunks(range(3, 5), np.arange(5, 42), 100)
    assert pieces.per_step == 3
    for number, step in enumerate((3, 4)):
        batch = np.full(pieces.num_rows, -1)
        for piece in (pieces[3 * number + k] for k in range(3)):
            assert piece.step == step
            assert len(piece.positions) <= CHUNK_SIZE
            batch[piece.rows] = piece.positions
        assert batch.tolist() == list(range(100 * step + 5, 100 * step + 42))
