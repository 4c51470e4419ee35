"""Print docs/recipes.md, made from the recipes: `python -m everest_ds.recipes > docs/recipes.md`."""

from everest_ds.config import FinetuneConfig, PretrainConfig
from everest_ds.recipes import RECIPES

HEAD = """# Recipes

Made by `python -m everest_ds.recipes`. `everest recipes NAME` prints a recipe as it would run: configuration,
tokens, batch arithmetic and the DeepSpeed file. Every field is a flag of `everest pretrain` or `everest finetune`.
Learning rates are per 256 clips. The settings are those of the paper's Tables 7, 8 and 12; accuracies have not been
rerun.
"""


def _clip(config: PretrainConfig | FinetuneConfig) -> str:
    data = config.data
    sampling = getattr(data, "sampling", "dense")
    frames = f"stride {data.sampling_stride}" if sampling == "dense" else sampling
    return f"{data.num_frames} x {data.image_size}, {frames}"


def row(config: PretrainConfig | FinetuneConfig) -> list[str]:
    """Return the cells of one recipe."""
    views: list[str] = []
    if isinstance(config, PretrainConfig):
        selection = config.selection
        extra = f", alpha {selection.alpha:g}" if selection.alpha > 1 else ""
        share = f"{selection.selected_ratio:g} / {selection.visible_ratio:g}{extra}"
    else:
        share = f"{config.selection.keep_ratio:g}"
        views = [f"{config.views.num_temporal} x {config.views.num_spatial}"]
    return [
        f"`{config.recipe}`",
        config.model.size,
        _clip(config),
        share,
        str(config.optim.epochs),
        str(config.batch.global_size),
        f"{config.optim.base_lr:g}",
        *views,
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def page() -> str:
    """Return the whole page."""
    configs = [recipe() for recipe in RECIPES.values()]
    head = ["recipe", "ViT", "clip", "selected / visible", "epochs", "batch", "lr"]
    pretraining = table(head, [row(config) for config in configs if isinstance(config, PretrainConfig)])
    head = ["recipe", "ViT", "clip", "kept", "epochs", "batch", "lr", "views"]
    finetuning = table(head, [row(config) for config in configs if isinstance(config, FinetuneConfig)])
    first = "`everest pretrain RECIPE`: the share of tokens that is selected, and that the encoder sees."
    then = "`everest finetune RECIPE --init-from WEIGHTS`: the share that is kept, and the views."
    return f"{HEAD}\n## Pre-training\n\n{first}\n\n{pretraining}\n## Fine-tuning\n\n{then}\n\n{finetuning}"


if __name__ == "__main__":
    print(page(), end="")
