"""`everest recipes [RECIPE]`: what a recipe comes to, before anything is started."""

import inspect
import json
from pathlib import Path

from everest_ds.config import Config
from everest_ds.config.file import dump_config
from everest_ds.recipes import RECIPES, recipes_of


def list_recipes() -> None:
    """Print each recipe with the first line of its document."""
    for name in [*recipes_of("pretrain"), *recipes_of("finetune")]:
        print(f"{name:<16} {(RECIPES[name].__doc__ or '').splitlines()[0]}")


def show_recipe(config: Config, *, num_gpus: int, ds_config: Path | None) -> None:
    """Print a recipe's document, configuration, tokens, batch arithmetic and final DeepSpeed configuration.

    Raises:
        UserError: The batch cannot be made on that many processes, or the DeepSpeed file is refused.
    """
    from everest_ds.train.engine import check_sections, load_systems, resolve_ds_config

    systems = load_systems(ds_config)
    check_sections(systems, str(ds_config))
    resolved = resolve_ds_config(systems, config, world_size=num_gpus, precision="auto", device_type="cuda")
    grid, batch = config.grid, config.batch
    peak = config.optim.base_lr * batch.global_size / 256
    recipe = RECIPES.get(config.recipe)
    print(inspect.getdoc(recipe) if recipe else f"{config.recipe}: not a recipe of this version")
    print(f"\nconfiguration\n{dump_config(config)}")
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
