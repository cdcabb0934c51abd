"""Chooses where and how the arithmetic runs (device, precision, compiler, determinism), each with a reason for the log."""

from __future__ import annotations

import logging
import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dali_pipeline.errors import UserError
from dali_pipeline.processors import usable_processors
from train.machine.compiler import find_compiler

BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # of a processor that multiplies bf16 numbers, the fastest first
CAPTURING = ("reduce-overhead", "max-autotune")  # modes of torch.compile that capture CUDA graphs
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # how many threads the user wants


class RuntimeUnavailable(UserError):
    """The recipe asks explicitly for something that this machine cannot do. The message is one line: cause and remedy."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The choices for one process, after every `auto` is resolved."""

    device: torch.device
    precision: str  # fp32 | bf16 | fp16
    compile_mode: str | None  # a torch.compile mode, or None for eager
    step_graph: bool = False  # a training step is one CUDA graph
    channels_last: bool
    notes: tuple[str, ...]  # "device: cpu (no CUDA device found)", one a choice

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def compiling(self, mode: str | None, why: str) -> Runtime:
        """A copy with another compile mode, and the note that says why."""
        return replace(self, compile_mode=mode).saying(f"compile: {mode or 'off'} ({why})")

    def saying(self, note: str) -> Runtime:
        """A copy with another note on the same choice, which `note` names first."""
        old = self.note_on(note.partition(":")[0])
        return replace(self, notes=tuple(note if n == old else n for n in self.notes))

    def note_on(self, choice: str) -> str:
        """The note on `choice`: device, precision, compile, step graph (on CUDA) or channels-last."""
        return next(note for note in self.notes if note.removeprefix("WARNING: ").startswith(f"{choice}: "))

    @property
    def compile_note(self) -> str:
        return self.note_on("compile")


