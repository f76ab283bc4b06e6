"""Tests of StableHLO programs: they equal the model, and run without this library and Flax."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints import stablehlo
from mixer_jax.checkpoints.formats import SafetensorsFile
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.stablehlo import check_stablehlo, write_stablehlo
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.errors import RunError
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.execution import Execution
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights

BATCH_SIZES = (1, 3, 64)
# Runs a program as users do, with the lines that the convert command prints.
USER_SCRIPT = """
import sys
sys.modules["flax"] = sys.modules["mixer_jax"] = None
import numpy as np
from pathlib import Path; from jax import export
with np.load(sys.argv[2]) as archive:
    batches = dict(archive)
from safetensors.numpy import load_file
weights = load_file(sys.argv[1] + ".safetensors")
call = export.deserialize(Path(sys.argv[1]).read_bytes()).call
np.savez(sys.argv[3], **{name: call(weights, images) for name, images in batches.items()})
"""


def test_program_does_not_depend_on_the_device_it_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights()
    path = tmp_path / "w.stablehlo"

    def program() -> str:
        write_stablehlo(str(path), f"{path}.safetensors", weights)
        text = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
        # Locations include the lines of this file.
        return "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))

    expected, build_model = program(), ModelInfo.build_model
    for settings in ({"backend": "triton"}, {"target_device_kind": "TPU v6 lite"}):
        # As on a machine with an accelerator.
        monkeypatch.setattr(
            ModelInfo,
            "build_model",
            lambda *args, s=settings: build_model(*args).clone(execution=Execution(**s)),
        )
        assert program() == expected


@pytest.mark.parametrize(
    "config",
    [
        VitConfig(2, 4, 16, 24, 2),
        VitConfig(2, 4, 16, 24, 2, pooling="map", pos_embedding="sincos2d"),
        BitConfig("1,1", 8),
    ],
    ids=str,
)
def test_program_of_another_family_equals_the_model(config: Any, tmp_path: Path) -> None:
    weights = random_weights(config)
    path = str(tmp_path / "w.stablehlo")
    write_stablehlo(path, f"{path}.safetensors", weights)
    check_stablehlo(path, weights)


@pytest.mark.parametrize(
    "weights",
    [
        # The program is float32 whatever the dtype of the weights.
        random_weights(gelu="tanh", dtype="bfloat16"),
        random_weights(gelu="exact", image_size=(8, 24), class_names=()),
    ],
    ids=["logits", "features"],
)
def test_program_equals_the_model_in_a_process_without_flax(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    path = str(tmp_path / "w.stablehlo")
    write_stablehlo(path, f"{path}.safetensors", weights)
    check_stablehlo(path, weights)
    rng = np.random.default_rng(1)
    size = (*weights.model_info.image_size, 3)
    images = {str(n): rng.uniform(-1, 1, (n, *size)).astype(np.float32) for n in BATCH_SIZES}
    np.savez(tmp_path / "images.npz", **images)  # type: ignore[arg-type]
    arguments = [path, f"{tmp_path}/images.npz", f"{tmp_path}/logits.npz"]
    subprocess.run([sys.executable, "-W", "error", "-c", USER_SCRIPT, *arguments], check=True)
    model = weights.model_info.build_model("float32")
    with np.load(tmp_path / "logits.npz") as logits:
        for n in BATCH_SIZES:
            batch = jnp.asarray(images[str(n)])
            expected = np.asarray(model.apply({"params": weights.params}, batch))
            assert logits[str(n)].dtype == np.float32
            assert logits[str(n)].shape == (n, weights.model_info.num_classes or 16)
            difference = np.abs(logits[str(n)] - expected).max()
            assert difference < 1e-4 * np.ptp(expected)
            # Two images differ by far more than the tolerance.
            assert n == 1 or np.abs(expected[0] - expected[1]).max() > 0.01 * np.ptp(expected)


def test_program_has_the_documented_signature_and_precision(tmp_path: Path) -> None:
    weights = random_weights(dtype="bfloat16")
    path = tmp_path / "w.stablehlo"
    write_stablehlo(str(path), f"{path}.safetensors", weights)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (*arrays, images), (logits,) = program.in_avals, program.out_avals
    assert len(arrays) == len(dict(flatten_params(weights.params)))
    assert (str(images.shape), images.dtype) == ("(batch, 16, 16, 3)", np.float32)
    assert (str(logits.shape), logits.dtype) == ("(batch, 10)", np.float32)
    text = program.mlir_module()
    assert "bf16" not in text
    operations = ("stablehlo.dot_general ", "stablehlo.convolution(")
    matmuls = [line for line in text.splitlines() if any(name in line for name in operations)]
    assert matmuls
    assert all("HIGHEST" in line for line in matmuls)
    # Weights are not part of the program.
    assert path.stat().st_size < 100_000
    with SafetensorsFile(f"{path}.safetensors") as file:
        assert ModelInfo.from_dict(file.metadata, "here") == weights.model_info


def test_check_stablehlo_accepts_a_zero_head(tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["head"]["kernel"][...] = 0
    weights.params["head"]["bias"][...] = -7.5
    program, file = str(tmp_path / "w.stablehlo"), str(tmp_path / "w.safetensors")
    write_stablehlo(program, file, weights)
    check_stablehlo(program, weights)


def test_check_stablehlo_accepts_other_weights_and_rejects_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file = str(tmp_path / "w.stablehlo"), str(tmp_path / "w.safetensors")
    weights = random_weights(seed=0)
    write_stablehlo(program, file, weights)
    check_stablehlo(program, random_weights(seed=1))
    with raises(RunError, "w.stablehlo"):
        check_stablehlo(program, random_weights(image_size=(8, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(stablehlo, "_build_model", lambda info: info.build_model("bfloat16"))
        write_stablehlo(program, file, weights)
    with raises(RunError, "w.stablehlo", "logits"):
        check_stablehlo(program, weights)
