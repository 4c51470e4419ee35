"""Memory of parameters, gradients and optimiser states on one GPU, computed without running them.

Written after reading DeepSpeed 0.19.8 and counting the live tensors of each rank; tests/integration/test_memory.py
counts them again. In addition to the textbook's 16 bytes a parameter (bf16), with flat gradients
(`train.step.gradients`):

* The flat row has the size of the weights at every stage. Autograd's own gradients exist besides it until they are
  copied.
* With accumulation, stages 0 and 1 add a float32 row of all parameters, stage 2 one of this process's part.

On DeepSpeed's own path:

* Stage 0 in bf16 (`FP16_UnfusedOptimizer`) casts all gradients to float32 for the step: 4 bytes more during it.
* Stage 1 in bf16 with float32 accumulation (`BF16_Optimizer`) accumulates in a float32 buffer of *all* parameters,
  keeps the bf16 gradients as well, and copies the buffer to reduce it: 6 bytes more than stage 2, and another 6 for
  a moment.
* Stages 1 to 3 in float32 keep a second float32 copy of the parameters as master weights.
* Stages 1 and 2 allocate two whole buckets if they overlap communication, however small the model is.
* Stage 3 keeps every gathered parameter until the end of backward if max_reuse_distance is as large as in
  ds_configs/zero3.json: the whole model in bf16. It also keeps small parameters whole (persistence threshold), and
  copies its gradient partition for the step.
* Frozen parameters are counted as gathered, although ZeRO-3 releases them between modules, because backward does
  not need them. So the estimate is too high there (measured: 3 % of it).
* Offload keeps a second, float32 gradient partition in host memory.
"""

from dataclasses import dataclass, replace

from everest_ds.planning.sharding import (
    DEFAULT_REUSE,
    FLOAT32_BYTES,
    ParameterCounts,
    Sharding,
    persistent_elements,
)

MASTER_BYTES, ADAM_BYTES = 4, 8
# DeepSpeed's own defaults (runtime/zero/config.py), and the bucket of plain all-reduce (engine.py).
DEFAULT_BUCKET = 500_000_000
DEFAULT_LIVE = DEFAULT_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes on one GPU, for the process that needs most.

    Attributes:
        parameters: The model's parameters and buffers. At stage 3, this process's share and the small parameters.
        gradients: Kept from backward to the step.
        optimizer: Master weights and both moments of Adam.
        collected: Gradients of single parameters while they are copied into flat rows, after activations are freed.
        part: This process's part of flat gradients, if it exists only from their reduction to the step.
        communication: Buffers for communicating gradients.
        gathered: Parameters of other processes, kept during forward and backward (stage 3).
        step: Temporary memory of reducing and stepping, after activations are freed; includes ``part``.
        host: Pinned host memory that offload takes for one GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    collected: int = 0
    part: int = 0
    communication: int = 0
    gathered: int = 0
    step: int = 0
    host: int = 0


