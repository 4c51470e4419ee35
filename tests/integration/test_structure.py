"""Check rules of the code: imports point one way, files and functions are small, leaves import little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "everest_ds"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_UNDOCUMENTED_LINES, MAX_FOLDER_FILES = 500, 60, 6, 14

# The parts of the project that each part may import; leaves import only leaves.
LEAVES = {"errors", "distributed", "files", "imagenet", "interrupts", "progress", "tokens"}
LEAVES |= {"console", "launchers", "processes", "pulse", "schedulers", "stacks"}
BELOW_TRAINING = {"model", "data", "config"} | LEAVES
PRODUCT = {"training_run", "train", "pictures", "inference", "planning", "recipes"} | BELOW_TRAINING
ALLOWED = {
    "__main__": {"cli"},
    "__init__": {"inference", "recipes", "train"},
    "cli": {"commands", "config", "train"} | LEAVES,
    "commands": {"benchmark", "study"} | PRODUCT,
    "study": {"benchmark"} | PRODUCT,
    "benchmark": PRODUCT,
    "inference": {"train", "pictures"} | BELOW_TRAINING,
    "planning": {"train"} | BELOW_TRAINING,
    "train": {"pictures"} | BELOW_TRAINING,
    "pictures": {"model"} | LEAVES,
    "training_run": {"train", "inference", "planning", "recipes"} | BELOW_TRAINING,
    "model": {"config"} | LEAVES,
    "data": {"config"} | LEAVES,
    "recipes": {"config"} | LEAVES,
    "config": LEAVES,
} | {leaf: LEAVES for leaf in LEAVES}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("everest_ds"):
            assert node.level == 0
            inner = node.module.split(".")[1:]
            parts |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {a.name.split(".")[1] for a in node.names if a.name.startswith("everest_ds.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert imported_parts(path) - {part} <= ALLOWED[part]


def test_modules_of_the_project_are_imported_at_the_top() -> None:
    """Exceptions: the command line, which must handle Ctrl-C early, the package, which must import quickly, and
    readers whose library may be missing.
    """
    deferring = set()
    for path in MODULES:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        inner = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
        if any((node.module or "").startswith("everest_ds") for node in inner):
            deferring.add(str(path.relative_to(PACKAGE)))
    assert deferring <= {"__init__.py", "cli/__init__.py", "data/readers/choice.py", "data/readers/container.py"}


# Packages that are imported in functions: they may be missing, or must be imported after the accelerator is chosen,
# or are heavy and used in modules that commands need before torch.
IMPORTED_LATE = {
    "av", "decord", "deepspeed", "flash_attn", "matplotlib", "mlflow", "mujoco", "pydantic", "timm", "torch",
    "torchcodec", "trackio", "transformers", "wandb",
}  # fmt: skip


def test_packages_are_imported_at_the_top_but_for_a_few() -> None:
    for path in MODULES:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        inner = [node for function in functions for node in ast.walk(function)]
        names = [alias.name for node in inner if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in inner if isinstance(node, ast.ImportFrom)]
        packages = {name.split(".")[0] for name in names} - {"everest_ds"}
        assert packages <= IMPORTED_LATE, path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {module_name(path) for path in MODULES}
    imports: dict[str, set[str]] = {}
    for path in MODULES:
        statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in statements for alias in node.names}
        needed = (found | {node.module or "" for node in statements}) & names
        imports[module_name(path)] = needed - {module_name(path)}  # the package itself may import its own modules
    while free := [name for name, needed in imports.items() if not needed]:
        for name in free:
            del imports[name]
        imports = {name: needed - set(free) for name, needed in imports.items()}
    assert not imports


def test_public_classes_have_names_of_their_own() -> None:
    seen: dict[str, Path] = {}
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Arguments":
                assert node.name not in seen, (node.name, path, seen[node.name])
                seen[node.name] = path


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in MODULES}:
        assert len(list(folder.glob("*.py"))) <= MAX_FOLDER_FILES + 1, folder  # besides __init__.py


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small_and_public_ones_are_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    tree = ast.parse(text)
    public = [node for node in tree.body if not getattr(node, "name", "_").startswith("_")]
    public += [member for node in public if isinstance(node, ast.ClassDef) for member in node.body]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
            if node in public and not node.name.startswith("_") and length > MAX_UNDOCUMENTED_LINES:
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def modules_after(code: str) -> set[str]:
    program = f"{code}; import sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_leaves_and_recipes_need_no_torch() -> None:
    loaded = modules_after(
        "import everest_ds.cli, everest_ds.recipes, everest_ds.config.file, everest_ds.distributed, "
        "everest_ds.commands.train, everest_ds.commands.plan, everest_ds.commands.benchmark, "
        "everest_ds.commands.data.check_data, everest_ds.commands.data.prepare, everest_ds.commands.data.index, "
        "everest_ds.commands.data.demo_data, "
        "everest_ds.data.lists.video_list"
    )
    assert not loaded & {"torch", "deepspeed", "decord", "timm"}


def test_clips_and_models_load_no_compiler_and_no_matplotlib() -> None:
    loaded = modules_after(
        "import everest_ds.data.clips.dataset, everest_ds.data.clips.views, everest_ds.inference.trained, "
        "everest_ds.training_run.run"
    )
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "torchvision", "sympy", "matplotlib"}


def test_model_needs_neither_deepspeed_nor_decord_nor_the_data_package() -> None:
    loaded = modules_after(
        "from everest_ds.model import flops, registry; from everest_ds.model.weights import export, loading"
    )
    assert "torch" in loaded
    assert not loaded & {"deepspeed", "decord", "av", "transformers", "everest_ds.data", "everest_ds.train"}


def test_estimating_memory_needs_no_deepspeed() -> None:
    loaded = modules_after("import everest_ds.planning.memory, everest_ds.planning.planner")
    assert not loaded & {"deepspeed", "decord", "av"}
