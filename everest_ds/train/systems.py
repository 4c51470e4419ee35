"""The ways of sharding that come with the project, as data: the files of ds_configs/ by name.

The files are what a run is started with; a package that was installed without them still has to plan. A test holds
both equal.
"""

from typing import Any

_BUCKETS = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 200_000_000}
_GATHER = {"allgather_bucket_size": 200_000_000}
_STAGE_3 = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": False,
}
_TO_HOST = {"device": "cpu", "pin_memory": True}
_OFFLOAD = {"offload_optimizer": _TO_HOST, "offload_param": _TO_HOST}


def _zero(stage: int, **options: Any) -> dict[str, Any]:
    systems: dict[str, Any] = {"zero_optimization": {"stage": stage, **options}, "bf16": {"enabled": True}}
    return systems | ({"data_types": {"grad_accum_dtype": "fp32"}} if stage else {})


BUILT_IN_SYSTEMS: dict[str, dict[str, Any]] = {
    "zero0": _zero(0),
    "zero1": _zero(1, **_BUCKETS, **_GATHER),
    "zero2": _zero(2, **_BUCKETS, **_GATHER),
    "zero3": _zero(3, **_BUCKETS, **_STAGE_3),
    "zero3_offload": _zero(3, **_BUCKETS, **_STAGE_3, **_OFFLOAD) | {"zero_force_ds_cpu_optimizer": False},
}
