"""Tests of `python -m mixer_jax.predict`: its output, its errors, and which images it finds."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mixer_jax import predict
from mixer_jax.checkpoints.weights import replace_head
from mixer_jax.cli import common
from mixer_jax.data import image_files
from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.image_files import expand_image_paths
from mixer_jax.data.wordnet import describe_class, imagenet_wnids
from mixer_jax.errors import RunError, UserError
from mixer_jax.inference import load_pretrained
from tests.helpers.cli import run_cli
from tests.helpers.html_pages import Page, check_stands_alone, visible_text
from tests.helpers.images import encode_with_orientation, smooth
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, random_weights, save_npz, save_run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, weights without a head, and photos in nested folders."""
    workspace = tmp_path_factory.mktemp("predict")
    save_run(random_weights(), workspace / "run")
    save_run(random_weights(class_names=(), num_classes=0), workspace / "features")
    save_npz(replace_head(random_weights(), 21_843), workspace / "zeroed.npz")
    rng = np.random.default_rng(0)
    (workspace / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "more/c.png", "with, comma.png"):
        image = rng.integers(0, 256, (20, 30, 3), np.uint8)
        cv2.imwrite(str(workspace / "photos" / name), image)
    (workspace / "photos" / "notes.txt").write_text("not an image")
    (workspace / "bad.jpg").write_text("not an image")
    return workspace


@pytest.fixture(autouse=True)
def keep_jax_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not change the test suite's JAX config."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


@pytest.fixture(scope="module")
def reason(workspace: Path) -> str:
    """Reason why bad.jpg is unreadable."""
    with pytest.raises(BadImageError) as caught:
        decode((workspace / "bad.jpg").read_bytes())
    assert caught.value.reason
    return caught.value.reason


def predict_main(workspace: Path, *arguments: str) -> int:
    return predict.main([f"--checkpoint={workspace}/run", *arguments])


def names(out: str) -> list[str]:
    return [entry["image"] for entry in json.loads(out)]


