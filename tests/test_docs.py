"""The documents tell the truth: docstrings have their parts, code blocks run, named flags and files exist."""

import ast
import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmfast import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
# Modules with an underscore are private; a reference's three functions are described once, in CONTRIBUTING.
PUBLIC = [
    path
    for path in sorted((ROOT / "vlmfast").rglob("*.py"))
    if path.name == "__init__.py" or not (path.name.startswith("_") or path.name == "reference.py")
]
# A block that imports one of these runs where it is installed.
OPTIONAL = {"open_clip", "open_clip_train", "sentence_transformers", "transformers"}
SECTIONS = ("Equals", "Args", "Returns", "Yields", "Raises", "Source")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Name and node of each public function, class and method of a module."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, Function) and not child.name.startswith("_"):
                    yield f"{node.name}.{child.name}", child


def exported() -> set[str]:
    """The names that the packages' `__init__.py` list in `__all__`."""
    names: set[str] = set()
    for path in PUBLIC:
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.name == "__init__.py" else []:
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
                names |= set(ast.literal_eval(node.value))
    return names


def section(doc: str, name: str) -> str | None:
    """The text under `name:` in a docstring, or None."""
    found = re.search(rf"^{name}:(.*?)(?=^(?:{'|'.join(SECTIONS)})\b|\Z)", doc, re.M | re.S)
    return found.group(1) if found else None


def raised(function: Function) -> set[str]:
    """Names of the exceptions that leave the function, as far as its own body builds them and does not catch them."""
    calls = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    built = {ast.unparse(call.func).split(".")[-1] for call in calls if isinstance(call, ast.Call)}
    handlers = (node.type for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.type)
    caught = {name for handler in handlers for name in re.findall(r"\w+", ast.unparse(handler))}
    names = {"MissingExtraError" if name == "missing_extra" else name for name in built - caught}
    return {name for name in names if not name.startswith("_")}


def faults(name: str, node: Function | ast.ClassDef, whole: bool) -> list[str]:
    """What the docstring of a public function or class lacks; `whole`: it is exported, so it owes every part."""
    doc = ast.get_docstring(node)
    if not doc:
        # A method that only carries out the sentence of its class or base may leave it at that.
        carries_out = "." in name and (name.endswith(".forward") or len(node.body) == 1)
        return [] if carries_out else [f"{name} has no docstring"]
    wrong = [] if doc.splitlines()[0].rstrip().endswith((".", ":")) else [f"{name}: line 1 is not a sentence"]
    if isinstance(node, ast.ClassDef):
        return wrong
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
    args = section(doc, "Args")
    if args is not None:
        stars = [each.arg for each in (node.args.vararg, node.args.kwarg) if each]
        listed = [each for entry in re.findall(r"^ {4}([\w*, ]+):", args, re.M) for each in re.findall(r"\w+", entry)]
        wrong += [f"{name}: Args lacks {each}" for each in names if each not in listed]
        wrong += [f"{name}: Args tells of {each}, no argument" for each in listed if each not in (*names, *stars)]
    elif whole:
        wrong += [f"{name}: Args lacks {each}" for each in names if f"`{each}`" not in doc]
    gives_tensors = node.returns is not None and "Tensor" in ast.unparse(node.returns)
    if whole and gives_tensors and section(doc, "Returns") is None and section(doc, "Yields") is None:
        wrong.append(f"{name} gives tensors and has no Returns")
    return wrong + [f"{name} does not tell that it raises {each}" for each in sorted(raised(node)) if each not in doc]


@pytest.mark.parametrize("path", PUBLIC, ids=named)
def test_docstrings_have_their_parts(path):
    tree, names = ast.parse(path.read_text(encoding="utf-8")), exported()
    assert ast.get_docstring(tree) or not tree.body, f"{named(path)} does not say what it is"
    wrong = [fault for name, node in public(tree) for fault in faults(name, node, name in names)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(x): pass", "f has no docstring"),
        ("class A: pass", "A has no docstring"),
        ("class A:\n  'A thing.'\n  def f(self):\n    x = 1\n    return x", "A.f has no docstring"),
        ("def f(x):\n  'The x'", "line 1 is not a sentence"),
        ("def f(x):\n  'The thing.'", "Args lacks x"),
        ("def f(x, y):\n  '''The thing.\n\n  Args:\n      x: [B, D].\n  '''", "Args lacks y"),
        ("def f(x):\n  '''The thing.\n\n  Args:\n      x: [B, D].\n      z: [].\n  '''", "Args tells of z"),
        ("def f(x) -> Tensor:\n  'The thing of `x`.'", "has no Returns"),
        ("def f(x):\n  'The thing of `x`.'\n  raise ShapeError('no')", "that it raises ShapeError"),
        ("def f():\n  'The thing.'\n  raise missing_extra('a', 'b')", "that it raises MissingExtraError"),
    ],
)
def test_the_check_sees_a_missing_part(source, fault):
    found = [each for name, node in public(ast.parse(source)) for each in faults(name, node, whole=True)]
    assert any(fault in each for each in found), found


def blocks(path: Path, language: str) -> list[str]:
    """The document's code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=named)
def test_code_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}  # a document's blocks build on one another
    for block in blocks(path, "python"):
        imports = re.findall(r"^\s*(?:import|from) [^#\n]*", block, re.M)
        wanted = set(re.findall(r"\w+", " ".join(imports))) & OPTIONAL  # vlmfast.integrations has modules so named
        if all(importlib.util.find_spec(library) for library in wanted):
            exec(compile(block, named(path), "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_named_flags_exist(path):
    flags = {name: set(command_flags(name)) for name in cli.COMMANDS}
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for command, rest in re.findall(rf"vlmfast ({'|'.join(cli.COMMANDS)})\b([^`|#\n]*)", text):
        unknown = set(re.findall(r"--[a-z][\w-]*", rest)) - flags[command] - {"--help"}
        assert not unknown, f"{named(path)}: vlmfast {command} has no {sorted(unknown)}"


def command_flags(command: str) -> list[str]:
    config = importlib.import_module("vlmfast.recipes." + cli.module_name(command)).Config
    return ["--" + field.name.replace("_", "-") for field in dataclasses.fields(config)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing, f"{named(path)} links to {missing}"


def test_the_readme_tree_is_the_tree():
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "vlmfast/cli.py" in block)
    told = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    absent = [path for path in sorted(told) if not list(ROOT.glob(path))]
    assert not absent, f"the README's tree names what is not there: {absent}"
    real = {named(path) for path in (ROOT / "vlmfast").glob("*.py")} | {
        named(path) for path in (ROOT / "vlmfast").glob("*/*.py") if not path.name.startswith("__")
    }
    untold = sorted(path for path in real if not any(Path(path).match(pattern) for pattern in told))
    assert not untold, f"the README's tree lacks {untold}"
