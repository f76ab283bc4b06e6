"""Comparisons with timm: its files, models and transforms give the same weights and logits."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.data.preprocess import eval_image
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.mixer_family import TIMM
from tests.helpers.messages import raises
from tests.helpers.random_weights import assert_params_equal, random_weights, save_safetensors

pytestmark = pytest.mark.baselines

MODELS = ("mixer_s32_224", "mixer_s16_224", "mixer_b16_224", "mixer_l16_224")
SMALLEST = MODELS[0]
TOLERANCE = 1e-4  # Relative to the standard deviation of the logits.
MIIL = {"interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 0.875}
GOOGLE = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses one device: all eight of `conftest` would compute the same."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def make_timm_model(torch: Any, timm: Any, name: str, **settings: Any) -> Any:
    """Creates a timm model in which no parameter has its initial value."""
    model = timm.create_model(name, **settings).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            fan_in = parameter[0].numel()
            scale = fan_in**-0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale, generator=rng)
            if "norm" in key and key.endswith("weight"):
                parameter += 1.0
    return model


def timm_logits(torch: Any, model: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def assert_logits_close(logits: Any, expected: np.ndarray) -> None:
    difference = np.abs(np.asarray(logits) - expected).max() / expected.std()
    print(f"\ndifference to timm: {difference:.1e} standard deviations of the logits")
    assert difference < TOLERANCE


def random_images(size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_weights_round_trip_from_timm(name: str, torch: Any, timm: Any, tmp_path: Path) -> None:
    model = make_timm_model(torch, timm, name)
    timm.models.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    images = random_images()

    classifier = load_pretrained(str(tmp_path / "theirs"), dtype="float32")
    assert_logits_close(classifier(images), timm_logits(torch, model, images))
    assert classifier.model_info.gelu == "exact"
    assert classifier.model_info.eval_crop == "bicubic"
    assert f"mixer_{classifier.model_info.variant.lower().replace('/', '')}_224" == name

    weights = load_checkpoint(str(tmp_path / "theirs"))
    path = save_safetensors(weights, tmp_path / "ours.safetensors", weights.model_info.to_dict())
    copy = timm.create_model(name)
    timm.models.load_checkpoint(copy, path)
    tensors = copy.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors.pop(key)), key
    assert not tensors


@pytest.mark.parametrize("size", [64, (96, 160)], ids=str)
def test_exported_weights_give_the_same_logits_in_timm(
    size: Any, torch: Any, timm: Any, tmp_path: Path
) -> None:
    height, width = size if isinstance(size, tuple) else (size, size)
    weights = random_weights(VARIANTS["S/32"], (height, width), gelu="exact")
    path = save_safetensors(weights, tmp_path / "ours.safetensors", weights.model_info.to_dict())
    model = timm.create_model(SMALLEST, img_size=(height, width), num_classes=10).eval()
    timm.models.load_checkpoint(model, path, strict=True)
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    logits = Classifier(weights, "float32")(images)
    assert_logits_close(logits, timm_logits(torch, model, images))
    # The metadata survives as well.
    assert load_checkpoint(path).model_info == weights.model_info


WRAPPERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "best": {"epoch": 3}},
    "ema": lambda state: {"state_dict": {}, "state_dict_ema": state},
    "no ema": lambda state: {"state_dict": state, "state_dict_ema": None},
    "averaged": lambda state: {
        "model": {f"module.{key}": state[key] * 2 for key in state},
        "model_ema": {"n_averaged": state["head.bias"].long()[0]}
        | {f"module.{key}": state[key] for key in state},
    },
    "lightning": lambda state: {
        "state_dict": {"loss.weight": state["head.bias"]}
        | {f"model.{key}": state[key] for key in state},
        "callbacks": {"ModelCheckpoint": {"best_model_score": state["head.bias"][0]}},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "compiled in lightning": lambda state: {
        "state_dict": {f"model._orig_mod.{key}": state[key] for key in state}
    },
    "module": lambda state: {"state_dict": {f"module.{key}": state[key] for key in state}},
    "compiled": lambda state: {f"_orig_mod.{key}": state[key] for key in state},
    "both": lambda state: {f"module._orig_mod.{key}": state[key] for key in state},
    "both, reversed": lambda state: {f"_orig_mod.module.{key}": state[key] for key in state},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_torch_file_reads_wrapped_and_prefixed_state_dicts(
    wrapper: str, archive: bool, torch: Any, timm: Any, tmp_path: Path
) -> None:
    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    state = WRAPPERS[wrapper](model.state_dict())
    path = tmp_path / "theirs.pth"
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    images = random_images(64)
    classifier = load_pretrained(str(path), dtype="float32")
    assert_logits_close(classifier(images), timm_logits(torch, model, images))


def test_torch_file_reads_training_checkpoints_of_timm(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    from timm.utils import CheckpointSaver

    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model=SMALLEST, lr=1e-3, mean=None, nested=[{"a": (1, 2.0)}])
    allowed = torch.serialization.get_safe_globals()
    saver = CheckpointSaver(model, optimizer, args=arguments, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=50.0)
    path = tmp_path / "model_best.pth.tar"
    with pytest.raises(Exception, match=r"argparse.Namespace"):
        torch.load(path, weights_only=True)
    classifier = load_pretrained(str(path), dtype="float32")
    images = random_images(64)
    assert_logits_close(classifier(images), timm_logits(torch, model, images))
    # The classes that PyTorch allows are unchanged, whether this one was among them or not.
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(str(path))
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_torch_file_reads_numbers_of_numpy_and_names_other_classes(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    path = tmp_path / "last.ckpt"
    metrics = {"top1": np.float64(75.5), "top5": np.float32(92.0), "epoch": np.int64(3)}
    torch.save({"state_dict": model.state_dict(), "metrics": metrics}, path)
    assert load_checkpoint(str(path)).model_info.num_classes == 10
    torch.save({"state_dict": model.state_dict(), "folder": tmp_path}, path)
    with raises(UserError, str(path), "pathlib.PosixPath", "state_dict()") as caught:
        load_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_torch_file_reads_dictionaries_that_contain_each_other(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    state: dict[str, Any] = {"model": model.state_dict(), "epoch": 3}
    state["self"] = state["model"]["parent"] = state
    path = tmp_path / "theirs.pth"
    torch.save(state, path)
    loaded = dict(layout_tensors(dict(flatten_params(load_checkpoint(str(path)).params)), TIMM))
    expected = {key: value.detach().numpy() for key, value in model.named_parameters()}
    assert_params_equal(loaded, expected)


def test_torch_file_reads_a_folder_of_an_older_hub_repository(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=False)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert (tmp_path / "pytorch_model.bin").exists()
    classifier = load_pretrained(str(tmp_path), dtype="float32")
    images = random_images(64)
    assert_logits_close(classifier(images), timm_logits(torch, model, images))


def test_torch_file_rejects_duplicate_names(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    key = "blocks.0.mlp_tokens.fc1.weight"
    torch.save({key: torch.zeros(2), f"module.{key}": torch.zeros(2)}, path)
    with raises(UserError, f"'{key}'", "twice"):
        load_checkpoint(str(path))


def test_torch_file_reads_parameters_and_any_float_type(
    torch: Any, timm: Any, tmp_path: Path
) -> None:
    model = make_timm_model(torch, timm, SMALLEST, img_size=64, num_classes=10)
    exact = tmp_path / "exact.pth"
    torch.save(dict(model.named_parameters()), exact)
    expected = {key: value.detach().numpy() for key, value in model.named_parameters()}
    loaded = dict(layout_tensors(dict(flatten_params(load_checkpoint(str(exact)).params)), TIMM))
    assert_params_equal(loaded, expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = tmp_path / f"{dtype}.pth"
        torch.save({key: value.to(dtype) for key, value in model.state_dict().items()}, path)
        loaded = dict(layout_tensors(dict(flatten_params(load_checkpoint(str(path)).params)), TIMM))
        assert_params_equal(
            loaded, {k: v.to(dtype).float().numpy() for k, v in model.state_dict().items()}
        )


class Malicious:
    """Object that runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_torch_file_does_not_unpickle_programs(archive: bool, torch: Any, tmp_path: Path) -> None:
    path, created = tmp_path / "evil.pth", tmp_path / "created"
    state = {
        "blocks.0.mlp_tokens.fc1.weight": torch.zeros(2),
        "evil": Malicious(f"touch {created}"),
    }
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    with raises(UserError, str(path)) as caught:
        load_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    assert not created.exists()
    # Nor is one inside an allowed class.
    torch.save({**state, "evil": argparse.Namespace(evil=state["evil"])}, tmp_path / "args.pth")
    with raises(UserError, str(tmp_path / "args.pth")) as caught:
        load_checkpoint(str(tmp_path / "args.pth"))
    assert "\n" not in str(caught.value)
    assert not created.exists()
    torch.load(path, weights_only=False)
    assert created.exists()


