"""Tests of the plan in a suite's folder: what may differ between starts, and what may not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.suites import plan, run
from mixer_jax.suites.datasets import resolve_folders
from mixer_jax.suites.plan import TransferPlan, check_workdir, params_digest, read_plan, save_plan
from mixer_jax.suites.run_configs import SuiteSettings
from mixer_jax.suites.tasks import FineTuneTask
from tests.helpers.lines import each_mentions
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import HIGH, PROBE, SUITE

WEIGHTS = random_weights()


def make_plan(overrides: tuple[tuple[str, str], ...] = (), **fields: Any) -> TransferPlan:
    sizes = {task.name: 16 for task in SUITE.tasks}
    return TransferPlan(
        SUITE, SuiteSettings("runs/a", WEIGHTS.model_info, "", overrides), sizes, **fields
    )


def test_a_digest_is_of_paths_shapes_and_bytes() -> None:
    params = WEIGHTS.params
    digest = params_digest(params)
    assert (
        digest
        == params_digest(random_weights().params)
        != params_digest(random_weights(seed=1).params)
    )
    # The order in which a file holds them says nothing.
    assert params_digest(dict(reversed(params.items()))) == digest
    array = np.arange(6, dtype=np.float32)
    trees: list[dict[str, Any]] = [
        {"a": array},
        {"b": array},
        {"a": array.reshape(2, 3)},
        {"a": {"a": array}},
    ]
    assert len({params_digest(tree) for tree in trees}) == 4
    # Not what lies between the numbers of a view.
    assert params_digest({"a": np.repeat(array, 2)[::2]}) == params_digest({"a": array})


def test_results_of_other_weights_are_not_taken_for_these(tmp_path: Path) -> None:
    save_plan(str(tmp_path), make_plan(digest="1"))
    with raises(UserError, str(tmp_path), "runs/a", "--workdir"):
        save_plan(str(tmp_path), make_plan(digest="2"))
    setting = SuiteSettings("runs/b", WEIGHTS.model_info)
    with raises(UserError, str(tmp_path), "checkpoint", "runs/a", "runs/b", "--workdir"):
        save_plan(str(tmp_path), make_plan(digest="2")._replace(setting=setting))


def test_judging_keeps_the_digest_of_what_was_loaded(tmp_path: Path) -> None:
    assert run._keep(make_plan(), str(tmp_path), WEIGHTS) == []
    kept = read_plan(str(tmp_path))
    assert kept is not None
    assert kept.digest == params_digest(WEIGHTS.params)
    with raises(UserError, str(tmp_path), "runs/a", "--workdir"):
        run._keep(make_plan(), str(tmp_path), random_weights(seed=1))


def test_only_the_first_host_writes_and_all_hear_of_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.multihost, "is_primary_process", lambda: False)
    assert run._keep(make_plan(), str(tmp_path), WEIGHTS) == []
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(run.multihost, "any_host", lambda flag: True)
    with raises(UserError):
        run._keep(make_plan(), str(tmp_path), WEIGHTS)
    assert not list(tmp_path.iterdir())


# Written by the code before configuration keys were renamed.
OLD_PLAN: dict[str, Any] = json.loads("""
{"suite": {"name": "tiny", "title": "a tiny suite", "tasks": [{"kind": "fine_tune", "name": "low",
"dataset": "digits/low", "num_classes": 5, "choose_split": "train[:80%]", "validation_split":
"train[80%:]", "train_split": "train", "test_split": "test", "num_examples": [], "num_steps": 20,
"warmup_steps": 2, "learning_rates": [0.01, 0.03], "batch_size": 16, "seeds": [0, 1], "large": null,
"train_crop": "shift", "flip": false, "eval_crop": "whole", "also": {}, "paper": "", "group": "",
"changes": {"recipe.accumulation_steps": 2, "preprocess.max_shift": 1}}, {"kind": "probe", "name":
"few", "dataset": "digits/low", "method": "few_shot", "train_split": "train", "test_split": "test",
"num_classes": 0, "num_examples": [], "shots": [1, 5], "seeds": [0], "large": null, "eval_crop": "",
"beside_fresh": false}], "paper": ""}, "checkpoint": "runs/a", "about": {"variant": "custom",
"widths": {"num_blocks": 1, "patch_size": 8, "hidden_dim": 16, "tokens_mlp_dim": 8,
"channels_mlp_dim": 16}, "image_size": [16, 16], "num_classes": 5, "class_names": [], "gelu":
"tanh", "eval_crop": "whole", "exif_orientation": false, "loss": "softmax", "dtype": "auto",
"resolution": ""}, "data_dir": "", "overrides": {"loader.threads": "2", "optimizer.decay": "none"},
"image_sizes": {"low": 16, "few": 16}, "pretrained_on": "i21k", "device_days": 1.5, "digest": "abc",
"data_notes": ["a note"], "pretrained_on_assumed": true}
""")


def test_read_plan_translates_old_spellings(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(OLD_PLAN))
    kept = read_plan(str(tmp_path))
    assert kept is not None
    low, probe = kept.suite.tasks
    assert isinstance(low, FineTuneTask)
    assert (low.train_crop, low.eval_crop, probe.eval_crop) == ("random_shift", "resize", "")
    assert low.changes == {"recipe.grad_accum_steps": 2, "preprocess.max_shift": 1}
    assert kept.setting.overrides == (("loader.num_threads", "2"), ("optimizer.decay_type", "none"))
    assert kept.about.eval_crop == "resize"
    assert (kept.pretrain_dataset, kept.pretrain_dataset_assumed) == ("i21k", True)
    # The same suite started again is the same suite.
    assert save_plan(str(tmp_path), kept) == []
    assert kept.final(low, 0.01)[0].config.optimizer.decay_type == "none"


def test_keys_that_do_no_harm_may_change_between_starts(tmp_path: Path) -> None:
    first = (("optimizer.momentum", "0.5"), ("loader.num_threads", "2"))
    assert save_plan(str(tmp_path), make_plan(first)) == []
    then = (("optimizer.momentum", "0.5"), ("loader.num_threads", "3"), ("log_every_steps", "9"))
    changes = save_plan(str(tmp_path), make_plan(then))
    assert each_mentions(changes, ("loader.num_threads", "2", "3"), ("log_every_steps", "9"))
    kept = read_plan(str(tmp_path))
    assert kept is not None
    assert kept.setting.overrides == then
    with raises(UserError, "overrides.optimizer.momentum", "0.5"):
        save_plan(str(tmp_path), make_plan())


def test_what_is_told_and_where_data_lie_makes_no_other_suite(tmp_path: Path) -> None:
    save_plan(str(tmp_path), make_plan(device_days=1.0, data_notes=("a", "b")))
    suite = dataclasses.replace(SUITE, title="other words")
    setting = SuiteSettings("runs/a", WEIGHTS.model_info, "/data")
    plan = make_plan(data_notes=("b", "c"))._replace(suite=suite, setting=setting)
    assert save_plan(str(tmp_path), plan) == []
    kept = read_plan(str(tmp_path))
    assert kept is not None
    # Of several shares each sees the data of its own tasks.
    assert kept.data_notes == ("a", "b", "c")
    assert (kept.device_days, kept.setting.data_dir) == (1.0, "/data")


OTHER = make_plan((("batch_size", "64"),))


def overrides_in(workdir: Path) -> Any:
    kept = read_plan(str(workdir))
    assert kept is not None
    return kept.setting.overrides


def test_of_two_suites_begun_at_once_the_first_has_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = plan.read_plan, iter([save_plan])

    def read_too_early(workdir: str) -> TransferPlan | None:
        """Finds nothing, and then the other program writes."""
        for save in times:
            assert save(workdir, OTHER) == []
            return None
        return read(workdir)

    monkeypatch.setattr(plan, "read_plan", read_too_early)
    with raises(UserError, str(tmp_path), "overrides.batch_size", "64", "--workdir"):
        save_plan(str(tmp_path), make_plan())
    monkeypatch.undo()
    assert overrides_in(tmp_path) == OTHER.setting.overrides
    assert [path.name for path in tmp_path.iterdir()] == ["suite.json"]


def test_where_there_are_no_links_the_last_has_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = plan.atomic_write

    def refuse(*arguments: Any) -> None:
        raise PermissionError("no links here")

    def write_first(path: Any, ours: str) -> None:
        write_whole(path, ours)
        write_whole(path, json.dumps(plan.to_json(OTHER)))

    monkeypatch.setattr(plan.os, "link", refuse)
    with monkeypatch.context() as alone:
        alone.setattr(plan, "atomic_write", write_first)
        with raises(UserError, f"{tmp_path}/a", "overrides.batch_size", "64", "--workdir"):
            save_plan(str(tmp_path / "a"), make_plan())
    assert overrides_in(tmp_path / "a") == OTHER.setting.overrides
    assert save_plan(str(tmp_path / "b"), OTHER) == []
    assert overrides_in(tmp_path / "b") == OTHER.setting.overrides
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["suite.json"]


@pytest.mark.parametrize("inside", ["config.json", "checkpoints"])
def test_the_folder_of_a_run_is_refused(inside: str, tmp_path: Path) -> None:
    check_workdir(str(tmp_path))
    (tmp_path / inside).mkdir()
    with raises(UserError, str(tmp_path), "mixer_jax.main", "--workdir"):
        check_workdir(str(tmp_path))


def test_folders_of_images_mean_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    tasks = (
        dataclasses.replace(HIGH, dataset="folder:a", also={"b": ("folder:../b", "test")}),
        dataclasses.replace(PROBE, dataset="folder:~/c"),
        dataclasses.replace(PROBE, name="d", dataset="digits/high"),
    )
    a, c, d = resolve_folders(dataclasses.replace(SUITE, tasks=tasks)).tasks
    assert (a.dataset, c.dataset) == (f"folder:{tmp_path}/a", "folder:/home/me/c")
    assert isinstance(a, FineTuneTask)
    assert a.also == {"b": (f"folder:{tmp_path.parent}/b", "test")}
    assert d.dataset == "digits/high"
