"""Starts `python -m train`, or a script, many times without paying for the import of torch each time: a process that has
imported everything forks a child for each run. Run as a program it is that process; `Zygote` talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from places import ROOT


@dataclass
class Job:
    """A run: its process and where its output goes."""

    zygote: Zygote
    pid: int
    out: Path
    err: Path

    def wait(self, timeout: float = 120.0) -> int:
        """The exit code as subprocess gives it: negative for a signal. Kills the process where it takes longer."""
        code = self.zygote.ask({"wait": self.pid, "timeout": timeout})
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.zygote.ask({"wait": self.pid, "timeout": 30})
            raise TimeoutError(f"still running after {timeout} s\n{self.stdout}\n{self.stderr}")
        return int(code)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    @property
    def stderr(self) -> str:
        return self.err.read_text() if self.err.exists() else ""

    def until(self, words: str, timeout: float = 60.0) -> None:
        """Wait for the words on its standard output."""
        end = time.monotonic() + timeout
        while words not in self.stdout:
            if time.monotonic() > end:
                raise TimeoutError(f"{words!r} did not come\n{self.stdout}\n{self.stderr}")
            time.sleep(0.01)


class Zygote:
    """The parent of the runs, which alone can wait for them. It has the environment variables, where any are given."""

    def __init__(self, folder: Path, variables: dict[str, str] | None = None) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, *words: str | Path, before: str = "", env: dict[str, str] | None = None, script: Path | None = None
    ) -> Job:
        """`python -m train WORDS`, or `python SCRIPT WORDS`, after the Python code `before`."""
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        about = {"args": [str(word) for word in words], "out": str(out), "err": str(err), "before": before}
        about["script"] = str(script or "")
        return Job(self, self.ask({"start": {**about, "env": env or {}}}), out, err)

    def run(
        self, *words: str | Path, before: str = "", env: dict[str, str] | None = None, script: Path | None = None
    ) -> tuple[int, str, str]:
        """Start, and wait: exit code, standard output, standard error."""
        job = self.start(*words, before=before, env=env, script=script)
        return job.wait(), job.stdout, job.stderr

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@contextlib.contextmanager
def zygote(folder: Path, variables: dict[str, str] | None = None) -> Iterator[Zygote]:
    made = Zygote(folder, variables)
    try:
        yield made
    finally:
        made.close()


def _child(about: dict[str, Any]) -> None:
    for number, name in ((1, about["out"]), (2, about["err"])):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.update(about["env"])
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    import torch

    from train.__main__ import main

    torch.set_num_threads(1)
    code = 1
    try:
        exec(about["before"], {})
        if about["script"]:
            sys.argv = [about["script"], *about["args"]]
            runpy.run_path(about["script"], run_name="__main__")
            code = 0
        else:
            code = main(about["args"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    os._exit(code)


def _serve() -> None:
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.optim.swa_utils

    import train.errors
    import train.run  # noqa: F401

    torch.compiler.cudagraph_mark_step_begin()  # every step does; the first imports the compiler, for two seconds
    for line in sys.stdin:
        question = json.loads(line)
        answer: int | None
        if "start" in question:
            answer = os.fork()
            if answer == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _child(question["start"])
        else:
            answer, end = None, time.monotonic() + question["timeout"]
            while answer is None and time.monotonic() < end:
                pid, status = os.waitpid(question["wait"], os.WNOHANG)
                if pid:
                    answer = os.waitstatus_to_exitcode(status)
                else:
                    time.sleep(0.005)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
