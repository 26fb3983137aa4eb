"""When an engine counts as sick: pure policy on its own Status."""

from __future__ import annotations

from cluster.contracts import Status


def sickness(status: Status, max_step_s: float) -> str | None:
    """Why the engine cannot be relied on, or None. max_step_s: the outer limit, which holds during warm-up too.

    An idle engine steps as well (heartbeats), so that a rank that hangs is noticed before the next request comes.
    """
    limit = min(max_step_s, status.step_limit_s)
    if status.seconds_since_step <= limit:
        return None
    return (
        f"no step has finished for {status.seconds_since_step:.1f} s (limit {limit:.3g} s) since step "
        f"{status.step}, with {status.running} running and {status.waiting} waiting requests"
    )
