"""Test of single flipped bits in checkpoints; `flip_bits.py` runs it with more of them."""

import random
from pathlib import Path

import pytest

from tests.checkpoints.flip_bits import KINDS, run


@pytest.mark.slow
def test_no_flipped_bit_is_unnoticed(digits_dir: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    outcomes, failures = run(digits_dir, tmp_path, num_flips=40, seed=seed)
    assert not failures, f"seed {seed}"
    assert {kind for kind, _, _ in outcomes} == set(KINDS)
    # Numbers are never harmless to flip: the older checkpoint is used.
    for kind in ("params", "ema_params", "optimizer", "metadata"):
        assert {resumed for name, resumed, _ in outcomes if name == kind} == {"fallback"}
