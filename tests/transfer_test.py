"""Tests of `python -m mixer_jax.transfer`: documentation, arguments and their errors."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mixer_jax import transfer
from mixer_jax.checkpoints.resolve import CheckpointRef
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_run

DOCS = (Path(__file__).parent.parent / "docs" / "reference" / "transfer_protocol.md").read_text()
COMMANDS = [line for line in DOCS.splitlines() if line.startswith("mixer-jax transfer ")]


@pytest.fixture(autouse=True)
def workspace(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> Path:
    """The current folder, with weights in two workdirs; the command keeps JAX's settings."""
    workspace = tmp_path_factory.mktemp("workspace")
    (workspace / "runs").mkdir()
    for name in ("low", "digits_transfer"):
        (workspace / "runs" / name).symlink_to(weights)
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)
    return workspace


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_run(random_weights(), tmp_path_factory.mktemp("weights") / "low"))


@pytest.mark.slow
def test_commands_of_the_documentation_run(
    digits_dir: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 4
    outputs = []
    for line in COMMANDS:
        arguments = shlex.split(line)[2:]
        if "--report" not in arguments:
            arguments += [f"--data_dir={digits_dir}", "--no_throughput"]
        if "--suite=digits" in arguments:
            arguments += ["--tasks=knn_5_to_9,linear_5_to_9"]
        assert transfer.main(arguments) == 0, line
        outputs.append(capsys.readouterr().out)
    dry, digits, few, report = outputs
    assert any(mentions(line, "19", "114") for line in dry.splitlines())
    assert re.search(r"^knn_5_to_9, .+  +16 +\d+\.\d\d +1 +167", digits, re.MULTILINE)
    for name in ("few_shot, 1-shot", "few_shot, 5-shot", "linear", "knn"):
        assert re.search(rf"^{name} +16 +\d+\.\d\d ", few, re.MULTILINE)
    assert report in digits
    results = workspace / "runs/digits_transfer_few_shot_digits_high/results.json"
    rows = json.loads(results.read_text())["rows"]
    assert {row["num_examples"] for row in rows} == {167}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--checkpoint", "--suite", "--report", "--workdir"]),
        (["--suite=digits"], ["--checkpoint", "--suite"]),
        (["--suite=digits", "--checkpoint=runs/none"], ["runs/none"]),
        (["--suite=digits", "--checkpoint=a.npz"], ["a.npz"]),
        (["--suite=vtab", "--checkpoint=runs/low"], ["--suite", "vtab", "avg5", "imagenet"]),
        (["--suite=no.py", "--checkpoint=runs/low"], ["no.py"]),
        (["--suite=bad.py", "--checkpoint=runs/low"], ["bad.py", "NameError", "'x'"]),
        (["--suite=empty.py", "--checkpoint=runs/low"], ["empty.py", "AttributeError", "SUITE"]),
        (["--suite=other.py", "--checkpoint=runs/low"], ["other.py", "SUITE", "Suite"]),
        (["--suite=few_shot", "--checkpoint=runs/low"], ["--suite", "few_shot", "--dataset"]),
        (
            ["--suite=avg5", "--checkpoint=runs/low", "--dataset=x"],
            ["--dataset", "--suite", "few_shot"],
        ),
        (["--suite=digits", "--checkpoint=runs/low", "--shard=3/2"], ["3/2", "1/4"]),
        (["--suite=digits", "--checkpoint=runs/low", "--shard=9/9"], ["--shard", "9/9"]),
        (["--suite=digits", "--checkpoint=runs/low", "--tasks=x"], ["--tasks", "x", "digits"]),
        (["--suite=digits", "--checkpoint=runs/low", "--shots=1,0"], ["1,0"]),
        (
            ["--suite=digits", "--checkpoint=runs/low", "--image_size=30"],
            ["image_size", "30", "patch_size", "4", "28", "32"],
        ),
        (
            ["--suite=digits", "--checkpoint=runs/low", "--image_size=x"],
            ["--image_size", "x", "native", "auto"],
        ),
        (["--suite=digits", "--checkpoint=runs/low", "--step=7"], ["7", "1"]),
        (
            ["--suite=few_shot", "--checkpoint=runs/low", "--dataset=digits/high", "--probes=svm"],
            ["--probes", "svm", "few_shot", "linear", "knn"],
        ),
        (
            ["--suite=few_shot", "--checkpoint=runs/low", "--dataset=folder:none"],
            ["none"],
        ),
        (["--suite=digits", "--checkpoint=runs/low", "--config.seed=3"], ["--config.seed", "3"]),
        (["--suite=digits", "--checkpoint=runs/low", "--config.x=3"], ["config.x"]),
        (["--suite=digits", "--checkpoint=runs/low", "--color=3"], ["--color"]),
        (
            ["--suite=digits", "--checkpoint=runs/low", "--config.distributed=maybe"],
            ["distributed", "maybe", "auto", "yes", "no"],
        ),
        (
            ["--suite=digits", "--checkpoint=runs/low", "--workdir=runs/low"],
            ["runs/low", "mixer_jax.main", "--workdir"],
        ),
        (
            ["--suite=wrong.py", "--checkpoint=runs/low"],
            ["wrong", "tasks", "FineTuneTask", "ProbeTask"],
        ),
        (
            ["--report", "--workdir=x", "--suite=digits", "--dry_run", "--config.seed=3"],
            ["--report", "--workdir", "--suite", "--dry_run", "--config.seed"],
        ),
        (["--report"], ["--report", "--workdir"]),
        (["--report", "--workdir=runs/low"], ["runs/low", "suite.json"]),
    ],
)
def test_main_rejects_invalid_arguments(
    arguments: list[str], parts: list[str], digits_dir: str, workspace: Path
) -> None:
    (workspace / "bad.py").write_text("x")
    (workspace / "empty.py").write_text("")
    (workspace / "other.py").write_text("SUITE = 3")
    suite = "from mixer_jax.suites.tasks import Suite\nSUITE = Suite('wrong', '', ())"
    (workspace / "wrong.py").write_text(suite)
    before = sorted(workspace.iterdir())
    if "--report" not in arguments:
        arguments = [*arguments, f"--data_dir={digits_dir}"]
    with pytest.raises(UserError) as caught:
        transfer.main(arguments)
    # The path may have numbers in it.
    message = str(caught.value).replace(f"{workspace}/", "")
    assert mentions(message, *parts)
    assert "\n" not in message
    assert [path for path in sorted(workspace.iterdir()) if path.name != "__pycache__"] == before
    assert {path.name for path in (workspace / "runs").iterdir()} == {"low", "digits_transfer"}


