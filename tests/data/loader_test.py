"""Tests of the input pipeline: batch n is a function of (seed, n), and no example is lost."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from mixer_jax.data.loader import (
    CHUNK_SIZE,
    BadImageCallback,
    Batch,
    Chunks,
    _resolve_parallelism,
    eval_batches,
)
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
    make_source,
    mesh_of,
    on_host,
    small_train_batches,
)
from tests.helpers.messages import raises


@pytest.mark.parametrize("preprocess", [UNCHANGED, AUGMENTED], ids=["unchanged", "augmented"])
@pytest.mark.parametrize("start_step", [1, 5, 7])
def test_train_batches_are_the_same_from_any_start_step(
    start_step: int, preprocess: dict[str, Any]
) -> None:
    from_zero = small_train_batches(0, 8, preprocess=preprocess)
    for _ in range(start_step):
        next(from_zero)
    assert_identical(small_train_batches(start_step, 8, preprocess=preprocess), from_zero)


def test_train_batches_do_not_depend_on_the_number_of_threads() -> None:
    one, three = (
        small_train_batches(0, 8, preprocess=AUGMENTED, num_threads=count) for count in (1, 3)
    )
    assert_identical(one, three)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (4, 2)])
def test_train_batches_do_not_depend_on_the_mesh(data: int, fsdp: int) -> None:
    one_device, mesh = (
        small_train_batches(0, 3, batch_size=16, mesh=mesh, preprocess=AUGMENTED)
        for mesh in (mesh_of(1, 1), mesh_of(data, fsdp))
    )
    assert_identical(one_device, mesh)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (4, 2)])
def test_train_batches_are_sharded_over_all_devices(data: int, fsdp: int) -> None:
    mesh = mesh_of(data, fsdp)
    batch = next(small_train_batches(0, 1, batch_size=16, mesh=mesh))
    for array in batch.values():
        assert array.sharding == batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
        starts = sorted(shard.index[0].start for shard in array.addressable_shards)
        assert starts == [*range(0, 16, 2)]


def test_train_batches_have_documented_types_and_shapes() -> None:
    batches = on_host(small_train_batches(2, 5))
    assert len(batches) == 3
    for batch in batches:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].shape == (4,)
        assert batch["label"].dtype == np.int32


def test_train_batches_of_no_steps_are_empty() -> None:
    assert on_host(small_train_batches(3, 3)) == []


def labels(batches: Iterator[Batch]) -> np.ndarray:
    return np.concatenate([batch["label"] for batch in on_host(batches)])


def test_train_batches_contain_every_example_once_per_epoch_in_a_new_order() -> None:
    # 15 batches of 4 are 6 epochs of 10 examples; batches span epochs.
    epochs = labels(small_train_batches(0, 15)).reshape(6, 10)
    assert (np.sort(epochs) == np.arange(10)).all()
    assert len({epoch.tobytes() for epoch in epochs}) == 6


def test_train_batches_pair_images_with_their_labels() -> None:
    for batch in on_host(small_train_batches(0, 15)):
        np.testing.assert_array_equal(batch["image"], IMAGES[batch["label"]])


def test_train_batches_start_fast_at_any_step() -> None:
    start = time.monotonic()
    for step in (10**6, 10**9, 10**12):
        epoch = labels(small_train_batches(step, step + 1, batch_size=10))
        assert sorted(epoch) == list(range(10))
    assert time.monotonic() - start < 5


def test_train_batches_with_other_seeds_have_another_order() -> None:
    orders = {labels(small_train_batches(0, 5, seed=seed)).tobytes() for seed in range(3)}
    assert len(orders) == 3


def images_with_label(batches: Iterator[Batch], label: int) -> list[bytes]:
    return [
        image.tobytes()
        for batch in on_host(batches)
        for image in batch["image"][batch["label"] == label]
    ]


def test_augmentation_differs_between_epochs_examples_and_seeds() -> None:
    crops = UNCHANGED | {"train_crop": "inception"}
    seen = [
        images_with_label(small_train_batches(0, 25, preprocess=crops, seed=seed), 3)
        for seed in (0, 1)
    ]
    assert len(seen[0]) == len(seen[1]) == 10
    assert len({*seen[0], *seen[1]}) > 15
    # The same image with ten labels: if one crop were used per epoch, few results would differ.
    same = [
        Example(image=RecordingSource()[0]["image"], labels=(label,), name="")
        for label in range(10)
    ]
    (batch,) = on_host(small_train_batches(0, 1, batch_size=10, preprocess=crops, examples=same))
    assert len({image.tobytes() for image in batch["image"]}) > 8


@pytest.mark.parametrize("num_threads", [1, 3])
def test_prefetching_is_bounded(num_threads: int) -> None:
    examples = RecordingSource()
    batches = small_train_batches(0, 10**6, num_threads=num_threads, examples=examples)
    for _ in range(3):
        next(batches)
    time.sleep(0.1)
    # Three batches are taken, one is being transferred, two (or one per thread) are loaded, and one
    # is being assembled.
    assert 3 * 4 <= len(examples.indices) <= (5 + max(2, num_threads)) * 4


def test_an_iterator_that_ends_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    num_chunks = Chunks.__len__
    monkeypatch.setattr(Chunks, "__len__", lambda self: num_chunks(self) - 1)
    batches = small_train_batches(0, 5)
    with pytest.raises(RuntimeError):
        list(batches)


BAD = (3, 6)


def with_bad_examples() -> list[Example]:
    """Makes ten examples; those in `BAD` are not images."""
    examples = [RecordingSource()[index] for index in range(10)]
    for index in BAD:
        examples[index]["image"] = b"broken"
    return examples


def test_bad_training_images_are_substituted_and_reported_with_their_step() -> None:
    reports: dict[int, list[BadImage]] = {}
    batches = small_train_batches(
        0, 15, examples=with_bad_examples(), on_bad_images=reports.__setitem__
    )
    without_bad = labels(small_train_batches(0, 15))
    substituted = labels(batches)
    is_bad = np.isin(without_bad, BAD)
    # Only positions of bad examples differ; they contain good examples.
    assert (substituted[~is_bad] == without_bad[~is_bad]).all()
    assert is_bad.sum() == 12
    assert not np.isin(substituted, BAD).any()
    assert len(set(substituted[is_bad])) > 3
    for step, bad_images in reports.items():
        batch_labels = without_bad.reshape(15, 4)[step - 1]
        expected = {f"image {label}" for label in batch_labels if label in BAD}
        # A substitute may be bad as well, and is then reported and substituted too.
        assert expected <= {name for name, _ in bad_images} <= {"image 3", "image 6"}
        assert {reason for _, reason in bad_images} == {reason_of(b"broken")}
    assert reports.keys() == {step + 1 for step in np.flatnonzero(is_bad.reshape(15, 4).any(1))}


def test_substitutes_do_not_depend_on_start_step_and_threads() -> None:
    from_five = small_train_batches(5, 8, examples=with_bad_examples(), preprocess=AUGMENTED)
    from_zero = small_train_batches(
        0, 8, examples=with_bad_examples(), preprocess=AUGMENTED, num_threads=1
    )
    for _ in range(5):
        next(from_zero)
    assert_identical(from_five, from_zero)


def test_a_source_of_only_bad_images_is_an_error() -> None:
    examples = [Example(image=b"broken", labels=(0,), name=f"image {i}") for i in range(10)]
    with raises(RunError, "toy", "100", reason_of(b"broken")) as caught:
        next(small_train_batches(0, 3, examples=examples))
    assert re.search(r"\bimage \d\b", str(caught.value))


def small_eval_batches(
    batch_size: int,
    mesh: Mesh,
    examples: Sequence[Example] | None = None,
    on_bad_images: BadImageCallback = print,
    image_size: tuple[int, int] = (SIZE, SIZE),
) -> Iterator[Batch]:
    return eval_batches(
        make_source(examples),
        batch_size=batch_size,
        image_size=image_size,
        eval_crop="resize",
        exif_orientation=False,
        num_threads=2,
        prefetch_batches=2,
        sharding=batch_sharding(mesh),
        on_bad_images=on_bad_images,
    )


@pytest.mark.parametrize(
    ("batch_size", "num_devices"),
    [(1, 1), (3, 1), (5, 1), (10, 1), (11, 1), (64, 1), (8, 8), (16, 8), (6, 2), (10, 2)],
)
def test_eval_batches_contain_every_example_once_in_order(
    batch_size: int, num_devices: int
) -> None:
    mesh = mesh_of(num_devices, 1)
    batches = list(small_eval_batches(batch_size, mesh))
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


def test_eval_batches_accept_rectangular_image_sizes() -> None:
    (batch,) = small_eval_batches(10, mesh_of(1, 1), image_size=(6, 4))
    assert batch["image"].shape == (10, 6, 4, 3)


def test_eval_batches_mask_and_report_bad_images() -> None:
    bad_images: list[BadImage] = []
    batches = small_eval_batches(
        4, mesh_of(1, 1), with_bad_examples(), lambda step, bad: bad_images.extend(bad)
    )
    masks = np.concatenate([batch["mask"] for batch in on_host(batches)])
    assert [name for name, _ in bad_images] == ["image 3", "image 6"]
    assert masks.tolist() == [index not in BAD for index in range(10)] + [False, False]


def test_hosts_load_disjoint_rows_of_the_same_batch() -> None:
    """Splits the rows of a batch among 1, 2 or 4 hosts."""
    reader = TrainReader(make_source(), 0, SIZE, AUGMENTED)
    steps = range(2, 5)

    def load(local_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chunks = Chunks(steps, local_rows, 20)
        positions = np.concatenate([chunk.positions for chunk in chunks])
        return positions, reader(positions).arrays["image"]

    _, one_host = load(np.arange(20))
    for num_hosts in (2, 4):
        parts = [load(local_rows) for local_rows in np.split(np.arange(20), num_hosts)]
        positions, images = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert sorted(positions) == list(range(40, 100))
        np.testing.assert_array_equal(images[np.argsort(positions)], one_host)


def test_chunks_fill_the_local_rows_of_their_batch() -> None:
    chunks = Chunks(range(3, 5), np.arange(5, 42), 100)
    assert chunks.chunks_per_batch == 3
    for number, step in enumerate((3, 4)):
        batch = np.full(chunks.num_rows, -1)
        for chunk in (chunks[3 * number + k] for k in range(3)):
            assert chunk.step == step
            assert len(chunk.positions) <= CHUNK_SIZE
            batch[chunk.rows] = chunk.positions
        assert batch.tolist() == list(range(100 * step + 5, 100 * step + 42))


class ManyExamples(Sequence[Example]):
    """A hundred examples, a tenth of them bad, that are cheap to send to worker processes."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: Any) -> Any:
        example = Example(
            image=RecordingSource()[index % 10]["image"], labels=(index,), name=f"{index}"
        )
        return example | {"image": b"broken"} if index % 10 == 7 else example


