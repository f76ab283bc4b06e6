"""Tests of `--mode=train,infer` in real processes."""

import json
import re
from pathlib import Path

import pytest

from mixer_jax.benchmarks.candidates import Workload
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions

pytestmark = pytest.mark.slow

SMALL = ["--model=S/32", "--image_size=64", "--num_classes=10", "--scan_unroll=1", "--rounds=1"]
# Installed packages that the measured programs do not need.
OPTIONAL = [
    *("PIL", "clu", "cv2", "etils", "grain", "huggingface_hub", "matplotlib", "ml_collections"),
    *("orbax", "safetensors", "simplejpeg", "sklearn", "tensorflow", "tensorflow_datasets"),
    *("timm", "torch"),
]
HIDE_OPTIONAL = f"""
from importlib.machinery import PathFinder

find_spec_of_all = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    hidden = name.partition(".")[0] in {OPTIONAL}
    return None if hidden else find_spec_of_all(name, path, target)

PathFinder.find_spec = find_spec
"""


@pytest.fixture
def only_jax_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes new Python processes find little more than JAX, Flax and optax."""
    (tmp_path / "sitecustomize.py").write_text(HIDE_OPTIONAL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("only_jax_installed")
def test_json_and_files_where_only_jax_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
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
    assert [mode["mode"] for mode in report["modes"]] == ["train", "infer"]
    for mode in report["modes"]:
        workload = Workload(mode["mode"], "Mixer-S/32", 64, 10, "float32", 2)
        assert {name: mode[name] for name in Workload._fields} == workload._asdict()
        assert mode["batch_size_trials"] is None
        assert not mode["isolated"]
        assert [row["name"] for row in mode["candidates"]] == ["mixer_jax", "reference"]
        assert mode["candidates"][0]["relative_time"] == 1
        for row in mode["candidates"]:
            assert not row["failed"]
            assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
            flops_per_second = workload.flops / row["step_seconds"]
            peak = mode["matmul_flops_per_second"]["jax"]
            assert row["mfu"] == pytest.approx(flops_per_second / peak)
            assert row["first_step_seconds"] > row["compile_seconds"] > 0
            assert row["cached_first_step_seconds"] > 0
            assert (row["latency_seconds"] is None) == (mode["mode"] == "train")
            # At least the parameters, and two moments of each in training.
            num_arrays = 3 if mode["mode"] == "train" else 1
            assert row["memory_bytes"] > 4 * 18_000_000 * num_arrays
        assert list((tmp_path / "traces" / mode["mode"]).rglob("*.xplane.pb"))


def test_table_and_plot(tmp_path: Path) -> None:
    plot = tmp_path / "throughput.png"
    done = run_cli("benchmark", *SMALL, "--batch_size=1", "--baselines=none", f"--plot={plot}")
    assert not done.stderr
    versions, empty, title, matmul, headings, row = done.stdout.splitlines()
    assert mentions(versions, "cpu", "jax")
    assert not empty
    assert mentions(title, "train", "Mixer-S/32", "64", "1", "float32")
    assert re.search(r"GFLOP/s.*\bjax \d", matmul)
    assert len(re.split(" {2,}", headings.strip())) == len(row.split()) - 1
    assert (row.split()[0], row.split()[-1]) == ("mixer_jax", "1.00")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("only_jax_installed")
def test_usage_errors_where_only_jax_is_installed() -> None:
    def error_line(*flags: str) -> str:
        (line,) = run_cli("benchmark", *flags, code=2).stderr.splitlines()
        return line

    # A baseline that is left out by default is not reported together with a usage error.
    assert mentions(error_line("--out=nowhere/a.json"), "--out", "nowhere/a.json")
    for mode in ("train", "compile"):
        line = error_line(*SMALL, f"--mode={mode}", "--model.backend=triton")
        assert mentions(line, "model.backend", "triton", "GPU", "auto", "xla")
