"""How OpenMP's threads should wait for each other on the CPU: the time of a training step by OMP_WAIT_POLICY.

python benchmarks/waiting.py [--rounds 10] [--steps 2] [--json FILE] [section.key=value ...]

OpenMP reads the variable once, when torch is imported, so each policy has a process of its own. They take turns, every other
round in reverse, and those whose turn it is not are stopped: actively waiting threads would take the others' processors. Run it
on an idle machine and on a busy one; the record has the load average.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # instead of this folder, whose files could hide packages of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.given import whole
from dali_pipeline.errors import UserError
from train.screen.streams import Parser

if TYPE_CHECKING:
    from train.config import Config

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "OMP_WAIT_POLICY"
POLICIES = ("unset", "passive", "active")
RECIPE = ["data.name=synthetic", "data.synthetic_count=5120", "train.device=cpu", "train.compile=off"]


def parser() -> argparse.ArgumentParser:
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"on top of {' '.join(RECIPE)}")
    result.add_argument("--config", default=str(ROOT / "configs" / "cpu.yaml"), help="the recipe (cpu.yaml)")
    result.add_argument("--rounds", type=whole(), default=10, help="turns of each policy (10)")
    result.add_argument("--steps", type=whole(), default=2, help="training steps in a turn (2)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the last line of the output here too")
    result.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # a process of one policy
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    from benchmarks.outcome import conclude, explained
    from train.config import load_config

    with explained() as outcome:
        if options.work:
            work(load_config(options.config))
            return outcome.code
        given = {word.partition("=")[0] for word in options.overrides}
        words = [word for word in RECIPE if word.partition("=")[0] not in given] + options.overrides
        report = measure(load_config(options.config, words), options.rounds, options.steps, print)
        conclude(report, "waiting", arguments, options)
    return outcome.code


def measure(config: Config, rounds: int, steps: int, say: Callable[[str], object]) -> dict[str, Any]:
    """The report: for each policy the seconds of a step in every round, on the clock and of the processors, and the median of
    the ratios to "unset" within a round."""
    from benchmarks.measure import interleave
    from train.config import to_yaml
    from train.machine.environment import system_facts

    load = os.getloadavg()
    with ExitStack() as stack:
        recipe = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "recipe.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        turns = []
        for name in POLICIES:
            turns.append(Turn(name, recipe, steps))
            stack.callback(turns[-1].close)
            turns[-1].start()
        rates = interleave(turns, rounds)
    report: dict[str, Any] = {"kind": "waiting", "command": "", "machine": system_facts(), "threads": turns[0].threads}
    report |= {"load_average_before": [round(x, 2) for x in load], "rounds": rounds, "policies": {}}
    for turn in turns:
        seconds = [1 / rate for rate in rates[turn.name].samples]
        over = rates["unset"].over(rates[turn.name])
        report["policies"][turn.name] = {
            "step_seconds": seconds,
            "processor_seconds": turn.processor_seconds,
            "over_unset": over,
        }
        say(
            f"{VARIABLE} {turn.name:<8} {1000 * statistics.median(seconds):7.0f} ms a step ({1000 * min(seconds):.0f} to "
            f"{1000 * max(seconds):.0f}), {1000 * statistics.median(turn.processor_seconds):7.0f} ms of processors, "
            f"{over:.2f} of unset"
        )
    return report


class Turn:
    """A process that trains under one policy, stopped while the others have their turn; a stage of `interleave`."""

    def __init__(self, name: str, recipe: Path, steps: int) -> None:
        self.name, self._steps = name, steps
        self.threads = 0
        self.processor_seconds: list[float] = []  # of a step, one sample for each round
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        if name != "unset":
            environment[VARIABLE] = name
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "--config", str(recipe)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def start(self) -> None:
        """Wait until it is ready, and stop it."""
        self.threads = int(self._read()["threads"])
        self._process.send_signal(signal.SIGSTOP)

    def warm_up(self) -> None:
        self._run()

    def sample(self) -> float:
        taken = self._run()
        self.processor_seconds.append(taken["processor_seconds"] / self._steps)
        return self._steps / float(taken["seconds"])

    def _run(self) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._steps}\n")
        self._process.stdin.flush()
        answer = self._read()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"the process with {VARIABLE} {self.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def work(config: Config) -> None:
    """Do as many training steps as each line of standard input says, and answer with the seconds that they took."""
    import torch

    from benchmarks.stages import Training
    from train.screen.log import Log
    from train.session import Session

    with Session(config, Log(quiet=True)) as session:
        training = Training(session)
        print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
        for line in sys.stdin:
            wall, processor = time.perf_counter(), time.process_time()
            training.run_step(int(line))
            taken = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
            print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    sys.exit(main())
