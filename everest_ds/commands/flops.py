"""`everest benchmark flops`: the paper's costs beside ours, counted by a profiler over the model itself."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from everest_ds.geometry import TokenGrid, ratio_to_count
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.flops import ClipMacs, autoencoder_macs, classifier_macs
from everest_ds.model.sizes import get_size


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One cost of the paper.

    Attributes:
        table: Where it stands.
        name: What it is.
        gmacs: The printed number, which the paper calls GFLOPs; None where the paper has none.
        size: The model's size.
        phase: Pre-training or fine-tuning.
        ratio: rho_pre; None for VideoMAE's tube masking, or full tokens in fine-tuning.
        num_frames: Frames of a clip.
        embedding_layers: Conv3d layers of the embedding.
        num_classes: Outputs of the fine-tuning head.
    """

    table: str
    name: str
    gmacs: float | None
    size: str = "base"
    phase: Literal["pretrain", "finetune"] = "pretrain"
    ratio: float | None = None
    num_frames: int = 16
    embedding_layers: Literal[1, 2, 3] = 1
    num_classes: int = 400


def _table_1() -> list[PaperRow]:
    rows = []
    for size, tube, pre, full, fine in (
        ("small", 11.6, 6.3, 57.0, 29.1),
        ("base", 35.5, 21.5, 180.5, 98.1),
        ("large", 83.1, 60.8, 597.2, 330.0),
    ):
        letter = size[0].upper()
        rows += [
            PaperRow(table="1", name=f"PT VideoMAE ViT-{letter}, tube 0.9", gmacs=tube, size=size),
            # The table's number is that of rho_pre 0.4, not the 0.3 of Table 7.
            PaperRow(table="1", name=f"PT EVEREST ViT-{letter}, rho 0.4", gmacs=pre, size=size, ratio=0.4),
            PaperRow(table="-", name=f"PT EVEREST ViT-{letter}, rho 0.3", gmacs=None, size=size, ratio=0.3),
            PaperRow(table="1", name=f"FT full ViT-{letter}", gmacs=full, size=size, phase="finetune"),
            PaperRow(
                table="1",
                name=f"FT EVEREST ViT-{letter}, rho 0.6",
                gmacs=fine,
                size=size,
                phase="finetune",
                ratio=0.6,
            ),
        ]
    return rows


def _fine_tuning_of_other_weights() -> list[PaperRow]:
    """Tables 5 and 11 start from other methods' weights; where they come from costs nothing."""
    rows = []
    tables: tuple[tuple[str, str, float, float], ...] = (
        ("5", "base", 180.5, 98.1),
        ("11", "small", 57.0, 29.1),
        ("11", "base", 180.5, 98.1),
        ("11", "large", 597.2, 330.0),
    )
    for table, size, full, fine in tables:
        letter = size[0].upper()
        rows += [
            PaperRow(table=table, name=f"FT full ViT-{letter}", gmacs=full, size=size, phase="finetune"),
            PaperRow(
                table=table,
                name=f"FT EVEREST ViT-{letter}, rho 0.6",
                gmacs=fine,
                size=size,
                phase="finetune",
                ratio=0.6,
            ),
        ]
    return rows


