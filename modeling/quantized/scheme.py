"""What a checkpoint's quantization_config says: which matrices are packed, and how. Plain arithmetic, no torch.

Formats: fine-grained FP8 as DeepSeek-V3 and Qwen publish it, MXFP4 as gpt-oss does, those of compressed-tensors (INT4
as Kimi-K2 has it, NVFP4, FP8) and of NVIDIA ModelOpt (NVFP4, FP8). Activations are never quantized here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from modeling.errors import CheckpointError
from modeling.target_config import TargetConfig

BODIES = ("", "model.", "model.language_model.", "language_model.model.")  # that lists of modules may begin with
_LINEAR = re.compile(r"(_proj(_with_mqa|_qkvz?|_z|_a|_b|_ba)?|^lm_head)(\.weight)?$")
_EXPERTS = re.compile(r"\.experts\.(gate_up|down)_proj$")


@dataclass(frozen=True)
class Format:
    """How a matrix [out, in] is packed: codes, and a scale for every block of them.

    values: what a code means, "e4m3" (8 bits) or "e2m1" or "int4" (4 bits, two in a byte, the first in its low half).
    block: (rows, columns) that share a scale; 0 = as many as there are. scale_bytes: of one scale.
    codes, scales, factor, shape: what the names of the stored tensors end in, after the module's name. dtype: of the
    stored codes (safetensors' word), which hold `unit` of them in one entry of the last but `inner` dimension.
    factor: a scale of the whole matrix beside those of its blocks; inverted: it divides. shape: a tensor that repeats
    the matrix's shape.
    """

    label: str
    values: str
    block: tuple[int, int]
    scale_bytes: int
    codes: str
    scales: str
    dtype: str
    unit: int
    inner: int = 0
    factor: str | None = None
    inverted: bool = False
    shape: str | None = None

    @property
    def bits(self) -> int:
        return 8 if self.values == "e4m3" else 4

    def bytes(self, shape: tuple[int, ...]) -> int:
        """What a matrix, or a stack of them [..., out, in], takes in memory."""
        *lead, rows, columns = shape
        scales = math.ceil(rows / (self.block[0] or rows)) * math.ceil(columns / (self.block[1] or columns))
        factor = 4 if self.factor else 0
        return math.prod(lead) * (rows * columns * self.bits // 8 + scales * self.scale_bytes + factor)


@dataclass(frozen=True)
class QuantScheme:
    """formats: those that occur in the checkpoint. ignored: modules that are not packed, as the configuration lists
    them. experts_only: of all others, too, only the routed experts are packed."""

    formats: tuple[Format, ...]
    ignored: tuple[str, ...] = field(default=(), repr=False)
    experts_only: bool = False

    def ignores(self, name: str) -> bool:
        """Does the configuration list this tensor's module, by its name in the text model, as not packed?"""
        module = name.removesuffix(".weight")
        return any(_listed(body + module, entry) for entry in self.ignored for body in BODIES)

    def format_of(self, name: str) -> Format | None:
        """How the configuration means a tensor of the text model (`layers.0.mlp.down_proj.weight`) to be stored.

        None = not packed. Where formats are mixed this is the first, for the routed experts, and the last elsewhere.
        """
        experts = _EXPERTS.search(name) is not None
        if not _LINEAR.search(name) or self.ignores(name) or (self.experts_only and not experts):
            return None
        return self.formats[0] if experts else self.formats[-1]

    def bytes(self, name: str, shape: tuple[int, ...], itemsize: int) -> int:
        """What a tensor of the text model takes in memory; itemsize: bytes an entry of one that is not packed."""
        packed = self.format_of(name)
        return packed.bytes(shape) if packed else math.prod(shape) * itemsize


def scheme_of(config: TargetConfig) -> QuantScheme | None:
    """The scheme of a checkpoint, None if nothing in it is packed. Raises CheckpointError for one not supported."""
    settings = config.quantization
    if not settings:
        return None
    try:
        return _READ[str(settings.get("quant_method"))](settings)
    except (_Unsupported, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f": {error}" if isinstance(error, _Unsupported) else f" ({error!r})"
        raise CheckpointError(
            f"{config.file}: quantization_config with quant_method "
            f"{settings.get('quant_method')!r} is not supported{reason}; take the unquantized checkpoint, or one in "
            "fine-grained FP8 (fp8), MXFP4 (mxfp4), INT4 or NVFP4 (compressed-tensors, modelopt)"
        ) from error


class _Unsupported(Exception):
    """Which setting of a known method is not supported."""


def fp8(block: tuple[int, int], scales: str) -> Format:
    """float8_e4m3fn codes."""
    return Format("FP8", "e4m3", block, 4, ".weight", scales, "F8_E4M3", 1)


MXFP4 = Format("MXFP4", "e2m1", (1, 32), 1, "_blocks", "_scales", "U8", 32, inner=1)


def int4(group: int) -> Format:
    """compressed-tensors' pack-quantized: eight codes in an int32, each 8 more than it means."""
    return Format("INT4", "int4", (1, group), 2, ".weight_packed", ".weight_scale", "I32", 8, shape=".weight_shape")


def nvfp4(group: int, *, modelopt: bool) -> Format:
    """e2m1 codes, e4m3 scales; ModelOpt keeps the matrix's scale itself, compressed-tensors its inverse."""
    codes, factor = (".weight", ".weight_scale_2") if modelopt else (".weight_packed", ".weight_global_scale")
    block = (1, group)
    return Format("NVFP4", "e2m1", block, 1, codes, ".weight_scale", "U8", 2, factor=factor, inverted=not modelopt)


def _read_fp8(settings: Mapping[str, Any]) -> QuantScheme:
    block = settings.get("weight_block_size")
    if not block:
        raise _Unsupported("weight_block_size is not set (one scale for a whole tensor)")
    if settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _Unsupported(f"fmt {settings['fmt']!r} is not e4m3")
    rows, columns = (int(size) for size in block)
    ignored = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
    return QuantScheme((fp8((rows, columns), ".weight_scale_inv"),), ("lm_head", *ignored))


def _read_mxfp4(settings: Mapping[str, Any]) -> QuantScheme:
    return QuantScheme((MXFP4,), tuple(settings.get("modules_to_not_convert") or ()), experts_only=True)


def _read_compressed(settings: Mapping[str, Any]) -> QuantScheme:
    formats = []
    for name, group in settings["config_groups"].items():
        weights = group["weights"]
        form = group.get("format") or settings.get("format")
        packed = _compressed_format(weights, form)
        if packed is None:
            raise _Unsupported(
                f"config_groups.{name} has {weights.get('num_bits')}-bit {weights.get('type')} weights, strategy "
                f"{weights.get('strategy')!r}, symmetric {weights.get('symmetric')}, format {form!r}"
            )
        if packed not in formats:
            formats.append(packed)
    return QuantScheme(tuple(sorted(formats, key=lambda packed: packed.bits)), tuple(settings.get("ignore") or ()))


def _compressed_format(weights: Mapping[str, Any], form: str | None) -> Format | None:
    kind, bits, strategy = weights["type"], int(weights["num_bits"]), weights.get("strategy")
    if not weights.get("symmetric", True) or weights.get("actorder") in ("group", "dynamic"):
        return None
    match kind, bits, strategy:
        case "int", 4, "group" | "channel" if form in ("pack-quantized", None):
            return int4(int(weights.get("group_size") or 0) if strategy == "group" else 0)
        case "float", 4, "group" | "tensor_group" if form in ("nvfp4-pack-quantized", None, "mixed-precision"):
            return nvfp4(int(weights.get("group_size") or 16), modelopt=False)
        case "float", 8, "tensor":
            return fp8((0, 0), ".weight_scale")
        case "float", 8, "channel":
            return fp8((1, 0), ".weight_scale")
        case "float", 8, "block":
            rows, columns = (int(size) for size in weights["block_structure"])
            return fp8((rows, columns), ".weight_scale")
    return None


def _read_modelopt(settings: Mapping[str, Any]) -> QuantScheme:
    settings = settings.get("quantization") or settings  # as hf_quant_config.json has it
    algorithm = str(settings.get("quant_algo")).upper()
    group = nvfp4(int(settings.get("group_size") or 16), modelopt=True)
    formats = {
        "NVFP4": (group,),
        "W4A16_NVFP4": (group,),
        "FP8": (fp8((0, 0), ".weight_scale"),),
        "FP8_PER_CHANNEL_PER_TOKEN": (fp8((1, 0), ".weight_scale"),),
        "FP8_PB_WO": (fp8((128, 128), ".weight_scale"),),
        "MIXED_PRECISION": (group, fp8((0, 0), ".weight_scale")),
    }.get(algorithm)
    if formats is None:
        raise _Unsupported(f"quant_algo is {algorithm}")
    ignored = settings.get("ignore") or settings.get("exclude_modules") or ()
    return QuantScheme(formats, tuple(ignored))


_READ = {
    "fp8": _read_fp8,
    "mxfp4": _read_mxfp4,
    "compressed-tensors": _read_compressed,
    "modelopt": _read_modelopt,
    "modelopt_fp4": _read_modelopt,
}


def _listed(module: str, entry: str) -> bool:
    """An entry is a module's name or the end of one, perhaps with wildcards, or `re:` and a regular expression."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return any(fnmatchcase(module, start + entry + end) for start in ("", "*.") for end in ("", ".*"))