def old_driver() -> str | None:
    """Where there is a driver, but one too old for torch's CUDA: its version, torch's, and the remedy, in one line."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:  # another where there is no driver at all
        found = re.search(r"driver on your system is too old \(found version (\d+)\)", str(error))
        if found is None:
            return None
        major, minor = divmod(int(found[1]), 1000)
        return (
            f"the NVIDIA driver is too old for torch {torch.__version__}: it knows CUDA {major}.{minor // 10}, torch is "
            f"built for CUDA {torch.version.cuda}; update the driver, or install a torch for CUDA {major}.{minor // 10} or "
            "older (see https://pytorch.org/get-started)"
        )
    return None


def _device(requested: str, local_rank: int) -> tuple[torch.device, str]:
    threads = _threads()
    old = old_driver() if requested in ("auto", "cuda") else None
    if requested == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(
            f"train.device=cuda: {old}"
            if old
            else f"train.device=cuda: torch {torch.__version__} finds no CUDA device; check nvidia-smi and the driver, "
            "or use train.device=auto"
        )
    mps = torch.backends.mps.is_available()
    if requested == "mps" and not mps:
        raise RuntimeUnavailable("train.device=mps: no Apple GPU is available here; use train.device=auto")
    if requested in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RuntimeUnavailable(
                f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} found); "
                "start at most that many with --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        return device, torch.cuda.get_device_name(device)
    if requested == "mps" or (requested == "auto" and mps):
        return torch.device("mps"), "Apple GPU"
    why = "as asked" if requested == "cpu" else "no GPU found" if old is None else f"not the GPU: {old}"
    return torch.device("cpu"), f"{why}; {threads}"


def _threads() -> str:
    """torch's number of threads, for the log: as many as THREAD_VARIABLES or torch say, but where those are not set no more than
    the processors that this process may use. torch counts the processors of its affinity; it does not know a container's quota,
    beyond which all threads are stopped for the rest of every tenth of a second."""
    usable, limit = usable_processors()
    if torch.get_num_threads() <= usable or any(os.environ.get(name) for name in THREAD_VARIABLES):
        return f"{torch.get_num_threads()} threads"
    torch.set_num_threads(usable)
    return f"{usable} threads: {limit}"


def _precision(requested: str, device: torch.device) -> tuple[str, str]:
    if requested == "auto":
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes it natively"
        if device.type == "cuda":
            return "fp16", "the GPU has no bf16 units; gradients are scaled"
        units = bf16_units() if device.type == "cpu" else None
        if units is not None:  # at no loss of accuracy: benchmarks/results/precision.json
            return "bf16", f"the CPU computes it natively: {units}"
        return "fp32", f"the default on {device.type}"
    if requested == "fp16" and device.type != "cuda":
        raise RuntimeUnavailable(f"train.precision=fp16 needs a CUDA device, this is {device.type}; use bf16 or fp32")
    return requested, "as asked"


def bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The first of BF16_FLAGS that every processor of this machine lists; None where there is none, and without Linux."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return None
    listed = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return next((flag for flag in BF16_FLAGS if listed and all(flag in flags for flags in listed)), None)


_SLOWER = "training runs uncompiled, slower"


def _compile(requested: str, device: torch.device, precision: str) -> tuple[str | None, str]:
    if requested == "off":
        return None, "as asked"
    if requested == "auto" and device.type == "mps":
        return None, "on Apple GPUs compiled channels-last code is slower"
    if requested == "auto" and device.type == "cpu" and precision == "bf16":
        return None, "on the CPU compiled bf16 steps are slower"
    able, why = find_compiler(device)
    if requested == "auto":
        return ("default", why) if able else (None, f"{why}; {_SLOWER}")
    if not able:
        raise RuntimeUnavailable(f"train.compile={requested}: {why}; or use train.compile=auto")
    return requested, "as asked"


def _step_graph(requested: str, device: torch.device, mode: str | None, processes: int) -> tuple[bool, str]:
    if requested == "off":
        return False, "as asked"
    against = None
    if device.type != "cuda":
        against = f"it needs a CUDA device, this is {device.type}"
    elif processes > 1:
        against = f"{processes} processes exchange gradients within a step"
    elif mode in CAPTURING:
        against = f"compile={mode} captures graphs of its own"
    if against is None:
        return True, "as asked" if requested == "on" else "a step is one launch"
    if requested == "on":
        raise RuntimeUnavailable(f"train.step_graph=on: {against}; use train.step_graph=auto")
    return False, against


def prepare(
    *,
    device: str = "auto",
    precision: str = "auto",
    compile: str = "auto",
    step_graph: str = "auto",
    channels_last: str = "auto",
    local_rank: int = 0,
    processes: int = 1,
) -> Runtime:
    """Resolve the recipe's requests on this machine. Raises RuntimeUnavailable where an explicit one cannot be met.

    For compile=auto on a CPU this gives the mode to compile with; train/compiling.py decides later, when the number of steps
    is known, whether compiling pays.
    """
    # torch's compiler warns about a CUDA toolkit without a GPU; the note about the device says that already
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    chosen, device_why = _device(device, local_rank)
    arithmetic, precision_why = _precision(precision, chosen)
    mode, compile_why = _compile(compile, chosen, arithmetic)
    graph, graph_why = _step_graph(step_graph, chosen, mode, processes)
    # channels-last: on a CPU with AVX-512 a step at width 16 takes 0.6 of its time in NCHW; on MPS compiled code gets slower
    last = channels_last == "on" or (channels_last == "auto" and chosen.type in ("cuda", "cpu"))
    return Runtime(
        device=chosen,
        precision=arithmetic,
        compile_mode=mode,
        step_graph=graph,
        channels_last=last,
        notes=(
            f"{'WARNING: ' if 'not the GPU' in device_why else ''}device: {chosen} ({device_why})",
            f"precision: {arithmetic} ({precision_why})",
            f"{'WARNING: ' if _SLOWER in compile_why else ''}compile: {mode or 'off'} ({compile_why})",
            *([f"step graph: {'on' if graph else 'off'} ({graph_why})"] if chosen.type == "cuda" else []),
            f"channels-last: {'on' if last else 'off'}",
        ),
    )


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the global random generators, which draw the weights; with `deterministic` also select deterministic algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - for third-party code; ours draws from Philox
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic  # convolutions; the line below is for matrix products alone
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
