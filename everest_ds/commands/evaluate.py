"""`everest evaluate`: a trained model over a list of videos, several views each, into scores and files.

What can be refused is refused before torch is imported. Works alone and under any launcher; each process reads the
weights itself and scores its share of the list.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from everest_ds import __version__, distributed
from everest_ds.config import Config
from everest_ds.config.finetune import FinetuneConfig
from everest_ds.data.lists.classes import Classes, require_known_labels, resolve_classes
from everest_ds.data.lists.video_list import VideoRow, fingerprint, read_list, require_reachable
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import append_json_lines, atomic_path, write_json
from everest_ds.inference.source import (
    ClipSettings,
    InferenceOptions,
    clip_settings,
    identify,
    weights_kind,
)
from everest_ds.recipes import find_config
from everest_ds.train.checkpoints.origin import Origin, locate

if TYPE_CHECKING:
    import torch

    from everest_ds.inference.scores import Scores
    from everest_ds.inference.trained import Trained


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(InferenceOptions):
    """What is scored, how, and where the results go."""

    list: Path | None = None
    """List of videos to score; without one, data.test_list of the run or the recipe."""
    out: Path | None = None
    """Folder for the results; without one, evaluation-LIST in the run directory or beside the weights."""
    protocol: Literal["head", "knn", "linear"] = "head"
    """head: the classifier itself; knn, linear: nearest neighbours or a linear probe on its frozen features."""
    train_list: Path | None = None
    """List of videos that knn and linear learn from."""
    knn_k: int = 20
    """Neighbours that vote (knn)."""
    knn_temperature: float = 0.07
    """Temperature of their votes, exp(cosine / temperature) (knn)."""
    linear_l2: float = 1e-3
    """Weight of half the squared norm of the probe's weights in its loss (linear)."""

    def __post_init__(self) -> None:
        """Check that the training list and the protocol go together."""
        super().__post_init__()
        if (self.protocol == "head") != (self.train_list is None):
            given = "needs --train-list" if self.train_list is None else "takes no --train-list"
            raise UserError(f"--protocol {self.protocol} {given}")
        if self.knn_k < 1 or self.knn_temperature <= 0 or self.linear_l2 <= 0:
            raise UserError("--knn-k must be at least 1, --knn-temperature and --linear-l2 above 0")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be done, known before torch is imported."""

    origin: Origin
    settings: ClipSettings
    options: EvaluateOptions
    test_list: Path
    rows: list[VideoRow]
    train_rows: list[VideoRow]
    out: Path
    identity: dict[str, Any]


def evaluate(source: Path, options: EvaluateOptions, world: World) -> int:
    """Score a model over a list and write the results.

    Args:
        source: A run directory, a checkpoint, or weights.
        options: What, how, and where to.
        world: This process's place.

    Returns:
        The exit code, 0.

    Raises:
        UserError: Anything the user can mend: paths, labels, unreadable videos, weights without a head.
    """
    began = time.perf_counter()
    plan = _make_plan(source, options)

    # Whatever can be refused is refused before the processes meet, so that all of them end alike.
    on_gpu = distributed.select_accelerator()
    import torch

    from everest_ds.inference import results as files
    from everest_ds.inference.trained import load_trained

    trained = load_trained(plan.origin, plan.settings, options, torch.device("cuda" if on_gpu else "cpu"))
    names = _class_names(trained, plan)
    summary = plan.identity | {"views": files.view_recipe(plan.settings, trained.num_kept)}
    files.require_own(plan.out, summary)

    device = distributed.start(world)
    trained.model.to(device)
    if world.is_main:
        print(trained.report)
        print(
            f"{plan.origin.choice}: {plan.origin.weights}, weights {trained.kind}, {trained.precision.name}, "
            f"attention {trained.attention}, {trained.kept}\n"
            f"{len(plan.rows)} videos x {plan.settings.num_views} views on {world.size} x {device.type}",
            flush=True,
        )
    scores, of_training = _score(plan, trained, len(names), world, device)
    if world.is_main:
        summary |= files.score_summary(scores, names, len(plan.rows)) | of_training
        summary |= {"classes": list(names), "precision": trained.precision.name, "attention": trained.attention}
        summary |= {"batch_rows": options.batch_rows, "versions": _versions()}
        _write(plan, summary, scores, names, began)
        _record(plan.origin, summary)
        print(f"{files.table(scores, names, trained.kept)}\n{plan.out}", flush=True)
    distributed.finish()
    return 0


def _make_plan(source: Path, options: EvaluateOptions) -> _Plan:
    origin, recipe = locate(source), find_config(options.recipe) if options.recipe else None
    settings = clip_settings(origin, recipe, options)
    test_list = _test_list(origin, recipe, options)
    rows, train_rows = _rows_of(test_list), _rows_of(options.train_list)
    return _Plan(
        origin=origin,
        settings=settings,
        options=options,
        test_list=test_list,
        rows=rows,
        train_rows=train_rows,
        out=options.out or (origin.run_dir or origin.weights.parent) / f"evaluation-{test_list.stem}",
        identity={
            "protocol": _protocol(options, train_rows),
            "checkpoint": identify(origin, weights_kind(origin, options.weights)),
            "list": {"path": str(test_list), "videos": fingerprint(rows)},
        },
    )


def _score(
    plan: _Plan, trained: "Trained", num_classes: int, world: World, device: "torch.device"
) -> tuple["Scores", dict[str, Any]]:
    """Return the scores by the chosen protocol, and what the summary says of training videos."""
    from everest_ds.inference.probing import score_knn, score_linear
    from everest_ds.inference.scores import score
    from everest_ds.inference.trained import extract_features

    settings, options = plan.settings, plan.options
    if options.protocol == "head":
        scores = score(
            trained.wrap(trained.model),
            plan.rows,
            data=settings.data,
            views=settings.views,
            num_classes=num_classes,
            world=world,
            device=device,
            group_size=options.batch_rows,
            allow_unreadable=options.allow_unreadable,
            progress="scored",
        )
        return scores, {}
    train, test = (
        extract_features(trained, rows, settings, options, world, device, progress=what)
        for rows, what in ((plan.train_rows, "training features"), (plan.rows, "test features"))
    )
    lists = (train, plan.train_rows, test, plan.rows)
    of_training = {"num_train": len(train.results), "num_train_unreadable": len(train.unreadable)}
    if options.protocol == "knn":
        return score_knn(*lists, num_classes, k=options.knn_k, temperature=options.knn_temperature), of_training
    return score_linear(*lists, num_classes, l2=options.linear_l2), of_training


def _class_names(trained: "Trained", plan: _Plan) -> tuple[str, ...]:
    """Return a name for each class, the head's or those of the training list; refuses other labels."""
    train_list = plan.options.train_list
    if train_list is not None:
        classes = resolve_classes(plan.train_rows, train_list, None, None)
    elif trained.has_head:
        classes = Classes(len(trained.class_names), trained.class_names)
    else:
        raise UserError(
            "these weights have no classification head; fine-tune them (`everest finetune`), or score their "
            "features with --protocol knn or linear"
        )
    require_known_labels(plan.rows, plan.test_list, classes, range(classes.num))
    return classes.names or tuple(str(k) for k in range(classes.num))


