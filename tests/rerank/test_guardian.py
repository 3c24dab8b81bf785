import subprocess
import sys
import time

import psutil

_PARENT = """
import subprocess, time
from gem_ray.rerank.guardian import end_with_this_process
children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
guardian = end_with_this_process(child.pid for child in children)
print(*[child.pid for child in children], flush=True)
time.sleep(60)
"""


def test_processes_end_with_the_one_that_started_them_even_if_it_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    time.sleep(0.3)
    assert all(child.is_running() for child in children)
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert len(gone) == 2, alive
