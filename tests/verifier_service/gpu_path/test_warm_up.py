"""After the warm-up serving launches no kernel in a form that would have to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.contracts import EngineInfo, EngineRequest, SamplingParams
from tests.verifier_service.gpu_path.tiny import OVERRIDES, TinyTarget
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import BLOCK_TOKENS, BLOCKS, SLOTS
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox
from verifier_service.engine import Engine
from verifier_service.scheduler import SchedulerLimits
from verifier_service.warm_up import warm_up

LONGEST_ROW, STEP_TOKENS = 4, 20
PROMPTS = {"short": 3, "long": 19, "shaped": 2}
SHAPED = SamplingParams(temperature=0.9, top_k=5, frequency_penalty=0.5, logprobs=1)
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


@contextmanager
def noted_forms() -> Iterator[set[Any]]:
    """Of every launch inside, all that a compiled kernel is kept under."""
    from triton.runtime.interpreter import InterpretedFunction

    run, forms = InterpretedFunction.run, set()

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        free = self.kwargs.get("do_not_specialize") or ()
        given = {**dict(zip(self.arg_names, args)), **{k: v for k, v in kwargs.items() if k != "grid"}}
        forms.add((self.fn.__name__, *((name, _form(name, value, free)) for name, value in given.items())))
        return run(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield forms


def _form(name: str, value: Any, free: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool) and name.islower() and name not in ("num_warps",):
        return "int" if name in free else (value == 1, value % 16 == 0)
    return "float" if isinstance(value, float) else value


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_serving_compiles_nothing_that_the_warm_up_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernels.ragged_tiles.MULTIPROCESSORS", 3)  # two requests are not cut into sections
    tiny_targets.build("qwen3", tmp_path, **{**OVERRIDES["qwen3"], **ONE_LAYER})
    target = TinyTarget(tmp_path, [], None)  # type: ignore[arg-type]  # no schedule is run
    runner = target.runner()
    limits = SchedulerLimits(
        slots=SLOTS, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, step_tokens=STEP_TOKENS, max_waiting=9
    )
    with noted_forms() as warmed:
        warm_up(runner, limits, LONGEST_ROW)
    with noted_forms() as served:
        said = _serve(runner, limits, PROMPTS)
    assert served
    assert served <= warmed
    assert said == _serve(target.runner("torch"), limits, PROMPTS), "the warm-up leaves nothing behind"


def _serve(runner: Any, limits: SchedulerLimits, prompts: dict[str, int]) -> dict[str, list[int]]:
    shape = runner.shape
    proposer = PartlyRight(dict.fromkeys(prompts, (5,) * 20), 200, longest=LONGEST_ROW - 1)
    engine = Engine(
        runner, limits, EngineInfo("e", "f", shape.max_context, shape.vocabulary, SLOTS, 4), proposer=proposer
    )
    inbox = Inbox()
    for name, count in prompts.items():
        sampling = SHAPED if name == "shaped" else SamplingParams()
        engine.submit(
            EngineRequest(name, tuple(range(3, 3 + count)), seed=1, max_new_tokens=3, sampling=sampling), inbox
        )
    engine.start()
    with mock.patch("tests.verifier_service.test_engine.WAIT_S", 60.0):
        inbox.wait(*prompts)
    engine.stop()
    return {name: inbox.text(name) for name in prompts}
