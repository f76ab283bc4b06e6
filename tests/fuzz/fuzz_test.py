"""A few inputs of every fuzzing target, those that once failed, and tests of what is noticed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixer_jax.data.decode import BadImageError
from mixer_jax.files import parse_json
from tests.fuzz import __main__ as fuzz
from tests.fuzz.corpus import CORPUS
from tests.fuzz.mutation import mutate_json, mutate_json_lines
from tests.fuzz.target import Target, Violation, run_input, watch
from tests.fuzz.targets import TARGETS

BY_NAME = {target.name: target for target in TARGETS}
# Inputs of a fast target, and of one that is slower by its cost.
NUM_INPUTS = 20
JSON_MUTATIONS = (mutate_json, mutate_json_lines)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)
SETTINGS = settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_parsers_accept_or_refuse_damaged_inputs(target: Target, tmp_path: Path) -> None:
    seeds = target.seeds()
    accepted = run_input(target, seeds[0], tmp_path)
    for index in range(max(1, NUM_INPUTS // target.cost)):
        accepted |= run_input(target, target.make_input(0, len(seeds) + index), tmp_path)
    assert accepted


@pytest.mark.parametrize(("name", "data"), CORPUS, ids=range(len(CORPUS)))
def test_parsers_refuse_what_once_failed(name: str, data: bytes, tmp_path: Path) -> None:
    if name in BY_NAME:  # PyTorch is not installed everywhere.
        run_input(BY_NAME[name], data, tmp_path)


@pytest.mark.parametrize(
    "name", [t.name for t in TARGETS if t.mutate in JSON_MUTATIONS and t.cost <= 10]
)
@SETTINGS
@given(document=JSON)
def test_parsers_of_json_refuse_any_json(
    name: str, document: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "".join(filter(str.isalnum, name))
    folder.mkdir(exist_ok=True)
    run_input(BY_NAME[name], json.dumps(document).encode() + b"\n", folder)


@pytest.mark.parametrize("name", ["splits", "topologies", "braces", "seeds", "labels"])
@SETTINGS
@given(text=st.text(alphabet=st.sampled_from("train[:%]+-x{},.0123456789v5eh\n ²\0")))
def test_parsers_of_text_refuse_any_text(
    name: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_input(BY_NAME[name], text.encode(), tmp_path_factory.getbasetemp())


def test_parse_json_refuses_deep_nesting() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    for text in ("[" * 200 + "]" * 200, "[" * 100_000, b'{"a":' * 1000 + b"1" + b"}" * 1000):
        with pytest.raises(ValueError, match=r"nested|Expecting"):
            parse_json(text)


def run_code(code: str) -> Target:
    def run(data: bytes, folder: Path) -> None:
        exec(code, {"folder": folder, "os": os, "Path": Path, "subprocess": subprocess})

    return Target("code", lambda: [b""], run)


@pytest.mark.parametrize(
    "code",
    [
        "os.system('true')",
        "subprocess.run(['true'])",
        "Path(folder.parent, 'outside').write_text('')",
        "os.mkdir(folder.parent / 'outside')",
        "Path(f'{folder}_beside').write_text('')",
        "os.rmdir(folder.parent / 'absent')",
        "os.mkdir(folder / 'a') or os.rename(folder / 'a', folder.parent / 'b')",
        "os.symlink(folder, folder.parent / 'link')",
    ],
)
def test_watch_sees_programs_and_files_outside(code: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    with pytest.raises(Violation), watch(folder), contextlib.suppress(FileNotFoundError):
        run_code(code).run(b"", folder)


def test_watch_allows_files_inside(tmp_path: Path) -> None:
    code = "os.rename(folder / 'a', folder / 'b') if (folder / 'a').mkdir() is None else 0"
    assert run_input(run_code(code), b"", tmp_path)


def test_errors_of_several_lines_are_failures(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        raise BadImageError(data.decode())

    target = Target("lines", lambda: [b""], run)
    assert not run_input(target, b"one", tmp_path)
    with pytest.raises(AssertionError):
        run_input(target, b"one\ntwo", tmp_path)


def test_a_process_runs_one_target_alone(tmp_path: Path) -> None:
    # Its first input is the first thing that writes a file in the process.
    command = [sys.executable, "-m", "tests.fuzz", "--worker", "--only=run: lock", "--inputs=3"]
    process = subprocess.run(
        [*command, f"--folder={tmp_path}"], capture_output=True, text=True, check=True, timeout=120
    )
    events = [json.loads(line)[:2] for line in process.stdout.splitlines()]
    assert events == [["begin", "run: lock"], ["end", "accepted"]] * 3


@pytest.mark.slow
def test_command_prints_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs=20", "--only=splits"]
    process = subprocess.run(
        [*command, f"--folder={tmp_path}"], capture_output=True, text=True, check=True
    )
    assert "| splits | 20 |" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("os.kill(os.getpid(), 11)", "exit status -11"),
        ("while True: pass", "hang"),
        ("bytearray(2**36)", "memory"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_command_sees_crashes_hangs_and_memory(
    code: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import tests.fuzz.targets as t\n"
        "from tests.fuzz.target import Target\n"
        "import os\n"
        f"def run(data, folder):\n    if data == b'b':\n        {code}\n"
        "t.TARGETS[:] = [Target('x', lambda: [b'a', b'b', b'c'], run)]\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.getcwd()])
    command = [sys.executable, "-m", "tests.fuzz", "--inputs=3", f"--folder={folder}"]
    process = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert process.returncode == 1, process.stderr
    assert "| x | 3 | 2 | 0 | 1 |" in process.stdout
    (report,) = (folder / "failures").glob("*.txt")
    assert kind in report.read_text()
    assert report.with_suffix("").read_bytes() == b"b"
    assert fuzz.Row(1, 2).inputs == 3
