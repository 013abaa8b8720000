"""Norm and angle of a predicted run, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sphereopt.report.svg import COLOURS
from sphereopt.theory import Answer

__all__ = ["plot_run"]

_POINTS = 2000


def plot_run(answer: Answer, path: Path) -> None:
    """Draw norm and angle over the steps of a run, with those at which it would settle.

    Args:
        answer: What :func:`sphereopt.theory.answer` returned, with a run.
        path: File to write; its suffix says the format (.png, .svg, .pdf).

    Raises:
        ValueError: If the answer has no run, or matplotlib does not know the format.
        OSError: If the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if answer.run is None:
        raise ValueError("the answer has no run to draw")
    run, followed = answer.run, answer.run.followed
    at = np.unique(np.linspace(0, len(followed.lr) - 1, _POINTS).round().astype(int))
    size = followed.norm if followed.norm is not None else followed.rms
    assert size is not None
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    settles = np.where(np.isfinite(followed.equilibrium), followed.equilibrium, np.nan)
    panels = (
        (above, "norm" if followed.norm is not None else "rms weight", size, settles),
        (below, "angle per step (rad)", followed.angle, run.quasi_static),
    )
    for axes, name, real, settled in panels:
        axes.plot(at, real[at], color=COLOURS["sgd"], label="predicted")
        axes.plot(at, settled[at], color=COLOURS["free"], ls="--", label="if settled")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    below.legend(frameon=False)
    below.set_xlabel("step")
    kind, lr, decay = answer.settings.optimizer, answer.settings.lr, answer.settings.weight_decay
    above.set_title(f"{kind}, lr {lr:g}, weight decay {decay:g}", loc="left", fontsize="medium")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "calc"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
