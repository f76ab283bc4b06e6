"""Comparison of the family in docs/add_model_family.md with timm's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.convert import timm_snippet
from mixer_jax.inference import load_pretrained
from tests.baselines.timm_test import (
    assert_logits_close,
    make_timm_model,
    random_images,
    timm_logits,
)
from tests.helpers.families import documented_family

pytestmark = pytest.mark.baselines


@pytest.fixture(autouse=True)
def family(tmp_path: Path) -> Iterator[Any]:
    with documented_family(tmp_path) as family:
        yield family


def test_it_computes_the_same_as_timm(torch: Any, timm: Any, tmp_path: Path) -> None:
    model = make_timm_model(torch, timm, "gmlp_ti16_224", num_classes=7)
    path = tmp_path / "gmlp.pth"
    torch.save(model.state_dict(), path)
    classifier, images = load_pretrained(path, dtype="float32"), random_images()
    assert (classifier.model_info.family, classifier.model_info.variant) == ("gmlp", "Ti/16")
    expected = timm_logits(torch, model, images)
    assert_logits_close(classifier(images[:1]), expected[:1])
    names: dict[str, Any] = {}
    info = load_checkpoint(path).model_info
    exec("\n".join(timm_snippet(info, str(path))), names)
    assert (timm_logits(torch, names["model"].eval(), images) == expected).all()
