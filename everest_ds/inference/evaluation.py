"""The work of `everest evaluate`: scores a list, and writes files and a line in the run's record.

Works with and without a launcher. Each process reads the weights itself and scores its share of the list.
"""

import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image

from everest_ds import __version__, distributed
from everest_ds.console.messages import say
from everest_ds.data.lists.classes import Classes, require_known_labels, resolve_classes
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import append_json_lines, atomic_path, write_json
from everest_ds.inference import results
from everest_ds.inference.confusion import save_confusion
from everest_ds.inference.job import EvaluationJob
from everest_ds.inference.passes import Passes
from everest_ds.inference.probing import score_knn, score_linear
from everest_ds.inference.scores import Scores, score
from everest_ds.inference.trained import Trained, load_trained
from everest_ds.train.checkpoints.origin import Origin
from everest_ds.train.checkpoints.run_dir import describe_environment
from everest_ds.train.record.stored.evaluations import SUMMARY
from everest_ds.train.trackers.tensorboard import show_scores


def run(job: EvaluationJob, world: World) -> int:
    """Score a model over a list and write the results; return the exit code, 0.

    Raises:
        UserError: Labels or weights are wrong, or a video cannot be read.
    """
    began = time.perf_counter()
    options = job.options
    # All checks that need no process group come first, so that all ranks end with the same error.
    on_gpu = distributed.select_accelerator()
    trained = load_trained(job.origin, job.settings, options, torch.device("cuda" if on_gpu else "cpu"))
    names = _class_names(trained, job)
    summary = job.identity | {"views": results.view_recipe(job.settings, trained.num_kept)}
    results.require_own(job.out, summary)

    passes = trained.start(options, world)
    if world.is_main:
        say(trained.report)
        say(
            f"{job.origin.choice}: {job.origin.weights}, weights {trained.kind}, {trained.precision.name}, "
            f"attention {trained.attention}, {trained.kept}\n"
            f"{len(job.rows)} videos x {job.settings.num_views} views on {world.size} x {passes.device.type}"
        )
    scores, of_training = _score(job, trained, len(names), passes)
    if world.is_main:
        summary |= results.score_summary(scores, names, len(job.rows)) | of_training
        summary |= {"classes": list(names), "precision": trained.precision.name, "attention": trained.attention}
        versions = {"everest_ds": __version__} | {name: version(name) for name in ("torch", "torchvision", "av")}
        summary |= {"batch_rows": options.batch_rows, "versions": versions}
        _write(job, summary, scores, names, began)
        _record(job.origin, summary)
        _show(job, summary)
        print(results.table(scores, names, trained.kept), flush=True)
        say(str(job.out))
    distributed.finish()
    return 0


def _score(job: EvaluationJob, trained: Trained, num_classes: int, passes: Passes) -> tuple[Scores, dict[str, Any]]:
    """Return the scores by the chosen protocol, and the summary's fields about training videos."""
    options = job.options
    if options.protocol == "head":
        dataset = trained.dataset(job.rows)
        return score(trained.wrap(trained.model), dataset, num_classes, passes, progress="scored"), {}
    train = trained.features(job.train_rows, passes, progress="training features")
    test = trained.features(job.rows, passes, progress="test features")
    lists = (train, job.train_rows, test, job.rows)
    of_training = {"num_train": len(train.results), "num_train_unreadable": len(train.unreadable)}
    if options.protocol == "knn":
        return score_knn(*lists, num_classes, k=options.knn_k, temperature=options.knn_temperature), of_training
    return score_linear(*lists, num_classes, l2=options.linear_l2), of_training


def _class_names(trained: Trained, job: EvaluationJob) -> tuple[str, ...]:
    """Return a name for each class, of the training list or the head; refuse labels outside of them."""
    train_list = job.options.train_list
    if train_list is not None:
        classes = resolve_classes(job.train_rows, train_list, None, None)
    elif trained.has_head:
        classes = Classes(len(trained.class_names), trained.class_names)
    else:
        raise UserError(
            "these weights have no classification head; fine-tune them (`everest finetune`), or score their "
            "features with --protocol knn or linear"
        )
    require_known_labels(job.rows, job.test_list, classes, range(classes.num))
    return classes.names or tuple(str(k) for k in range(classes.num))


def _write(
    job: EvaluationJob, summary: dict[str, Any], scores: Scores, names: tuple[str, ...], began: float
) -> None:
    out = job.out
    out.mkdir(parents=True, exist_ok=True)
    results.write_predictions(scores, job.rows, names, out / "predictions.csv")
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


def _show(job: EvaluationJob, summary: dict[str, Any]) -> None:
    """Show results inside a run directory in TensorBoard, if the run is shown there."""
    origin = job.origin
    if origin.config is None or origin.run_dir is None or "tensorboard" not in origin.config.run.log_to:
        return
    if not job.out.resolve().is_relative_to(origin.run_dir.resolve()):
        return
    names = ("top1", "top5", "loss", "mean_class_accuracy")
    scores = {f"test/{name}": summary[name] for name in names if summary[name] is not None}
    with Image.open(job.out / "confusion.png") as picture:
        show_scores(job.out, scores, np.asarray(picture.convert("RGB")), summary["checkpoint"]["step"])
