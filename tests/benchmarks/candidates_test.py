"""Tests of candidates, workloads and their arguments."""

import argparse
import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks import candidates
from mixer_jax.benchmarks.candidates import (
    MIXER_JAX,
    REFERENCE,
    TIMM,
    TIMM_COMPILED,
    Candidate,
    Workload,
    add_workload_args,
    check_backends,
    find_reference,
    our_candidates,
    parse_baselines,
    parse_candidates,
)
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.registry import FAMILIES, get_family
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises


def test_our_candidates_are_named_by_what_they_differ_in() -> None:
    choices: dict[str, list[Any]] = {
        "scan_unroll": [1, 0],
        "remat": ["none", "dots"],
        "gelu": ["exact"],
    }
    names = [candidate.name for candidate in our_candidates(choices)]
    assert len(set(names)) == 4
    settings = itertools.product(["1", "all"], ["none", "dots"])
    for name, (scan_unroll, remat) in zip(names, settings, strict=True):
        assert mentions(name, MIXER_JAX, "scan_unroll", scan_unroll, "remat", remat)
        assert "gelu" not in name
    (only,) = our_candidates({"scan_unroll": [0], "remat": ["none"]})
    assert only.name == MIXER_JAX


def test_remat_auto_is_named_if_scans_differ() -> None:
    # It means different policies.
    for candidate in our_candidates({"scan_unroll": [1, 0], "remat": ["auto"]}):
        assert mentions(candidate.name, "remat", "auto")


def test_flops_of_training_are_three_forward_passes() -> None:
    infer = Workload("infer", "Mixer-S/32", 64, 10, "float32", 2)
    assert infer.flops == 2 * get_family("mixer").forward_flops(VARIANTS["S/32"], 64, 10)
    assert infer._replace(mode="train").flops == 3 * infer.flops


def test_check_backends_refuses_another_platform() -> None:
    candidate = Candidate("ours", MIXER_JAX, {"backend": "triton"})
    workload = Workload("infer", "Mixer-S/32", 64, 10, "float32", 2)
    check_backends(workload, [candidate], "gpu")
    with raises(UserError, "triton", "GPU"):
        check_backends(workload, [Candidate("default", MIXER_JAX), candidate], "cpu")
    # No other family has these kernels.
    for model in ("ViT-S/32", "BiT-R50x1"):
        with raises(UserError, "model.backend", "triton"):
            check_backends(workload._replace(model=model), [candidate], "gpu")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workload_args(parser)
    return parser.parse_args([*argv, "--model=B/16"])


def workload(mode: str = "train") -> Workload:
    return Workload(mode, "Mixer-B/16", 224, 1000, "float32", 8)


def test_parse_candidates_combines_all_values() -> None:
    namespace = parse("--scan_unroll=1,0", "--remat=none,dots", "--model.gelu=exact")
    parsed = parse_candidates(namespace, workload())
    assert [dict(candidate.overrides) for candidate in parsed] == [
        {"gelu": "exact", "scan_unroll": scan_unroll, "remat": remat}
        for scan_unroll in (1, 0)
        for remat in ("none", "dots")
    ]


def test_parse_candidates_infers_with_one_remat_policy() -> None:
    assert len(parse_candidates(parse("--remat=none,dots"), workload("infer"))) == 1


def test_parse_candidates_defaults_to_one_candidate() -> None:
    (candidate,) = parse_candidates(parse(), workload())
    assert candidate.overrides == {"scan_unroll": -1, "remat": "auto"}


