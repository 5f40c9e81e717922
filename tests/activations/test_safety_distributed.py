"""Two processes that train one model: DDP in its three forms and FSDP2, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import foveate

#: Far more than two processes take, on a machine that others load too; they would wait for each other for ever.
HANGS_AFTER_S = 420.0

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


@pytest.mark.parametrize("kind", ["ddp", "ddp_unused", "ddp_static", "fsdp"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("distributed_steps.py")
    source = str(Path(foveate.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), kind, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=HANGS_AFTER_S)[0] for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("the processes wait for each other")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-3000:]
