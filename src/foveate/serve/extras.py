"""Packages that only the server needs, and the oldest transformers whose continuous batching it works with."""

from __future__ import annotations

from importlib import import_module, metadata

from foveate.errors import MissingExtraError

_MODULES = ("fastapi", "uvicorn", "openai", "prometheus_client", "transformers")
#: The first release whose model runner, scheduler and manager the engine extends.
OLDEST_TRANSFORMERS = (5, 24)


def require_serving() -> None:
    """Raise `MissingExtraError` if a package that serving needs is missing or too old."""
    for module in _MODULES:
        try:
            import_module(module)
        except ImportError as error:
            raise MissingExtraError(f'serving needs {module}: pip install "foveate[serve]"') from error
    found = metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRANSFORMERS:
        wanted = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MissingExtraError(f'serving needs transformers {wanted}, not {found}: pip install -U "foveate[serve]"')
