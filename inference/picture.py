"""Figures that show themselves in a notebook."""

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure outside of pyplot that a notebook shows as the value of a cell.

    Usage: ``figure = Picture(figsize=(6.4, 3.8), layout="constrained")``

    A plain figure shows as text until something in the notebook has drawn through pyplot, and a figure made through pyplot
    opens a window, or is kept for ever, in a script.
    """

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()