def model_states(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Return the memory of the gradients and of the optimiser that DeepSpeed chooses for this configuration."""
    if sharding.is_flat:
        states = _flat(counts, sharding)
    elif sharding.stage == 0:
        states = _plain(counts, sharding)
    elif sharding.stage == 3:
        states = _stage_3(counts, sharding)
    elif sharding.stage == 1 and sharding.accumulation_bytes != sharding.model_bytes:
        states = _bf16_optimizer(counts, sharding)
    else:
        states = _stages_1_and_2(counts, sharding)
    return replace(states, parameters=states.parameters + counts.buffers * FLOAT32_BYTES)


def _flat(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Stages 0 to 2 with flat gradients."""
    model, sent, trained = sharding.model_bytes, sharding.communication_bytes, sum(counts.trained)
    accumulates, in_float32 = sharding.accumulation_steps > 1, model == FLOAT32_BYTES
    world = sharding.world_size if sharding.stage else 1  # at stage 0 every process has all
    row = sum(counts.aligned(world)) if sharding.stage else trained
    share = row // world
    total = row * FLOAT32_BYTES if accumulates and sharding.stage < 2 else 0
    # If the row is not scattered, not cast and not overwritten by the next micro-step, it is also the part.
    casts = sent != (FLOAT32_BYTES if total else model)
    if sharding.stage == 0:
        is_part = in_float32 or accumulates
    else:
        is_part = world == 1 and not casts and (total > 0 or (in_float32 and not accumulates))
    part = 0 if is_part else share * FLOAT32_BYTES
    part_stays = sharding.stage == 0 or (sharding.stage == 2 and accumulates)
    # To send gradients in another dtype, a copy is made, and the received gradients are cast again.
    copied = row * sent if casts else 0
    received = share * sent if sharding.world_size > 1 and sharding.stage and sent != FLOAT32_BYTES else 0
    masters = 0 if sharding.stage == 0 and in_float32 else MASTER_BYTES
    return ModelStates(
        parameters=(row + sum(counts.frozen)) * model,
        gradients=row * model + total + (part if part_stays else 0),
        optimizer=share * (masters + ADAM_BYTES),
        collected=trained * model,
        part=0 if part_stays else part,
        step=copied + received + (0 if part_stays else part),
    )


def _plain(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Stage 0: torch's AdamW in float32, `FP16_UnfusedOptimizer` in bf16."""
    total, model = sum(counts.trained), sharding.model_bytes
    # Gradients are copied into buckets to reduce them.
    reduced = min(total, DEFAULT_BUCKET + max(counts.trained)) * model
    in_float32 = model == FLOAT32_BYTES
    return ModelStates(
        parameters=counts.total * model,
        gradients=total * model,
        optimizer=total * (ADAM_BYTES if in_float32 else MASTER_BYTES + ADAM_BYTES),
        step=reduced if in_float32 else max(reduced, total * FLOAT32_BYTES),
    )


def _bf16_optimizer(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Stage 1 in bf16 that accumulates in float32: `BF16_Optimizer`."""
    flat = sum(counts.aligned(sharding.world_size))
    cast = sharding.communication_bytes if sharding.communication_bytes != FLOAT32_BYTES else 0
    return ModelStates(
        parameters=(flat + sum(counts.frozen)) * sharding.model_bytes,
        gradients=flat * FLOAT32_BYTES + sum(counts.trained) * sharding.model_bytes,
        optimizer=flat // sharding.world_size * (MASTER_BYTES + ADAM_BYTES),
        step=flat * (FLOAT32_BYTES + cast),
    )


def _stages_1_and_2(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Stages 1 and 2: `DeepSpeedZeroOptimizer`."""
    world, model, options = sharding.world_size, sharding.model_bytes, sharding.options
    aligned = counts.aligned(world)
    partition = sum(aligned) // world
    step = 0
    if sharding.accumulation_bytes != model:  # accumulated immediately in one flat partition
        gradients = partition * sharding.accumulation_bytes
    else:
        # Whole gradients of the parameters in the partition; each group's are copied into a flat row for its step.
        gradients = counts.touching(world) * model
        step = max(aligned) // world * (model + (FLOAT32_BYTES if model != FLOAT32_BYTES else 0))
        if sharding.stage == 1 and sharding.accumulation_steps > 1:
            gradients = sum(counts.trained) * model  # not reduced before the last micro-step
    buffers = 2 if options.get("overlap_comm") else 1
    bucket = int(options.get("reduce_bucket_size", DEFAULT_BUCKET))
    contiguous = options.get("contiguous_gradients", True)
    return ModelStates(
        parameters=(sum(aligned) + sum(counts.frozen)) * model,
        gradients=gradients,
        optimizer=partition * (MASTER_BYTES + ADAM_BYTES),
        communication=buffers * bucket * model if contiguous else 0,
        step=step,
    )


def _stage_3(counts: ParameterCounts, sharding: Sharding) -> ModelStates:
    """Stage 3: `DeepSpeedZeroOptimizer_Stage3`, with or without offload to the CPU."""
    world, model, options = sharding.world_size, sharding.model_bytes, sharding.options
    groups = counts.partitioned(world)
    partition, total = sum(groups), counts.total
    frozen = sum(-(-count // world) for count in counts.frozen)
    persistent = persistent_elements(counts, sharding)
    bucket = int(options.get("reduce_bucket_size", DEFAULT_BUCKET))
    kept = max(
        int(options.get("stage3_max_live_parameters", DEFAULT_LIVE)),
        int(options.get("stage3_max_reuse_distance", DEFAULT_REUSE)) // 2,  # the distance back in backward
    )
    sub_group = min(
        max(groups), int(options.get("sub_group_size", DEFAULT_SUB_GROUP)) + max(counts.trained) // world
    )
    shards, gradients = (partition + frozen) * model, partition * sharding.accumulation_bytes
    optimizer, host, step = partition * (MASTER_BYTES + ADAM_BYTES), 0, sub_group * FLOAT32_BYTES
    if sharding.offloads_optimizer:
        host += gradients + optimizer + partition * FLOAT32_BYTES
        gradients = optimizer = step = 0
    if sharding.offloads_parameters:
        host += shards
        shards = 0
    # A copy rearranged by rank, and this rank's share.
    reduced = min(bucket, sum(counts.trained)) * sharding.communication_bytes
    return ModelStates(
        parameters=shards + persistent * model,
        gradients=gradients,
        optimizer=optimizer,
        communication=bucket * sharding.communication_bytes + reduced + reduced // world,
        gathered=min(total - persistent, kept) * model,
        step=step,
        host=host,
    )
