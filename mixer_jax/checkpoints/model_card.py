"""Model card of weights: what they are, how they were trained, and how to load them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mixer_jax.checkpoints.model_info import ModelInfo, format_image_size
from mixer_jax.checkpoints.model_zoo import MODEL_ZOO
from mixer_jax.checkpoints.resolve import HUB, HUB_FILE, read_metrics
from mixer_jax.checkpoints.timm_config import find_timm_model, timm_expression, timm_folder_code
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS
from mixer_jax.data.names import FOLDER, HUGGING_FACE, MANIFEST, WEB_DATASET
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family

CARD_FILE = "README.md"
_TASK = "image-classification"
# Class names that are listed.
_MAX_NAMES = 20
# Sections and keys of the recipe. Others name files, or change no result.
_RECIPE_SECTIONS = ("preprocess", "recipe", "optimizer")
_RECIPE_KEYS = (
    "seed",
    "num_steps",
    "num_epochs",
    "batch_size",
    "image_size",
    "model.stochastic_depth",
    "model.dropout",
)
# Keys that are listed even if they have their defaults.
_ALWAYS = ("batch_size", "image_size", "recipe.loss", "optimizer.name", "optimizer.learning_rate")
# Metrics of an evaluation: name in a run, name in the card, format, and the Hub's type if they are
# metadata too.
_METRICS = (
    ("top1", "top-1 accuracy", ".2%", "accuracy"),
    ("top5", "top-5 accuracy", ".2%", "accuracy"),
    ("log_likelihood", "log-likelihood (nats per image)", ".4f", ""),
    ("calibration_error", "calibration error", ".2%", ""),
)
_MULTI_LABEL_METRICS = (
    ("mean_average_precision", "mean average precision", ".2%", "mean_average_precision"),
    ("micro_average_precision", "micro average precision", ".2%", ""),
)
# By prefix: the Hub's name for the kind of dataset, and a description.
_OWN_DATASETS = {
    FOLDER: ("imagefolder", "a folder of images"),
    MANIFEST: ("imagefolder", "images of a manifest"),
    HUGGING_FACE: ("parquet", "a Hugging Face dataset"),
    WEB_DATASET: ("webdataset", "WebDataset shards"),
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#&~$])")


def make_model_card(weights: PretrainedWeights, name: str, card_license: str = "") -> str:
    """Generates the model card of a repository on the Hub, with metadata that the Hub reads.

    Facts come from the weights and their run; what is unknown is left out or named as unknown.
    Local paths do not appear.

    Args:
        weights: Weights on the host.
        name: Name of the repository, OWNER/NAME.
        card_license: Identifier of the license; empty: none.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    info, config = weights.model_info, weights.train_config
    metrics = _MULTI_LABEL_METRICS if info.multi_label else _METRICS
    evaluations = list(_read_evaluations(weights, metrics[0][0]))
    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=_dataset_id(evaluation["dataset"]),
            dataset_name=_dataset_name(evaluation["dataset"]),
            dataset_split=evaluation["split"],
            metric_type=metric_type,
            metric_name=title,
            metric_value=round(evaluation[metric], 6),
        )
        for evaluation in evaluations
        for metric, title, _, metric_type in metrics
        if metric in evaluation and metric_type
    ]
    data = ModelCardData(
        license=card_license or None,
        library_name="timm" if _is_in_timm(info) else "mixer_jax",
        pipeline_tag=_TASK if info.num_classes else "image-feature-extraction",
        tags=["mixer_jax", "jax", get_family(info.family).display_name.lower()],
        # Of the evaluations, if there are any.
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    sections = {
        "Use": _usage(info, name),
        "Model": _model(weights),
        "Training data": _training_data(config),
        "Recipe": _recipe(config),
        "Evaluation": _evaluation(evaluations, metrics),
        "Intended use": _intended_use(info),
        "License": [card_license or "The author has not stated a license."],
    }
    lines = ["---", data.to_yaml(), "---", "", f"# {name.rpartition('/')[2]}", "", _summary(info)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return str(ModelCard("\n".join(lines) + "\n"))


def _summary(info: ModelInfo) -> str:
    purpose = "A feature extractor"
    if info.num_classes:
        kind = "A multi-label" if info.multi_label else "An"
        purpose = f"{kind} image classifier with {info.num_classes:,} classes"
    return f"{purpose}: {info.name}, saved by mixer_jax. The files have the layout of timm."


def _is_in_timm(info: ModelInfo) -> bool:
    """Returns whether timm loads the repository without further arguments."""
    try:
        return not find_timm_model(info).python_args
    except UserError:
        return False


def _usage(info: ModelInfo, name: str) -> list[str]:
    call = "predictions = model.predict(" if info.num_classes else "features = model("
    argument = '"photo.jpg")' if info.num_classes else 'model.preprocess("photo.jpg"))'
    ours = ["import mixer_jax", f'model = mixer_jax.load_pretrained("{HUB}{name}")']
    lines = ["With mixer_jax:", "", *_code("python", [*ours, call + argument]), ""]
    return [*lines, "With timm:", "", *_timm_usage(info, name)]


def _timm_usage(info: ModelInfo, name: str) -> list[str]:
    if info.permutation:
        return ["timm does not permute the pixels of images, as this model needs."]
    try:
        return _code("python", timm_folder_code(info, f"hf-hub:{name}"))
    except UserError:
        pass
    try:
        expression = timm_expression(info)
    except UserError:
        return ["timm has no such model."]
    code = [
        "import timm",
        "from huggingface_hub import hf_hub_download",
        f"model = {expression}",
        f'timm.models.load_checkpoint(model, hf_hub_download("{name}", "{HUB_FILE}"))',
        "model.eval()",
    ]
    return _code("python", code)


def _model(weights: PretrainedWeights) -> list[str]:
    info = weights.model_info
    family = get_family(info.family)
    num_params = sum(array.size for _, array in flatten_params(weights.params))
    rows = {
        "Architecture": family.full_name(info.variant),
        "Parameters": f"{num_params:,}",
        "Image size": format_image_size(info.image_size),
        "Pixels": "RGB in [-1, 1]",
        "Evaluation crop": info.eval_crop,
    }
    if info.eval_crop != "resize":
        rows["Evaluation crop"] += f", {info.eval_crop_fraction:g} of the resized image"
    if family.has_gelu:
        rows["GELU"] = info.gelu
    if info.resize_note:
        rows["Resized"] = info.resize_note
    if info.num_classes:
        names = [_escape(name) for name in info.class_names[:_MAX_NAMES]]
        names += ["…"] if len(info.class_names) > _MAX_NAMES else []
        rows["Classes"] = f"{info.num_classes:,}: {', '.join(names) or 'without names'}"
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _training_data(config: dict[str, Any] | None) -> list[str]:
    if config is None:
        return ["Not stored with the weights."]
    entries = list(config.get("mixture", {}).values())
    default = config["dataset"]["name"]
    lines = [
        f"{_escape(_dataset_name(entry['dataset'] or default))}, split `{entry['split']}`, "
        f"weight {entry['weight']:g}"
        for entry in entries
    ]
    if not lines:
        lines = [f"{_escape(_dataset_name(default))}, split `{config['dataset']['train_split']}`"]
    start = config["init_from"]
    if start:
        is_public = start.startswith(HUB) or any(model.source == start for model in MODEL_ZOO)
        lines.append(f"Initialized from {f'`{start}`' if is_public else 'other weights'}")
    return [f"- {line}" for line in lines]


def _recipe(config: dict[str, Any] | None) -> list[str]:
    if config is None:
        return ["Not stored with the weights."]
    lines = []
    for path, field in FIELDS.items():
        section = path.rpartition(".")[0]
        value = config
        for part in path.split("."):
            value = value[part]
        is_listed = section in _RECIPE_SECTIONS or path in _RECIPE_KEYS
        if is_listed and (value != field.default or path in _ALWAYS):
            lines.append(f"{path} = {value}")
    return [*_code("", lines), "", "Other keys have the defaults of mixer_jax."]


def _read_evaluations(weights: PretrainedWeights, metric: str) -> Iterator[dict[str, Any]]:
    """Yields the evaluations of a run at the step of the weights; other steps are other weights.

    `metric` is one that all evaluations have.
    """
    config, step = weights.train_config, weights.step
    if config is None or step is None or not weights.workdir:
        return
    lines = [line for line in read_metrics(weights.workdir) if line["step"] == step]
    default = EVAL_FIELDS["type"].default
    for name, entry in config.get("evals", {}).items():
        key = f"{name}/{metric}"
        line = next((line for line in reversed(lines) if key in line), None)
        if line is None or entry["type"] != default:
            continue
        dataset = entry["dataset"] or config["dataset"]["name"]
        yield {
            "dataset": dataset,
            "split": entry["split"],
            "step": line["step"],
            **{key.removeprefix(f"{name}/"): value for key, value in line.items() if "/" in key},
        }


def _evaluation(
    evaluations: list[dict[str, Any]], metrics: Sequence[tuple[str, str, str, str]]
) -> list[str]:
    if not evaluations:
        return ["Not evaluated at the step of these weights, or not stored with them."]
    titles = ["dataset", "split", "images", "step", *(title for _, title, _, _ in metrics)]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for evaluation in evaluations:
        cells = [_escape(_dataset_name(evaluation["dataset"])), f"`{evaluation['split']}`"]
        cells += [f"{evaluation.get('num_examples', 0):,.0f}", f"{evaluation['step']:,}"]
        cells += [
            format(evaluation[metric], style) if metric in evaluation else ""
            for metric, _, style, _ in metrics
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Measured during training by the author of this repository."]


def _intended_use(info: ModelInfo) -> list[str]:
    if not info.num_classes:
        return ["Features of images, for example to train a classifier on them."]
    assigns = (
        "The model assigns one of the classes above to a photograph or picture. It does so for "
        "every image, also for one that shows none of the classes."
    )
    if info.multi_label:
        assigns = (
            "For each of the classes above, the model gives the probability that a photograph or "
            "picture shows it."
        )
    return [
        f"{assigns} Its answers are as good as its "
        "training data is similar to your images: measure the accuracy on your own images before "
        "you rely on it, and do not let it decide about people."
    ]


def _dataset_name(name: str) -> str:
    """Returns the public name of a dataset: not the path of a folder or file."""
    for prefix, (_, description) in _OWN_DATASETS.items():
        if name.startswith(prefix):
            return f"{description}, {epath.Path(name.removeprefix(prefix)).name}"
    return name


def _dataset_id(name: str) -> str:
    """Returns the Hub's name for a kind of dataset."""
    for prefix, (kind, _) in _OWN_DATASETS.items():
        if name.startswith(prefix):
            return kind
    return name.partition("/")[0]


def _escape(text: str) -> str:
    """Escapes text so that Markdown and HTML show it as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;")


def _code(language: str, lines: list[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]
