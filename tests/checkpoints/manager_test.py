"""Tests of checkpoints of runs, saved and restored by orbax on disk."""

import asyncio
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.path import async_path

from mixer_jax.checkpoints import manager as manager_module
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.manager import CheckpointManager, abstract_state, save_params_streaming
from mixer_jax.checkpoints.resolve import find_checkpoint, list_steps
from mixer_jax.checkpoints.weights import unflatten_params
from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init, save_state
from mixer_jax.training.setup import Experiment, build_experiment
from mixer_jax.training.step import TrainState
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights
from tests.helpers.sync_log import log_syncs
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

CONFIG = {
    "num_blocks": 1,
    "patch_size": 4,
    "hidden_dim": 16,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 16,
}
# What both generations of old metadata have, verbatim but with a shorter config.
OLD_RUN_METADATA: dict[str, Any] = {
    "ema": False,
    "num_steps": 20,
    "num_train_examples": 1437,
    "config": {
        "seed": 3,
        "dataset": {"name": "digits"},
        "model": {"variant": "custom", "dtype": "bfloat16"},
        "preprocess": {"eval_crop": "whole"},
    },
    "versions": {"mixer_jax": "0.1.0", "jax": "0.6.0"},
    "loss_window": [0.5, 0.25],
}
# Metadata from before there was a `ModelInfo`.
OLDEST_METADATA: dict[str, Any] = {
    "variant": "custom",
    "widths": CONFIG,
    "gelu": "tanh",
    "image_size": 16,
    "class_names": list(DIGITS),
    "preprocess": {"eval_crop": "whole", "pixels": [-1, 1]},
    "loss": "softmax",
    **OLD_RUN_METADATA,
}
# Metadata from when `ModelInfo` was named "about", with other names for some fields.
ABOUT_METADATA: dict[str, Any] = {
    "about": {
        "variant": "custom",
        "widths": CONFIG,
        "image_size": [16, 16],
        "num_classes": 10,
        "class_names": list(DIGITS),
        "gelu": "tanh",
        "eval_crop": "whole",
        "exif_orientation": False,
        "loss": "softmax",
        "dtype": "bfloat16",
        "resolution": "",
    },
    **OLD_RUN_METADATA,
}
TinyRun = tuple[Experiment, TrainState, Path]


def make_tree(seed: int) -> Any:
    values = np.random.default_rng(seed).normal(size=(16, 8))
    return {"kernel": jnp.asarray(values, jnp.float32), "count": jnp.int32(seed)}


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Workdir of a run that saved steps 9, 10 and 100 and kept two of them."""
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, {"params": make_tree(step)}, {"note": f"step {step}"})
    checkpoints.close()
    return str(tmp_path)


def test_save_keeps_the_newest_and_restore_is_bit_identical(run: str) -> None:
    assert list_steps(run) == [10, 100]
    checkpoints = CheckpointManager(run)
    assert checkpoints.latest_step() == 100
    for step in (10, 100):
        assert checkpoints.metadata(step) == {"note": f"step {step}"}
        restored = checkpoints.restore(step, {"params": make_tree(0)})["params"]
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(make_tree(step)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_save_syncs_all_files_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_syncs(monkeypatch)
    manager = CheckpointManager(str(tmp_path), 1)
    for step in (1, 2):
        manager.save(step, {"params": {"x": jnp.arange(3)}}, {})
    manager.close()
    folder = tmp_path / "checkpoints" / "2"
    named = log.index("rename", folder)
    files = {path.name for path in folder.rglob("*")}
    assert "metadata" in files
    assert files <= log.names_synced_before(named) | {"_CHECKPOINT_METADATA"}
    # orbax changes this file last.
    assert log.events[-1] == ("sync", str(tmp_path / "checkpoints"))
    assert ("sync", str(folder / "_CHECKPOINT_METADATA")) in log.events[named:]
    assert list_steps(str(tmp_path)) == [2]


def test_the_best_checkpoint_is_kept_next_to_the_newest(tmp_path: Path) -> None:
    workdir, best = str(tmp_path), 0
    offered: list[list[int]] = []

    def find_best(steps: Sequence[int]) -> int | None:
        offered.append([*steps])
        return best if best in steps else None

    checkpoints = CheckpointManager(workdir, max_to_keep=2, find_best=find_best)
    kept = []
    # A step is evaluated after it is saved.
    for step, best_before in ((1, 0), (2, 1), (3, 1), (4, 1), (5, 4), (6, 4), (7, 4)):
        best = best_before
        checkpoints.save(step, {"params": make_tree(step)}, {})
        checkpoints.wait()
        kept.append(list_steps(workdir))
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]
    assert offered[-1] == [4, 6, 7] or offered[-1] == [4, 5, 6, 7]
    # The last step is the best one: nothing is saved after it.
    best = 7
    checkpoints.delete_outdated()
    assert list_steps(workdir) == [6, 7]
    checkpoints.close()
    # A later process has the same checkpoints.
    best = 6
    checkpoints = CheckpointManager(workdir, max_to_keep=1, find_best=find_best)
    checkpoints.save(8, {"params": make_tree(8)}, {})
    checkpoints.close()
    assert list_steps(workdir) == [6, 8]
    restored = CheckpointManager(workdir).restore(6, {"params": make_tree(0)})["params"]
    np.testing.assert_array_equal(restored["kernel"], make_tree(6)["kernel"])


def test_nothing_is_deleted_before_the_new_checkpoint_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails leaves the checkpoints that it would have replaced."""
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=1, find_best=lambda steps: None)
    checkpoints.save(1, {"params": make_tree(1)}, {})
    checkpoints.wait()

    def fail(folder: Path, **kwargs: Any) -> None:
        raise OSError("no space for step 2")

    # Called just before the folder gets its name.
    monkeypatch.setattr(manager_module, "write_checksums", fail)
    checkpoints.save(2, {"params": make_tree(2)}, {})
    with pytest.raises(OSError, match="step 2"):
        checkpoints.wait()
    assert list_steps(str(tmp_path)) == [1]


