"""Downloads from a real HTTP server on loopback that drops, stalls, lies and refuses."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cifar import ENDLESS, REDIRECTS, Server, packed, random_records, records_of, serve, small
from places import ROOT

from dali_pipeline.dataset import DataError
from dali_pipeline.sources import download, to_stderr
from dali_pipeline.sources.cifar import load_cifar
from dali_pipeline.sources.download import Archive, DownloadError, fetch

CONTENT = b"\x1f\x8b" + np.random.default_rng(1).bytes(600_000)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(CONTENT) as running:
        yield running


def archive(*urls: str) -> Archive:
    return Archive("file.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), urls)


def get(folder: Path, *urls: str, **options: Any) -> Path:
    return fetch(archive(*urls), folder, **{"timeout": 5.0, "pause": 0.0, **options})


def part_of(folder: Path) -> Path:
    return folder / "file.tar.gz.part"


def assert_whole(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["file.tar.gz"]
    assert (folder / "file.tar.gz").read_bytes() == CONTENT


def test_a_good_server_is_asked_once(server: Server, tmp_path: Path) -> None:
    assert get(tmp_path / "new" / "folder", server.url("good")).read_bytes() == CONTENT
    assert [requested for _, requested in server.requests] == [None]


def test_dropped_connections_are_resumed_where_they_broke(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("drop-150000"))
    assert_whole(tmp_path)
    ranges = [int((requested or "bytes=0-")[6:-1]) for _, requested in server.requests]
    assert ranges == [0, 150_000, 300_000, 450_000, 600_000]


def test_reset_connections_are_resumed_where_they_broke(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("reset-350000"))
    assert_whole(tmp_path)
    assert [requested for _, requested in server.requests] == [None, "bytes=350000-"]


def test_a_mirror_may_take_longer_than_the_timeout_in_all(server: Server, tmp_path: Path) -> None:
    started = time.monotonic()
    get(tmp_path, server.url("slow"), timeout=0.3)
    assert time.monotonic() - started > 0.6
    assert_whole(tmp_path)
    assert len(server.requests) == 1


def test_a_mirror_that_sends_nothing_is_left(server: Server, tmp_path: Path) -> None:
    get(tmp_path, server.url("drop-0"), server.url("good"))
    assert_whole(tmp_path)
    assert [path.split("/")[1] for path, _ in server.requests] == ["drop-0", "good"]


@pytest.mark.parametrize("behaviour", ["norange", "refuse"])
def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path, behaviour: str) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:1000])
    get(tmp_path, server.url(behaviour))
    assert_whole(tmp_path)


def test_a_server_without_ranges_that_drops_is_not_asked_for_ever(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="connection closed after 5000 of"):
        get(tmp_path, server.url("norangedrop-5000"))
    assert len(server.requests) == 2


def test_starting_over_leaves_nothing_of_the_old_part(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(bytes(400_000))
    with pytest.raises(DownloadError):
        get(tmp_path, server.url("norangedrop-5000"))
    assert part_of(tmp_path).read_bytes() == CONTENT[:5000]


def test_a_mirror_that_drops_all_the_time_is_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_CONNECTIONS", 7)
    with pytest.raises(DownloadError, match="the connection broke 7 times"):
        get(tmp_path, server.url("drop-10"))
    assert part_of(tmp_path).read_bytes() == CONTENT[:70]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("status-404", "HTTP 404 Not Found"),
        ("status-416", "HTTP 416"),
        ("status-500", "HTTP 500"),
        ("status-206", "HTTP 206"),
        ("html", r"51 bytes \(text/html\), expected 600002"),
        ("htmlchunked", "not a gzip file: text/html, begins with b'<!DOCTYPE html>"),
        ("short-1000", "1000 bytes"),
        ("wrong", "wrong bytes: sha256 [0-9a-f]{64}, expected " + hashlib.sha256(CONTENT).hexdigest()),
        ("stall-3", "no data for 0.5 s"),
    ],
)
def test_a_useless_mirror_is_named_and_leaves_nothing(
    server: Server, tmp_path: Path, behaviour: str, reason: str
) -> None:
    url = server.url(behaviour)
    with pytest.raises(DownloadError, match=reason) as raised:
        get(tmp_path, url, timeout=0.5)
    assert raised.value.reasons[0].startswith(url)
    if behaviour == "stall-3":
        assert part_of(tmp_path).read_bytes() == CONTENT[:3]
    else:
        assert list(tmp_path.iterdir()) == []
    get(tmp_path, url, server.url("good"), timeout=0.5)
    assert_whole(tmp_path)


@pytest.mark.parametrize("behaviour", ["status-404", "html", "htmlchunked", "short-1000", "shifted"])
def test_a_useless_mirror_does_not_cost_what_an_earlier_one_sent(
    server: Server, tmp_path: Path, behaviour: str
) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:400_000])
    with pytest.raises(DownloadError, match="400,000 of 600,002 bytes kept"):
        get(tmp_path, server.url(behaviour))
    get(tmp_path, server.url(behaviour), server.url("good"))
    assert_whole(tmp_path)
    assert server.requests[-1][1] == "bytes=400000-"


def test_a_stalled_mirror_is_continued_by_the_next(server: Server, tmp_path: Path) -> None:
    started = time.monotonic()
    get(tmp_path, server.url("stall-200000"), server.url("good"), timeout=0.5)
    assert_whole(tmp_path)
    assert time.monotonic() - started < 5
    assert server.requests[-1][1] == "bytes=200000-"


def test_a_mirror_that_trickles_is_left_although_it_never_times_out(server: Server, tmp_path: Path) -> None:
    started = time.monotonic()
    get(tmp_path, server.url("trickle"), server.url("good"), timeout=0.5)
    assert_whole(tmp_path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("what", ENDLESS)
def test_an_answer_that_never_ends_is_left_for_the_next_mirror(server: Server, tmp_path: Path, what: str) -> None:
    """Each read of it brings bytes in time; the whole never comes."""
    get(tmp_path, server.url(f"endless-{what}"), server.url("good"), timeout=0.5)
    assert_whole(tmp_path)
    assert [path.split("/")[1] for path, _ in server.requests] == [f"endless-{what}", "good"]
    assert server.held_up == []


@pytest.mark.parametrize("what", REDIRECTS)
def test_a_redirect_to_what_is_no_http_address_is_left_for_the_next_mirror(
    server: Server, tmp_path: Path, what: str
) -> None:
    url = server.url(f"redirect-{what}")
    with pytest.raises(DownloadError) as failed:
        get(tmp_path, url)
    (reason,) = failed.value.reasons
    assert reason.startswith(f"{url}: ") and ("[" in REDIRECTS[what] or REDIRECTS[what] in reason)
    get(tmp_path, url, server.url("good"))
    assert_whole(tmp_path)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("refusal", ["nobody", "407"])
def test_a_proxy_that_refuses_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, refusal: str
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serve(CONTENT) as proxy:
        place = f"127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv(f"{scheme}_proxy", f"http://name:password@{place}/")
        if refusal == "407":  # the fake server's answer to a request for a whole address, or to CONNECT, is a refusal
            with pytest.raises(DownloadError) as failed:
                get(tmp_path, f"{scheme}://mirror.invalid/file.tar.gz")
    if refusal == "nobody":  # it has gone
        with pytest.raises(DownloadError) as failed:
            get(tmp_path, f"{scheme}://mirror.invalid/file.tar.gz")
    (reason,) = failed.value.reasons
    assert reason.endswith(f" (asked through the proxy {place} ({scheme}_proxy))")
    assert "password" not in reason
    assert ("Connection refused" if refusal == "nobody" else "407") in reason


def test_a_wrong_part_is_replaced_from_the_same_mirror(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(b"\x1f\x8b" + bytes(300_000))
    get(tmp_path, server.url("good"))
    assert_whole(tmp_path)
    assert [requested for _, requested in server.requests] == ["bytes=300002-", None]


@pytest.mark.parametrize("extra", [0, 10])
def test_a_full_part_is_not_trusted(server: Server, tmp_path: Path, extra: int) -> None:
    part_of(tmp_path).write_bytes(bytes(len(CONTENT) + extra))
    get(tmp_path, server.url("good"))
    assert_whole(tmp_path)


def test_a_full_and_right_part_needs_no_request(server: Server, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT)
    get(tmp_path, server.url("good"))
    assert_whole(tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "nonsense", "http://", "http://[bad/x"])
def test_addresses_that_are_none_are_reasons_not_tracebacks(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError) as raised:
        get(tmp_path, url)
    assert raised.value.reasons[0].startswith(url)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
from dali_pipeline.sources.download import Archive, DiskFailed, DownloadError, fetch
url, name, size, digest, folder = sys.argv[1:6]
if len(sys.argv) > 6:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[6]), int(sys.argv[6])))
try:
    fetch(Archive(name, int(size), digest, (url,)), Path(folder))
except DownloadError as error:
    print(error)
    sys.exit(3 if isinstance(error, DiskFailed) else 2)
"""


