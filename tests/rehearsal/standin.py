"""Builds the stand-in for a GPU (cudart.c, libraries.c, driver.c) and starts Python on it.

    python tests/rehearsal/standin.py [--gpu h100 | h200 | a100 | t4] SCRIPT [ARGUMENTS]

Linux on x86-64 with a CUDA build of torch, a C compiler and `nm`. Imports nothing beyond the standard library: torch must
first be imported in the process that has the stand-in before it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GPUS = ("h100", "h200", "a100", "t4")  # in the order of `kinds` in cudart.c
MADE_FOR = "torch 2.14.1 and 2.15.0, with CUDA 13"


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _cuda_symbols(library: Path, which: str) -> set[str]:
    """Functions of the CUDA runtime that a library wants (`--undefined-only`) or offers (`--defined-only`)."""
    lines = subprocess.run(["nm", "-D", which, library], check=True, capture_output=True, text=True).stdout.splitlines()
    names = {line.split()[-1].partition("@")[0] for line in lines if line.strip()}
    return {name for name in names if name.startswith("__cuda") or (name.startswith("cuda") and name[4:5].isupper())}


@functools.cache
def unavailable() -> str | None:
    """Why there can be no rehearsal here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the stand-in for a GPU is made for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            return f"no {tool} on the PATH to build the stand-in for a GPU with"
    torch, triton = _package("torch"), _package("triton")
    if torch is None or not (torch / "lib" / "libtorch_cuda.so").exists():
        return "torch is not a CUDA build"
    if triton is None or not _headers().exists():
        return "triton, which brings CUDA's headers, is missing"
    return None


def _headers() -> Path:
    triton = _package("triton")
    assert triton is not None
    return triton / "backends" / "nvidia" / "include" / "cuda_runtime_api.h"


def build(folder: Path) -> str | None:
    """Compile both libraries into the folder; why they do not fit the torch that is installed, or None."""
    compile = ["cc", "-O1", "-fPIC", "-shared", "-I", str(_headers().parent)]
    runtime = [str(HERE / "cudart.c"), str(HERE / "libraries.c"), "-o", str(folder / "libstandin.so"), "-lpthread"]
    driver = [str(HERE / "driver.c"), "-o", str(folder / "libcuda.so.1"), "-Wl,-soname,libcuda.so.1"]
    for arguments in (runtime, driver):
        done = subprocess.run([*compile, *arguments, "-ldl"], capture_output=True, text=True)
        if done.returncode:
            return f"the stand-in for a GPU ({MADE_FOR}) does not compile here: {done.stderr.strip().splitlines()[0]}"
    torch = _package("torch")
    assert torch is not None
    wanted: set[str] = set()
    for name in ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_python.so"):
        wanted |= _cuda_symbols(torch / "lib" / name, "--undefined-only")
    missing = sorted(wanted - _cuda_symbols(folder / "libstandin.so", "--defined-only"))
    if missing:
        version = importlib.metadata.version("torch")
        return f"the stand-in for a GPU ({MADE_FOR}) lacks what torch {version} calls: {', '.join(missing)}"
    return None


def environment(folder: Path, gpu: str = "h100") -> dict[str, str]:
    """The variables of a process on the stand-in that `build` left in the folder. STANDIN_DRIVER, where it is set too, is the
    newest CUDA version that the driver knows; 12040 is 12.4."""
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libstandin.so"),
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep),
        "TRITON_LIBCUDA_PATH": str(folder),
        "STANDIN_GPU": str(GPUS.index(gpu)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a Python script on a GPU that is not there.")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("script", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reason = unavailable() or build(Path(folder))
        if reason:
            print(reason, file=sys.stderr)
            return 1
        return subprocess.run([sys.executable, *options.script], env=environment(Path(folder), options.gpu)).returncode


if __name__ == "__main__":
    sys.exit(main())