def test_restore_shards_arrays_as_requested(run: str) -> None:
    tree = make_tree(0)
    target = abstract_state(tree, state_sharding(tree, make_mesh(1, 8), get_family("mixer")))
    restored = CheckpointManager(run).restore(100, {"params": target})["params"]
    assert restored["kernel"].sharding == target["kernel"].sharding
    np.testing.assert_array_equal(restored["kernel"], make_tree(100)["kernel"])


def test_unfinished_saves_are_ignored_and_deleted_by_the_next_writer(run: str) -> None:
    unfinished = Path(run) / "checkpoints" / "200.orbax-checkpoint-tmp"
    (unfinished / "params").mkdir(parents=True)
    assert list_steps(run) == [10, 100]
    assert CheckpointManager(run).latest_step() == 100
    assert unfinished.exists()  # Readers leave it.
    checkpoints = CheckpointManager(run, max_to_keep=2)
    checkpoints.save(200, {"params": make_tree(200)}, {})
    checkpoints.close()
    assert not unfinished.exists()
    assert list_steps(run) == [100, 200]


@pytest.mark.parametrize("suffix", ["", "/", "/checkpoints", "/checkpoints/100"])
def test_find_checkpoint_accepts_any_folder_of_a_run(run: str, suffix: str) -> None:
    assert find_checkpoint(run + suffix) == (run, 100)


def test_find_checkpoint_of_a_step(run: str) -> None:
    assert find_checkpoint(run, step=10) == (run, 10)
    assert find_checkpoint(f"{run}/checkpoints/10") == (run, 10)


def test_find_checkpoint_fails_if_there_is_none(run: str, tmp_path: Path) -> None:
    with raises(UserError, run) as caught:
        find_checkpoint(run, step=11)
    message = str(caught.value).replace(run, "")  # The path can contain numbers.
    assert mentions(message, "11", "10", "100")
    with raises(UserError, str(tmp_path / "nowhere")):
        find_checkpoint(str(tmp_path / "nowhere"))


def test_incomplete_folders_are_not_checkpoints(run: str) -> None:
    (Path(run) / "checkpoints" / "300").mkdir()
    assert list_steps(run) == [10, 100]
    shutil.rmtree(Path(run) / "checkpoints" / "100" / "params")
    with raises(UserError, f"{run}/checkpoints/100", "params"):
        CheckpointManager(run).restore(100, {"params": make_tree(0)})


def save_tiny_run(data_dir: str, workdir: Path, metadata: dict[str, Any] | None = None) -> TinyRun:
    """Saves the initial state of a tiny run as its step 4, with its own metadata or others."""
    config = small_config(data_dir, **NO_REGULARIZATION)
    experiment = build_experiment(config, open_datasets(config), jax.devices()[:1])
    state = experiment.create_state()
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    saved = experiment._replace(metadata=metadata or experiment.metadata)
    save_state(saved, checkpoints, state, 4, saved.metadata.get("loss_window", []))
    checkpoints.close()
    return experiment, state, workdir


def resume(experiment: Experiment, workdir: Path) -> tuple[TrainState, list[float]]:
    init = find_init_source(experiment.config, str(workdir))
    assert init is not None
    assert init.model_info.config == experiment.model_info.config
    return restore_or_init(experiment, CheckpointManager(str(workdir)), init)