def bad_states(torch: Any) -> list[tuple[Any, list[str]]]:
    return [
        ([1, 2], ["list"]),
        ({"epoch": 3}, ["epoch", "int"]),
        ({"count": torch.zeros(3, dtype=torch.int64)}, ["count", "torch.int64"]),
        (
            {"blocks.0.mlp_tokens.fc1.weight": torch.zeros(1).expand(10**7, 10**6)},
            ["40000000000000"],
        ),
        ({"fc.weight": torch.zeros(3)}, ["fc.weight"]),
        ({"sparse": torch.eye(3).to_sparse()}, ["sparse", "torch.sparse_coo"]),
    ]


def test_torch_file_rejects_other_contents_with_one_line(torch: Any, tmp_path: Path) -> None:
    for state, parts in bad_states(torch):
        path = tmp_path / "bad.pth"
        torch.save(state, path)
        with raises(UserError, str(path), *parts) as caught:
            load_checkpoint(str(path))
        assert "\n" not in str(caught.value)
    for content in (b"", b"not a pickle\n", path.read_bytes()[:200]):
        path.write_bytes(content)
        with raises(UserError, str(path)) as caught:
            load_checkpoint(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(32, 128), (128, 32), 64], ids=str)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_image_size_and_gelu_are_read_from_timms_config(
    size: Any, gelu: str, torch: Any, timm: Any, tmp_path: Path
) -> None:
    layer = {"tanh": timm.layers.GELUTanh, "exact": timm.layers.GELU}[gelu]
    model = make_timm_model(
        torch, timm, SMALLEST, img_size=size, num_classes=10, act_layer=layer, pretrained=False
    )
    # The config has the name of the layer, not the class.
    model_args = {"act_layer": {"tanh": "gelu_tanh", "exact": "gelu"}[gelu]}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=model_args)
    height, width = size if isinstance(size, tuple) else (size, size)
    classifier = load_pretrained(str(tmp_path), image_size=(height, width), dtype="float32")
    assert (classifier.model_info.gelu, classifier.model_info.image_size) == (gelu, (height, width))
    assert not classifier.model_info.resize_note
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    assert_logits_close(classifier(images), timm_logits(torch, model, images))


