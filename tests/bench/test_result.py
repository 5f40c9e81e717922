import json
import subprocess
import sys

import pytest

from foveate import bench
from foveate.bench.shared import result
from foveate.errors import FoveateError


def test_unknown_name_lists_the_names():
    with pytest.raises(FoveateError, match=r"'speed'.*kernels, switch, load, decode, calibrate, saved"):
        bench.run("speed")


def test_result_is_json_with_where_when_and_what():
    measured = result.Measured({"ratio": 1}, [{"round": 0, "seconds": 0.5}], ["a note"])
    whole = json.loads(json.dumps(result.finished("switch", measured)))
    assert list(whole) == ["name", "figures", "machine", "versions", "date", "rounds", "notes"]
    assert whole["figures"] == {"ratio": 1.0}
    assert {"cpu", "flags", "cores", "threads", "memory", "transparent_hugepage", "os"} <= set(whole["machine"])
    assert {"python", "torch", "transformers", "foveate", "kernels"} == set(whole["versions"])
    assert whole["machine"]["memory"] > 1 << 20


def test_names_are_modules_with_measure():
    from importlib import import_module

    assert all(callable(import_module(f"foveate.bench.{name}").measure) for name in bench.NAMES)


def test_importing_the_benchmarks_needs_no_extra():
    code = (
        "import sys\n"
        "for name in ('transformers', 'scipy', 'rich', 'typer'): sys.modules[name] = None\n"
        "from importlib import import_module\n"
        "from foveate import bench\n"
        "for name in bench.NAMES: import_module(f'foveate.bench.{name}')\n"
        "from foveate.bench.shared.extras import require\n"
        "from foveate.errors import MissingExtraError\n"
        "try: require('scipy.stats')\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'foveate[bench]'" in done.stdout
