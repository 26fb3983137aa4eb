"""When an engine counts as sick: pure policy on its own Status."""

from __future__ import annotations

from cluster.contracts import Status


def sickness(status: Status, max_step_s: float) -> str | None:
    """Why the engine cannot be relied on, or None. max_step_s: longest time without a finished step while busy."""
    if status.running + status.waiting == 0 or status.seconds_since_step <= max_step_s:
        return None
    return (
        f"no step has finished for {status.seconds_since_step:.1f} s (limit {max_step_s:g} s) since step "
        f"{status.step}, with {status.running} running and {status.waiting} waiting requests"
    )
