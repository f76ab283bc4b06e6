"""Tests of `python -m mixer_jax.extract`: files of features, their order, errors and resuming."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from mixer_jax import extract
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.cli import common
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
from mixer_jax.errors import DiskFullError, RunError, UserError
from mixer_jax.evaluation import extraction, feature_files
from mixer_jax.evaluation.checkpoint import make_input_config
from mixer_jax.evaluation.extraction import Extraction, ExtractionResult, extract_to_file
from mixer_jax.files import file_lock
from mixer_jax.inference import load_pretrained
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.stack import forward_intermediates
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.cli import run_cli
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import TINY, random_weights, save_run

CONFIGS = {
    "mixer": TINY,
    "vit": VitConfig(2, 4, 16, 24, 2, pre_logits=True),
    "bit": BitConfig("1,1", 8, "3x3"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each family, and 11 images of two classes, the last one broken."""
    workspace = tmp_path_factory.mktemp("extract")
    for family, config in CONFIGS.items():
        save_run(random_weights(config), workspace / family)
    rng = np.random.default_rng(0)
    for index in range(10):
        path = workspace / "images" / ("cat" if index % 3 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (20, 30, 3), np.uint8))
    (workspace / "broken").mkdir()
    (workspace / "broken" / "bad.png").write_text("not an image")
    return workspace


@pytest.fixture(autouse=True)
def keep_jax_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not change the test suite's JAX config."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


def extract_main(workspace: Path, out: Path, *flags: str, family: str = "mixer") -> int:
    return extract.main([f"--checkpoint={workspace}/{family}", f"--out={out}", *flags])


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_are_those_of_the_module(family: str, workspace: Path, tmp_path: Path) -> None:
    classifier = load_pretrained(workspace / family)
    layers = classifier.layers
    out = tmp_path / "features.npz"
    images = sorted((workspace / "images").rglob("*.png"))
    flags = [f"--layers={','.join(layers)}", "--batch_size=8", f"{workspace}/images"]
    assert extract_main(workspace, out, *flags, family=family) == 0
    found = read_npz(out)
    assert found.keys() == {"names", *layers, "metadata"}
    assert found["names"].tolist() == [str(path) for path in images]
    pixels = jax.numpy.asarray(classifier.preprocess(images))
    logits, expected = forward_intermediates(classifier.model, classifier.params, pixels)
    for name, array in {**expected, "logits": logits}.items():
        assert found[name].shape == (10, *layers[name].shape)
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    pooled = tmp_path / "pooled.npz"
    assert extract_main(workspace, pooled, "--pool=mean", *flags, family=family) == 0
    for name in layers:
        mean = found[name].mean(tuple(range(1, found[name].ndim - 1)))
        actual = read_npz(pooled)[name]
        np.testing.assert_allclose(actual, mean, rtol=1e-5, atol=1e-5, err_msg=name)


def test_parquet_has_the_values_of_npz(workspace: Path, tmp_path: Path) -> None:
    data = [f"--dataset=folder:{workspace}/images", "--split=train+validation"]
    flags = [*data, "--layers=pre_logits,blocks.1", "--batch_size=4"]
    for suffix in ("npz", "parquet"):
        assert extract_main(workspace, tmp_path / f"features.{suffix}", *flags) == 0
    arrays = read_npz(tmp_path / "features.npz")
    table = pq.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["name", "label", "class_name", "pre_logits", "blocks.1"]
    assert table["name"].to_pylist() == arrays["names"].tolist()
    assert table["label"].to_pylist() == arrays["labels"].tolist()
    classes = [Path(name).parent.name for name in arrays["names"]]
    assert table["class_name"].to_pylist() == classes
    assert arrays["class_names"][arrays["labels"]].tolist() == classes
    metadata = json.loads(table.schema.metadata[b"mixer_jax"])
    for name in ("pre_logits", "blocks.1"):
        shape = metadata["shapes"][name]
        values = np.array(table[name].to_pylist(), np.float32).reshape(-1, *shape)
        np.testing.assert_array_equal(values, arrays[name])
    assert json.loads(str(arrays["metadata"])).items() <= metadata.items()


