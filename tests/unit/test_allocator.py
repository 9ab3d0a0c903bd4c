"""The allocator's setting, seen from outside: page faults of tensors that come and go."""

import os
import subprocess
import sys

_FAULTS = """
import resource, sys, torch
from limaml.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    return len([torch.ones(512, 1024) for _ in range(20)])
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Where glibc starts; on its own it moves, and whether it goes on mapping then depends on what else is on the heap.
_STARTING = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def _faults(mode):
    command = [sys.executable, "-c", _FAULTS, mode]
    done = subprocess.run(command, env={**os.environ, **_STARTING}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_tensors_that_come_and_go_fault_no_pages_in():
    # Ten times 20 tensors of 512 pages, mapped anew each time or taken from the heap.
    assert _faults("default") > 10_000
    assert _faults("kept") < 1_000
