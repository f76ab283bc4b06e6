"""Tests of what a user changes for a whole suite, and of probes that cannot be learnt."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.evaluation.probes import ProbeConfig
from mixer_jax.suites import datasets, probe_tasks, run
from mixer_jax.suites.datasets import check_probe_data, open_task_data
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.run import TransferRequest, run_suite
from mixer_jax.suites.run_configs import SuiteSettings
from mixer_jax.suites.tasks import Suite
from tests.helpers.images import encode, photograph
from tests.helpers.lines import each_mentions
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import HIGH, PROBE, SUITE, save_weights

WEIGHTS = random_weights()
OVERRIDES = (
    ("optimizer.momentum", "0.5"),
    ("optimizer.momentum", "0.8"),
    ("loader.num_threads", "3"),
    ("loader.prefetch_batches", "5"),
    ("eval_batch_size", "24"),
    ("bad_images.skip_in_evaluation", "true"),
    ("mesh.fsdp", "2"),
)


def test_what_changes_the_outcome_is_told_apart_from_what_does_not() -> None:
    setting = SuiteSettings("runs/a", WEIGHTS.model_info, "", OVERRIDES)
    assert setting.protocol_overrides == (("optimizer.momentum", "0.8"),)
    assert setting.config().loader.num_threads == 3
    assert SuiteSettings("runs/a", WEIGHTS.model_info).config().eval_batch_size == 256


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {"batch_size": 256, "skip_bad": False, "num_threads": 0, "prefetch_batches": 2}),
        (OVERRIDES, {"batch_size": 24, "skip_bad": True, "num_threads": 3, "prefetch_batches": 5}),
    ],
)
def test_probes_obey_the_keys(
    overrides: Any, expected: Any, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def run(feature_fn: Any, params: Any, settings: ProbeConfig, *data: Any) -> Any:
        _, _, mesh, reading = data
        seen.append(reading._asdict() | {"fsdp": mesh.shape["fsdp"]})
        return SimpleNamespace(format_progress=lambda: "", as_dict=lambda: {"1_shot": 0.5})

    monkeypatch.setattr(probe_tasks, "run_probe", run)
    setting = SuiteSettings("runs/a", WEIGHTS.model_info, digits_dir, overrides)
    plan = TransferPlan(SUITE, setting, {PROBE.name: 16})
    probe_tasks.run_probe_task(plan, PROBE, WEIGHTS, str(tmp_path), lambda text: None)
    (how,) = seen
    assert {name: how[name] for name in expected} == expected
    assert how["fsdp"] == (2 if overrides else 1)


def make_folder(root: Path, counts: dict[str, int]) -> str:
    for split in ("train", "test"):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = encode(photograph()[number : number + 16, :16], "PNG")
                (root / split / name / f"{number}.png").write_bytes(image)
    return f"folder:{root}"


def test_too_few_images_of_a_class_are_told_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path, {"a": 5, "b": 3})
    task = dataclasses.replace(PROBE, dataset=folder)
    data = open_task_data((task,), "")
    with raises(UserError, "probe", folder, "b", "3", "5"):
        check_probe_data((task,), data, skip_bad=False)
    for fine in (dataclasses.replace(task, shots=(1, 3)), dataclasses.replace(task, method="knn")):
        check_probe_data((fine,), data, skip_bad=False)
    # Of many images labels are not read before.
    monkeypatch.setattr(datasets, "_MOST_LABELS", 7)
    check_probe_data((task,), data, skip_bad=False)


def test_probes_on_other_classes_are_told_before_anything_begins(digits_dir: str) -> None:
    low, high = (open_dataset(f"digits/{part}", "train", digits_dir) for part in ("low", "high"))
    data = open_task_data((), "")._replace(sources={PROBE.name: [low, high]})
    with raises(UserError, "probe", "digits/high", *"0123456789"):
        check_probe_data((PROBE,), data, skip_bad=False)
    # Data that are not there are told otherwise.
    check_probe_data((PROBE, HIGH), open_task_data((), ""), skip_bad=False)


class EnoughError(Exception):
    """Ends judging where the test has seen what it is for."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("weights"))


