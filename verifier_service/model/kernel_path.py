"""What a runner has to know beforehand to compute over kernels."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.kernel_choice import KernelSetting


@dataclass(frozen=True)
class KernelPath:
    """kernels: as in the settings. longest_row: tokens of one verify row, at most; max_rows: of all of a step's, None =
    as many as there are slots of the longest. graphs: capture CUDA graphs. taps: those that the graphs keep.
    """

    kernels: KernelSetting = "auto"
    longest_row: int = 16
    max_rows: int | None = None
    graphs: bool = True
    taps: tuple[int, ...] = ()

    def rows(self, slots: int) -> int:
        """Tokens of a step's verify rows, at most."""
        every = slots * self.longest_row
        return every if self.max_rows is None else max(slots, min(every, self.max_rows))
