"""The OpenAPI schema: it describes the routes, and a fuzzer that is driven by it (schemathesis) finds no fault."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from foveate.serve.calls import fields
from served import Served


def _body(schema: Any, path: str) -> Any:
    return schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_the_schema_has_every_field_that_is_served(served: Served) -> None:
    schema = served.ask("GET", "/openapi.json").json
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/precision", "/metrics"} <= set(
        schema["paths"]
    )
    for path, known in (("/v1/completions", fields._COMPLETION), ("/v1/chat/completions", fields._CHAT)):
        named = set(_body(schema, path)["properties"])
        assert set(known.served) <= named
        assert named <= known.served | set(known.neutral)
    assert "422" not in schema["paths"]["/v1/completions"]["post"]["responses"]


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="needs schemathesis, which is not pinned")
def test_schemathesis_finds_no_fault(served: Served) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{served.port}/openapi.json"]
    done = subprocess.run(
        [*command, "--checks", checks, "--max-examples", "40", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
