"""Settings of the verifier: pydantic, validated before anything is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.tls import Access, TlsFiles
from modeling.kernel_choice import KernelSetting
from modeling.kv_dtype import DTYPE_BYTES, KvDtype

DETERMINISTIC_SIZES = (1, 2, 4, 8)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinkSettings(Strict):
    """Both deadlines and the secret of the link, which guards the engine port too. Seconds."""

    token: str = Field(
        "", description="shared secret of the link and of the engine port, same everywhere; empty = one is drawn"
    )
    tls: TlsFiles | None = Field(None, description="of the control connection, the tcp tensor plane, the engine port")
    tensor_transport: Literal["tcp", "torch"] = Field(
        "tcp", description="torch = NCCL between GPUs, gloo on CPU; its rows are not covered by tls"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of context features on the wire")
    heartbeat_s: float = Field(0.5, gt=0, le=10)
    hard_deadline_s: float = Field(3.0, gt=0, le=60, description="silence that ends an epoch")

    @property
    def access(self) -> Access:
        return Access(self.token, self.tls)

    @model_validator(mode="after")
    def _deadline_above_heartbeat(self) -> LinkSettings:
        if self.hard_deadline_s <= 2 * self.heartbeat_s:
            raise ValueError(
                f"hard_deadline_s ({self.hard_deadline_s}) must be more than two heartbeats of {self.heartbeat_s} s"
            )
        return self


class SpeculationSettings(Strict):
    """mode: disaggregated = drafter in another process; colocated = inside rank 0; none = plain decoding, no taps.

    soft_deadline_s: how long a step waits for drafts before it goes on without.
    """

    mode: Literal["disaggregated", "colocated", "none"] = "disaggregated"
    max_draft_tokens: int | None = Field(None, ge=0, description="None = block size - 1")
    soft_deadline_s: float = Field(0.25, gt=0, le=10)
    adaptive: bool = Field(
        True, description="choose the number of drafts from measured acceptance and step times; false = always the most"
    )
    step_table: str | None = Field(
        None,
        description="file of measured verify steps (deploy/steps/README.md): what the choice of drafts begins with, "
        "until the engine has measured its own, and what `paceline plan` and `simulate` price steps by; null = none",
    )
    draft_table: str | None = Field(None, description="the same of drafts")


class VerifierSettings(Strict):
    """One verifier replica: one copy of the target over `tensor_parallel_size` ranks."""

    target: str = Field(description="checkpoint directory")
    drafter: str | None = Field(None, description="DFlash checkpoint directory: taps, fc and hidden_norm are read here")
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cuda"
    kernels: KernelSetting = Field(
        "auto", description="triton = this repository's kernels, torch = torch's operations; auto = triton on cuda"
    )
    threads_per_rank: int = Field(1, ge=1, description="torch threads of a rank on CPU")
    deterministic: bool = Field(
        False,
        description="a token's logits are the same bits whatever is in the step beside it, however prompt and drafts "
        "were cut, and at tensor_parallel_size 1, 2, 4 and 8; slower (docs/deterministic.md)",
    )
    max_requests: int = Field(64, ge=1, le=4096, description="running requests (state slots)")
    max_waiting: int = Field(256, ge=0, description="beyond it a submit is refused as overloaded")
    block_tokens: int = Field(16, ge=1, description="tokens of one KV block")
    kv_cache_tokens: int | Literal["auto"] = Field(
        65536,
        description="KV capacity in tokens; auto (on cuda) = what memory_share leaves beside weights, states, "
        "checkpoints, CUDA graphs and the largest step, which is run to find out",
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="of a device's memory, that a rank may take if kv_cache_tokens is auto"
    )
    kv_dtype: KvDtype = Field(
        "auto",
        description="of the KV cache: auto = dtype; float8_e4m3 (with a scale for each token and head) holds nearly "
        "twice the tokens of bfloat16, and rounds keys and values to four significant bits",
    )
    max_step_tokens: int = Field(2048, ge=16, description="token budget of one step")
    max_context: int | None = Field(None, ge=2, description="None = the checkpoint's own limit")
    prefix_cache: bool = Field(
        True, description="keep the KV blocks of finished requests while there is room, for prompts that begin alike"
    )
    checkpoint_bytes: int = Field(
        1 << 30,
        ge=0,
        description="of every rank's device memory for checkpoints of recurrent state (Gated DeltaNet), without which "
        "such a target has no prefix hits; one of Qwen3.5-397B takes 24 MB a rank at tensor_parallel_size 8",
    )
    flight_recorder: str | None = Field(
        "/tmp/paceline",
        description="directory that gets the last 256 steps if the engine crashes, for `paceline replay`; the file "
        "holds prompts as token ids and is readable by its owner only; null = none",
    )
    feature_store_bytes: int = Field(1 << 30, ge=1 << 16, description="host memory for context features")
    speculation: SpeculationSettings = SpeculationSettings()
    link: LinkSettings = LinkSettings()

    @model_validator(mode="after")
    def _drafter_present(self) -> VerifierSettings:
        if self.speculation.mode != "none" and self.drafter is None:
            raise ValueError(
                f"speculation.mode is {self.speculation.mode!r} but drafter is not set: name the drafter's "
                "checkpoint directory, or set speculation.mode to 'none'"
            )
        return self

    @model_validator(mode="after")
    def _cache_is_no_wider_than_what_it_holds(self) -> VerifierSettings:
        if self.kv_dtype in DTYPE_BYTES and DTYPE_BYTES[self.kv_dtype] > DTYPE_BYTES[self.dtype]:
            raise ValueError(
                f"kv_dtype {self.kv_dtype!r} is wider than dtype {self.dtype!r}, which takes memory and gives nothing: "
                "set it to 'auto'"
            )
        return self

    @model_validator(mode="after")
    def _deterministic_where_it_can_be(self) -> VerifierSettings:
        if not self.deterministic:
            return self
        if self.device == "cuda" and self.kernels == "torch":
            raise ValueError(
                "deterministic is true but device is 'cuda' and kernels 'torch', whose products choose their order by "
                "the batch: set kernels to 'auto', or deterministic to false"
            )
        if self.tensor_parallel_size not in DETERMINISTIC_SIZES:
            raise ValueError(
                f"deterministic is true but tensor_parallel_size is {self.tensor_parallel_size}: sums are added as a "
                f"balanced tree of 8 parts, so choose one of {', '.join(map(str, DETERMINISTIC_SIZES))}, or set "
                "deterministic to false"
            )
        if self.device == "cpu" and self.threads_per_rank != 1:
            raise ValueError(
                f"deterministic is true but threads_per_rank is {self.threads_per_rank}: where torch divides an array "
                "among threads, last bits follow; set it to 1 and raise tensor_parallel_size, or set deterministic to "
                "false"
            )
        return self

    @model_validator(mode="after")
    def _cache_is_measured_where_it_can_be(self) -> VerifierSettings:
        if self.kv_cache_tokens != "auto":
            return self
        if self.device != "cuda" or self.kernels == "torch":
            raise ValueError(
                f"kv_cache_tokens is 'auto' but device is {self.device!r} and kernels {self.kernels!r}: only a GPU's "
                "memory is measured, and only over kernels; set a number of tokens, such as 65536"
            )
        if self.speculation.mode == "colocated":
            raise ValueError(
                "kv_cache_tokens is 'auto' but speculation.mode is 'colocated': the drafter is loaded after the "
                "measurement and would find no room; set a number of tokens (paceline plan tells how many fit)"
            )
        return self

    @model_validator(mode="after")
    def _cache_holds_a_block(self) -> VerifierSettings:
        if self.kv_cache_tokens == "auto":
            return self
        if self.kv_cache_tokens < self.block_tokens:
            raise ValueError(
                f"kv_cache_tokens ({self.kv_cache_tokens}) is less than one block of block_tokens "
                f"({self.block_tokens}): raise the one or lower the other"
            )
        return self
