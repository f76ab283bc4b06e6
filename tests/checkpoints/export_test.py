"""Tests of writing weights in other formats: nothing is lost, and nothing wrong is left behind."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax import config
from mixer_jax.checkpoints import export, manager, stablehlo, tree
from mixer_jax.checkpoints.export import (
    check_target_available,
    choose_format,
    export_weights,
    written_size,
)
from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer_config import MixerConfig
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights

OF_TENSORS = ("google", "timm", "orbax")
# How many times the size of a file its conversion adds to what the process had at most.
MEASURE = """
import re, sys
from pathlib import Path
from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import load_checkpoint
source, to, target = sys.argv[1:]
# getrusage would tell the peak of the process that started this one.
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
export_weights(load_checkpoint(source), to, target)
print((peak() - before) * 1024 / Path(source).stat().st_size)
"""


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    """Of which nothing is as it would be guessed, and some numbers are special."""
    made = random_weights(
        image_size=(16, 24),
        class_names=("one", "zwei", "трий"),
        gelu="exact",
        eval_crop="shorter_side",
        exif_orientation=True,
        loss="sigmoid",
        dtype="float32",
        resize_note="grown from 8 px",
    )
    made.params["stem"]["bias"][:4] = (-0.0, 0.0, 1e-42, 3e38)
    return made


@pytest.fixture(scope="module")
def targets(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("targets")
    made = {to: f"{folder}/w{export.SUFFIXES[to]}" for to in OF_TENSORS}
    for to, target in made.items():
        export_weights(weights, to, target)
    return made


def bits(weights: PretrainedWeights) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in tree.flatten(weights.params)}


def target_of(to: str, folder: Path) -> str:
    return f"{folder}/t{export.SUFFIXES[to]}"


@pytest.mark.parametrize(("source", "to"), [*itertools.product(OF_TENSORS, repeat=2)])
def test_nothing_is_lost_between_any_two_formats(
    source: str, to: str, weights: PretrainedWeights, targets: dict[str, str], tmp_path: Path
) -> None:
    target = target_of(to, tmp_path)
    checked = export_weights(load_checkpoint(targets[source]), to, target)
    assert checked
    assert "\n" not in checked
    found = load_checkpoint(target)
    assert bits(found) == bits(weights)
    assert found.model_info == weights.model_info
    beside = [f"t{export.SUFFIXES[to]}.json"] if to == "google" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(target).name, *beside]
    size = sum(len(array) for array in bits(weights).values())
    assert written_size(to, target) > (size / 2 if to == "orbax" else size)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    weights = random_weights(class_names=())
    for to in OF_TENSORS:
        export_weights(weights, to, target_of(to, tmp_path))
        found = load_checkpoint(target_of(to, tmp_path))
        assert (bits(found), found.model_info) == (bits(weights), weights.model_info)


# What `flip` changes, by the names of each format.
FLIPPED = {
    "google": "head/bias",
    "timm": "blocks.1.norm1.bias",
    "orbax": "blocks/token_mixing/Dense_0/bias",
}


def flip(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Changes the lowest bit of one number."""
    for number, (name, tensor) in enumerate(tensors):
        if number == 5:
            tensor = tensor.copy()
            tensor.view(np.uint32).flat[0] ^= 1
        yield name, tensor


