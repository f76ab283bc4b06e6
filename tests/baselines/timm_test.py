"""Tests that our models are timm's, with its own files, its own models and its own transforms."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.formats.safetensors import write_safetensors
from mixer_jax.checkpoints.layouts import layout_views
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.data.preprocess import eval_image
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.mixer_layouts import TIMM
from tests.helpers.messages import raises
from tests.helpers.random_weights import assert_params_equal

pytestmark = pytest.mark.baselines

MODELS = ("mixer_s32_224", "mixer_s16_224", "mixer_b16_224", "mixer_l16_224")
SMALLEST = MODELS[0]
# Of the spread of the logits.
TOLERANCE = 1e-4
MIIL = {"interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 0.875}
GOOGLE = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the eight of `conftest`, which would each compute the same."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def make_peer(torch: Any, timm: Any, name: str, **settings: Any) -> Any:
    """A model of timm's in which no parameter has the value it begins with."""
    peer = timm.create_model(name, **settings).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in peer.named_parameters():
            fan_in = parameter[0].numel()
            scale = fan_in**-0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale, generator=random)
            if "norm" in key and key.endswith("weight"):
                parameter += 1.0
    return peer


def their_logits(torch: Any, peer: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def assert_agree(ours: Any, theirs: np.ndarray) -> None:
    difference = np.abs(np.asarray(ours) - theirs).max() / theirs.std()
    print(f"\ndifference to timm: {difference:.1e} of the logits' spread")
    assert difference < TOLERANCE


def some_images(size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


def export(weights: Any, path: Path) -> Path:
    views = layout_views(dict(tree.flatten(weights.params)), TIMM)
    write_safetensors(str(path), views, weights.model_info.to_dict())
    return path


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_from_timm_to_us_and_back(
    name: str, torch: Any, timm: Any, tmp_path: Path
) -> None:
    peer = make_peer(torch, timm, name)
    timm.models.save_for_hf(peer, tmp_path / "theirs", safe_serialization=True)
    images = some_images()
    theirs = their_logits(torch, peer, images)

    ours = load_pretrained(str(tmp_path / "theirs"), dtype="float32")
    assert_agree(ours(images), theirs)
    assert ours.model_info.gelu == "exact"
    assert ours.model_info.eval_crop == "bicubic"
    assert f"mixer_{ours.model_info.variant.lower().replace('/', '')}_224" == name

    weights = load_checkpoint(str(tmp_path / "theirs"))
    back = timm.create_model(name)
    timm.models.load_checkpoint(back, str(export(weights, tmp_path / "ours.safetensors")))
    tensors = back.state_dict()
    for key, tensor in peer.state_dict().items():
        assert torch.equal(tensor, tensors.pop(key)), key
    assert not tensors


@pytest.mark.parametrize("size", [64, (96, 160)], ids=str)
def test_our_weights_are_the_same_model_in_timm(
    size: Any, torch: Any, timm: Any, tmp_path: Path
) -> None:
    from mixer_jax.models.mixer_config import VARIANTS
    from tests.helpers.random_weights import random_weights

    height, width = size if isinstance(size, tuple) else (size, size)
    weights = random_weights(VARIANTS["S/32"], (height, width), gelu="exact")
    path = export(weights, tmp_path / "ours.safetensors")
    peer = timm.create_model(SMALLEST, img_size=(height, width), num_classes=10).eval()
    timm.models.load_checkpoint(peer, str(path), strict=True)
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    assert_agree(Classifier(weights, "float32")(images), their_logits(torch, peer, images))
    # The file says what shapes alone do not.
    assert load_checkpoint(str(path)).model_info == weights.model_info


def plain(state: Any) -> Any:
    return state


WRAPPERS = {
    "as it is": plain,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state},
    "ema": lambda state: {"state_dict": {}, "state_dict_ema": state},
    "module": lambda state: {"state_dict": {f"module.{key}": state[key] for key in state}},
    "compiled": lambda state: {f"_orig_mod.{key}": state[key] for key in state},
    "both": lambda state: {f"module._orig_mod.{key}": state[key] for key in state},
    "both, turned": lambda state: {f"_orig_mod.module.{key}": state[key] for key in state},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_a_pth_file_is_read(
    wrapper: str, archive: bool, torch: Any, timm: Any, tmp_path: Path
) -> None:
    peer = make_peer(torch, timm, SMALLEST, img_size=64, num_classes=10)
    state = WRAPPERS[wrapper](peer.state_dict())
    path = tmp_path / "theirs.pth"
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    images = some_images(64)
    ours = load_pretrained(str(path), dtype="float32")
    assert_agree(ours(images), their_logits(torch, peer, images))


def test_a_training_checkpoint_of_timm_is_read(torch: Any, timm: Any, tmp_path: Path) -> None:
    from timm.utils import CheckpointSaver

    peer = make_peer(torch, timm, SMALLEST, img_size=64, num_classes=10)
    optimizer = torch.optim.AdamW(peer.parameters())
    peer(torch.zeros(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(model=SMALLEST, lr=1e-3, mean=None, nested=[{"a": (1, 2.0)}])
    allowed = torch.serialization.get_safe_globals()
    saver = CheckpointSaver(peer, optimizer, args=arguments, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=50.0)
    path = tmp_path / "model_best.pth.tar"
    with pytest.raises(Exception, match=r"argparse.Namespace"):
        torch.load(path, weights_only=True)
    ours = load_pretrained(str(path), dtype="float32")
    images = some_images(64)
    assert_agree(ours(images), their_logits(torch, peer, images))
    # What the user's program allows is as before, whether it was this or not.
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_checkpoint(str(path))
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_names_that_are_there_twice_are_refused(torch: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"a": torch.zeros(2), "module.a": torch.zeros(2)}, path)
    with raises(UserError, "'a'"):
        load_checkpoint(str(path))


def test_parameters_and_half_precision_are_read(torch: Any, timm: Any, tmp_path: Path) -> None:
    peer = make_peer(torch, timm, SMALLEST, img_size=64, num_classes=10)
    exact = tmp_path / "exact.pth"
    torch.save(dict(peer.named_parameters()), exact)
    expected = {key: value.detach().numpy() for key, value in peer.named_parameters()}
    found = dict(layout_views(dict(tree.flatten(load_checkpoint(str(exact)).params)), TIMM))
    assert_params_equal(found, expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = tmp_path / f"{dtype}.pth"
        torch.save({key: value.to(dtype) for key, value in peer.state_dict().items()}, path)
        found = dict(layout_views(dict(tree.flatten(load_checkpoint(str(path)).params)), TIMM))
        assert_params_equal(
            found, {k: v.to(dtype).float().numpy() for k, v in peer.state_dict().items()}
        )


class Malicious:
    """What runs a program when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "before 1.6"])
def test_a_program_in_a_pth_file_is_refused_and_not_run(
    archive: bool, torch: Any, tmp_path: Path
) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    state = {"stem.proj.weight": torch.zeros(2), "evil": Malicious(f"touch {trace}")}
    torch.save(state, path, _use_new_zipfile_serialization=archive)
    with raises(UserError, str(path)) as caught:
        load_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    # Nor one in what is allowed beside tensors.
    torch.save({**state, "evil": argparse.Namespace(evil=state["evil"])}, tmp_path / "args.pth")
    with raises(UserError, str(tmp_path / "args.pth")) as caught:
        load_checkpoint(str(tmp_path / "args.pth"))
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


def bad_states(torch: Any) -> list[tuple[Any, list[str]]]:
    return [
        ([1, 2], ["list"]),
        ({"epoch": 3}, ["epoch", "int"]),
        ({"count": torch.zeros(3, dtype=torch.int64)}, ["count", "torch.int64"]),
        ({"head.weight": torch.zeros(1).expand(10**7, 10**6)}, ["40000000000000"]),
        ({"fc.weight": torch.zeros(3)}, ["fc.weight"]),
        ({"sparse": torch.eye(3).to_sparse()}, ["sparse", "torch.sparse_coo"]),
    ]


def test_what_is_no_mixer_is_refused_in_one_line(torch: Any, tmp_path: Path) -> None:
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
def test_the_size_and_the_gelu_are_those_that_timm_saves(
    size: Any, gelu: str, torch: Any, timm: Any, tmp_path: Path
) -> None:
    layer = {"tanh": timm.layers.GELUTanh, "exact": timm.layers.GELU}[gelu]
    peer = make_peer(
        torch, timm, SMALLEST, img_size=size, num_classes=10, act_layer=layer, pretrained=False
    )
    # timm wants the name of the layer where the model has the layer itself.
    named = {"act_layer": {"tanh": "gelu_tanh", "exact": "gelu"}[gelu]}
    timm.models.save_for_hf(peer, tmp_path, safe_serialization=True, model_args=named)
    height, width = size if isinstance(size, tuple) else (size, size)
    ours = load_pretrained(str(tmp_path), image_size=(height, width), dtype="float32")
    assert (ours.model_info.gelu, ours.model_info.image_size) == (gelu, (height, width))
    assert not ours.model_info.resize_note
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    assert_agree(ours(images), their_logits(torch, peer, images))


def photographs() -> list[Path]:
    from sklearn import datasets

    return sorted((Path(datasets.__file__).parent / "images").glob("*.jpg"))


@pytest.mark.parametrize("settings", [GOOGLE, MIIL], ids=["google", "miil"])
@pytest.mark.parametrize("size", [224, 384])
def test_images_are_prepared_as_by_timm(settings: dict[str, Any], size: int, timm: Any) -> None:
    from PIL import Image

    transform = timm.data.create_transform(input_size=size, **settings)
    assert len(photographs()) == 2
    for path in photographs():
        tensor = transform(Image.open(path).convert("RGB")).numpy().transpose(1, 2, 0)
        theirs = (tensor * settings["std"] + settings["mean"]) * 255
        ours = eval_image(
            path.read_bytes(), image_size=(size, size), eval_crop=settings["interpolation"]
        )
        difference = np.abs(ours - theirs)
        print(f"\ndifference to timm: {difference.max():.2f} grey levels")
        assert difference.max() < 1.01
        assert difference.mean() < 0.5


@pytest.mark.parametrize("settings", [GOOGLE, MIIL], ids=["google", "miil"])
def test_a_photograph_gets_timms_logits(
    settings: dict[str, Any], torch: Any, timm: Any, tmp_path: Path
) -> None:
    from PIL import Image

    peer = make_peer(torch, timm, SMALLEST, num_classes=10)
    names = [f"class {label}" for label in range(10)]
    timm.models.save_for_hf(
        peer,
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
        theirs = peer(inputs).softmax(-1).numpy()
    ours = load_pretrained(str(tmp_path), dtype="float32")
    for row, prediction in enumerate(ours.predict(photographs(), topk=10)):
        for label, name, probability in prediction.classes:
            assert name == names[label]
            assert probability == pytest.approx(theirs[row, label], abs=1e-3)
