"""Tests of `python -m mixer_jax.convert`: what it writes, what it prints, and how it ends."""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from mixer_jax import convert
from mixer_jax.checkpoints import export
from mixer_jax.checkpoints.load import load_checkpoint, resize
from mixer_jax.checkpoints.model_zoo import MODEL_ZOO, NOTES
from mixer_jax.checkpoints.resolve import FORMATS, HUB, resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.mixer_config import VARIANTS, num_params
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run

WITHOUT_JAX = "import sys; sys.modules.update(jax=None, flax=None, orbax=None)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and the newer one as files of published weights."""
    place = tmp_path_factory.mktemp("convert")
    save_run(random_weights(seed=1), place / "run", step=1)
    export.export_weights(random_weights(), "google", f"{place}/w.npz")
    export.export_weights(random_weights(), "timm", f"{place}/w.safetensors")
    return place


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door in this process keeps the settings of the tests."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


def code_to_use(out: str) -> list[str]:
    """Returns the lines that the door tells to use the target by."""
    return [line for line in out.splitlines() if line.startswith("  ")]


def test_files_are_converted_without_jax_and_said_how_to_use(place: Path, tmp_path: Path) -> None:
    target = f"{tmp_path}/t.safetensors"
    done = run_cli("convert", f"{place}/w.npz", target, preamble=WITHOUT_JAX)
    size = f"{Path(target).stat().st_size / 1e6:,.1f} MB"
    wanted = [["Mixer-custom", "16", "tanh"], ["3290"], ["10"], [target, size, "timm"]]
    told = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    for line, parts in zip(told, wanted, strict=False):
        assert mentions(line, *parts)
    # That it was checked, and what follows.
    assert len(told) == len(wanted) + 2
    assert code_to_use(done.stdout) == [
        "  import timm",
        "  model = timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=16, patch_size=4, "
        "num_blocks=2, embed_dim=16, mlp_ratio=(8 / 16, 24 / 16), "
        "act_layer=timm.layers.GELUTanh)",
        f'  timm.models.load_checkpoint(model, "{target}")',
    ]
    assert not done.stderr
    assert_params_equal(load_checkpoint(target).params, random_weights().params)
    assert load_checkpoint(target).model_info == random_weights().model_info


def test_a_run_is_converted_to_a_run_at_another_size(place: Path, tmp_path: Path) -> None:
    target = f"{tmp_path}/resized"
    (tmp_path / "labels.txt").write_text("".join(f"digit {name}\n" for name in DIGITS))
    arguments = ["--image_size=32", "--gelu=exact", "--eval_crop=bicubic", "--step=1"]
    labels = f"--labels={tmp_path}/labels.txt"
    done = run_cli("convert", f"{place}/run", target, *arguments, labels)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "Mixer-custom", "32", "16", "Appendix C")
    assert f"  python -m mixer_jax.predict --checkpoint={target} photo.jpg" in done.stdout
    found, wanted = load_checkpoint(target), resize(random_weights(seed=1), (32, 32))
    assert_params_equal(found.params, wanted.params)
    assert found.model_info.image_size == (32, 32)
    assert found.model_info.class_names[3] == "digit 3"
    assert (found.model_info.gelu, found.model_info.eval_crop) == ("exact", "bicubic")


def test_a_program_is_written_and_runs_as_said(place: Path, tmp_path: Path) -> None:
    target = f"{tmp_path}/it's.stablehlo"
    done = run_cli("convert", f"{place}/w.npz", target)
    lines = code_to_use(done.stdout)
    assert mentions(lines[-1], "(n, 16, 16, 3)", "[-1, 1]")
    code = "\n".join(
        [
            "import numpy as np; images = np.zeros((2, 16, 16, 3), np.float32)",
            *(line.strip() for line in lines),
            "print(logits.shape)",
        ]
    )
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert used.stdout == "(2, 10)\n"


def test_force_replaces_a_file(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.npz"
    target.write_text("older")
    with raises(UserError, str(target), "--force"):
        convert.main([f"{place}/run", str(target)])
    assert target.read_text() == "older"
    assert convert.main([f"{place}/run", str(target), "--force"]) == 0
    assert_params_equal(load_checkpoint(str(target)).params, random_weights(seed=1).params)
    # Also the file that is read.
    assert convert.main([str(target), str(target), "--force", "--image_size=32"]) == 0
    assert load_checkpoint(str(target)).model_info.image_size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["SOURCE", "TARGET"]),
        (["{place}/w.npz"], ["SOURCE", "TARGET"]),
        (["{place}/lacks.npz", "t.npz"], ["PLACE/lacks.npz"]),
        (["{place}", "t.npz"], ["PLACE"]),
        (["hf:timm", "t.npz"], ["hf:timm"]),
        (["{place}/w.npz", "{place}/lacks/t.npz"], ["PLACE/lacks"]),
        (["{place}/w.npz", "{place}"], ["PLACE"]),
        (["{place}/w.npz", "t.safetensors", "--to=google"], ["google", "t.safetensors"]),
        (["{place}/w.npz", "t.pth"], ["t.pth", "--to"]),
        (["{place}/run", ".npz"], ["'.npz'"]),
        (["--list", "{place}/w.npz", "t.npz"], ["--list"]),
        (["--list", "--to=google"], ["--list"]),
        (["{place}/w.npz", "t.npz", "--to=onnx"], ["--to", "onnx"]),
        (["{place}/w.npz", "t.npz", "--step=1"], ["PLACE/w.npz", "step"]),
        (["{place}/run", "t.npz", "--step=2"], ["PLACE/run", "2", "1"]),
        (["{place}/w.npz", "t.npz", "--image_size=huge"], ["image_size", "huge"]),
        (["{place}/w.npz", "t.npz", "--labels=lacks.txt"], ["--labels", "lacks.txt"]),
        # Told only when the weights are read.
        (["{place}/w.npz", "t.npz", "--image_size=17"], ["17", "patch_size", "4"]),
        (["{place}/w.npz", "t.npz", "--labels={place}/two.txt"], ["PLACE/w.npz", "10", "2"]),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    arguments: list[str],
    parts: list[str],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (place / "two.txt").write_text("one\ntwo\n")
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert.main([argument.format(place=place) for argument in arguments])
    # The path may have numbers in it.
    assert mentions(str(caught.value).replace(str(place), "PLACE"), *parts)
    assert not any(tmp_path.iterdir())
    assert sorted(place.rglob("*")) == before


