"""Drawing in several processes, from anywhere: a script, a notebook, a REPL, a test.

The idea: each worker is a fresh interpreter that reads its order from stdin and streams pickled results to stdout. The
`multiprocessing` ways were not taken: fork is unsafe under torch's threads, and spawn imports the caller's script
again, which breaks every script without a `__main__` guard. A worker whose parent dies stops at its next write.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoreid.data.drawn import Job, Order
    from autoreid.data.drawn_layout import Record

SERVE = "from autoreid.data.drawn_workers import serve; serve()"


def run_jobs(order: Order, jobs: list[Job], workers: int | None = None) -> Iterator[list[Record]]:
    """Yield the records of each job as they get ready, in any order. One worker draws in this process."""
    from autoreid.data.drawn import cameras, draw_job  # drawn imports this module

    if workers is None:
        workers = min(8, _cores())
    workers = min(workers, len(jobs))
    if workers <= 1:
        views = cameras(order)
        for job in jobs:
            yield draw_job(order, views, job)
        return
    # one thread per worker: the arrays are too small for BLAS threads to do anything but get in each other's way
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                   "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    results: queue.Queue = queue.Queue()
    processes = []
    try:
        for k in range(workers):
            process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env=environment)
            processes.append(process)
            threading.Thread(target=_listen, args=(process, (order, jobs[k::workers]), results), daemon=True).start()
        for _ in jobs:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listen(process: subprocess.Popen, task: tuple[Order, list[Job]], results: queue.Queue) -> None:
    """Hand a worker its task and put on the queue whatever it answers; a silent death becomes an error."""
    assert process.stdin and process.stdout     # they are pipes
    try:
        with process.stdin as questions:
            pickle.dump(task, questions)
        with process.stdout as answers:
            for _ in task[1]:
                results.put(pickle.load(answers))
    except (EOFError, OSError, pickle.UnpicklingError):
        results.put(RuntimeError(f"a drawing process died with status {process.wait()} (negative: killed by that "
                                 "signal, often for want of memory); try again with workers=1"))


def serve() -> None:
    """The worker's side."""
    from autoreid.data.drawn import cameras, draw_job

    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the parent too, and the parent ends its workers
    order, jobs = pickle.load(sys.stdin.buffer)
    answers = sys.stdout.buffer
    try:
        views = cameras(order)
        for job in jobs:
            pickle.dump(draw_job(order, views, job), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except BrokenPipeError:
        os._exit(1)     # nobody listens any more; a normal exit would only complain about the same pipe
    except Exception as error:
        pickle.dump(error, answers)
        answers.flush()
