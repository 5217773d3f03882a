"""Real processes joined by gloo: ``run(script, processes)`` starts them through torchrun, as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(arguments: list[str], processes: int = 2, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """``torchrun --nproc-per-node N <arguments>``, output in a pipe, a process group of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.Popen([*torchrun, *arguments], cwd=cwd, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(arguments: list[str], processes: int = 2, timeout: float = 120, **environment: str) -> tuple[int, str]:
    """Exit status and everything printed."""
    process = start(arguments, processes, **environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output}") from None
    return process.returncode, output
