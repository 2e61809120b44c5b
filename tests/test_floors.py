"""Imports climb no floors: the table in docs/architecture.md against the syntax tree of every file."""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path.relative_to(ROOT) for path in sorted((ROOT / "vlmfast").rglob("*.py"))]
TRITON_FILES = {"_triton.py", "_tiles.py"}


class Floor(NamedTuple):
    number: int
    up_to: int  # the highest floor that the package may import
    beside: set[str]
    libraries: set[str]


class Import(NamedTuple):
    line: int
    module: str  # absolute, as deep as the statement says: "torch.nn", "vlmfast.ops._check.is_matrix"
    inside: bool  # inside a function


def read_table(text: str) -> dict[str, Floor]:
    """Package -> its row of the table."""
    floors = {}
    for number, packages, up_to, beside, libraries in re.findall(r"^\|" + r" *(.*?) *\|" * 5 + "$", text, re.M):
        if number.isdigit():
            for package in packages.split(", "):
                names = set(re.findall(r"\w+", beside)), set(re.findall(r"\w+", libraries))
                floors[package] = Floor(int(number), int(up_to or -1), *names)
    return floors


def imports(source: str, path: Path) -> list[Import]:
    """Every import of the file, relative ones made absolute."""
    found: list[Import] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join((*path.parts[: -child.level], *filter(None, [child.module])) if child.level else [])
                base = base or child.module or ""
                found.extend(Import(child.lineno, f"{base}.{alias.name}", inside) for alias in child.names)
            walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(source), False)
    return found


def offences(source: str, path: Path) -> list[str]:
    """What the file imports and may not."""
    package = path.parts[1].removesuffix(".py")
    floor, wrong = FLOORS[package], []
    for line, module, inside in imports(source, path):
        top, *rest = module.split(".")
        if top == "vlmfast":
            target = rest[0] if rest else ""
            if target not in FLOORS:
                wrong.append(f"{path}:{line} imports {module} from the package's shop window; name its own file")
            elif not (target == package or target in floor.beside or FLOORS[target].number <= floor.up_to):
                wrong.append(
                    f"{path}:{line} {package} (floor {floor.number}) imports {target} ({FLOORS[target].number})"
                )
        elif top in ("tests", "benchmarks"):
            wrong.append(f"{path}:{line} imports {top}, which nothing imports")
        elif top == "triton":
            if path.name not in TRITON_FILES:
                wrong.append(f"{path}:{line} imports triton outside {' and '.join(sorted(TRITON_FILES))}")
        elif not (inside or top in sys.stdlib_module_names or top in floor.libraries):
            wrong.append(f"{path}:{line} imports {top} at the top; optional libraries are imported inside functions")
    return wrong


FLOORS = read_table((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))


def test_table_and_tree_name_the_same_floors():
    assert len(FLOORS) >= 20
    on_disk = {path.parts[1].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert on_disk <= set(FLOORS), f"give a floor in docs/architecture.md to {sorted(on_disk - set(FLOORS))}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parts[1] not in ("__init__.py", "__main__.py")], ids=str
)
def test_imports_climb_no_floor(path):
    assert not offences((ROOT / path).read_text(encoding="utf-8"), path)


def test_the_shop_window_stops_at_the_losses():
    path = Path("vlmfast/__init__.py")
    found = imports((ROOT / path).read_text(encoding="utf-8"), path)
    wanted = [module.split(".")[1] for _, module, _ in found if module.startswith("vlmfast.")]
    assert all(FLOORS[package].number <= 3 for package in wanted), f"import vlmfast pulls in {wanted}"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("vlmfast/ops/similarity/__init__.py", "from vlmfast.losses import ClipLoss", "ops (floor 2) imports losses"),
        ("vlmfast/ops/similarity/__init__.py", "def f():\n  import vlmfast.losses", "ops (floor 2) imports losses"),
        ("vlmfast/backend.py", "def f():\n  from vlmfast import ops", "backend (floor 1) imports ops"),
        ("vlmfast/models/clip.py", "from ..data import batch", "models (floor 4) imports data"),
        ("vlmfast/data/batch.py", "from vlmfast.ops import similarity", "data (floor 4) imports ops"),
        ("vlmfast/train/loop.py", "from vlmfast.eval import metrics", "train (floor 5) imports eval"),
        ("vlmfast/recipes/demo.py", "from vlmfast.cli import main", "recipes (floor 6) imports cli"),
        ("vlmfast/eval/retrieval.py", "from vlmfast import clip_loss", "shop window"),
        ("vlmfast/eval/retrieval.py", "import vlmfast", "shop window"),
        ("vlmfast/data/images.py", "from PIL import Image", "imports PIL at the top"),
        ("vlmfast/data/images.py", "try:\n  import PIL\nexcept ImportError:\n  pass", "imports PIL at the top"),
        ("vlmfast/ops/similarity/_cpu.py", "def f():\n  import triton", "triton outside"),
        ("vlmfast/testing.py", "import tests.helpers", "which nothing imports"),
    ],
)
def test_the_check_sees_a_climb(path, source, message):
    assert any(message in line for line in offences(source, Path(path)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vlmfast/losses/clip.py", "from vlmfast import distributed\nfrom vlmfast.ops.softmax_loss import clip_loss"),
        ("vlmfast/ops/similarity/__init__.py", "from . import reference\nfrom vlmfast.ops._check import is_matrix"),
        ("vlmfast/ops/similarity/_triton.py", "import triton.language as tl"),
        ("vlmfast/data/images.py", "def f():\n  from PIL import Image"),
        ("vlmfast/cli.py", "from vlmfast.recipes import demo\nimport json"),
        ("vlmfast/_ext.py", "def f():\n  from vlmfast import _C"),
    ],
)
def test_the_check_lets_the_rest_pass(path, source):
    assert not offences(source, Path(path))