@pytest.mark.slow
def test_train_batches_do_not_depend_on_the_number_of_workers() -> None:
    # 20 images are two chunks; 7 steps are 14 chunks, which three workers share unevenly.
    batches, reports = {}, {}
    for num_workers in (1, 3):
        reports[num_workers] = bad_images = dict[int, list[BadImage]]()
        batches[num_workers] = small_train_batches(
            3,
            10,
            batch_size=20,
            preprocess=AUGMENTED,
            examples=ManyExamples(),
            num_workers=num_workers,
            on_bad_images=bad_images.__setitem__,
        )
    assert_identical(batches[1], batches[3])
    assert reports[1] == reports[3]
    assert len(reports[1]) > 2


@pytest.mark.parametrize(
    ("num_devices", "num_workers"),
    [(1, 1), (8, 1), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_batches_are_put_on_the_cpu_without_a_copy(
    num_devices: int, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[np.ndarray] = []

    def allocate(reader: TrainReader, num_rows: int) -> dict[str, np.ndarray]:
        arrays = original(reader, num_rows)
        allocated.append(arrays["image"])
        return arrays

    original = TrainReader.allocate
    monkeypatch.setattr(TrainReader, "allocate", allocate)
    batches = small_train_batches(
        0,
        2,
        batch_size=64,
        mesh=mesh_of(num_devices, 1),
        num_workers=num_workers,
        examples=ManyExamples(),
    )
    for batch in batches:
        for shard in batch["image"].addressable_shards:
            address = shard.data.unsafe_buffer_pointer()
            starts = [array.ctypes.data for array in allocated]
            assert any(start <= address < start + 64 * SIZE * SIZE * 3 for start in starts)


@pytest.mark.parametrize(
    ("cores", "num_workers", "num_threads", "expected"),
    [
        (2, 0, 0, (1, 2)),
        (8, 0, 0, (1, 8)),
        (96, 0, 0, (12, 8)),
        (96, 1, 0, (1, 96)),
        (96, 4, 3, (4, 3)),
        (2, 4, 0, (4, 1)),
    ],
)
def test_parallelism_follows_cores_and_shared_memory(
    cores: int,
    num_workers: int,
    num_threads: int,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr("mixer_jax.data.loader.shutil.disk_usage", lambda path: usage)
    assert _resolve_parallelism(num_workers, num_threads, 2_400_000) == expected
    # Docker's default is too small for twelve workers, unless the user requests them.
    usage.free = 64 * 2**20
    monkeypatch.setattr("mixer_jax.data.loader._SHARED_MEMORY", Path("/"))
    limited = (1, num_threads or cores) if num_workers == 0 and cores == 96 else expected
    assert _resolve_parallelism(num_workers, num_threads, 2_400_000) == limited