@pytest.mark.parametrize("value", ["abc", "0", "-3", ""])
def test_main_rejects_image_sizes_before_resolving_the_checkpoint(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "resolve_checkpoint", lambda *_: pytest.fail("too late"))
    with raises(UserError, "--image_size", repr(value), "native", "auto"):
        transfer.main(["--suite=digits", "--checkpoint=runs/low", f"--image_size={value}"])


@pytest.mark.parametrize(
    ("arguments", "checkpoint", "folder"),
    [
        (["--suite=digits"], CheckpointRef("run", "/a/low", 7), "runs/low_digits"),
        (["--suite=digits", "--step=7"], CheckpointRef("run", "/a/low", 7), "runs/low_7_digits"),
        (["--suite=a/b.py"], CheckpointRef("npz", "/a/Mixer-B_16.v2.npz"), "runs/Mixer-B_16.v2_b"),
        (["--suite=vtab1k"], CheckpointRef("torch", "a.b.pth.tar"), "runs/a.b_vtab1k"),
        (
            ["--suite=vtab1k"],
            CheckpointRef("safetensors", "/m/l16/model.safetensors"),
            "runs/l16_vtab1k",
        ),
        (
            ["--suite=avg5"],
            CheckpointRef("hub", "timm/mixer.goog@refs/pr/1"),
            "runs/mixer.goog_refs_pr_1_av",
        ),
        (
            ["--suite=few_shot", "--dataset=digits/high"],
            CheckpointRef("run", "/a/low", 7),
            "runs/low_few_shot_digits_high",
        ),
        (
            ["--suite=few_shot", "--dataset=folder:../my photos/"],
            CheckpointRef("run", "/a/low", 7),
            "runs/low_few_shot_folder_.._my_photos",
        ),
    ],
)
def test_default_workdir_is_named_after_its_inputs(
    arguments: list[str], checkpoint: CheckpointRef, folder: str
) -> None:
    args, _ = transfer._parse_args(["--checkpoint=low", *arguments])
    assert transfer._default_workdir(checkpoint, args).startswith(folder)
    with_step, _ = transfer._parse_args(["--checkpoint=low/checkpoints/7", *arguments])
    if checkpoint.format == "run":
        assert transfer._default_workdir(checkpoint, with_step).startswith("runs/low_7_")


def test_main_configures_the_compilation_cache(
    digits_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    monkeypatch.setattr(common, "configure_jax", folders.append)
    arguments = ["--suite=digits", "--checkpoint=runs/low", f"--data_dir={digits_dir}"]
    arguments += ["--dry_run", "--tasks=knn_5_to_9"]
    for overrides in ([], ["--config.compilation_cache=/c"]):
        assert transfer.main([*arguments, *overrides]) == 0
    assert folders == ["~/.cache/mixer_jax", "/c"]


@pytest.mark.parametrize("file", ["suite.json", "result.json", "throughput.json"])
@pytest.mark.slow
def test_report_names_damaged_files(
    file: str, digits_dir: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--suite=digits", "--checkpoint=runs/low", f"--data_dir={digits_dir}"]
    arguments += ["--tasks=knn_5_to_9", "--workdir=here"]
    arguments += [] if file == "throughput.json" else ["--no_throughput"]
    assert transfer.main(arguments) == 0
    (path,) = [path for path in (workspace / "here").rglob(file) if "fresh" not in path.parts]
    path.write_text("{")
    with raises(UserError, file):
        transfer.main(["--report", "--workdir=here"])
    path.write_text('{"a": 1}')
    with raises(UserError, file):
        transfer.main(["--report", "--workdir=here"])


@pytest.mark.slow
def test_missing_data_exit_with_2_and_write_nothing(
    workspace: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(root))
    arguments = ["--checkpoint=runs/low", "--suite=avg5", "--data_dir=nowhere", "--workdir=here"]
    done = run_cli("transfer", *arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "5", "imagenet", "cifar10")
    assert not (workspace / "here").exists()


def test_a_failed_task_exits_with_1(
    digits_dir: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr("mixer_jax.suites.protocol.run_probe_task", fail)
    arguments = ["--suite=digits", "--checkpoint=runs/low", f"--data_dir={digits_dir}"]
    arguments += ["--tasks=knn_5_to_9", "--workdir=here", "--no_throughput"]
    assert transfer.main(arguments) == 1
    lines = (workspace / "here/results.txt").read_text().splitlines()
    assert any(mentions(line, "knn_5_to_9", "RuntimeError", "it broke") for line in lines)
