"""The drafter on the kernels drafts what it drafts with torch's operations. Graphs apart, it is the path of a GPU."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from cluster.errors import ConfigError
from cluster.link.messages import Draft, DraftAnswer, DraftAsk
from drafter_service.attention import AttendEach, AttendPadded
from drafter_service.buckets import Bucket, Buckets
from drafter_service.engine import DrafterEngine, block_drafter
from drafter_service.fused import FusedDFlash
from drafter_service.kernel_blocks import KernelDrafter
from drafter_service.loading import load_drafter
from drafter_service.profile import measured_memory
from drafter_service.selector import FusedSelector
from drafter_service.step_graphs import captured
from tests.drafter_service.pairs import FULL, SLIDING, second, settings_for, write_drafter, write_target
from tests.drafter_service.peers import RecordingPeer, features
from tests.held_memory import HeldMemory

# Padding rows hold whatever their memory held.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value")]

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
WINDOW = 40
DRAFTERS: dict[str, dict[str, Any]] = {
    "mixed": {"layer_types": [SLIDING, FULL], "sliding_window": 7},
    "shaped": {
        "layer_types": [FULL, FULL],
        "num_key_value_heads": 1,
        "attention_bias": True,
        "dflash_config": {
            "target_layer_ids": [0, 2],
            "mask_token_id": 3,
            "input_embedding_scale": 1.5,
            "output_multiplier": 0.5,
            "final_logit_softcapping": 5.0,
        },
    },
}


class Pair:
    """The same drafter twice, on the kernels and on torch's operations, told and asked the same."""

    def __init__(self, target: Path, drafter: Path) -> None:
        settings = {"window": WINDOW, "max_contexts": 5}
        self.kernels, self.torch = (
            DrafterEngine(settings_for(target, drafter, kernels=kernels, **settings), threaded=False)
            for kernels in ("triton", "torch")
        )
        self.peers = RecordingPeer(), RecordingPeer()
        for engine, peer in zip((self.kernels, self.torch), self.peers):
            engine.linked(peer)

    def append(self, context_id: str, start: int, rows: torch.Tensor) -> None:
        for engine, peer in zip((self.kernels, self.torch), self.peers):
            engine.append(peer, context_id, start, rows)

    def close(self, *context_ids: str) -> None:
        for engine, peer in zip((self.kernels, self.torch), self.peers):
            engine.close_contexts(peer, context_ids)
            engine.run_once()

    def ask(self, *asks: DraftAsk) -> list[DraftAnswer]:
        """The answers of both, which are the same."""
        frames = []
        for engine, peer in zip((self.kernels, self.torch), self.peers):
            engine.draft(peer, Draft(asks))
            frames.append(peer.frames[-1])
        for own, right in zip(*frames, strict=True):
            assert (own.context_id, own.base, own.token_ids) == (right.context_id, right.base, right.token_ids)
            assert own.confidence == pytest.approx(right.confidence, rel=1e-3)
        return frames[0]


