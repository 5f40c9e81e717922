"""One model and one server for all tests of a file; without the packages of the extra `serve` they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foveate.errors import MissingExtraError
from foveate.serve.extras import require_serving

if TYPE_CHECKING:
    from served import Served

try:
    require_serving()
except MissingExtraError as missing:
    collect_ignore_glob = ["test_*.py"]
    print(f"tests of the server are skipped: {missing}")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from served import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> Any:
    from served import byte_llama

    torch.manual_seed(0)
    return byte_llama()


@pytest.fixture(scope="module")
def served(model: Any, tokenizer: Any) -> Iterator[Served]:
    """A server without a manager, for tests that leave nothing behind."""
    from foveate.serve.options import ServeOptions, ServerLimits
    from served import serving

    limits = ServerLimits(batch=4, batch_tokens=64, cache_tokens=2048, body=20_000)
    with serving(model, tokenizer, ServeOptions(name="tiny", bend=None, limits=limits)) as one:
        yield one
