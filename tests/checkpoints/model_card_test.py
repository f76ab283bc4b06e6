"""Tests of model cards: facts of the run, nothing private, and text that cannot break the page."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.model_card import make_model_card
from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.training.loop import train_and_evaluate
from tests.helpers.messages import mentions
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

NAME = "ada/tiny"
SECRET = "/home/ada/secret"


def card_of(weights: PretrainedWeights, license: str = "") -> tuple[ModelCard, dict[str, str]]:
    """Generates a card; returns it as the Hub reads it, and its sections by title."""
    card = ModelCard(make_model_card(weights, NAME, license))
    parts = re.split(r"^## (.+)\n", card.text, flags=re.MULTILINE)[1:]
    return card, dict(zip(parts[::2], parts[1::2], strict=True))


def saved_run(tmp_path: Path, **changes: Any) -> str:
    """Saves a run at step 20 with evaluations at steps 10, 20 and 30."""
    config = small_config(f"{SECRET}/data", seed=3, **changes).to_dict()
    workdir = save_run(random_weights(), tmp_path / "run", step=20, config=config)
    lines: list[dict[str, Any]] = [{"step": 5, "loss": 1.0}]
    for step in (10, 20, 30):
        values = {"top1": step / 100, "top5": 0.9, "log_likelihood": -1.5, "num_examples": 360.0}
        lines.append({"step": step} | {f"test/{name}": value for name, value in values.items()})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    Path(workdir, "metrics.jsonl").write_text(f'{text}{{"step": 3')
    return workdir


def test_card_has_data_recipe_and_metrics_at_the_step_of_the_weights(tmp_path: Path) -> None:
    workdir = saved_run(tmp_path)
    card, sections = card_of(load_checkpoint(workdir), "mit")
    assert card.data.license == "mit"
    assert sections["License"].strip() == "mit"
    assert {result.dataset_name for result in card.data.eval_results} == {"digits/all"}
    found = [
        (r.dataset_type, r.dataset_split, r.metric_type, r.metric_name, r.metric_value)
        for r in card.data.eval_results
    ]
    assert found == [
        ("digits", "test", "accuracy", "top-1 accuracy", 0.2),
        ("digits", "test", "accuracy", "top-5 accuracy", 0.9),
    ]
    assert mentions(sections["Evaluation"], "20.00%", "90.00%", "-1.5000", "360", "step")
    assert mentions(sections["Training data"], "digits/all", "`train`")
    recipe = sections["Recipe"].splitlines()
    for line in ("seed = 3", "num_steps = 20", "batch_size = 16", "optimizer.warmup_steps = 2"):
        assert line in recipe
    # A default is only listed if readers need it.
    assert "optimizer.name = adamw" in recipe
    assert not any(line.startswith("optimizer.b1") for line in recipe)


def test_card_of_a_multi_label_model_has_its_metrics(tmp_path: Path) -> None:
    config = small_config("").to_dict()
    weights = random_weights(loss="sigmoid", multi_label=True)
    workdir = save_run(weights, tmp_path / "run", step=20, config=config)
    line = {"step": 20, "test/mean_average_precision": 0.75, "test/num_examples": 360.0}
    Path(workdir, "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    card, sections = card_of(load_checkpoint(workdir))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("mean_average_precision", 0.75)
    assert mentions(sections["Evaluation"], "mean average precision", "75.00%")
    assert "top-1" not in sections["Evaluation"]
    assert "probability" in sections["Intended use"]
    assert "multi-label" in card.text


def test_evaluations_at_other_steps_are_not_those_of_the_weights(tmp_path: Path) -> None:
    workdir = saved_run(tmp_path)
    path = Path(workdir, "metrics.jsonl")
    others = [line for line in path.read_text().splitlines() if '"step": 20' not in line]
    path.write_text("\n".join(others))
    card, sections = card_of(load_checkpoint(workdir))
    assert card.data.eval_results is None
    assert "%" not in sections["Evaluation"]


@pytest.mark.slow
def test_card_of_a_real_run(digits_dir: str, tmp_path: Path) -> None:
    config = small_config(digits_dir, **NO_REGULARIZATION)
    result = train_and_evaluate(config, str(tmp_path))
    card, sections = card_of(load_checkpoint(str(tmp_path)))
    top1 = result.scores["test"].as_dict()["top1"]
    assert card.data.eval_results[0].metric_value == pytest.approx(top1, abs=1e-6)
    assert mentions(sections["Evaluation"], f"{top1:.2%}", "360", "20")
    assert digits_dir not in str(card)


@pytest.mark.parametrize(
    "arguments",
    [{"gelu": "exact"}, {"eval_crop": "bicubic"}, {"image_size": 32}],
    ids=str,
)
def test_changed_weights_have_no_metrics(arguments: dict[str, Any], tmp_path: Path) -> None:
    card, sections = card_of(load_checkpoint(saved_run(tmp_path), **arguments))
    assert card.data.eval_results is None
    assert "%" not in sections["Evaluation"]
    # The recipe is still that of the weights.
    assert "num_steps = 20" in sections["Recipe"]


def test_other_class_names_keep_the_metrics_and_another_head_does_not(tmp_path: Path) -> None:
    workdir = saved_run(tmp_path)
    renamed = load_checkpoint(workdir, class_names=[f"digit {i}" for i in range(10)])
    assert card_of(renamed)[0].data.eval_results
    assert card_of(replace_head(renamed, 10))[0].data.eval_results is None


def test_local_paths_are_not_published(tmp_path: Path) -> None:
    for init_from, public in ((f"{SECRET}/run", False), ("hf:timm/mixer_b16_224.goog_in21k", True)):
        name = f"folder:{SECRET}/my_photos"
        workdir = saved_run(tmp_path / str(public), dataset__name=name, init_from=init_from)
        card, sections = card_of(load_checkpoint(workdir))
        assert "secret" not in str(card)
        assert mentions(sections["Training data"], "my\\_photos")
        assert (init_from in sections["Training data"]) == public
        assert card.data.eval_results[0].dataset_type == "imagefolder"


@pytest.mark.parametrize(
    ("prefix", "kind"),
    [("manifest:", "imagefolder"), ("hf:", "parquet"), ("wds:", "webdataset")],
)
def test_local_paths_of_other_formats_are_not_published(
    prefix: str, kind: str, tmp_path: Path
) -> None:
    workdir = saved_run(tmp_path, dataset__name=f"{prefix}{SECRET}/my_photos")
    card, sections = card_of(load_checkpoint(workdir))
    assert "secret" not in str(card)
    assert mentions(sections["Training data"], "my\\_photos")
    assert card.data.eval_results[0].dataset_type == kind


def test_card_without_a_run_names_what_is_unknown() -> None:
    card, sections = card_of(random_weights())
    assert card.data.license is None
    assert card.data.eval_results is None
    assert mentions(sections["Model"], "3290", "16 px")
    assert "has not stated" in sections["License"]


def test_class_names_cannot_break_the_page() -> None:
    names = (
        '<script>alert("x")</script>',
        "a|b",
        "two\nlines",
        "[link](x)",
        "`code`",
        "سلام",
        "🐱",
    )
    _, sections = card_of(random_weights(class_names=names))
    (row,) = (line for line in sections["Model"].splitlines() if line.startswith("| Classes"))
    assert "<" not in row
    assert mentions(row, "a\\|b", "two lines", "\\[link\\](x)", "\\`code\\`", "سلام", "🐱")
    many = tuple(f"class {index}" for index in range(1000))
    _, sections = card_of(random_weights(class_names=many))
    assert mentions(sections["Model"], "1000", "class 19", "…")
    assert not mentions(sections["Model"], "class 20")


def test_names_of_datasets_cannot_break_the_page(tmp_path: Path) -> None:
    name = 'my "photos": \n---\n# Other | `x` <b>~~all~~ $y$'
    workdir = saved_run(tmp_path, dataset__name=f"folder:{SECRET}/{name}")
    card, sections = card_of(load_checkpoint(workdir))
    assert {name in result.dataset_name for result in card.data.eval_results} == {True}
    assert list(sections)[-1] == "License"
    row = sections["Evaluation"].strip().splitlines()[2]
    escaped = 'my "photos": --- \\# Other \\| \\`x\\` &lt;b\\>\\~\\~all\\~\\~ \\$y\\$'
    assert escaped in row
    assert escaped in sections["Training data"]


def test_documentation_shows_a_card_with_the_same_parts(tmp_path: Path) -> None:
    text = Path("docs/how_to/share.md").read_text()
    (sample,) = re.findall(r"````markdown\n(.*?)````", text, re.DOTALL)
    card, _ = card_of(load_checkpoint(saved_run(tmp_path)), "apache-2.0")
    pattern = re.compile(r"^(?:#+ .*|[a-z_-]+:.*|\| dataset .*)$", re.MULTILINE)
    parts = [
        [re.sub(r"(?<=:).*|(?<=^# ).*", "", line) for line in pattern.findall(content)]
        for content in (sample, str(card))
    ]
    assert parts[0] == parts[1]


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("config", "fields", "library", "code"),
    [
        (VitConfig(1, 4, 16, 24, 2), {}, "timm", 'create_model("hf-hub:ada/tiny", pretrained'),
        # timm's Mixers have no arguments for these dimensions.
        (None, {}, "mixer_jax", "MlpMixer(num_classes=10"),
        (BitConfig("1,1", 8, "3x3"), {}, "mixer_jax", ""),
    ],
    ids=["vit", "mixer", "bit"],
)
def test_code_for_both_libraries(
    config: Any, fields: dict[str, Any], library: str, code: str
) -> None:
    weights = random_weights(config, (16, 16), **fields) if config else random_weights()
    card, sections = card_of(weights)
    assert card.data.library_name == library
    blocks = code_blocks(sections["Use"])
    assert f'load_pretrained("hf:{NAME}")' in blocks[0]
    assert len(blocks) == (2 if code else 1)
    assert code in blocks[-1]
    for block in blocks:
        ast.parse(block)