def test_a_mistake_is_one_line_before_anything_heavy(place: Path, tmp_path: Path) -> None:
    without = f"{WITHOUT_JAX}; sys.modules['mixer_jax.inference'] = None"
    done = run_cli("convert", f"{place}/w.npz", f"{tmp_path}/t.pth", code=2, preamble=without)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_wrong_copy_is_a_failure(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = export._FILE_FORMATS["timm"]

    def write(path: str, tensors: Iterable[tuple[str, np.ndarray]], said: object) -> None:
        right.write(path, ((n, t + np.float32(1e-3)) for n, t in tensors), said)

    monkeypatch.setitem(export._FILE_FORMATS, "timm", right._replace(write=write))
    with raises(RunError, "t.safetensors"):
        convert.main([f"{place}/w.npz", f"{tmp_path}/t.safetensors"])
    assert not any(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_the_list_says_what_to_pass() -> None:
    done = run_cli("convert", "--list", preamble=WITHOUT_JAX)
    header, *lines = done.stdout.splitlines()
    assert mentions(header, "--checkpoint")
    table, rest = lines[: len(MODEL_ZOO)], lines[len(MODEL_ZOO) :]
    assert [line.split()[0] for line in table] == [one.source for one in MODEL_ZOO]
    assert [line[:4] for line in rest if line.startswith("[")] == ["[1] ", "[2] "]
    of_source = dict(zip((one.source for one in MODEL_ZOO), table, strict=True))
    trap = of_source["hf:timm/mixer_b16_224.goog_in21k_ft_in1k"]
    assert trap.split("  ")[-1].strip() == "ImageNet-1k [1]"
    assert trap.split()[3:6] == ["76.62", "92.25", "82.01"]
    assert of_source["gs://mixer_models/gsam/Mixer-S_8.npz"].split("  ")[-1].strip() == "? [2]"


def test_known_weights_can_be_asked_for() -> None:
    for one in MODEL_ZOO:
        assert one.note <= len(NOTES)
        if one.source.startswith(HUB):
            assert resolve_checkpoint(one.source).format == "hub"
        else:
            assert Path(one.source).suffix in FORMATS
        # Of 32-bit numbers, and a few headers.
        if one.mebibytes and one.num_classes:
            count = num_params(VARIANTS[one.model.removeprefix("Mixer-")], 224, one.num_classes)
            size = 4 * count / 2**20
            assert size < one.mebibytes < size + 0.1


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_timm_is_asked_for_a_model_by_name_where_it_has_it(variant: str) -> None:
    about = random_weights(gelu="exact").model_info
    about = dataclasses.replace(
        about, variant=variant, config=VARIANTS[variant], image_size=(224, 224)
    )
    line = convert.timm_snippet(about, "w.safetensors")[1]
    name = f"mixer_{variant.replace('/', '').lower()}_224"
    by_name = f'timm.create_model("{name}", num_classes=10, checkpoint_path="w.safetensors")'
    assert (by_name in line) == (variant != "H/14")
    # timm's models by name have no other size, nor other widths.
    grown = dataclasses.replace(about, image_size=(448, 448))
    wider = dataclasses.replace(
        about, config=dataclasses.replace(about.config, tokens_mlp_dim=1024)
    )
    oblong = dataclasses.replace(about, image_size=(224, 448))
    for other, told in (
        (grown, "img_size=448,"),
        (wider, f"mlp_ratio=(1024 / {about.config.hidden_dim},"),
        (oblong, "img_size=(224, 448),"),
    ):
        line = convert.timm_snippet(other, "w.safetensors")[1]
        assert "MlpMixer(" in line
        assert told in line


def test_timm_is_told_its_own_gelu_only_where_it_is_another() -> None:
    for gelu in ("tanh", "exact"):
        lines = convert.timm_snippet(random_weights(gelu=gelu).model_info, "w.safetensors")
        assert ("act_layer=timm.layers.GELUTanh" in lines[1]) == (gelu == "tanh")


def test_timm_gets_the_widths_although_it_cuts_fractions_off() -> None:
    for hidden, mlp in itertools.product(range(1, 130), (1, 2, 3, 29, 57, 98, 101)):
        about = random_weights().model_info
        widths = dataclasses.replace(about.config, hidden_dim=hidden, tokens_mlp_dim=mlp)
        line = convert.timm_snippet(dataclasses.replace(about, config=widths), "w")[1]
        ratio = eval(line.partition("mlp_ratio=")[2].partition("), ")[0] + ")")[0]
        # As timm computes it.
        assert int(ratio * hidden) == mlp
