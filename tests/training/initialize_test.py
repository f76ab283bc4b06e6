"""Tests of the start of a run: from pretrained weights, at another image size, with a new head."""

import dataclasses
import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mixer_jax.checkpoints import manager
from mixer_jax.checkpoints.checksums import verify_checksums
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed import multihost
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import (
    describe_init,
    find_init_source,
    restore_or_init,
    save_state,
)
from mixer_jax.training.setup import Experiment, build_experiment, make_train_batches
from mixer_jax.training.step import TrainState
from mixer_jax.training.workdir import check_workdir, save_config
from tests.helpers.images import encode, noise
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import (
    TINY,
    assert_params_equal,
    random_weights,
    save_npz,
    save_run,
)
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

LOW = tuple(str(digit) for digit in range(5))
# Takes the architecture of the pretrained weights.
FROM_WEIGHTS: dict[str, Any] = {
    "model__variant": "init_from",
    "model__num_blocks": 0,
    "model__patch_size": 0,
    "model__hidden_dim": 0,
    "model__tokens_mlp_dim": 0,
    "model__channels_mlp_dim": 0,
}


def start(config: RunConfig, workdir: Path) -> tuple[Experiment, TrainState, str]:
    """Starts a run; returns its experiment, its state and the line about its weights."""
    init = find_init_source(config, str(workdir))
    datasets = open_datasets(config)
    experiment = build_experiment(config, datasets, init_info=init and init.model_info)
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    state, loss_window = restore_or_init(experiment, checkpoints, init)
    assert loss_window == []
    return experiment, state, describe_init(experiment, init)


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights()


