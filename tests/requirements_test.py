"""Tests of setup.py and the requirements files: what the package imports, and nothing heavier."""

import ast
import itertools
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).parent.parent / "mixer_jax"
# Imported only where they are installed: by extras, or for comparisons.
OPTIONAL = {
    "datasets",
    "gcsfs",
    "jax2onnx",
    "libtpu",
    "onnxruntime",
    "pillow_heif",
    "tensorflow",
    "timm",
    "torch",
    "torchvision",
    "wandb",
    "webdataset",
}


@pytest.fixture(scope="module")
def core(root: Path) -> dict[str, Requirement]:
    """Requirements of the package without extras, by name."""
    for node in ast.parse((root / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CORE":
            requirements = map(Requirement, ast.literal_eval(node.value))
            return {canonicalize_name(item.name): item for item in requirements}
    raise AssertionError("setup.py must define CORE")


def pinned(path: Path) -> dict[str, set[str]]:
    """Reads the versions of each package in a requirements file."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE):
        versions.setdefault(canonicalize_name(name), set()).add(version)
    return versions


def imported_modules() -> set[str]:
    """Returns the top-level names of other libraries that the package imports."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"mixer_jax"}


def test_package_declares_what_it_imports(core: dict[str, Requirement]) -> None:
    distributions = metadata.packages_distributions()
    undeclared = {
        name
        for name in imported_modules() - OPTIONAL
        if not {canonicalize_name(item) for item in distributions[name]} & core.keys()
    }
    assert undeclared == set()


def test_requirements_pin_versions_that_setup_allows(
    core: dict[str, Requirement], root: Path
) -> None:
    versions = pinned(root / "requirements.txt")
    for name, requirement in core.items():
        assert versions[name], name
        assert all(requirement.specifier.contains(version) for version in versions[name]), name


def test_tensorflow_is_only_in_the_requirements_of_tests(
    core: dict[str, Requirement], root: Path
) -> None:
    heavy = {"tensorflow", "tensorflow-cpu", "keras", "tensorboard", "torch", "pytest", "mypy"}
    assert not heavy & {*core, *pinned(root / "requirements.txt")}
    assert not heavy & pinned(root / "requirements-gcs.txt").keys()
    assert {"tensorflow-cpu", "tensorboard"} < pinned(root / "requirements-test.txt").keys()


def test_files_of_requirements_agree(root: Path) -> None:
    versions = pinned(root / "requirements.txt")
    other = {
        name: pinned(root / f"requirements-{name}.txt") for name in ("cuda", "gcs", "onnx", "test")
    }
    for name, extra in other.items():
        assert not extra.keys() & versions.keys(), name
    # It has packages of requirements.txt that only Windows needs without it.
    other["docs"] = pinned(root / "requirements-docs.txt")
    for one, another in itertools.combinations([versions, *other.values()], 2):
        assert all(one[name] == another[name] for name in one.keys() & another.keys())


def test_tested_versions_of_python_are_those_of_the_metadata(root: Path) -> None:
    setup = (root / "setup.py").read_text()
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    workflow = (root / ".github" / "workflows" / "test.yml").read_text()
    (matrix,) = re.findall(r"python: (\[.*\])", workflow)
    assert ast.literal_eval(matrix) == classifiers
    (required,) = re.findall(r'python_requires="(.*)"', setup)
    (newest,) = re.findall(r'python-version: "(.*)"', workflow)
    for version in (*classifiers, newest):
        assert SpecifierSet(required).contains(version)
    makefile = (root / "Makefile").read_text()
    bounds = re.findall(r"\((3), (\d+)\) <= v < \((3), (\d+)\)", makefile)
    (lowest_major, lowest, next_major, following) = bounds[0]
    assert f">={lowest_major}.{lowest},<{next_major}.{following}" == required


def test_the_tpu_compiler_is_the_one_that_jax_names(root: Path) -> None:
    (named,) = [
        requirement
        for requirement in map(Requirement, metadata.requires("jax") or [])
        if requirement.name == "libtpu"
    ]
    lines = (root / "requirements-tpu.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith(("#", "-"))]
    (pin,) = [pin for pin in pins if pin.marker and pin.marker.evaluate({"sys_platform": "linux"})]
    (version,) = pin.specifier
    assert named.specifier.contains(version.version)
