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
