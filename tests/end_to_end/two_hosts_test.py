"""Tests of runs on two hosts, which are real processes, and of how one host ends both."""

import collections
import functools
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.training.metrics import read_metrics
from tests.helpers.images import encode, noise
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    final_arrays,
    finish,
    first_reported_step,
    has_reached,
    host_env,
    reports_stop,
    start,
    start_two_hosts,
    untimed_metrics,
    wait_until,
)
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow

STEPS = 20
# Exit codes after the loss of a host, of a failed collective and of JAX's abort. Not 2, which would
# mean that a retry is useless.
LOST_HOST = (1, -signal.SIGABRT)
Runs = dict[str, Path]


def write_images(folder: Path, train: int, bad: int) -> str:
    """Writes images of two classes, one of `bad` of them empty, and returns the dataset's name."""
    for split, count in (("train", train), ("test", 40)):
        for index in range(count):
            path = folder / split / f"{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if index % bad == 7 % bad else encode(noise(8, 8), "PNG"))
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run of one epoch, whose logs of bad images show which step reads each image."""
    return NO_REGULARIZATION | {
        "dataset__name": write_images(tmp_path_factory.mktemp("images"), train=400, bad=3),
        "bad_images__max_fraction": 1.0,
        "bad_images__skip_in_evaluation": True,
        "num_steps": STEPS,
        "model__dropout": 0.1,
        "model__stochastic_depth": 0.1,
        "recipe__mixup": 0.2,
        "log_every_steps": 1,
        "checkpoint__every_steps": 6,
        "evals__test__every_steps": 0,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Runs:
    """Workdirs of the same run on one host with four devices and on two hosts with two each."""
    folder = tmp_path_factory.mktemp("runs")
    finish(start("", folder / "one", {"JAX_NUM_CPU_DEVICES": "4"}, **settings))
    for name, fsdp in (("two", 1), ("split", 2)):
        both = start_two_hosts("", folder / name, **settings, mesh__fsdp=fsdp)
        outs = [finish(process) for process in both]
        # Only the primary process prints.
        assert ("checkpoint" in outs[0], "checkpoint" in outs[1]) == (True, False)
    return {name: folder / name for name in ("one", "two", "split")}


def bad_image_steps(workdir: Path) -> dict[str, int]:
    """Returns the first step of each bad image, from the logs of all hosts."""
    steps = collections.defaultdict[str, list[int]](list)
    for log in workdir.glob("bad_images_*.jsonl"):
        for line in map(json.loads, log.read_text().splitlines()):
            steps[line["name"]].append(line["step"])
    return {name: min(found) for name, found in steps.items()}


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(str(workdir)) if "loss" in line}


@pytest.mark.parametrize("name", ["two", "split"])
def test_two_hosts_compute_the_same_as_one(runs: Runs, name: str) -> None:
    expected, actual = losses(runs["one"]), losses(runs[name])
    assert [*actual] == [*expected] == [*range(1, STEPS + 1)]
    np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=1e-6)
    examples = bad_image_steps(runs["one"])
    assert len(examples) > 80
    assert bad_image_steps(runs[name]) == examples
    # Both hosts read a part of the images.
    assert (runs[name] / "bad_images_1.jsonl").stat().st_size > 0
    one, two = (read_metrics(str(runs[which]))[-1] for which in ("one", name))
    for key in ("test/num_examples", "test/num_bad", "test/top1", "test/top5"):
        assert two[key] == one[key]
    assert (one["test/num_examples"], one["test/num_bad"]) == (27, 13)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset__name": "mixer_shapes", "recipe__loss": "sigmoid"},
        {"recipe__class_weights": "balanced"},
    ],
    ids=["multi_label", "class_weights"],
)
def test_two_hosts_have_the_same_labels_and_weights_as_one(
    changes: dict[str, Any], settings: dict[str, Any], shapes_dir: str, tmp_path: Path
) -> None:
    settings = settings | changes | {"num_steps": 6}
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(shapes_dir, one, {"JAX_NUM_CPU_DEVICES": "4"}, **settings))
    outs = [finish(process) for process in start_two_hosts(shapes_dir, two, **settings)]
    assert ("class weights" in outs[0]) == ("recipe__class_weights" in changes)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    expected, actual = (read_metrics(str(workdir))[-1] for workdir in (one, two))
    names = [key for key in expected if key.startswith("test/")]
    assert {key: actual[key] for key in names} == pytest.approx(
        {key: expected[key] for key in names}, rel=1e-5
    )


def test_a_killed_host_ends_the_other_and_the_run_resumes_bit_identically(
    runs: Runs, settings: dict[str, Any], tmp_path: Path
) -> None:
    for killed, step in ((0, 8), (1, 14)):
        both = start_two_hosts("", tmp_path, **settings)
        wait_until(functools.partial(has_reached, tmp_path, step), both[0])
        both[killed].kill()
        errors = [process.communicate(timeout=60)[1] for process in both]
        assert both[killed].returncode == -signal.SIGKILL
        assert both[1 - killed].returncode in LOST_HOST, errors
        assert "Traceback" not in errors[1 - killed], errors
    saved = list_steps(str(tmp_path))
    assert saved in ([], [6], [6, 12], [12, 18])

    outs = [finish(process) for process in start_two_hosts("", tmp_path, **settings)]
    assert first_reported_step(outs[0]) == max(saved, default=1)
    assert untimed_metrics(tmp_path) == untimed_metrics(runs["two"])
    assert bad_image_steps(tmp_path) == bad_image_steps(runs["two"])
    assert_final_arrays_equal(runs["two"], tmp_path)


def assert_final_arrays_equal(expected_run: Path, actual_run: Path) -> None:
    expected, actual = final_arrays(expected_run, STEPS), final_arrays(actual_run, STEPS)
    assert expected.keys() == actual.keys() == {"params", "optimizer"}
    for item, arrays in expected.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)


def flip_bit_verified_by(host: int, step: Path) -> str:
    """Flips a bit of an array in a file that this host of two verifies, and returns the file."""
    files = json.loads((step / "checksums.json").read_text())["files"]
    # Each file is small enough to be one part, and the hosts verify every other part.
    file = next(name for name in [*files][host::2] if "/d/" in name)
    data = bytearray((step / file).read_bytes())
    data[len(data) // 2] ^= 1
    (step / file).write_bytes(data)
    return file


@pytest.mark.parametrize("damage", ["host 0", "host 1", "no checksums"])
def test_two_hosts_resume_from_the_checkpoint_before_a_damaged_one(
    damage: str, runs: Runs, settings: dict[str, Any], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(runs["two"], workdir)
    damaged = workdir / "checkpoints" / str(STEPS)
    if damage == "no checksums":
        # Only the metadata says that there were some.
        file = "checksums.json"
        (damaged / file).unlink()
    else:
        file = flip_bit_verified_by(int(damage[-1]), damaged)
    outs = [finish(process) for process in start_two_hosts("", workdir, **settings)]
    notes = [sum(mentions(line, str(damaged), file) for line in out.splitlines()) for out in outs]
    assert notes == [1, 0]
    assert any(mentions(line, "resuming", "18") for line in outs[0].splitlines())
    assert [path.name for path in (workdir / "damaged_checkpoints").iterdir()] == [str(STEPS)]
    assert list_steps(str(workdir)) == [18, STEPS]
    assert untimed_metrics(workdir) == untimed_metrics(runs["two"])
    assert_final_arrays_equal(runs["two"], workdir)


def test_a_usage_error_on_one_host_ends_the_other(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad_images_1.jsonl").write_text("no log\n")
    both = start_two_hosts("", tmp_path, num_devices=1, **settings)
    errors = [process.communicate(timeout=90)[1] for process in both]
    assert both[1].returncode == 2, errors
    assert both[0].returncode in LOST_HOST, errors
    assert mentions(errors[1], str(tmp_path / "bad_images_1.jsonl"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs paths that depend on the process")
@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_data_that_one_host_lacks_are_an_error_on_both(
    kind: str, digits_dir: str, root: Path, tmp_path: Path
) -> None:
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        (host / "data").mkdir(parents=True)
    # A path that exists in the working directory of one process only.
    data = "/proc/self/cwd/data"
    settings: dict[str, Any] = {}
    if kind == "folder":
        write_images(hosts[0] / "data", train=40, bad=40)
        settings["dataset__name"] = f"folder:{data}"
    else:
        shutil.copytree(f"{digits_dir}/digits", hosts[0] / "data" / "digits")
    workdir = tmp_path / "run"
    both = [
        start(data, workdir, {**env, "PYTHONPATH": str(root)}, cwd=host, **settings)
        for env, host in zip(host_env(2, num_devices=1), hosts, strict=True)
    ]
    errors = [process.communicate(timeout=90)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    for error in errors:
        assert mentions(error.splitlines()[-1], "host 1", data)
    assert list_steps(str(workdir)) == []


def test_a_host_whose_peer_never_joins_ends(settings: dict[str, Any], tmp_path: Path) -> None:
    # Each waits for the other process of a different run.
    envs = [host_env(2, num_devices=1)[process_id] for process_id in range(2)]
    waiting = [start("", tmp_path, env, **settings, distributed_timeout=2) for env in envs]
    for process in waiting:
        _, errors = process.communicate(timeout=60)
        assert process.returncode in LOST_HOST, errors
    assert list_steps(str(tmp_path)) == []


def test_a_signal_to_one_host_stops_both_at_one_step(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    # Does not end before it is stopped.
    endless = settings | {"num_steps": 100_000, "checkpoint__every_steps": 0}
    both = start_two_hosts("", tmp_path, **endless)
    wait_until(functools.partial(has_reached, tmp_path, 3), both[0])
    both[1].send_signal(signal.SIGTERM)
    outs = [finish(process, 143) for process in both]
    (saved,) = list_steps(str(tmp_path))
    assert reports_stop(outs[0], tmp_path, saved, 100_000)
    assert "checkpoint" not in outs[1]
    assert max(losses(tmp_path)) == saved
    # A single host with one device resumes the run.
    alone = start("", tmp_path, **endless)
    wait_until(functools.partial(has_reached, tmp_path, saved + 3), alone)
    alone.send_signal(signal.SIGTERM)
    assert first_reported_step(finish(alone, 143)) == saved
    assert [*losses(tmp_path)] == [*range(1, max(losses(tmp_path)) + 1)]


def test_two_hosts_load_the_same_weights_and_agree_on_bad_images(tmp_path: Path) -> None:
    """One bad image of 40, which only one host reads, is too many for both."""
    weights = random_weights(MixerConfig(1, 4, 16, 8, 16), (8, 8))
    settings: dict[str, Any] = NO_REGULARIZATION | {
        "dataset__name": write_images(tmp_path / "images", train=40, bad=40),
        "init_from": save_run(weights, tmp_path / "source"),
        "bad_images__max_count": 0,
        "num_steps": 20,
    }
    both = start_two_hosts("", tmp_path / "run", **settings)
    outs, errors = zip(*(process.communicate(timeout=180) for process in both), strict=True)
    assert [process.returncode for process in both] == [1, 1], errors
    # Both hosts load the pretrained weights, and the primary process reports it.
    init_info = (settings["init_from"], "8", "Appendix C", "head")
    assert any(mentions(line, *init_info) for line in outs[0].splitlines())
    for error in errors:
        assert mentions(error, "1", "40", "max_fraction")
    assert list_steps(str(tmp_path / "run")) == [10]
    # With a higher limit the run resumes and ends; its evaluation fails.
    both = start_two_hosts("", tmp_path / "run", bad_images__max_fraction=0.1, **settings)
    errors = tuple(process.communicate(timeout=180)[1] for process in both)
    assert [process.returncode for process in both] == [2, 2], errors
    assert list_steps(str(tmp_path / "run"))[-1] == 20
    # The host that read it names it.
    assert sum("test/1/7.png" in error for error in errors) == 1
    assert all(mentions(error, "1", "skip_in_evaluation") for error in errors)
