"""Prints the oldest releases that pyproject.toml allows of the packages that `make test-oldest` tests."""

import re
from pathlib import Path

PACKAGES = ("transformers", "safetensors", "typer", "rich")

if __name__ == "__main__":
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', project))
    print(*(f"{name}=={bounds[name]}" for name in PACKAGES))
