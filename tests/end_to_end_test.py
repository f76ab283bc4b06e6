"""Tests of the program as a user starts it: real processes, killed, interrupted and resumed."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mixer_jax.training.metrics import TIMINGS, read_metrics
from mixer_jax.weights.steps import list_steps
from tests.door import run_door
from tests.images import encode, noise, photograph, png_that_claims, smooth, turned
from tests.small_run import as_arguments

# Large enough that saving it takes a moment in which to be killed.
STEPS = 150
RUN = {
    "num_steps": STEPS,
    "model__channels_mlp_dim": 256,
    "model__dropout": 0.1,
    "recipe__ema_decay": 0.9,
    # Not a divisor of the checkpoints' interval: a mean over steps outlives a kill.
    "log_every_steps": 4,
    "checkpoint__every_steps": 10,
    "evals__test__every_steps": 50,
}


def start(
    data_dir: str,
    workdir: Path,
    env: dict[str, str] | None = None,
    new_group: bool = False,
    **changes: Any,
) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.main", "--config=configs/digits.py"]
    arguments = as_arguments(data_dir, **{**RUN, **changes})
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})},
        start_new_session=new_group,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, f"{out}\n{err}"
    return out


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.0005)


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(str(workdir))), default=0)


def unfinished_saves(workdir: Path) -> list[Path]:
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def has_reached(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step


def is_saving(workdir: Path, done: int) -> bool:
    return last_step(workdir) > done and unfinished_saves(workdir) != []


def final_arrays(workdir: Path) -> dict[str, list[np.ndarray]]:
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        assert manager.latest_step() == STEPS
        items = ("params", "ema_params", "optimizer")
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore() for item in items})
        restored = manager.restore(STEPS, args=args)
    return {item: [np.asarray(x) for x in jax.tree.leaves(restored[item])] for item in items}


def untimed_metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(str(workdir))
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(digits_dir, workdir))
    return workdir


def test_killed_and_resumed_equals_never_interrupted(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    # At a random step, between two checkpoints or on one.
    step = random.SystemRandom().randint(11, 25)
    process = start(digits_dir, tmp_path)
    wait_until(lambda: last_step(tmp_path) >= step, process)
    process.kill()
    process.communicate()
    # Saving is asynchronous: the newest save may not have been finished.
    assert set(list_steps(str(tmp_path))) <= {10, 20}, step

    # While a checkpoint is being written: a save may end just before the kill, so try again then.
    for done in (20, 25, 30):
        process = start(digits_dir, tmp_path)
        wait_until(functools.partial(is_saving, tmp_path, done), process)
        process.kill()
        process.communicate()
        if unfinished_saves(tmp_path):
            break
    assert unfinished_saves(tmp_path)
    assert list_steps(str(tmp_path))[-1] < STEPS

    # By a scheduler, which is polite.
    process = start(digits_dir, tmp_path)
    wait_until(lambda: last_step(tmp_path) >= 45, process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=0)
    saved = list_steps(str(tmp_path))[-1]
    assert 45 <= saved < STEPS
    assert f"stopped at step {saved} of {STEPS}" in out

    # And to the end.
    out = finish(start(digits_dir, tmp_path))
    assert f"goes on after step {saved}" in out
    assert unfinished_saves(tmp_path) == []
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)
    expected, actual = final_arrays(uninterrupted), final_arrays(tmp_path)
    for item, arrays in expected.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{item} (killed at step {step})")


def test_ctrl_c_saves_and_exits_with_130(digits_dir: str, tmp_path: Path) -> None:
    process = start(digits_dir, tmp_path, checkpoint__every_steps=0)
    wait_until(lambda: last_step(tmp_path) >= 3, process)
    process.send_signal(signal.SIGINT)
    out = finish(process, code=130)
    (saved,) = list_steps(str(tmp_path))
    assert f"stopped at step {saved} of {STEPS}" in out
    assert "the same command goes on from there" in out


def start_two_hosts(
    data_dir: str, workdir: Path, **changes: Any
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Starts one run on two hosts: processes of two devices each, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    meeting = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    first, second = (
        start(data_dir, workdir, {**meeting, "JAX_PROCESS_ID": str(i)}, **changes) for i in range(2)
    )
    return first, second


def test_two_hosts_stop_and_go_on_together_and_then_one_alone(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    saved = 0
    for step in (12, 24):  # The second time, both go on together from the common checkpoint.
        first, second = start_two_hosts(digits_dir, tmp_path, mesh__fsdp=2)
        wait_until(functools.partial(has_reached, tmp_path, max(step, saved + 4)), first)
        second.send_signal(signal.SIGTERM)
        outs = [finish(process) for process in (first, second)]
        assert saved == 0 or f"goes on after step {saved}" in outs[0]
        assert list_steps(str(tmp_path))[-1] > saved
        saved = list_steps(str(tmp_path))[-1]
        assert f"stopped at step {saved} of {STEPS}" in outs[0]
        # What all share, one host says and writes.
        assert "stopped" not in outs[1]

    out = finish(start(digits_dir, tmp_path))
    assert f"goes on after step {saved}" in out
    expected, actual = untimed_metrics(uninterrupted), untimed_metrics(tmp_path)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for a, b in zip(actual, expected, strict=True):
        # Rounding differs with the number of devices, and grows as training goes on.
        if "loss" in a and a["step"] <= 60:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        elif "loss" not in a:
            assert a["test/num_examples"] == b["test/num_examples"] == 360


def test_two_hosts_agree_on_bad_images(tmp_path: Path) -> None:
    """One bad image of 40, which one host or the other meets, is too many for both."""
    for split in ("train", "test"):
        for index in range(40):
            path = tmp_path / "images" / split / f"{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if index == 7 else encode(noise(8, 8), "PNG"))
    settings: dict[str, Any] = {"dataset__name": f"folder:{tmp_path}/images", "num_steps": 30}
    both = start_two_hosts("", tmp_path / "run", **settings)
    errors = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], errors
    for error in errors:
        assert "1 of 40 training images cannot be used" in error
    assert list_steps(str(tmp_path / "run")) == [10]
    # The run can go on, to its evaluation, of which the same is true.
    both = start_two_hosts("", tmp_path / "run", bad_images__max_share=0.1, **settings)
    errors = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    assert sum("test/1/7.png (empty file)" in error for error in errors) == 1
    assert sum("another host names them" in error for error in errors) == 1


def processes_of_group(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def test_worker_processes_end_with_the_run_however_it_ends(tmp_path: Path) -> None:
    """Signals to the whole group, as of a terminal; to a run that waits for its images."""
    large = cv2.resize(photograph(), (1600, 1200))
    for index in range(20):
        path = tmp_path / "images" / f"{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(large, "JPEG"))
    settings: dict[str, Any] = {
        "dataset__name": f"folder:{tmp_path}/images",
        "loader__processes": 2,
        "num_steps": 1000,
    }
    steps = 0
    for stop, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start("", tmp_path / "run", new_group=True, **settings)
        wait_until(functools.partial(has_reached, tmp_path / "run", steps + 2), process)
        if stop == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, stop)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert err == ""
        if code >= 0:
            (*_, steps) = list_steps(str(tmp_path / "run"))
            assert f"stopped at step {steps} of 1,000" in out
        deadline = time.monotonic() + 20
        while processes_of_group(process.pid):
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.1)


def test_a_finished_run_says_so_and_is_scored(uninterrupted: Path, digits_dir: str) -> None:
    out = finish(start(digits_dir, uninterrupted))
    assert "training is finished: scoring the last checkpoint" in out
    assert "on 360 images" in out


def test_evaluate_prints_a_table_or_json(uninterrupted: Path, digits_dir: str) -> None:
    arguments = [f"--checkpoint={uninterrupted}", "--dataset=digits", f"--data_dir={digits_dir}"]
    table = run_door("evaluate", *arguments, "--split=test")
    assert table.stderr == ""
    done = run_door("evaluate", *arguments, "--split=test", "--json", "--batch_size=50")
    scores = json.loads(done.stdout)
    assert scores["num_examples"] == 360
    assert f"top-1              {scores['top1']:.2%}" in table.stdout
    # The run's own last evaluation, with other batches, says the same.
    last = read_metrics(str(uninterrupted))[-1]
    assert scores["top1"] == last["test/top1"]
    assert scores["log_likelihood"] == pytest.approx(last["test/log_likelihood"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --checkpoint"),
        (["--checkpoint=/nowhere"], "error: checkpoint '/nowhere' holds no checkpoint"),
        (["--checkpoint=RUN", "--step=7"], "has no step 7; it has 140, 150"),
        (["--checkpoint=RUN", "--split=tset"], "split 'tset' of data set"),
        (["--checkpoint=RUN", "--dataset=folder:/nowhere"], "is no folder of this machine"),
        (["--checkpoint=RUN", "--batch_size=0"], "--batch_size=0 is out of range"),
    ],
)
def test_evaluate_refuses(
    uninterrupted: Path, digits_dir: str, arguments: list[str], message: str
) -> None:
    arguments = [argument.replace("RUN", str(uninterrupted)) for argument in arguments]
    done = run_door("evaluate", *arguments, f"--data_dir={digits_dir}", code=2)
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def write_hostile_images(folder: Path, whole: list[bytes]) -> dict[str, str]:
    """Writes all that a crawler may leave behind; returns why each bad file is bad."""
    photo = encode(photograph(), "JPEG", quality=85)
    good = {
        "cmyk.jpg": encode(photograph(), "JPEG", "CMYK"),
        "sixteen_bits.png": cv2.imencode(".png", np.full((9, 9), 40_000, np.uint16))[1].tobytes(),
        "animation.gif": encode(smooth(20, 30), "GIF"),
        "png_in_name_jpg.jpg": encode(smooth(20, 30), "PNG"),
        "turned.jpg": turned(smooth(30, 20), 6),
        "one_pixel.png": encode(noise(1, 1), "PNG"),
        **{f"whole_{index}.png": encoded for index, encoded in enumerate(whole)},
    }
    bad = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404</html>", "no image, or its header is damaged"),
        "bomb.png": (png_that_claims(20_000, 20_000), "too many pixels"),
        **{f"tenths_{n}.jpg": (photo[: len(photo) * n // 10], "incomplete") for n in range(1, 10)},
    }
    for name, encoded in [*good.items(), *((name, b) for name, (b, _) in bad.items())]:
        (folder / "a").mkdir(parents=True, exist_ok=True)
        (folder / "a" / name).write_bytes(encoded)
    (folder / "b").mkdir()
    (folder / "b" / "whole.png").write_bytes(whole[0])
    (folder / "a" / "loop.png").symlink_to(folder / "a" / "loop.png")
    (folder / "a" / "circle").symlink_to(folder / "a")
    os.mkfifo(folder / "a" / "pipe.jpg")
    forbidden = {} if os.geteuid() == 0 else {"forbidden.png": "cannot be read"}
    for name in forbidden:
        (folder / "a" / name).write_bytes(b"")
        (folder / "a" / name).chmod(0)
    return {
        "loop.png": "cannot be read",
        **forbidden,
        **{n: reason for n, (_, reason) in bad.items()},
    }


def test_hostile_files_are_counted_in_training_and_named_in_evaluation(tmp_path: Path) -> None:
    whole = [encode(noise(8, 8), "PNG")] * 30
    reasons = write_hostile_images(tmp_path / "images" / "train", whole)
    write_hostile_images(tmp_path / "images" / "test", whole)
    # Several epochs, so that every file has been met.
    changes: dict[str, Any] = {"bad_images__max_share": 0.5}
    changes |= {
        "dataset__name": f"folder:{tmp_path}/images",
        "num_steps": 12,
        "bad_images__skip_in_evaluation": True,
    }
    out = finish(start("", tmp_path / "run", **changes))
    assert f"{len(reasons)} training images could not be used (9 incomplete" in out
    lines = (tmp_path / "run" / "bad_images_0.jsonl").read_text().splitlines()
    met = {Path(line["name"]).name: line["reason"] for line in map(json.loads, lines)}
    assert met == reasons
    last = read_metrics(str(tmp_path / "run"))[-1]
    assert (last["test/num_examples"], last["test/num_bad"]) == (37, len(reasons))
    data = [f"--checkpoint={tmp_path}/run", "--split=test"]
    named = run_door("evaluate", *data, code=2)
    assert named.stdout == ""
    (line,) = named.stderr.strip().splitlines()
    assert f"{len(reasons)} images cannot be used: " in line
    assert sum(f"images/test/a/{name} ({reason})" in line for name, reason in reasons.items()) == 5
    assert "--skip_bad_images" in line
    scores = json.loads(run_door("evaluate", *data, "--skip_bad_images", "--json").stdout)
    assert (scores["num_examples"], scores["num_bad"]) == (37, len(reasons))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --config"),
        (["--config=configs/digits.py", "--config.init_from=/nowhere"], "holds no checkpoint"),
        (["--config=configs/digit.py"], "does not exist; did you mean configs/digits.py?"),
        (["--config=README.md"], "is no Python file"),
        (["--config=configs/digits.py:medium"], "classes 'medium' is unknown"),
        (["--config=configs/digits.py", "--confg.seed=1"], "argument '--confg.seed=1' is unknown"),
        (["--config=configs/digits.py", "--config.seed"], "write --config.seed=VALUE"),
        (["--config=configs/digits.py", "--config.sed=1"], "did you mean seed?"),
        (["--config=configs/digits.py", "--config.seed=x"], "config.seed='x' is not a whole"),
        (["--config=configs/digits.py", "--config.model.variant=Z/9"], "'Z/9' is unknown; choose"),
        (["--config=configs/digits.py", "--config.num_steps=50"], "warmup_steps=100 is more"),
        (["--config=configs/digits.py", "--workdir=/proc/x"], "'/proc/x' cannot be written"),
        (["--config=configs/digits.py", "--config.batch_size=100", "--config.mesh.fsdp=3"], "mesh"),
    ],
)
def test_main_refuses(arguments: list[str], message: str, digits_dir: str, tmp_path: Path) -> None:
    if arguments[:1] == ["--config=configs/digits.py"]:
        arguments = [arguments[0], f"--config.dataset.data_dir={digits_dir}", *arguments[1:]]
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path}/run"]
    done = run_door("main", *arguments, code=2)
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("run/*"))


def test_another_experiments_workdir_is_refused(uninterrupted: Path, digits_dir: str) -> None:
    before = (uninterrupted / "config.json").read_text()
    process = start(digits_dir, uninterrupted, optimizer__learning_rate=0.5)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "another experiment (optimizer.learning_rate: 0.003 -> 0.5)" in err
    assert (uninterrupted / "config.json").read_text() == before


def test_missing_data_names_the_way_to_get_them(tmp_path: Path) -> None:
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    done = run_door(
        "main",
        "--config=configs/mixer_l16_i21k.py",
        f"--workdir={workdir}",
        f"--config.dataset.data_dir={data_dir}",
        code=2,
    )
    (line,) = done.stderr.strip().splitlines()
    assert f"data set 'imagenet21k' is not prepared in {data_dir}" in line
    assert "prepare it with: python -m mixer_jax.prepare imagenet21k" in line
    assert "--config.dataset.name=synthetic" in line
    assert list(workdir.iterdir()) == []


def test_help_lists_every_key() -> None:
    done = run_door("main", "--help")
    for key in ("optimizer.learning_rate=0.001", "mesh.fsdp=1", "evals.NAME.split='test'"):
        assert key in done.stdout
