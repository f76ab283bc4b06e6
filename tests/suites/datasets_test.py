"""Tests of a suite's data: available and missing splits, image sizes, data for probes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.suites import datasets
from mixer_jax.suites.builtin import AVG5, SUITES
from mixer_jax.suites.datasets import (
    check_available,
    check_probe_data,
    choose_image_size,
    open_task_data,
    resolve_folders,
)
from mixer_jax.suites.tasks import FineTuneTask
from tests.helpers.images import encode, photograph
from tests.helpers.lines import each_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_suite import HIGH, LARGE_INFO, LOW, PROBE, SUITE, TINY_INFO


def make_folder(root: Path, counts: dict[str, int], size: int = 16) -> str:
    """Writes images of each class into the splits train and test; returns the dataset's name."""
    for split in ("train", "test"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = encode(photograph()[index : index + size, :size], "PNG")
                (root / split / name / f"{index}.png").write_bytes(image)
    return f"folder:{root}"


def test_choose_image_size_for_vtab() -> None:
    def sizes(requested: str) -> dict[str, int]:
        tasks = SUITES["vtab1k"].tasks
        return {task.name: choose_image_size(task, requested, LARGE_INFO, []) for task in tasks}

    auto = sizes("auto")
    small = {name for name, size in auto.items() if size == 224}
    assert small == {"cifar100", "svhn", "eurosat", "dsprites_position", "dsprites_orientation"}
    assert {size for name, size in auto.items() if name not in small} == {448}
    assert set(sizes("native").values()) == {224}
    assert set(sizes("384").values()) == {384}


def test_choose_image_size_measures_images_of_unknown_size(tmp_path: Path) -> None:
    task = dataclasses.replace(LOW, is_large_image=None)
    sizes = {}
    for size in (95, 96):
        source = open_dataset(make_folder(tmp_path / str(size), {"a": 3}, size), "train")
        sizes[size] = choose_image_size(task, "auto", TINY_INFO, [source])
    assert sizes == {95: 16, 96: 32}


@pytest.mark.parametrize(
    ("requested", "model_info", "parts"),
    [
        ("230", LARGE_INFO, ("image_size", "230", "patch_size", "16", "224", "240")),
        (
            "native",
            dataclasses.replace(TINY_INFO, image_size=(16, 32)),
            ("16", "32", "--image_size=16"),
        ),
    ],
)
def test_choose_image_size_rejects_invalid_sizes(
    requested: str, model_info: Any, parts: tuple[str, ...]
) -> None:
    with raises(UserError, *parts):
        choose_image_size(LOW, requested, model_info, [])


def test_check_available_names_missing_data_and_the_fix(tmp_path: Path, digits_dir: str) -> None:
    tasks = SUITES["avg5"].tasks
    data = open_task_data(tasks, str(tmp_path))
    with raises(UserError, "5", *(task.name for task in tasks), "--dry_run"):
        check_available(tasks, data)
    text = "\n".join(data.hints)
    assert mentions(text, f"python -m mixer_jax.prepare imagenet2012 --data_dir={tmp_path}")
    assert mentions(text, f"python -m mixer_jax.prepare cifar10 --data_dir={tmp_path}")
    # The file to download manually.
    assert "ILSVRC2012_img_val.tar" in text
    mixed = (HIGH, AVG5[1])
    with raises(UserError, "1", "2", "cifar10", "--dry_run", "--tasks=high"):
        check_available(mixed, open_task_data(mixed, digits_dir))
    with raises(
        UserError, "cifar10", f"python -m mixer_jax.prepare cifar10 --data_dir={digits_dir}"
    ):
        check_available(mixed[1:], open_task_data(mixed[1:], digits_dir))


def test_open_task_data_compares_sizes_and_classes(digits_dir: str) -> None:
    task = dataclasses.replace(HIGH, num_examples=(656, 73, 729, 168))
    data = open_task_data((task,), digits_dir)
    assert each_mentions(data.notes, ("digits/high", "test", "167", "168"))
    with raises(UserError, "high", "digits/high", "5", "6"):
        open_task_data((dataclasses.replace(HIGH, num_classes=6),), digits_dir)


def test_check_probe_data_rejects_too_few_images_per_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, {"a": 5, "b": 3})
    task = dataclasses.replace(PROBE, dataset=folder)
    data = open_task_data((task,), "")
    with raises(UserError, "probe", folder, "b", "3", "5"):
        check_probe_data((task,), data, skip_bad=False)
    for valid in (dataclasses.replace(task, shots=(1, 3)), dataclasses.replace(task, method="knn")):
        check_probe_data((valid,), data, skip_bad=False)
    # Labels of large datasets are not read in advance.
    monkeypatch.setattr(datasets, "_MAX_LABELS", 7)
    check_probe_data((task,), data, skip_bad=False)


def test_check_probe_data_rejects_other_classes(digits_dir: str) -> None:
    low, high = (open_dataset(f"digits/{part}", "train", digits_dir) for part in ("low", "high"))
    data = open_task_data((), "")._replace(sources={PROBE.name: [low, high]})
    with raises(UserError, "probe", "digits/high", *"0123456789"):
        check_probe_data((PROBE,), data, skip_bad=False)


def test_check_probe_data_ignores_missing_data() -> None:
    check_probe_data((PROBE, HIGH), open_task_data((), ""), skip_bad=False)


def test_resolve_folders_makes_paths_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    tasks = (
        dataclasses.replace(HIGH, dataset="folder:a", extra_evals={"b": ("folder:../b", "test")}),
        dataclasses.replace(PROBE, dataset="folder:~/c"),
        dataclasses.replace(PROBE, name="d", dataset="digits/high"),
        dataclasses.replace(PROBE, name="e", dataset="manifest:e.csv@genus"),
        dataclasses.replace(PROBE, name="f", dataset="wds:~/{a,b}.tar"),
        dataclasses.replace(PROBE, name="g", dataset="hf:g"),
        dataclasses.replace(PROBE, name="h", dataset="hf:owner/g"),
        dataclasses.replace(PROBE, name="i", dataset="hf:g@coarse"),
    )
    (tmp_path / "g").mkdir()
    a, c, d, e, f, g, h, i = resolve_folders(dataclasses.replace(SUITE, tasks=tasks)).tasks
    assert (a.dataset, c.dataset) == (f"folder:{tmp_path}/a", "folder:/home/me/c")
    assert isinstance(a, FineTuneTask)
    assert a.extra_evals == {"b": (f"folder:{tmp_path.parent}/b", "test")}
    assert d.dataset == "digits/high"
    assert e.dataset == f"manifest:{tmp_path}/e.csv@genus"
    assert f.dataset == "wds:/home/me/{a,b}.tar"
    assert (g.dataset, h.dataset) == (f"hf:{tmp_path}/g", "hf:owner/g")
    assert i.dataset == f"hf:{tmp_path}/g@coarse"
