"""A process that takes the machine's CPUs and memory until it is told to stop: `hog.py PROCESSES BYTES`.

It prints a line when it has all that it takes, and ends when its standard input is closed.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading


def _spin() -> None:
    while True:
        pass


def main(processes: int, size: int) -> None:
    """Spin in so many processes and hold so many bytes, until standard input ends."""
    held = bytearray(size)
    for place in range(0, size, 4096):  # a page that was never written takes no memory
        held[place] = 1
    # daemons end with this process, whatever ends it
    workers = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    print("ready", flush=True)
    reader = threading.Thread(target=sys.stdin.read, daemon=True)
    reader.start()
    reader.join()
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
