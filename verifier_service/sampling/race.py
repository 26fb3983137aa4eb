"""Random numbers that are a hash of (seed, choice, absolute position, token id), and the Gumbel race they decide.

A sample does not depend on the batch, on the number of ranks, on how many rows are verified at once or on whether
drafts were used. argmax(log p + Gumbel noise) draws exactly from p.
"""

from __future__ import annotations

import torch

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def race(values: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """values + Gumbel noise, float64 [rows, ids]; the largest wins. values: log p, up to a constant of each row."""
    return values - uniform(keys[:, None], ids).log_().neg_().log_()


def uniform(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1), a pure function of key and token id (broadcast against each other): splitmix64."""
    bits = _mix(token_ids * _GOLDEN + keys)
    return _shift(bits, 11, bits).to(torch.float64).add_(0.5).mul_(2.0**-53)


def row_keys(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: all that a row's random numbers depend on, apart from the token id."""
    keys = _mix(seeds + _GOLDEN)
    keys = _mix(keys + (choices + 1) * _GOLDEN)
    return _mix(keys + (positions + 1) * _GOLDEN)


def signed(number: int) -> int:
    """Any integer seed as the int64 with the same low 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, in place, on int64 (which wraps around as the unsigned arithmetic does)."""
    shifted = torch.empty_like(bits)
    bits.bitwise_xor_(_shift(bits, 30, shifted)).mul_(_MIX1)
    bits.bitwise_xor_(_shift(bits, 27, shifted)).mul_(_MIX2)
    return bits.bitwise_xor_(_shift(bits, 31, shifted))


def _shift(bits: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift to the right."""
    torch.bitwise_right_shift(bits, count, out=out)
    return out.bitwise_and_((1 << (64 - count)) - 1)
