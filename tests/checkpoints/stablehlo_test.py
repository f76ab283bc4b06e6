"""Tests of the StableHLO program: it is the model, and runs where neither it nor Flax is there."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints import stablehlo, tree
from mixer_jax.checkpoints.formats.safetensors import SafetensorsFile
from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.stablehlo import check_stablehlo, write_stablehlo
from mixer_jax.checkpoints.to_device import model_from_info
from mixer_jax.errors import RunError
from mixer_jax.models.execution import Execution
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights

BATCHES = (1, 3, 64)
# As a user has it: neither this library nor Flax, and the two lines that the door prints.
PROGRAM = """
import sys
sys.modules["flax"] = sys.modules["mixer_jax"] = None
import numpy as np
from pathlib import Path; from jax import export
with np.load(sys.argv[2]) as given:
    images = dict(given)
from safetensors.numpy import load_file
weights = load_file(sys.argv[1] + ".safetensors")
call = export.deserialize(Path(sys.argv[1]).read_bytes()).call
np.savez(sys.argv[3], **{name: call(weights, images) for name, images in images.items()})
"""


def test_it_does_not_depend_on_the_device_it_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights()

    path = tmp_path / "w.stablehlo"

    def program() -> str:
        write_stablehlo(str(path), f"{path}.safetensors", weights)
        text = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
        # But for the lines of this file that it was called from.
        return "\n".join(line for line in text.splitlines() if not line.startswith("#loc"))

    here = program()
    right = stablehlo.model_from_info
    for settings in ({"backend": "triton"}, {"target_device_kind": "TPU v6 lite"}):
        # What a machine with an accelerator would choose.
        monkeypatch.setattr(
            stablehlo,
            "model_from_info",
            lambda *args, s=settings: right(*args).clone(execution=Execution(**s)),
        )
        assert program() == here


@pytest.mark.parametrize(
    "weights",
    [
        # It is computed in float32 whatever the weights say.
        random_weights(gelu="tanh", dtype="bfloat16"),
        random_weights(gelu="exact", image_size=(8, 24), class_names=()),
    ],
    ids=["logits", "features"],
)
def test_it_is_the_model_in_a_process_without_flax(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    path = str(tmp_path / "w.stablehlo")
    write_stablehlo(path, f"{path}.safetensors", weights)
    check_stablehlo(path, weights)
    rng = np.random.default_rng(1)
    size = (*weights.model_info.image_size, 3)
    images = {str(n): rng.uniform(-1, 1, (n, *size)).astype(np.float32) for n in BATCHES}
    np.savez(tmp_path / "images.npz", **images)  # type: ignore[arg-type]
    arguments = [path, f"{tmp_path}/images.npz", f"{tmp_path}/logits.npz"]
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, *arguments], check=True)
    model = model_from_info(weights.model_info, "float32")
    with np.load(tmp_path / "logits.npz") as found:
        for n in BATCHES:
            batch = jnp.asarray(images[str(n)])
            wanted = np.asarray(model.apply({"params": weights.params}, batch))
            assert found[str(n)].dtype == np.float32
            assert found[str(n)].shape == (n, weights.model_info.num_classes or 16)
            difference = np.abs(found[str(n)] - wanted).max()
            assert difference < 1e-4 * np.ptp(wanted)
            # The two images are told apart by far more than the tolerance.
            assert n == 1 or np.abs(wanted[0] - wanted[1]).max() > 0.01 * np.ptp(wanted)


def test_it_says_what_it_takes_and_computes(tmp_path: Path) -> None:
    weights = random_weights(dtype="bfloat16")
    path = tmp_path / "w.stablehlo"
    write_stablehlo(str(path), f"{path}.safetensors", weights)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (*arrays, taken), (given,) = program.in_avals, program.out_avals
    assert len(arrays) == len(dict(tree.flatten(weights.params)))
    assert (str(taken.shape), taken.dtype) == ("(batch, 16, 16, 3)", np.float32)
    assert (str(given.shape), given.dtype) == ("(batch, 10)", np.float32)
    text = program.mlir_module()
    assert "bf16" not in text
    operations = ("stablehlo.dot_general ", "stablehlo.convolution(")
    products = [line for line in text.splitlines() if any(name in line for name in operations)]
    assert products
    assert all("HIGHEST" in line for line in products)
    # The program is small, and the same whatever the numbers are.
    assert path.stat().st_size < 100_000
    with SafetensorsFile(f"{path}.safetensors") as file:
        assert ModelInfo.from_dict(file.metadata, "here") == weights.model_info


def test_an_untrained_head_passes_the_check(tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["head"]["kernel"][...] = 0
    weights.params["head"]["bias"][...] = -7.5
    program, file = str(tmp_path / "w.stablehlo"), str(tmp_path / "w.safetensors")
    write_stablehlo(program, file, weights)
    check_stablehlo(program, weights)


def test_the_program_is_for_any_weights_of_the_same_model_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, file = str(tmp_path / "w.stablehlo"), str(tmp_path / "w.safetensors")
    weights = random_weights(seed=0)
    write_stablehlo(program, file, weights)
    check_stablehlo(program, random_weights(seed=1))
    with raises(RunError, "w.stablehlo"):
        check_stablehlo(program, random_weights(image_size=(8, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(stablehlo, "_build_model", lambda about: model_from_info(about, "bfloat16"))
        write_stablehlo(program, file, weights)
    with raises(RunError, "w.stablehlo", "logits"):
        check_stablehlo(program, weights)
