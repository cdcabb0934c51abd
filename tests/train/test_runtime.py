"""What the machine is asked for and what it gives: each choice with its reason, an impossible request refused."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

from train.machine import environment, runtime
from train.machine.openmp import CHOSEN_BY, wait_passively
from train.machine.process import process_as_found
from train.machine.runtime import RuntimeUnavailable, prepare, seed_everything


def notes(**requests: str) -> dict[str, str]:
    return dict(note.removeprefix("WARNING: ").split(": ", 1) for note in prepare(**requests).notes)


def test_every_choice_is_noted_with_its_reason() -> None:
    found = notes(device="cpu")
    assert found.keys() == {"device", "precision", "compile", "channels-last"}
    assert found["device"].startswith("cpu (")
    assert found["precision"].startswith("fp32 (" if runtime.bf16_units() is None else "bf16 (")


def test_torch_gets_no_more_threads_than_the_process_may_use_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    with process_as_found():
        for before, after in ((8, 2), (2, 2), (1, 1)):
            torch.set_num_threads(before)
            said = notes(device="cpu")["device"]
            assert torch.get_num_threads() == after and f"{after} threads" in said
            assert ("affinity" in said) == (before > after)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        assert "; 3 threads)" in notes(device="cpu")["device"] and torch.get_num_threads() == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_on_request_is_refused_without_a_device() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"train\.device=cuda.*train\.device=auto"):
        prepare(device="cuda")
    with pytest.raises(RuntimeUnavailable, match="fp16 needs a CUDA device"):
        prepare(device="cpu", precision="fp16")


@pytest.mark.parametrize(
    ("device", "mode", "processes", "against"),
    [
        ("cuda", "default", 1, None),
        ("cuda", None, 1, None),
        ("cuda", "default", 2, "2 processes"),
        ("cuda", "reduce-overhead", 1, "graphs of its own"),
        ("cuda", "max-autotune", 1, "graphs of its own"),
        ("cpu", "default", 1, "needs a CUDA device"),
    ],
)
def test_a_step_is_one_graph_on_a_gpu_of_one_process(
    device: str, mode: str | None, processes: int, against: str | None
) -> None:
    choose = functools.partial(runtime._step_graph, device=torch.device(device), mode=mode, processes=processes)
    assert choose("off") == (False, "as asked")
    on, why = choose("auto")
    assert on == (against is None) and (against or "one launch") in why
    if against is None:
        assert choose("on") == (True, "as asked")
    else:
        with pytest.raises(RuntimeUnavailable, match=rf"train\.step_graph=on: .*{against}.*step_graph=auto"):
            choose("on")


def refused_by_auto_and_on_request(reason: str) -> str:
    """What both say: auto goes on uncompiled with that reason, an explicit mode is refused in one line with the same."""
    note = notes(device="cpu", precision="fp32")["compile"]
    assert note.startswith("off (") and reason in note, note
    loud = prepare(device="cpu", precision="fp32")
    assert loud.compile_mode is None and loud.compile_note.startswith("WARNING: compile: off (")
    assert not prepare(device="cpu", precision="bf16").compile_note.startswith("WARNING"), "nothing is lost there"
    with pytest.raises(RuntimeUnavailable) as refused:
        prepare(device="cpu", compile="default")
    text = str(refused.value)
    assert text.startswith("train.compile=default: ") and reason in text and "\n" not in text
    return text


def test_without_a_compiler_auto_goes_on_loudly_and_a_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install one" in refused_by_auto_and_on_request("no C++ compiler")


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


def test_a_stale_cxx_is_named_although_another_compiler_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch takes what CXX names and nothing else."""
    script(tmp_path / "g++", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for stale in ("/nowhere/c++", str(tmp_path), "g++ -O2"):
        monkeypatch.setenv("CXX", stale)
        refused_by_auto_and_on_request(f"CXX={stale} is no program")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("echo 'x.cpp:1: fatal error: Python.h: No such file' >&2", "exit 1"), "fatal error: Python.h: No such file"),
        (("exit 1",), "fails to compile"),
        (("kill -SEGV $$",), "fails to compile"),
        (("exit 0",), "fails to compile"),  # and writes nothing
        (('for last; do :; done', 'while [ "$1" != -o ]; do shift; done', 'echo junk > "$2"'), "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_compiler_that_does_not_work_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: tuple[str, ...], reason: str
) -> None:
    compiler = script(tmp_path / "c++", *lines)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert str(compiler) in refused_by_auto_and_on_request(reason)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compile_cache_that_is_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", "exit 0")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert "TORCHINDUCTOR_CACHE_DIR" in refused_by_auto_and_on_request(f"the compile cache {tmp_path / 'file'}")