def lose(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    return itertools.islice(tensors, 1, None)


@pytest.mark.parametrize("to", ["google", "timm"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors, said: (flip(tensors), said), FLIPPED),
        (lambda tensors, said: (lose(tensors), said), {}),
        (lambda tensors, said: (tensors, said | {"gelu": "tanh"}), {}),
        (lambda tensors, said: (tensors, said | {"image_size": [24, 16]}), {}),
        (lambda tensors, said: (tensors, {}), {}),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_is_not_what_was_written_is_removed(
    to: str,
    change: Callable[..., Any],
    named: dict[str, str],
    exists: bool,
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = export._FILE_FORMATS[to]

    def write(path: str, tensors: Any, said: Any) -> None:
        right.write(path, *change(tensors, said))

    monkeypatch.setitem(export._FILE_FORMATS, to, right._replace(write=write))
    target = Path(target_of(to, tmp_path))
    if exists:
        target.write_text("older")
    with raises(RunError, target.name, *([named[to]] if named else [])):
        export_weights(weights, to, str(target))
    # What was there before still is.
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"] * exists


@pytest.mark.parametrize("to", ["google", "timm"])
def test_a_file_that_is_cut_off_is_removed(
    to: str, weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export._FILE_FORMATS[to]

    def write(path: str, tensors: Any, said: Any) -> None:
        right.write(path, tensors, said)
        Path(path).write_bytes(Path(path).read_bytes()[:-100])

    monkeypatch.setitem(export._FILE_FORMATS, to, right._replace(write=write))
    # Told is the file that was asked for, not the draft.
    with raises(RunError, target_of(to, tmp_path)) as caught:
        export_weights(weights, to, target_of(to, tmp_path))
    assert ".draft" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors, said: (flip(tensors), said), [FLIPPED["orbax"]]),
        (lambda tensors, said: (lose(tensors), said), []),
        (lambda tensors, said: ([*tensors, ("more", np.zeros(3))], said), []),
        (lambda tensors, said: (tensors, said | {"model_info": {}}), []),
        (lambda tensors, said: (tensors, said | {"config": {}}), []),
    ],
)
def test_a_run_that_is_not_what_was_written_is_removed(
    change: Callable[..., Any],
    named: list[str],
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = manager.save_params_streaming

    def write(workdir: str, step: int, params: Any, metadata: Any) -> None:
        tensors, metadata = change(tree.flatten(params), metadata)
        right(workdir, step, tree.unflatten(dict(tensors)), metadata)

    monkeypatch.setattr(manager, "save_params_streaming", write)
    target = target_of("orbax", tmp_path)
    with raises(RunError, Path(target).name, *named):
        export_weights(weights, "orbax", target)
    assert not any(tmp_path.iterdir())


def test_a_converted_run_knows_the_config_it_was_trained_by(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    trained = weights._replace(train_config=config.get_default().to_dict())
    export_weights(trained, "orbax", target_of("orbax", tmp_path))
    found = load_checkpoint(target_of("orbax", tmp_path))
    assert found.train_config == trained.train_config
    assert (found.model_info, bits(found)) == (weights.model_info, bits(weights))


def change_a_bias(
    path: str, beside: str, weights: PretrainedWeights, write: Callable[..., None]
) -> None:
    params = {**weights.params, "head": dict(weights.params["head"])}
    params["head"]["bias"] = params["head"]["bias"] + np.array([0.0, 0.01, 0.0], np.float32)
    write(path, beside, weights._replace(params=params))


def compute_roughly(
    path: str, beside: str, weights: PretrainedWeights, write: Callable[..., None]
) -> None:
    right = stablehlo._build_model
    rough = Execution("bfloat16")
    stablehlo._build_model = lambda model_info: right(model_info).clone(execution=rough)
    try:
        write(path, beside, weights)
    finally:
        stablehlo._build_model = right


def cut_off(path: str, beside: str, weights: PretrainedWeights, write: Callable[..., None]) -> None:
    write(path, beside, weights)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(change_a_bias, ["head/bias"]), (compute_roughly, ["logits"]), (cut_off, [])],
)
def test_a_program_that_is_not_the_model_is_removed(
    wrong: Callable[..., None],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = random_weights(class_names=("one", "two", "three"))
    write = stablehlo.write_stablehlo
    monkeypatch.setattr(stablehlo, "write_stablehlo", lambda *arguments: wrong(*arguments, write))
    target = target_of("stablehlo", tmp_path)
    with raises(RunError, Path(target).stem, *named):
        export_weights(weights, "stablehlo", target)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_was_not_written_whole(
    error: BaseException,
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(path: str, tensors: Any, said: Any) -> None:
        Path(path).write_text("half")
        raise error

    right = export._FILE_FORMATS["google"]
    monkeypatch.setitem(export._FILE_FORMATS, "google", right._replace(write=write))
    target = target_of("google", tmp_path)
    is_full = isinstance(error, OSError)
    kind = UserError if is_full else KeyboardInterrupt
    with raises(kind, *([target, "No space left"] if is_full else [])):
        export_weights(weights, "google", target)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_not_written(number: float, tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["blocks"]["LayerNorm_1"]["bias"][1, 3] = number
    with raises(UserError, "blocks/LayerNorm_1/bias"):
        export_weights(weights, "timm", target_of("timm", tmp_path))
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_becomes_a_run(weights: PretrainedWeights, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_target_available("orbax", f"{tmp_path}/run", force=False)
    export_weights(weights, "orbax", f"{tmp_path}/run")
    assert load_checkpoint(f"{tmp_path}/run").step == 0


@pytest.mark.parametrize(
    ("to", "target", "wanted"),
    [
        ("", "w.npz", "google"),
        ("", "w.safetensors", "timm"),
        ("", "w.stablehlo", "stablehlo"),
        ("", "folder/w", "orbax"),
        ("timm", "a.b.safetensors", "timm"),
        ("orbax", "run.v2", "orbax"),
    ],
)
def test_a_format_is_told_by_the_ending(to: str, target: str, wanted: str) -> None:
    assert choose_format(to, target) == wanted


@pytest.mark.parametrize(
    ("to", "target", "parts"),
    [
        ("", "w.pth", [".npz", ".safetensors", ".stablehlo", "--to=orbax"]),
        ("google", "w.safetensors", ["google", ".npz"]),
        ("google", "w", ["google", ".npz"]),
        ("stablehlo", "w.bin", ["stablehlo", ".stablehlo"]),
        ("orbax", "w.npz", ["orbax"]),
        ("", "gs://bucket/w.npz", []),
        ("", ".npz", []),
        ("orbax", "folder/.stablehlo", []),
    ],
)
def test_endings_that_contradict(to: str, target: str, parts: list[str]) -> None:
    with raises(UserError, target, *parts):
        choose_format(to, target)


@pytest.mark.parametrize("to", list(export.SUFFIXES))
def test_what_is_in_the_way_is_told(to: str, tmp_path: Path) -> None:
    target = Path(target_of(to, tmp_path))
    check_target_available(to, str(target), force=False)
    with raises(UserError, str(tmp_path / "lacks")):
        check_target_available(to, str(tmp_path / "lacks" / target.name), force=True)
    target.write_text("older")
    with raises(UserError, str(target), *([] if to == "orbax" else ["--force"])):
        check_target_available(to, str(target), force=False)
    if to == "orbax":
        with raises(UserError, str(target), "--force"):
            check_target_available(to, str(target), force=True)
    else:
        check_target_available(to, str(target), force=True)
        target.unlink()
        target.mkdir()
        with raises(UserError, str(target)):
            check_target_available(to, str(target), force=True)


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with raises(UserError, f"{tmp_path}/run", "--force"):
        check_target_available("orbax", f"{tmp_path}/run", force=True)
    with raises(UserError, f"{tmp_path}/checkpoints"):
        check_target_available("orbax", f"{tmp_path}/checkpoints", force=False)


@pytest.mark.parametrize("to", ["google", "stablehlo"])
def test_what_would_lie_beside_a_file_is_in_the_way_too(to: str, tmp_path: Path) -> None:
    target = target_of(to, tmp_path)
    beside = {"google": f"{target}.json", "stablehlo": f"{target}.safetensors"}[to]
    Path(beside).write_text("{}")
    with raises(UserError, beside):
        check_target_available(to, target, force=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("to", ["google", "timm"])
def test_memory_is_at_most_two_and_a_half_times_the_weights(to: str, tmp_path: Path) -> None:
    large = MixerConfig(12, 16, hidden_dim=512, tokens_mlp_dim=256, channels_mlp_dim=2048)
    source = str(tmp_path / "large.npz")
    export_weights(random_weights(large, image_size=(224, 224)), "google", source)
    arguments = [sys.executable, "-c", MEASURE, source, to, target_of(to, tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 2.5


def test_about_may_be_of_any_size(tmp_path: Path) -> None:
    # Names that JSON escapes, and more of them than a header's first guess.
    names = tuple(f'"{number}" \\ 日本\n' for number in range(21_843))
    weights = random_weights(class_names=names)
    for to in ("google", "timm"):
        export_weights(weights, to, target_of(to, tmp_path))
        assert load_checkpoint(target_of(to, tmp_path)).model_info == weights.model_info
