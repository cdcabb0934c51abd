"""Looks for what torch.compile needs of the machine: a C++ compiler that works, and a compile cache that may execute."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from train.machine.weighing import compiler_cache

PROBE_SECONDS = 60.0  # for the compiler to compile a few lines, on a machine with other work


def find_compiler(device: torch.device) -> tuple[bool, str]:
    """Whether torch.compile has what it needs for the device, and what was found or is missing. torch takes the program that the
    variable CXX names, where that is set, and no other. A few lines are compiled and loaded, where torch will do so too."""
    asked = os.environ.get("CXX", "")
    names = {"win32": "cl", "darwin": "clang++"}
    name = asked or names.get(sys.platform, "g++")
    found = shutil.which(name)
    if found is None:
        missing = f"CXX={asked} is no program" if asked else f"no C++ compiler on the PATH ({name})"
        return False, f"{missing}; install one, or set CXX to the path of one"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False, "the package triton is missing"
    problem = None if sys.platform == "win32" else _try_compiler(found, compiler_cache())
    return problem is None, problem or f"{Path(found).name} found"


# a header of Python and one of C++: torch's compiled steps use them too, and each may be missing where the compiler is not
_PROBE = '#include <Python.h>\n#include <cstddef>\nextern "C" int probe() { return 42; }\n'


def _try_compiler(compiler: str, cache: Path) -> str | None:
    """Compile and load a few lines in a folder below `cache`; what failed, in one line, or None."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="probe-", dir=cache) as folder:
            source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text(_PROBE, encoding="ascii")
            headers = sysconfig.get_paths()["include"]
            command = [compiler, "-shared", "-fPIC", f"-I{headers}", "-o", str(library), str(source)]
            if sys.platform == "darwin":
                command[1:1] = ["-undefined", "dynamic_lookup"]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS)
            if done.returncode or not library.exists():
                lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
                said = next((line for line in lines if "error" in line), *lines[:1] or ["it says nothing"])
                return f"{compiler} fails to compile: {said.strip()[:200]}"
            try:
                found = ctypes.CDLL(str(library)).probe()
            except OSError as error:
                return (
                    f"what {compiler} compiles cannot be loaded from the compile cache {cache}: {error}; set "
                    "TORCHINDUCTOR_CACHE_DIR to a folder of a file system that may execute"
                )
            return None if found == 42 else f"what {compiler} compiles computes wrong numbers"
    except subprocess.TimeoutExpired:
        return f"{compiler} has not compiled a few lines in {PROBE_SECONDS:.0f} s"
    except OSError as error:
        return (
            f"the compile cache {cache} cannot be used: {error.strerror or error}; set TORCHINDUCTOR_CACHE_DIR to another "
            "folder"
        )