@pytest.fixture(scope="module")
def run(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_run(weights, tmp_path_factory.mktemp("run"))


def test_init_keeps_the_head_of_the_same_classes(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(digits_dir, init_from=run, **FROM_WEIGHTS)
    _, state, line = start(config, tmp_path)
    assert_params_equal(state.params, weights.params)
    assert mentions(line, run)
    assert line.index("\n") == len(line) - 1


def test_init_head_new_starts_from_zeros_and_head_bias(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    config = small_config(
        digits_dir, init_from=run, init_head="new", model__head_bias=-1.0, **FROM_WEIGHTS
    )
    experiment, state, line = start(config, tmp_path)
    _, _, line_if_kept = start(
        small_config(digits_dir, init_from=run, **FROM_WEIGHTS), tmp_path / "kept"
    )
    head = state.params.pop("head")
    assert_params_equal(state.params, {k: v for k, v in weights.params.items() if k != "head"})
    assert head["kernel"].shape == (16, 10)
    assert not head["kernel"].any()
    np.testing.assert_array_equal(head["bias"], np.full(10, -1.0))
    assert mentions(line, run)
    assert line != line_if_kept
    state.params["head"] = head
    batch = next(make_train_batches(experiment, 0, print))
    _, metrics = experiment.train_step(state, batch, experiment.hyperparams)
    assert np.isfinite(metrics["loss"])


def test_new_head_replaces_the_hidden_layer_of_a_pretrained_head(
    digits_dir: str, tmp_path: Path
) -> None:
    vit = VitConfig(1, 4, 16, 24, 2, pre_logits=True)
    weights = random_weights(vit)
    run = save_run(weights, tmp_path / "pretrained")
    changes = {"init_from": run, **FROM_WEIGHTS}
    experiment, state, _ = start(small_config(digits_dir, **changes), tmp_path / "kept")
    assert experiment.model_info.config == vit
    assert_params_equal(state.params, weights.params)
    config = small_config(digits_dir, init_head="new", **changes)
    experiment, state, _ = start(config, tmp_path / "new")
    assert experiment.model_info.config == dataclasses.replace(vit, pre_logits=False)
    expected = {k: v for k, v in weights.params.items() if k not in ("head", "pre_logits")}
    assert_params_equal({k: v for k, v in state.params.items() if k != "head"}, expected)
    # It resumes with the same layers.
    checkpoints = CheckpointManager(str(tmp_path / "new"), max_to_keep=1)
    save_state(experiment, checkpoints, state, 1, [])
    checkpoints.close()
    init = find_init_source(config, str(tmp_path / "new"))
    assert init is not None
    again = build_experiment(config, open_datasets(config), init_info=init.model_info)
    assert again.model_info == experiment.model_info


def test_init_of_other_classes_gets_a_new_head(run: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir, "configs/digits.py:low", init_from=run, **FROM_WEIGHTS)
    experiment, state, _ = start(config, tmp_path)
    assert experiment.model_info.class_names == LOW
    assert state.params["head"]["kernel"].shape == (16, 5)


def test_init_head_keep_rejects_other_classes(run: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(
        digits_dir, "configs/digits.py:low", init_from=run, init_head="keep", **FROM_WEIGHTS
    )
    with raises(UserError, "config.init_head", "keep", run, "10", "5"):
        start(config, tmp_path)


def test_init_keeps_a_head_without_class_names_only_on_request(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    path = save_npz(weights, tmp_path / "published.npz")
    pretrained = weights.params["head"]["kernel"]
    for init_head, is_kept in (("auto", False), ("keep", True)):
        config = small_config(digits_dir, init_from=path, init_head=init_head, **FROM_WEIGHTS)
        _, state, _ = start(config, tmp_path / init_head)
        assert np.array_equal(state.params["head"]["kernel"], pretrained) == is_kept


@pytest.mark.parametrize("size", [32, 24])
def test_init_at_another_image_size_resizes_the_weights(
    run: str, weights: PretrainedWeights, digits_dir: str, tmp_path: Path, size: int
) -> None:
    config = small_config(digits_dir, init_from=run, image_size=size, **FROM_WEIGHTS)
    experiment, state, line = start(config, tmp_path)
    is_tiled = size == 32
    assert experiment.model_info.config.tokens_mlp_dim == (32 if is_tiled else 8)
    assert experiment.model_info.image_size == (size, size)
    assert mentions(line, run, "tiled" if is_tiled else "interpolated", "16")
    features = experiment.model.clone(num_classes=0)
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)), jnp.float32)
    params = {k: v for k, v in state.params.items() if k != "head"}
    resized = features.apply({"params": params}, images)
    assert np.isfinite(resized).all()
    if is_tiled:
        small = features.clone(config=dataclasses.replace(features.config, tokens_mlp_dim=8))
        host = {k: v for k, v in weights.params.items() if k != "head"}
        tiles = [images[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
        mean = np.mean([small.apply({"params": host}, tile) for tile in tiles], axis=0)
        np.testing.assert_allclose(resized, mean, atol=2e-5)


def test_config_may_declare_the_architecture_before_tiling(
    run: str, digits_dir: str, tmp_path: Path
) -> None:
    dims: dict[str, Any] = {"model__channels_mlp_dim": 24, "model__tokens_mlp_dim": 8}
    config = small_config(digits_dir, init_from=run, image_size=32, **dims)
    experiment, _, _ = start(config, tmp_path)
    assert experiment.model_info.config.tokens_mlp_dim == 32


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model__hidden_dim": 8},
            ("num_blocks", "2", "hidden_dim", "16", "--config.model.variant=init_from"),
        ),
        (
            {"model__channels_mlp_dim": 24, "model__gelu": "exact"},
            ("config.init_from", "--config.model.gelu=tanh"),
        ),
        ({**FROM_WEIGHTS, "image_size": 18}, ("image_size", "18", "patch_size", "4", "16", "20")),
        ({**FROM_WEIGHTS, "model__scan_unroll": 3}, ("model.scan_unroll", "3", "2")),
    ],
)
def test_init_rejects_weights_of_another_model(
    run: str, digits_dir: str, tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    config = small_config(digits_dir, init_from=run, **changes)
    with raises(UserError, *parts):
        start(config, tmp_path)


def test_init_names_the_variant_of_other_weights(digits_dir: str, tmp_path: Path) -> None:
    other = random_weights(MixerConfig(8, 32, 512, 256, 2048), (32, 32))
    run = save_run(other, tmp_path / "run")
    config = small_config(digits_dir, init_from=run, model__channels_mlp_dim=24)
    with raises(UserError, run, "S/32", "--config.model.variant=init_from"):
        start(config, tmp_path)


def test_init_names_the_family_of_other_weights(digits_dir: str, tmp_path: Path) -> None:
    vit = VitConfig(num_blocks=1, patch_size=4, hidden_dim=12, mlp_dim=20, num_heads=3)
    path = save_npz(random_weights(vit, (32, 32)), tmp_path / "ViT.npz")
    with raises(UserError, path, "ViT-custom", "--config.model.family=vit", "variant=init_from"):
        start(small_config(digits_dir, init_from=path), tmp_path)
    # As finetune_bit.py, which takes the architecture from weights of its family only.
    config = small_config(digits_dir, init_from=path, model__family="bit", **FROM_WEIGHTS)
    with raises(UserError, path, "ViT-custom", "'bit'", "BiT", "--config.model.family=vit"):
        start(config, tmp_path)


def test_resumed_run_does_not_read_init_from(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    run = save_run(weights, tmp_path / "run")
    config = small_config(digits_dir, init_from=run, image_size=32, **FROM_WEIGHTS)
    experiment, state, _ = start(config, tmp_path / "tuned")
    checkpoints = CheckpointManager(str(tmp_path / "tuned"), max_to_keep=1)
    items = {"params": state.params, "optimizer": state.opt_state}
    checkpoints.save(3, items, experiment.metadata | {"loss_window": []})
    checkpoints.close()
    config = dataclasses.replace(config, init_from=str(tmp_path / "gone"))
    init = find_init_source(config, str(tmp_path / "tuned"))
    assert init is not None
    assert init.weights is None
    again = build_experiment(config, open_datasets(config), init_info=init.model_info)
    assert describe_init(again, init) == ""
    resumed, _ = restore_or_init(again, CheckpointManager(str(tmp_path / "tuned")), init)
    assert_params_equal(jax.device_get(resumed.params), jax.device_get(state.params))
    assert int(resumed.step) == 3


def test_hosts_load_the_step_that_the_primary_process_has_found(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(weights, tmp_path / "run")
    newer = save_run(random_weights(seed=1), tmp_path / "newer", step=2)
    compute_once = multihost.compute_once

    def save_afterwards(compute: Callable[[], Any]) -> Any:
        result = compute_once(compute)
        if result == (run, 1):
            # The run is still training: other hosts would find its next step.
            shutil.copytree(f"{newer}/checkpoints/2", f"{run}/checkpoints/2")
        return result

    monkeypatch.setattr(multihost, "compute_once", save_afterwards)
    init = find_init_source(
        small_config(digits_dir, init_from=run, **FROM_WEIGHTS), str(tmp_path / "tuned")
    )
    assert list_steps(run) == [1, 2]
    assert init is not None
    assert init.weights is not None
    assert_params_equal(init.weights.params, weights.params)


def test_run_without_init_from_is_initialized_randomly(digits_dir: str, tmp_path: Path) -> None:
    _, state, line = start(small_config(digits_dir), tmp_path)
    assert line == ""
    assert state.params["stem"]["kernel"].any()
    assert TINY.hidden_dim == state.params["stem"]["kernel"].shape[-1]


def test_metadata_and_checksums_are_read_once(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, state, _ = start(small_config(digits_dir), tmp_path)
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=1)
    save_state(experiment, checkpoints, state, 3, [0.5])
    checkpoints.close()
    verified: list[Path] = []

    def verify(folder: Path, *args: Any, **kwargs: Any) -> None:
        verified.append(folder)
        verify_checksums(folder, *args, **kwargs)

    monkeypatch.setattr(manager, "verify_checksums", verify)
    init = find_init_source(experiment.config, str(tmp_path))
    (tmp_path / "checkpoints" / "3" / "metadata" / "metadata").unlink()
    resumed, window = restore_or_init(experiment, CheckpointManager(str(tmp_path)), init)
    assert (int(resumed.step), window) == (3, [0.5])
    assert [*map(str, verified)] == [str(tmp_path / "checkpoints" / "3")]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.EACCES])
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "checksums.json", "params/_METADATA"])
def test_checkpoints_that_cannot_be_read_for_the_moment_are_not_damaged(
    code: int, file: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, state, _ = start(small_config(digits_dir), tmp_path)
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=2)
    for step in (2, 3):
        save_state(experiment, checkpoints, state, step, [])
    checkpoints.close()
    path = tmp_path / "checkpoints" / "3" / file
    assert path.exists()

    open_file = Path.open

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if str(self) == str(path):
            raise OSError(code, os.strerror(code))
        return open_file(self, *args, **kwargs)

    # Which `read_bytes` calls as well.
    monkeypatch.setattr(type(epath.Path(path)), "open", fail)
    with raises(RunError, str(path), os.strerror(code), "again"):
        find_init_source(experiment.config, str(tmp_path))
    monkeypatch.undo()
    init = find_init_source(experiment.config, str(tmp_path))
    assert init is not None
    assert (init.resume_step, init.damaged_steps) == (3, ())


