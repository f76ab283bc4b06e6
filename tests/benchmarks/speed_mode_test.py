"""Tests of `--mode=train,infer`: real processes, as a user starts them."""

import json
import re
from pathlib import Path

import pytest

from mixer_jax.model.variants import VARIANTS, forward_flops
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions

SMALL = ["--variant=S/32", "--image_size=64", "--num_classes=10", "--unroll=1", "--rounds=1"]
# All that the measured programs do not need, though it is installed here.
ABSENT = [
    *("PIL", "clu", "cv2", "etils", "grain", "huggingface_hub", "matplotlib", "ml_collections"),
    *("orbax", "safetensors", "simplejpeg", "sklearn", "tensorflow", "tensorflow_datasets"),
    *("timm", "torch"),
]
WITHOUT_THEM = f"""
from importlib.machinery import PathFinder

usual = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else usual(name, path, target)

PathFinder.find_spec = find_spec
"""


@pytest.fixture
def nothing_else_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python that is started has JAX, Flax and optax, and little else."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_THEM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("nothing_else_installed")
def test_json_and_files_say_all_where_only_jax_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    done = run_cli(
        "benchmark",
        *SMALL,
        "--mode=train,infer",
        "--batch_size=2",
        f"--out={out}",
        f"--profile={tmp_path / 'traces'}",
        "--json",
    )
    (line,) = done.stderr.splitlines()
    assert mentions(line, "torch", "timm")
    report = json.loads(done.stdout)
    assert json.loads(out.read_text()) == report
    assert report["platform"] == "cpu"
    flops = 2 * forward_flops(VARIANTS["S/32"], 64, 10)
    assert [mode["mode"] for mode in report["modes"]] == ["train", "infer"]
    for mode, passes in zip(report["modes"], (3, 1), strict=True):
        assert (mode["batch_size"], mode["dtype"], mode["searched"]) == (2, "float32", None)
        assert not mode["apart"]
        assert [row["name"] for row in mode["contestants"]] == ["mixer_jax", "reference"]
        assert mode["contestants"][0]["ratio"] == 1
        for row in mode["contestants"]:
            assert not row["failed"]
            assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
            rate = passes * flops / row["step_seconds"]
            product = mode["product_flops_per_second"]["jax"]
            assert row["utilisation"] == pytest.approx(rate / product)
            assert row["first_step_seconds"] > row["compile_seconds"] > 0
            assert row["cached_first_step_seconds"] > 0
            assert (row["latency_seconds"] is None) == (mode["mode"] == "train")
            # Parameters, two moments of each in training, and more.
            arrays = 3 if mode["mode"] == "train" else 1
            assert row["memory_bytes"] > 4 * 18_000_000 * arrays
        assert list((tmp_path / "traces" / mode["mode"]).rglob("*.xplane.pb"))


def test_table_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "speed.png"
    done = run_cli(
        "benchmark",
        *SMALL,
        "--batch_size=1",
        "--peers=none",
        f"--picture={picture}",
    )
    assert not done.stderr
    versions, empty, title, products, heads, row = done.stdout.splitlines()
    assert mentions(versions, "cpu", "jax")
    assert not empty
    assert mentions(title, "train", "Mixer-S/32", "64", "1", "float32")
    assert re.search(r"GFLOP/s.*\bjax \d", products)
    # A column for each figure of the row.
    assert len(re.split(" {2,}", heads.strip())) == len(row.split()) - 1
    assert (row.split()[0], row.split()[-1]) == ("mixer_jax", "1.00")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--batch_size=0", ["--batch_size", "0", "1", "auto"]),
        ("--batch_size=many", ["--batch_size", "many", "1", "auto"]),
        ("--rounds=0", ["--rounds", "0", "1"]),
        ("--unroll=99", ["--unroll", "99", "-1", "12"]),
        ("--unroll=0,12", ["--unroll", "0,12"]),
        ("--remat=some", ["--remat", "some", "auto", "none", "dots", "mlp_hidden", "full"]),
        ("--image_size=50", ["image_size", "50", "patch_size", "16"]),
        ("--variant=X/16", ["--variant", "X/16"]),
        ("--peers=keras", ["--peers", "keras", "reference", "timm"]),
        ("--mode=sideways", ["--mode", "sideways", "train", "infer"]),
        ("--mode=train,input", ["--mode", "train,input"]),
        ("--threads=2", ["--threads"]),
        ("--out=nowhere/a.json", ["--out", "nowhere/a.json"]),
        ("--out=configs", ["--out", "configs"]),
        ("--picture=a.gif", ["--picture", "a.gif", ".png"]),
        ("--profile=README.md", ["--profile", "README.md"]),
    ],
)
def test_bad_values(argument: str, parts: list[str]) -> None:
    done = run_cli("benchmark", argument, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
    assert not done.stdout


@pytest.mark.usefixtures("nothing_else_installed")
def test_a_peer_that_is_not_installed_is_told() -> None:
    def mistake(*arguments: str) -> str:
        (line,) = run_cli("benchmark", *arguments, code=2).stderr.splitlines()
        return line

    assert mentions(mistake("--peers=timm"), "--peers", "timm", "pip install torch timm")
    # What is left out unasked is not told beside a mistake.
    assert mentions(mistake("--out=nowhere/a.json"), "--out", "nowhere/a.json")
    for mode in ("train", "compile"):
        told = mistake(*SMALL, f"--mode={mode}", "--model.kernels=triton")
        assert mentions(told, "model.kernels", "triton", "GPU", "auto", "xla")
    assert mentions(mistake("--peers=none", "--picture=a.png"), "--picture", "matplotlib")
