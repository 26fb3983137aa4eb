"""Stubs to complete, made of documented functions: Python that ends after a docstring, bare or in a request."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.build import prompts, stubs

TARGET = Path(__file__).parents[2] / "models/tiny/target"
FUNCTION = stubs.Documented("join_all", ("parts", "sep"), "Join the parts.\n\nEmpty parts are left out.")


def seeded() -> list[random.Random]:
    return [random.Random(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def functions() -> list[stubs.Documented]:
    return stubs.documented(held_out=True)


def test_every_documented_function_of_the_library_becomes_a_function_without_a_body(functions):
    assert len(functions) > 100
    rng = random.Random(0)
    for function in functions:
        (node,) = (n for n in ast.parse(stubs.stub(function, rng)).body if isinstance(n, ast.FunctionDef))
        assert node.name == function.name
        assert len(node.body) == 1
        assert ast.get_docstring(node)


def test_annotations_name_only_what_is_imported():
    for rng in seeded():
        tree = ast.parse(stubs.stub(FUNCTION, rng))
        imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - {"int", "float", "str", "bool"}
        assert used <= imported


def test_stubs_come_with_and_without_annotations_imports_and_each_kind_of_example():
    codes = [stubs.stub(FUNCTION, rng) for rng in seeded()]
    for mark in (">>> join_all(", "join_all(", " -> ", "import ", "Example", "==", "'''"):
        shares = sum(mark in code.replace("def join_all(", "") for code in codes) / len(codes)
        assert 0.02 < shares < 0.98, mark


def test_a_long_docstring_is_cut_at_a_line():
    long = stubs.Documented("f", (), "\n".join(f"line {i} of the docstring" for i in range(100)))
    for rng in seeded():
        lines = [line.strip() for line in stubs.stub(long, rng).splitlines() if "of the docstring" in line]
        assert 1 <= len(lines) <= 25
        assert all(line.endswith("of the docstring") for line in lines)


def test_the_code_inside_the_fence_of_a_request_is_the_stub(tmp_path):
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    codes = [stubs.stub(FUNCTION, rng) for rng in seeded()]
    requests = [stubs.request(code, rng) for code, rng in zip(codes, seeded())]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in requests))
    assert len({text.replace(code, "") for text, code in zip(requests, codes)}) >= len(stubs.WORDINGS)
    inside = [tokenizer.decode(ids) for ids in prompts.inside_fence(tokenizer, file)]
    assert inside == [code.strip("\n") + "\n" for code in codes]
