"""Tests of config files, and of overrides on the command line."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mixer_jax.config.config import evals, flatten, get_default
from mixer_jax.config.loading import (
    default_run_name,
    find_config_file,
    installed_configs,
    load_config,
    load_config_with_overrides,
    parse_overrides,
    set_override,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import raises


@pytest.fixture
def config() -> ConfigDict:
    config = get_default()
    config.evals = evals(test={"split": "test"})
    return config


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config.seed=1"], [("seed", "1")]),
        (["--config.seed", "1"], [("seed", "1")]),
        (["-config.seed=1"], [("seed", "1")]),
        (["--config.seed", "-1", "--config.a=b"], [("seed", "-1"), ("a", "b")]),
        (["--config.dataset.name=folder:a=b"], [("dataset.name", "folder:a=b")]),
        (["--config.dataset.data_dir="], [("dataset.data_dir", "")]),
        (["--config.preprocess.flip"], [("preprocess.flip", "true")]),
        (["--config.preprocess.flip", "False"], [("preprocess.flip", "False")]),
        (
            ["--config.preprocess.flip", "--config.seed=1"],
            [("preprocess.flip", "true"), ("seed", "1")],
        ),
        (["--noconfig.preprocess.flip"], [("preprocess.flip", "false")]),
        (["--config.seed=1", "--config.seed=2"], [("seed", "1"), ("seed", "2")]),
    ],
)
def test_parse_overrides_accepts_the_syntax_of_config_flags(
    argv: list[str], expected: list[tuple[str, str]]
) -> None:
    assert parse_overrides(argv) == tuple(expected)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--confg.seed=1"], ["--confg.seed"]),
        (["1"], ["1", "--help"]),
        (["--config.seed"], ["--config.seed"]),
        (["--config."], ["--config."]),
        (["--batch_size=64"], ["--batch_size=64", "--config.batch_size"]),
        (["--optimizer.b1", "0.9"], ["--optimizer.b1", "--config.optimizer.b1"]),
        (["--learning_rate=0.1"], ["--learning_rate", "--config.optimizer.learning_rate"]),
        (["--workdr=runs/mine"], ["--workdr", "--workdir"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["--noconfig.seed"], ["--noconfig.seed"]),
        (["--noconfig.preprocess.flip=true"], ["--noconfig.preprocess.flip"]),
    ],
)
def test_parse_overrides_rejects_other_arguments(argv: list[str], parts: list[str]) -> None:
    with raises(UserError, *parts):
        parse_overrides(argv, ["config", "workdir"])


def test_set_override_takes_the_type_of_the_key(config: ConfigDict) -> None:
    for path, text, expected in [
        ("optimizer.learning_rate", "3e-3", 3e-3),
        ("batch_size", "512", 512),
        ("preprocess.flip", "False", False),
        ("preprocess.flip", "1", True),
        ("dataset.name", "cifar10", "cifar10"),
        ("evals.test.every_steps", "10", 10),
        ("evals.test.shots", "1,5", "1,5"),
    ]:
        set_override(config, path, text)
        value = flatten(config)[path]
        assert value == expected
        assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("path", "text"), [("batch_size", "1.5"), ("preprocess.flip", "maybe"), ("image_size", "")]
)
def test_set_override_rejects_other_types(config: ConfigDict, path: str, text: str) -> None:
    with raises(UserError, f"config.{path}", repr(text)):
        set_override(config, path, text)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("learning_rate", ["optimizer.learning_rate"]),
        ("optimizr.learning_rate", ["optimizer.learning_rate"]),
        ("optimizer.warmup_step", ["optimizer.warmup_steps"]),
        ("lerning_rate", ["config.optimizer.learning_rate"]),
        ("optimzer.lerning_rate", ["config.optimizer.learning_rate"]),
        ("model.kernel", ["config.model.backend"]),
        ("evals.test.knd", ["config.evals.test.type"]),
        ("optimizer.lr", ["name", "learning_rate", "warmup_steps"]),
        ("zzz", ["--help"]),
        ("evals.val.split", ["evals.test.split"]),
        ("optimizer", ["optimizer"]),
    ],
)
def test_set_override_suggests_a_key(config: ConfigDict, path: str, parts: list[str]) -> None:
    with raises(UserError, path, *parts):
        set_override(config, path, "1")


def test_set_override_of_a_missing_entry_names_the_config_file() -> None:
    with raises(UserError, "evals.test.split", "config file"):
        set_override(get_default(), "evals.test.split", "test")


def test_load_config_calls_get_config_with_the_argument() -> None:
    assert load_config("configs/digits.py").dataset.name == "digits/all"
    assert load_config("configs/digits.py:low").dataset.name == "digits/low"
    overridden = load_config_with_overrides(
        "configs/digits.py:low", ["--config.seed=7", "--config.preprocess.flip"]
    )
    assert (overridden.seed, overridden.preprocess.flip) == (7, True)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("configs/digit.py", ["configs/digit.py", "configs/digits.py"]),
        ("configs/mixer_b16_i1kk.py", ["configs/mixer_b16_i1kk.py", "configs/mixer_b16_i1k.py"]),
        ("README.md", ["README.md"]),
        ("configs/digits.py:medium", ["medium", "low", "high"]),
        ("configs/mixer_b16_i1k.py:low", ["configs/mixer_b16_i1k.py:low", "TypeError"]),
    ],
)
def test_load_config_names_the_file_and_the_reason(spec: str, parts: list[str]) -> None:
    with raises(UserError, *parts) as caught:
        load_config(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def get_config(): return {}", ["get_config", "ConfigDict"]),
        ("x = 1", ["get_config"]),
        ("def get_config(:", ["SyntaxError"]),
        ("raise SystemExit('enough')", ["SystemExit", "enough"]),
        ("def get_config(): raise ValueError('first\\nsecond')", ["ValueError", "first"]),
    ],
)
def test_load_config_turns_failures_into_one_line(
    source: str, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with raises(UserError, str(path), *parts) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_default_run_name_has_file_and_argument() -> None:
    assert default_run_name("configs/digits.py") == "digits"
    assert default_run_name("configs/digits.py:low") == "digits_low"
    assert default_run_name("digits:low") == "digits_low"
    assert default_run_name("trial_1.5") == "trial_1.5"


@pytest.mark.parametrize("name", ["digits", "configs/digits", "configs/digits.py", "digits.py"])
def test_load_config_finds_installed_configs_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(name).dataset.name == "digits/all"
    assert load_config(f"{name}:low").dataset.name == "digits/low"


def test_find_config_file_prefers_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Neither a folder nor a file without suffix is a config.
    (tmp_path / "digits").mkdir()
    (tmp_path / "folder").touch()
    assert find_config_file("digits") == installed_configs() / "digits.py"
    assert find_config_file("folder") == installed_configs() / "folder.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").touch()
    for name in ("digits", "configs/digits", "configs/digits.py"):
        assert find_config_file(name) == Path("configs/digits.py")
    assert find_config_file("digits.py") == installed_configs() / "digits.py"
    (tmp_path / "digits.py").touch()
    for name in ("digits", "digits.py", "./digits"):
        assert find_config_file(name) == Path("digits.py")
    (tmp_path / "trial_1.5.py").touch()
    assert find_config_file("trial_1.5") == Path("trial_1.5.py")


@pytest.mark.parametrize("path", ["/digits", "/configs/digits.py", "mine/digits.py", "../digits"])
def test_find_config_file_of_another_folder_is_not_an_installed_config(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(UserError, path):
        find_config_file(path)


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("digit", "digits"),
        ("mixer_b16_i1kk", "mixer_b16_i1k"),
        ("configs/digit", "configs/digits"),
        ("configs/digit.py", "configs/digits.py"),
        ("", "digits.py"),
    ],
)
def test_find_config_file_suggests_an_installed_config(
    path: str, suggestion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(UserError, repr(path), suggestion):
        find_config_file(path)


def test_load_config_does_not_suggest_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "digits.py").touch()
    with raises(UserError, "vit.py") as caught:
        load_config(str(tmp_path / "vit.py"))
    assert "digits.py" not in str(caught.value)


def test_load_config_says_where_the_configs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/nonesuch.py", "elsewhere/digits.py", "nonesuch"):
        with raises(UserError, f"'{name}'", str(installed_configs())):
            load_config(name)
    # A package that was copied without them.
    for folder in ("_INSTALLED_CONFIGS", "_CHECKOUT_CONFIGS"):
        monkeypatch.setattr(f"mixer_jax.config.loading.{folder}", tmp_path / "missing")
    for name in ("configs/digits.py", "digits"):
        with raises(UserError, f"'{name}'", "source code") as caught:
            load_config(name)
        assert "missing" not in str(caught.value)
