"""Tests of the program gate: names and locations do not count, everything else does."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu, triton

from tests import lowered_programs
from tests.lowered_programs import compare, describe_difference, main, to_text, write

PROGRAM = "cpu_tiny_predict_logits"
SOURCE = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


@jax.jit
def normalize(x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def double(x, y):
    y[...] = jnp.exp(x[...]) * 2.0


def forward(x, compiler_params):
    x = normalize(x)
    if compiler_params is None:
        return {"scores": jnp.exp(x) * 2.0}
    y = pl.pallas_call(double, x, name="double", compiler_params=compiler_params)(x)
    return {"scores": normalize(y)}
"""
RENAMED = (
    SOURCE.replace("normalize", "layer_norm")
    .replace("double", "scaled_exp")
    .replace("forward", "predict")
    .replace("scores", "logits")
)
COMPILER_PARAMS = {
    "cpu": None,
    "tpu": tpu.CompilerParams(),
    "cuda": triton.CompilerParams(num_warps=1),
}


def lowered_text(source: str, platform: str, file: str = "old.py", name: str = "forward") -> str:
    namespace: dict[str, Any] = {}
    exec(compile(source, file, "exec"), namespace)
    function = jax.jit(namespace[name], static_argnums=1)
    traced = function.trace(jax.ShapeDtypeStruct((8, 128), jnp.float32), COMPILER_PARAMS[platform])
    return to_text(traced.lower(lowering_platforms=(platform,)))


@pytest.mark.parametrize("platform", COMPILER_PARAMS)
def test_to_text_ignores_names_and_locations(platform: str) -> None:
    old = lowered_text(SOURCE, platform)
    moved = "# A comment.\n" * 7 + RENAMED
    new = lowered_text(moved, platform, "elsewhere/new.py", "predict")
    assert describe_difference(old, new) == ""
    assert ("// kernel 0" in old) == (platform != "cpu")
    assert not any(word in old for word in ("normalize", "double", "forward", "scores", "old.py"))


@pytest.mark.parametrize("platform", COMPILER_PARAMS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1e-6", "1e-5"),
        ("x.mean(", "-x.sum("),
        (") * 2.0", " * 2.0)"),
        ("exp(x[...]) * 2.0", "exp(x[...]) * 3.0"),
        ('"double", ', '"double", grid=(2,), '),
    ],
)
def test_to_text_shows_changed_computation(platform: str, before: str, after: str) -> None:
    only_in_kernel = "x[...]" in before or "grid" in after
    changed = SOURCE.replace(before, after)
    assert changed != SOURCE
    same = lowered_text(SOURCE, platform) == lowered_text(changed, platform)
    assert same == (only_in_kernel and platform == "cpu")


def test_two_writes_are_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = tmp_path / "old", tmp_path / "new"
    for folder in folders:
        assert write(folder, PROGRAM) == 0
    assert "stablehlo.dot_general" in (folders[0] / f"{PROGRAM}.mlir").read_text()
    assert main(["compare", *map(str, folders)]) == 0
    assert "1 programs compared, 0 differ" in capsys.readouterr().out


def test_changed_program_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "old", PROGRAM)
    monkeypatch.setitem(lowered_programs.MODELS["tiny"], "gelu", "exact")
    write(tmp_path / "new", PROGRAM)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{PROGRAM}.mlir: differs from line ")
    assert lines[-1] == "1 programs compared, 1 differ"


def test_describe_difference_shows_where_long_lines_differ() -> None:
    old, new = ["same", "x" * 1000 + "old"], ["same", "x" * 1000 + "new", "more"]
    lines = describe_difference("\n".join(old), "\n".join(new)).splitlines()
    assert lines[0] == "differs from line 2 on (2 and 3 lines)"
    assert [line[-6:] for line in lines[1:]] == ["xxxold", "xxxnew", "+ more"]
    assert max(map(len, lines)) < 200


def test_missing_and_failed_programs_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / f"{PROGRAM}.mlir").write_text("module @module {}")

    def fail(program: lowered_programs.Program) -> None:
        raise NotImplementedError("needs a device\nand more")

    monkeypatch.setattr(lowered_programs, "lower", fail)
    assert write(new, PROGRAM) == 1
    assert (new / f"{PROGRAM}.txt").read_text() == "NotImplementedError: needs a device\n"
    capsys.readouterr()
    assert compare(old, new) == 2
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{PROGRAM}.mlir: missing in {new}",
        f"{PROGRAM}.txt: missing in {old}",
    ]
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(old), str(new), "--only=cuda_*"])


def test_write_removes_outdated_files_of_the_pattern_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [tmp_path / "cpu_tiny_train_default.mlir", tmp_path / "notes.txt"]
    for path in [tmp_path / f"{PROGRAM}.txt", *kept]:
        path.write_text("old")
    monkeypatch.setattr(lowered_programs, "lower", lambda program: None)
    monkeypatch.setattr(lowered_programs, "to_text", lambda lowered: "new")
    write(tmp_path, PROGRAM)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / f"{PROGRAM}.mlir"])


def test_program_names_are_unique() -> None:
    names = [program.name for program in lowered_programs.list_programs()]
    assert len(set(names)) == len(names)
