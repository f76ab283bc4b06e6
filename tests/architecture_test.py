"""Tests of the house: who may import whom, and where heavy libraries may be imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mixer_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; the rooms of one floor do not know each other.
FLOORS = [
    {"errors", "keys", "locks", "predictions"},
    {"model", "data", "parallel", "streams"},
    {"config"},
    {"weights", "config_file"},
    {"command_line", "evaluation", "classifier"},
    {"training"},
    {"planning", "transfers"},
    {"benchmarks"},
]
DOORS = {
    "main",
    "prepare",
    "evaluate",
    "transfer",
    "predict",
    "convert",
    "visualize",
    "benchmark",
    "plan",
}

# Where each heavy library may be imported at all, by path in the package.
HEAVY = {
    "flax": {"model/", "training/step.py", "benchmarks/reference.py"},
    "orbax": {"weights/checkpoint.py"},
    "safetensors": {"weights/safetensors_file.py", "benchmarks/weights.py"},
    "huggingface_hub": {"weights/hub.py"},
    "torch": {
        "weights/torch_file.py",
        "benchmarks/with_torch.py",
        "benchmarks/timm_library.py",
    },
    "timm": {"benchmarks/timm_library.py"},
    "torchvision": {"benchmarks/timm_library.py"},
    "grain": {"data/"},
    "cv2": {"data/", "benchmarks/photographs.py", "benchmarks/pipelines.py"},
    "simplejpeg": {"data/decoding.py", "benchmarks/photographs.py", "benchmarks/pipelines.py"},
    "tensorflow_datasets": {"data/"},
    "clu": {"training/metrics.py"},
    "tensorflow": {"benchmarks/tf_data.py", "benchmarks/tf_randaugment.py"},
    "matplotlib": {
        "training/curves.py",
        "training/pictures.py",
        "transfers/picture.py",
        "benchmarks/picture.py",
    },
    "sklearn": {"data/builders/digits.py", "benchmarks/photographs.py"},
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(room: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down_only(path: Path) -> None:
    room = relative(path).split("/")[0].removesuffix(".py")
    assert room == "__init__" or floor(room) < len(FLOORS) or room in DOORS
    if room == "__init__":
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        # `from mixer_jax import NAME` may name a room or something in __init__.py.
        if package == "mixer_jax" and (
            (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
        ):
            assert not other or other == room or floor(other) < floor(room), f"imports {name}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in imports(path):
        allowed = HEAVY.get(name.split(".")[0])
        if allowed is not None:
            assert any(relative(path).startswith(place) for place in allowed), name


def test_no_circles_between_files() -> None:
    graph = {}
    for path in FILES:
        module = "mixer_jax." + relative(path).removesuffix(".py").replace("/", ".")
        graph[module.removesuffix(".__init__")] = set(imports(path))
    modules = {name: used & graph.keys() - {"mixer_jax"} for name, used in graph.items()}
    modules.pop("mixer_jax")
    while modules:
        leaves = [name for name, used in modules.items() if not used & modules.keys()]
        assert leaves, f"a circle among {sorted(modules)}"
        for name in leaves:
            modules.pop(name)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_file_outgrows_its_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mixer_jax", {"jax", "flax", "numpy"}),
        ("mixer_jax.main", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.benchmark", {"jax", "flax", "numpy"}),
        ("mixer_jax.benchmarks.speed", {"jax", "flax", "numpy", "torch", "ml_collections"}),
        ("mixer_jax.benchmarks.compiling", {"jax", "flax", "numpy", "ml_collections"}),
        ("mixer_jax.plan", {"jax", "flax", "numpy"}),
        ("mixer_jax.prepare", {"jax", "numpy", "tensorflow_datasets", "cv2", "sklearn"}),
        ("mixer_jax.evaluate", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.transfer", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.predict", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.convert", {"jax", "flax", "orbax", "grain", "tensorflow_datasets", "cv2"}),
        ("mixer_jax.classifier", {"orbax", "grain", "tensorflow_datasets", "sklearn"}),
        ("mixer_jax.visualize", {"jax", "flax", "grain", "tensorflow_datasets", "matplotlib"}),
        ("mixer_jax.training.loop", {"tensorflow", "clu", "matplotlib", "sklearn"}),
    ],
)
def test_doors_open_without_the_heavy_libraries(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*(name.split('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(done.stdout.split())
