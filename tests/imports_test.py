"""Tests of imports: one way between packages, no cycles, heavy libraries only where allowed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mixer_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A package imports from lower levels, and from packages to its left in its own
# level.
LEVELS = [
    ["errors", "files"],
    ["model", "models", "kernels", "config", "data", "distributed"],
    ["checkpoints", "evaluation"],
    ["cli", "inference", "training"],
    ["visualization"],
    ["planning", "suites"],
    ["benchmarks", "comparison"],
]
COMMANDS = [
    "__main__",
    "benchmark",
    "compare",
    "convert",
    "evaluate",
    "extract",
    "main",
    "plan",
    "predict",
    "prepare",
    "transfer",
    "visualize",
]

# Paths in the package that may import each heavy library.
HEAVY = {
    "flax": {"models/", "training/step.py", "benchmarks/reference_"},
    "orbax": {"checkpoints/manager.py"},
    "safetensors": {"checkpoints/formats.py", "benchmarks/checkpoint_io.py"},
    "huggingface_hub": {
        "checkpoints/hub.py",
        "checkpoints/model_card.py",
        "checkpoints/resolve.py",
    },
    "torch": {
        "checkpoints/formats.py",
        "benchmarks/torch_runner.py",
    },
    "timm": {"benchmarks/torch_runner.py"},
    "torchvision": {"benchmarks/torch_runner.py"},
    "grain": {"data/"},
    "cv2": {"data/", "benchmarks/formats.py", "benchmarks/pipelines.py"},
    "simplejpeg": {"data/decode.py", "benchmarks/pipelines.py"},
    "tensorflow_datasets": {"data/"},
    "clu": {"training/workdir.py"},
    "tensorboardX": {"training/metrics.py"},
    "wandb": {"training/tracking.py"},
    "tensorflow": {"benchmarks/tf_data.py"},
    "webdataset": {"benchmarks/formats.py"},
    "matplotlib": {
        "visualization/",
        "benchmarks/report.py",
    },
    "jinja2": {"visualization/html.py"},
    "datasets": {"data/huggingface.py", "benchmarks/formats.py"},
    "pyarrow": {"data/huggingface.py", "evaluation/feature_files.py"},
    "sklearn": {
        "data/builders/digits.py",
        "evaluation/classification.py",
        "evaluation/multi_label.py",
        "visualization/evaluation_report.py",
        "benchmarks/pipelines.py",
    },
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank(package: str) -> tuple[int, int]:
    """Returns the level of a package and its position within; commands come last."""
    for level, packages in enumerate(LEVELS):
        if package in packages:
            return level, packages.index(package)
    assert package in COMMANDS, f"{package} is neither a command nor in LEVELS"
    return len(LEVELS), 0


def test_imports_between_packages_go_one_way() -> None:
    wrong = []
    for path in FILES:
        package = relative(path).split("/")[0].removesuffix(".py")
        if package == "__init__":
            continue
        for name in imports(path):
            root, _, rest = name.partition(".")
            other = rest.split(".")[0]
            exists = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
            if root != "mixer_jax" or not exists or other in ("", package):
                continue
            if rank(other) >= rank(package):
                wrong.append(f"{relative(path)} imports {name}")
    assert not wrong


def test_heavy_libraries_are_imported_only_where_allowed() -> None:
    wrong = [
        f"{relative(path)} imports {name}"
        for path in FILES
        for name in imports(path)
        if (allowed := HEAVY.get(name.split(".")[0])) is not None
        and not any(relative(path).startswith(prefix) for prefix in allowed)
    ]
    assert not wrong


def test_modules_have_no_import_cycles() -> None:
    graph = {}
    for path in FILES:
        if path.name != "__init__.py":
            module = "mixer_jax." + relative(path).removesuffix(".py").replace("/", ".")
            graph[module] = set(imports(path))
    modules = {name: used & graph.keys() for name, used in graph.items()}
    while modules:
        leaves = [name for name, used in modules.items() if not used & modules.keys()]
        assert leaves, f"import cycle among {sorted(modules)}"
        for name in leaves:
            modules.pop(name)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mixer_jax", {"jax", "flax", "numpy", "ml_collections", "argparse"}),
        ("mixer_jax.__main__", {"jax", "flax", "numpy", "ml_collections"}),
        ("mixer_jax.main", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.benchmark", {"jax", "flax", "numpy"}),
        ("mixer_jax.benchmarks.throughput", {"jax", "flax", "numpy", "torch", "ml_collections"}),
        ("mixer_jax.benchmarks.compile", {"jax", "flax", "numpy", "ml_collections"}),
        ("mixer_jax.plan", {"jax", "flax", "numpy"}),
        ("mixer_jax.prepare", {"jax", "numpy", "tensorflow_datasets", "cv2", "sklearn"}),
        ("mixer_jax.evaluate", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.transfer", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        (
            "mixer_jax.compare",
            {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2", "matplotlib"},
        ),
        ("mixer_jax.extract", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "pyarrow"}),
        ("mixer_jax.predict", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.convert", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.inference", {"orbax", "grain", "tensorflow_datasets", "sklearn"}),
        ("mixer_jax.visualize", {"jax", "flax", "grain", "tensorflow_datasets", "matplotlib"}),
        (
            "mixer_jax.training.loop",
            {"tensorflow", "clu", "tensorboardX", "matplotlib", "sklearn", "wandb"},
        ),
    ],
)
def test_import_leaves_heavy_libraries_out(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())
