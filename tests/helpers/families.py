"""Checks of the interface of every model family, and the family of docs/add_model_family.md."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.models.family import ModelFamily, Shape
from mixer_jax.models.registry import FAMILIES, create_model
from mixer_jax.models.stack import forward_intermediates
from tests.helpers.docs_pages import read_blocks
from tests.helpers.models import param_shapes

PAGE = Path(__file__).parents[2] / "docs" / "add_model_family.md"


def check_family(family: ModelFamily) -> None:
    """Checks that a registered family describes its module, and what it infers and resizes."""
    for variant, config in family.variants.items():
        assert family.infer_variant(config) == variant
        assert family.get_config(variant) == config
    variant, config = next(iter(family.variants.items()))
    size = 2 * family.image_size_multiple(config)
    family.check_image_size(config, size, 2 * size)
    model = create_model(family.full_name(variant), 5)
    assert model.family == family.name
    shapes = family.param_shapes(config, (size, 2 * size), 5)
    tree = param_shapes(model, size, 2 * size)
    assert shapes == flat_shapes(tree)
    images = jax.ShapeDtypeStruct((2, size, 2 * size, 3), np.float32)
    _, activations = jax.eval_shape(
        lambda params, images: forward_intermediates(model, params, images), tree, images
    )
    layers = family.layers(config, (size, 2 * size), 5)
    assert {name: layer.shape for name, layer in layers.items()} == {
        **{name: x.shape[1:] for name, x in activations.items()},
        "logits": (5,),
    }
    assert "logits" not in family.layers(config, (size, size), 0)
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert family.num_params(config, (size, 2 * size), 5) == count
    resized = family.resize_config(config, (size, 2 * size), (2 * size, 4 * size))
    assert family.resize_config(config, (size, size), (size, size)).config == config
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    params = family.resize_params(params, config, (size, 2 * size), (2 * size, 4 * size))
    new_shapes = family.param_shapes(resized.config, (2 * size, 4 * size), 5)
    assert flat_shapes(params) == new_shapes
    # The architecture can be inferred, and layouts name every parameter once.
    assert family.infer_config(family.num_blocks(config), ShapesOf(shapes)).config == config
    for layout in family.weight_layouts():
        paths = [path for mapping in layout.tensors for path in mapping.paths]
        assert len(paths) == len(set(paths))
        assert set(shapes) <= set(paths)
        names = {mapping.name.format(0) for mapping in layout.tensors}
        assert set(layout.signature_keys) <= names
        for other in (other for other in FAMILIES.values() if other.name != family.name):
            for foreign in other.weight_layouts():
                others = {mapping.name.format(0) for mapping in foreign.tensors}
                assert not set(layout.signature_keys) <= others


class ShapesOf:
    """The `FileShapes` of a file that has parameters of these shapes."""

    def __init__(self, shapes: dict[str, Shape], **recorded: Any):
        self.recorded: Mapping[str, Any] = recorded
        self._shapes = shapes

    def __contains__(self, path: str) -> bool:
        return path in self._shapes

    def __call__(self, path: str) -> Shape:
        return self._shapes[path][1:] if path.startswith("blocks/") else self._shapes[path]


def flat_shapes(tree: Any) -> dict[str, Shape]:
    """Returns the shape of each array of a tree by its slash-separated path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


@contextmanager
def documented_family(folder: Path) -> Iterator[ModelFamily]:
    """Registers the family that the documentation adds, from its code there."""
    names = set()
    for block in read_blocks(PAGE):
        if block.mode == "file":
            (folder / block.file).write_text(block.text)
            names.add(Path(block.file).stem)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        family = importlib.import_module("gmlp_family").GMlpFamily()
        patch.setitem(FAMILIES, family.name, family)
        try:
            yield family
        finally:
            for name in names:
                sys.modules.pop(name, None)
