"""Two ranks over gloo that take tokens each in its part of the vocabulary, beside one rank that has all logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.contracts import EngineInfo, EngineRequest, SamplingParams
from modeling.kernel_choice import KernelSetting
from modeling.parallel import VocabularyHead
from modeling.ranks import RankGroup, join_ranks
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox
from tests.verifier_service.test_grammar import END, OPEN, tokenizer
from verifier_service.engine import Engine, follow
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.runner import TargetRunner
from verifier_service.packing import PlanChannel
from verifier_service.plan import RowDraw
from verifier_service.proposers.face import Proposer
from verifier_service.proposers.plain import NoProposer
from verifier_service.sampling.draw import every_row
from verifier_service.sampling.kernel_draw import draw_by_kernels
from verifier_service.scheduler import SchedulerLimits

SIZE, WAIT_S, BLOCK_TOKENS, BLOCKS, SLOTS = 2, 180.0, 4, 40, 4
CANDIDATES = 16  # so few that a flat row's top_p is left open
PARAMS = {
    "greedy": SamplingParams(),
    "seeded": SamplingParams(temperature=0.9),
    "top_k": SamplingParams(temperature=1.5, top_k=5),
    "min_p": SamplingParams(temperature=1.5, min_p=0.3),
    "top_p": SamplingParams(temperature=0.05, top_p=0.8),
    "flat": SamplingParams(temperature=5.0, top_p=0.9),
    "penalised": SamplingParams(temperature=0.9, frequency_penalty=0.5),
    "told": SamplingParams(temperature=0.9, top_p=0.8, logprobs=2),
    "bound": SamplingParams(temperature=0.9),
}
GRAMMARS = {"bound": OPEN}
LATE = ["seeded", "penalised", "told", "bound"]


@dataclass(frozen=True)
class Said:
    """texts: by kind; told: the tokens that had log probabilities. gathers: rows of each gather of logits. steps,
    ahead, accepted: the engine's counters.
    """

    texts: dict[str, list[int]]
    told: list[list[int]]
    gathers: list[int]
    steps: float
    ahead: float
    accepted: float


NOTHING = Said({}, [], [], 0, 0, 0)


def run(directory: Path, room: Path) -> dict[str, Any]:
    """What both ranks found: see _rank. This process is rank 0. Raises what one of them raised."""
    other = mp.spawn(_other_rank, (str(directory), str(room)), nprocs=1, join=False, daemon=True)
    _rank(0, str(directory), str(room))
    other.join()
    return {f"rank {rank}": json.loads((room / f"{rank}.json").read_text()) for rank in range(SIZE)}


def _other_rank(_: int, directory: str, room: str) -> None:
    _rank(1, directory, room)


def _rank(rank: int, directory: str, room: str) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{room}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=WAIT_S)
    )
    found: dict[str, Any] = {"rows": _rows(join_ranks(rank, SIZE, dist.group.WORLD, "cpu"))}
    alone = NOTHING
    if rank == 0:
        alone = _said(directory, list(PARAMS), kernels="torch", runs_ahead=False)
        found["one"] = asdict(_said(directory, LATE))
    ranks: dict[str, Any] = {"rank": rank, "size": SIZE, "group": dist.group.WORLD}
    found["alone"] = asdict(alone)
    found["ahead"] = asdict(_said(directory, ["greedy", "seeded", "top_k", "top_p"], **ranks))
    found["late"] = asdict(_said(directory, LATE, **ranks))
    found["torch"] = asdict(_said(directory, LATE, kernels="torch", **ranks))
    drafts = PartlyRight(alone.texts, 200, longest=3)
    found["mixed"] = asdict(_said(directory, ["greedy", "flat", "penalised"], drafts, **ranks))
    (Path(room) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _said(
    directory: str,
    kinds: Sequence[str],
    proposer: Proposer | None = None,
    *,
    kernels: KernelSetting = "triton",
    runs_ahead: bool = True,
    **ranks: Any,
) -> Said:
    few = partial(_shard_sampling(), candidates=CANDIDATES)
    with mock.patch("verifier_service.model.device.executor.ShardSampling", few):
        runner = TargetRunner(
            directory,
            num_blocks=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            num_slots=SLOTS,
            dtype=torch.float32,
            device="cpu",
            kernel_path=KernelPath(kernels, longest_row=4),
            **ranks,
        )
    assert runner.shape.draws == (kernels == "triton")
    channel = PlanChannel(ranks.get("group"))
    with counted_gathers() as gathers:
        if ranks.get("rank"):
            follow(runner, channel)
            return replace(NOTHING, gathers=gathers)
        shape = runner.shape
        limits = SchedulerLimits(slots=SLOTS, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, step_tokens=32, max_waiting=9)
        info = EngineInfo("e", "f", shape.max_context, shape.vocabulary, SLOTS, 4)
        grammars = GrammarCompiler(tokenizer().to_str(), shape.vocabulary, frozenset({END}))
        engine = Engine(
            runner,
            limits,
            info,
            proposer=proposer or NoProposer(),
            channel=channel,
            grammars=grammars,
            runs_ahead=runs_ahead,
        )
        inbox = Inbox()
        for kind in kinds:
            engine.submit(
                EngineRequest(
                    kind,
                    (5, 6, 7),
                    seed=2**64 - 9,
                    max_new_tokens=4,
                    sampling=PARAMS[kind],
                    grammar=GRAMMARS.get(kind),
                ),
                inbox,
            )
        engine.start()
        with mock.patch("tests.verifier_service.test_engine.WAIT_S", WAIT_S):
            inbox.wait(*kinds)
        engine.stop()
        counters = engine.status().counters
    texts = {kind: inbox.text(kind) for kind in kinds}
    told = [[token for token, _ in each.top] for d in inbox.deltas.get("told", ()) for each in d.logprobs or ()]
    return Said(texts, told, gathers, counters["steps"], counters["steps_ahead"], counters["accepted_tokens"])


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """Rows of each gather to rank 0: only logits go that way."""
    gather, seen = RankGroup.gather_to_first, []

    def noted(self: RankGroup, part: torch.Tensor) -> list[torch.Tensor] | None:
        if self.size > 1:
            seen.append(len(part))
        return gather(self, part)

    with mock.patch.object(RankGroup, "gather_to_first", noted):
        yield seen


def _rows(ranks: RankGroup) -> dict[str, Any]:
    """Rows of all kinds in one step of random logits, one of them not finite, over an uneven vocabulary."""
    vocabulary = 201
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(8, 8, generator=generator) * 2
    weight = torch.randn(vocabulary, 8, generator=generator)
    hidden[7, 3] = float("nan")
    kinds = [PARAMS[kind] for kind in ("seeded", "top_k", "min_p", "top_p", "flat")]
    kinds.append(SamplingParams(temperature=1.5, top_k=CANDIDATES + 1))
    draws = [RowDraw(at + 1, 1, 7 + at, at - 3, at, kind) for at, kind in enumerate(kinds)]
    share = -(-vocabulary // SIZE)
    own = weight[ranks.rank * share :][:share].contiguous()
    head = VocabularyHead(own, vocabulary, ranks, _operations())
    with counted_gathers() as gathers:
        tokens = _shard_sampling()(head, CANDIDATES).take(hidden, draws)
    want = draw_by_kernels(hidden @ weight.t(), every_row(draws, len(hidden)))
    return {"tokens": tokens.tolist(), "want": want.tolist(), "gathers": len(gathers)}


def _operations() -> Any:
    from modeling.kernel_operations import TritonOperations  # likewise

    return TritonOperations()


def _shard_sampling() -> Any:
    from verifier_service.model.device.shard_sampling import ShardSampling  # brings triton, interpreted by then

    return ShardSampling
