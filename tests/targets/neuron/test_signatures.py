"""What the package touches of the Neuron SDK is in the recorded table, and the table is what the public source has."""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from requirements import needs_optimum_neuron


sys.path.insert(0, str(Path(__file__).parent))
from double.signatures import NAMES, OPTIMUM_NEURON, VERSIONS, Name


HERE = Path(__file__).parent
PACKAGE = HERE.parents[2] / "optimum_opt_trn"
SDK = ("libneuronxla", "neuronx_distributed", "neuronxcc", "torch_neuronx", "torch_xla")

# Checkouts of neuronx-distributed, separated as paths are.
SOURCES = [Path(path) for path in os.environ.get("NXD_SOURCES", "").split(os.pathsep) if path]

# Checkouts of optimum-neuron besides the one that is installed.
HOST_SOURCES = [Path(path) for path in os.environ.get("OPTIMUM_NEURON_SOURCES", "").split(os.pathsep) if path]


def chain(node: ast.expr) -> str | None:
    """`a.b.c` as it is written; None for what is not such a chain."""
    if isinstance(node, ast.Attribute):
        base = chain(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def touched(tree: ast.Module) -> Iterator[str]:
    """The SDK's names in a module, as the table calls them: imports, what is read of them, of objects made by them
    and of the compiled model (`nxd_model`), and torch.ops.neuron and torch.classes.neuron."""
    modules: set[str] = set()
    classes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in SDK)
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).partition(".")[0] in SDK:
            for alias in node.names:
                assert alias.asname is None, "the test follows names as they are"
                if alias.name[0].islower():
                    modules.add(alias.name)
                else:
                    classes[alias.name] = alias.name
                    yield alias.name
    makers = dict(classes)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None and chain(node.returns) in classes:
            makers[node.name] = str(chain(node.returns))
    objects: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and chain(node.value.func) in makers:
            objects.update(
                {t.id: makers[str(chain(node.value.func))] for t in node.targets if isinstance(t, ast.Name)}
            )
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [str(chain(base)) for base in node.bases if chain(base) in classes]
            for base in bases:
                for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
                    yield f"{base}.{method.name}"
                read = {str(chain(n)) for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                yield from {f"{base}.{name.split('.')[1]}" for name in read if name.startswith("self.")}
        if not isinstance(node, ast.Attribute):
            continue
        name = str(chain(node))
        base, _, attribute = name.rpartition(".")
        if base in modules:
            yield attribute
        elif base in objects:
            yield f"{objects[base]}.{attribute}"
        elif attribute == "nxd_model":
            yield "NxDModelExecutor.nxd_model"
        elif base.endswith(".nxd_model"):
            yield f"NxDModel.{attribute}"
        elif re.fullmatch(r"torch\.(ops|classes)\.neuron\.\w+", name):
            yield name


def test_everything_that_is_touched_is_in_the_table_and_the_other_way_round():
    found = {name for file in PACKAGE.rglob("*.py") for name in touched(ast.parse(file.read_text()))}
    # Left to the base class, which calls it.
    assert found == NAMES.keys() - {"BaseModelInstance.load_module"}


def test_the_search_finds_what_it_should():
    code = """
import torch_xla
from neuronx_distributed.trace import parallel
from libneuronxla import Compiler
class Mine(Compiler):
    def run(self): return self.state
def make() -> Compiler: ...
made = make()
made.go(parallel.split(torch.classes.neuron.Runtime), model.nxd_model.state)
"""
    assert set(touched(ast.parse(code))) == {
        "torch_xla", "Compiler", "Compiler.run", "Compiler.state", "Compiler.go", "split",
        "torch.classes.neuron.Runtime", "NxDModelExecutor.nxd_model", "NxDModel.state",
    }  # fmt: skip


def parameters(tree: ast.Module, name: str) -> tuple[tuple[str, ...], int] | None:
    """The parameters of a function, method or class without self, and how many at the end have defaults."""
    outer, _, inner = name.partition(".")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == outer:
            wanted = inner or "__init__"
            node = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == wanted), None)
        elif not (isinstance(node, ast.FunctionDef) and node.name == name):
            continue
        if node is None:
            return None
        arguments = node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        names += [extra.arg for extra in (arguments.vararg, arguments.kwarg) if extra]
        return tuple(argument for argument in names if argument != "self"), len(arguments.defaults)
    return None


FUNCTIONS = {name: entry for name, entry in NAMES.items() if entry.parameters is not None}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_double_has_the_parameters_of_the_table(name):
    file = "mappings.py" if "mappings" in NAMES[name].file else "model_builder.py"
    found = parameters(ast.parse((HERE / "double" / file).read_text()), name)
    assert found is not None and found[0] == NAMES[name].parameters


def test_calls_pass_what_the_table_has():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = {"builder.add": "ModelBuilder.add", "builder.trace": "ModelBuilder.trace"}.get(
                    str(chain(node.func)), str(chain(node.func))
                )
                if name in FUNCTIONS:
                    assert {keyword.arg for keyword in node.keywords} <= set(FUNCTIONS[name].parameters), name


def test_the_table_is_what_the_public_source_has():
    if not SOURCES:
        pytest.skip("NXD_SOURCES names no checkouts of neuronx-distributed")
    for source in SOURCES:
        version = re.search(r'"(.+)"', (source / "src/neuronx_distributed/_version.py").read_text())
        assert version and version[1] in VERSIONS
        for name, entry in NAMES.items():
            check(name, entry, (source / "src" / entry.file).read_text())


@needs_optimum_neuron
@pytest.mark.parametrize("name", OPTIMUM_NEURON)
def test_optimum_neuron_has_what_is_extended_of_it(name):
    # Next to the package that is installed lies its whole source.
    for source in (Path(sysconfig.get_paths()["purelib"]), *HOST_SOURCES):
        check(name, OPTIMUM_NEURON[name], (source / OPTIMUM_NEURON[name].file).read_text())


def check(name: str, entry: Name, text: str) -> None:
    if entry.parameters is None:
        last = name.rpartition(".")[2]
        assert re.search(rf"\b(self\.|neuron\.|import ){last}\b", text), name
        return
    found = parameters(ast.parse(text), name)
    assert found is not None, name
    names, defaults = found
    known = len(entry.parameters)
    assert names[:known] == entry.parameters, name
    assert len(names) - known <= defaults, f"{name} has new parameters without defaults"
