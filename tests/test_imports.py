"""Imports point down the list of packages, nothing is unpickled, and `--help` answers at once.

Importing the package or mistyping a flag must load nothing heavy, and only one module may touch torch.distributed.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The rooms of the house from the top floor down: each imports only those below it.
FLOORS = [
    "__main__", "run", "budget", "training", "reports", "evaluation", "walk", "projection", "students", "sampling",
    "wan", "model", "prompts", "files", "step_metrics", "processes", "device", "flags", "flag_hints", "command_line",
    "lost_output", "errors",
]  # fmt: skip
SCRIPTS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "wandistiller").rglob("*.py"))
PRODUCT = [*SCRIPTS, *PACKAGE, *sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
COMMANDS = [path.name for path in SCRIPTS if "Flags" in path.read_text()]
HEAVY = {
    "torch", "transformers", "diffusers", "safetensors", "matplotlib", "numpy", "tensorboard", "wandb", "trackio",
    "huggingface_hub", "PIL",
}  # fmt: skip


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Full names of the modules a file imports; at_import_time leaves out those inside functions or TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_import_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.update({module, *(f"{module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def others_than_stdlib(path: Path, **settings) -> set[str]:
    return {name for name in imports(path, **settings) if name.split(".")[0] not in sys.stdlib_module_names}


def file_of(module: str) -> Path | None:
    """The file of a module of the package, or of the package that a folder is; None for other names."""
    path = ROOT.joinpath(*module.split("."))
    files = path.with_suffix(".py"), path / "__init__.py"
    return next((file for file in files if module.startswith("wandistiller.") and file.is_file()), None)


def modules_behind(path: Path) -> set[Path]:
    """Every file of the package that `path` imports when it is imported, through others too."""
    behind, waiting = set(), [path]
    while waiting:
        for name in imports(waiting.pop(), at_import_time=True):
            file = file_of(name)
            if file and file not in behind:
                behind.add(file)
                waiting.append(file)
    return behind


def room_of(path: Path) -> str:
    """The package of a file, or the module beside the packages."""
    return path.relative_to(ROOT / "wandistiller").parts[0].removesuffix(".py")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", PACKAGE, ids=names(PACKAGE))
def test_imports_point_down(path):
    """Also those inside functions and for type checkers: what a module needs to be understood lies below it."""
    if room_of(path) == "__init__":
        return
    below = FLOORS[FLOORS.index(room_of(path)) :]
    rooms = {name.split(".")[1] for name in imports(path) if file_of(name)}
    assert rooms <= set(below), f"{sorted(rooms - set(below))} lie above {room_of(path)}"
    assert not roots(imports(path)) & {script.stem for script in SCRIPTS}


def test_the_model_and_flow_matching_import_only_torch():
    for name in ("model/transformer.py", "sampling/flow.py"):
        path = ROOT / "wandistiller" / name
        outside = {root for root in roots(others_than_stdlib(path, at_import_time=True)) if root != "wandistiller"}
        assert outside == {"torch"}
        assert roots(others_than_stdlib(path)) <= {"torch", "wandistiller", "safetensors"}  # to save and load
        for behind in modules_behind(path):
            assert roots(others_than_stdlib(behind)) <= {"torch", "wandistiller"}, f"{name} leans on {behind.name}"


def test_the_config_and_the_command_line_need_no_third_party():
    for name in ("model/config.py", "run/flags.py", "command_line.py", "flags.py", "errors.py", "files/atomic.py"):
        path = ROOT / "wandistiller" / name
        for file in [path, *modules_behind(path)]:
            assert roots(others_than_stdlib(file)) <= {"wandistiller"}, name


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_share_only_the_projection_mapper(path):
    """The pre-flight runs the trainer's own functions, so it may import the trainer."""
    allowed = {"projection_mapper"} | ({"train_distillation"} if path.name == "run_production_test.py" else set())
    assert roots(imports(path)) & {script.stem for script in SCRIPTS} <= allowed


def test_the_imports_of_the_package_form_no_circle():
    """Also those inside functions and for type checkers, between the modules of one package: a reader follows them alike."""
    modules = [path for path in PACKAGE if path.name != "__init__.py"]
    TopologicalSorter(
        {path: {file for file in map(file_of, imports(path)) if file in modules and file != path} for path in modules}
    ).prepare()  # raises CycleError with the circle


def test_at_most_one_module_touches_torch_distributed():
    touching = []
    for path in PRODUCT:
        attributes = {
            ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }
        if any(name.startswith("torch.distributed") for name in attributes | imports(path)):
            touching.append(path.name)
    assert len(touching) <= 1, touching


@pytest.mark.parametrize("path", PRODUCT, ids=names(PRODUCT))
def test_nothing_is_unpickled(path):
    assert not roots(imports(path)) & {"pickle", "cPickle", "dill", "joblib", "shelve", "cloudpickle", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_state_dict_from_url"):
            weights_only = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
            assert weights_only == "True", f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            assert ast.unparse(node.value) == "False", f"line {node.value.lineno}"


@pytest.mark.parametrize("path", PRODUCT, ids=names(PRODUCT))
def test_every_file_says_what_it_is_and_runs_nothing_at_import(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    loose = [node for node in tree.body if isinstance(node, (ast.For, ast.While, ast.With))]
    assert loose == []


def loaded_by(*words: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run python; return how it ended, and the libraries that it loaded."""
    command = [sys.executable, "-X", "importtime", *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    return run, {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in run.stderr.splitlines() if "import time" in line
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_mistyped_flag_answer_at_once_and_load_nothing_heavy(name):
    run, loaded = loaded_by(name, "--help")
    assert run.returncode == 0 and "--" in run.stdout and not loaded & HEAVY
    run, loaded = loaded_by(name, "--no_such_flag", "1")
    assert run.returncode == 2 and "Traceback" not in run.stderr and not loaded & HEAVY


def test_importing_the_package_loads_nothing_heavy():
    run, loaded = loaded_by("-c", "import wandistiller; wandistiller.StudentConfig")
    assert run.returncode == 0 and not loaded & {"torch", "safetensors"}
