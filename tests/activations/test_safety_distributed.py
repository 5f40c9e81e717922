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


KINDS = ("ddp", "ddp_unused", "ddp_static", "fsdp")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """How each of two processes ended that train in every form one after the other, and what it printed."""
    script = Path(__file__).with_name("distributed_steps.py")
    source = str(Path(foveate.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    meeting = tmp_path_factory.mktemp("two") / "meeting"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(meeting), *KINDS],
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
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, ended: list[tuple[int, str]]) -> None:
    for _, said in ended:
        assert f"passed: {kind}" in said.splitlines(), said[-3000:]


def test_both_processes_end_well(ended: list[tuple[int, str]]) -> None:
    assert [code for code, _ in ended] == [0, 0], "\n".join(said for _, said in ended)[-3000:]
