"""Tests of training and evaluation on damaged, hostile and unusual image files."""

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mixer_jax.training.metrics import read_metrics
from tests.helpers.cli import run_cli
from tests.helpers.images import (
    encode,
    encode_with_orientation,
    noise,
    photograph,
    png_with_header_size,
    smooth,
)
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, start
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow


def write_mixed_images(folder: Path, images: list[bytes]) -> dict[str, str]:
    """Writes good, unusual and bad files; returns the cause of each bad one."""
    photo = encode(photograph(), "JPEG", quality=85)
    good = {
        "cmyk.jpg": encode(photograph(), "JPEG", "CMYK"),
        "sixteen_bits.png": cv2.imencode(".png", np.full((9, 9), 40_000, np.uint16))[1].tobytes(),
        "animation.gif": encode(smooth(20, 30), "GIF"),
        "png_in_name_jpg.jpg": encode(smooth(20, 30), "PNG"),
        "rotated.jpg": encode_with_orientation(smooth(30, 20), 6),
        "one_pixel.png": encode(noise(1, 1), "PNG"),
        **{f"good_{index}.png": encoded for index, encoded in enumerate(images)},
    }
    bad = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"<html>404</html>", "not an image"),
        "bomb.png": (png_with_header_size(20_000, 20_000), "too many pixels"),
        **{f"tenths_{n}.jpg": (photo[: len(photo) * n // 10], "incomplete") for n in range(1, 10)},
    }
    for name, encoded in [*good.items(), *((name, b) for name, (b, _) in bad.items())]:
        (folder / "a").mkdir(parents=True, exist_ok=True)
        (folder / "a" / name).write_bytes(encoded)
    (folder / "b").mkdir()
    (folder / "b" / "good.png").write_bytes(images[0])
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
        **{name: cause for name, (_, cause) in bad.items()},
    }


def test_bad_files_are_logged_in_training_and_named_in_evaluation(tmp_path: Path) -> None:
    images = [encode(noise(8, 8), "PNG")] * 30
    causes = write_mixed_images(tmp_path / "images" / "train", images)
    write_mixed_images(tmp_path / "images" / "test", images)
    # Several epochs, so that every file is read.
    changes: dict[str, Any] = NO_REGULARIZATION | {
        "bad_images__max_fraction": 0.5,
        "dataset__name": f"folder:{tmp_path}/images",
        "num_steps": 12,
        "bad_images__skip_in_evaluation": True,
    }
    out = finish(start("", tmp_path / "run", **changes))
    lines = (tmp_path / "run" / "bad_images_0.jsonl").read_text().splitlines()
    reasons = {Path(line["name"]).name: line["reason"] for line in map(json.loads, lines)}
    assert reasons.keys() == causes.keys()
    # Causes and reasons correspond one to one.
    pairs = {(causes[name], reason) for name, reason in reasons.items()}
    assert len(pairs) == len(set(causes.values())) == len(set(reasons.values()))
    incomplete = reasons["tenths_1.jpg"]
    assert any(mentions(line, str(len(causes)), f"9 {incomplete}") for line in out.splitlines())
    last = read_metrics(str(tmp_path / "run"))[-1]
    assert (last["test/num_examples"], last["test/num_bad"]) == (37, len(causes))
    data = [f"--checkpoint={tmp_path}/run", "--split=test"]
    named = run_cli("evaluate", *data, code=2)
    assert named.stdout == ""
    (line,) = named.stderr.strip().splitlines()
    assert mentions(line, str(len(causes)), "--skip_bad_images")
    named_with_reason = (
        re.search(rf"images/test/a/{re.escape(name)}\W+{re.escape(reason)}", line)
        for name, reason in reasons.items()
    )
    assert sum(map(bool, named_with_reason)) == 5
    scores = json.loads(run_cli("evaluate", *data, "--skip_bad_images", "--json").stdout)
    assert (scores["num_examples"], scores["num_bad"]) == (37, len(causes))
