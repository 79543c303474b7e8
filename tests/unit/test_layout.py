"""The package keeps its layout: imports point one way between folders, and files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "rapid_integrations"
MAX_FILES_AT_THE_ROOT = 14
MAX_LINES = 500

# Which folders and root modules may import which. Each row names earlier rows only, so imports point one way.
# Modules of the engine with a row of their own may be imported by its folders; its other modules may not.
BASE = "errors validation structured.output_format config"
ENGINE = "engine engine.stats engine.processor engine.onednn engine.cache engine.attention engine.model"
ENGINE += " engine.decoding"
CORE = f"{BASE} tokenization prompts structured {ENGINE} retrieval events tools loading_options"
EVALUATION = "evaluation.scoring evaluation.tasks evaluation.methods evaluation.results"
FRAMEWORKS = "hosts langchain llama_index llm"
MAY_IMPORT = {
    "errors": "",
    "lazy_names": "",
    "validation": "errors",
    "structured.output_format": "errors validation",
    "config": "errors validation structured.output_format",
    "tokenization": "errors config",
    "prompts": "errors config tokenization",
    "structured": BASE,
    "engine.stats": "errors config",
    "engine.processor": "errors config",
    "engine.onednn": "errors config engine.processor",
    "engine.cache": "errors config",
    "engine.attention": "errors config engine.processor engine.onednn engine.cache",
    "engine.model": "errors config engine.processor engine.onednn engine.cache engine.attention",
    "engine.decoding": "errors config engine.stats engine.processor engine.cache engine.model",
    "engine": f"errors config {ENGINE}",
    "retrieval": "errors config tokenization engine.stats",
    "events": "engine engine.stats retrieval",
    "tools": f"{BASE} tokenization prompts structured events",
    "loading_options": BASE,
    "loading": f"{BASE} loading_options {ENGINE}",
    "answer": f"{BASE} tokenization {ENGINE} retrieval events",
    "pipeline": f"{CORE} loading answer",
    "model_choice": f"{BASE} loading_options pipeline",
    "hosts": f"{CORE} pipeline",
    "langchain": f"{CORE} lazy_names pipeline hosts",
    "llama_index": f"{CORE} lazy_names pipeline hosts",
    "chat": "langchain",
    "langchain_prompts": "langchain",
    "llm": "hosts langchain llama_index",
    "demo": f"{CORE} pipeline {FRAMEWORKS}",
    "evaluation.scoring": "errors",
    "evaluation.tasks": f"{CORE} pipeline demo evaluation.scoring",
    "evaluation.methods": f"{CORE} pipeline evaluation.tasks",
    "evaluation.results": f"{CORE} pipeline evaluation.scoring evaluation.tasks evaluation.methods",
    "evaluation.running": f"{CORE} pipeline demo {EVALUATION}",
    "evaluation": f"{CORE} pipeline demo {EVALUATION} evaluation.running",
    "benchmark": f"{CORE} pipeline {FRAMEWORKS} model_choice demo evaluation {EVALUATION}",
    NAME: f"{CORE} lazy_names pipeline {FRAMEWORKS}",  # the public names, loaded when they are first used
    "cli": f"{NAME} {CORE} pipeline {FRAMEWORKS} model_choice demo evaluation {EVALUATION} benchmark",
}

# Imports inside functions against the order above, each with its reason.
EXCEPTIONS = {
    ("pipeline", "demo"): "RapidPipeline.demo() loads the bundled pair only when it is called",
    ("hosts", "demo"): "so does demo() of the framework classes",
}


@dataclass(frozen=True)
class Import:
    """One import statement of the package that names a module of the package."""

    importer: str
    imported: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.importer} (line {self.line}) imports {self.imported}"


def module_paths() -> dict[str, Path]:
    paths = {}
    for path in sorted((ROOT / NAME).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[module.removesuffix(".__init__")] = path
    return paths


MODULES = module_paths()


def nodes_with_place(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, in_function
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from nodes_with_place(node, inside)


def imports_of(module: str, source: str, is_package: bool, modules: Mapping[str, Path]) -> Iterator[Import]:
    package = module if is_package else module.rpartition(".")[0]
    for node, in_function in nodes_with_place(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = (
                resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            )
            # ``from package import name`` imports a module if ``name`` is one, else the package itself.
            full_names = (f"{origin}.{alias.name}" for alias in node.names)
            names = [full_name if full_name in modules else str(origin) for full_name in full_names]
        else:
            continue
        for name in dict.fromkeys(names):
            if name in modules and name != module:
                yield Import(module, name, node.lineno, in_function)


def all_imports() -> list[Import]:
    return [
        found
        for module, path in MODULES.items()
        for found in imports_of(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", MODULES)
    ]


IMPORTS = all_imports()


def row_of(module: str) -> str:
    """The row of the table that a module belongs to: the longest that its name begins with."""
    if module == NAME:
        return NAME
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (row := ".".join(parts[:length])) in MAY_IMPORT:
            return row
    pytest.fail(f"{module} has no row in MAY_IMPORT: add one that says what it may import")


def find_circle(imports: list[Import]) -> list[Import]:
    """The imports of one circle, in order; empty if there is none."""
    graph: dict[str, list[Import]] = {}
    for found in imports:
        graph.setdefault(found.importer, []).append(found)
    finished: set[str] = set()

    def visit(module: str, path: list[Import]) -> list[Import]:
        for found in graph.get(module, ()):
            visited = [step.importer for step in path] + [module]
            if found.imported in visited:
                return [*path, found][visited.index(found.imported) :]
            if found.imported not in finished and (circle := visit(found.imported, [*path, found])):
                return circle
        finished.add(module)
        return []

    for module in graph:
        if module not in finished and (circle := visit(module, [])):
            return circle
    return []


class TestImports:
    def test_there_is_no_circle(self) -> None:
        circle = find_circle(IMPORTS)
        assert not circle, "a circle of imports:\n" + "\n".join(map(str, circle))

    def test_they_follow_the_order_of_the_folders(self) -> None:
        wrong = []
        for found in IMPORTS:
            rows = row_of(found.importer), row_of(found.imported)
            allowed = rows[0] == rows[1] or rows[1] in MAY_IMPORT[rows[0]].split()
            if not allowed and not (found.in_function and rows in EXCEPTIONS):
                wrong.append(str(found))
        assert not wrong, "against the order of MAY_IMPORT:\n" + "\n".join(wrong)

    def test_the_table_itself_points_one_way(self) -> None:
        earlier: list[str] = []
        for row, allowed in MAY_IMPORT.items():
            unordered = set(allowed.split()) - {*earlier, row}
            assert not unordered, f"{row} names later rows: {unordered}"
            earlier.append(row)

    def test_every_exception_is_used(self) -> None:
        used = {(row_of(found.importer), row_of(found.imported)) for found in IMPORTS if found.in_function}
        assert used >= set(EXCEPTIONS)


class TestTheChecksThemselves:
    MODULES: Mapping[str, Path] = {f"{NAME}.{name}": Path() for name in ("a", "b", "c", "folder", "folder.d")}

    def imports(self, source: str, module: str = f"{NAME}.a") -> list[tuple[str, bool]]:
        found = imports_of(module, source, False, self.MODULES)
        return [(one.imported.removeprefix(f"{NAME}."), one.in_function) for one in found]

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            (f"import {NAME}.b, os", [("b", False)]),
            (f"from {NAME} import b, c", [("b", False), ("c", False)]),
            (f"from {NAME}.b import anything", [("b", False)]),
            (f"from {NAME}.folder import d, name", [("folder.d", False), ("folder", False)]),
            (f"if TYPE_CHECKING:\n    from {NAME}.b import Name", [("b", False)]),
            (f"def function():\n    if True:\n        import {NAME}.c", [("c", True)]),
            ("from . import b\nfrom .folder.d import name", [("b", False), ("folder.d", False)]),
            ("from os import path", []),
        ],
    )
    def test_all_kinds_of_imports_are_found(self, source: str, expected: list[tuple[str, bool]]) -> None:
        assert self.imports(source) == expected

    def test_a_circle_is_found_and_a_tree_has_none(self) -> None:
        edges = {"a": "b", "b": "c", "c": "b"}
        imports = [Import(importer, imported, 1, False) for importer, imported in edges.items()]
        assert [found.importer for found in find_circle(imports)] == ["b", "c"]
        assert find_circle(imports[:2]) == []


class TestFiles:
    def test_the_package_root_holds_few_modules(self) -> None:
        files = sorted(path.name for path in (ROOT / NAME).glob("*.py"))
        assert len(files) <= MAX_FILES_AT_THE_ROOT, f"{len(files)} files at the root: {', '.join(files)}"

    def test_no_file_is_long(self) -> None:
        files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
        lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
        long = [f"{path.relative_to(ROOT)}: {lines}" for path, lines in lengths.items() if lines > MAX_LINES]
        assert not long, f"files of more than {MAX_LINES} lines:\n" + "\n".join(long)

    def test_no_file_name_begins_with_an_underscore(self) -> None:
        files = [path for path in MODULES.values() if path.name.startswith("_")]
        private = [str(path.relative_to(ROOT)) for path in files if not path.stem.endswith("__")]
        assert not private


class TestFrameworksAreNotLoaded:
    """The engine works without a host framework. (``test_package.py`` checks the same of the pipeline.)"""

    FRAMEWORKS = ("langchain", "llama_index")

    def frameworks_after(self, imports: str) -> subprocess.CompletedProcess[str]:
        program = (
            f"import sys, {imports}\n"
            f"loaded = sorted(name for name in sys.modules if name.startswith({self.FRAMEWORKS!r}))\n"
            "sys.exit(', '.join(loaded) or 0)"
        )
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    def test_importing_the_engine_loads_none(self) -> None:
        done = self.frameworks_after(", ".join(module for module in MODULES if row_of(module) == "engine"))
        assert (done.returncode, done.stderr) == (0, "")

    def test_the_check_would_notice_one(self) -> None:
        done = self.frameworks_after("langchain_core")
        assert done.returncode == 1
        assert "langchain_core" in done.stderr
