"""Tests prove what handler.py does, not how: what they need of its inside is named in tests/seams.py alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {str(file.relative_to(TESTS)): file for file in sorted(TESTS.rglob("*.py")) if ".cache" not in file.parts}
OTHERS = sorted(FILES.keys() - {"seams.py", Path(__file__).name})  # this one holds the wrong ways as examples
CONTRACT = {
    *("CHECKPOINT_CONFIG", "LORA_CONFIGS", "sanitize_name", "download_file", "ensure_model_exists", "setup_models"),
    *("load_pipeline", "tokenize_chunks", "build_77_token_tensor", "long_prompt_to_embedding", "handler", "main"),
    *("DownloadError", "__file__"),
}


def names_of_handler(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file takes from handler: handler.NAME, from handler import NAME, getattr and setattr
    with a text (a monkeypatch's too), and "handler.NAME" in a text; "*" for what no one can tell from the source."""
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "handler"
    }

    def is_handler(node: ast.AST) -> bool:
        imported = isinstance(node, ast.Call) and any(
            isinstance(argument, ast.Constant) and argument.value == "handler" for argument in node.args
        )
        return imported or (isinstance(node, ast.Name) and node.id in aliases)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "handler":
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute) and is_handler(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and node.args and is_handler(node.args[0]):  # setattr(handler, "NAME", value)
            name = node.args[1] if len(node.args) > 1 else None
            yield node.lineno, name.value if isinstance(name, ast.Constant) else "*"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, name) for name in re.findall(r"(?<![\w./])handler\.([A-Za-z_]\w*)", node.value))


def foreign(source: str) -> list[str]:
    """What a file takes of handler that is not in the contract."""
    return [
        f"line {line}: {name}"
        for line, name in names_of_handler(ast.parse(source))
        if name not in CONTRACT and name != "py"
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_only_seams_looks_inside(name):
    """No file of the tests but seams.py touches a name of handler that is not in the contract."""
    assert foreign(FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import handler\nhandler.Settings",
        "import handler as h\nh.WORKER.engine()",
        "from handler import Settings",
        "import handler\nsetattr(handler, 'VOLUME', 1)",
        "import handler\nmonkeypatch.setattr(handler, 'VOLUME', 1)",
        "import handler\nmonkeypatch.setattr(handler, name, 1)",
        "import handler\nvars(handler)",
        "monkeypatch.setattr('handler.VOLUME', 1)",
        "importlib.import_module('handler').VOLUME",
        "code = 'import handler; handler.serve_queue()'",
    ],
)
def test_every_way_in_is_seen(source):
    """The test above sees attributes, imports, patches by object and by path, and code in a text."""
    assert foreign(source)


def test_each_seam_says_why():
    """Every seam has its reason beside it, and is used."""
    source = FILES["seams.py"].read_text(encoding="utf-8")
    others = [FILES[name].read_text(encoding="utf-8") for name in OTHERS]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, reason = node.name, ast.get_docstring(node)
        elif isinstance(node, ast.Assign):
            name, reason = node.targets[0].id, source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
        else:
            continue
        assert reason, name
        assert any(re.search(rf"\bseams\.{name}\b|from seams import .*\b{name}\b", text, re.S) for text in others), name