def make_wish(
    weights: str, suite: Suite, data_dir: str, workdir: Path, **fields: Any
) -> TransferRequest:
    usual: dict[str, Any] = {"overrides": (), "image_size": "native", "tasks": (), "shard": (1, 1)}
    for name in ("dry_run", "keep_checkpoints", "throughput"):
        usual[name] = False
    place = resolve_checkpoint(weights)
    wish = {
        **usual,
        "pretrain_dataset": "",
        "data_dir": data_dir,
        "workdir": str(workdir),
        **fields,
    }
    return TransferRequest(suite=suite, place=place, **wish)


def begin(*arguments: Any, **fields: Any) -> None:
    run_suite(make_wish(*arguments, **fields))


def test_hosts_are_joined_as_the_key_says(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def join(mode: str, timeout_seconds: int) -> None:
        assert timeout_seconds == 300
        modes.append(mode)
        raise EnoughError

    monkeypatch.setattr(run.multihost, "initialize_distributed", join)
    for overrides in ((), (("distributed", "no"),)):
        with pytest.raises(EnoughError):
            begin(weights, SUITE, digits_dir, tmp_path, overrides=overrides)
    assert modes == ["auto", "no"]


def test_shots_are_checked_before_hosts_join(weights: str, digits_dir: str, tmp_path: Path) -> None:
    task = dataclasses.replace(PROBE, shots=(1, 500))
    suite = dataclasses.replace(SUITE, tasks=(task,))
    for dry_run in (False, True):
        with raises(UserError, "probe", "digits/high", "500"):
            begin(weights, suite, digits_dir, tmp_path / "suite", dry_run=dry_run)
    assert not (tmp_path / "suite").exists()


@pytest.mark.parametrize(
    ("dataset", "wish", "told", "assumed"),
    [
        ("", "", "i1k", True),
        ("", "i1k", "i1k", False),
        ("", "none", "", False),
        ("imagenet2012", "", "i1k", False),
    ],
)
def test_what_is_assumed_of_pretraining_is_marked(
    dataset: str, wish: str, told: str, assumed: bool, weights: str, tmp_path: Path
) -> None:
    names = tuple(map(str, range(1_000)))
    thousand = random_weights(class_names=names)._replace(
        train_config={"dataset": {"name": dataset}, "init_from": ""}
    )
    asked = make_wish(weights, SUITE, "", tmp_path, pretrain_dataset=wish)
    asked = asked._replace(place=asked.place._replace(format="npz"))
    plan = run._make_plan(asked, thousand, open_task_data((), ""))
    assert (plan.pretrain_dataset, plan.pretrain_dataset_assumed) == (told, assumed)


def test_the_plan_knows_of_odd_data_and_of_folders(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "images", {"a": 2, "b": 2})
    monkeypatch.chdir(tmp_path)
    kept: list[TransferPlan] = []

    def keep(plan: TransferPlan, workdir: str, weights: Any) -> Any:
        kept.append(plan)
        raise EnoughError

    monkeypatch.setattr(run, "_keep", keep)
    tasks = (
        dataclasses.replace(PROBE, num_examples=(729, 168)),
        dataclasses.replace(PROBE, name="mine", dataset="folder:images", shots=(1,)),
    )
    suite = dataclasses.replace(SUITE, tasks=tasks)
    with pytest.raises(EnoughError):
        begin(weights, suite, digits_dir, tmp_path / "suite")
    (plan,) = kept
    assert each_mentions(plan.data_notes, ("digits/high", "test", "167", "168"))
    # The run's ten classes tell nothing.
    assert (plan.pretrain_dataset, plan.pretrain_dataset_assumed) == ("", False)
    assert plan.suite.tasks[1].dataset == f"folder:{tmp_path}/images"
