"""Tests of the rows of a comparison and the config of every run."""

from pathlib import Path

import pytest

from mixer_jax.comparison.models import parse_models
from mixer_jax.comparison.plan import (
    Entry,
    EvalData,
    Variation,
    find_eval_data,
    make_entries,
    parse_variation,
    scale_num_steps,
    train_flops,
    with_num_steps,
)
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family
from tests.helpers.messages import mentions
from tests.helpers.tiny_comparison import CONFIG_FILE, write_config


def entries_of(*arguments: str, **changes: str) -> list[Entry]:
    overrides = tuple((key.replace("__", "."), value) for key, value in changes.items())
    return make_entries(parse_models(list(arguments)), overrides, None)


def test_overrides_and_the_varied_key_apply_to_every_config(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    models = parse_models([f"a={config}", f"b={config}:16", "Mixer-S/32"])
    variation = Variation("dataset.train_split", ("train[:50%]", "train"))
    entries = make_entries(models, (("batch_size", "4"),), variation)
    assert [entry.title for entry in entries] == [
        "a, train[:50%]",
        "a, train",
        "b, train[:50%]",
        "b, train",
        "Mixer-S/32",
    ]
    assert [entry.folder for entry in entries][:2] == ["a/train_50_", "a/train"]
    for entry in entries[:4]:
        assert entry.config is not None
        assert entry.config.batch_size == 4
        assert entry.config.dataset.train_split == entry.value
        assert entry.config.model.architecture.hidden_dim == (8 if entry.model.label == "a" else 16)
    assert find_eval_data(entries) == EvalData("synthetic", "test")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ('"synthetic", 5', ["one dataset", "synthetic for a", "digits for b"]),
        ('{"split": "test"}', ["one split", "synthetic test for a", "synthetic train for b"]),
        ('test={"split": "test"}', ["b must have an evaluation", "none"]),
    ],
)
def test_models_must_have_the_same_data(tmp_path: Path, change: str, parts: list[str]) -> None:
    replacement = {
        '"synthetic", 5': '"digits", 5',
        '{"split": "test"}': '{"split": "train"}',
        'test={"split": "test"}': "",
    }[change]
    first = write_config(tmp_path)
    second = write_config(tmp_path, "other.py", CONFIG_FILE.replace(change, replacement))
    with pytest.raises(UserError) as error:
        find_eval_data(entries_of(f"a={first}", f"b={second}"))
    assert mentions(str(error.value), *parts)


def test_an_error_of_a_config_names_the_model(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with pytest.raises(UserError, match=r"^b: .*warmup_steps"):
        entries_of(f"b={config}", num_steps="1")


def test_variations_are_parsed() -> None:
    assert parse_variation("optimizer.learning_rate=0.1, 0.3") == Variation(
        "optimizer.learning_rate", ("0.1", "0.3")
    )
    assert parse_variation("config.seed=1").title == "seed"
    for text in ("seed", "=1", "seed=", "seed=1,,2", "seed=1,1", "split=a:b,a b"):
        with pytest.raises(UserError, match="--vary"):
            parse_variation(text)


def test_scaled_steps_give_equal_flops(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    small, large = entries_of(f"a={path}:8", f"b={path}:32", num_steps="1000")
    family = get_family("mixer")
    assert small.config is not None
    assert large.config is not None
    first = train_flops(family, small.config.model.architecture, 5, small.config)
    # Three forward passes per image.
    forward = family.forward_flops(small.config.model.architecture, 16, 5)
    assert first == 3 * 1000 * 8 * forward
    flops = train_flops(family, large.config.model.architecture, 5, large.config)
    scaled = scale_num_steps(large.config, first / flops)
    assert scaled.num_steps < 1000
    after = train_flops(family, scaled.model.architecture, 5, scaled)
    assert abs(after - first) <= flops / 1000 / 2
    doubled = scale_num_steps(small.config, 2.0)
    assert (doubled.num_steps, doubled.optimizer.warmup_steps) == (2000, 4)


def test_epochs_become_steps(tmp_path: Path) -> None:
    (entry,) = entries_of(str(write_config(tmp_path)), num_steps="0", num_epochs="3")
    assert entry.config is not None
    config = with_num_steps(entry.config, 32)
    assert (config.num_steps, config.num_epochs) == (12, 0.0)
