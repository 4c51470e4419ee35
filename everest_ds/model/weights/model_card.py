"""The model card of a Hugging Face folder: what was trained, on which clips and tokens, its scores, how to load it.

Place in the flow: weights, their run's configuration and recorded scores -> README.md of the folder. Names of lists
are given without their folders: a card is published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from everest_ds import __version__
from everest_ds.config import Config, FinetuneConfig, PretrainConfig
from everest_ds.model.weights.architecture import Architecture
from everest_ds.model.weights.hub_config import ARCHITECTURES, Clips

CARD = "README.md"
LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        architecture: The model.
        run: The configuration of the run that the weights are from, where it is known.
        recipe: The recipe that was named for weights without a run.
        clips: What a classifier is used on, where that is known.
        scores: What is recorded of the weights, a line each.
        notes: Where transformers computes something else.
    """

    architecture: Architecture
    run: Config | None
    recipe: Config | None
    clips: Clips | None
    scores: Sequence[str]
    notes: Sequence[str]


def card_for(facts: CardFacts) -> str:
    """Return the model card, YAML front matter and Markdown."""
    architecture, clips = facts.architecture, facts.clips
    is_classifier = architecture.kind == "classifier"
    sections = [
        _front_matter(is_classifier),
        f"# {'Video classifier' if is_classifier else 'Masked video autoencoder'}"
        f"{', trained with everest_ds' if facts.run else ''}\n",
        f"This is {architecture.describe()}.\n",
        "[EVEREST](https://arxiv.org/abs/2211.10636) (ICML 2024) trains masked video autoencoders on the tokens "
        "that changed most. The weights are float32, in the layout of transformers' VideoMAE.\n",
        "## Settings\n",
        _settings_of(facts),
        "## Scores\n",
        "".join(f"* {line}\n" for line in facts.scores) or "None recorded.\n",
        "## Tokens\n",
        _tokens(architecture, clips),
        "## Loading\n",
        _loading(architecture, clips),
        "## Differences\n",
        "".join(f"* {note}\n" for note in facts.notes),
        "## Versions\n",
        f"{_versions()}\n",
    ]
    return "\n".join(sections)


def _settings_of(facts: CardFacts) -> str:
    if facts.run is not None:
        return _table(_settings(facts.run))
    if facts.recipe is not None:
        said = (
            "The weights came without a run. These are the settings of the recipe that was named at the export.\n"
        )
        return f"{said}\n{_table(_settings(facts.recipe))}"
    return "Not known: the weights came without the configuration of a run.\n"


def _front_matter(is_classifier: bool) -> str:
    pipeline = "pipeline_tag: video-classification\n" if is_classifier else ""
    return f"---\nlibrary_name: transformers\n{pipeline}tags:\n- video\n- videomae\n- everest\n---\n"


def _table(rows: Sequence[tuple[str, object]]) -> str:
    lines = [f"| {name} | {_cell(value)} |\n" for name, value in rows]
    return "| setting | value |\n|---|---|\n" + "".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _settings(config: Config) -> list[tuple[str, object]]:
    """Return what a reader has to know of a run."""
    data, optim, batch = config.data, config.optim, config.batch
    is_dense = not isinstance(config, FinetuneConfig) or config.data.sampling == "dense"
    frames = f"stride {data.sampling_stride}" if is_dense else "one of each of as many equal parts of the video"
    rows: list[tuple[str, object]] = [
        ("recipe", config.recipe),
        ("clip", f"{data.num_frames} frames ({frames}), {data.image_size} x {data.image_size} pixels"),
        ("training list", _name(data.train_list)),
    ]
    if isinstance(config, FinetuneConfig):
        rows += [("validation list", _name(config.data.val_list)), ("test list", _name(config.data.test_list))]
        rows += [("selection", f"{config.selection.strategy}, keep ratio {config.selection.keep_ratio:g}")]
    if isinstance(config, PretrainConfig):
        selection = config.selection
        ratios = f"selected ratio {selection.selected_ratio:g}, visible ratio {selection.visible_ratio:g}"
        rows.append(("selection", f"{selection.strategy}, {ratios}, budget {selection.budget}"))
    rows += [("epochs", optim.epochs), ("clips a step", batch.global_size), ("base learning rate", optim.base_lr)]
    return rows


def _name(path: str | None) -> str:
    return "none" if path is None else Path(path).name


def _tokens(architecture: Architecture, clips: Clips | None) -> str:
    if architecture.kind == "autoencoder":
        return (
            "`VideoMAEForPreTraining` takes the tokens to hide as `bool_masked_pos`. The selection of the run is "
            "not part of this folder: it is code of everest_ds.\n"
        )
    if clips is None:
        return (
            "It is not known how many tokens of a clip these weights were trained on. Transformers uses all of "
            "them; with a model that was trained on fewer, the scores are lower than they were there.\n"
        )
    if clips.keeps_all:
        return f"The model {clips.describe()} of a clip, as transformers' VideoMAE does.\n"
    return (
        f"The model was trained and scored on a part of each clip: it {clips.describe()}, {_which(clips)}. "
        "Transformers' own VideoMAE uses all tokens, which this model was not trained on, and its scores are lower "
        "there. `modeling_everest.py` in this folder selects the same tokens as everest_ds; it runs with "
        "`trust_remote_code=True`.\n"
    )


def _which(clips: Clips) -> str:
    selection = clips.selection
    if selection.strategy != "rero":
        return f"the same places in every clip ({selection.strategy})"
    most = "most" if selection.order == "descending" else "least"
    return f"those that changed {most} since the step before ({selection.distance} distance of their embeddings)"


def _loading(architecture: Architecture, clips: Clips | None) -> str:
    if architecture.kind == "autoencoder":
        name = ARCHITECTURES[architecture.kind]
        code = f"from transformers import {name}\n\nmodel = {name}.from_pretrained(FOLDER)"
        return f"```python\n{code}\n```\n"
    trust = ", trust_remote_code=True" if clips else ""
    code = (
        "from transformers import AutoModelForVideoClassification, pipeline\n\n"
        f'classify = pipeline("video-classification", FOLDER{trust})\n'
        'print(classify("video.mp4"))\n\n'
        f"model = AutoModelForVideoClassification.from_pretrained(FOLDER{trust})\n"
        "logits = model(pixel_values).logits  # (clips, frames, 3, height, width), scaled by ImageNet's statistics"
    )
    text = f"```python\n{code}\n```\n"
    if clips is None:
        return f"{text}\n`pipeline` spreads the frames of a clip evenly over the whole video.\n"
    return (
        f"{text}\nWith `trust_remote_code=True`, `pipeline` takes the run's frames and tokens: the middle view "
        "that `everest predict --num-temporal 1 --num-spatial 1` takes. Without it, transformers spreads the "
        "frames evenly over the whole video and uses all tokens. `pipeline` decodes with torchcodec. The scores "
        "above are of the views that they name, whose softmax is averaged; one view scores a little lower.\n"
    )


def _versions() -> str:
    found = [f"everest_ds {__version__}"]
    for library in LIBRARIES:
        try:
            found.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return f"Exported with {', '.join(found)}."
