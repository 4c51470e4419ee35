"""Reads any file or folder of weights: finite float32 tensors under our names, and their model.

Place in the flow: PATH -> `read_weights` -> Weights -> `loading` into a model that exists, or
`Weights.architecture.build()`, or `export`. Reads the official VideoMAE and EVEREST files, Hugging Face folders,
mmaction2's VideoMAE and what `everest convert` wrote. `train.checkpoints.consolidated` reads runs and their shards.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everest_ds.errors import UserError
from everest_ds.files import parse_json
from everest_ds.model.weights.architecture import Architecture, ModelMetadata, infer_architecture
from everest_ds.model.weights.foreign import read_raw
from everest_ds.model.weights.huggingface import (
    Translation,
    from_huggingface,
    is_huggingface,
    notes_of_config,
    read_metadata,
)
from everest_ds.model.weights.other_projects import from_mmaction, is_mmaction, refuse_other_models
from everest_ds.model.weights.report import (
    WeightsReport,
    compare,
    describe_difference,
    describe_shapes,
    is_allowed,
    unneeded,
)

# Types that need no more than a cast. Others (8-bit, quantised, integers) need scales from elsewhere.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Last parts of the names of weights, in every layout; counters and index tables have other names.
WEIGHT_LEAVES = ("weight", "bias", "q_bias", "v_bias", "mask_token")


def widen(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return every tensor as contiguous float32.

    Raises:
        UserError: A tensor is complex, sparse, quantised or 8-bit, a weight is not floating-point, or a value is
            NaN, infinite, or too large for float32. The message names the first such tensor.
    """
    for name, tensor in tensors.items():
        _require_plain(name, tensor, source)
    widened = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    require_finite(widened, source)
    return widened


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with NaN or infinite values.

    Raises:
        UserError: Names the first such tensor, and counts its bad values and the other bad tensors.
    """
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if not bad:
        return
    first = tensors[bad[0]]
    num_nan, num_infinite = int(torch.isnan(first).sum()), int(torch.isinf(first).sum())
    others = f", and {len(bad) - 1} more tensors have such values" if len(bad) > 1 else ""
    raise UserError(
        f"{source}: {bad[0]} has {num_nan} NaN and {num_infinite} infinite of {first.numel()} values{others}. "
        "Use a checkpoint from before the loss diverged, or get the file again"
    )


def _require_plain(name: str, tensor: Tensor, source: str) -> None:
    """Refuse a tensor that cannot simply be cast to float32."""
    dtype, fault = _dtype_name(tensor.dtype), None
    if tensor.layout != torch.strided:
        fault = f"is sparse ({tensor.layout})"
    elif tensor.is_complex():
        fault = f"is complex ({dtype})"
    elif tensor.is_quantized:
        fault = f"is quantised ({dtype})"
    elif tensor.dtype not in PLAIN_DTYPES and (tensor.is_floating_point() or name.split(".")[-1] in WEIGHT_LEAVES):
        fault = f"is {dtype}"
    if fault:
        raise UserError(
            f"{source}: {name} {fault}; expected dense weights in {', '.join(map(_dtype_name, PLAIN_DTYPES))}. "
            "Convert it in the project that wrote it"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights under our names, float32.

    Attributes:
        source: Path, for messages.
        layout: The project whose names the file had.
        tensors: By our name; unknown ones keep their own.
        sources: From our names to the names in the file that each was made of, where they differ.
        ignored: Names of what else was in the file.
        notes: For the report.
        config: The configuration of their run, one line of JSON.
        checkpoint: The checkpoint that they were read from.
        keep_ratio: Share of a clip's tokens that a classifier was trained on.
    """

    source: str
    layout: str
    tensors: dict[str, Tensor]
    architecture: Architecture
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: str | None = None
    checkpoint: Path | None = None
    keep_ratio: float | None = None

    def title(self) -> str:
        """Return their path, model and layout in one line."""
        return f"{self.source}: {self.architecture.describe()}; layout {self.layout}"


