"""Tests of weights in the Hugging Face Hub's cache, without a network."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from tests.helpers import pretrained_files
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import assert_params_equal, random_weights

NAME = "someone/mixer_tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, params: Any, config: dict[str, Any], commit: str = COMMIT) -> None:
    """Puts a repository into the cache, as the Hub's library lays it out."""
    repo = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/main").write_text(COMMIT)
    save_file(pretrained_files.timm(params), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps(config))


def timm_config(interpolation: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    """A config with the fields of timm's that tell how images are prepared."""
    prepared = {"interpolation": interpolation, "crop_pct": 0.875, "mean": mean, "std": std}
    return {
        "architecture": "mixer_tiny",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 16, 16], "crop_mode": "center", **prepared},
    }


GOOGLE = timm_config("bicubic", [0.5] * 3, [0.5] * 3)
MIIL = timm_config("bilinear", [0.0] * 3, [1.0] * 3)
UNEVEN = timm_config("bilinear", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_weights_come_from_the_cache_with_timms_usual_preparation(cache: Path) -> None:
    weights = random_weights()
    put(cache, weights.params, GOOGLE)
    loaded = load_checkpoint(f"hf:{NAME}")
    assert_params_equal(loaded.params, weights.params)
    assert (loaded.model_info.eval_crop, loaded.model_info.gelu) == ("bicubic", "exact")
    assert loaded.model_info.class_names == ()


@pytest.mark.parametrize("config", [MIIL, UNEVEN], ids=["miil", "uneven"])
def test_another_preparation_of_pixels_is_folded_into_the_stem(
    config: dict[str, Any], cache: Path
) -> None:
    weights = random_weights(gelu="exact")
    put(cache, weights.params, config)
    pixels = np.random.default_rng(0).uniform(0, 1, (3, 16, 16, 3))
    prepared = config["pretrained_cfg"]
    theirs = (pixels - prepared["mean"]) / prepared["std"]
    expected = np.asarray(Classifier(weights)(theirs.astype(np.float32)))
    ours = load_pretrained(f"hf:{NAME}")
    assert ours.model_info.eval_crop == "bilinear"
    logits = np.asarray(ours((2 * pixels - 1).astype(np.float32)))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.ptp(expected))
    # It made a difference.
    unfolded = np.asarray(Classifier(weights)((2 * pixels - 1).astype(np.float32)))
    assert np.abs(unfolded - expected).max() > 0.01 * np.ptp(expected)


def test_the_file_name_tells_the_preparation_where_no_config_does(tmp_path: Path) -> None:
    tensors = pretrained_files.timm(random_weights().params)
    save_file(tensors, tmp_path / "mixer_b16_224_miil.safetensors")
    save_file(tensors, tmp_path / "mixer_b16_224.safetensors")
    miil = load_checkpoint(str(tmp_path / "mixer_b16_224_miil.safetensors"))
    usual = load_checkpoint(str(tmp_path / "mixer_b16_224.safetensors"))
    assert (miil.model_info.eval_crop, usual.model_info.eval_crop) == ("bilinear", "bicubic")
    kernel = usual.params["stem"]["kernel"]
    np.testing.assert_allclose(miil.params["stem"]["kernel"], kernel / 2, rtol=1e-6)


def test_the_folders_name_tells_it_where_the_files_own_names_no_model(
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
        # What a person calls it counts.
        str(tmp_path / "link.goog"): "bicubic",
        "mixer_b16_224.goog_in21k.safetensors": "bicubic",
    }
    assert {source: load_checkpoint(source).model_info.eval_crop for source in crops} == crops


@pytest.mark.parametrize("mode", ["squash", "border", ["center"]], ids=str)
def test_another_way_to_crop_is_refused_unless_one_is_given(mode: Any, cache: Path) -> None:
    config = timm_config("bicubic", [0.5] * 3, [0.5] * 3)
    config["pretrained_cfg"]["crop_mode"] = mode
    put(cache, random_weights().params, config)
    named = mode if isinstance(mode, str) else repr(mode)
    with raises(UserError, "crop_pct", "0.875", "crop_mode", named, "eval_crop"):
        load_checkpoint(f"hf:{NAME}")
    assert load_checkpoint(f"hf:{NAME}", eval_crop="resize").model_info.eval_crop == "resize"


