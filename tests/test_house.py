"""The structure of the package: imports point downwards, files and functions stay short, names are said once."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rdm_scale"
# From top to bottom; a room may import itself and what stands below it. Rooms of one line may import each other's
# public names in neither direction.
LAYERS = (
    ("train", "tools"),
    ("scaling",),
    ("training",),
    ("evaluation",),
    ("sampling",),
    ("checkpoint",),
    ("parallel",),
    ("encoding",),
    ("data",),
    ("codecs",),
    ("storage",),
    ("diffusion", "models"),
    ("batch", "cost"),
    ("conditions",),
    ("config",),
    ("device", "launch_environment", "lazy", "moved", "parent_death", "progress"),
    ("activity", "dtypes", "errors", "rng", "run_status", "stop_request"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
CHECKED = ("rdm_scale", "tools", "tests", "benchmarks", "experiments")
PUBLIC_ALL_THE_SAME = {"_asdict", "_fields", "_make", "_replace", "_schema", "_type"}  # of NamedTuple and torch
OWN_OR_FOREIGN = {"self", "cls", "os", "sys", "torch"}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
# A first line that needs the name beside it to be understood.
ODD_OPENING = re.compile(r"(Of|What|Whether|Where|Who|How|Which|As|So|Is|Has|That|Those)\b")


def sources(*folders: str) -> list[Path]:
    """All Python files below some top-level folders; `rdm_scale/tools` is a link and counted once, as tools/."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if "tools" not in path.relative_to(ROOT).parts[1:2]]


def room_of(path: Path) -> str:
    """The first part of a module's place below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rdm_scale":
            names = [node.module or ""]
            if node.module == "rdm_scale":
                names = [f"rdm_scale.{alias.name}" for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rdm_scale."))


def documented(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, first line of the docstring) of a module and of all that is defined in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text.splitlines()[0]


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in sources("rdm_scale")} - {"__init__"}
    assert rooms <= LEVEL.keys(), f"not in LAYERS: {sorted(rooms - LEVEL.keys())}"


def test_imports_point_downwards() -> None:
    upward = []
    for path in sources("rdm_scale", "tools"):
        room = room_of(path) if PACKAGE in path.parents else "tools"
        if room == "__init__":
            continue
        for module in imported(ast.parse(path.read_text())):
            target = module.split(".")[1] if "." in module else ""
            if target in LEVEL and target != room and LEVEL[target] <= LEVEL[room]:
                upward.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not upward, "\n".join(upward)


def test_modules_form_no_cycle() -> None:
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources("rdm_scale")}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        own = name.removesuffix(".__init__")
        found = {module for module in imported(ast.parse(path.read_text())) if module in paths}
        graph[own] = found - {own}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"import cycle: {' -> '.join((*above[above.index(module) :], module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_files_and_functions_are_short() -> None:
    long = []
    for path in sources(*CHECKED):
        source = path.read_text()
        where = path.relative_to(ROOT)
        if source.count("\n") > MOST_LINES:
            long.append(f"{where}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    long.append(f"{where}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


@pytest.mark.parametrize("kind", ["file", "class"])
def test_no_two_things_share_a_name(kind: str) -> None:
    places = defaultdict(list)
    for path in sources("rdm_scale"):
        if kind == "file":
            if path.name != "__init__.py":
                places[path.name].append(str(path.relative_to(ROOT)))
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    shared = {name: where for name, where in places.items() if len(where) > 1}
    assert not shared


def test_docstrings_stand_without_the_name_beside_them() -> None:
    odd = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in sources("rdm_scale", "tools", "benchmarks", "experiments")
        for line, text in documented(ast.parse(path.read_text()))
        if ODD_OPENING.match(text)
    ]
    assert not odd, "\n".join(odd)


def test_tests_and_benchmarks_keep_to_the_public_package() -> None:
    """Neither reads a private attribute of the package, nor edits `sys.path`."""
    found = []
    for path in sources("tests", "benchmarks", "experiments"):
        tree = ast.parse(path.read_text())
        private = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rdm_scale")
            for alias in node.names
            if alias.name.startswith("_")
        }
        private |= {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.attr.startswith("_")
            and node.attr not in PUBLIC_ALL_THE_SAME
            and node.value.id not in OWN_OR_FOREIGN
            if not node.attr.startswith("__")
        }
        patched = re.findall(r'"rdm_scale\.[\w.]*\._\w+"|sys\.path\.(?:insert|append)', path.read_text())
        found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(private) + patched if path != Path(__file__)]
    assert not found, "\n".join(found)