@pytest.mark.parametrize(
    ("flags", "installed", "names"),
    [
        ([], True, [REFERENCE, TIMM, TIMM_COMPILED]),
        ([], False, [REFERENCE]),
        (["--baselines=timm"], True, [TIMM, TIMM_COMPILED]),
        (["--baselines=timm,reference", "--no_torch_compile"], True, [TIMM, REFERENCE]),
        (["--baselines=none"], True, []),
    ],
)
def test_parse_baselines(
    flags: list[str], installed: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "missing_timm_package", lambda: "" if installed else "torch")
    parser = argparse.ArgumentParser()
    parser.add_argument("--baselines")
    parser.add_argument("--no_torch_compile", action="store_true")
    baselines = parse_baselines(parser.parse_args(flags), workload(), with_timm=True)
    assert [baseline.name for baseline in baselines] == names


def test_parse_baselines_without_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "find_reference", lambda family: None)
    monkeypatch.setattr(candidates, "missing_timm_package", lambda: "torch")
    args = argparse.Namespace(baselines=None)
    assert parse_baselines(args, workload(), with_timm=True) == []
    with raises(UserError, "--baselines=reference", "Mixer"):
        parse_baselines(argparse.Namespace(baselines="reference"), workload())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_reference(name: str) -> None:
    config = next(iter(FAMILIES[name].variants.values()))
    reference_class = importlib.import_module(find_reference(FAMILIES[name]) or "").Reference
    assert reference_class(config, 10, "bfloat16").config == config


def test_parse_baselines_requires_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "missing_timm_package", lambda: "torch")
    with raises(UserError, "--baselines", "timm", "pip install torch timm"):
        benchmark.main(["--baselines=timm"])


WORKLOAD_ERRORS = [
    ("--image_size=50", ["image_size", "50", "patch_size", "16"]),
    ("--model=X/16", ["X/16", "Mixer-B/16"]),
    ("--model=custom", ["--model", "custom"]),
    ("--batch_size=0", ["--batch_size", "0"]),
    ("--num_classes=0", ["--num_classes", "0"]),
    ("--scan_unroll=99", ["--scan_unroll", "99", "-1", "12"]),
    ("--scan_unroll=-2", ["--scan_unroll", "-2"]),
    ("--scan_unroll=0,12", ["--scan_unroll", "0,12"]),
    ("--remat=some", ["--remat", "some", "auto", "none", "dots", "mlp_hidden", "full"]),
    ("--model.gelu=exact,soft", ["--model.gelu", "soft", "tanh", "exact"]),
    ("--model.gelu=tanh,tanh", ["--model.gelu", "tanh,tanh"]),
    ("--model.dropout=0,2", ["--model.dropout", "2.0"]),
    ("--model.dropout=much", ["--model.dropout", "much"]),
    ("--model.depth=3", ["--model.depth"]),
    ("--num_threads=2", ["--num_threads"]),
    ("--out=nowhere/a.json", ["--out", "nowhere/a.json"]),
    ("--out=configs", ["--out", "configs"]),
]


@pytest.mark.parametrize("mode", ["train,infer", "compile", "hbm_traffic"])
def test_usage_errors_of_workloads(mode: str) -> None:
    for argument, parts in WORKLOAD_ERRORS:
        with raises(UserError, *parts) as caught:
            benchmark.main([f"--mode={mode}", argument])
        assert "\n" not in str(caught.value)


def test_usage_errors_of_throughput(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for argument, parts in [
        ("--batch_size=many", ["--batch_size", "many", "auto"]),
        ("--rounds=0", ["--rounds", "0"]),
        ("--baselines=keras", ["--baselines", "keras", "reference", "timm"]),
        ("--plot=a.gif", ["--plot", "a.gif", ".png"]),
        ("--profile=file", ["--profile", "file"]),
        ("--mode=sideways", ["--mode", "sideways", "train", "infer"]),
        ("--mode=train,input", ["--mode", "train,input"]),
        ("--mode=train,train", ["--mode", "train,train"]),
    ]:
        with raises(UserError, *parts):
            benchmark.main([argument])


def test_usage_error_is_one_line_with_exit_code_2() -> None:
    done = run_cli("benchmark", "--batch_size=0", code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "--batch_size", "0")
    assert not done.stdout
