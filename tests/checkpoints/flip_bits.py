"""Flips single bits in the files of a checkpoint: `python -m tests.checkpoints.flip_bits`.

Each flip must be harmless, refused, or answered by the older checkpoint; none may load as other
arrays or another description of the model. The checkpoint is tiny and has all items.
"""

import argparse
import collections
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.errors import UserError
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init, save_state
from mixer_jax.training.setup import Experiment, build_experiment
from mixer_jax.training.step import TrainState
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

OLD_STEP, NEW_STEP = 4, 8
# Files by what they contain, as patterns in the folder of a step. Each kind is as likely.
KINDS = {
    "params": ["params/**/d/*"],
    "ema_params": ["ema_params/**/d/*"],
    "optimizer": ["optimizer/**/d/*"],
    "metadata": ["metadata/*"],
    "indices": [
        "*/manifest.ocdbt",
        "*/ocdbt.process_*/manifest.ocdbt",
        "*/_METADATA",
        "*/_sharding",
        "*/array_metadatas/*",
        "_CHECKPOINT_METADATA",
        "checksums.json",
    ],
}


class FlipTest:
    """A run with two checkpoints, whose newer one gets damaged."""

    def __init__(self, data_dir: str, workdir: Path):
        """Saves both checkpoints."""
        self.workdir, self.folder = str(workdir), workdir / "checkpoints" / f"{NEW_STEP}"
        config = small_config(data_dir, **(NO_REGULARIZATION | {"recipe__ema_decay": 0.9}))
        self.experiment: Experiment = build_experiment(
            config, open_datasets(config), jax.devices()[:1]
        )
        rng = np.random.default_rng(0)
        self.states: dict[int, TrainState] = {}
        checkpoints = CheckpointManager(self.workdir, max_to_keep=2)
        for step in (OLD_STEP, NEW_STEP):
            # Every number is different, as after training.
            state = jax.tree.map(
                lambda x: (
                    x + rng.normal(size=x.shape).astype(x.dtype) if x.dtype == np.float32 else x
                ),
                self.experiment.create_state(),
            )
            self.states[step] = jax.device_get(state._replace(step=np.int32(step)))
            save_state(self.experiment, checkpoints, state, step, [0.5])
        checkpoints.close()
        self.weights = load_checkpoint(self.workdir)
        assert self.resume() == "harmless"
        assert self.load() == "harmless"

    def resume(self) -> str:
        """Resumes and returns what happened: harmless, refused, fallback, or a failure."""
        try:
            init = find_init_source(self.experiment.config, self.workdir)
            assert init is not None
            step = init.resume_step
            state, window = restore_or_init(self.experiment, CheckpointManager(self.workdir), init)
        except UserError as error:
            return "refused" if "\n" not in str(error) else "several lines"
        is_same = window == [0.5] and _is_equal(self.states[step], state)
        if init.model_info != self.experiment.model_info or not is_same:
            return "different"
        return "fallback" if step == OLD_STEP else "harmless"

    def load(self) -> str:
        """Loads the weights of the damaged step and returns what happened."""
        try:
            loaded = load_checkpoint(self.workdir, step=NEW_STEP)
        except UserError as error:
            return "refused" if "\n" not in str(error) else "several lines"
        is_same = loaded.model_info == self.weights.model_info
        is_same &= loaded.train_config == self.weights.train_config
        return (
            "harmless" if is_same and _is_equal(self.weights.params, loaded.params) else "different"
        )

    def flip(self, rng: random.Random, kind: str) -> tuple[str, str, str]:
        """Flips a bit, and back; returns where it was, and the outcomes of `resume` and `load`."""
        paths = {path for pattern in KINDS[kind] for path in self.folder.glob(pattern)}
        path = rng.choice(sorted(path for path in paths if path.is_file() and path.stat().st_size))
        original = path.read_bytes()
        position, bit = rng.randrange(len(original)), rng.randrange(8)
        damaged = bytearray(original)
        damaged[position] ^= 1 << bit
        try:
            path.write_bytes(damaged)
            place = f"{path.relative_to(self.folder)}, byte {position}, bit {bit}"
            return place, self.resume(), self.load()
        finally:
            path.write_bytes(original)


def _is_equal(expected: Any, found: Any) -> bool:
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(jax.device_get(found)), strict=True)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def run(
    data_dir: str, workdir: Path, num_flips: int, seed: int
) -> tuple[collections.Counter[tuple[str, str, str]], list[str]]:
    """Flips bits.

    Returns:
        Number of flips by kind of file and by the outcomes of resuming and loading, and the places
        that loaded as something else.
    """
    test, rng = FlipTest(data_dir, workdir), random.Random(seed)
    outcomes: collections.Counter[tuple[str, str, str]] = collections.Counter()
    failures = []
    for index in range(num_flips):
        kind = list(KINDS)[index % len(KINDS)]
        place, resumed, loaded = test.flip(rng, kind)
        outcomes[kind, resumed, loaded] += 1
        if not {resumed, loaded} <= {"harmless", "refused", "fallback"}:
            failures.append(place)
    return outcomes, failures


def main() -> int:
    """Prints the outcomes; returns 1 if a flip was not noticed."""
    parser = argparse.ArgumentParser(description="Flips single bits in a checkpoint.")
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", required=True, help="TFDS folder of digits")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as workdir:
        outcomes, failures = run(args.data_dir, Path(workdir), args.flips, args.seed)
    for (kind, resumed, loaded), count in sorted(outcomes.items()):
        print(f"{kind:10}  resume: {resumed:9}  load: {loaded:9}  {count:4}")
    print(f"{args.flips} flips, seed {args.seed}: {len(failures)} not noticed", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
