"""The files of a Hugging Face folder beside the weights, and what has to be said of it.

Place in the flow: complete Weights -> `folder_for` -> texts that `export` writes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everest_ds.config import Config
from everest_ds.config.file import config_from_dict
from everest_ds.errors import UserError
from everest_ds.model.weights.foreign import CONFIG
from everest_ds.model.weights.hub_config import (
    MODELING_FILE,
    PROCESSING_FILE,
    Clips,
    clips_of,
    config_for,
    preprocessors_for,
)
from everest_ds.model.weights.model_card import CARD, CardFacts, card_for
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
        UserError: The run's own configuration says what the recipe says, or the number of heads cannot be told.
    """
    architecture = weights.architecture
    own, unreadable = _config_of_run(weights)
    if own is not None and recipe is not None:
        raise UserError(
            f"--recipe {recipe.recipe} has no effect: {weights.source} says how it was trained; remove it"
        )
    clips = clips_of(architecture, own or recipe)
    all_notes = (*notes, *unreadable, *_notes_on_tokens(weights, clips))
    files = {CONFIG: config_for(architecture, clips)} | preprocessors_for(architecture, clips)
    if clips is not None:
        here = Path(__file__).parent / "hub_code"
        files |= {name: (here / name).read_text(encoding="utf-8") for name in (MODELING_FILE, PROCESSING_FILE)}
    facts = CardFacts(
        architecture=architecture, run=own, recipe=recipe, clips=clips, scores=scores, notes=all_notes
    )
    files[CARD] = card_for(facts)
    return HubFolder(files=files, notes=all_notes)


def _config_of_run(weights: Weights) -> tuple[Config | None, list[str]]:
    """Return the configuration of the run that weights are from, and a note where it cannot be read."""
    if weights.config is None:
        return None, []
    try:
        return config_from_dict(json.loads(weights.config), source="the configuration of their run"), []
    except (UserError, ValueError) as error:  # of another version of everest_ds
        return None, [f"what the weights say of their run cannot be used: {error}"]


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