def test_table_on_stdout_and_bad_files_on_stderr(workspace: Path, reason: str) -> None:
    result = run_cli(
        "predict",
        f"--checkpoint={workspace}/run",
        f"{workspace}/photos/a.jpg",
        f"{workspace}/bad.jpg",
        "--topk=3",
        code=1,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == f"{workspace}/photos/a.jpg"
    assert len(lines) == 4
    probabilities = [float(line.split("%")[0]) for line in lines[1:]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {line.split()[-1] for line in lines[1:]} < set(DIGITS)
    bad, summary = result.stderr.splitlines()
    assert mentions(bad, f"{workspace}/bad.jpg", reason)
    assert mentions(summary, "1", "2")


def test_image_from_standard_input(workspace: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.predict"]
    process = subprocess.run(
        [*command, f"--checkpoint={workspace}/run", "--format=json", "-"],
        input=(workspace / "photos" / "a.jpg").read_bytes(),
        capture_output=True,
        check=True,
    )
    (entry,) = json.loads(process.stdout)
    assert entry["image"] == "standard input"
    assert len(entry["classes"]) == 5
    assert process.stderr == b""


def test_json_is_one_document_with_one_image_per_line(
    workspace: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [f"{workspace}/photos", f"{workspace}/bad.jpg"]
    assert predict_main(workspace, "--format=json", "--topk=2", *images) == 1
    out = capsys.readouterr().out
    entries = json.loads(out)
    expected = ["a.jpg", "b.png", "more/c.png", "with, comma.png"]
    images = [entry["image"] for entry in entries[:4]]
    assert images == [f"{workspace}/photos/{name}" for name in expected]
    assert entries[4] == {"image": f"{workspace}/bad.jpg", "error": reason}
    keys = {"class_index", "name", "probability", "description"}
    assert entries[0]["classes"][0].keys() == keys
    assert [json.loads(line.rstrip(",")) for line in out.splitlines()[1:-1]] == entries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_flag_sets_the_dtype(
    workspace: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = f"{workspace}/photos/a.jpg"
    assert predict_main(workspace, f"--dtype={dtype}", "--format=json", photo) == 0
    (entry,) = json.loads(capsys.readouterr().out)

    def classes(dtype: str) -> list[dict[str, Any]]:
        classifier = load_pretrained(workspace / "run", dtype=dtype)
        images = expand_image_paths([photo])
        (prediction,) = classifier.iter_predictions(images, topk=5, batch_size=1)
        return [probability._asdict() for probability in prediction.classes]

    assert entry["classes"] == classes(dtype)
    assert (classes(dtype) == classes("")) == (dtype == "float32")


def test_csv_has_the_values_of_json(
    workspace: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--topk=2", f"{workspace}/photos", f"{workspace}/bad.jpg"]
    assert predict_main(workspace, "--format=csv", *arguments) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    predict_main(workspace, "--format=json", *arguments)
    entries = json.loads(capsys.readouterr().out)
    assert len(rows) == 9
    bad = {"image": f"{workspace}/bad.jpg", "error": reason}
    assert rows.pop() == dict.fromkeys(rows[0], "") | bad
    assert {row["error"] for row in rows} == {""}
    assert [row["rank"] for row in rows] == ["1", "2"] * 4
    assert rows[-1]["image"] == f"{workspace}/photos/with, comma.png"
    classes = [probability for entry in entries[:4] for probability in entry["classes"]]
    columns = {"probability": float, "name": str, "class_index": int, "description": str}
    for name, to_type in columns.items():
        assert [to_type(row[name]) for row in rows] == [entry[name] for entry in classes]


@pytest.mark.parametrize("pattern", ["photos/*.png", "photos/**/*.png"])
def test_patterns_are_expanded(
    workspace: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    assert predict_main(workspace, "--format=json", f"{workspace}/{pattern}") == 0
    found = {Path(name).name for name in names(capsys.readouterr().out)}
    assert found == {"b.png", "with, comma.png"} | ({"c.png"} if "**" in pattern else set())


def test_files_from_reads_a_list(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list_file = tmp_path / "list.txt"
    paths = [f"{workspace}/photos/with, comma.png", f"{workspace}/photos/a.jpg"]
    list_file.write_text("\n".join(paths) + "\n\n")
    assert predict_main(workspace, "--format=json", f"--files_from={list_file}") == 0
    assert names(capsys.readouterr().out) == paths


def test_labels_replace_class_names(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"class nr {index}\n" for index in range(10)), encoding="utf-8")
    photo = f"{workspace}/photos/a.jpg"
    assert predict_main(workspace, "--format=json", f"--labels={labels}", photo) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    for probability in entry["classes"]:
        assert probability["name"] == f"class nr {probability['class_index']}"


@pytest.mark.parametrize("num_classes", [1_000, 11_221, 21_843])
def test_imagenet_classes_are_named_by_wordnet_ids_and_in_words(
    num_classes: int, tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(class_names=(), num_classes=num_classes)
    path = save_npz(weights, tmp_path / "Mixer.npz")
    photo = f"{workspace}/photos/a.jpg"

    def run(format: str) -> str:
        arguments = [f"--checkpoint={path}", f"--format={format}", "--image_size=32"]
        assert predict.main([*arguments, photo]) == 0
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert mentions(line, "Mixer-custom", "32", "16", "Appendix C")
        return captured.out

    (entry,) = json.loads(run("json"))
    classes = entry["classes"]
    for probability in classes:
        assert probability["name"] == imagenet_wnids(num_classes)[probability["class_index"]]
        assert probability["description"] == describe_class(probability["name"]) != ""
    _, *lines = run("table").splitlines()
    words = [f"{probability['name']}  {probability['description']}" for probability in classes]
    assert [line.split("%  ")[1] for line in lines] == words
    rows = csv.DictReader(io.StringIO(run("csv")))
    assert [f"{row['name']}  {row['description']}" for row in rows] == words
    predictions = load_pretrained(path, image_size=32).predict(photo)
    assert [entry._asdict() for entry in predictions[0].classes] == classes


def test_classes_of_a_run_that_are_wordnet_ids_are_described(
    tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(random_weights(class_names=("n02012849", "n03126707", "cat")), tmp_path)
    assert predict.main([f"--checkpoint={run}", f"{workspace}/photos/a.jpg"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    # Both cranes keep their IDs.
    assert sorted(line.split("%  ")[1] for line in lines) == [
        "cat",
        "n02012849  crane",
        "n03126707  crane",
    ]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], []),
        (["{workspace}/nothing.jpg"], ["DIR/nothing.jpg"]),
        (["{workspace}/run"], ["DIR/run"]),
        (["{workspace}/*.bmp"], ["DIR/*.bmp"]),
        (["{workspace}/photos/more/*/**"], ["DIR/photos/more/*/**"]),
        (["{workspace}/a.jpg", "{workspace}/b.jpg"], ["DIR/a.jpg", "1"]),
        (["~nosuchuser/x.jpg"], ["~nosuchuser/x.jpg"]),
        (["{workspace}/" + "x" * 256], ["DIR/" + "x" * 256, "File name too long"]),
        (["", "{photo}"], []),
        (["--files_from=-", "-"], ['"-"']),
        (["--labels=-", "-"], ['"-"']),
        (["-", "-"], ['"-"']),
        (["--labels=~nosuchuser/x", "{photo}"], ["--labels", "~nosuchuser/x", "No such file"]),
        (["--files_from=~nosuchuser/x"], ["--files_from", "~nosuchuser/x", "No such file"]),
        (["--labels={workspace}/latin.txt", "{photo}"], ["DIR/latin.txt", "2", "UTF-8"]),
        (
            ["--checkpoint={workspace}/features", "--format=csv", "{photo}"],
            ["DIR/features", "head"],
        ),
        (
            ["--checkpoint={workspace}/zeroed.npz", "{photo}"],
            ["DIR/zeroed.npz", "head", "zeros", "--config.init_from", "--suite=few_shot"],
        ),
        (["--topk=0", "{photo}"], ["--topk", "0"]),
        (["--eval_crop_fraction=1.5", "{photo}"], ["eval_crop_fraction", "1.5", "1"]),
        (
            ["--labels={workspace}/none.txt", "{photo}"],
            ["--labels", "DIR/none.txt", "No such file"],
        ),
        (["--labels={workspace}/empty.txt", "{photo}"], ["DIR/empty.txt"]),
        (["--labels={workspace}/two.txt", "{photo}"], ["10", "2"]),
        (["--files_from={workspace}/none.txt"], ["--files_from", "DIR/none.txt"]),
        (["--image_size=18", "{photo}"], ["image_size", "18", "patch_size", "4"]),
        (["--image_size=1x2x3", "{photo}"], ["--image_size", "1x2x3", "HEIGHTxWIDTH"]),
        (["--step=3", "{photo}"], ["DIR/run", "3", "1"]),
        (
            ["--checkpoint={workspace}/photos/a.jpg", "{photo}"],
            ["DIR/photos/a.jpg", ".npz", ".safetensors"],
        ),
        (["--checkpoint={workspace}/photos", "{photo}"], ["DIR/photos"]),
        (["--checkpoint={workspace}/gone.npz", "{photo}"], ["DIR/gone.npz"]),
        (["--format=xml", "{photo}"], ["--format", "xml"]),
        (["--format=html", "{photo}"], ["--format=html", "--out"]),
        (["--out={workspace}/a.html", "{photo}"], ["--out", "--format=html", "table"]),
        (["--format=html", "--out={workspace}/a.htm", "{photo}"], ["DIR/a.htm", ".html"]),
        (["--format=html", "--out={workspace}/none/a.html", "{photo}"], ["DIR/none"]),
        (["--dtype=float16", "{photo}"], ["--dtype", "float16"]),
    ],
)
def test_usage_errors_are_one_line(
    workspace: Path,
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (workspace / "two.txt").write_text("a\nb\n")
    (workspace / "empty.txt").write_text("")
    (workspace / "latin.txt").write_bytes("Katze\nHündin\n".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    fields: dict[str, Any] = {"workspace": workspace, "photo": f"{workspace}/photos/a.jpg"}
    with pytest.raises(UserError) as caught:
        predict_main(workspace, *(argument.format(**fields) for argument in arguments))
    # The path can contain numbers.
    message = str(caught.value).replace(str(workspace), "DIR")
    assert mentions(message, *parts)
    assert "\n" not in message
    assert capsys.readouterr().out == ""


def test_file_name_that_is_not_text_is_escaped(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = os.fsencode(tmp_path) + b"/odd\xff.png"
    Path(os.fsdecode(path)).write_bytes((workspace / "photos" / "b.png").read_bytes())
    assert predict_main(workspace, "--format=json", str(tmp_path)) == 0
    assert names(capsys.readouterr().out) == [f"{tmp_path}/odd\\xff.png"]


def test_unreadable_names_are_reported_and_the_others_classified(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    list_file = tmp_path / "list.txt"
    long, nil = "x" * 256, "nil\0*.png"
    list_file.write_text(f"{workspace}/photos/b.png\n~nosuchuser/x.jpg\n{tmp_path}/{long}\n{nil}\n")
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "nowhere")
    arguments = [
        f"{tmp_path}/gone.png",
        f"{workspace}/photos/a.jpg",
        f"{tmp_path}/empty",
        str(link),
    ]
    assert predict_main(workspace, "--format=json", f"--files_from={list_file}", *arguments) == 1
    captured = capsys.readouterr()
    errors = {entry["image"]: entry.get("error") for entry in json.loads(captured.out)}
    good = {f"{workspace}/photos/a.jpg", f"{workspace}/photos/b.png"}
    missing, unknown_user, empty = f"{tmp_path}/gone.png", "~nosuchuser/x.jpg", f"{tmp_path}/empty"
    bad = {missing, unknown_user, empty, str(link), f"{tmp_path}/{long}", r"nil\x00*.png"}
    assert errors.keys() == good | bad
    assert {name for name, error in errors.items() if error is None} == good
    assert errors[missing] == errors[unknown_user]
    assert len(set(errors.values())) == 6
    assert mentions(errors[str(link)], os.strerror(errno.ENOENT))
    assert any(mentions(line, str(link), errors[str(link)]) for line in captured.err.splitlines())
    assert mentions(errors[f"{tmp_path}/{long}"], "File name too long")
    assert mentions(captured.err.splitlines()[-1], "6", "8")


def test_patterns_skip_empty_folders_and_duplicates(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").symlink_to(workspace / "photos")
    assert predict_main(workspace, "--format=json", f"{tmp_path}/*") == 0
    expected = ["a.jpg", "b.png", "more/c.png", "with, comma.png"]
    assert names(capsys.readouterr().out) == [f"{tmp_path}/photos/{name}" for name in expected]
    assert predict_main(workspace, "--format=json", f"{tmp_path}/photos/m**") == 0
    assert names(capsys.readouterr().out) == [f"{tmp_path}/photos/more/c.png"]
    assert predict_main(workspace, "--format=json", f"{workspace}/photos/more/**") == 0
    assert names(capsys.readouterr().out) == [f"{workspace}/photos/more/c.png"]


def test_folders_are_searched_as_in_training(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo = (workspace / "photos" / "b.png").read_bytes()
    for name in ("b.png", ".hidden.png", ".trash/x.png", "deep/a.png", "secret/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(photo)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "deep" / "circle").symlink_to(tmp_path)

    scandir = os.scandir

    def scan(path: Path) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert predict_main(workspace, "--format=json", str(tmp_path)) == 1
    captured = capsys.readouterr()
    expected = [f"{tmp_path}/{name}" for name in ("b.png", "deep/a.png", "secret")]
    assert names(captured.out) == expected
    assert mentions(captured.err.splitlines()[0], f"{tmp_path}/secret")


def test_a_pipe_is_read_if_it_is_named_but_not_by_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    ((_, read),) = expand_image_paths([f"{tmp_path}/*.png"])
    with raises(BadImageError, "not a regular file"):
        read()
    ((name, read),) = expand_image_paths([f"{tmp_path}/pipe.png"])
    # More than a pipe holds at a time.
    content = b"image" * 100_000
    with ThreadPoolExecutor() as pool:
        written = pool.submit((tmp_path / "pipe.png").write_bytes, content)
        assert read() == content
        assert written.result() == len(content)
        monkeypatch.setattr(image_files, "MAX_BYTES", 100)
        pool.submit((tmp_path / "pipe.png").write_bytes, b"image" * 100)
        with raises(BadImageError, name, "100"):
            read()


def test_a_file_named_dash_is_found_by_a_pattern(
    workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "-").write_bytes((workspace / "photos" / "b.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert predict_main(workspace, "--format=json", "?") == 0
    assert names(capsys.readouterr().out) == ["-"]


def test_labels_with_byte_order_mark_and_crlf(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "names.txt"
    labels.write_bytes("".join(f"Hündin {index}\r\n" for index in range(10)).encode("utf-8-sig"))
    arguments = [f"--labels={labels}", "--topk=10", f"{workspace}/photos/a.jpg"]
    assert predict_main(workspace, "--format=json", *arguments) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert {p["name"] for p in entry["classes"]} == {f"Hündin {index}" for index in range(10)}


@pytest.mark.parametrize("ignored", [False, True])
def test_exif_orientation_is_applied_unless_ignored(
    ignored: bool, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = encode_with_orientation(smooth(40, 16), 6)
    (tmp_path / "photo.jpg").write_bytes(photo)
    pixels = decode(photo, exif_orientation=not ignored)
    cv2.imwrite(str(tmp_path / "pixels.png"), pixels[:, :, ::-1])
    arguments = ["--ignore_exif"] if ignored else []
    assert predict_main(workspace, "--format=json", "--topk=10", *arguments, str(tmp_path)) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["classes"] == second["classes"]


def test_only_the_command_disables_opencv_threads(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(cv2, "setNumThreads", calls.append)
    load_pretrained(f"{workspace}/run").predict([workspace / "photos" / "a.jpg"])
    assert calls == []
    assert predict_main(workspace, f"{workspace}/photos/a.jpg") == 0
    assert calls == [0]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["json", "csv"])
def test_json_and_csv_are_utf8_in_any_locale(
    format: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "names.txt"
    labels.write_text("".join(f"Hündin {index}\n" for index in range(10)), encoding="utf-8")
    arguments = [f"--checkpoint={workspace}/run", f"--labels={labels}", f"--format={format}"]
    photo = f"{workspace}/photos/a.jpg"
    process = subprocess.run(
        [sys.executable, "-m", "mixer_jax.predict", *arguments, photo],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert process.stdout.decode().count("Hündin") == 5


def read_page(path: Path) -> Page:
    """Parses a page; its text has a space between elements."""
    text = path.read_text(encoding="utf-8")
    page = check_stands_alone(text)
    page.text = visible_text(text)
    return page


def test_page_has_the_answers_of_json(
    workspace: Path, tmp_path: Path, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--topk=3", f"{workspace}/photos", f"{workspace}/bad.jpg"]
    out = tmp_path / "page.html"
    assert predict_main(workspace, "--format=html", f"--out={out}", *arguments) == 1
    assert mentions(capsys.readouterr().out, str(out), "5")
    predict_main(workspace, "--format=json", *arguments)
    entries = json.loads(capsys.readouterr().out)
    page = read_page(out)
    classes = [entry for image in entries[:4] for entry in image["classes"]]
    shown = [float(value) for value in page.attributes("data", "value")]
    assert shown == [entry["probability"] for entry in classes]
    bars = [values["style"] for _, values in page.elements if values.get("class") == "bar"]
    assert bars == [f"width: {100 * entry['probability']:.2f}%" for entry in classes]
    for entry in classes:
        assert mentions(page.text, entry["name"], f"{100 * entry['probability']:.2f}%")
    assert mentions(page.text, *(entry["image"] for entry in entries), reason, "5 images", "1")
    # Thumbnails of the images that can be read.
    kinds = [uri.partition(";")[0] for uri in page.attributes("img", "src")]
    assert kinds == ["data:image/png"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_page_shows_names_as_text(workspace: Path, tmp_path: Path) -> None:
    nasty = [
        "<script>alert(1)</script>",
        "\"'><img src=x onerror=y>",
        "\u05e9\u05dc\u05d5\u05dd&amp;\U0001f41d",
    ]
    labels, out = tmp_path / "names.txt", tmp_path / "page.html"
    labels.write_text("".join(f"{name}\n" for name in [*nasty, *"0123456"]), encoding="utf-8")
    photo = tmp_path / f"{nasty[2]}<b>.png"
    photo.write_bytes((workspace / "photos" / "b.png").read_bytes())
    arguments = [f"--labels={labels}", "--topk=10", f"--out={out}", str(photo)]
    assert predict_main(workspace, "--format=html", *arguments) == 0
    page = read_page(out)
    assert all(name in page.text for name in [*nasty, photo.name])
    assert "amp;amp;" in out.read_text(encoding="utf-8")


def test_page_shows_wordnet_ids_in_words(tmp_path: Path, workspace: Path) -> None:
    path = save_npz(random_weights(class_names=(), num_classes=1000), tmp_path / "Mixer.npz")
    out = tmp_path / "page.html"
    arguments = [f"--checkpoint={path}", "--format=html", f"--out={out}", "--topk=1000"]
    assert predict.main([*arguments, f"{workspace}/photos/a.jpg"]) == 0
    assert mentions(read_page(out).text, "tench, Tinca tinca", "n01440764")


def test_page_has_a_limit(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(predict, "_MAX_HTML_IMAGES", 3)
    out = tmp_path / "page.html"
    arguments = ["--format=html", f"--out={out}", f"{workspace}/photos"]
    assert predict_main(workspace, *arguments) == 0
    assert mentions(capsys.readouterr().err, "3", "4", "--format=csv")
    page = read_page(out)
    assert len(page.attributes("img", "src")) == 3
    assert mentions(page.text, "3 images", "first of 4", "--format=csv")


def test_page_is_not_half_written_on_a_full_disk(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "page.html"
    out.write_text("an older page")
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with raises(RunError, str(out), "No space left on device"):
        predict_main(workspace, "--format=html", f"--out={out}", f"{workspace}/photos/a.jpg")
    assert out.read_text() == "an older page"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
