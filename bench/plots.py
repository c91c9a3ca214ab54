"""Plots as small SVG files that read on a light page and on a dark one. The only place that knows matplotlib,
which has a dependency group of its own: `uv run --group bench`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent.parent / "docs" / "performance"
GREY = "#808080"
"""On white and on black alike: 4:1 and 5:1."""
COLOURS = ("#d9822b", "#2b95d6", "#29a634", "#c274c2", "#d13913", "#b8a000", "#14a89b", "#8f7ee6")
DASHES = ("-", "--", ":", "-.")
"""Lines differ by more than colour."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "troupe",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # each text names all of them
    "font.size": 9,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 3,
}

Line = Sequence[tuple[float, float]]


class Panel(NamedTuple):
    title: str
    x: str
    lines: Mapping[str, Line]
    is_log: bool = False
    """Both axes."""
    marker: str = "o"


def check() -> None:
    """
    Raises:
        SystemExit: matplotlib is not there; says how to get it.
    """
    try:
        import matplotlib as mpl  # noqa: F401  (late: only who draws needs it)
    except ModuleNotFoundError as missing:
        raise SystemExit("Plots need matplotlib: uv run --group bench python -m ...") from missing


def draw(name: str, panels: Sequence[Panel]) -> Path:
    """Write `docs/performance/NAME.svg`: panels beside each other, two in a row. The same figures give the
    same file."""
    check()
    import matplotlib as mpl  # late: see `check`

    mpl.use("svg")
    from matplotlib import pyplot as plt

    path = FOLDER / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    n_rows = (len(panels) + 1) // 2
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            n_rows, 2, figsize=(9, 2.9 * n_rows), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator  # late: see `check`

    for number, (label, line) in enumerate(panel.lines.items()):
        xs, ys = zip(*line, strict=True) if line else ((), ())
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number % len(DASHES)]
        axes.plot(xs, ys, dash, color=colour, marker=panel.marker, label=label)
    if panel.is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sorted({x for line in panel.lines.values() for x, _ in line}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x)
    axes.legend()
