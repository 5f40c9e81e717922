"""What is installed here, as the pins of constraints.txt: `make pins` runs this in an environment of its own.

A release that needs a newer Python than foveate does is pinned for those Pythons only.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

#: foveate's oldest Python: 3.10.
OLDEST = 10
NOT_PINNED = {"foveate", "pip"}  # pip is the one that comes with Python
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
HEAD = f"""\
# What CI and `make` install, to the last package. Made by `make pins` on Python {PYTHON}; not edited by hand.
# Pins only constrain: what another Python or platform needs besides is installed as pyproject.toml allows, and what it
# does not need is not installed. torch has no local suffix, so that a CPU build is taken where one is on disk.
"""


def pin(found: metadata.Distribution) -> str:
    """`name==version`, with a marker where the release does not support the oldest Python."""
    supported = SpecifierSet(found.metadata.get("Requires-Python") or "")
    since = next(minor for minor in range(OLDEST, 100) if supported.contains(f"3.{minor}.99"))
    marker = f'; python_version >= "3.{since}"' if since > OLDEST else ""
    return f"{canonicalize_name(found.name)}=={found.version.partition('+')[0]}{marker}"


if __name__ == "__main__":
    pins = {pin(found) for found in metadata.distributions() if canonicalize_name(found.name) not in NOT_PINNED}
    Path(sys.argv[1]).write_text(HEAD + "\n".join(sorted(pins)) + "\n", encoding="utf-8")
