"""Tests of ONNX files: they equal the model in onnxruntime, and say what they are.

Those that convert are slow: importing jax2onnx takes about 10 s.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest

import mixer_jax
from mixer_jax.checkpoints import onnx_export
from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.onnx_export import check_onnx, write_onnx
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.errors import DiskFullError, RunError, UserError
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.cli import run_cli
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights

FLOAT = "tensor(float)"


def run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        # The file is float32 whatever the dtype of the weights.
        random_weights(dtype="bfloat16"),
        random_weights(VitConfig(1, 4, 16, 24, 2)),
        random_weights(BitConfig("1", 8)),
    ],
    ids=["Mixer", "ViT", "BiT"],
)
def test_file_equals_the_model_for_any_batch_size(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    check_file(weights, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights",
    [
        random_weights(gelu="exact", image_size=(8, 24), class_names=()),
        random_weights(VitConfig(2, 4, 16, 24, 2, pooling="map", pos_embedding="sincos2d")),
        random_weights(VitConfig(2, 4, 16, 24, 2, pooling="gap", pre_logits=True), gelu="exact"),
        random_weights(BitConfig("2,1", 8, root="3x3"), image_size=(17, 13)),
    ],
    ids=["features", "map", "gap", "root"],
)
def test_file_of_other_architectures_equals_the_model(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    check_file(weights, tmp_path)


def check_file(weights: PretrainedWeights, tmp_path: Path) -> None:
    """Exports weights, and compares the file with the model on batches of 1 and 5 images."""
    info, path = weights.model_info, tmp_path / "w.onnx"
    export_weights(weights, "onnx", str(path))
    assert list(tmp_path.iterdir()) == [path]
    apply = jax.jit(info.build_model("float32").apply)
    for n in (1, 5):
        images = np.random.default_rng(n).uniform(-1, 1, (n, *info.image_size, 3))
        images = images.astype(np.float32)
        expected = np.asarray(apply({"params": weights.params}, images))
        found = run(path, images)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert np.abs(found - expected).max() <= 1e-4 * expected.std()
        # Two images differ by far more than the tolerance.
        assert n == 1 or np.abs(expected[0] - expected[1]).max() > 0.01 * expected.std()


@pytest.mark.slow
def test_file_has_named_inputs_and_metadata(tmp_path: Path) -> None:
    weights = random_weights(class_names=("one", "zwei", "трий"), eval_crop="shorter_side")
    path = tmp_path / "w.onnx"
    write_onnx(str(path), weights)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 16, 16, 3], FLOAT)
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 3], FLOAT)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata.pop("model") == "Mixer-custom at 16 px"
    assert metadata.pop("mixer_jax_version") == mixer_jax.__version__
    fields = {name: json.loads(value) for name, value in metadata.items()}
    assert fields == json.loads(json.dumps(weights.model_info.to_dict()))
    assert (fields["class_names"], fields["eval_crop"]) == (["one", "zwei", "трий"], "shorter_side")


@pytest.mark.slow
def test_check_onnx_rejects_other_weights_metadata_and_files(tmp_path: Path) -> None:
    path = tmp_path / "w.onnx"
    write_onnx(str(path), random_weights())
    check_onnx(str(path), random_weights())
    with raises(RunError, "w.onnx", "logits"):
        check_onnx(str(path), random_weights(seed=1))
    with raises(RunError, "w.onnx", "metadata"):
        check_onnx(str(path), random_weights(eval_crop="bicubic"))
    path.write_bytes(path.read_bytes()[:-100])
    with raises(RunError, "w.onnx", "onnxruntime"):
        check_onnx(str(path), random_weights())


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx_export.write_onnx

    def write_others(path: str, weights: Any) -> None:
        write(path, random_weights(seed=1))

    monkeypatch.setattr(onnx_export, "write_onnx", write_others)
    (tmp_path / "w.onnx").write_text("older")
    with raises(RunError, "w.onnx", "logits"):
        export_weights(random_weights(), "onnx", f"{tmp_path}/w.onnx")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with file_size_limit(10_000), raises(DiskFullError, f"{tmp_path}/w.onnx", "File too large"):
        export_weights(random_weights(), "onnx", f"{tmp_path}/w.onnx")
    assert not any(tmp_path.iterdir())


def test_weights_of_more_than_2_gb_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights()
    size = 4 * sum(np.size(a) for _, a in flatten_params(weights.params))
    monkeypatch.setattr(onnx_export, "_MAX_BYTES", size - 1)
    with raises(UserError, "2 GB", "Mixer-custom", "--to=stablehlo"):
        write_onnx("w.onnx", weights)
    assert not Path("w.onnx").exists()


@pytest.mark.parametrize("missing", ["jax2onnx", "onnxruntime"])
def test_missing_packages_are_named_before_anything_is_read(missing: str, tmp_path: Path) -> None:
    arguments = "hf:timm/mixer_b16_224", f"{tmp_path}/w.onnx"
    preamble = f"import sys; sys.modules.update({missing}=None, jax=None)"
    (line,) = run_cli("convert", *arguments, code=2, preamble=preamble).stderr.splitlines()
    assert mentions(line, missing, 'pip install "mixer-jax[onnx]"')
