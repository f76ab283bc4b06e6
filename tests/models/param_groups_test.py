"""Tests of frozen parameters by pattern, and of learning-rate factors by layer."""

from typing import Any

import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.param_groups import (
    check_freeze,
    count_frozen,
    frozen_blocks,
    layer_factors,
    learning_rate_factors,
)
from mixer_jax.models.registry import get_family
from tests.helpers.messages import raises

NAMES = {"mixer": "B/16", "vit": "B/16", "bit": "R50x1"}


def architecture(family: str) -> Any:
    return get_family(family).variants[NAMES[family]]


def list_frozen(patterns: str, family: str = "mixer") -> set[str]:
    """Returns the paths of all frozen arrays, with the indices of frozen blocks if not all are."""
    config, result = architecture(family), set()
    for name in get_family(family).param_shapes(config, 224, 10):
        path = tuple(name.split("/"))
        frozen = frozen_blocks(patterns.split(","), get_family(family), config, path)
        if all(frozen):
            result.add(name)
        elif any(frozen):
            result.add(f"{name} {[block for block, value in enumerate(frozen) if value]}")
    return result


@pytest.mark.parametrize(
    ("patterns", "same"),
    [
        ("stem", "stem.kernel,stem.bias"),
        ("stem/kernel", "stem.k*"),
        ("blocks", "blocks.*"),
        ("blocks.1[01],blocks.?", "blocks.*"),
        ("blocks/LayerNorm_0/scale", "blocks.*.LayerNorm_0.scale"),
        ("blocks.3", "blocks.3.*"),
    ],
)
def test_patterns_match_layers_and_parameters(patterns: str, same: str) -> None:
    assert list_frozen(patterns) == list_frozen(same) != set()


def test_patterns_match_blocks_of_a_stack_and_single_parameters() -> None:
    assert list_frozen("stem") == {"stem/kernel", "stem/bias"}
    patterns = "blocks.1,blocks.1?.token_mixing.Dense_0,head.bias"
    shapes = get_family("mixer").param_shapes(architecture("mixer"), 224, 10)
    paths = [path for path in shapes if path.startswith("blocks/")]
    assert list_frozen(patterns) == {
        "head/bias",
        *(f"{path} [1, 10, 11]" for path in paths if "token_mixing/Dense_0" in path),
        *(f"{path} [1]" for path in paths if "token_mixing/Dense_0" not in path),
    }
    assert all(name.endswith("bias") for name in list_frozen("*bias"))
    assert {"cls", "pos_embedding", "stem/bias"} <= list_frozen("stem,cls,pos*", "vit")
    unit = {name for name in list_frozen("block2", "bit") if name.startswith("block2/unit03")}
    assert list_frozen("block2.unit03", "bit") == unit != set()


@pytest.mark.parametrize("family", NAMES)
def test_all_parameters_but_the_head_can_be_frozen(family: str) -> None:
    config, patterns = architecture(family), ("head",)
    features = config.num_features if family == "bit" else config.hidden_dim
    count = count_frozen(patterns, get_family(family), config, 224, num_classes=7)
    assert count == 7 * (features + 1)
    check_freeze(patterns, get_family(family), config, 224)


@pytest.mark.parametrize(
    ("family", "patterns", "parts"),
    [
        ("mixer", ["stem", "block.3"], ["'block.3'", "blocks.0 to blocks.11", "mean blocks.3"]),
        ("mixer", ["blocks.12"], ["'blocks.12'", "stem", "pre_head_layer_norm", "head"]),
        # A layer whose activations can be extracted, but which has no parameters.
        ("mixer", ["pooled"], ["'pooled'", "blocks.0"]),
        ("vit", ["map_head"], ["'map_head'", "pos_embedding", "encoder_norm"]),
        ("bit", ["blocks.*"], ["'blocks.*'", "block1", "block4", "norm"]),
        ("vit", ["*"], ["'*'", "stem"]),
        ("bit", ["stem", "block*", "norm", "head"], ["'stem,block*,norm,head'"]),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(
    family: str, patterns: list[str], parts: list[str]
) -> None:
    with raises(UserError, "config.optimizer.freeze", *parts) as caught:
        check_freeze(patterns, get_family(family), architecture(family), 224)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "first", "last", "num_layers"),
    [
        ("mixer", "blocks.0", "blocks.11", 14),
        ("vit", "blocks.0", "blocks.11", 14),
        ("bit", "block1.unit01", "block4.unit03", 18),
    ],
)
def test_layer_factors_decay_from_the_head_to_the_stem(
    family: str, first: str, last: str, num_layers: int
) -> None:
    factors = layer_factors(0.5, get_family(family), architecture(family))
    names = list(factors)
    assert (names[:2], names[-2:]) == (["stem", first], [last, "head"])
    assert list(factors.values()) == [0.5**n for n in reversed(range(num_layers))]


@pytest.mark.parametrize(
    ("family", "path", "expected"),
    [
        ("mixer", "stem/bias", [0.5**13]),
        ("mixer", "blocks/LayerNorm_0/scale", [0.5 ** (12 - block) for block in range(12)]),
        ("mixer", "pre_head_layer_norm/bias", [0.5]),
        ("mixer", "head/kernel", [1.0]),
        ("vit", "cls", [0.5**13]),
        ("vit", "pos_embedding", [0.5**13]),
        ("vit", "encoder_norm/scale", [0.5]),
        ("bit", "block1/unit01/conv_proj/kernel", [0.5**16]),
        ("bit", "norm/scale", [0.5]),
    ],
)
def test_learning_rate_factors_of_parameters(family: str, path: str, expected: list[float]) -> None:
    config, names = architecture(family), tuple(path.split("/"))
    assert learning_rate_factors(0.5, get_family(family), config, names) == expected


def test_attention_pooling_belongs_to_the_head() -> None:
    family = get_family("vit")
    config = family.get_config("B/16", pooling="map")
    for path in family.param_shapes(config, 224, 10):
        (factor, *_) = learning_rate_factors(0.5, family, config, tuple(path.split("/")))
        assert (factor == 1) == path.startswith(("map_head/", "head/"))
