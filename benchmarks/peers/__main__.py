"""Build the peers' environments: `python -m benchmarks.peers`. If one fails, the others are still built."""

from __future__ import annotations

import logging
import sys

from benchmarks.peers.environments import ENVIRONMENTS, build
from foveate.errors import FoveateError


def main() -> int:
    """Build the environments that are missing, and return 0 if all exist."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = 0
    for environment in ENVIRONMENTS.values():
        try:
            build(environment)
        except FoveateError as error:
            failed += 1
            logging.error("error: %s", error)
        else:
            logging.info("%s: %s", environment.name, environment.folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
