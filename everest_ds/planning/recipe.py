"""The work of `everest recipes RECIPE`: a recipe as it would run, before anything is started."""

import json

from everest_ds.config.file import dump_config
from everest_ds.distributed import World
from everest_ds.planning.job import RecipeJob
from everest_ds.train.engine import check_sections, load_systems, resolve_ds_config


def run(job: RecipeJob, world: World) -> int:
    """Print a recipe's document, configuration, tokens, batch arithmetic and final DeepSpeed configuration.

    Raises:
        UserError: The batch cannot be divided among that many processes, or the DeepSpeed file is refused.
    """
    config, num_gpus = job.config, job.gpus
    systems = load_systems(job.ds_config)
    check_sections(systems, str(job.ds_config))
    resolved = resolve_ds_config(systems, config, world_size=num_gpus, precision="auto", device_type="cuda")
    grid, batch = config.grid, config.batch
    peak = config.optim.base_lr * batch.global_size / 256
    print(f"{job.document}\n\nconfiguration\n{dump_config(config)}")
    print(f"tokens: {grid.time} x {grid.rows} x {grid.cols} = {config.tokens}")
    print(
        f"batch: {batch.global_size} = {batch.micro_size} a process x {num_gpus} processes x "
        f"{batch.accumulation_steps(num_gpus)} accumulation steps; peak learning rate {config.optim.base_lr} x "
        f"{batch.global_size} / 256 = {peak:.6g}"
    )
    clip_gib = 3 * config.data.num_frames * config.data.image_size**2 / 2**30
    ahead_gib = clip_gib * batch.micro_size * max(config.data.num_workers, 1) * config.data.prefetch_batches
    print(f"clips prepared ahead: up to {ahead_gib * num_gpus:.1f} GiB of shared memory for {num_gpus} processes")
    print(f"\nDeepSpeed configuration on {num_gpus} GPUs\n{json.dumps(resolved, indent=2)}")
    return 0
