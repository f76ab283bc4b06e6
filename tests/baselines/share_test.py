"""Folders and uploads: timm creates the same model from them, and mixer_jax the same weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mixer_jax.checkpoints.hub import push_to_hub
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.timm_config import timm_folder_code
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.inference import Classifier
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import get_family
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.hub_server import serve_hub, use_hub
from tests.helpers.random_weights import assert_params_equal, random_weights

pytestmark = pytest.mark.baselines
TOLERANCE = 1e-4  # Relative to the standard deviation of the logits.
VIT = VitConfig(num_blocks=2, patch_size=14, hidden_dim=21, mlp_dim=51, num_heads=3)
MIXER = get_family("mixer").get_config("S/32")
WIDE_MIXER = MixerConfig(8, 32, 512, 99, 1025)
BIT = get_family("bit").get_config("R50x1")


def make_weights(config: Any, size: tuple[int, int], gelu: str, classes: int) -> PretrainedWeights:
    """Creates random weights with small scores, in which rounding is not amplified."""
    names = tuple(f"class {index}" for index in range(classes))
    fields: dict[str, Any] = {"gelu": gelu, "eval_crop": "bicubic", "eval_crop_fraction": 0.9}
    weights = random_weights(config, size, names, **fields)
    return weights._replace(params=jax.tree.map(lambda x: x / 3, weights.params))


def assert_same_logits(torch: Any, model: Any, weights: PretrainedWeights) -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *weights.model_info.image_size, 3)).astype(np.float32)
    logits = np.asarray(Classifier(weights, "float32")(images))
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    difference = np.abs(logits - expected).max() / expected.std()
    print(f"\ndifference to timm: {difference:.1e} standard deviations of the logits")
    assert difference < TOLERANCE


def create_in_timm(timm: Any, weights: PretrainedWeights, source: str) -> Any:
    """Runs the code that `convert` prints and the model card has."""
    names: dict[str, Any] = {}
    exec("\n".join(timm_folder_code(weights.model_info, source)), names)
    return names["model"]


CASES = [
    (MIXER, (64, 64), "exact", 10),
    (MIXER, (64, 96), "tanh", 10),
    (WIDE_MIXER, (64, 64), "exact", 3),
    (VIT, (28, 42), "tanh", 10),
    (VitConfig(2, 8, 32, 48, 2, pooling="map"), (16, 16), "exact", 10),
    (VitConfig(2, 8, 32, 48, 2, pooling="gap"), (16, 16), "tanh", 10),
    (get_family("vit").get_config("Ti/16"), (64, 64), "tanh", 10),
    (BIT, (33, 48), "tanh", 10),
    (BitConfig("3,4,6,3", 96), (33, 48), "tanh", 10),
]


@pytest.mark.parametrize(("config", "size", "gelu", "classes"), CASES, ids=str)
def test_timm_creates_the_same_model_from_a_folder(
    config: Any,
    size: tuple[int, int],
    gelu: str,
    classes: int,
    torch: Any,
    timm: Any,
    tmp_path: Path,
) -> None:
    weights = make_weights(config, size, gelu, classes)
    Classifier(weights).save_pretrained(tmp_path / "saved")
    model = create_in_timm(timm, weights, f"local-dir:{tmp_path}/saved")
    # All tensors and no others, which is also what create_model requires.
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    model.load_state_dict({name: torch.tensor(x) for name, x in saved.items()}, strict=True)
    assert_same_logits(torch, model, weights)
    loaded = load_checkpoint(tmp_path / "saved")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info

    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (3, *size)
    assert (data["interpolation"], data["crop_pct"], data["crop_mode"]) == (
        "bicubic",
        0.9,
        "center",
    )
    assert tuple(data["mean"]) == tuple(data["std"]) == (0.5,) * 3
    assert list(model.pretrained_cfg["label_names"]) == list(weights.model_info.class_names)


@pytest.mark.parametrize("config", [WIDE_MIXER, VIT, BIT], ids=str)
def test_timm_replaces_the_head_and_saves_what_mixer_jax_reads(
    config: Any, torch: Any, timm: Any, tmp_path: Path
) -> None:
    size = (28, 42) if config is VIT else (64, 64)
    weights = make_weights(config, size, "tanh" if config is BIT else "exact", 10)
    Classifier(weights).save_pretrained(tmp_path / "ours")
    name = f"local-dir:{tmp_path}/ours"
    model = timm.create_model(name, pretrained=True, num_classes=4).eval()
    # timm's new heads of Mixers are zero.
    torch.nn.init.normal_(model.get_classifier().weight)
    timm.models.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    loaded = load_checkpoint(tmp_path / "theirs")
    assert (loaded.model_info.num_classes, loaded.model_info.image_size) == (4, size)
    expected = {key: value for key, value in weights.params.items() if key != "head"}
    assert_params_equal({k: v for k, v in loaded.params.items() if k != "head"}, expected)
    assert_same_logits(torch, model, loaded)


def test_a_mixer_with_tanh_gelu_fails_in_timm_without_its_argument(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    # If timm reads the name of the layer one day, the argument becomes unnecessary.
    Classifier(make_weights(MIXER, (64, 64), "tanh", 10)).save_pretrained(tmp_path / "saved")
    with pytest.raises(TypeError, match="'str' object is not callable"):
        timm.create_model(f"local-dir:{tmp_path}/saved", pretrained=True)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")
def test_timm_loads_an_upload(
    torch: Any, timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_weights(VIT, (28, 42), "tanh", 10)
    with serve_hub() as hub:
        use_hub(hub, str(tmp_path), monkeypatch)
        push_to_hub(weights, "ada/vit")
        model = create_in_timm(timm, weights, "hf-hub:ada/vit")
        loaded = load_checkpoint("hf:ada/vit")
    assert_same_logits(torch, model, weights)
    assert_params_equal(loaded.params, weights.params)
