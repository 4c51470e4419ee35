"""`everest benchmark flops`: the paper's costs and parameters compared with counts of our models."""

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from everest_ds.benchmark.options import FlopsOptions
from everest_ds.benchmark.report import Table
from everest_ds.config import TaskName
from everest_ds.distributed import World
from everest_ds.model.autoencoder import EverestAutoencoder
from everest_ds.model.classifier import EverestClassifier
from everest_ds.model.encoder import EncoderOptions
from everest_ds.model.flops import ClipMacs, autoencoder_macs, classifier_macs
from everest_ds.model.selection import SelectionRule
from everest_ds.model.sizes import get_size
from everest_ds.tokens import TokenGrid, count_candidate_steps, count_selection


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One cost in the paper. Rows with the same model are equal.

    Attributes:
        gmacs: 10^9 multiply-accumulates, which the paper calls GFLOPs; None if it does not print them.
        parameters: Millions of parameters; None if the paper does not print them.
        ratio: rho_pre; None for VideoMAE's tube masking, or for all tokens in fine-tuning.
        alpha: Candidate frames of frame selection for each frame of a clip.
        embedding_layers: Conv3d layers of the embedding.
    """

    table: str = field(compare=False)
    name: str = field(compare=False)
    gmacs: float | None = field(compare=False)
    parameters: float | None = field(default=None, compare=False)
    size: str = "base"
    phase: TaskName = "pretrain"
    ratio: float | None = None
    num_frames: int = 16
    alpha: float = 1.0
    embedding_layers: Literal[1, 2, 3] = 1
    num_classes: int = 400

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid.of_clip(num_frames=self.num_frames, height=224, width=224, tubelet_size=2, patch_size=16)


def _everest(table: str, phase: TaskName, size: str, ratio: float, gmacs: float | None) -> PaperRow:
    name = f"{'PT' if phase == 'pretrain' else 'FT'} EVEREST ViT-{size[0].upper()}, rho {ratio}"
    return PaperRow(table=table, name=name, gmacs=gmacs, size=size, phase=phase, ratio=ratio)


def _fine_tunings(table: str, size: str, full: float, everest: float) -> list[PaperRow]:
    name = f"FT full ViT-{size[0].upper()}"
    all_tokens = PaperRow(table=table, name=name, gmacs=full, size=size, phase="finetune")
    return [all_tokens, _everest(table, "finetune", size, 0.6, everest)]


def _table_1(size: str, tube: float, pretrain: float, full: float, finetune: float) -> list[PaperRow]:
    return [
        PaperRow(table="1", name=f"PT VideoMAE ViT-{size[0].upper()}, tube 0.9", gmacs=tube, size=size),
        # The cost in Table 1 is that of rho_pre 0.4, not of the 0.3 in Table 7.
        _everest("1", "pretrain", size, 0.4, pretrain),
        _everest("-", "pretrain", size, 0.3, None),
        *_fine_tunings("1", size, full, finetune),
    ]


def _table_15(layers: Literal[1, 2, 3], pre: float, fine: float, *parameters: float) -> list[PaperRow]:
    """Return the rows of Table 15, about embedding layers. Its parameters are those of HMDB51's 51 classes."""
    common: dict[str, Any] = {"table": "15", "embedding_layers": layers}
    names = [f"{task} ViT-B, {layers} Conv3d" for task in ("PT", "FT")]
    tuned: dict[str, Any] = {"phase": "finetune", "ratio": 0.6, "num_classes": 51}
    return [
        PaperRow(name=names[0], gmacs=pre, parameters=parameters[0], ratio=0.3, **common),
        PaperRow(name=names[1], gmacs=fine, parameters=parameters[1], **tuned, **common),
    ]


