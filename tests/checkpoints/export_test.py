"""Tests of exports: nothing is lost between formats, and no wrong or partial file remains."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax import config
from mixer_jax.checkpoints import export, manager, stablehlo
from mixer_jax.checkpoints.export import (
    HUB_FOLDER,
    check_target_available,
    choose_format,
    export_weights,
    written_size,
)
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params, unflatten_params
from mixer_jax.errors import DiskFullError, RunError, UserError, WriteFailureError
from mixer_jax.inference import Classifier
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer_config import MixerConfig
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.messages import raises
from tests.helpers.random_weights import assert_params_equal, random_weights

WEIGHT_FORMATS = ("google", "timm", "orbax")
# Prints by how much converting a file grows the peak memory, in units of the file's size.
MEASURE_MEMORY = """
import re, sys
from pathlib import Path
from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import load_checkpoint
source, format, target = sys.argv[1:]
# getrusage includes the peak of the parent process.
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
export_weights(load_checkpoint(source), format, target)
print((peak() - before) * 1024 / Path(source).stat().st_size)
"""
Tensors = Iterator[tuple[str, np.ndarray]]


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    """Weights with no default metadata, and with unusual numbers."""
    weights = random_weights(
        image_size=(16, 24),
        class_names=("one", "zwei", "трий"),
        gelu="exact",
        eval_crop="shorter_side",
        exif_orientation=True,
        loss="sigmoid",
        dtype="float32",
        resize_note="tiled from 8 px",
        multi_label=True,
    )
    weights.params["stem"]["bias"][:4] = (-0.0, 0.0, 1e-42, 3e38)
    return weights


@pytest.fixture(scope="module")
def exported(
    weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Paths of the weights by format."""
    folder = tmp_path_factory.mktemp("exported")
    targets = {format: target_of(format, folder) for format in WEIGHT_FORMATS}
    for format, target in targets.items():
        export_weights(weights, format, target)
    return targets


def target_of(format: str, folder: Path) -> str:
    return f"{folder}/t{export.SUFFIXES[format]}"


def bits(weights: PretrainedWeights) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in flatten_params(weights.params)}


@pytest.mark.parametrize(("source", "format"), [*itertools.product(WEIGHT_FORMATS, repeat=2)])
def test_export_weights_between_any_two_formats_is_lossless(
    source: str,
    format: str,
    weights: PretrainedWeights,
    exported: dict[str, str],
    tmp_path: Path,
) -> None:
    target = target_of(format, tmp_path)
    checks = export_weights(load_checkpoint(exported[source]), format, target)
    assert checks
    assert "\n" not in checks
    loaded = load_checkpoint(target)
    assert bits(loaded) == bits(weights)
    assert loaded.model_info == weights.model_info
    sidecars = [f"{Path(target).name}.json"] if format == "google" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(target).name, *sidecars]
    size = sum(len(array) for array in bits(weights).values())
    assert written_size(format, target) > (size / 2 if format == "orbax" else size)


def test_export_weights_without_a_head(tmp_path: Path) -> None:
    weights = random_weights(class_names=())
    for format in WEIGHT_FORMATS:
        export_weights(weights, format, target_of(format, tmp_path))
        loaded = load_checkpoint(target_of(format, tmp_path))
        assert (bits(loaded), loaded.model_info) == (bits(weights), weights.model_info)


# Name of the tensor that `flip_bit` changes, by format.
FLIPPED = {
    "google": "MixerBlock_1/LayerNorm_0/bias",
    "timm": "blocks.1.norm1.bias",
    "orbax": "blocks/token_mixing/Dense_0/bias",
}


def flip_bit(tensors: Tensors) -> Tensors:
    """Flips the lowest bit of one number."""
    for index, (name, tensor) in enumerate(tensors):
        if index == 5:
            tensor = tensor.copy()
            tensor.view(np.uint32).flat[0] ^= 1
        yield name, tensor


def drop_first(tensors: Tensors) -> Tensors:
    return itertools.islice(tensors, 1, None)