def read_weights(path: Path) -> Weights:
    """Read weights of any layout but a run's.

    Args:
        path: An official .pth or .pt file, a safetensors file, or a folder of Hugging Face or of DeepSpeed.

    Raises:
        UserError: There is nothing to read, a pickle would run code, the layout is not known, or the weights have
            NaN, infinite or complex values.
    """
    source, raw = str(path), read_raw(path)
    layout, metadata = "ours and the official one", raw.metadata
    if raw.wrapper is not None:
        layout += f", under {raw.wrapper!r}"
    refuse_other_models(raw.tensors, raw.config, source)
    renames: dict[str, tuple[str, ...]] = {short: (name,) for short, name in raw.names.items() if short != name}
    translated = Translation(tensors=raw.tensors, sources=renames)
    if is_huggingface(raw.tensors):
        layout = "Hugging Face's"
        translated = from_huggingface(raw.tensors, raw.config, source)
        metadata = metadata if raw.config is None else read_metadata(raw.config, source)
    elif is_mmaction(raw.tensors):
        layout, translated = "mmaction2's", from_mmaction(raw.tensors, source)
    architecture = infer_architecture(translated.tensors, metadata, source)
    notes = raw.notes + translated.notes
    if raw.config is not None and is_huggingface(raw.tensors):
        notes += notes_of_config(raw.config, architecture.kind)
    tensors, widened = _widen_with_note(translated.tensors, source)
    return Weights(
        source=source,
        layout=layout,
        tensors=tensors,
        architecture=architecture,
        sources=translated.sources,
        ignored=raw.beside + translated.ignored,
        notes=notes + widened,
        config=raw.run_config,
        keep_ratio=_keep_ratio(raw.run_config, "selection") or _keep_ratio(raw.config, "everest"),
    )


def weights_of_run(
    tensors: dict[str, Tensor],
    metadata: ModelMetadata,
    source: str,
    config: str | None = None,
    checkpoint: Path | None = None,
) -> Weights:
    """Return a run's own weights; their metadata come from the run's configuration."""
    architecture = infer_architecture(tensors, metadata, source)
    widened, notes = _widen_with_note(tensors, source)
    return Weights(
        source=source,
        layout="a run's",
        tensors=widened,
        architecture=architecture,
        notes=notes,
        config=config,
        checkpoint=checkpoint,
        keep_ratio=_keep_ratio(config, "selection"),
    )


def _keep_ratio(config: str | Mapping[str, Any] | None, section: str) -> float | None:
    """Return the keep ratio in a section of a configuration (a dict or JSON text); None if it has none."""
    try:
        content: Any = parse_json(config) if isinstance(config, str) else config
        ratio = content[section]["keep_ratio"]
    except (ValueError, TypeError, KeyError):  # pre-training, or another version of everest_ds
        return None
    return float(ratio) if isinstance(ratio, int | float) else None


def _widen_with_note(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    others = sorted({_dtype_name(tensor.dtype) for tensor in tensors.values()} - {"float32"})
    notes = (f"stored in {', '.join(others)}, widened to float32",) if others else ()
    return widen(tensors, source), notes


def require_complete(weights: Weights, allow: Collection[str] = ()) -> tuple[Weights, WeightsReport]:
    """Check weights against their whole model; ``allow`` names tensors that may be left out of the result.

    Returns:
        The weights of exactly that model, and the report.

    Raises:
        UserError: A tensor is missing, unknown, or of another shape.
    """
    expected = weights.architecture.expected_shapes
    missing, extra, misshapen = compare(expected, weights.tensors)
    unknown = [name for name in extra if not is_allowed(name, allow)]
    if missing or unknown:
        way_out = "expected every tensor of the model" if missing else "to leave that out, use --allow"
        raise UserError(describe_difference(weights.source, missing, unknown, way_out))
    for name in misshapen:
        raise UserError(describe_shapes(weights.source, name, weights.tensors[name].shape, expected[name]))
    complete = replace(weights, tensors={name: weights.tensors[name] for name in expected})
    report = WeightsReport(
        source=weights.title(),
        loaded=tuple(expected),
        ignored=weights.ignored + tuple(extra),
        notes=weights.notes + unneeded(allow, extra),
    )
    return complete, report
