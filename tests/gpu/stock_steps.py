"""transformers' own forward of the same shape, to compare with."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from modeling.target_config import TargetConfig

USABLE = 0.8  # of the free memory, for a dense cache


class StockTarget:
    """Random weights, torch's attention (sdpa)."""

    def __init__(self, config: TargetConfig, dtype: torch.dtype, device: str):
        self._config = AutoConfig.from_pretrained(config.directory, local_files_only=True).get_text_config()
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(self._config, dtype=dtype, attn_implementation="sdpa").eval()
        self._dtype, self._device = dtype, device

    def seconds(self, requests: int, rows: int, context: int, repeats: int) -> float | None:
        """Of one forward of `rows` tokens a request behind a cache of the rest; None where that does not fit."""
        config = self._config
        heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None)
        shape = (requests, heads, context - rows, dim or config.hidden_size // config.num_attention_heads)
        wanted = 2 * config.num_hidden_layers * torch.Size(shape).numel() * self._dtype.itemsize
        if self._device == "cuda" and wanted > USABLE * torch.cuda.mem_get_info()[0]:
            return None
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = torch.zeros(2, *shape, dtype=self._dtype, device=self._device).unbind()
            cache.update(keys, values, layer)
        tokens = torch.ones(requests, rows, dtype=torch.long, device=self._device)
        times = []
        for _ in range(max(2, repeats // 4)):
            self._wait()
            began = time.perf_counter()
            self._model(tokens, past_key_values=cache, use_cache=True)
            self._wait()
            times.append(time.perf_counter() - began)
            cache.crop(-rows)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
