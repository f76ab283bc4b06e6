"""Tests of timm's config, with weights in the Hugging Face Hub's cache and no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixer_jax.checkpoints.export import HUB_FOLDER, export_weights
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.timm_config import find_timm_model, make_timm_config
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.family import ModelFamily
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import FAMILIES, get_family
from mixer_jax.models.vit_config import VitConfig
from tests.helpers import pretrained_files
from tests.helpers.hub_cache import (
    COMMIT,
    GOOGLE,
    NAME,
    OTHER_COMMIT,
    add_to_cache,
    timm_config,
)
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import TINY, assert_params_equal, random_weights

pytestmark = pytest.mark.usefixtures("hub_cache")
MIIL = timm_config("bilinear", [0.0] * 3, [1.0] * 3)
UNEVEN = timm_config("bilinear", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_load_checkpoint_reads_the_cache(hub_cache: Path) -> None:
    weights = random_weights()
    add_to_cache(hub_cache, weights.params, GOOGLE)
    loaded = load_checkpoint(f"hf:{NAME}")
    assert_params_equal(loaded.params, weights.params)
    assert (loaded.model_info.eval_crop, loaded.model_info.gelu) == ("bicubic", "exact")
    assert loaded.model_info.class_names == ()


@pytest.mark.parametrize("config", [MIIL, UNEVEN], ids=["miil", "uneven"])
def test_normalization_is_folded_into_the_stem(config: dict[str, Any], hub_cache: Path) -> None:
    weights = random_weights(gelu="exact")
    add_to_cache(hub_cache, weights.params, config)
    pixels = np.random.default_rng(0).uniform(0, 1, (3, 16, 16, 3))
    settings = config["pretrained_cfg"]
    normalized = (pixels - settings["mean"]) / settings["std"]
    expected = np.asarray(Classifier(weights)(normalized.astype(np.float32)))
    classifier = load_pretrained(f"hf:{NAME}")
    assert classifier.model_info.eval_crop == "bilinear"
    images = (2 * pixels - 1).astype(np.float32)
    logits = np.asarray(classifier(images))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))
    # Without folding, logits would differ.
    not_folded = np.asarray(Classifier(weights)(images))
    assert np.abs(not_folded - expected).max() > 0.01 * np.ptp(expected)


def test_guess_timm_config_from_the_name_of_the_file(tmp_path: Path) -> None:
    tensors = pretrained_files.timm(random_weights().params)
    save_file(tensors, tmp_path / "mixer_b16_224_miil.safetensors")
    save_file(tensors, tmp_path / "mixer_b16_224.safetensors")
    miil = load_checkpoint(str(tmp_path / "mixer_b16_224_miil.safetensors"))
    google = load_checkpoint(str(tmp_path / "mixer_b16_224.safetensors"))
    assert (miil.model_info.eval_crop, google.model_info.eval_crop) == ("bilinear", "bicubic")
    kernel = google.params["stem"]["kernel"]
    np.testing.assert_allclose(miil.params["stem"]["kernel"], kernel / 2, rtol=1e-6)


def test_guess_timm_config_from_the_name_of_the_folder_if_the_files_is_generic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mixer_b16_224.miil_in21k"
    folder.mkdir()
    tensors = pretrained_files.timm(random_weights().params)
    for name in ("model.safetensors", "mixer_b16_224.goog_in21k.safetensors"):
        save_file(tensors, folder / name)
    (tmp_path / "link.goog").symlink_to(folder)
    monkeypatch.chdir(folder)
    crops = {
        str(folder): "bilinear",
        str(folder / "model.safetensors"): "bilinear",
        ".": "bilinear",
        "model.safetensors": "bilinear",
        # The name of a link counts, not that of its target.
        str(tmp_path / "link.goog"): "bicubic",
        "mixer_b16_224.goog_in21k.safetensors": "bicubic",
    }
    assert {source: load_checkpoint(source).model_info.eval_crop for source in crops} == crops


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("{", ["config.json", "JSON"]),
        ('{"crop_pct": 1.5}', ["crop_pct", "1.5"]),
        ('{"crop_pct": "wide"}', ["crop_pct", "wide"]),
        ('{"pretrained_cfg": {"interpolation": "nearest"}}', ["interpolation", "nearest"]),
        ('{"interpolation": ["bicubic"]}', ["interpolation", "['bicubic']"]),
        ('{"mean": [0.5, 0.5]}', ["mean", "[0.5, 0.5]"]),
        ('{"std": [0.5, 0.5, 0]}', ["std", "[0.5, 0.5, 0]"]),
        ('{"mean": [0, 0, NaN]}', ["mean", "[0, 0, nan]"]),
        ('{"std": "wide"}', ["std", "wide"]),
        ('{"label_names": ["one"]}', ["10", "1"]),
        ('{"label_names": {"0": "one", "7": "two"}}', ["class_names"]),
    ],
)
def test_invalid_timm_config_is_rejected(config: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(pretrained_files.timm(random_weights().params), path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(path))
    message = str(caught.value).replace(str(tmp_path), "")  # The folder can contain numbers.
    assert mentions(message, *parts)
    assert "\n" not in message


@pytest.mark.parametrize("mode", ["squash", "border", ["center"]], ids=str)
def test_unsupported_crop_needs_an_eval_crop(mode: Any, hub_cache: Path) -> None:
    config = timm_config("bicubic", [0.5] * 3, [0.5] * 3)
    config["pretrained_cfg"]["crop_mode"] = mode
    add_to_cache(hub_cache, random_weights().params, config)
    with raises(UserError, "crop_pct", "crop_mode", str(mode), "eval_crop"):
        load_checkpoint(f"hf:{NAME}")
    assert load_checkpoint(f"hf:{NAME}", eval_crop="resize").model_info.eval_crop == "resize"


@pytest.mark.parametrize("fraction", [0.9, 0.95, 1.0, 1])
def test_crop_fraction_is_read_from_the_config(fraction: float, hub_cache: Path) -> None:
    config = timm_config("bicubic", [0.5] * 3, [0.5] * 3)
    add_to_cache(hub_cache, random_weights().params, config)
    info = load_checkpoint(f"hf:{NAME}").model_info
    assert (info.eval_crop, info.eval_crop_fraction) == ("bicubic", 0.875)
    config["pretrained_cfg"]["crop_pct"] = fraction
    add_to_cache(hub_cache, random_weights().params, config, OTHER_COMMIT)
    info = load_checkpoint(f"hf:{NAME}@{OTHER_COMMIT}").model_info
    assert (info.eval_crop, info.eval_crop_fraction) == ("bicubic", fraction)
    # Another crop does not keep the fraction of the one that it replaces.
    info = load_checkpoint(f"hf:{NAME}@{OTHER_COMMIT}", eval_crop="square").model_info
    assert info.eval_crop_fraction == 0.875


def test_eval_crop_overrides_an_unsupported_crop_and_keeps_class_names(hub_cache: Path) -> None:
    names = [f"class {index}" for index in range(10)]
    by_index = {str(index): name for index, name in enumerate(names)}
    for commit, label_names in ((COMMIT, names), (OTHER_COMMIT, by_index)):
        config = {"pretrained_cfg": {"crop_pct": 0.9}, "label_names": label_names}
        add_to_cache(hub_cache, random_weights().params, config, commit)
        info = load_checkpoint(f"hf:{NAME}@{commit}", eval_crop="square").model_info
        assert (info.eval_crop, list(info.class_names)) == ("square", names)


@pytest.mark.parametrize(("layer", "gelu"), [("gelu_tanh", "tanh"), ("gelu", "exact")])
def test_gelu_is_read_from_the_config(layer: str, gelu: str, hub_cache: Path) -> None:
    add_to_cache(hub_cache, random_weights().params, GOOGLE | {"model_args": {"act_layer": layer}})
    assert load_checkpoint(f"hf:{NAME}").model_info.gelu == gelu
    assert load_checkpoint(f"hf:{NAME}", gelu="tanh").model_info.gelu == "tanh"


def test_unsupported_activation_needs_a_gelu(hub_cache: Path) -> None:
    config = GOOGLE | {"model_args": {"act_layer": "quick_gelu"}}
    add_to_cache(hub_cache, random_weights().params, config)
    with raises(UserError, "act_layer", "quick_gelu", "gelu", "gelu_tanh"):
        load_checkpoint(f"hf:{NAME}")
    assert load_checkpoint(f"hf:{NAME}", gelu="exact").model_info.gelu == "exact"


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"pretrained_cfg": {"input_size": [3, 8, 32]}}, (8, 32)),
        ({"input_size": [3, 8, 32]}, (8, 32)),
        ({"model_args": {"img_size": [32, 8]}, "pretrained_cfg": {}}, (32, 8)),
        ({"model_args": {"img_size": 16}, "input_size": [3, 8, 32]}, (16, 16)),
        # Sizes that do not match the tokens, or are invalid.
        ({"pretrained_cfg": {"input_size": [3, 224, 224]}}, (16, 16)),
        ({"model_args": {"img_size": 224}, "input_size": [3, 8, 32]}, (8, 32)),
        ({"model_args": 3, "input_size": [3, "8", 32]}, (16, 16)),
        ({"model_args": {"img_size": [-8, -32]}, "input_size": "large"}, (16, 16)),
    ],
)
def test_image_size_is_read_from_the_config(
    config: dict[str, Any], size: tuple[int, int], hub_cache: Path
) -> None:
    add_to_cache(hub_cache, random_weights().params, config)
    info = load_checkpoint(f"hf:{NAME}").model_info
    assert (info.image_size, info.resize_note) == (size, "")


def family_of(config: Any) -> ModelFamily:
    (family,) = (f for f in FAMILIES.values() if type(config) is f.config_class)
    return family


@pytest.mark.parametrize(
    ("config", "name", "args"),
    [
        (get_family("mixer").get_config("B/16"), "mixer_b16_224", {}),
        (MixerConfig(8, 32, 512, 64, 1024), "mixer_s32_224", {"mlp_ratio": [64 / 512, 2.0]}),
        (get_family("vit").get_config("Ti/16"), "vit_tiny_patch16_224", {}),
        (
            get_family("vit").get_config("Ti/16", pooling="gap"),
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "class_token": False, "fc_norm": False},
        ),
        (get_family("bit").get_config("R50x1"), "resnetv2_50x1_bit", {}),
        (
            get_family("bit").get_config("R152x1"),
            "resnetv2_152x2_bit",
            {"stem_chs": 32, "channels": [128, 256, 512, 1024]},
        ),
    ],
    ids=str,
)
def test_config_names_timms_model(config: Any, name: str, args: dict[str, Any]) -> None:
    assert family_of(config).timm_model(config, "exact") == (name, args, {})


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (MixerConfig(8, 14, 512, 256, 2048), ["Mixer-custom", "14, 512 and 8"]),
        (get_family("mixer").get_config("H/14"), ["Mixer-H/14"]),
        (get_family("vit").get_config("B/16", pre_logits=True), ["ViT-B/16", "pre_logits"]),
        (BitConfig("2,1", 64), ["BiT-custom", "2,1"]),
        (BitConfig("3,4,6,3", 16), ["BiT-custom", "32"]),
        (BitConfig("3,4,6,3", 64, "3x3"), ["BiT-custom", "7x7"]),
    ],
    ids=str,
)
def test_models_that_timm_cannot_create_by_name_are_named(config: Any, parts: list[str]) -> None:
    with raises(UserError, *parts, ".safetensors") as caught:
        family_of(config).timm_model(config, "exact")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [TINY, VitConfig(1, 4, 16, 24, 2), BitConfig("1,1", 8, "3x3")])
@pytest.mark.parametrize("num_classes", [0, 10])
def test_saved_folders_keep_every_field(config: Any, num_classes: int, tmp_path: Path) -> None:
    names = tuple('"<é>' if index == 3 else str(index) for index in range(num_classes))
    fields: dict[str, Any] = {"eval_crop": "square", "eval_crop_fraction": 0.9, "loss": "sigmoid"}
    weights = random_weights(config, (16, 24), names, **fields)
    export_weights(weights, HUB_FOLDER, f"{tmp_path}/saved")
    loaded = load_checkpoint(f"{tmp_path}/saved")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ("bicubic", ("bicubic", "center", 0.9)),
        ("bilinear", ("bilinear", "center", 0.9)),
        ("shorter_side", ("bilinear", "center", 0.9)),
        ("square", ("bilinear", "squash", 0.9)),
        ("resize", ("bilinear", "squash", 1.0)),
    ],
)
def test_config_has_the_most_similar_crop_of_timm(crop: str, expected: tuple[Any, ...]) -> None:
    info = random_weights(eval_crop=crop, eval_crop_fraction=0.9).model_info
    settings = make_timm_config(info)["pretrained_cfg"]
    assert tuple(settings[key] for key in ("interpolation", "crop_mode", "crop_pct")) == expected
    assert settings["input_size"] == [3, 16, 16]


def test_timm_cannot_permute_pixels() -> None:
    info = random_weights(permutation=PixelPermutation("pixels", 16, 0)).model_info
    with raises(UserError, "permute"):
        find_timm_model(info)
