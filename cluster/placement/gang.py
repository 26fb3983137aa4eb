"""A gang: the model processes of one replica, placed bundle by bundle, that live and die together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import PacelineError
from cluster.placement.process import Main, service_actor

START_SILENCE_S = 30.0  # of a process that loads: longer than it may be kept from answering, as by an import
START_PING_S = 2.0


class GangError(PacelineError):
    """A member did not start, died or stopped answering; names the rank and why."""


class Gang:
    """One process per entry of `resources`, rank i in bundle i + 1 (bundle 0 is the replica's own).

    role and replica_id name the processes: `ray::ROLE` in ps, ROLE:REPLICA_ID:RANK as a named actor. Must be made
    inside a replica with a placement group. Holds the only handles: when this object's process dies, Ray
    ends the members; `kill` does it at once.
    """

    def __init__(
        self, role: str, replica_id: str, resources: Sequence[dict[str, float]], preload: tuple[str, ...], threads: int
    ):
        group = ray.util.get_current_placement_group()
        if group is None:
            raise GangError("a gang needs the placement group of its replica; the deployment has no bundles")
        actor = service_actor(role)
        self._processes: list[Any] = [
            actor.options(
                name=f"{role}:{replica_id}:{rank}",
                num_cpus=wanted.get("CPU", 0),
                num_gpus=wanted.get("GPU", 0),
                resources={name: count for name, count in wanted.items() if name not in ("CPU", "GPU")},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1),
            ).remote(preload, threads)
            for rank, wanted in enumerate(resources)
        ]
        self._runs: list[Any] = []

    async def rendezvous(self, timeout_s: float) -> tuple[str, int]:
        """Host of rank 0 and a port that is free there."""
        first = self._processes[0]
        return await self._within(asyncio.gather(first.host.remote(), first.free_port.remote()), timeout_s, 0)

    async def start(self, main: Callable[[int], Main], timeout_s: float) -> list[str]:
        """Run main(rank) everywhere; what each reported when ready.

        Raises GangError as soon as any fails, or has answered nothing for START_SILENCE_S once it lives.
        """
        self._runs = [process.run.remote(main(rank)) for rank, process in enumerate(self._processes)]
        ready = asyncio.gather(*(self._ready(rank, timeout_s) for rank in range(len(self._processes))))
        ended = asyncio.ensure_future(self.ended())
        watches = [asyncio.ensure_future(self._awake(rank, timeout_s)) for rank in range(len(self._processes))]
        tasks: list[asyncio.Future[Any]] = [ready, ended, *watches]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not ready.done():
                raise GangError(ended.result())
            if not ready.done():
                for watch in watches:
                    if watch.done():
                        watch.result()
            return list(await ready)
        finally:
            for task in tasks:
                task.cancel()

    async def ended(self) -> str:
        """Waits until any member's main function is over, whatever the cause: which rank, and why."""
        watches = {asyncio.ensure_future(_outcome(run)): rank for rank, run in enumerate(self._runs)}
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watch in watches:
                watch.cancel()
        first = min(done, key=lambda watch: watches[watch])
        return f"rank {watches[first]} {first.result()}"

    async def ping(self, timeout_s: float) -> None:
        """Raises GangError naming the rank that does not answer in time."""
        pings = (self._within(process.ping.remote(), timeout_s, rank) for rank, process in enumerate(self._processes))
        await asyncio.gather(*pings)

    def kill(self) -> None:
        for process in self._processes:
            ray.kill(process, no_restart=True)

    async def _awake(self, rank: int, timeout_s: float) -> None:
        """Until it answers nothing any more: a process that is stopped would be waited for until it has to be ready."""
        silence_s = timeout_s  # it may still have to be placed
        while True:
            await self._within(self._processes[rank].ping.remote(), silence_s, rank)
            silence_s = START_SILENCE_S
            await asyncio.sleep(START_PING_S)

    async def _ready(self, rank: int, timeout_s: float) -> str:
        return await self._within(self._processes[rank].ready.remote(timeout_s), timeout_s + 5, rank)

    async def _within(self, call: Any, timeout_s: float, rank: int) -> Any:
        try:
            return await asyncio.wait_for(_awaitable(call), timeout_s)
        except TimeoutError as error:
            raise GangError(f"rank {rank} did not answer within {timeout_s:g} s") from error
        except ray.exceptions.RayError as error:
            raise GangError(f"rank {rank} {_reason(error)}") from error


async def _outcome(run: Any) -> str:
    try:
        await run
    except ray.exceptions.RayError as error:
        return _reason(error)
    return "left its loop"


async def _awaitable(call: Any) -> Any:
    return await call


def _reason(error: ray.exceptions.RayError) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"failed: {type(error.cause).__name__}: {error.cause}" if error.cause is not None else f"failed: {error}"
    return f"died ({type(error).__name__})"