def write_folder(folder: Path) -> None:
    """Writes four images of each of two classes, all of one size in bytes."""
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "test" / name).mkdir(parents=True)
        for index in range(4):
            image = encode(np.full((8, 8, 3), 10 * index, np.uint8), "BMP")
            (folder / "train" / name / f"{index}.bmp").write_bytes(image)
            (folder / "test" / name / f"{index}.bmp").write_bytes(image)


def save_folder_run(folder: Path | str, workdir: Path, **changes: Any) -> None:
    config = folder_config(folder)
    check_workdir(str(workdir), config)
    experiment = build_experiment(config, open_datasets(config))
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    saved = experiment._replace(metadata=experiment.metadata | changes)
    if changes:
        del saved.metadata["train_data"]
    save_state(saved, checkpoints, experiment.create_state(), 3, [])
    checkpoints.close()
    save_config(str(workdir), config)


def folder_config(folder: Path | str) -> RunConfig:
    name = str(folder) if str(folder).startswith("manifest:") else f"folder:{folder}"
    return small_config("", dataset__name=name, batch_size=8, **NO_REGULARIZATION)


def resume(folder: Path | str, workdir: Path) -> None:
    config = folder_config(folder)
    check_workdir(str(workdir), config)
    init = find_init_source(config, str(workdir))
    experiment = build_experiment(config, open_datasets(config), init_info=init and init.model_info)
    restore_or_init(experiment, CheckpointManager(str(workdir)), init)


