"""Copies of this process that are killed: at a random moment, or before a given change on disk."""

import os
import random
import signal
import sys
import threading
import time
import traceback

from tqdm import tqdm

UNFINISHED = r"not finished|no profiles"  # what is said of a store that a kill left behind


def forked(work) -> int:
    """Process id of a copy of this process that does the work and ends: 0 if nothing was raised."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        tqdm.set_lock(threading.RLock())  # its own is shared with the copies: one that is killed would keep it
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Exit code of a process, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, work) -> int:
    """Exit code of a copy that does the work and is killed after so long, if it is still at it."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # it waits for us as long as we have not asked for its end
    return ended(child)


def killed_again_and_again(work, seed: int = 1):
    """Kill the work, each time a little later (a busy machine gets its time in the end), and yield, until it ends."""
    rng = random.Random(seed)
    for kills in range(100):
        if killed_after(rng.uniform(0.01, 0.2) * (1 + kills / 5), work) == 0:
            return
        yield kills
    raise AssertionError("never finished")


def die_before(number: int, work) -> int:
    """Exit code of a copy that dies by SIGKILL before file operation ``number``: 0 where there are not so many.

    Operations are opening to write, syncing, moving, removing, and making a folder.
    """

    def dies():
        left, sync = number, os.fsync
        changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

        def step(event, arguments):
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in changes or event == "fsync":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        def fsync(file):
            step("fsync", ())
            sync(file)

        os.fsync = fsync  # in this process alone, which is a copy
        sys.addaudithook(step)
        work()

    return ended(forked(dies))
