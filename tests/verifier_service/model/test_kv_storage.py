"""KV caches in bfloat16 and in fp8 with scales: what they round, what they hold, and that nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeling.families import shard_map
from modeling.footprint import cache_footprint
from modeling.kv_dtype import KvDtype
from modeling.target_config import read_target_config
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import BLOCK_TOKENS, BLOCKS, SLOTS, schedule, sequences
from verifier_service.config import VerifierSettings
from verifier_service.model.attention import paged_attention
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage, ScaledVectors, decoded
from verifier_service.model.latent_attention import LatentAttention, LatentShape
from verifier_service.model.step import Step, StepBuilder
from verifier_service.model.touchpoints import text_shapes
from verifier_service.plan import StepPlan
from verifier_service.rank import build_runner

HEADS, KV_HEADS, DIM = 6, 2, 16
WINDOW = 7
LATENT = LatentShape(heads=3, content=8, rotary=4, value=6, latent=16)
NARROW: tuple[KvDtype, ...] = ("bfloat16", "float8_e4m3")
BOUND = {"bfloat16": 0.01, "float8_e4m3": 0.15}  # of the largest output


def storage(kv_dtype: KvDtype, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> KvStorage:
    return KvStorage(blocks, BLOCK_TOKENS, kv_dtype, dtype, "cpu")


def read_back(vectors: torch.Tensor, kv_dtype: KvDtype) -> torch.Tensor:
    """[tokens, ..., width], as a cache gives it back."""
    blocks = -(-len(vectors) // BLOCK_TOKENS)
    cache = storage(kv_dtype, vectors.dtype, blocks)._vectors(kv_dtype)(*vectors.shape[1:])
    cache.write(torch.arange(len(vectors)), vectors)
    return cache.read(torch.arange(blocks))[: len(vectors)]


@dataclass
class Engine:
    """Runs plans over one layer's cache of each kind."""

    kv_dtype: KvDtype

    def __post_init__(self) -> None:
        self._tables = BlockTables(SLOTS, 64, BLOCK_TOKENS, BLOCKS)
        kept = storage(self.kv_dtype)
        self._builder = StepBuilder(
            self._tables,
            kept.layers({0: (KV_HEADS, DIM)}),
            kept.latents({0: (LATENT.latent, LATENT.rotary)}),
            None,
            windows=(WINDOW,),
            max_context=256,
            dtype=torch.float32,
            device="cpu",
        )

    def step(self, plan: StepPlan) -> Step:
        for slot in plan.released:
            self._tables.release(slot)
        for slot, block in plan.new_blocks:
            self._tables.append(slot, block)
        return self._builder.build(plan)


def plans() -> list[StepPlan]:
    """Ragged: prompt chunks beside verify rows, of whose drafts some are rolled back; blocks come and go."""
    steps = schedule(sequences(2, 250, seed=3), 250, seed=5)
    return [step.plan for step in steps if step.plan.verify or step.plan.prefill]