@pytest.mark.parametrize(("layer", "gelu"), [("gelu_tanh", "tanh"), ("gelu", "exact")])
def test_the_config_tells_the_gelu(layer: str, gelu: str, cache: Path) -> None:
    put(cache, random_weights().params, GOOGLE | {"model_args": {"act_layer": layer}})
    assert load_checkpoint(f"hf:{NAME}").model_info.gelu == gelu
    assert load_checkpoint(f"hf:{NAME}", gelu="tanh").model_info.gelu == "tanh"


def test_another_activation_is_refused_unless_a_gelu_is_given(cache: Path) -> None:
    put(cache, random_weights().params, GOOGLE | {"model_args": {"act_layer": "quick_gelu"}})
    with raises(UserError, "act_layer", "quick_gelu", "gelu", "gelu_tanh"):
        load_checkpoint(f"hf:{NAME}")
    assert load_checkpoint(f"hf:{NAME}", gelu="exact").model_info.gelu == "exact"


@pytest.mark.parametrize(
    ("told", "size"),
    [
        ({"pretrained_cfg": {"input_size": [3, 8, 32]}}, (8, 32)),
        ({"input_size": [3, 8, 32]}, (8, 32)),
        ({"model_args": {"img_size": [32, 8]}, "pretrained_cfg": {}}, (32, 8)),
        ({"model_args": {"img_size": 16}, "input_size": [3, 8, 32]}, (16, 16)),
        # Of other weights, or nonsense.
        ({"pretrained_cfg": {"input_size": [3, 224, 224]}}, (16, 16)),
        ({"model_args": {"img_size": 224}, "input_size": [3, 8, 32]}, (8, 32)),
        ({"model_args": 3, "input_size": [3, "8", 32]}, (16, 16)),
        ({"model_args": {"img_size": [-8, -32]}, "input_size": "large"}, (16, 16)),
    ],
)
def test_the_config_tells_the_image_size(
    told: dict[str, Any], size: tuple[int, int], cache: Path
) -> None:
    put(cache, random_weights().params, told)
    about = load_checkpoint(f"hf:{NAME}").model_info
    assert (about.image_size, about.resize_note) == (size, "")


def test_class_names_come_from_the_config(cache: Path) -> None:
    names = [f"class {label}" for label in range(10)]
    put(cache, random_weights().params, GOOGLE | {"label_names": names})
    assert load_checkpoint(f"hf:{NAME}").model_info.class_names == tuple(names)


def test_a_revision_can_be_named(cache: Path) -> None:
    put(cache, random_weights(seed=0).params, GOOGLE)
    put(cache, random_weights(seed=1).params, GOOGLE, OTHER)
    assert_params_equal(load_checkpoint(f"hf:{NAME}").params, random_weights(seed=0).params)
    assert_params_equal(load_checkpoint(f"hf:{NAME}@{OTHER}").params, random_weights(seed=1).params)


@pytest.mark.parametrize("name", ["someone/other", f"{NAME}@no_such_revision"])
def test_what_is_not_in_the_cache_is_told_at_once(name: str, cache: Path) -> None:
    put(cache, random_weights().params, GOOGLE)
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_checkpoint(f"hf:{name}")
    assert time.monotonic() - begun < 5
    message = str(caught.value)
    assert mentions(message, f"hf:{name}", "model.safetensors", "config.json")
    assert "\n" not in message


@pytest.mark.parametrize("name", ["--/x", "a b/c", "a/b..c", "a/b--c", "a/" + "x" * 200])
def test_what_can_be_no_name_is_told(name: str) -> None:
    with raises(UserError, f"hf:{name}", "hf:OWNER/NAME") as caught:
        load_checkpoint(f"hf:{name}")
    assert "\n" not in str(caught.value)


def test_what_is_half_in_the_cache_is_asked_for_as_a_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the config of one revision could be read with the weights of another."""
    import huggingface_hub

    put(cache, random_weights().params, GOOGLE)
    (model,) = cache.rglob("model.safetensors")
    model.unlink()
    real, asked = huggingface_hub.hf_hub_download, []

    def download(repo: str, file: str, *, local_files_only: bool, **rest: Any) -> str:
        if not local_files_only:
            asked.append(file)
        return real(repo, file, local_files_only=local_files_only, **rest)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with raises(UserError, f"hf:{NAME}"):
        load_checkpoint(f"hf:{NAME}")
    assert asked == ["config.json", "model.safetensors"]