PAPER_ROWS = [
    *_table_1("small", 11.6, 6.3, 57.0, 29.1),
    *_table_1("base", 35.5, 21.5, 180.5, 98.1),
    *_table_1("large", 83.1, 60.8, 597.2, 330.0),
    # Tables 5 and 11 start from other methods' weights, which does not change the cost.
    *_fine_tunings("5", "base", 180.5, 98.1),
    *_fine_tunings("11", "small", 57.0, 29.1),
    *_fine_tunings("11", "base", 180.5, 98.1),
    *_fine_tunings("11", "large", 597.2, 330.0),
    *(_everest("10", "pretrain", "base", *row) for row in ((0.5, 23.43), (0.4, 21.54), (0.3, 19.81), (0.2, 18.22))),
    *(_everest("10", "finetune", "base", *row) for row in ((0.8, 137.5), (0.7, 117.3), (0.6, 98.1), (0.5, 79.8))),
    replace(_everest("12", "pretrain", "base", 0.3, 30.65), name="PT EVEREST ViT-B, 24 frames", num_frames=24),
    replace(_everest("12", "finetune", "base", 0.6, 159.4), name="FT EVEREST ViT-B, 24 frames", num_frames=24),
    *_table_15(1, 19.8, 98.1, 94.2, 86.3),
    *_table_15(2, 34.6, 112.9, 102.5, 94.6),
    *_table_15(3, 38.3, 116.6, 97.8, 89.9),
    _everest("-", "pretrain", "huge", 0.3, None),
    _everest("-", "finetune", "huge", 0.6, None),
    # Frame selection (Sec. 4.2); the paper does not give its cost. The recipe of OSCC has rho 0.5.
    *(
        PaperRow(table="-", name=f"PT ViT-B, rho {rho}, 16 of 24 frames", gmacs=None, ratio=rho, alpha=1.5)
        for rho in (0.3, 0.5)
    ),
]


@lru_cache
def build_model(row: PaperRow) -> EverestAutoencoder | EverestClassifier:
    """Build the row's model on the meta device."""
    options, size = EncoderOptions(embedding_layers=row.embedding_layers), get_size(row.size)
    with torch.device("meta"):
        if row.phase == "pretrain":
            return EverestAutoencoder(size, row.grid, options)
        rule = SelectionRule(selected_ratio=row.ratio or 1.0)
        return EverestClassifier(size, row.grid, options, num_classes=row.num_classes, rule=rule)


@lru_cache
def count_row(row: PaperRow) -> ClipMacs:
    """Count the multiply-accumulates of one clip in the row's model."""
    model, grid = build_model(row), row.grid
    if isinstance(model, EverestClassifier):
        return classifier_macs(model, grid)
    counts = count_selection("rero" if row.ratio else "tube", grid, row.ratio or 1.0, 0.1, "masked")
    candidates = replace(grid, time=count_candidate_steps(grid.time, row.alpha)) if row.ratio else None
    macs = autoencoder_macs(model, grid, num_visible=counts.visible, num_targets=counts.targets, ranked=candidates)
    if candidates is None:
        return macs
    return replace(macs, embedding_all=macs.ranking)  # the paper's rule also embeds every candidate


def num_parameters(row: PaperRow) -> int:
    """Return the number of trained parameters of the row's model; positions are fixed and not counted."""
    return sum(parameter.numel() for parameter in build_model(row).parameters())


def run(options: FlopsOptions, world: World) -> int:
    """Print every row: the paper's numbers, our count by the paper's rule, the executed count, and parameters."""
    compared = (("counted", 10, ".3f"), ("differs", 9, "+.2%"))
    table = Table(
        ("table", 6, "<"), ("what", 36, "<"), ("paper", 8, "g"), *compared, ("executed", 10, ".3f"),
        ("parameters", 13, "g"), *compared,
    )  # fmt: skip
    if not options.json:
        print("GMACs of one clip's forward pass, decoder depth 4; the paper calls them GFLOPs.")
        print("`executed` includes the second embedding, with gradient, of the selected tokens.")
        print("Parameters in millions, for rows where the paper gives them; positions are fixed and not counted.\n")
        print(table.head)
    for row in PAPER_ROWS:
        macs, parameters = count_row(row), num_parameters(row) / 1e6
        counted, executed = macs.paper / 1e9, macs.executed / 1e9
        if options.json:
            values = {"table": row.table, "name": row.name, "paper_gmacs": row.gmacs}
            values |= {"counted_gmacs": round(counted, 4), "executed_gmacs": round(executed, 4)}
            values |= {"paper_parameters_millions": row.parameters, "parameters_millions": round(parameters, 4)}
            print(json.dumps(values))
            continue
        sizes = () if row.parameters is None else _beside(row.parameters, parameters)
        print(table.row(row.table, row.name, *_beside(row.gmacs, counted), executed, *sizes))
    return 0


def _beside(printed: float | None, counted: float) -> tuple[float | str, float, float | str]:
    return ("", counted, "") if printed is None else (printed, counted, counted / printed - 1)