@pytest.mark.parametrize("options", [{}, {"sliding_window": WINDOW, "s_aux": torch.linspace(-1, 2, HEADS)}])
@pytest.mark.parametrize("kv_dtype", NARROW)
def test_attention_is_that_over_the_rounded_keys_and_values(kv_dtype: KvDtype, options: dict[str, Any]):
    generator = torch.Generator().manual_seed(1)
    narrow, rounded, exact = Engine(kv_dtype), Engine("auto"), Engine("auto")
    module: Any = SimpleNamespace(layer_idx=0)
    worst = largest = 0.0
    for plan in plans():
        steps = [engine.step(plan) for engine in (narrow, rounded, exact)]
        tokens = len(steps[0].positions)
        query, keys, values = (
            torch.randn(1, heads, tokens, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        keys, values = keys * 3, values * 0.02  # scales differ
        short = [read_back(x[0].transpose(0, 1), kv_dtype).transpose(0, 1)[None] for x in (keys, values)]
        results = [
            paged_attention(module, query, k, v, None, step=step, scaling=0.1, **options)[0]
            for step, (k, v) in zip(steps, [(keys, values), short, (keys, values)], strict=True)
        ]
        assert torch.equal(results[0], results[1])
        worst = max(worst, (results[0] - results[2]).abs().max().item())
        largest = max(largest, results[2].abs().max().item())
    assert 0 < worst < BOUND[kv_dtype] * largest


@pytest.mark.parametrize("expands", [True, False])
@pytest.mark.parametrize("kv_dtype", NARROW)
def test_latent_attention_stays_within_its_bound(kv_dtype: KvDtype, expands: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LatentShape, "expands", lambda *_: expands)
    generator = torch.Generator().manual_seed(2)
    hidden = 24
    layers = [nn.Linear(hidden, width, bias=False) for width in (LATENT.heads * 12, LATENT.cached)]
    for layer in layers:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * hidden**-0.5
    attention = LatentAttention(
        layers[0],
        layers[1],
        nn.RMSNorm(LATENT.latent),
        torch.randn(LATENT.heads * 14, LATENT.latent, generator=generator) * LATENT.latent**-0.5,
        nn.Identity(),
        layer=0,
        shape=LATENT,
        scaling=12**-0.5,
        interleaved=True,
    )
    narrow, exact = Engine(kv_dtype), Engine("auto")
    worst = largest = 0.0
    with torch.inference_mode():
        for plan in plans():
            got, want = narrow.step(plan), exact.step(plan)
            x = torch.randn(1, len(want.positions), hidden, generator=generator)
            turn = want.positions[None, :, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            rotary = (turn.cos(), turn.sin())
            results = [attention(x, position_embeddings=rotary, step=step)[0] for step in (got, want)]
            worst = max(worst, (results[0] - results[1]).abs().max().item())
            largest = max(largest, results[1].abs().max().item())
    assert 0 < worst < BOUND[kv_dtype] * largest


def test_the_rotary_key_beside_a_latent_is_rounded_no_further_than_bfloat16():
    cache = storage("float8_e4m3").latents({0: (16, 4)})[0]
    latents = torch.randn(8, 20)
    cache.write(torch.arange(8), latents)
    got = cache.read(torch.arange(2))
    assert torch.equal(got[:, 16:], latents[:, 16:].bfloat16().float())
    assert torch.equal(got[:, :16], read_back(latents[:, :16], "float8_e4m3"))


def test_every_code_of_e4m3_is_read_as_torch_reads_it():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)  # all but NaN
    assert torch.equal(decoded(codes).float() * 256, codes.view(torch.float8_e4m3fn).float())


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.integers(-60, 60),
    spread=st.integers(0, 30),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_element_is_off_by_more_than_a_sixteenth(exponent: int, spread: int, seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** (exponent - spread * torch.rand(5, 3, 8, generator=generator))
    vectors = (sizes * torch.randn(5, 3, 8, generator=generator)).to(dtype)
    error = (read_back(vectors, "float8_e4m3") - vectors).float().abs()
    floor = vectors.float().abs().amax(dim=-1, keepdim=True) * 2.0**-17
    assert (error <= torch.maximum(vectors.float().abs() / 16, floor)).all()


def test_what_was_read_is_stored_again_without_loss():
    once = read_back(torch.randn(9, 2, 16), "float8_e4m3")
    assert torch.equal(read_back(once, "float8_e4m3"), once)


def test_zeros_stay_zeros_and_undefined_numbers_undefined():
    vectors = torch.zeros(4, 2, 8)
    vectors[1, 0, 3], vectors[2, 1, 0] = float("nan"), float("inf")
    got = read_back(vectors, "float8_e4m3")
    assert torch.equal(got[[0, 3]], vectors[[0, 3]])
    assert got[1, 0].isnan().any()
    assert got[2, 1].isnan().any()
    assert torch.equal(got[1, 1], vectors[1, 1])  # another head's


def test_the_compute_dtypes_cache_is_the_plain_one():
    for kept in (
        storage("auto", torch.bfloat16),
        storage("bfloat16", torch.bfloat16),
        storage("float32", torch.float32),
    ):
        assert type(kept.layers({0: (2, 16)})[0]).__name__ == "LayerCache"
        assert type(kept.latents({0: (16, 4)})[0]).__name__ == "LatentCache"


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_5", "deepseek_v3"])
def test_what_is_held_is_what_the_plan_counts(family: str, tmp_path: Path):
    tiny_targets.build(family, tmp_path)
    config = read_target_config(tmp_path)
    counted = {}
    for kv_dtype in ("auto", "float32", *NARROW):
        given = {"target": str(tmp_path), "dtype": "float32", "device": "cpu", "kv_cache_tokens": 64}
        of_file = VerifierSettings.model_validate({**given, "speculation": {"mode": "none"}, "kv_dtype": kv_dtype})
        footprint = cache_footprint(config, text_shapes(config), shard_map(config, 1), 1, 4, kv_dtype)
        counted[kv_dtype] = build_runner(of_file).shape.kv_bytes_per_token
        assert counted[kv_dtype] == footprint.token_bytes
    assert counted["auto"] == counted["float32"] == 2 * counted["bfloat16"]
    elements = counted["auto"] // 4
    rotary = 3 * 8 if family == "deepseek_v3" else 0  # in bfloat16
    vectors = 3 if family == "deepseek_v3" else elements // 16
    assert counted["float8_e4m3"] == elements + rotary + 2 * vectors


@pytest.mark.parametrize(
    ("kv_dtype", "message"), [("int8", "kv_dtype\n.*'float8_e4m3'"), ("float32", "kv_dtype 'float32' is wider than")]
)
def test_a_dtype_that_cannot_serve_is_refused(kv_dtype: str, message: str):
    with pytest.raises(ValueError, match=message):
        VerifierSettings.model_validate({"target": "t", "speculation": {"mode": "none"}, "kv_dtype": kv_dtype})


def test_a_scaled_cache_holds_codes_and_scales_as_the_kernel_reads_them():
    cache: Any = storage("float8_e4m3").layers({0: (KV_HEADS, DIM)})[0]
    assert isinstance(cache.keys, ScaledVectors)
    assert cache.keys.codes.shape == (BLOCKS, BLOCK_TOKENS, KV_HEADS, DIM)
    assert cache.keys.scales.shape == (BLOCKS, BLOCK_TOKENS, KV_HEADS)
