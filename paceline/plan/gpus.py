"""What is published of GPU types: one table, with sources. Dense rates, without sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import ConfigError

GB = 10**9
NODE_GPUS = 8  # of the usual server


@dataclass(frozen=True)
class Gpu:
    """memory_bytes, bandwidth (of that memory) and link (to its peers, one direction) in bytes and bytes/s;
    flops: bfloat16 operations a second, which packed weights are multiplied in too.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    link: float
    source: str


def _gpu(name: str, memory_gb: int, bandwidth_gb: int, teraflops: int, link_gb: int, source: str) -> tuple[str, Gpu]:
    return name, Gpu(name, memory_gb * GB, bandwidth_gb * GB, teraflops * 1e12, link_gb * GB, source)


# Names are Ray's (`accelerator_type:H200` is a resource of nodes that have them).
GPUS: Mapping[str, Gpu] = dict(
    [
        _gpu("H200", 141, 4800, 989, 450, "nvidia.com/en-us/data-center/h200: 141 GB, 4.8 TB/s, 1,979 TFLOPS sparse"),
        _gpu("H100", 80, 3350, 989, 450, "nvidia.com/en-us/data-center/h100 (SXM): 80 GB, 3.35 TB/s, 1,979 sparse"),
        _gpu(
            "B200", 180, 8000, 2250, 900, "NVIDIA DGX B200 data sheet, an eighth: 1,440 GB, 64 TB/s, 36 PFLOPS sparse"
        ),
        _gpu("L40S", 48, 864, 362, 32, "nvidia.com/en-us/data-center/l40s: 48 GB, 864 GB/s, 362 TFLOPS, PCIe 4"),
        _gpu("A100", 80, 2039, 312, 300, "nvidia.com/en-us/data-center/a100 (SXM, 80 GB): 2,039 GB/s, 312 TFLOPS"),
    ]
)


def gpu_named(key: str, name: str) -> Gpu:
    """Raises ConfigError with the known types. `A100-80G` is an A100."""
    found = GPUS.get(name.upper().removesuffix("-80G"))
    if found is None:
        raise ConfigError(f"{key} is {name!r}, of which nothing is known: choose one of {', '.join(GPUS)}")
    return found


def gpu_of_bundle(bundle: Mapping[str, float]) -> str | None:
    """The GPU type that a Ray bundle asks for (`accelerator_type:H200: 0.001`), if it does."""
    return next((key.partition(":")[2] for key in bundle if key.startswith("accelerator_type:")), None)
