"""Figures without pyplot, which would choose a window system and keep every figure."""

import io
from typing import Any

DPI = 120


def make_figure(width: float, height: float, constrained: bool = False) -> Any:
    """Creates an empty figure, with sizes in inches; `constrained` keeps texts from overlapping."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """Figure that notebooks show even if pyplot has not been used yet."""

        def _repr_png_(self) -> bytes:
            return render_figure(self, "png")

    return NotebookFigure(figsize=(width, height), layout="constrained" if constrained else None)


def render_figure(figure: Any, file_format: str) -> bytes:
    """Renders a figure as "png", "jpg" or "pdf"."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=DPI)
    return buffer.getvalue()