@pytest.mark.parametrize("metadata", [OLDEST_METADATA, ABOUT_METADATA], ids=["oldest", "about"])
def test_runs_with_old_metadata_load_and_resume(
    metadata: dict[str, Any], digits_dir: str, tmp_path: Path
) -> None:
    experiment, state, workdir = save_tiny_run(digits_dir, tmp_path, metadata)
    loaded = load_checkpoint(str(workdir))
    assert_params_equal(loaded.params, state.params)
    info = loaded.model_info
    assert (info.family, info.variant, vars(info.config)) == ("mixer", "custom", CONFIG)
    assert (info.gelu, info.loss) == ("tanh", "softmax")
    assert (info.image_size, info.num_classes, info.resize_note) == ((16, 16), 10, "")
    assert info.class_names == DIGITS
    assert (info.eval_crop, info.dtype, info.exif_orientation) == ("resize", "bfloat16", False)
    assert loaded.train_config is not None
    assert loaded.train_config["dataset"]["name"] == "digits"
    resumed, window = resume(experiment, workdir)
    assert window == [0.5, 0.25]
    assert int(resumed.step) == 4
    assert_params_equal(resumed.params, state.params)


@pytest.mark.parametrize(
    "missing", ["gelu", "preprocess", "config", "ema", "num_steps", "class_names", "loss_window"]
)
def test_missing_old_metadata_is_reported(missing: str, digits_dir: str, tmp_path: Path) -> None:
    metadata = {name: value for name, value in OLDEST_METADATA.items() if name != missing}
    experiment, _, workdir = save_tiny_run(digits_dir, tmp_path, metadata)
    if missing == "loss_window":
        # `loop.save` adds it.
        step = workdir / "checkpoints" / "4"
        remove_checksums(step)
        (step / "metadata" / "metadata").write_text(json.dumps(metadata))
    if missing not in ("num_steps", "loss_window"):
        with raises(UserError, f"{workdir}/checkpoints/4", missing):
            load_checkpoint(str(workdir))
    if missing != "ema":
        with raises(UserError, missing):
            resume(experiment, workdir)


def truncate_data(step: Path) -> None:
    for path in (step / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_data(step: Path) -> None:
    for path in (step / "params").rglob("d/*"):
        path.write_bytes(b"x" * path.stat().st_size)


def write_metadata(text: str) -> Callable[[Path], None]:
    def write(step: Path) -> None:
        (step / "metadata" / "metadata").write_text(text)

    return write


def remove_checksums(step: Path) -> None:
    """Makes a checkpoint one of an older version."""
    (step / "checksums.json").unlink()
    path = step / "metadata" / "metadata"
    metadata = json.loads(path.read_text())
    assert metadata.pop("has_checksums")
    path.write_text(json.dumps(metadata))


DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (truncate_data, []),
    (overwrite_data, []),
    (lambda step: shutil.rmtree(step / "params"), ["params"]),
    (write_metadata("{"), []),
    (write_metadata("[1]"), []),
    (lambda step: (step / "metadata" / "metadata").unlink(), ["metadata"]),
    (lambda step: shutil.rmtree(step / "metadata"), ["metadata"]),
]
DAMAGE_IDS = [
    "truncated",
    "overwritten",
    "no arrays",
    "half JSON",
    "list",
    "no JSON",
    "no metadata",
]


@pytest.mark.parametrize("is_old", [False, True], ids=["checksums", "old"])
@pytest.mark.parametrize(("damage", "parts"), DAMAGES, ids=DAMAGE_IDS)
def test_damaged_checkpoints_fail_with_one_line(
    damage: Callable[[Path], None], parts: list[str], is_old: bool, digits_dir: str, tmp_path: Path
) -> None:
    experiment, _, workdir = save_tiny_run(digits_dir, tmp_path)
    if is_old:
        remove_checksums(workdir / "checkpoints" / "4")
    load_checkpoint(str(workdir))
    resume(experiment, workdir)
    damage(workdir / "checkpoints" / "4")
    for use in (lambda: load_checkpoint(str(workdir)), lambda: resume(experiment, workdir)):
        with raises(UserError, f"{workdir}/checkpoints/4", *parts) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def first_file(folder: Path, pattern: str) -> Path:
    return sorted(path for path in folder.glob(pattern) if path.is_file())[0]


@pytest.mark.parametrize(
    "pattern",
    [
        "params/ocdbt.process_0/d/*",
        "params/manifest.ocdbt",
        "params/_METADATA",
        "metadata/metadata",
    ],
)
def test_a_flipped_bit_is_noticed_and_named(run: str, pattern: str) -> None:
    step = Path(run) / "checkpoints" / "100"
    path = first_file(step, pattern)
    flip_bit(path)
    checkpoints = CheckpointManager(run)
    use = {
        "metadata": lambda: checkpoints.metadata(100),
        "params": lambda: checkpoints.restore(100, {"params": make_tree(0)}),
    }
    item, file = pattern.partition("/")[0], str(path.relative_to(step))
    with raises(UserError, str(step), file):
        use.pop(item)()
    # Other items are still restored.
    use.popitem()[1]()
    assert mentions(checkpoints.find_damage(100), file)
    assert checkpoints.find_damage(10) == ""