def test_a_compile_cache_that_may_not_execute_is_named(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a compiler")
    # a mount of its own, seen by this one process alone
    program = (
        "import torch\nfrom train.machine.compiler import find_compiler\nprint(*find_compiler(torch.device('cpu')))"
    )
    command = 'mount -t tmpfs -o noexec none "$1" && shift && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command, "-", str(tmp_path), sys.executable, "-c", program],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no mount of its own is allowed here: {done.stderr.strip()[:200]}")
    assert done.stdout.startswith("False ") and f"compile cache {tmp_path}" in done.stdout, done.stdout
    assert "TORCHINDUCTOR_CACHE_DIR" in done.stdout


def test_auto_compiles_fp32_on_the_cpu_and_leaves_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.machine.runtime.find_compiler", lambda device: (True, "g++ found"))
    assert prepare(device="cpu", precision="fp32").compile_mode == "default"
    assert prepare(device="cpu", precision="bf16").compile_mode is None
    assert prepare(device="cpu", precision="bf16", compile="default").compile_mode == "default"


CPUINFO = "processor\t: 0\nflags\t\t: fpu avx512f {}\n\nprocessor\t: 1\nflags\t\t: {} fpu\n"


@pytest.mark.parametrize(
    ("text", "units"),
    [
        (CPUINFO.format("avx512_bf16 amx_bf16", "amx_bf16 avx512_bf16"), "amx_bf16"),
        (CPUINFO.format("avx512_bf16", "avx512_bf16"), "avx512_bf16"),
        (CPUINFO.format("amx_bf16 avx512_bf16", "avx512_bf16"), "avx512_bf16"),
        (CPUINFO.format("amx_bf16", ""), None),
        (CPUINFO.format("xamx_bf16", "xamx_bf16"), None),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", None),
        (None, None),
    ],
    ids=["both", "AVX-512", "one processor has less", "one has none", "another flag", "no flags", "no file"],
)
def test_bf16_units_are_flags_that_every_processor_lists(tmp_path: Path, text: str | None, units: str | None) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert runtime.bf16_units(tmp_path / "cpuinfo") == units


@pytest.mark.parametrize(
    ("units", "expected"),
    [("amx_bf16", "bf16 (the CPU computes it natively: amx_bf16)"), (None, "fp32 (the default on cpu)")],
)
def test_precision_auto_on_a_cpu_says_what_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, units: str | None, expected: str
) -> None:
    monkeypatch.setattr(runtime, "bf16_units", lambda: units)
    assert notes(device="cpu")["precision"] == expected
    assert notes(device="cpu", precision="fp32")["precision"] == "fp32 (as asked)"
    assert prepare(device="cpu").autocast_dtype is (torch.bfloat16 if expected.startswith("bf16") else None)


def test_deterministic_mode_turns_tf32_off_for_convolutions_too() -> None:
    try:
        seed_everything(0, deterministic=True)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        seed_everything(0)
    assert torch.backends.cudnn.allow_tf32


def test_the_seed_fixes_the_weights() -> None:
    seed_everything(3)
    first = torch.randn(4)
    seed_everything(3)
    assert torch.equal(torch.randn(4), first)
    seed_everything(4)
    assert not torch.equal(torch.randn(4), first)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("The NVIDIA driver on your system is too old (found version 12040). Please update", "knows CUDA 12.4,"),
        ("Found no NVIDIA driver on your system.", None),
    ],
)
def test_auto_says_when_only_the_driver_keeps_it_from_the_gpu(
    monkeypatch: pytest.MonkeyPatch, message: str, expected: str | None
) -> None:
    def init() -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    note = prepare(device="auto").notes[0]
    assert note.startswith("WARNING: ") == (expected is not None)
    assert expected is None or (expected in note and "built for CUDA 13.0" in note)
    with pytest.raises(RuntimeUnavailable, match=expected or "finds no CUDA device"):
        prepare(device="cuda")


def test_the_commit_is_that_of_this_source_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        words = ("git", "-C", str(tmp_path), *who, *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "site-packages"
    package.mkdir()
    source = package / "environment.py"
    source.touch()
    monkeypatch.setattr(environment, "__file__", str(source))
    try:
        git("init")
    except OSError:
        pytest.skip("needs git")
    git("commit", "--allow-empty", "-m", "another project")
    assert environment.git_commit() is None
    git("add", "site-packages")
    git("commit", "-m", "its own")
    assert environment.git_commit() == git("rev-parse", "HEAD")
    source.write_text("changed")
    assert environment.git_commit() == git("rev-parse", "HEAD") + "+changes"


# what a command has in its environment when torch is first imported
AT_TORCH = """
import os, sys

def look(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)

sys.addaudithook(look)
from train.__main__ import main
main(["--config", "configs/quickstart.yaml"])
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "1000"}, "None")],
)
def test_the_command_has_threads_wait_passively_from_before_torch_is_imported_unless_the_user_chose(
    chosen: dict[str, str], expected: str
) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in CHOSEN_BY}
    done = subprocess.run(
        [sys.executable, "-c", AT_TORCH], cwd=ROOT, env=kept | chosen, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{expected}\n", done.stderr


def test_once_torch_is_imported_a_process_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    wait_passively()
    assert os.environ == before
