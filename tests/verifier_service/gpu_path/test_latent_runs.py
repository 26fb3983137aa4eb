"""Which rows of a step attend to latents in which form, and what memory the expanded form takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.batches import a_batch
from verifier_service.model.device import expanding_latents
from verifier_service.model.device.attended import attended
from verifier_service.model.device.expanding_latents import ExpandingLatentAttention
from verifier_service.model.device.latent_runs import AbsorbedRun, ExpandedRun, LatentRuns, latent_runs
from verifier_service.model.latent_shape import LatentShape
from verifier_service.model.step import PrefillPart

ROWS, CONTEXTS = [2, 1, 30, 20, 4, 9], [40, 7, 30, 35, 50, 12]


def runs(verify: int, expanding: set[int]) -> LatentRuns:
    """Of a step whose chunks of so many rows expand."""
    bounds = torch.tensor([0, *ROWS]).cumsum(0).tolist()
    prefill = tuple(
        PrefillPart(bounds[index], bounds[index + 1], index, CONTEXTS[index] - ROWS[index], -1)
        for index in range(verify, len(ROWS))
    )
    return latent_runs(
        a_batch(ROWS, CONTEXTS),
        verify,
        prefill,
        lambda rows, context: rows in expanding and context in CONTEXTS,
        lambda batch, rows: attended(batch, rows, None, 256),
    )


def test_neighbours_of_one_form_attend_together_and_verify_rows_stay_absorbed():
    verified, long, short, last = runs(verify=2, expanding={1, 2, 30, 20, 9})
    assert isinstance(verified, AbsorbedRun)
    assert isinstance(long, ExpandedRun)
    assert isinstance(short, AbsorbedRun)
    assert isinstance(last, ExpandedRun)
    assert [run.rows.start for run in (verified, long, short, last)] == [0, 3, 53, 57]
    assert [run.rows.stop for run in (verified, long, short, last)] == [3, 53, 57, 66]
    assert verified.attended.pieces[0].batch.context_lengths.tolist() == [40, 7]
    assert short.attended.pieces[0].batch.query_starts.tolist() == [0, 4]
    assert (long.batch.query_starts.tolist(), long.batch.context_starts.tolist()) == ([0, 30, 50], [0, 30, 65])
    assert (long.places, last.places) == (65, 12)
    assert (long.tables.shape[0], last.tables.shape[0]) == (2, 1)


def test_a_step_of_chunks_alone_begins_with_one():
    first, *_ = runs(verify=0, expanding={2, 1})
    assert isinstance(first, ExpandedRun)
    assert (first.rows, first.places) == (slice(0, 3), 47)


def test_a_step_without_expanded_chunks_has_no_runs():
    assert runs(verify=2, expanding=set()) == ()


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made without contents."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty):
            self.bytes += made.nbytes
        return made


@pytest.mark.parametrize("places", [5, 300])
def test_expanding_takes_its_workspace_whatever_the_context(places: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("verifier_service.model.latent_shape.SECTION_ENTRIES", 1)
    for name in ("copy_section", "attend_section"):
        monkeypatch.setattr(expanding_latents, name, lambda *_, **__: None)
    shape = LatentShape(heads=2, content=8, rotary=4, value=6, latent=16)
    up, nothing = torch.zeros(2 * 14, 16), torch.nn.Identity()
    layer = ExpandingLatentAttention(
        *(nothing, nothing, nothing, up, nothing), layer=0, shape=shape, scaling=1.0, interleaved=True
    )
    rows = min(places, 20)
    batch = runs(verify=2, expanding={30})[1]
    assert isinstance(batch, ExpandedRun)
    run = ExpandedRun(slice(0, rows), batch.batch, batch.tables, places)
    cache: Any = SimpleNamespace(latents=None, rotary=None, scales=None)
    content, turned, seen = (torch.zeros(rows, 2, width) for width in (8, 4, 6))
    with Allocations() as taken:
        layer._expand(content, turned, run, cache, seen)
    assert taken.bytes == shape.workspace_bytes(rows, itemsize=4)