def fail_with_service_error(*args: Any, **kwargs: Any) -> None:
    raise ValueError("UNAVAILABLE: 503 the service is unavailable")


def test_failed_read_of_a_verified_checkpoint_is_not_damage(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Path(run) / "checkpoints" / "100"
    checkpoints = CheckpointManager(run)
    monkeypatch.setattr(checkpoints._manager, "restore", fail_with_service_error)
    assert checkpoints.find_damage(100) == ""
    with raises(RunError, str(step), "503"):
        checkpoints.restore(100, {"params": make_tree(0)}, is_verified=True)
    # Nothing has been verified without checksums.
    remove_checksums(step)
    with raises(UserError, str(step), "503"):
        checkpoints.restore(100, {"params": make_tree(0)}, is_verified=True)


def test_a_lost_host_is_not_damage(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective of orbax may fail, in the thread of the caller, as an error of any type."""

    def lose_host(*args: Any, **kwargs: Any) -> None:
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    checkpoints = CheckpointManager(run)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(checkpoints._manager, "restore", lose_host)
    for is_verified in (False, True):
        with raises(ValueError, "Gloo") as caught:
            checkpoints.restore(100, {"params": make_tree(0)}, is_verified=is_verified)
        assert not isinstance(caught.value, UserError)
    monkeypatch.setattr(manager_module.ocp, "CheckpointManager", lose_host)
    with raises(ValueError, "Gloo") as caught:
        CheckpointManager(run)
    assert not isinstance(caught.value, UserError)
    # The same words in a run on one host are from elsewhere, such as the name of a folder.
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with raises(UserError, "damaged"):
        CheckpointManager(run)


def test_failing_store_is_not_damaged_metadata(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Path(run) / "checkpoints" / "100"
    checkpoints = CheckpointManager(run)
    monkeypatch.setattr(type(epath.Path(run)), "read_bytes", fail_with_service_error)
    with raises(RunError, str(step), "503"):
        checkpoints.metadata(100, is_verified=True)
    with raises(RunError, str(step), "503"):
        checkpoints.find_damage(100)


def test_asyncio_does_not_log_reads_and_writes_that_orbax_abandoned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(str(tmp_path), max_to_keep=1)
    manager.save(1, {"params": make_tree(0)}, {})
    manager.close()
    # What earlier tests abandoned.
    gc.collect()
    caplog.clear()
    file = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "params"

    def abandon(error: Exception) -> None:
        loop = asyncio.new_event_loop()
        loop.create_future().set_exception(error)
        gc.collect()
        loop.close()

    abandon(ValueError(f"Error writing {file}"))
    abandon(ValueError("Error reading params/d/0 [tensorstore_spec='{}']"))
    # An error without the name of its file.
    with pytest.raises(IsADirectoryError) as raised:
        asyncio.run(async_path.write_text(tmp_path, "text"))
    abandon(raised.value)
    assert caplog.records == []
    abandon(ValueError("another"))
    assert [record.name for record in caplog.records] == ["asyncio"]


def test_parts_of_the_files_are_verified_by_different_workers(run: str) -> None:
    step = Path(run) / "checkpoints" / "100"
    flip_bit(first_file(step, "params/ocdbt.process_0/d/*"))
    checkpoints = CheckpointManager(run)
    found = [checkpoints.find_damage(100, worker, 3) for worker in range(3)]
    assert sorted(map(bool, found)) == [False, False, True]


@pytest.mark.parametrize("content", ["", "{}", '{"algorithm": "crc32", "files": 1}', None])
def test_damaged_or_missing_checksums_are_reported(run: str, content: str | None) -> None:
    path = Path(run) / "checkpoints" / "100" / "checksums.json"
    path.unlink() if content is None else path.write_text(content)
    with raises(UserError, str(path.parent), path.name):
        CheckpointManager(run).metadata(100)


def test_save_params_streaming_writes_a_usual_checkpoint(tmp_path: Path) -> None:
    weights = random_weights()
    metadata = {"model_info": weights.model_info.to_dict(), "ema": False}
    save_params_streaming(str(tmp_path), 0, weights.params, metadata)
    assert_params_equal(load_checkpoint(str(tmp_path)).params, weights.params)


def test_iter_restore_yields_numpy_arrays(tmp_path: Path) -> None:
    weights = random_weights()
    save_params_streaming(str(tmp_path), 0, weights.params, {})
    arrays = dict(CheckpointManager(str(tmp_path)).iter_restore(0, "params"))
    assert_params_equal(unflatten_params(arrays), weights.params)
    assert all(type(array) is np.ndarray for array in arrays.values())
