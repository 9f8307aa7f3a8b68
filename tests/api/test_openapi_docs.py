"""docs/api.md: its tables are the server's own, and the tests that it names are there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from jaxserve.api.openapi import DocumentConfig, openapi_document

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api_docs", ROOT / "scripts" / "make_api_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_up_to_date(script: ModuleType) -> None:
    assert script.updated(PAGE) == PAGE, "run scripts/make_api_docs.py"


def test_every_parameter_has_its_line(script: ModuleType) -> None:
    for api, table in (
        ("C", script.completion_table(script.CONFIG)),
        ("H", script.chat_table(script.CONFIG)),
    ):
        for field in table.fields:
            in_a_table = rf"^\| [^|]*`{field.name}`[^|]* \| [^|]*\b{api}\b"
            assert re.search(in_a_table, PAGE, re.MULTILINE), field.name


def test_every_test_that_it_names_exists() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE))
    assert len(named) > 40
    for file in {file for file, _ in named}:
        definitions = ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
        functions = {
            node.name for node in definitions if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert {test for other, test in named if other == file} <= functions, file


def test_no_test_is_kept_for_a_parameter_that_is_gone(script: ModuleType) -> None:
    for tests in (script.TESTS, script.TOKENIZER_TESTS):
        for name in tests:
            assert f"| `{name.rpartition('.')[2]}` |" in PAGE


def test_every_endpoint_is_named(script: ModuleType) -> None:
    for path in openapi_document(DocumentConfig(protocol=script.CONFIG))["paths"]:
        assert f"`{path.replace('{model_id}', '{id}')}`" in PAGE
