"""Settings of the drafter: pydantic, validated before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.tls import TlsFiles
from modeling.kernel_choice import KernelSetting


class DrafterSettings(BaseModel):
    """One drafter replica: a DFlash checkpoint with the embedding and head of its target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = Field(description="DFlash or DFlash 2 checkpoint directory")
    target: str = Field(description="target checkpoint directory: embedding and lm_head are read here")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cuda"
    kernels: KernelSetting = Field(
        "auto", description="triton = this repository's kernels, torch = torch's operations; auto = triton on cuda"
    )
    threads: int = Field(1, ge=1, description="torch threads on CPU")
    window: int = Field(4096, ge=16, description="context features kept per context, for full-attention drafters")
    max_contexts: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="contexts held at once, shared fairly among verifiers; auto = on cuda what memory_share leaves "
        "beside weights, CUDA graphs and the largest step, which is run to find out, on cpu 256",
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="of a device's memory, that a drafter may take if max_contexts is auto"
    )
    max_queue: int = Field(1024, ge=1, description="asks waiting; beyond it the answer is 'no drafts' at once")
    token: str = Field("", description="shared secret of the link")
    tls: TlsFiles | None = Field(None, description="of the link")
    heartbeat_s: float = Field(0.5, gt=0, le=10)
    hard_deadline_s: float = Field(3.0, gt=0, le=60)
