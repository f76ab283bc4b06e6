"""Two toy model families, and a program that uses them through the public commands.

    python -m tests.helpers.second_families FOLDER

Nothing but the registration in `register` knows them. `PatchMlpFamily` has a stack of blocks,
`ConvNetFamily` has none and accepts images of any size.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.errors import UserError
from mixer_jax.models.execution import Execution
from mixer_jax.models.family import (
    ImageSize,
    InferredConfig,
    ModelFamily,
    ResizedConfig,
    Shape,
    TensorMapping,
    WeightLayout,
    architecture_key,
)
from mixer_jax.models.layers import (
    Context,
    LayerNorm,
    PatchEmbed,
    add_branch,
    classifier_head,
    dense,
)
from mixer_jax.models.registry import FAMILIES, create_model, get_family, list_model_names
from mixer_jax.models.stack import block_stack, forward_intermediates, make_context

CONFIG_FILE = """
from mixer_jax import config as config_lib

def get_config():
    config = config_lib.get_default()
    config.dataset.name, config.dataset.num_classes = "synthetic", 5
    config.dataset.num_examples = 32
    config.num_steps, config.batch_size, config.eval_batch_size = 3, 8, 8
    config.image_size, config.preprocess.train_crop = 16, "resize"
    config.optimizer.warmup_steps = 1
    config.tensorboard, config.compilation_cache = False, ""
    config.evals = config_lib.evals(test={"split": "test"})
    return config
"""


@dataclasses.dataclass(frozen=True)
class PatchMlpConfig:
    """Dimensions of an MLP over patches."""

    num_blocks: int = architecture_key("number of blocks")
    patch_size: int = architecture_key("side of a square patch", unit="px")
    expansion: int = architecture_key("hidden units per channel")


class PatchMlpBlock(nn.Module):
    """Two dense layers with a skip connection; sows nothing."""

    num_branches: ClassVar[int] = 1

    config: PatchMlpConfig
    ctx: Context = Context()

    @nn.compact
    def __call__(self, x: Any, masks: Any, example_index: Any) -> Any:
        """Applies both layers to every token."""
        y = dense(self.config.expansion * x.shape[-1], self.ctx)(LayerNorm()(x))
        y = dense(x.shape[-1], self.ctx)(nn.relu(y))
        return add_branch(x, y, masks[0], self.ctx.dtype)


class PatchMlp(nn.Module):
    """An `ImageModel` with a stack of blocks, and without dropout and GELU."""

    family: ClassVar[str] = "patch_mlp"

    config: PatchMlpConfig
    num_classes: int
    stochastic_depth: float = 0.0
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: Any, train: bool = False, example_index: Any = None) -> Any:
        """Computes logits, or features."""
        example_index = jnp.arange(len(images)) if example_index is None else example_index
        ctx = make_context(self, train)
        x = PatchEmbed(8, self.config.patch_size, ctx, name="stem")(images)
        block = PatchMlpBlock(self.config, ctx, parent=None)
        x = block_stack(self, block, x, example_index, norm_name="norm")
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        return classifier_head(self.num_classes, 0.0)(x) if self.num_classes else x


class PatchMlpFamily(ModelFamily):
    """A family with a stack of blocks."""

    name = "patch_mlp"
    display_name = "PatchMlp"
    config_class = PatchMlpConfig
    variants: ClassVar[dict[str, Any]] = {"S": PatchMlpConfig(2, 4, 2)}

    def get_module_class(self) -> Any:
        return PatchMlp

    def param_shapes(
        self, config: PatchMlpConfig, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        n, p, hidden = config.num_blocks, config.patch_size, 8 * config.expansion
        shapes: dict[str, Shape] = {"stem/kernel": (p, p, 3, 8), "stem/bias": (8,)}
        shapes |= {f"blocks/LayerNorm_0/{leaf}": (n, 8) for leaf in ("scale", "bias")}
        shapes |= {"blocks/Dense_0/kernel": (n, 8, hidden), "blocks/Dense_0/bias": (n, hidden)}
        shapes |= {"blocks/Dense_1/kernel": (n, hidden, 8), "blocks/Dense_1/bias": (n, 8)}
        shapes |= {"norm/scale": (8,), "norm/bias": (8,)}
        return shapes | _head_shapes(8, num_classes)

    def forward_flops(
        self, config: PatchMlpConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        return 1

    def image_size_multiple(self, config: PatchMlpConfig) -> int:
        return config.patch_size

    def check_image_size(self, config: PatchMlpConfig, height: int, width: int) -> None:
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"image_size must be a multiple of {config.patch_size}, got {height}.")

    def resize_config(self, config: Any, old: ImageSize, new: ImageSize) -> ResizedConfig:
        return ResizedConfig(config, "identity", "")

    def resize_params(self, params: Any, config: Any, old: ImageSize, new: ImageSize) -> Any:
        return params

    def infer_config(self, num_blocks: int, shape: Callable[[str], Shape]) -> InferredConfig:
        hidden = shape("blocks/Dense_0/kernel")[-1]
        return InferredConfig(PatchMlpConfig(num_blocks, shape("stem/kernel")[0], hidden // 8), 0)


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """Dimensions of a convolution."""

    num_filters: int = architecture_key("filters of the convolution")


class ConvNet(nn.Module):
    """An `ImageModel` without a stack of blocks."""

    family: ClassVar[str] = "conv_net"

    config: ConvNetConfig
    num_classes: int
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, images: Any, train: bool = False, example_index: Any = None) -> Any:
        """Computes logits, or features."""
        dtype = self.execution.dtype
        x = nn.Conv(self.config.num_filters, (3, 3), dtype=dtype, name="stem")(images)
        x = jnp.mean(nn.relu(x), axis=(1, 2), dtype=jnp.float32)
        self.sow("intermediates", "pre_logits", x)
        return classifier_head(self.num_classes, 0.0)(x) if self.num_classes else x


class ConvNetFamily(ModelFamily):
    """A family without a stack of blocks, and with published weights."""

    name = "conv_net"
    display_name = "ConvNet"
    config_class = ConvNetConfig
    variants: ClassVar[dict[str, Any]] = {"S": ConvNetConfig(6)}

    def get_module_class(self) -> Any:
        return ConvNet

    def param_shapes(
        self, config: ConvNetConfig, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        n = config.num_filters
        return {"stem/kernel": (3, 3, 3, n), "stem/bias": (n,)} | _head_shapes(n, num_classes)

    def forward_flops(
        self, config: ConvNetConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        return 1

    def check_image_size(self, config: Any, height: int, width: int) -> None:
        pass

    def resize_config(self, config: Any, old: ImageSize, new: ImageSize) -> ResizedConfig:
        return ResizedConfig(config, "identity", "")

    def resize_params(self, params: Any, config: Any, old: ImageSize, new: ImageSize) -> Any:
        return params

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        names = {"stem": "convolution", "head": "classifier"}
        tensors = tuple(
            TensorMapping(f"{names[layer]}/{leaf}", f"{layer}/{leaf}")
            for layer in names
            for leaf in ("kernel", "bias")
        )
        return (WeightLayout("Google", tensors, ("convolution/kernel",), "tanh", "resize"),)

    def infer_config(self, num_blocks: int, shape: Callable[[str], Shape]) -> InferredConfig:
        return InferredConfig(ConvNetConfig(shape("stem/kernel")[-1]), 0)


def _head_shapes(width: int, num_classes: int) -> dict[str, Shape]:
    head = {"head/kernel": (width, num_classes), "head/bias": (num_classes,)}
    return head if num_classes else {}


def register() -> None:
    """Registers both families, before anything reads the configuration's keys."""
    for family in (PatchMlpFamily(), ConvNetFamily()):
        FAMILIES[family.name] = family


