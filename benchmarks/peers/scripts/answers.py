"""The scripts' side of the protocol: for each line of JSON in, one line of JSON out, until the input ends.

    {"do": "time", "rows": 1}  ->  {"seconds": 0.0004}

What a library prints goes to stderr, so stdout has only answers. A request that fails ends the process, and the other
side reads the reason from the last line of stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(handlers: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """Answer requests. `do` names the handler, and all other keys are its arguments."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
