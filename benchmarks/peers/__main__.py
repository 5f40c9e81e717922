"""Build the peers' environments: `python -m benchmarks.peers`, or those that are named after it. If one fails, the
others are still built.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from benchmarks.peers.environments import ENVIRONMENTS, build
from foveate.errors import FoveateError


def main(names: Sequence[str]) -> int:
    """Build the environments that are missing, all of them if none is named, and return 0 if they exist."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = 0
    for name in names or ENVIRONMENTS:
        if name not in ENVIRONMENTS:
            logging.error("error: %r is not one of %s", name, ", ".join(ENVIRONMENTS))
            failed += 1
            continue
        environment = ENVIRONMENTS[name]
        try:
            build(environment)
        except FoveateError as error:
            failed += 1
            logging.error("error: %s", error)
        else:
            logging.info("%s: %s", environment.name, environment.folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
