"""Training text: the Python standard library's own source, as files and as short chats.

Freely redistributable (PSF licence) and present wherever Python is, so that anyone can rebuild the tiny pair.
A file is held out when the SHA-256 of its path below the library's root falls in a fixed band: the split does not
depend on the machine, and the same files are held out from the tokenizer, the target and the drafter.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PER_MILLE = 40
MAX_FILE_BYTES = 300_000


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def source_files() -> list[Path]:
    """Non-test source files of the standard library below 300 kB, sorted by path."""
    root = library_root()
    skipped = ("site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data")
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in skipped for part in parts) and path.stat().st_size < MAX_FILE_BYTES:
            files.append(path)
    return files


def is_held_out(path: Path) -> bool:
    name = path.relative_to(library_root()).as_posix()
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore").replace("\t", "    ")


def texts(held_out: bool) -> list[str]:
    """File texts of one side of the split."""
    return [read(path) for path in source_files() if is_held_out(path) == held_out]


def chats(held_out: bool) -> list[tuple[str, str]]:
    """(request, answer) pairs made of documented functions: the docstring's first line asks, the source answers."""
    pairs: list[tuple[str, str]] = []
    for text in texts(held_out):
        pairs.extend(_functions(text))
    return pairs


def _functions(text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        source = ast.get_source_segment(text, node, padded=True)
        if not doc or not source or not 80 <= len(source) <= 1500:
            continue
        indent = " " * node.col_offset
        lines = [line.removeprefix(indent) for line in source.splitlines()]
        request = f"Write a Python function `{node.name}`: {doc.splitlines()[0].strip()}"
        yield request, "```python\n" + "\n".join(lines) + "\n```"
