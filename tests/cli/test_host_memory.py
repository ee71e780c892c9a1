"""Memory that a process frees stays with it for its next step, unless its environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from llava_keeplora.host_memory import SET_BY_USER

#: Allocates and frees blocks of 20 MiB twice, and prints how many pages the second round made anew.
PROGRAM = """
import ctypes, resource, sys
from llava_keeplora.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(20 * 2**20) for _ in range(5)]
    for block in blocks: ctypes.memset(block, 1, 20 * 2**20)
    for block in blocks: libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def second_round(word, **settings):
    env = {name: value for name, value in os.environ.items() if name not in SET_BY_USER} | settings
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_a_step_frees_the_next_one_gets_without_new_pages():
    pages = 5 * 20 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    (_, plainly), (kept, then) = second_round("plain"), second_round("keep")
    assert kept == "True" and then < pages / 10 < plainly


@pytest.mark.parametrize("name", SET_BY_USER)
def test_an_environment_that_sets_the_allocator_is_left_as_it_is(name):
    value = "glibc.malloc.trim_threshold=65536" if name == "GLIBC_TUNABLES" else "65536"
    assert second_round("keep", **{name: value})[0] == "False"
