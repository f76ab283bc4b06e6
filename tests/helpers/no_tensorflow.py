"""Python code that makes a process behave as if TensorFlow were not installed."""

from pathlib import Path

# Unlike `sys.modules["tensorflow"] = None`, which TFDS takes for a loaded TensorFlow.
HIDE_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

class PathFinderWithoutTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("tensorflow", "keras", "tensorboard")
        return None if hidden else super().find_spec(name, path, target)

index = sys.meta_path.index(PathFinder)
sys.meta_path[index] = PathFinderWithoutTensorFlow
"""


def write_sitecustomize(folder: Path) -> None:
    """Writes a module that hides TensorFlow from every Python process with `folder` in its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDE_TENSORFLOW)