def test_run_resumes_with_a_moved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images")
    save_folder_run(tmp_path / "images", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for spelling in ("images", "./images/", tmp_path / "run" / ".." / "images"):
        resume(spelling, tmp_path / "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    resume(tmp_path / "moved", tmp_path / "run")


def test_run_resumes_with_a_moved_manifest_of_the_same_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    paths = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("images/*/*/*"))
    rows = "".join(f"{path},{path.parts[2]},{path.parts[1]}\n" for path in paths)
    (tmp_path / "m.csv").write_text(f"path,label,split\n{rows}")
    save_folder_run(f"manifest:{tmp_path}/m.csv", tmp_path / "run")
    (tmp_path / "moved").mkdir()
    for name in ("images", "m.csv"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    resume(f"manifest:{tmp_path}/moved/m.csv", tmp_path / "run")
    # The other class has the same number of images.
    swapped = {"1.bmp,cat": "1.bmp,dog", "1.bmp,dog": "1.bmp,cat"}
    rows = re.sub("|".join(swapped), lambda match: swapped[match[0]], rows)
    (tmp_path / "moved/m.csv").write_text(f"path,label,split\n{rows}")
    with raises(UserError, "labels", "step 3", "--workdir"):
        resume(f"manifest:{tmp_path}/moved/m.csv", tmp_path / "run")
    # The format is a part of the experiment, although the images are the same.
    with raises(UserError, "dataset.name", "--workdir"):
        resume(tmp_path / "moved/images", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda dog: (dog / "1.bmp").rename(dog / "9.bmp"), ("names", "train/dog")),
        (lambda dog: (dog / "1.bmp").write_bytes(encode(noise(9, 9), "BMP")), ("sizes", "dog")),
        (lambda dog: (dog / "1.bmp").rename(dog.parent / "cat" / "5.bmp"), ("cat", "dog")),
        (lambda dog: (dog / "1.bmp").unlink(), ("num_train_examples", "7", "8")),
    ],
    ids=["renamed", "replaced", "other class", "removed"],
)
def test_run_with_changed_images_is_refused(
    change: Callable[[Path], Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    write_folder(tmp_path / "images")
    save_folder_run(tmp_path / "images", tmp_path / "run")
    change(tmp_path / "images" / "train" / "dog")
    with raises(UserError, "step 3", "--workdir", *parts) as caught:
        resume(tmp_path / "images", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_old_checkpoints_compare_paths(tmp_path: Path) -> None:
    write_folder(tmp_path / "images")
    save_folder_run(tmp_path / "images", tmp_path / "run", note="old")
    resume(tmp_path / "images", tmp_path / "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    with raises(UserError, "dataset.name", str(tmp_path / "images"), str(tmp_path / "moved")):
        resume(tmp_path / "moved", tmp_path / "run")


def test_run_with_other_tfds_data_is_refused(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir)
    datasets = open_datasets(config)
    experiment = build_experiment(config, datasets)
    checkpoints = CheckpointManager(str(tmp_path), max_to_keep=1)
    save_state(experiment, checkpoints, experiment.create_state(), 3, [])
    checkpoints.close()
    init = find_init_source(config, str(tmp_path))
    restore_or_init(experiment, CheckpointManager(str(tmp_path)), init)
    assert datasets.fingerprint["dataset"] == "digits/all/1.0.0"
    newer = datasets._replace(fingerprint={**datasets.fingerprint, "dataset": "digits/all/2.0.0"})
    with raises(UserError, "digits/all/1.0.0", "digits/all/2.0.0"):
        restore_or_init(build_experiment(config, newer), CheckpointManager(str(tmp_path)), init)