def made_of(target: Path, drafter: Path) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return Pair(target, drafter)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture(scope="module", params=DRAFTERS)
def made(request: pytest.FixtureRequest, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made_of(target, write_drafter(tmp_path_factory.mktemp("pair") / "drafter", **DRAFTERS[request.param]))


@pytest.fixture
def pair(made: Pair) -> Iterator[Pair]:
    yield made
    made.close(*"abcde")


def test_the_largest_steps_of_many_contexts_are_measured_over_a_few(target: Path, tmp_path: Path, monkeypatch):
    """Kernels that do nothing take the same memory."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    drafter = write_drafter(tmp_path / "drafter")
    with HeldMemory(0) as meter:
        loaded = load_drafter(settings_for(target, drafter, kernels="triton", window=512))
        make = partial(block_drafter, loaded, graphs=False)
        found, step = measured_memory(loaded, make, meter, 1.0, max_queue=8)
    hidden = 32 * 6 * 4  # of one block
    assert step.block > hidden
    assert loaded.head_weight is not None
    assert dict(found.parts)["weights and what is beside them"] > loaded.head_weight.nbytes
    assert step.smallest > 4096 * hidden / 6


def test_ragged_batches_of_any_size_one_after_another_get_the_same_drafts(pair: Pair):
    """Later and smaller batches find the numbers of earlier and larger ones in the buffers."""
    for seed, (name, size) in enumerate({"a": 5, "b": 31, "c": 11, "d": 1, "e": 20}.items()):
        pair.append(name, 0, features(size, seed))
    answers = pair.ask(*(DraftAsk(name, base, 7, rows) for name, base, rows in
                         (("a", 5, 5), ("b", 31, 2), ("c", 11, 4), ("d", 1, 1), ("e", 20, 5))))  # fmt: skip
    assert [len(answer.token_ids) for answer in answers] == [5, 2, 4, 1, 5]
    pair.append("b", 31, features(3, seed=8))
    pair.ask(DraftAsk("b", 34, 9, 3))
    pair.ask(DraftAsk("c", 10, 1, 5), DraftAsk("a", 4, 2, 1))  # behind their watermarks
    pair.append("e", 20, features(30, seed=9))  # beyond the window
    pair.ask(DraftAsk("e", 50, 4, 4), DraftAsk("a", 5, 5, 2), DraftAsk("b", 34, 6, 5))


def test_a_context_that_comes_newest_first_and_wraps_around_its_slot_gets_the_same_drafts(pair: Pair):
    rows = features(70)
    pair.append("a", 30, rows[30:38])
    pair.ask(DraftAsk("a", 38, 7, 5))
    pair.append("a", 5, rows[5:30])
    pair.append("a", 38, rows[38:60])
    pair.ask(DraftAsk("a", 60, 7, 5))
    pair.ask(DraftAsk("a", 57, 7, 5), DraftAsk("unknown", 3, 7, 5))


def test_a_slot_that_held_no_numbers_drafts_as_if_it_were_new(pair: Pair):
    pair.append("a", 0, torch.full((20, 32), float("nan")))
    pair.close("a")
    pair.append("a", 0, features(3))
    assert pair.ask(DraftAsk("a", 3, 7, 5))[0].token_ids


def test_a_second_version_drafts_the_same_in_ragged_batches_and_without_torch(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"block_size": 4, "layer_types": [SLIDING, FULL], "sliding_window": 7, **second(selector_top_k=3)}
    pair = made_of(target, write_drafter(tmp_path / "drafter", scale=0.5, **changes))
    for seed, (name, size) in enumerate({"a": 5, "b": 11, "c": 2}.items()):
        pair.append(name, 0, features(size, seed))
    asks = DraftAsk("a", 5, 7, 2), DraftAsk("b", 11, 2, 3), DraftAsk("c", 2, 9, 1)  # padded to 4 blocks of 4 rows
    right = pair.ask(*asks)
    assert [len(answer.token_ids) for answer in right] == [2, 3, 1]
    refuse_torch(monkeypatch)
    pair.kernels.append(pair.peers[0], "d", 0, features(11, seed=1))
    pair.kernels.draft(pair.peers[0], Draft((DraftAsk("d", 11, 2, 3),)))
    assert pair.peers[0].frames[-1][0].token_ids == right[1].token_ids


def test_what_fills_a_bucket_is_counted(pair: Pair):
    before = pair.kernels.counters
    for name in "abc":
        pair.append(name, 0, features(9))
    pair.ask(DraftAsk("a", 9, 7, 5), DraftAsk("b", 9, 7, 2), DraftAsk("c", 9, 7, 1))
    counted = {name: pair.kernels.counters[name] - before[name] for name in ("rows", "padding_rows", "eager_steps")}
    assert counted == {"rows": 11, "padding_rows": 5, "eager_steps": 1}  # 3 blocks of 6, 3 and 2 rows in 4 x 4


def refuse_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step on the kernels must not call raises from here on."""

    def refuse(name: str) -> Any:
        def refused(*_: Any, **__: Any) -> None:
            raise AssertionError(f"{name} ran")

        return refused

    for owner, names in (
        (torch.nn.functional, ("scaled_dot_product_attention", "rms_norm", "silu", "softmax")),
        (torch.Tensor, ("softmax", "argmax", "index_copy_")),
        (FusedDFlash, ("forward", "context_rows", "final_norm")),
        (AttendEach, ("__call__",)),
        (AttendPadded, ("__call__",)),
        (FusedSelector, ("choose",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse(name))
    for file in KERNELS.glob("*/reference.py"):
        module = importlib.import_module(f"kernels.{file.parent.name}.reference")
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith(("_", "check")):
                monkeypatch.setattr(module, name, refuse(name))


def test_no_torch_reference_runs_in_a_step(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    pair.append("a", 0, features(9))
    right = pair.ask(DraftAsk("a", 9, 7, 5))
    refuse_torch(monkeypatch)
    pair.kernels.append(pair.peers[0], "b", 0, features(9))
    pair.kernels.draft(pair.peers[0], Draft((DraftAsk("b", 9, 7, 5),)))
    assert pair.peers[0].frames[-1][0].token_ids == right[0].token_ids


def test_where_no_graph_can_be_captured_it_is_said_and_drafts_go_on(pair: Pair, caplog: pytest.LogCaptureFixture):
    drafter = pair.kernels._drafter
    assert isinstance(drafter, KernelDrafter)
    if not torch.cuda.is_available():
        assert captured(drafter._forward, Buckets(1, 2), drafter._describe_nothing) == {}
        assert "launch by launch" in caplog.text
    pair.append("a", 0, features(9))
    assert pair.ask(DraftAsk("a", 9, 7, 1))[0].token_ids


def test_a_captured_bucket_is_replayed_and_any_other_runs_launch_by_launch(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """The graph is the step itself here: what only a GPU can record, a CPU repeats."""
    drafter = pair.kernels._drafter
    assert isinstance(drafter, KernelDrafter)
    bucket = Bucket(1, 2, 1)
    replayed = SimpleNamespace(replay=lambda: drafter._forward(bucket))
    monkeypatch.setattr(drafter, "_graphs", {bucket: replayed})
    before = drafter.counters["eager_steps"]
    pair.append("a", 0, features(9))
    pair.ask(DraftAsk("a", 9, 7, 1))
    assert drafter.counters["eager_steps"] == before
    pair.append("a", 9, features(1))
    pair.ask(DraftAsk("a", 10, 7, 2))
    assert drafter.counters["eager_steps"] == before + 1


def test_the_kernels_are_refused_on_a_cpu_without_the_interpreter(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drafter = write_drafter(tmp_path / "drafter")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ConfigError, match=r"drafter.kernels is 'triton' but device is 'cpu'.*set kernels to 'auto'"):
        DrafterEngine(settings_for(target, drafter, kernels="triton"), threaded=False)
    engine = DrafterEngine(settings_for(target, drafter, max_contexts=1), threaded=False)
    assert "padding_rows" not in engine.counters
