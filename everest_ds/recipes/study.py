"""The miniature study: base settings of `everest study`, on the harder variant of the demo data.

A nano model on clips of 4 x 8 x 8 tokens. Frames are not resized, and decoded frames are kept in memory. Learning
rates are for 256 clips, as always; a batch has 16. `everest study` writes its commands to commands.sh.
"""

from everest_ds.config import (
    BatchConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneRunConfig,
    FinetuneSelectionConfig,
    OptimConfig,
    PretrainConfig,
    PretrainDataConfig,
    PretrainModelConfig,
    RunConfig,
    SelectionConfig,
    ViewsConfig,
)
from everest_ds.recipes.registry import register

# Only the last step is saved: a run takes a minute.
_NEVER = 10_000


@register
def study() -> PretrainConfig:
    r"""The baseline of `everest study`: the paper's selection, 32 of 256 tokens visible, 592 steps of 16 clips.

    deepspeed --no_local_rank --num_gpus 1 --module everest_ds pretrain study \
        --data.train-list study/data/train.csv --ds-config ds_configs/zero0.json --precision fp32 --out runs/study
    No expected result: docs/results.md has what came out.
    """
    return PretrainConfig(
        recipe="study",
        data=PretrainDataConfig(
            num_frames=8,
            sampling_stride=1,
            image_size=64,
            flip=False,
            num_workers=0,
            keep_decoded=True,
            crop_scales=(1.0,),
        ),
        model=PretrainModelConfig(size="nano", patch_size=8, decoder_depth=1),
        selection=SelectionConfig(selected_ratio=0.3, visible_ratio=0.125),
        optim=OptimConfig(base_lr=6.4e-2, min_lr=6.4e-4, warmup_epochs=2, epochs=16, max_grad_norm=1.0),
        batch=BatchConfig(global_size=16, micro_size=16),
        run=RunConfig(log_every_steps=50, save_every_epochs=_NEVER),
    )


@register
def study_ft() -> FinetuneConfig:
    r"""The fine-tuning of `everest study`: few labels, 250 steps of 16 clips, scored once, at the end.

    deepspeed --no_local_rank --num_gpus 1 --module everest_ds finetune study_ft --init-from runs/study \
        --data.train-list study/labelled-0.csv --data.val-list study/data/test.csv \
        --ds-config ds_configs/zero0.json --precision fp32 --out runs/study_ft
    No expected result: docs/results.md has what came out.
    """
    return FinetuneConfig(
        recipe="study_ft",
        data=FinetuneDataConfig(
            num_frames=8,
            sampling_stride=1,
            image_size=64,
            flip=False,
            num_workers=0,
            keep_decoded=True,
            crop_area=(1.0, 1.0),
            crop_aspect=(1.0, 1.0),
            rand_augment=None,
        ),
        model=FinetuneModelConfig(size="nano", patch_size=8, drop_path=0.0),
        selection=FinetuneSelectionConfig(keep_ratio=0.3),
        optim=FinetuneOptimConfig(base_lr=3.2e-2, min_lr=3.2e-4, warmup_epochs=3, epochs=25, max_grad_norm=1.0),
        batch=BatchConfig(global_size=16, micro_size=16),
        run=FinetuneRunConfig(log_every_steps=50, save_every_epochs=_NEVER, validate_every_epochs=_NEVER),
        views=ViewsConfig(num_temporal=1, num_spatial=1),
    )
