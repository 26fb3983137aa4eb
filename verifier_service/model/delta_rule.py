"""The gated delta rule over short windows: one token, or one block of a verify. Plain torch, float32.

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,  o_t = S_t^T q_t   (arXiv 2412.06464)
"""

from __future__ import annotations

import torch


def unit(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / |x| over the last dimension, as the reference kernels do it."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step. query, key [N, key_dim] (unit length, query scaled), value [N, value_dim], log_decay, beta [N];
    memory [N, key_dim, value_dim]. Returns outputs [N, value_dim] and the new memory. N = rows x heads.
    """
    memory = memory * log_decay.exp()[:, None, None]
    error = value - torch.bmm(key[:, None], memory)[:, 0]
    memory = torch.baddbmm(memory, key[:, :, None], (error * beta[:, None])[:, None])
    return torch.bmm(query[:, None], memory)[:, 0], memory


def one_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whole block at once. query, key [..., Q, key_dim], value [..., Q, value_dim], log_decay, beta [..., Q],
    memory [..., key_dim, value_dim]. Returns outputs [..., Q, value_dim], the running decay [..., Q] and the corrected
    values [..., Q, value_dim] from which any prefix can be committed. Rows may be padded at their end with anything.
    """
    decay = log_decay.cumsum(-1)
    reach = (decay[..., :, None] - decay[..., None, :]).exp()  # [..., i, j]: what is left at i of a write at j
    since = decay.exp()[..., None]
    scaled = key * beta[..., None]
    system = scaled @ key.transpose(-1, -2)
    system.mul_(reach)  # only its strictly lower part is read
    right = torch.sub(value * beta[..., None], (scaled * since) @ memory)
    corrected = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    attention = (query @ key.transpose(-1, -2)).mul_(reach).tril_()
    return (query * since) @ memory + attention @ corrected, decay, corrected


def token_by_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q steps, each the same whatever comes before or after it. query, key [N, Q, key_dim], value [N, Q, value_dim],
    decay (a factor), beta [N, Q]; memory [N, key_dim, value_dim], overwritten with the new one. N = rows x heads.
    Returns outputs and corrected values, both [N, Q, value_dim].
    """
    pairs = torch.stack([key, query], dim=2).transpose(0, 1).contiguous()  # [Q, N, 2, key_dim]
    match = (query * key).sum(-1, keepdim=True)
    outputs, corrected = torch.empty_like(value), torch.empty_like(value)
    for at in range(value.shape[1]):
        memory *= decay[:, at, None, None]
        seen = torch.bmm(pairs[at], memory)
        written = (value[:, at] - seen[:, 0]) * beta[:, at, None]
        memory += key[:, at, :, None] * written[:, None]
        corrected[:, at] = written
        outputs[:, at] = seen[:, 1] + match[:, at] * written
    return outputs, corrected


def replayed_at_once(
    memory: torch.Tensor, key: torch.Tensor, decay: torch.Tensor, corrected: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """The memory after the first kept [R] tokens of blocks that one_block has seen, as one weighted sum.

    memory [layers, R, heads, key_dim, value_dim], overwritten; key [layers, R, heads, Q, key_dim], decay [layers, R,
    heads, Q] and corrected [layers, R, heads, Q, value_dim] as one_block takes and returns them. kept: at least 1.
    """
    last = (kept - 1).view(1, -1, 1, 1).expand(*decay.shape[:3], 1)
    total = decay.gather(-1, last)  # [layers, R, heads, 1]
    beyond = torch.arange(decay.shape[-1], device=kept.device) >= kept[:, None]  # [R, Q]
    weight = (total - decay).masked_fill_(beyond[None, :, None], float("-inf")).exp_()
    written = (key * weight[..., None]).transpose(-1, -2) @ corrected
    return memory.mul_(total.exp()[..., None]).add_(written)


def replayed_token_by_token(
    memory: torch.Tensor, key: torch.Tensor, decay: torch.Tensor, corrected: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Likewise of what token_by_token has seen, with its very operations: decay is each token's factor."""
    for at in range(int(kept.max())):
        rows = (kept > at).nonzero()[:, 0]
        written = key[:, rows, :, at, :, None] * corrected[:, rows, :, at, None]
        memory[:, rows] = memory[:, rows] * decay[:, rows, :, at, None, None] + written
    return memory