def test_examples_are_in_the_order_of_the_dataset(
    workspace: Path, tmp_path: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npz"
    flags = ["--dataset=digits", f"--data_dir={digits_dir}", "--batch_size=8"]
    assert extract_main(workspace, out, *flags) == 0
    printed = capsys.readouterr().out
    assert mentions(printed, str(out), "360", "digits", "pre_logits", "float32")
    arrays = read_npz(out)
    source = open_dataset("digits", "test", digits_dir)
    assert arrays["labels"].tolist() == [source.read_labels(i)[0] for i in range(360)]
    assert arrays["names"].tolist() == [source.examples[i]["name"] for i in range(360)]
    assert arrays["class_names"].tolist() == list(source.class_names)
    # The headless model's outputs.
    encoder = load_pretrained(workspace / "mixer", num_classes=0)
    pixels = encoder.preprocess([source.examples[index]["image"] for index in range(360)])
    np.testing.assert_allclose(arrays["pre_logits"], encoder(pixels), rtol=1e-5, atol=1e-5)
    assert list(tmp_path.iterdir()) == [out]


def extract_source(
    workspace: Path, source: Source, out: Path, num_devices: int = 1, **options: Any
) -> ExtractionResult:
    """Extracts two layers, in batches of 8."""
    weights = load_checkpoint(workspace / "mixer")
    model = weights.model_info.build_model()
    mesh = make_mesh(0, 1, jax.devices()[:num_devices])
    params = shard_inference_params(weights.params, model, mesh)
    request = Extraction(weights, model, source, ("blocks.0", "pre_logits"), pool=False)
    return extract_to_file(
        request, params, mesh, make_input_config(weights, 8, False), out, **options
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two batches."""
    monkeypatch.setattr(extraction, "_MAX_PART_BATCHES", 2)


@pytest.mark.usefixtures("small_parts")
def test_devices_do_not_change_the_result(workspace: Path, tmp_path: Path) -> None:
    source = open_dataset("synthetic", "test", num_examples=45)
    for num_devices in (1, 4):
        extract_source(workspace, source, tmp_path / f"{num_devices}.npz", num_devices)
    one, four = (read_npz(tmp_path / f"{num_devices}.npz") for num_devices in (1, 4))
    for name in ("names", "labels", "class_names", "metadata"):
        np.testing.assert_array_equal(one[name], four[name])
    for name in ("blocks.0", "pre_logits"):
        assert len(one[name]) == 45
        np.testing.assert_allclose(one[name], four[name], rtol=1e-5, atol=1e-5)


def test_images_with_several_labels_or_none_are_all_there(workspace: Path, tmp_path: Path) -> None:
    examples = [dict(open_dataset("synthetic", "test").examples[index]) for index in range(10)]
    for index, example in enumerate(examples):
        example["labels"] = tuple(range(index % 3))
    source = Source("several", examples, ("a", "b", "c"), multi_label=True)
    for suffix in ("npz", "parquet"):
        extract_source(workspace, source, tmp_path / f"features.{suffix}")
    labels = read_npz(tmp_path / "features.npz")["labels"]
    assert [row.nonzero()[0].tolist() for row in labels] == [list(e["labels"]) for e in examples]
    table = pq.read_table(tmp_path / "features.parquet")
    assert table["label"].to_pylist() == [list(e["labels"]) for e in examples]
    assert table["class_name"].to_pylist()[2] == ["a", "b"]


class StopError(BaseException):
    """Stands for the end of a process that is killed."""


def extract_until(name: str, num_calls: int, workspace: Path, source: Source, out: Path) -> None:
    """Extracts until a function of `extraction` has been called `num_calls` times."""
    original: Callable[..., Any] = getattr(extraction, name)
    remaining = iter(range(num_calls))

    def limited(*args: Any) -> Any:
        if next(remaining, None) is None:
            raise StopError
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, name, limited)
        with pytest.raises(StopError):
            extract_source(workspace, source, out)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_stopped_extraction_resumes_to_the_same_bytes(
    suffix: str, workspace: Path, tmp_path: Path
) -> None:
    source = open_dataset("synthetic", "test", num_examples=90)
    expected, out = tmp_path / f"expected.{suffix}", tmp_path / f"features.{suffix}"
    assert extract_source(workspace, source, expected) == ExtractionResult(90, [], 0)
    # Three parts; later the other three, but not the output.
    for name, num_calls in (("write_part", 3), ("_assemble", 0)):
        extract_until(name, num_calls, workspace, source, out)
        assert not out.exists()
    assert len(list((tmp_path / f"{out.name}.parts").glob("*.npz"))) == 6
    assert extract_source(workspace, source, out) == ExtractionResult(90, [], 90)
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(tmp_path.iterdir()) == [expected, out]


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_size_are_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset("synthetic", "test", num_examples=45)
    out = tmp_path / "features.npz"
    extract_until("write_part", 1, workspace, source, out)
    monkeypatch.setattr(extraction, "_MAX_PART_BATCHES", 4)
    with raises(UserError, f"{out}.parts", "part_size", "16", "--force"):
        extract_source(workspace, source, out)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_memory_does_not_grow_with_the_number_of_images(
    suffix: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace_peak(num_examples: int) -> tuple[int, int]:
        """Returns the peak of memory after the first part, and the size of the output."""
        original, parts = extraction.write_part, []

        def write_part(path: Path, part: Any) -> None:
            original(path, part)
            parts.append(path)
            if len(parts) == 1:
                # Compilation and imports are over.
                tracemalloc.start()

        out = tmp_path / f"{num_examples}.{suffix}"
        source = open_dataset("synthetic", "test", num_examples=num_examples)
        with monkeypatch.context() as patch:
            patch.setattr(extraction, "write_part", write_part)
            try:
                extract_source(workspace, source, out)
                return tracemalloc.get_traced_memory()[1], out.stat().st_size
            finally:
                tracemalloc.stop()

    trace_peak(32)
    (small, small_size), (large, large_size) = trace_peak(160), trace_peak(800)
    assert large - small < 0.2 * (large_size - small_size)


@pytest.mark.usefixtures("small_parts")
def test_another_request_is_refused_or_starts_over(workspace: Path, tmp_path: Path) -> None:
    source = open_dataset("synthetic", "test", num_examples=45)
    out = tmp_path / "features.npz"
    extract_until("write_part", 1, workspace, source, out)
    other = open_dataset("synthetic", "other", num_examples=45)
    with raises(UserError, f"{out}.parts", "synthetic test", "--force"):
        extract_source(workspace, other, out)
    assert extract_source(workspace, other, out, force=True).num_resumed == 0
    assert mentions(str(read_npz(out)["metadata"]), "synthetic other")


def test_one_process_writes_an_output(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.npz"
    source = open_dataset("synthetic", "test", num_examples=8)
    with file_lock(tmp_path / ".features.npz.lock"), raises(RunError, str(out), "locked"):
        extract_source(workspace, source, out)
    assert list(tmp_path.iterdir()) == []


def test_unusable_images_of_a_dataset_fail_or_are_skipped(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "images" / "cat" / "bad.png"
    bad.parent.mkdir(parents=True)
    bad.write_text("not an image")
    for path in (workspace / "images" / "cat").iterdir():
        (bad.parent / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "features.npz"
    flags = [f"--dataset=folder:{tmp_path}/images", "--split=train+validation"]
    with raises(UserError, "1", str(bad), "--skip_bad_images"):
        extract_main(workspace, out, *flags)
    assert not out.exists()
    capsys.readouterr()
    # The features of the others are not computed again.
    assert extract_main(workspace, out, *flags, "--skip_bad_images") == 0
    printed = capsys.readouterr()
    assert mentions(printed.out, "resumed", "7", "6", "1")
    assert mentions(printed.err, str(bad))
    arrays = read_npz(out)
    assert len(arrays["names"]) == len(arrays["pre_logits"]) == 6
    assert str(bad) not in arrays["names"]


def test_unreadable_files_are_named_and_left_out(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npz"
    assert extract_main(workspace, out, f"{workspace}/images", f"{workspace}/broken") == 1
    bad, summary = capsys.readouterr().err.splitlines()[-2:]
    assert mentions(bad, f"{workspace}/broken/bad.png")
    assert mentions(summary, "1", "11")
    assert len(read_npz(out)["names"]) == 10
    with raises(UserError, "images"):
        extract_main(workspace, tmp_path / "none.npz", f"{workspace}/broken/bad.png")
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--layers=block.1"], ["block.1", "blocks.1"]),
        (["--layers=pre_logits,xyz"], ["xyz", "stem"]),
        (["--out={tmp_path}/features.csv"], [".npz", ".parquet", "{tmp_path}/features.csv"]),
        (["--out=gs://bucket/features.npz"], ["local", "gs://bucket/features.npz"]),
        (["--out={tmp_path}/absent/features.npz"], ["{tmp_path}/absent"]),
        (["--out=/proc/features.npz"], ["/proc/features.npz"]),
        (["--out={tmp_path}/old.npz"], ["{tmp_path}/old.npz", "--force"]),
        (["--batch_size=0"], ["--batch_size", "0"]),
        (["photo.jpg"], ["--dataset", "IMAGE"]),
        (["--pool=max"], ["--pool", "max", "mean"]),
        (["--dataset=no_such_dataset"], ["no_such_dataset"]),
    ],
)
def test_invalid_arguments_write_nothing(
    flags: list[str], parts: list[str], workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.npz").write_text("old")
    flags, parts = ([text.format(tmp_path=tmp_path) for text in x] for x in (flags, parts))
    with raises(UserError, *parts):
        extract_main(workspace, tmp_path / "features.npz", "--dataset=synthetic", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["old.npz"]
    assert (tmp_path / "old.npz").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "suffix"), [("write_part", "npz"), ("_assemble", "npz"), ("_assemble", "parquet")]
)
def test_full_disk_leaves_parts_to_resume_from(
    name: str, suffix: str, workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"features.{suffix}"
    original = getattr(extraction, name)

    def on_full_disk(*args: Any) -> None:
        with file_size_limit(300):
            original(*args)

    source = open_dataset("synthetic", "test", num_examples=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, name, on_full_disk)
        with raises(DiskFullError, str(out), "File too large"):
            extract_source(workspace, source, out)
    assert not out.exists()
    assert extract_source(workspace, source, out).num_images == 24
    assert list(tmp_path.iterdir()) == [out]


def test_damaged_part_is_named(workspace: Path, tmp_path: Path) -> None:
    source = open_dataset("synthetic", "test", num_examples=24)
    out = tmp_path / "features.npz"
    extract_until("_assemble", 0, workspace, source, out)
    part = tmp_path / "features.npz.parts" / "000000.npz"
    part.write_bytes(part.read_bytes()[:100])
    with raises(RunError, str(part)):
        extract_source(workspace, source, out)
    part.unlink()
    assert extract_source(workspace, source, out).num_images == 24


def test_layers_are_listed(workspace: Path) -> None:
    done = run_cli("extract", f"--checkpoint={workspace}/mixer", "--list_layers")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(load_pretrained(workspace / "mixer").layers)
    assert done.stderr == ""


def test_npz_is_what_numpy_writes(tmp_path: Path) -> None:
    """Also for names of other scripts, and parts without images."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    parts = [
        feature_files.Part(["é.png", "日本.png"], np.array([1, 0]), {"x": rows}, []),
        feature_files.Part([], np.zeros(0, np.int64), {"x": rows[:0]}, [("bad.png", "empty")]),
        feature_files.Part(["a long name.png"], np.array([2]), {"x": rows[:1]}, []),
    ]
    paths = [tmp_path / f"{index}" for index in range(3)]
    for path, part in zip(paths, parts, strict=True):
        feature_files.write_part(path, part)
    read = feature_files.Parts(paths)
    assert (read.sizes, read.bad_images()) == ([2, 0, 1], [("bad.png", "empty")])
    contents = feature_files.Contents({"x": (3,)}, ("a", "b", "c"), False, {"model": "m"})
    for suffix, write in feature_files.WRITERS.items():
        write(tmp_path / f"features{suffix}", read, contents)
    arrays = read_npz(tmp_path / "features.npz")
    assert arrays["names"].tolist() == ["é.png", "日本.png", "a long name.png"]
    assert arrays["labels"].tolist() == [1, 0, 2]
    np.testing.assert_array_equal(arrays["x"], np.concatenate([rows, rows[:1]]))
    assert json.loads(str(arrays["metadata"])) == {"model": "m"}
    table = pq.read_table(tmp_path / "features.parquet")
    assert table["name"].to_pylist() == arrays["names"].tolist()