def _other_tables() -> list[PaperRow]:
    rows = [
        PaperRow(table="10", name=f"PT EVEREST ViT-B, rho {ratio}", gmacs=gmacs, ratio=ratio)
        for ratio, gmacs in ((0.5, 23.43), (0.4, 21.54), (0.3, 19.81), (0.2, 18.22))
    ]
    rows += [
        PaperRow(table="10", name=f"FT EVEREST ViT-B, rho {ratio}", gmacs=gmacs, phase="finetune", ratio=ratio)
        for ratio, gmacs in ((0.8, 137.5), (0.7, 117.3), (0.6, 98.1), (0.5, 79.8))
    ]
    rows += [
        PaperRow(table="12", name="PT EVEREST ViT-B, 24 frames", gmacs=30.65, ratio=0.3, num_frames=24),
        PaperRow(
            table="12", name="FT EVEREST ViT-B, 24 frames", gmacs=159.4, phase="finetune", ratio=0.6, num_frames=24
        ),
    ]
    layers: tuple[tuple[Literal[1, 2, 3], float, float], ...] = (
        (1, 19.8, 98.1),
        (2, 34.6, 112.9),
        (3, 38.3, 116.6),
    )
    for count, pre, fine in layers:
        name = f"ViT-B, {count} Conv3d"
        rows += [
            PaperRow(table="15", name=f"PT {name}", gmacs=pre, ratio=0.3, embedding_layers=count),
            PaperRow(
                table="15", name=f"FT {name}", gmacs=fine, phase="finetune", ratio=0.6, embedding_layers=count
            ),
        ]
    rows += [
        PaperRow(table="-", name="PT EVEREST ViT-H, rho 0.3", gmacs=None, size="huge", ratio=0.3),
        PaperRow(table="-", name="FT EVEREST ViT-H, rho 0.6", gmacs=None, size="huge", phase="finetune", ratio=0.6),
    ]
    return rows


PAPER_ROWS = _table_1() + _fine_tuning_of_other_weights() + _other_tables()


def count_row(row: PaperRow) -> ClipMacs:
    """Build the row's model on the meta device and count one clip through it."""
    return _count(replace(row, table="", name="", gmacs=None))  # several tables have the same model


@lru_cache
def _count(row: PaperRow) -> ClipMacs:
    grid = TokenGrid.of_clip(num_frames=row.num_frames, height=224, width=224, tubelet_size=2, patch_size=16)
    options = EncoderOptions(embedding_layers=row.embedding_layers)
    with torch.device("meta"):
        if row.phase == "finetune":
            keep_ratio = row.ratio or 1.0
            size = get_size(row.size)
            model = EverestClassifier(size, grid, options, num_classes=row.num_classes, keep_ratio=keep_ratio)
            return classifier_macs(model, grid)
        autoencoder = EverestAutoencoder(get_size(row.size), grid, options)
        if row.ratio is None:  # tube masking keeps the same places of every step
            visible = grid.time * (grid.tokens_per_step - ratio_to_count(grid.tokens_per_step, 0.9))
            hidden = grid.num_tokens - visible
        else:
            visible = ratio_to_count(grid.num_tokens, 0.1)
            hidden = ratio_to_count(grid.num_tokens, row.ratio) - visible
        ranked = None if row.ratio is None else grid
        return autoencoder_macs(autoencoder, grid, num_visible=visible, num_targets=hidden, ranked=ranked)


def benchmark_flops(*, as_json: bool) -> None:
    """Print every row: the paper's number, our count by the paper's rule, and what we execute."""
    if not as_json:
        print("GMACs of one clip's forward pass, decoder depth 4; the paper calls them GFLOPs.")
        print("`executed` adds the second embedding, with gradient, of the chosen tokens.\n")
        print(f"{'table':<6}{'what':<36}{'paper':>8}{'counted':>10}{'differs':>9}{'executed':>10}")
    for row in PAPER_ROWS:
        macs = count_row(row)
        counted, executed = macs.paper / 1e9, macs.executed / 1e9
        differs = None if row.gmacs is None else counted / row.gmacs - 1
        if as_json:
            values = {"table": row.table, "name": row.name, "paper_gmacs": row.gmacs}
            values |= {"counted_gmacs": round(counted, 4), "executed_gmacs": round(executed, 4)}
            print(json.dumps(values))
            continue
        paper = "" if row.gmacs is None else f"{row.gmacs:g}"
        shown = "" if differs is None else f"{differs:+.2%}"
        print(f"{row.table:<6}{row.name:<36}{paper:>8}{counted:>10.3f}{shown:>9}{executed:>10.3f}")
