"""Tests of the StableHLO program: it is the model, and runs where neither it nor Flax is there."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.weights import stablehlo
from mixer_jax.weights.about import from_json
from mixer_jax.weights.load import Weights
from mixer_jax.weights.ready import make_model
from mixer_jax.weights.stablehlo import check_stablehlo, write_stablehlo
from tests.random_weights import random_weights

BATCHES = (1, 3, 64)
# As a user has it: neither this library nor Flax, and the two lines that the door prints.
PROGRAM = """
import sys
sys.modules["flax"] = sys.modules["mixer_jax"] = None
import numpy as np
from pathlib import Path; from jax import export
with np.load(sys.argv[2]) as given:
    images = dict(given)
call = export.deserialize(Path(sys.argv[1]).read_bytes()).call
np.savez(sys.argv[3], **{name: call(images) for name, images in images.items()})
"""


@pytest.mark.parametrize(
    "weights",
    [
        # It is computed in float32 whatever the weights say.
        random_weights(gelu="tanh", dtype="bfloat16"),
        random_weights(gelu="exact", image_size=(8, 24), class_names=()),
    ],
    ids=["logits", "features"],
)
def test_it_is_the_model_in_a_process_without_flax(weights: Weights, tmp_path: Path) -> None:
    path = str(tmp_path / "w.stablehlo")
    write_stablehlo(path, weights)
    check_stablehlo(path, weights)
    rng = np.random.default_rng(1)
    size = (*weights.about.image_size, 3)
    images = {str(n): rng.uniform(-1, 1, (n, *size)).astype(np.float32) for n in BATCHES}
    np.savez(tmp_path / "images.npz", **images)  # type: ignore[arg-type]
    arguments = [path, f"{tmp_path}/images.npz", f"{tmp_path}/logits.npz"]
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, *arguments], check=True)
    model = make_model(weights.about, "float32")
    with np.load(tmp_path / "logits.npz") as found:
        for n in BATCHES:
            batch = jnp.asarray(images[str(n)])
            wanted = np.asarray(model.apply({"params": weights.params}, batch))
            assert found[str(n)].dtype == np.float32
            assert found[str(n)].shape == (n, weights.about.num_classes or 16)
            difference = np.abs(found[str(n)] - wanted).max()
            assert difference < 1e-4 * np.ptp(wanted)
            # The two images are told apart by far more than the tolerance.
            assert n == 1 or np.abs(wanted[0] - wanted[1]).max() > 0.01 * np.ptp(wanted)


def test_it_says_what_it_takes_and_computes(tmp_path: Path) -> None:
    weights = random_weights(dtype="bfloat16")
    path = tmp_path / "w.stablehlo"
    write_stablehlo(str(path), weights)
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (taken,), (given,) = program.in_avals, program.out_avals
    assert (str(taken.shape), taken.dtype) == ("(batch, 16, 16, 3)", np.float32)
    assert (str(given.shape), given.dtype) == ("(batch, 10)", np.float32)
    text = program.mlir_module()
    assert "bf16" not in text
    operations = ("stablehlo.dot_general ", "stablehlo.convolution(")
    products = [line for line in text.splitlines() if any(name in line for name in operations)]
    assert products
    assert all("HIGHEST" in line for line in products)
    said = json.loads(Path(f"{path}.json").read_text())
    assert from_json(said, "here") == weights.about


def test_an_untrained_head_passes_the_check(tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["head"]["kernel"][...] = 0
    weights.params["head"]["bias"][...] = -7.5
    write_stablehlo(str(tmp_path / "w.stablehlo"), weights)
    check_stablehlo(str(tmp_path / "w.stablehlo"), weights)


def test_weights_too_large_for_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stablehlo, "_MAX_BYTES", 1_000)
    with pytest.raises(UserError, match="holds 0 MB at most; choose another format"):
        write_stablehlo(str(tmp_path / "w.stablehlo"), random_weights())
    assert not any(tmp_path.iterdir())
