"""Which module may import which: one way, and never in a circle."""
import ast
from pathlib import Path

import pytest

import elsa_models

ROOT = Path(elsa_models.__file__).parent
PACKAGE = ROOT.name

# from the bottom up; a room imports those of rows above its own, and itself. docs/architecture.md says the same
ROOMS = [
    {'_extras', '_files', '_images', '_modes', '_version'},
    {'ops', '_fonts'},
    {'layers'},
    {'models'},
    {'inspect', 'export'},
    {'hub', 'dense', 'inference'},
    {'training'},
    {'study'},
    {'commands'},
    {'__main__'},
]
RANK = {room: i for i, row in enumerate(ROOMS) for room in row}


def _modules():
    """Every module's file by its dotted name without the package's, '' for the package itself."""
    out = {}
    for path in sorted(ROOT.rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        out['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return out


MODULES = _modules()


def _imported_names(node, module, is_package):
    """Dotted names, without the package's, that one statement imports from the package; as far as they are modules."""
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
        return [n.partition('.')[2] for n in names if n.partition('.')[0] == PACKAGE]
    base = module.split('.') if module else []
    if node.level:
        up = node.level - is_package
        base = base[:len(base) - up] if up else base
        base += node.module.split('.') if node.module else []
    elif (node.module or '').partition('.')[0] == PACKAGE:
        base = node.module.split('.')[1:]
    else:
        return []
    base = '.'.join(base)
    # a name is either a module of the package `base`, or something in it
    names = [f'{base}.{a.name}'.lstrip('.') for a in node.names]
    return [n if n in MODULES else base for n in names]


def imports_of(module):
    """Modules that a module imports, wherever in it: inside functions and for type checking as well."""
    path = MODULES[module]
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            out.update(_imported_names(node, module, path.name == '__init__.py'))
    return out - {module}


def test_every_room_has_its_place():
    found = {m.partition('.')[0] for m in MODULES if m}
    assert found <= RANK.keys()


@pytest.mark.parametrize('module', [m for m in MODULES if m])
def test_imports_run_one_way(module):
    room = module.partition('.')[0]
    for imported in imports_of(module):
        other = imported.partition('.')[0]
        assert imported, f'{module} imports the package as a whole'
        allowed = other == room or RANK[other] < RANK[room]
        assert allowed, f'{module} imports {imported}'


def circles(graph):
    """Sets of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    index, low, stack, out = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            found = set(stack[stack.index(node):])
            del stack[stack.index(node):]
            if len(found) > 1:
                out.append(found)

    for node in graph:
        if node not in index:
            visit(node)
    return out


def test_circles_are_found():
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'a'}}) == [{'b', 'c'}]


def test_no_module_imports_itself_in_a_circle():
    assert not circles({module: imports_of(module) for module in MODULES})


def test_scripts_and_tests_are_not_imported():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else [])
            assert not {n.partition('.')[0] for n in names} & {'scripts', 'tests', 'benchmarks', 'pytest'}, path