def main(folder: Path) -> None:
    """Trains, evaluates, saves, converts and loads both; prints the results as JSON."""
    register()
    from mixer_jax import config as config_lib
    from mixer_jax import convert, evaluate
    from mixer_jax import main as train
    from mixer_jax.config.loading import load_config_with_overrides
    from mixer_jax.inference import load_pretrained

    config = folder / "tiny.py"
    config.write_text(CONFIG_FILE)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1, maxval=1)
    flags = {
        "patch_mlp": ["--config.model.expansion=3", "--config.model.stochastic_depth=0.5"],
        "conv_net": ["--config.model.num_filters=7"],
    }
    results: dict[str, Any] = {
        "models": list_model_names(),
        "help": config_lib.config.format_help(),
    }
    for name, overrides in flags.items():
        selection = [f"--config.model.family={name}", "--config.model.variant=S"]
        workdir = str(folder / name)
        argv = [f"--config={config}", f"--workdir={workdir}", *selection, *overrides]
        evaluated = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            code = train.main(argv)
        with contextlib.redirect_stdout(evaluated):
            evaluate.main([f"--checkpoint={workdir}", "--json"])
        classifier = load_pretrained(workdir)
        info = classifier.model_info
        logits, activations = forward_intermediates(classifier.model, classifier.params, images)
        tree = jax.tree.map(jnp.shape, classifier.params)
        flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
        results[name] = {
            "exit_code": code,
            "evaluation": json.loads(evaluated.getvalue()),
            "config": dataclasses.asdict(info.config),
            "logits_agree": np.allclose(logits, classifier(images), atol=1e-5),
            "activations": list(activations),
            "shapes_agree": {"/".join(k.key for k in path): shape for path, shape in flat}
            == get_family(name).param_shapes(info.config, info.image_size, info.num_classes),
        }
        model = create_model(f"{get_family(name).display_name}-S", 0)
        results[name]["num_features"] = jax.eval_shape(
            lambda model=model: model.init_with_output(jax.random.key(0), images)[0]
        ).shape[-1]
        if name == "conv_net":
            file = str(folder / "weights.npz")
            with contextlib.redirect_stdout(io.StringIO()):
                convert.main([workdir, file])
            converted = load_pretrained(file)
            results[name]["converted_agree"] = bool((converted(images) == classifier(images)).all())
            larger = load_pretrained(file, image_size=(24, 40))
            results[name]["larger"] = larger(jnp.zeros((1, 24, 40, 3))).shape
    results["errors"] = []
    for flag in ("model.expansion=2", "model.dropout=0.5"):
        argv = ["--config.model.family=conv_net", "--config.model.variant=S", f"--config.{flag}"]
        try:
            parsed = config_lib.parse(load_config_with_overrides(str(config), argv))
            family = get_family(parsed.model.family)
            family.build(parsed.model.architecture, 5, dropout=parsed.model.dropout)
        except UserError as error:
            results["errors"].append(str(error))
    print(json.dumps(results, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