def start(url: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    given = archive()
    command = [sys.executable, "-c", SCRIPT, url, given.name, str(given.size), given.sha256, str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_an_interrupted_process_has_fetched_is_resumed(server: Server, tmp_path: Path, number: int) -> None:
    process = start(server.url("slow"), tmp_path)
    deadline = time.monotonic() + 30
    while not (part_of(tmp_path).exists() and part_of(tmp_path).stat().st_size > 50_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / "file.tar.gz").exists()
    kept = part_of(tmp_path).stat().st_size
    assert 50_000 < kept < len(CONTENT)
    get(tmp_path, server.url("good"))
    assert_whole(tmp_path)
    assert server.requests[-1][1] == f"bytes={kept}-"


def test_two_processes_and_four_threads_fetch_a_file_once(server: Server, tmp_path: Path) -> None:
    processes = [start(server.url("slow"), tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(tmp_path, server.url("slow")), range(4)))
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(paths) == {tmp_path / "file.tar.gz"}
    assert_whole(tmp_path)
    assert len(server.requests) == 1


def test_a_waiting_process_takes_over_when_the_first_fails(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, tmp_path, server.url("stall-100000"), timeout=1.0)
        while not part_of(tmp_path).exists():
            time.sleep(0.01)
        get(tmp_path, server.url("good"))
        assert isinstance(first.exception(), DownloadError)
    assert_whole(tmp_path)


@pytest.mark.parametrize("change", ["removed", "completed"])
def test_a_part_that_changes_hands_before_it_is_locked_is_opened_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    real, calls = fcntl.flock, []

    def flock(file: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1 and change == "removed":
            part_of(tmp_path).unlink()
        elif len(calls) == 1:
            (tmp_path / "file.tar.gz").write_bytes(CONTENT)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    get(tmp_path, server.url("good"))
    assert_whole(tmp_path)
    assert len(server.requests) == (1 if change == "removed" else 0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_obstacle_and_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    lines: list[str] = []
    get(tmp_path, server.url("good"), say=lines.append)
    assert_whole(tmp_path)
    assert [line for line in lines if os.strerror(number) in line] == lines[:1]


def test_a_lock_that_fails_for_another_reason_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with pytest.raises(DownloadError) as failed:
        get(tmp_path, server.url("good"))
    assert failed.value.reasons == (f"{part_of(tmp_path)}: {os.strerror(errno.EIO)}",)


@pytest.mark.parametrize("kind", ["a symbolic link", "a folder", "a named pipe"])
def test_only_a_regular_file_is_filled(server: Server, tmp_path: Path, kind: str) -> None:
    mine, part = tmp_path / "mine", part_of(tmp_path)
    mine.write_bytes(b"mine")
    if kind == "a symbolic link":
        part.symlink_to(mine)
    elif kind == "a folder":
        part.mkdir()
    else:
        os.mkfifo(part)
    with pytest.raises(DownloadError) as failed:
        get(tmp_path, server.url("good"))
    assert failed.value.reasons == (f"{part}: is {kind}, not a regular file",)
    assert mine.read_bytes() == b"mine" and server.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.tar.gz.part", "mine"]


def test_a_file_that_outgrows_the_disk_is_named_and_what_came_is_kept(server: Server, tmp_path: Path) -> None:
    process = start(server.url("good"), tmp_path, "100000")
    output = process.communicate()[0]
    assert process.returncode == 3
    assert output == f"{part_of(tmp_path)}: File too large\n"
    assert part_of(tmp_path).read_bytes() == CONTENT[:100_000]
    assert not (tmp_path / "file.tar.gz").exists()


def test_a_full_disk_ends_a_download_as_a_failed_write_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cifar, data = packed(small(), random_records(small()))
    with serve(data) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                DataError, match=rf"{cifar.archive.name}.part: No space left on device; .* Make room"
            ) as failed:
                load_cifar(cifar, tmp_path, mirrors=[server.url("good")])
        assert failed.value.exit_code == 1  # as documented for a failed write; 2 is for what is refused
        load_cifar(cifar, tmp_path, mirrors=[server.url("good")])
        assert len(server.requests) == 1


def test_a_disk_on_which_no_file_can_be_made_is_full_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DataError, match=r"\.part: No space left on device; .* Make room") as failed:
        load_cifar(small(), tmp_path, mirrors=["http://127.0.0.1:1/"])
    assert failed.value.exit_code == 1


def test_a_folder_that_cannot_be_written_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="file/sub"):
        get(tmp_path / "file" / "sub", server.url("good"))
    assert server.requests == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    get(tmp_path, server.url("status-404"), server.url("drop-400000"), say=to_stderr)
    assert "file.tar.gz: 100%" in screen.getvalue()
    assert f"file.tar.gz: from {server.url('drop-400000')}, resumed at 400,000 bytes\n" in screen.getvalue()


def test_progress_is_lines_elsewhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.progress.Meter.LINE_SECONDS", 0.0)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    get(tmp_path, server.url("slow"), say=to_stderr)
    lines = screen.getvalue().splitlines()
    assert "\r" not in screen.getvalue()
    assert lines[0] == f"file.tar.gz: from {server.url('slow')}"
    assert len(lines) > 3
    assert all(line.startswith("file.tar.gz: ") and " of 0.6 MB, " in line for line in lines[1:])


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_progress_without_a_stderr_is_silent(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str | None
) -> None:
    screen = None if stderr is None else io.StringIO()
    if screen is not None:
        screen.close()
    monkeypatch.setattr(sys, "stderr", screen)
    get(tmp_path, server.url("status-404"), server.url("good"), say=to_stderr)
    assert_whole(tmp_path)


def test_a_data_set_comes_from_the_second_mirror_and_then_from_the_disk(tmp_path: Path) -> None:
    cifar = small()
    content = random_records(cifar)
    cifar, data = packed(cifar, content)
    with serve(data) as server:
        urls = [server.url("status-404"), server.url("good")]
        dataset = load_cifar(cifar, tmp_path, mirrors=urls, pause=0.0)
        again = load_cifar(cifar, tmp_path, mirrors=urls, pause=0.0)
        assert len(server.requests) == 2
    assert records_of(dataset.test).tobytes() == content["test_batch.bin"] == records_of(again.test).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == [cifar.archive.name]
    assert dataset.source == f"{tmp_path / cifar.archive.name} (sha256 {cifar.archive.sha256} verified)"


def test_the_environment_names_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar, data = packed(small(), random_records(small()))
    with serve(data) as server:
        base = server.url("good", "")
        monkeypatch.setenv("CIFAR_MIRRORS", f"{server.url('status-404')}, {base}")
        load_cifar(cifar, tmp_path)
        assert [path for path, _ in server.requests] == ["/status-404/file.tar.gz", f"/good/{cifar.archive.name}"]


def test_no_network_and_no_data_is_one_error_with_three_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CIFAR_MIRRORS", raising=False)
    with serve(b"") as server:
        urls = (server.url("a"), server.url("b"))
    cifar, _ = packed(small(), random_records(small()), urls)  # nothing listens there any more
    with pytest.raises(DataError) as raised:
        load_cifar(cifar, tmp_path)
    text = str(raised.value)
    for url in urls:
        assert f"tried {url}: Connection refused" in text
    looked = "cifar-10-batches-bin/, cifar-10-batches-py/, cifar-10-binary.tar.gz and cifar-10-python.tar.gz"
    assert f"looked in {tmp_path} for {looked}" in text
    assert f"place cifar-10-binary.tar.gz ({cifar.archive.size:,} bytes) into {tmp_path}" in text
    assert "data.root=DIR" in text and "configs/quickstart.yaml" in text and "CIFAR_MIRRORS" in text
    assert list(tmp_path.iterdir()) == []


def test_download_switched_off_asks_nobody(tmp_path: Path) -> None:
    with serve(CONTENT) as server:
        with pytest.raises(DataError, match=r"switched off(.|\n)*quickstart"):
            load_cifar(small(), tmp_path, download=False, mirrors=[server.url("good")])
        assert server.requests == []
