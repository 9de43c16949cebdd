"""Private names of other packages: those in the source are those in the table of docs/explanation/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import luigi.rpc
import luigi.worker

ROOT = Path(__file__).parent.parent
#: Documented in spite of their names.
PUBLIC = {"_asdict", "_exit", "_fields", "_make", "_replace"}
MOST = 10


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def parsed(paths: list[Path]) -> list[ast.AST]:
    return [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def defined(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def used(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "getattr"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_the_architecture_lists_every_private_name_of_another_package() -> None:
    ours = parsed([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("embedded_supabase/**/*.py")])
    nodes = parsed([Path(luigi.worker.__file__), Path(luigi.rpc.__file__)])
    luigis = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own = set(defined(ours))
    bodies = chain.from_iterable(node.body for node in ours if isinstance(node, ast.ClassDef))
    overridden = {node.name for node in bodies if isinstance(node, ast.FunctionDef)} & luigis
    names = {name for name in chain(used(ours), overridden) if is_private(name)} - PUBLIC
    found = {name for name in names if name not in own or name in overridden}
    text = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Private names of other packages\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .+ \| `(tests/\w+\.py)` \|$", section, re.MULTILINE)
    assert {name for name, _, _ in rows} == found
    assert len(found) <= MOST
    assert all((ROOT / test).is_file() for _, _, test in rows)
