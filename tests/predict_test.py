"""Tests of `python -m mixer_jax.predict`: what it prints, where, and how it ends."""

import csv
import errno
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

from mixer_jax import predict
from mixer_jax.checkpoints.formats.npz import write_npz
from mixer_jax.checkpoints.layouts import layout_views
from mixer_jax.checkpoints.tree import flatten
from mixer_jax.cli import common
from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.image_files import expand_image_paths
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from mixer_jax.models.mixer_layouts import GOOGLE
from tests.helpers.cli import run_cli
from tests.helpers.images import encode_with_orientation, smooth
from tests.helpers.messages import mentions
from tests.helpers.random_weights import DIGITS, random_weights, save_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a folder of photographs, some of them in a folder in it."""
    place = tmp_path_factory.mktemp("predict")
    save_run(random_weights(), place / "run")
    save_run(random_weights(class_names=(), num_classes=0), place / "features")
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
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


@pytest.fixture(scope="module")
def reason(place: Path) -> str:
    """Why bad.jpg is bad."""
    with pytest.raises(BadImageError) as caught:
        decode((place / "bad.jpg").read_bytes())
    assert caught.value.reason
    return caught.value.reason


def door(place: Path, *arguments: str) -> int:
    return predict.main([f"--checkpoint={place}/run", *arguments])


def names(out: str) -> list[str]:
    return [entry["image"] for entry in json.loads(out)]


def test_a_user_sees_a_table_and_bad_files_on_standard_error(place: Path, reason: str) -> None:
    done = run_cli(
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
    bad, summary = done.stderr.splitlines()
    assert mentions(bad, f"{place}/bad.jpg", reason)
    assert mentions(summary, "1", "2")


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
    place: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door(place, "--format=json", "--topk=2", f"{place}/photos", f"{place}/bad.jpg") == 1
    out = capsys.readouterr().out
    found = json.loads(out)
    expected = ["a.jpg", "b.png", "more/c.png", "with, comma.png"]
    assert [entry["image"] for entry in found[:4]] == [f"{place}/photos/{n}" for n in expected]
    assert found[4] == {"image": f"{place}/bad.jpg", "error": reason}
    assert found[0]["classes"][0].keys() == {"class_index", "name", "probability"}
    assert [json.loads(line.rstrip(",")) for line in out.splitlines()[1:-1]] == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_the_type_that_is_asked_for(
    place: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = f"{place}/photos/a.jpg"
    assert door(place, f"--dtype={dtype}", "--format=json", photo) == 0
    (found,) = json.loads(capsys.readouterr().out)

    def classes(dtype: str) -> list[dict[str, Any]]:
        classifier = load_pretrained(place / "run", dtype=dtype)
        (prediction,) = classifier.iter_predictions(
            expand_image_paths([photo]), topk=5, batch_size=1
        )
        return [one._asdict() for one in prediction.classes]

    assert found["classes"] == classes(dtype)
    assert (classes(dtype) == classes("")) == (dtype == "float32")


def test_csv_can_be_read_back(place: Path, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--topk=2", f"{place}/photos", f"{place}/bad.jpg"]
    assert door(place, "--format=csv", *arguments) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    door(place, "--format=json", *arguments)
    found = json.loads(capsys.readouterr().out)
    assert len(rows) == 9
    bad = {"image": f"{place}/bad.jpg", "error": reason}
    assert rows.pop() == dict.fromkeys(rows[0], "") | bad
    assert {row["error"] for row in rows} == {""}
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
        f"class nr {one['class_index']}" for one in entry["classes"]
    ]


def test_weights_of_a_thousand_classes_say_wordnet_ids(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(class_names=(), num_classes=1000)
    path = str(tmp_path / "Mixer.npz")
    write_npz(path, layout_views(dict(flatten(weights.params)), GOOGLE), {})
    arguments = [f"--checkpoint={path}", "--format=json", "--image_size=32"]
    assert predict.main([*arguments, f"{place}/photos/a.jpg"]) == 0
    captured = capsys.readouterr()
    (entry,) = json.loads(captured.out)
    assert all(one["name"].startswith("n0") or one["name"][:2] == "n1" for one in entry["classes"])
    (line,) = captured.err.splitlines()
    assert mentions(line, "Mixer-custom", "32", "16", "Appendix C")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], []),
        (["{place}/nothing.jpg"], ["PLACE/nothing.jpg"]),
        (["{place}/run"], ["PLACE/run"]),
        (["{place}/*.bmp"], ["PLACE/*.bmp"]),
        (["{place}/photos/more/*/**"], ["PLACE/photos/more/*/**"]),
        (["{place}/a.jpg", "{place}/b.jpg"], ["PLACE/a.jpg", "1"]),
        (["~nosuchuser/x.jpg"], ["~nosuchuser/x.jpg"]),
        (["{place}/" + "x" * 256], ["PLACE/" + "x" * 256, "File name too long"]),
        (["", "{photo}"], []),
        (["--files_from=-", "-"], ['"-"']),
        (["--labels=-", "-"], ['"-"']),
        (["-", "-"], ['"-"']),
        (["--labels=~nosuchuser/x", "{photo}"], ["--labels", "~nosuchuser/x", "No such file"]),
        (["--files_from=~nosuchuser/x"], ["--files_from", "~nosuchuser/x", "No such file"]),
        (["--labels={place}/latin.txt", "{photo}"], ["PLACE/latin.txt", "2", "UTF-8"]),
        (["--checkpoint={place}/features", "--format=csv", "{photo}"], ["head"]),
        (["--topk=0", "{photo}"], ["--topk", "0"]),
        (
            ["--labels={place}/none.txt", "{photo}"],
            ["--labels", "PLACE/none.txt", "No such file"],
        ),
        (["--labels={place}/empty.txt", "{photo}"], ["PLACE/empty.txt"]),
        (["--labels={place}/two.txt", "{photo}"], ["10", "2"]),
        (["--files_from={place}/none.txt"], ["--files_from", "PLACE/none.txt"]),
        (["--image_size=18", "{photo}"], ["image_size", "18", "patch_size", "4"]),
        (["--image_size=1x2x3", "{photo}"], ["--image_size", "1x2x3", "HEIGHTxWIDTH"]),
        (["--step=3", "{photo}"], ["PLACE/run", "3", "1"]),
        (
            ["--checkpoint={place}/photos/a.jpg", "{photo}"],
            ["PLACE/photos/a.jpg", ".npz", ".safetensors"],
        ),
        (["--checkpoint={place}/photos", "{photo}"], ["PLACE/photos"]),
        (["--checkpoint={place}/gone.npz", "{photo}"], ["PLACE/gone.npz"]),
        (["--format=xml", "{photo}"], ["--format", "xml"]),
        (["--dtype=float16", "{photo}"], ["--dtype", "float16"]),
    ],
)
def test_mistakes_are_told_in_one_line(
    place: Path,
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "two.txt").write_text("a\nb\n")
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes("Katze\nHündin\n".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    fields: dict[str, Any] = {"place": place, "photo": f"{place}/photos/a.jpg"}
    with pytest.raises(UserError) as caught:
        door(place, *(argument.format(**fields) for argument in arguments))
    # The path may have numbers in it.
    message = str(caught.value).replace(str(place), "PLACE")
    assert mentions(message, *parts)
    assert "\n" not in message
    assert capsys.readouterr().out == ""


def test_a_name_that_is_no_text_is_shown_and_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsencode(tmp_path) + b"/odd\xff.png"
    Path(os.fsdecode(odd)).write_bytes((place / "photos" / "b.png").read_bytes())
    assert door(place, "--format=json", str(tmp_path)) == 0
    assert names(capsys.readouterr().out) == [f"{tmp_path}/odd\\xff.png"]


def test_names_that_mean_no_image_are_reported_and_the_rest_is_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    listed = tmp_path / "list.txt"
    long, nil = "x" * 256, "nil\0*.png"
    listed.write_text(f"{place}/photos/b.png\n~nosuchuser/x.jpg\n{tmp_path}/{long}\n{nil}\n")
    arguments = [f"{tmp_path}/gone.png", f"{place}/photos/a.jpg", f"{tmp_path}/empty"]
    assert door(place, "--format=json", f"--files_from={listed}", *arguments) == 1
    captured = capsys.readouterr()
    told = {entry["image"]: entry.get("error") for entry in json.loads(captured.out)}
    good = {f"{place}/photos/a.jpg", f"{place}/photos/b.png"}
    gone, nobodys, empty = f"{tmp_path}/gone.png", "~nosuchuser/x.jpg", f"{tmp_path}/empty"
    assert told.keys() == {*good, gone, nobodys, empty, f"{tmp_path}/{long}", nil}
    assert {name for name, error in told.items() if error is None} == good
    assert told[gone] == told[nobodys]
    assert len(set(told.values())) == 5
    assert mentions(told[f"{tmp_path}/{long}"], "File name too long")
    assert mentions(captured.err.splitlines()[-1], "5", "7")


def test_a_pattern_passes_over_empty_folders_and_finds_nothing_twice(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(place / "photos")
    assert door(place, "--format=json", f"{tmp_path}/*") == 0
    expected = ["a.jpg", "b.png", "more/c.png", "with, comma.png"]
    assert names(capsys.readouterr().out) == [f"{tmp_path}/photos/{name}" for name in expected]
    assert door(place, "--format=json", f"{tmp_path}/photos/m**") == 0
    assert names(capsys.readouterr().out) == [f"{tmp_path}/photos/more/c.png"]
    assert door(place, "--format=json", f"{place}/photos/more/**") == 0
    assert names(capsys.readouterr().out) == [f"{place}/photos/more/c.png"]


def test_folders_are_walked_as_in_training(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo = (place / "photos" / "b.png").read_bytes()
    for name in ("b.png", ".hidden.png", ".trash/x.png", "deep/a.png", "secret/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)

    def scan(path: Path, scan: Any = os.scandir) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert door(place, "--format=json", str(tmp_path)) == 1
    captured = capsys.readouterr()
    expected = [f"{tmp_path}/{name}" for name in ("b.png", "deep/a.png", "secret")]
    assert names(captured.out) == expected
    assert mentions(captured.err.splitlines()[0], f"{tmp_path}/secret")


def test_a_file_called_like_standard_input(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "-").write_bytes((place / "photos" / "b.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert door(place, "--format=json", "?") == 0
    assert names(capsys.readouterr().out) == ["-"]


def test_labels_as_windows_saves_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "names.txt"
    labels.write_bytes("".join(f"Hündin {label}\r\n" for label in range(10)).encode("utf-8-sig"))
    arguments = [f"--labels={labels}", "--topk=10", f"{place}/photos/a.jpg"]
    assert door(place, "--format=json", *arguments) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in entry["classes"]} == {f"Hündin {n}" for n in range(10)}


@pytest.mark.parametrize("ignored", [False, True])
def test_photographs_are_turned_as_their_camera_says(
    ignored: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = encode_with_orientation(smooth(40, 16), 6)
    (tmp_path / "photo.jpg").write_bytes(photo)
    seen = decode(photo, exif_orientation=not ignored)
    cv2.imwrite(str(tmp_path / "seen.png"), seen[:, :, ::-1])
    arguments = ["--ignore_exif"] if ignored else []
    assert door(place, "--format=json", "--topk=10", *arguments, str(tmp_path)) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["classes"] == second["classes"]


def test_only_the_door_changes_a_setting_of_the_whole_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(cv2, "setNumThreads", set_to.append)
    load_pretrained(f"{place}/run").predict([place / "photos" / "a.jpg"])
    assert set_to == []
    assert door(place, f"{place}/photos/a.jpg") == 0
    assert set_to == [0]


@pytest.mark.parametrize("told_as", ["json", "csv"])
def test_json_and_csv_are_utf8_whatever_the_locale(
    told_as: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"Hündin {label}\n" for label in range(10)), encoding="utf-8")
    arguments = [f"--checkpoint={place}/run", f"--labels={labels}", f"--format={told_as}"]
    photo = f"{place}/photos/a.jpg"
    done = subprocess.run(
        [sys.executable, "-m", "mixer_jax.predict", *arguments, photo],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.stdout.decode().count("Hündin") == 5
