"""The curves of a training run as a PNG: loss and expected acceptance length, on training and held-out sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drafter_service.training.trainer import Progress


def draw(curve: Sequence[Progress], path: Path) -> None:
    """Two panels over steps; does nothing for an empty curve."""
    if not curve:
        return
    import matplotlib  # heavy, and needed at the end of a run only

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [point.step for point in curve]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    left.plot(steps, [point.loss for point in curve], label="training")
    left.plot(steps, [point.held_out_loss for point in curve], label="held out")
    left.set(xlabel="step", ylabel="weighted cross-entropy", title="loss")
    right.plot(steps, [point.tau for point in curve], label="training")
    right.plot(steps, [point.held_out_tau for point in curve], label="held out")
    right.set(xlabel="step", ylabel="tokens per target step", title="expected acceptance length")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
