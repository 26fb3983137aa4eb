"""What a benchmark says when it cannot start or go on."""

from __future__ import annotations

from cluster.errors import PacelineError


class BenchError(PacelineError):
    """Wrong input or a part that failed to start: names the option, the value and the cure."""