@pytest.mark.parametrize("format", ["google", "timm"])
@pytest.mark.parametrize(
    ("corrupt", "named"),
    [
        (lambda tensors, metadata: (flip_bit(tensors), metadata), FLIPPED),
        (lambda tensors, metadata: (drop_first(tensors), metadata), {}),
        (lambda tensors, metadata: (tensors, metadata | {"gelu": "tanh"}), {}),
        (lambda tensors, metadata: (tensors, metadata | {"image_size": [24, 16]}), {}),
        (lambda tensors, metadata: (tensors, {}), {}),
    ],
    ids=["bit", "tensor", "gelu", "image size", "no metadata"],
)
@pytest.mark.parametrize("exists", [False, True])
def test_export_weights_deletes_a_file_that_differs(
    format: str,
    corrupt: Callable[..., Any],
    named: dict[str, str],
    exists: bool,
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file_format = export._FILE_FORMATS[format]

    def write(path: str, tensors: Any, metadata: Any) -> None:
        file_format.write(path, *corrupt(tensors, metadata))

    monkeypatch.setitem(export._FILE_FORMATS, format, file_format._replace(write=write))
    target = Path(target_of(format, tmp_path))
    if exists:
        target.write_text("older")
    with raises(RunError, target.name, *([named[format]] if named else [])):
        export_weights(weights, format, str(target))
    # An older file is unchanged.
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"] * exists


@pytest.mark.parametrize("format", ["google", "timm"])
def test_export_weights_deletes_a_truncated_file(
    format: str, weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_format = export._FILE_FORMATS[format]

    def write(path: str, tensors: Any, metadata: Any) -> None:
        file_format.write(path, tensors, metadata)
        Path(path).write_bytes(Path(path).read_bytes()[:-100])

    monkeypatch.setitem(export._FILE_FORMATS, format, file_format._replace(write=write))
    # The message names the target, not the temporary file.
    with raises(RunError, target_of(format, tmp_path)) as caught:
        export_weights(weights, format, target_of(format, tmp_path))
    assert ".draft" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [
        (lambda tensors, metadata: (flip_bit(tensors), metadata), [FLIPPED["orbax"]]),
        (lambda tensors, metadata: (drop_first(tensors), metadata), ["stem/kernel"]),
        (lambda tensors, metadata: ([*tensors, ("more", np.zeros(3))], metadata), ["more"]),
        (lambda tensors, metadata: (tensors, metadata | {"model_info": {}}), []),
        (lambda tensors, metadata: (tensors, metadata | {"config": {}}), []),
    ],
    ids=["bit", "missing", "unexpected", "no model info", "config"],
)
def test_export_weights_deletes_a_run_that_differs(
    corrupt: Callable[..., Any],
    named: list[str],
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = manager.save_params_streaming

    def corrupt_and_save(workdir: str, step: int, params: Any, metadata: Any) -> None:
        tensors, metadata = corrupt(flatten_params(params), metadata)
        save(workdir, step, unflatten_params(dict(tensors)), metadata)

    monkeypatch.setattr(manager, "save_params_streaming", corrupt_and_save)
    target = target_of("orbax", tmp_path)
    with raises(RunError, Path(target).name, *named):
        export_weights(weights, "orbax", target)
    assert not any(tmp_path.iterdir())


def test_export_weights_keeps_the_train_config_of_a_run(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    weights = weights._replace(train_config=config.get_default().to_dict())
    export_weights(weights, "orbax", target_of("orbax", tmp_path))
    loaded = load_checkpoint(target_of("orbax", tmp_path))
    assert loaded.train_config == weights.train_config
    assert (loaded.model_info, bits(loaded)) == (weights.model_info, bits(weights))


Write = Callable[[str, str, PretrainedWeights], None]


def change_bias(write: Write, path: str, weights_path: str, weights: PretrainedWeights) -> None:
    params = {**weights.params, "head": dict(weights.params["head"])}
    params["head"]["bias"] = params["head"]["bias"] + np.array([0.0, 0.01, 0.0], np.float32)
    write(path, weights_path, weights._replace(params=params))


def use_bfloat16(write: Write, path: str, weights_path: str, weights: PretrainedWeights) -> None:
    build_model = stablehlo._build_model
    execution = Execution("bfloat16")
    stablehlo._build_model = lambda model_info: build_model(model_info).clone(execution=execution)
    try:
        write(path, weights_path, weights)
    finally:
        stablehlo._build_model = build_model


def truncate(write: Write, path: str, weights_path: str, weights: PretrainedWeights) -> None:
    write(path, weights_path, weights)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [(change_bias, ["head/bias"]), (use_bfloat16, ["logits"]), (truncate, [])],
)
def test_export_weights_deletes_a_program_that_differs(
    corrupt: Callable[..., None],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = random_weights(class_names=("one", "two", "three"))
    write = stablehlo.write_stablehlo
    monkeypatch.setattr(stablehlo, "write_stablehlo", lambda *args: corrupt(write, *args))
    target = target_of("stablehlo", tmp_path)
    with raises(RunError, Path(target).stem, *named):
        export_weights(weights, "stablehlo", target)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (OSError(28, "No space left"), DiskFullError, "No space left on device"),
        (OSError(5, "Input/output error"), WriteFailureError, "Input/output error"),
        # Of a library.
        (ValueError("write: Input/output error"), WriteFailureError, "Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_export_weights_leaves_nothing_if_interrupted(
    error: BaseException,
    expected: type[BaseException],
    reason: str,
    weights: PretrainedWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(path: str, tensors: Any, metadata: Any) -> None:
        Path(path).write_text("half")
        raise error

    file_format = export._FILE_FORMATS["google"]
    monkeypatch.setitem(export._FILE_FORMATS, "google", file_format._replace(write=write))
    target = target_of("google", tmp_path)
    with raises(expected, *([target, reason] if reason else [])):
        export_weights(weights, "google", target)
    assert not any(tmp_path.iterdir())


def test_save_pretrained_leaves_nothing_on_a_full_disk(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    model, target = Classifier(weights), str(tmp_path / "saved")
    with file_size_limit(4000), raises(DiskFullError, target):
        model.save_pretrained(target)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(target)
    assert_params_equal(load_checkpoint(target).params, weights.params)
    # Not replaced, and an empty folder is.
    with raises(UserError, target):
        model.save_pretrained(target)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert load_checkpoint(tmp_path / "empty").model_info == weights.model_info


def test_save_pretrained_names_a_family_without_timms_layout(
    weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixer_jax.models.mixer_family.MixerFamily.weight_layouts", lambda _: ())
    with raises(UserError, "'mixer'", "timm"):
        Classifier(weights).save_pretrained(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The administrator, who may run the tests, can write to all folders.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for format in (*export.SUFFIXES, HUB_FOLDER):
        with raises(UserError, "writable", str(tmp_path)):
            check_target_available(format, f"{tmp_path}/t", force=False)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_export_weights_rejects_weights_that_are_not_finite(number: float, tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["blocks"]["LayerNorm_1"]["bias"][1, 3] = number
    with raises(UserError, "blocks/LayerNorm_1/bias"):
        export_weights(weights, "timm", target_of("timm", tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "target", "expected"),
    [
        ("", "w.npz", "google"),
        ("", "w.safetensors", "timm"),
        ("", "w.stablehlo", "stablehlo"),
        ("", "w.onnx", "onnx"),
        ("", "folder/w", "orbax"),
        ("timm", "a.b.safetensors", "timm"),
        ("orbax", "run.v2", "orbax"),
        ("timm", "folder/w", HUB_FOLDER),
        ("timm", "vit_b16.v2", HUB_FOLDER),
    ],
)
def test_choose_format_by_the_suffix(format: str, target: str, expected: str) -> None:
    assert choose_format(format, target) == expected


@pytest.mark.parametrize(
    ("format", "target", "parts"),
    [
        ("", "w.pth", [".npz", ".safetensors", ".stablehlo", "--to=orbax"]),
        ("google", "w.safetensors", ["google", ".npz"]),
        ("google", "w", ["google", ".npz"]),
        ("timm", "w.npz", ["timm", ".safetensors", "folder"]),
        ("timm", "w.bin", ["timm", ".safetensors", "folder"]),
        ("stablehlo", "w.bin", ["stablehlo", ".stablehlo"]),
        ("onnx", "w.npz", ["onnx", ".onnx"]),
        ("orbax", "w.npz", ["orbax"]),
        ("", "gs://bucket/w.npz", []),
        ("", ".npz", []),
        ("orbax", "folder/.stablehlo", []),
    ],
)
def test_choose_format_rejects_other_suffixes(format: str, target: str, parts: list[str]) -> None:
    with raises(UserError, target, *parts):
        choose_format(format, target)


@pytest.mark.parametrize("format", list(export.SUFFIXES))
def test_check_target_available_rejects_existing_targets(format: str, tmp_path: Path) -> None:
    target = Path(target_of(format, tmp_path))
    check_target_available(format, str(target), force=False)
    with raises(UserError, str(tmp_path / "missing")):
        check_target_available(format, str(tmp_path / "missing" / target.name), force=True)
    target.write_text("older")
    with raises(UserError, str(target), *([] if format == "orbax" else ["--force"])):
        check_target_available(format, str(target), force=False)
    if format == "orbax":
        with raises(UserError, str(target), "--force"):
            check_target_available(format, str(target), force=True)
    else:
        check_target_available(format, str(target), force=True)
        target.unlink()
        target.mkdir()
        with raises(UserError, str(target)):
            check_target_available(format, str(target), force=True)


def test_an_empty_folder_can_become_a_run(weights: PretrainedWeights, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_target_available("orbax", f"{tmp_path}/run", force=False)
    export_weights(weights, "orbax", f"{tmp_path}/run")
    assert load_checkpoint(f"{tmp_path}/run").step == 0


def test_check_target_available_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with raises(UserError, f"{tmp_path}/run", "--force"):
        check_target_available("orbax", f"{tmp_path}/run", force=True)
    with raises(UserError, f"{tmp_path}/checkpoints"):
        check_target_available("orbax", f"{tmp_path}/checkpoints", force=False)


@pytest.mark.parametrize(("format", "suffix"), [("google", "json"), ("stablehlo", "safetensors")])
def test_check_target_available_checks_sidecars(format: str, suffix: str, tmp_path: Path) -> None:
    target = target_of(format, tmp_path)
    sidecar = f"{target}.{suffix}"
    Path(sidecar).write_text("{}")
    with raises(UserError, sidecar):
        check_target_available(format, target, force=False)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory needs Linux")
@pytest.mark.parametrize("format", ["google", "timm"])
def test_export_weights_needs_at_most_two_and_a_half_times_the_memory(
    format: str, tmp_path: Path
) -> None:
    config = MixerConfig(12, 16, hidden_dim=512, tokens_mlp_dim=256, channels_mlp_dim=2048)
    source = str(tmp_path / "large.npz")
    export_weights(random_weights(config, image_size=(224, 224)), "google", source)
    command = [sys.executable, "-c", MEASURE_MEMORY, source, format, target_of(format, tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1 < float(process.stdout) < 2.5


def test_export_weights_keeps_many_unusual_class_names(tmp_path: Path) -> None:
    # JSON escapes these names, and they exceed any small buffer.
    names = tuple(f'"{index}" \\ 日本' for index in range(21_843))
    weights = random_weights(class_names=names)
    for format in ("google", "timm"):
        export_weights(weights, format, target_of(format, tmp_path))
        assert load_checkpoint(target_of(format, tmp_path)).model_info == weights.model_info


@pytest.mark.parametrize("name", ["t.npz", "t.npz.json", "t.safetensors"])
def test_no_flipped_bit_of_an_exported_file_is_unnoticed(
    name: str, weights: PretrainedWeights, tmp_path: Path
) -> None:
    target = str(tmp_path / name.removesuffix(".json"))
    export_weights(weights, "timm" if name.endswith(".safetensors") else "google", target)
    path, rng = tmp_path / name, np.random.default_rng(0)
    original = path.read_bytes()
    # The header, which has the description of the model, and places in the whole file.
    places = [
        *rng.integers(min(len(original), 3000), size=100),
        *rng.integers(len(original), size=50),
    ]
    num_refused = 0
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(target)
        except UserError:
            num_refused += 1
            continue
        assert loaded.model_info == weights.model_info, (place, bytes(damaged[place - 20 : place]))
        assert bits(loaded) == bits(weights), place
    assert num_refused > 50


def test_exports_without_checksums_still_load(weights: PretrainedWeights, tmp_path: Path) -> None:
    target = str(tmp_path / "t.npz")
    export_weights(weights, "google", target)
    sidecar = tmp_path / "t.npz.json"
    metadata = json.loads(sidecar.read_text())
    metadata["class_names"][0] = "eins"
    sidecar.write_text(json.dumps(metadata))
    with raises(UserError, str(sidecar), "crc32"):
        load_checkpoint(target)
    del metadata["crc32"]
    sidecar.write_text(json.dumps(metadata))
    assert load_checkpoint(target).model_info.class_names[0] == "eins"
