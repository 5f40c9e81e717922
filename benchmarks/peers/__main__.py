"""Make the peers' environments: `python -m benchmarks.peers`. One that fails does not keep the others from it."""

from __future__ import annotations

import logging
import sys

from benchmarks.peers.environments import ENVIRONMENTS, build
from foveate.errors import FoveateError


def main() -> int:
    """Make what is missing; 0 if all are there."""
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
