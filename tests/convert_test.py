"""Tests of `python -m mixer_jax.convert`: what it writes and prints, and its errors."""

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
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.model_zoo import MODEL_ZOO, NOTES
from mixer_jax.checkpoints.resolve import FORMATS, HUB, resolve_checkpoint
from mixer_jax.checkpoints.weights import resize
from mixer_jax.cli import common
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.registry import get_family, parse_model_name
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run

WITHOUT_JAX = "import sys; sys.modules.update(jax=None, flax=None, orbax=None)"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with other weights as files."""
    workspace = tmp_path_factory.mktemp("convert")
    save_run(random_weights(seed=1), workspace / "run", step=1)
    export.export_weights(random_weights(), "google", f"{workspace}/w.npz")
    export.export_weights(random_weights(), "timm", f"{workspace}/w.safetensors")
    return workspace


@pytest.fixture(autouse=True)
def keep_jax_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not change the test suite's JAX config."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache, cpu_only: None)


def usage_lines(out: str) -> list[str]:
    """Returns the indented lines, which show how to use the target."""
    return [line for line in out.splitlines() if line.startswith("  ")]


def test_convert_files_without_jax(workspace: Path, tmp_path: Path) -> None:
    target = f"{tmp_path}/t.safetensors"
    result = run_cli("convert", f"{workspace}/w.npz", target, preamble=WITHOUT_JAX)
    size = f"{Path(target).stat().st_size / 1e6:,.1f} MB"
    facts = [line for line in result.stdout.splitlines() if not line.startswith("  ")]
    expected = [["Mixer-custom", "16", "tanh"], ["3290"], ["10"], [target, size, "timm"]]
    for line, parts in zip(facts, expected, strict=False):
        assert mentions(line, *parts)
    # The checks, and the heading of the usage.
    assert len(facts) == len(expected) + 2
    assert usage_lines(result.stdout) == [
        "  import timm",
        "  model = timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=16, patch_size=4, "
        "num_blocks=2, embed_dim=16, mlp_ratio=(8 / 16, 24 / 16), "
        "act_layer=timm.layers.GELUTanh)",
        f'  timm.models.load_checkpoint(model, "{target}")',
    ]
    assert not result.stderr
    assert_params_equal(load_checkpoint(target).params, random_weights().params)
    assert load_checkpoint(target).model_info == random_weights().model_info


def test_convert_a_run_with_overrides(workspace: Path, tmp_path: Path) -> None:
    target = f"{tmp_path}/resized"
    (tmp_path / "labels.txt").write_text("".join(f"digit {name}\n" for name in DIGITS))
    flags = ["--image_size=32", "--gelu=exact", "--eval_crop=bicubic", "--step=1"]
    labels = f"--labels={tmp_path}/labels.txt"
    result = run_cli("convert", f"{workspace}/run", target, *flags, labels)
    (line,) = result.stderr.splitlines()
    assert mentions(line, "Mixer-custom", "32", "16", "Appendix C")
    assert f"  python -m mixer_jax.predict --checkpoint={target} photo.jpg" in result.stdout
    loaded = load_checkpoint(target)
    assert_params_equal(loaded.params, resize(random_weights(seed=1), (32, 32)).params)
    info = loaded.model_info
    assert (info.image_size, info.class_names[3]) == ((32, 32), "digit 3")
    assert (info.gelu, info.eval_crop) == ("exact", "bicubic")


def test_convert_to_a_folder_of_timm_prints_its_name_there(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(VitConfig(1, 4, 16, 24, 2))
    export.export_weights(weights, "timm", f"{workspace}/vit.safetensors")
    source, target = f"{workspace}/vit.safetensors", f"{tmp_path}/vit.tiny"
    assert convert.main([source, target, "--to=timm"]) == 0
    out = capsys.readouterr().out
    assert mentions(out, f"{target},", "format timm", "bit-identical")
    code = f'  model = timm.create_model("local-dir:{target}", pretrained=True).eval()'
    assert code in out.splitlines()
    assert sorted(path.name for path in Path(target).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = load_checkpoint(target)
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info
    # An existing folder stays as it is.
    with raises(UserError, target):
        convert.main([source, target, "--to=timm", "--force"])
    assert load_checkpoint(target).model_info == weights.model_info


@pytest.mark.slow
@pytest.mark.parametrize("format", ["stablehlo", "onnx"])
def test_convert_to_a_program_prints_code_that_runs(
    format: str, workspace: Path, tmp_path: Path
) -> None:
    target = f"{tmp_path}/it's.{format}"
    result = run_cli("convert", f"{workspace}/w.npz", target)
    lines = usage_lines(result.stdout)
    assert mentions(lines[-1], "(n, 16, 16, 3)", "[-1, 1]")
    code = "\n".join(
        [
            "import numpy as np; images = np.zeros((2, 16, 16, 3), np.float32)",
            *(line.strip() for line in lines),
            "print(logits.shape)",
        ]
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == "(2, 10)\n"


def test_force_replaces_a_file(workspace: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.npz"
    target.write_text("older")
    with raises(UserError, str(target), "--force"):
        convert.main([f"{workspace}/run", str(target)])
    assert target.read_text() == "older"
    assert convert.main([f"{workspace}/run", str(target), "--force"]) == 0
    assert_params_equal(load_checkpoint(str(target)).params, random_weights(seed=1).params)
    # The source can be the target.
    assert convert.main([str(target), str(target), "--force", "--image_size=32"]) == 0
    assert load_checkpoint(str(target)).model_info.image_size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["SOURCE", "TARGET"]),
        (["{dir}/w.npz"], ["SOURCE", "TARGET"]),
        (["{dir}/missing.npz", "t.npz"], ["DIR/missing.npz"]),
        (["{dir}", "t.npz"], ["DIR"]),
        (["hf:timm", "t.npz"], ["hf:timm"]),
        (["{dir}/w.npz", "{dir}/missing/t.npz"], ["DIR/missing"]),
        (["{dir}/w.npz", "{dir}"], ["DIR"]),
        (["{dir}/w.npz", "t.safetensors", "--to=google"], ["google", "t.safetensors"]),
        (["{dir}/w.npz", "t.pth"], ["t.pth", "--to"]),
        (["{dir}/w.npz", "t.pth", "--to=timm"], ["t.pth", ".safetensors", "folder"]),
        # timm has no Mixer of this size.
        (["{dir}/w.npz", "t", "--to=timm"], ["Mixer-custom", "4, 16 and 2", ".safetensors"]),
        (["{dir}/w.npz", "{dir}/run", "--to=timm"], ["DIR/run"]),
        (["{dir}/w.npz", "{dir}/run", "--to=timm", "--force"], ["DIR/run", "--force"]),
        (["{dir}/run", ".npz"], ["'.npz'"]),
        (["--list", "{dir}/w.npz", "t.npz"], ["--list"]),
        (["--list", "--to=google"], ["--list"]),
        (["{dir}/w.npz", "t.npz", "--to=onnx"], ["--to", "onnx"]),
        (["{dir}/w.npz", "t.npz", "--step=1"], ["DIR/w.npz", "step"]),
        (["{dir}/run", "t.npz", "--step=2"], ["DIR/run", "2", "1"]),
        (["{dir}/w.npz", "t.npz", "--image_size=huge"], ["image_size", "huge"]),
        (["{dir}/w.npz", "t.npz", "--labels=missing.txt"], ["--labels", "missing.txt"]),
        # These need the weights.
        (["{dir}/w.npz", "t.npz", "--image_size=17"], ["17", "patch_size", "4"]),
        (["{dir}/w.npz", "t.npz", "--labels={dir}/two.txt"], ["DIR/w.npz", "10", "2"]),
    ],
)
def test_usage_errors_write_nothing(
    arguments: list[str],
    parts: list[str],
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (workspace / "two.txt").write_text("one\ntwo\n")
    files = sorted(workspace.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert.main([argument.format(dir=workspace) for argument in arguments])
    # The path can contain numbers.
    assert mentions(str(caught.value).replace(str(workspace), "DIR"), *parts)
    assert not any(tmp_path.iterdir())
    assert sorted(workspace.rglob("*")) == files


def test_usage_errors_are_reported_before_heavy_imports(workspace: Path, tmp_path: Path) -> None:
    preamble = f"{WITHOUT_JAX}; sys.modules['mixer_jax.inference'] = None"
    arguments = [f"{workspace}/w.npz", f"{tmp_path}/t.pth"]
    result = run_cli("convert", *arguments, code=2, preamble=preamble)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_target_that_differs_is_deleted(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file_format = export._FILE_FORMATS["timm"]

    def write(path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: object) -> None:
        file_format.write(path, ((n, t + np.float32(1e-3)) for n, t in tensors), metadata)

    monkeypatch.setitem(export._FILE_FORMATS, "timm", file_format._replace(write=write))
    with raises(RunError, "t.safetensors"):
        convert.main([f"{workspace}/w.npz", f"{tmp_path}/t.safetensors"])
    assert not any(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_list_prints_the_model_zoo() -> None:
    result = run_cli("convert", "--list", preamble=WITHOUT_JAX)
    header, *lines = result.stdout.splitlines()
    assert mentions(header, "--checkpoint")
    table = [line for line in lines if line.startswith(("gs://", "hf:"))]
    assert [line.split()[0] for line in table] == [entry.source for entry in MODEL_ZOO]
    notes = [line[:4] for line in lines if line.startswith("[")]
    assert notes == [f"[{number}] " for number in range(1, len(NOTES) + 1)]
    by_source = {line.split()[0]: line for line in table}
    misleading = by_source["hf:timm/mixer_b16_224.goog_in21k_ft_in1k"]
    assert misleading.split("  ")[-1].strip() == "ImageNet-1k [1]"
    assert misleading.split()[4:7] == ["76.62", "92.25", "82.01"]
    assert by_source["gs://mixer_models/gsam/Mixer-S_8.npz"].split("  ")[-1].strip() == "? [2]"


def test_list_of_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["--list=vit"]) == 0
    out = capsys.readouterr().out
    models = {line.split()[1].partition("-")[0] for line in out.splitlines()[1:] if "://" in line}
    assert models == {"ViT"}
    assert mentions(out, "hf:timm/vit_base_patch16_384.augreg_in21k_ft_in1k", "86.01", "[3]")
    assert not mentions(out, "[1]")
    with raises(UserError, "--list must be one of all, mixer", "resnet", "bit"):
        convert.main(["--list=resnet"])


def test_model_zoo_has_valid_sources_and_sizes() -> None:
    for entry in MODEL_ZOO:
        assert entry.note <= len(NOTES)
        if entry.source.startswith(HUB):
            assert resolve_checkpoint(entry.source).format == "hub"
        else:
            assert Path(entry.source).suffix in FORMATS
        if entry.mebibytes and entry.num_classes:
            name, variant = parse_model_name(entry.model)
            family = get_family(name)
            # Notes: weights of the paper have a hidden layer; what else is in a file is unknown.
            overrides = {"pre_logits": True} if entry.note == 3 else {}
            config = family.get_config(variant, **overrides)
            num_params = family.num_params(config, entry.image_size or 224, entry.num_classes)
            # Float32 numbers and a few headers; some sizes are rounded.
            difference = entry.mebibytes - 4 * num_params / 2**20
            assert entry.note == 4 or -0.6 < difference < 0.6, entry.source


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_timm_snippet_uses_the_name_of_timms_model_if_there_is_one(variant: str) -> None:
    info = dataclasses.replace(
        random_weights(gelu="exact").model_info,
        variant=variant,
        config=VARIANTS[variant],
        image_size=(224, 224),
    )
    line = convert.timm_snippet(info, "w.safetensors")[1]
    name = f"mixer_{variant.replace('/', '').lower()}_224"
    by_name = f'timm.create_model("{name}", num_classes=10)'
    assert (by_name in line) == (variant != "H/14")
    # timm's named models have no other image size or architecture.
    wide_config = dataclasses.replace(info.config, tokens_mlp_dim=1024)
    for changes, argument in (
        ({"image_size": (448, 448)}, "img_size=448,"),
        ({"config": wide_config}, f"mlp_ratio=(1024 / {info.config.hidden_dim},"),
        ({"image_size": (224, 448)}, "img_size=(224, 448),"),
    ):
        line = convert.timm_snippet(dataclasses.replace(info, **changes), "w.safetensors")[1]
        assert "MlpMixer(" in line
        assert argument in line


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_timm_snippet_sets_the_tanh_gelu(gelu: str) -> None:
    lines = convert.timm_snippet(random_weights(gelu=gelu).model_info, "w.safetensors")
    assert ("act_layer=timm.layers.GELUTanh" in lines[1]) == (gelu == "tanh")


def test_timm_snippet_has_ratios_that_truncate_to_the_dimensions() -> None:
    info = random_weights().model_info
    for hidden, mlp in itertools.product(range(1, 130), (1, 2, 3, 29, 57, 98, 101)):
        config = dataclasses.replace(info.config, hidden_dim=hidden, tokens_mlp_dim=mlp)
        line = convert.timm_snippet(dataclasses.replace(info, config=config), "w")[1]
        ratio = eval(line.partition("mlp_ratio=")[2].partition("), ")[0] + ")")[0]
        # As timm computes it.
        assert int(ratio * hidden) == mlp
