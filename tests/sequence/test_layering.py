"""Imports point one way: sequence → methods → {models, adapters, capture} → subspace; eval and recipes know none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from llava_keeplora import run_folder

ROOT = Path(__file__).parents[2]
#: Lower layers know nothing of the ones above them.
ABOVE = {
    "distributed": [
        "analysis",
        "export",
        "plan",
        "start",
        "capture",
        "adapters",
        "models",
        "methods",
        "sequence",
        "report",
        "config",
        "cli",
    ],
    "subspace": [
        "analysis",
        "export",
        "plan",
        "start",
        "capture",
        "adapters",
        "models",
        "methods",
        "sequence",
        "report",
        "config",
        "cli",
    ],
    "capture": [
        "analysis",
        "export",
        "plan",
        "start",
        "adapters",
        "models",
        "methods",
        "sequence",
        "report",
        "config",
        "cli",
    ],
    "adapters": [
        "analysis",
        "export",
        "plan",
        "start",
        "capture",
        "models",
        "methods",
        "sequence",
        "report",
        "config",
        "cli",
    ],
    "models": [
        "analysis",
        "export",
        "plan",
        "start",
        "capture",
        "adapters",
        "methods",
        "sequence",
        "report",
        "cli",
    ],
    "methods": ["analysis", "export", "plan", "start", "models", "sequence", "report", "config", "cli"],
    "analysis": ["doctor", "plan", "sequence", "methods", "capture", "cli"],
    "export": ["analysis", "doctor", "plan", "sequence", "capture", "cli"],
    "adopt": ["analysis", "compare", "doctor", "plan", "sequence", "report", "cli"],
    "plan": ["analysis", "doctor", "sequence", "export", "report", "cli"],
    "start": ["analysis", "doctor", "plan", "sequence", "export", "report", "cli"],
    "doctor": ["analysis", "sequence", "export", "report", "cli"],
    "compare": ["analysis", "doctor", "plan", "export", "models", "methods", "sequence", "cli"],
    "report": [
        "analysis",
        "compare",
        "plan",
        "export",
        "sequence",
        "methods",
        "models",
        "adapters",
        "capture",
        "cli",
    ],
    "config": ["analysis", "doctor", "plan", "export", "models", "sequence", "report", "cli", "saved_run"],
    "run_folder": ["analysis", "doctor", "plan", "export", "models", "sequence", "report", "cli"],
    "guard": ["analysis", "doctor", "plan", "start", "models", "methods", "sequence", "report", "cli"],
    "reproduce": [
        "analysis",
        "doctor",
        "plan",
        "export",
        "models",
        "methods",
        "sequence",
        "report",
        "cli",
        "saved_run",
    ],
    "sequence": ["compare", "cli", "memory"],
    "memory": ["analysis", "doctor", "plan", "start", "sequence", "compare", "cli"],
}


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, at its head or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(part: str) -> list[Path]:
    folder = ROOT / "llava_keeplora" / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("part", ABOVE)
def test_no_file_of_a_layer_imports_a_layer_above(part):
    for path in files(part):
        wrong = {
            n
            for n in imports_of(path)
            for above in ABOVE[part]
            if f"{n}.".startswith(f"llava_keeplora.{above}.")
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("folder", ["eval", "data_recipes"])
def test_eval_and_recipes_import_nothing_of_the_training_half(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        wrong = {n for n in imports_of(path) if n == "llava_keeplora" or n.startswith("llava_keeplora.")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_driver_is_imported_by_the_run_object_the_command_line_and_the_checks_alone():
    importers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "llava_keeplora").rglob("*.py")
        if any(n.startswith("llava_keeplora.sequence") for n in imports_of(path))
        and path.parent.name not in ("sequence", "cli", "testing")
        and path.name != "run.py"
    }
    assert not importers


def test_importing_eval_and_recipes_loads_nothing_of_the_training_half():
    code = (
        "import sys, llava_keeplora_eval, llava_keeplora_recipes; "
        "print(*(m for m in sys.modules if m == 'llava_keeplora' or m.startswith('llava_keeplora.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def graph() -> dict[str, set[str]]:
    """Module → the modules of the three packages that it imports, in functions and under TYPE_CHECKING too."""
    names = {
        "llava_keeplora": "llava_keeplora",
        "eval": "llava_keeplora_eval",
        "data_recipes": "llava_keeplora_recipes",
    }
    modules = {}
    for folder, package in names.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    edges = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                inside = {f"{source}.{alias.name}" for alias in node.names}
                named |= {name if name in modules else source for name in inside}
        edges[module] = {name for name in named if name in modules} - {module}
    return edges


def test_no_module_imports_itself_through_others():
    edges = graph()
    assert len(edges) > 200 and edges["llava_keeplora_eval.scoring"], "the graph has edges"
    # What imports nothing that is left is on no circle.
    while free := {module for module, targets in edges.items() if not targets}:
        edges = {module: targets - free for module, targets in edges.items() if module not in free}
    # Nor is what nothing imports that is left.
    while free := set(edges) - set().union(*edges.values()):
        edges = {module: targets for module, targets in edges.items() if module not in free}
    assert not edges, f"a circle of imports among {sorted(edges)}"


def test_files_and_functions_fit_a_screen_or_few():
    """No file over 450 lines, no function over 60."""
    long = []
    for folder in ("llava_keeplora", "eval", "data_recipes", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            long += [str(path)] * (len(text.splitlines()) > 450)
            long += [
                f"{path}:{node.name}"
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
            ]
    assert not long


def test_names_of_a_runs_files_stand_in_run_folder_alone():
    names = {v for name, v in vars(run_folder).items() if name.isupper() and isinstance(v, str) and "." in v}
    assert {"journal.jsonl", "table.csv", "training-*.safetensors"} <= names
    spelled = {
        (str(path.relative_to(ROOT)), node.value)
        for path in (ROOT / "llava_keeplora").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names | {"forecast"}
    }
    # the configuration of a checkpoint, which transformers names
    allowed = {("llava_keeplora/models/__init__.py", "config.json")}
    assert {pair for pair in spelled if pair[0] != "llava_keeplora/run_folder.py"} == allowed