def _test_list(origin: Origin, recipe: Config | None, options: EvaluateOptions) -> Path:
    if options.list is not None:
        return options.list
    config = origin.config if isinstance(origin.config, FinetuneConfig) else recipe
    if isinstance(config, FinetuneConfig) and config.data.test_list is not None:
        return Path(config.data.test_list)
    raise UserError("which videos? give --list FILE; the run's data.test_list is not set")


def _rows_of(path: Path | None) -> list[VideoRow]:
    if path is None:
        return []
    rows = read_list(path)
    require_reachable(rows, path)
    return rows


def _protocol(options: EvaluateOptions, train_rows: list[VideoRow]) -> dict[str, Any]:
    """Return the protocol and what it depends on."""
    if options.protocol == "head":
        return {"name": "head"}
    own = {"k": options.knn_k, "temperature": options.knn_temperature}
    return {"name": options.protocol, "train_videos": fingerprint(train_rows)} | (
        own if options.protocol == "knn" else {"l2": options.linear_l2}
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "av")
    return {"everest_ds": __version__} | {package: version(package) for package in packages}


def _write(plan: _Plan, summary: dict[str, Any], scores: "Scores", names: tuple[str, ...], began: float) -> None:
    from everest_ds.inference.confusion import save_confusion
    from everest_ds.inference.results import SUMMARY, write_predictions
    from everest_ds.train.checkpoints.run_dir import describe_environment

    out = plan.out
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(scores, plan.rows, names, out / "predictions.csv")
    with atomic_path(out / "confusion.png") as partial:
        save_confusion(scores.confusion, names, partial)
    environment = describe_environment() | {"seconds": round(time.perf_counter() - began, 1)}
    write_json(out / "environment.json", environment)
    write_json(out / SUMMARY, summary)


def _record(origin: Origin, summary: dict[str, Any]) -> None:
    """Append the scores to the run's record."""
    if origin.run_dir is None or not (origin.run_dir / "metrics.jsonl").is_file():
        return
    names = ("top1", "top5", "loss", "mean_class_accuracy", "num_scored", "num_unreadable", "protocol", "list")
    line = {"kind": "test", "step": summary["checkpoint"]["step"], "time_s": round(time.time(), 3)}
    append_json_lines(origin.run_dir / "metrics.jsonl", [line | {name: summary[name] for name in names}])