def photographs() -> list[Path]:
    from sklearn import datasets

    return sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))


@pytest.mark.parametrize("settings", [GOOGLE, MIIL], ids=["google", "miil"])
@pytest.mark.parametrize("size", [224, 384])
def test_eval_image_matches_timms_transform(settings: dict[str, Any], size: int, timm: Any) -> None:
    from PIL import Image

    transform = timm.data.create_transform(input_size=size, **settings)
    assert len(photographs()) == 2
    for path in photographs():
        tensor = transform(Image.open(path).convert("RGB")).numpy().transpose(1, 2, 0)
        expected = (tensor * settings["std"] + settings["mean"]) * 255
        pixels = eval_image(
            path.read_bytes(), image_size=(size, size), eval_crop=settings["interpolation"]
        )
        difference = np.abs(pixels - expected)
        print(f"\ndifference to timm: {difference.max():.2f} gray levels")
        assert difference.max() < 1.01
        assert difference.mean() < 0.5


@pytest.mark.parametrize("settings", [GOOGLE, MIIL], ids=["google", "miil"])
def test_predict_matches_timm_on_photographs(
    settings: dict[str, Any], torch: Any, timm: Any, tmp_path: Path
) -> None:
    from PIL import Image

    model = make_timm_model(torch, timm, SMALLEST, num_classes=10)
    names = [f"class {index}" for index in range(10)]
    timm.models.save_for_hf(
        model,
        tmp_path,
        safe_serialization=True,
        model_config={"label_names": names},
        data_config=settings,
    )
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["pretrained_cfg"]["interpolation"] == settings["interpolation"]
    transform = timm.data.create_transform(input_size=224, **settings)
    with torch.no_grad():
        inputs = torch.stack([transform(Image.open(p).convert("RGB")) for p in photographs()])
        expected = model(inputs).softmax(-1).numpy()
    classifier = load_pretrained(str(tmp_path), dtype="float32")
    for row, prediction in enumerate(classifier.predict(photographs(), topk=10)):
        for index, name, probability, _ in prediction.classes:
            assert name == names[index]
            assert probability == pytest.approx(expected[row, index], abs=1e-3)
