"""Tests of `python -m mixer_jax.predict`: what it prints, where, and how it ends."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mixer_jax import command_line, predict
from mixer_jax.errors import UserError
from mixer_jax.weights.npz_file import write_npz
from mixer_jax.weights.published import GOOGLE, published_views
from mixer_jax.weights.tree import leaves
from tests.door import run_door
from tests.random_weights import DIGITS, random_weights, save_run

REASON = "no image, or its header is damaged"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a folder of photographs, some of them in a folder in it."""
    place = tmp_path_factory.mktemp("predict")
    save_run(random_weights(), place / "run")
    rng = np.random.default_rng(0)
    (place / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "more/c.png", "with, comma.png"):
        image = rng.integers(0, 256, (20, 30, 3), np.uint8)
        cv2.imwrite(str(place / "photos" / name), image)
    (place / "photos" / "notes.txt").write_text("no image")
    (place / "bad.jpg").write_text("no image")
    return place


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door in this process keeps the settings of the tests."""
    monkeypatch.setattr(command_line, "set_up_libraries", lambda compilation_cache: None)


def door(place: Path, *arguments: str) -> int:
    return predict.main([f"--checkpoint={place}/run", *arguments])


def names(out: str) -> list[str]:
    return [entry["image"] for entry in json.loads(out)]


def test_a_user_sees_a_table_and_bad_files_on_standard_error(place: Path) -> None:
    done = run_door(
        "predict",
        f"--checkpoint={place}/run",
        f"{place}/photos/a.jpg",
        f"{place}/bad.jpg",
        "--topk=3",
        code=1,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"{place}/photos/a.jpg"
    assert len(lines) == 4
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert {line.split()[-1] for line in lines[1:]} < set(DIGITS)
    assert done.stderr.splitlines() == [
        f"{place}/bad.jpg: {REASON}",
        "1 of 2 images cannot be used",
    ]


def test_an_image_on_standard_input(place: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.predict"]
    done = subprocess.run(
        [*command, f"--checkpoint={place}/run", "--format=json", "-"],
        input=(place / "photos" / "a.jpg").read_bytes(),
        capture_output=True,
        check=True,
    )
    (entry,) = json.loads(done.stdout)
    assert entry["image"] == "standard input"
    assert len(entry["classes"]) == 5
    assert done.stderr == b""


def test_json_is_one_document_with_an_image_a_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door(place, "--format=json", "--topk=2", f"{place}/photos", f"{place}/bad.jpg") == 1
    out = capsys.readouterr().out
    found = json.loads(out)
    expected = ["a.jpg", "b.png", "more/c.png", "with, comma.png"]
    assert [entry["image"] for entry in found[:4]] == [f"{place}/photos/{n}" for n in expected]
    assert found[4] == {"image": f"{place}/bad.jpg", "error": REASON}
    assert found[0]["classes"][0].keys() == {"label", "name", "probability"}
    assert [json.loads(line.rstrip(",")) for line in out.splitlines()[1:-1]] == found


def test_csv_can_be_read_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--topk=2", f"{place}/photos", f"{place}/bad.jpg"]
    assert door(place, "--format=csv", *arguments) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    door(place, "--format=json", *arguments)
    found = json.loads(capsys.readouterr().out)
    assert len(rows) == 8
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert rows[-1]["image"] == f"{place}/photos/with, comma.png"
    told = [one for entry in found[:4] for one in entry["classes"]]
    assert [float(row["probability"]) for row in rows] == [one["probability"] for one in told]
    assert [row["name"] for row in rows] == [one["name"] for one in told]


@pytest.mark.parametrize("pattern", ["photos/*.png", "photos/**/*.png"])
def test_patterns(place: Path, capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    assert door(place, "--format=json", f"{place}/{pattern}") == 0
    found = {Path(name).name for name in names(capsys.readouterr().out)}
    assert found == {"b.png", "with, comma.png"} | ({"c.png"} if "**" in pattern else set())


def test_a_list_of_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list.txt"
    wanted = [f"{place}/photos/with, comma.png", f"{place}/photos/a.jpg"]
    listed.write_text("\n".join(wanted) + "\n\n")
    assert door(place, "--format=json", f"--files_from={listed}") == 0
    assert names(capsys.readouterr().out) == wanted


def test_names_of_ones_own(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"class nr {label}\n" for label in range(10)), encoding="utf-8")
    photo = f"{place}/photos/a.jpg"
    assert door(place, "--format=json", f"--labels={labels}", photo) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in entry["classes"]] == [
        f"class nr {one['label']}" for one in entry["classes"]
    ]


def test_weights_of_a_thousand_classes_say_wordnet_ids(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(class_names=(), num_classes=1000)
    path = str(tmp_path / "Mixer.npz")
    write_npz(path, published_views(dict(leaves(weights.params)), GOOGLE), {})
    arguments = [f"--checkpoint={path}", "--format=json", "--image_size=32"]
    assert predict.main([*arguments, f"{place}/photos/a.jpg"]) == 0
    captured = capsys.readouterr()
    (entry,) = json.loads(captured.out)
    assert all(one["name"].startswith("n0") or one["name"][:2] == "n1" for one in entry["classes"])
    assert captured.err == (
        "Mixer-custom at 32 px: weights grown from 16 px (the paper's Appendix C)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no image is named"),
        (["{place}/nothing.jpg"], "nothing.jpg' does not exist"),
        (["{place}/run"], "has no image in it"),
        (["--topk=0", "{photo}"], "--topk=0 is out of range"),
        (["--labels={place}/none.txt", "{photo}"], "--labels=.* cannot be read: No such file"),
        (["--labels={place}/empty.txt", "{photo}"], "has an empty line, or none"),
        (["--labels={place}/two.txt", "{photo}"], "has 10 classes, and 2 names are given"),
        (["--files_from={place}/none.txt"], "--files_from=.* cannot be read"),
        (["--image_size=18", "{photo}"], "image_size 18 is not divisible by patch_size 4"),
        (["--image_size=1x2x3", "{photo}"], "pass a side or HEIGHTxWIDTH"),
        (["--step=3", "{photo}"], "has no step 3; it has 1"),
        (["--checkpoint={place}/photos/a.jpg", "{photo}"], "is of no known kind; files end in"),
        (["--checkpoint={place}/photos", "{photo}"], "holds no checkpoint"),
        (["--checkpoint={place}/gone.npz", "{photo}"], "gone.npz' does not exist"),
        (["--format=xml", "{photo}"], "invalid choice: 'xml'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "two.txt").write_text("a\nb\n")
    (place / "empty.txt").write_text("")
    fields: dict[str, Any] = {"place": place, "photo": f"{place}/photos/a.jpg"}
    with pytest.raises(UserError, match=message) as caught:
        door(place, *(argument.format(**fields) for argument in arguments))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_name_that_is_no_text_is_shown_and_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsencode(tmp_path) + b"/odd\xff.png"
    Path(os.fsdecode(odd)).write_bytes((place / "photos" / "b.png").read_bytes())
    assert door(place, "--format=json", str(tmp_path)) == 0
    assert names(capsys.readouterr().out) == [f"{tmp_path}/odd\\xff.png"]
