"""The files of a Hugging Face folder beside the weights, and what has to be said of it.

Place in the flow: complete Weights -> `folder_for` -> texts that `export` writes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everest_ds.config import Config
from everest_ds.config_file import config_from_dict
from everest_ds.errors import UserError
from everest_ds.model.weights.card import CARD, card_for
from everest_ds.model.weights.foreign import CONFIG
from everest_ds.model.weights.hub_config import (
    MODELING_FILE,
    PROCESSING_FILE,
    Clips,
    clips_of,
    config_for,
    preprocessors_for,
)
from everest_ds.model.weights.reading import Weights


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """What a folder holds beside its weights.

    Attributes:
        files: Texts by file name.
        notes: What there is to know of it.
    """

    files: dict[str, str]
    notes: tuple[str, ...]


def folder_for(
    weights: Weights, recipe: Config | None, scores: Sequence[str], notes: Sequence[str] = ()
) -> HubFolder:
    """Return the files of the folder of a whole model.

    Args:
        weights: What is exported.
        recipe: How clips are cut and which tokens are kept, for weights that come without a run.
        scores: What is recorded of the weights, a line each.
        notes: What there is to know of the translation.

    Raises:
        UserError: The run's own configuration says what the recipe says, or cannot be read, or the number of heads
            cannot be told.
    """
    architecture, config = weights.architecture, _config_of(weights, recipe)
    clips = clips_of(architecture, config)
    all_notes = (*notes, *_notes_on_tokens(weights, clips))
    files = {CONFIG: config_for(architecture, clips)} | preprocessors_for(architecture, clips)
    if clips is not None:
        here = Path(__file__).parent / "hub_code"
        files |= {name: (here / name).read_text(encoding="utf-8") for name in (MODELING_FILE, PROCESSING_FILE)}
    files[CARD] = card_for(architecture, config, clips, scores, all_notes)
    return HubFolder(files=files, notes=all_notes)


def _config_of(weights: Weights, recipe: Config | None) -> Config | None:
    """Return the configuration of the run that weights are from, else the recipe."""
    if weights.config is None:
        return recipe
    if recipe is not None:
        raise UserError(
            f"--recipe {recipe.recipe} has no effect: {weights.source} says how it was trained; remove it"
        )
    return config_from_dict(json.loads(weights.config), source=f"{weights.source}, its run's configuration")


def _notes_on_tokens(weights: Weights, clips: Clips | None) -> list[str]:
    """Return how many tokens the model keeps, and what transformers does instead."""
    architecture = weights.architecture
    if architecture.kind == "autoencoder":
        return ["the selection of tokens is not in the folder: VideoMAEForPreTraining takes bool_masked_pos"]
    if clips is None:
        return [
            "the weights do not say how many tokens of a clip they were trained on; transformers uses all of them. "
            "--recipe NAME puts the recipe's selection into the folder"
        ]
    notes = []
    if clips.keeps_all:
        notes.append(f"the model {clips.describe()} of a clip, as transformers' own VideoMAE does")
    else:
        notes.append(
            f"the model {clips.describe()} of a clip; transformers' own VideoMAE uses all of them, which lowers "
            "its scores. For the same tokens and logits as here, load it with trust_remote_code=True"
        )
    if architecture.grid != clips.grid:
        notes.append(
            "its positions are interpolated from clips of another size; transformers' own VideoMAE lays them out "
            "afresh, which changes its outputs. trust_remote_code=True interpolates them as here"
        )
    return notes
