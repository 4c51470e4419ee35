"""The commands: what each is for, and what is said when Ctrl-C ends it."""

from collections.abc import Sequence

COMMANDS = {
    "doctor": "devices, attention backends, decoders, DeepSpeed, versions; exits 1 when something is missing",
    "demo-data": "a small labelled H.264 dataset with train.csv, val.csv, test.csv",
    "index": "a public dataset's own layout and split files into train, val and test lists",
    "check-data": "which videos of a list cannot be read, hang, are cut off; exits 1 when too many are bad",
    "prepare": "re-encode the videos of lists so that they are quick to read; exits 1 when too many fail",
    "recipes": "the recipes; with a name: resolved config, token counts, batch arithmetic, DeepSpeed JSON",
    "plan": "will a recipe fit N GPUs, what takes the memory, and the command; exits 1 when nothing fits",
    "pretrain": "pre-train a recipe; every config field is a flag",
    "finetune": "fine-tune a recipe on labelled videos, scoring it on the way",
    "evaluate": "score a run, a checkpoint or weights over a list, several views a video",
    "predict": "labels or features of new videos, files or folders",
    "convert": "weights in and out: runs, official .pth files, Hugging Face folders, safetensors",
    "study": "the paper's comparisons in miniature, on demo data; exits 1 when a run failed",
    "benchmark": "flops: the paper's costs beside ours; data: what clips cost; step: speed, memory, MFU",
}
"""What each command is for, by name."""
EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""

_CONTINUES = "the same command continues where it stopped"
_STARTS_AGAIN = "the same command starts again"
_INTERRUPTED = dict.fromkeys(COMMANDS, f"interrupted; {_STARTS_AGAIN}") | {
    "check-data": f"interrupted; {_CONTINUES}",
    "demo-data": f"interrupted; {_CONTINUES}",
    "prepare": f"interrupted; {_CONTINUES}",
    "study": f"interrupted, its runs are stopped; {_CONTINUES}",
    "pretrain": f"interrupted before the first step, nothing was trained; {_STARTS_AGAIN}",
    "finetune": f"interrupted before the first step, nothing was trained; {_STARTS_AGAIN}",
}


def interrupted(words: Sequence[str]) -> str:
    """Return what is said when Ctrl-C ends a command line; a training that has begun says something else."""
    text = _INTERRUPTED.get(words[0] if words else "", "interrupted")
    return f"everest: {text} (exit code {EXIT_INTERRUPTED})"
