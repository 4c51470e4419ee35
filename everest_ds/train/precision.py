"""The precision of a run: from --precision and the DeepSpeed file to DeepSpeed's sections and torch's dtypes.

    bf16       DeepSpeed's bf16: weights and gradients in bfloat16, float32 master weights in the optimiser
    autocast   weights, gradients and optimiser in float32; torch.autocast casts matmuls to bfloat16
    fp32       everything in float32

Ranking, targets, losses and the statistics of norms are always float32. Importing this module needs no torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from everest_ds.errors import UserError

if TYPE_CHECKING:
    import torch

PrecisionName = Literal["auto", "bf16", "autocast", "fp32"]
DtypeName = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Precision:
    """The dtypes of one value of --precision.

    Attributes:
        name: The value.
        weights: Dtype of weights, gradients and the residual stream.
        matmuls: Dtype of matmuls and attention.
    """

    name: Literal["bf16", "autocast", "fp32"]
    weights: DtypeName
    matmuls: DtypeName

    @property
    def autocasts(self) -> bool:
        return self.weights != self.matmuls

    @property
    def weights_dtype(self) -> "torch.dtype":
        return _torch_dtype(self.weights)

    @property
    def matmul_dtype(self) -> "torch.dtype":
        return _torch_dtype(self.matmuls)


BF16 = Precision("bf16", "bfloat16", "bfloat16")
AUTOCAST = Precision("autocast", "float32", "bfloat16")
FP32 = Precision("fp32", "float32", "float32")
PRECISIONS = {precision.name: precision for precision in (BF16, AUTOCAST, FP32)}


def choose_precision(systems: dict[str, Any], asked: PrecisionName, device_type: str) -> Precision:
    """Return the precision of a run.

    ``auto`` follows the DeepSpeed file. If the file does not choose, it is bf16 on a GPU and fp32 on a CPU. A file
    cannot choose autocast.

    Raises:
        UserError: The file sends gradients in bfloat16, which autocast does not support.
    """
    if asked == "auto":
        return BF16 if systems.get("bf16", {}).get("enabled", device_type == "cuda") else FP32
    sent = systems.get("communication_data_type", "fp32")
    if asked == "autocast" and sent != "fp32":  # DeepSpeed 0.19.8 would follow it only at stage 0
        raise UserError(
            f"communication_data_type={sent} in the DeepSpeed file contradicts --precision autocast, which sends "
            "gradients in float32; remove the key, or use --precision bf16"
        )
    return PRECISIONS[asked]


def precision_of(ds_config: dict[str, Any]) -> Precision:
    """Return the precision of a resolved DeepSpeed configuration."""
    if ds_config["bf16"]["enabled"]:
        return BF16
    return AUTOCAST if ds_config["torch_autocast"]["enabled"] else FP32


def precision_sections(systems: dict[str, Any], precision: Precision) -> dict[str, Any]:
    """Return the sections of DeepSpeed's configuration that decide dtypes, except data_types."""
    own = "bf16" if precision == BF16 else "fp32"
    autocast: dict[str, Any] = {"enabled": precision.autocasts}
    if precision.autocasts:
        # Send gradients in float32, as torch's own data parallelism does, so that all stages compute the same. By
        # default DeepSpeed 0.19.8 sends the gradients of plain linear layers in bfloat16, and at stage 3 gathers
        # their weights rounded, but does neither for subclasses (a quarter of a block's weights) or at stage 0.
        autocast |= {"dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {
        # A step whose gradient is not finite changes no weight (`train.step.updater`).
        "bf16": {"check_grad_overflow": True, **systems.get("bf16", {}), "enabled": precision == BF16},
        "torch_autocast": autocast,
        "communication_data_type": systems.get("communication_data_type", own),
        "fp16": {"enabled": False},
    }


def _torch_dtype(name: DtypeName) -> "torch.dtype":
    import torch

    return torch.bfloat16 if name == "bfloat16" else torch.float32
