"""The order of the rooms, the size of functions, and that what documents name is there."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Rooms from the ground to the roof; imports go from a room to rooms below it.
FLOORS = [
    {"utils"},
    {"scribbles", "visualization", "config"},
    {"modeling", "data", "checkpoint"},
    {"evaluation"},
    {"engine"},
    {"annotate"},
    {"datasets", "research"},
    {"tools"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FUNCTION = 60  # lines
FOLDERS = ("blpseg", "tools", "datasets", "research")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def room(module):
    parts = module.split(".")
    return parts[0] if parts[0] != "blpseg" else parts[1] if len(parts) > 1 else None


def imports(module, nodes):
    """The modules of ours that the import statements among some nodes name."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else source for name in names]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def at_module_level(tree):
    """Statements that run at import: not those of functions, nor of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_module_level(node)


def test_imports_run_down():
    upward = [
        f"{module} imports {name}"
        for module, tree in TREES.items()
        for name in imports(module, ast.walk(tree))
        if room(module) and room(name) and room(module) != room(name) and FLOOR[room(name)] >= FLOOR[room(module)]
    ]
    assert not upward


def test_no_circle():
    graph = {module: set(imports(module, at_module_level(tree))) - {module} for module, tree in TREES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_nothing_imports_research_or_tools():
    assert not [m for m, tree in TREES.items() for n in imports(m, ast.walk(tree))
                if m.startswith("blpseg") and n.startswith(("research", "tools", "datasets"))]  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short(folder):
    long = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, tree in TREES.items()
        if module.split(".")[0] == folder
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_output_of_a_run_is_committed():
    assert not tracked("*.pth", "*.tfevents.*", "*metrics.json", "*last_checkpoint")


def test_nothing_names_a_folder_that_a_clone_lacks():
    files = [path for path in tracked("*.py", "*.md", "*.yaml", "Makefile") if "tests" not in path.parts]
    assert not [path for path in files if "../" + "shared" in path.read_text()]


def test_cited_documents_are_there():
    cited = set()
    for path in tracked("blpseg/*.py", "tools/*.py", "datasets/*.py", "configs/*.yaml"):
        cited |= set(re.findall(r"\b(?:docs/)?[A-Z_]+\.md\b", path.read_text()))
    assert not [name for name in cited if not any((ROOT / folder / name).is_file() for folder in ("", "docs"))]


def test_labels_have_names():
    """No comparison with a bare 255: blpseg.utils.labels says which of its meanings is meant."""
    bare = re.compile(r"[!=]= ?255\b")
    assert not [module for module, path in MODULES.items() if bare.search(path.read_text())]
