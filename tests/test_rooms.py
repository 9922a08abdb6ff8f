"""The order of the rooms: a module imports from its own room and from those below, and no two import each other."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import optimum_opt_trn


PACKAGE = Path(optimum_opt_trn.__file__).parent
# From top to bottom. Rooms of one floor do not import each other.
FLOORS = (
    ("__main__", "commands", "compat", "pipelines"),
    ("modeling_neuron_opt",),
    ("module_methods", "serving"),
    ("export", "generation"),
    ("targets.cpu", "targets.neuron"),
    ("targets",),
    ("planning",),
    ("checkpoint",),
    ("model",),
    ("configuration_opt",),
    ("without_optimum_neuron",),
    ("host_framework", "dtypes", "hardware", "buckets", "version"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module by its name within the package; of a package's __init__ the package's name."""
    files = (file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
    named = {".".join(file.with_suffix("").parts).removesuffix("__init__").rstrip("."): file for file in files}
    return {name: PACKAGE / file for name, file in named.items() if name and not name.startswith("commands.register")}


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """The modules of ours that `module` imports anywhere: in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            path = list(MODULES[module].relative_to(PACKAGE).with_suffix("").parts)
            base = path[: len(path) - node.level] if node.level else (node.module or "").split(".")
            base = [*base, *(node.module or "").split(".")] if node.level and node.module else base
            named = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        yield from {name.removeprefix("optimum_opt_trn.") for name in named} & MODULES.keys() - {module}


EDGES = {(importer, imported) for importer in MODULES for imported in imports(importer)}


def room(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    return next(name for name in (".".join(parts[:n]) for n in (2, 1)) if name in FLOOR)


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_imports_go_down_or_stay_in_the_room():
    """An __init__ may also import from the rooms within its own."""
    inner = {(importer, imported) for importer, imported in EDGES if imported.startswith(f"{importer}.")}
    others = {(importer, imported) for importer, imported in EDGES - inner if room(importer) != room(imported)}
    wrong = {(importer, imported) for importer, imported in others if FLOOR[room(imported)] <= FLOOR[room(importer)]}
    assert wrong == set(), "these go up, or across a floor"


def test_no_modules_import_each_other():
    """A package's __init__ is left out: it is executed before its modules, and imports from them."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    for importer, imported in EDGES:
        if importer not in packages:
            graph[importer].add(imported)
    TopologicalSorter(graph).prepare()  # CycleError names the circle
