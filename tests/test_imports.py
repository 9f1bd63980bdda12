"""The one-way rule of imports, and the size of files, over the whole tree."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each folder may import of this repository: itself and everything it stands on. A name with a dot is one module.
ALLOWED = {
    "configs": {"configs"},
    "kernels": {"kernels"},
    "sharding": {"sharding", "kernels", "configs.errors"},
    "layers": {"layers", "kernels", "sharding.logical", "configs.errors"},
    "models": {"models", "layers", "kernels", "sharding.logical", "configs"},
    "data": {"data", "configs.errors"},
    "evaluation": {"evaluation", "models", "layers", "kernels", "sharding", "data", "configs"},
    "training": {"training", "evaluation", "models", "layers", "kernels", "sharding", "data", "configs"},
}
# The only packages from elsewhere that a folder may import; folders that are not named are free.
ELSEWHERE = {"configs": {"ml_collections"}}
FORBIDDEN = {
    "kernels": {"flax", "ml_collections", "optax", "orbax", "grain"},
    "layers": {"ml_collections", "optax", "orbax", "grain"},
    "data": {"jax", "flax", "optax", "orbax"},
}
LONGEST = 500


def sources() -> list[Path]:
    """Every Python file of the repository."""
    hidden = [path for path in ROOT.rglob("*.py") if any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    return sorted(path for path in set(ROOT.rglob("*.py")) - set(hidden) if "runs" not in path.relative_to(ROOT).parts)


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool, *, at_start: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `at_start` only those that run when it is first imported."""
    for node in _walk(tree, at_start):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package]
            base = ".".join([*(package if node.level else []), *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST, at_start: bool) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if at_start and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_start and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from _walk(child, at_start)


def violations(path: Path, root: Path = ROOT) -> list[str]:
    """Imports of a file that the rule forbids."""
    module = module_name(path, root)
    folder = module.partition(".")[0]
    if folder not in ALLOWED:
        return []
    wrong = []
    for name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py"):
        top = name.partition(".")[0]
        if top in ALLOWED:
            allowed = any(name == ours or name.startswith(f"{ours}.") for ours in ALLOWED[folder])
        elif top in ("train", "eval", "tests", "benchmarks"):
            allowed = False
        else:
            free = top in sys.stdlib_module_names or folder not in ELSEWHERE or top in ELSEWHERE[folder]
            allowed = free and top not in FORBIDDEN.get(folder, ())
        if not allowed:
            wrong.append(f"{path.relative_to(root)} imports {name}")
    return wrong


def circle(files: list[Path], root: Path = ROOT) -> list[str]:
    """The modules of an import circle, or nothing."""
    known = {module_name(path, root): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imports(ast.parse(path.read_text()), module, path.name == "__init__.py", at_start=True):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != module:
                graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way():
    assert not [line for path in sources() for line in violations(path)]


def test_no_import_circles():
    assert not circle(sources())


def test_no_file_is_longer_than_one_sitting():
    files = [*sources(), *(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
    assert not [(str(path), lines) for path in files if (lines := len(path.read_text().splitlines())) > LONGEST]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/a.py", "import layers"),
        ("kernels/a.py", "from flax import nnx"),
        ("kernels/op/a.py", "def f():\n    from models import build"),
        ("layers/a.py", "from sharding.layout import Layout"),
        ("layers/a.py", "from sharding import layout"),
        ("data/a.py", "import jax.numpy as jnp"),
        ("data/a.py", "from kernels.tokens import Tokens"),
        ("configs/a.py", "import numpy as np"),
        ("models/a.py", "import training.state"),
        ("evaluation/a.py", "from training import state"),
        ("kernels/a.py", "from configs.errors import unknown"),
        ("evaluation/a.py", "import train"),
        ("layers/attention/a.py", "from ...models import plan"),
    ],
)
def test_the_rule_sees_a_planted_import(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(path, tmp_path)


def test_the_rule_lets_lower_folders_through(tmp_path):
    path = tmp_path / "layers" / "attention" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import jax\nfrom kernels.attention import masks\nfrom sharding.logical import constrain\n")
    assert not violations(path, tmp_path)


def test_a_planted_circle_is_seen(tmp_path):
    for name, source in (("a", "from kernels import b"), ("b", "import kernels.c"), ("c", "from .a import x")):
        (tmp_path / "kernels").mkdir(exist_ok=True)
        (tmp_path / "kernels" / f"{name}.py").write_text(source)
    files = sorted((tmp_path / "kernels").glob("*.py"))
    assert set(circle(files, tmp_path)) == {"kernels.a", "kernels.b", "kernels.c"}
    (tmp_path / "kernels" / "c.py").write_text("def f():\n    from .a import x\n")
    assert not circle(files, tmp_path)
