"""Both backends, with images that lie on the device and with streamed ones, against a NumPy loop over single images, pixel for
pixel; loaders, ranks, resuming, choosing, closing."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_pipeline import dali_graph
from dali_pipeline.backend import BackendChoice, BackendError, choose_backend
from dali_pipeline.dataset import Split
from dali_pipeline.feed import FeedOrder
from dali_pipeline.layout import StripLayout
from dali_pipeline.loader import GRAPHS, Engine, EvalLoader, TrainLoader
from dali_pipeline.memory import Resident
from dali_pipeline.plan import NO_AUGMENT, Augment, Plan, draw_plan
from dali_pipeline.resident import upload
from dali_pipeline.torch_graph import TorchGraph

CPU = torch.device("cpu")
BACKENDS = ("dali", "torch")
WAYS = (*BACKENDS, "dali streamed", "torch streamed")
FILL = (125, 122, 113)
Pixels = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Batches this small only wait for a second thread, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_split(num_images: int, height: int = 32, width: int = 32, label_bytes: int = 1, seed: int = 0) -> Split:
    """Random pixels, so that no two places look alike, and random labels: planar and a view of records that begin with
    `label_bytes`, or without such bytes in HWC order and contiguous."""
    size = (num_images, max(1, label_bytes) + 3 * height * width)
    records = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    labels = records[:, max(1, label_bytes) - 1].astype(np.int64)
    pixels = records[:, max(1, label_bytes) :]
    if label_bytes:
        return Split(pixels.reshape(num_images, 3, height, width), labels, planar=True)
    return Split(np.ascontiguousarray(pixels).reshape(num_images, height, width, 3), labels)


def augmented(
    image: Pixels, augment: Augment, fill: tuple[int, ...], dy: int, dx: int, flip: bool, cy: int, cx: int
) -> Pixels:
    """One (H, W, 3) image: pad, cut the window, mirror it, paint the square."""
    height, width, _ = image.shape
    if augment.crop:
        around = ((augment.pad, augment.pad), (augment.pad, augment.pad), (0, 0))
        padded = np.pad(image, around, mode="constant" if augment.padding_mode == "zero" else "reflect")
        image = padded[dy : dy + height, dx : dx + width]
    if flip:
        image = image[:, ::-1]
    image = image.copy()
    first_row, first_column = cy - augment.cutout // 2, cx - augment.cutout // 2
    for row in range(first_row, first_row + augment.cutout):
        for column in range(first_column, first_column + augment.cutout):
            if 0 <= row < height and 0 <= column < width:
                image[row, column] = fill
    return image


def expected_batches(
    split: Split, augment: Augment, seed: int, epoch: int, batch_size: int
) -> list[tuple[Pixels, npt.NDArray[np.int64]]]:
    """The batches of one epoch (tail "drop") by the loop above."""
    images, labels = split.images, split.labels
    plan = draw_plan(seed, epoch, len(split), augment, (split.height, split.width))
    columns = (plan.indices, plan.dy, plan.dx, plan.flip, plan.cy, plan.cx)
    drawn = list(zip(*(column.tolist() for column in columns), strict=True))
    batches = []
    for start in range(0, len(drawn) - batch_size + 1, batch_size):
        rows = drawn[start : start + batch_size]
        pixels = np.stack([augmented(images[i], augment, FILL, *how) for i, *how in rows])
        batches.append((pixels, labels[[row[0] for row in rows]]))
    return batches


def order(**options: Any) -> FeedOrder:
    return FeedOrder(**{"batch_size": 16, "augment": Augment(), "fill": FILL, "device": CPU, **options})


def settings_of(way: str) -> tuple[str, Resident]:
    """(backend, resident) of one of WAYS, or of a backend."""
    backend, _, streamed = way.partition(" ")
    return backend, "never" if streamed else "always"


def make_loader(split: Split, way: str, **options: Any) -> TrainLoader:
    backend, resident = settings_of(way) if isinstance(way, str) else (way, "always")
    options = {"seed": 3, **options}
    of_order = {key: options.pop(key) for key in ("batch_size", "augment", "device", "compiled") if key in options}
    return TrainLoader(split, order(resident=resident, **of_order), backend=backend, **options)


def hwc(images: torch.Tensor) -> Pixels:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def assert_epoch(loader: TrainLoader, epoch: int, expected: list[tuple[Pixels, npt.NDArray[np.int64]]]) -> None:
    got = list(loader.epoch(epoch))
    assert len(got) == len(expected) == loader.steps_per_epoch
    for (images, labels), (wanted_images, wanted_labels) in zip(got, expected, strict=True):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        np.testing.assert_array_equal(hwc(images), wanted_images)
        np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)


SWITCHES = [
    Augment(crop=crop, padding_mode=mode, flip=flip, cutout=cutout)
    for crop, mode, flip, cutout in itertools.product((True, False), ("zero", "reflect"), (True, False), (8, 0))
    if crop or mode == "zero"
]


@pytest.mark.parametrize("augment", SWITCHES, ids=str)
@pytest.mark.parametrize(("batch_size", "num_images"), [(1, 40), (7, 75), (128, 400), (512, 1100)])
def test_every_way_equals_the_loop_over_whole_epochs(batch_size: int, num_images: int, augment: Augment) -> None:
    split = make_split(num_images)
    loaders = [make_loader(split, backend, batch_size=batch_size, augment=augment) for backend in WAYS]
    for epoch in (0, 1):
        expected = expected_batches(split, augment, 3, epoch, batch_size)
        for loader in loaders:
            assert_epoch(loader, epoch, expected)
    for loader in loaders:
        loader.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    label_bytes=st.integers(0, 2),
    batch_size=st.sampled_from((1, 3, 17, 20)),
    augment=st.builds(
        Augment,
        crop=st.booleans(),
        pad=st.integers(0, 9),
        padding_mode=st.sampled_from(("zero", "reflect")),
        flip=st.booleans(),
        cutout=st.integers(0, 25),
    ),
)
def test_every_way_equals_the_loop_for_any_size(
    height: int, width: int, label_bytes: int, batch_size: int, augment: Augment
) -> None:
    split = make_split(22, height, width, label_bytes)
    if augment.crop and augment.padding_mode == "reflect" and augment.pad >= min(height, width):
        with pytest.raises(ValueError, match="reflects more than an image"):
            make_loader(split, "torch", batch_size=batch_size, augment=augment)
        return
    expected = expected_batches(split, augment, 3, 0, batch_size)
    for backend in WAYS:
        loader = make_loader(split, backend, batch_size=batch_size, augment=augment)
        assert_epoch(loader, 0, expected)
        loader.close()


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("cutout", [0, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cutout_by", ["paste", "erase"])
def test_dali_gives_the_same_pixels_by_every_way(mode: Any, cutout: int, padded: bool, cutout_by: Any) -> None:
    """What the GPU takes by default runs here on the CPU backend."""
    split, augment = make_split(150), Augment(padding_mode=mode, cutout=cutout)
    plan = draw_plan(0, 0, 150, augment)
    plans = iter([plan.take(slice(start, start + 48)) for start in (0, 48, 96)] + [plan.take(slice(48))] * 9)
    graph = dali_graph.DaliGraph(
        split,
        order(batch_size=48, augment=augment),
        lambda: next(plans),
        cutout_by=cutout_by,
        padded=padded,
        most_strips=dali_graph.MOST_STRIPS["cuda" if padded else "cpu"],
    )
    for wanted, _ in expected_batches(split, augment, 0, 0, 48):
        np.testing.assert_array_equal(hwc(graph.run()), wanted)
    graph.close()


def test_dali_refuses_strips_that_its_gpu_kernel_cannot_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_graph, "MAX_STRIP_BYTES", 20 * 32 * 32 * 3)
    with pytest.raises(BackendError, match="divisible by 8"):
        make_loader(make_split(64), "dali", batch_size=17)
    make_loader(make_split(64), "dali", batch_size=16).close()


@pytest.mark.parametrize("backend", WAYS)
def test_batches_are_channels_last_without_a_copy(backend: str) -> None:
    loader = make_loader(make_split(64, 8, 6), backend, batch_size=16)
    for images, labels in loader.epoch(0):
        assert images.shape == (16, 3, 8, 6) and images.stride() == (8 * 6 * 3, 1, 6 * 3, 3)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (16,) and not images.requires_grad
    loader.close()


@pytest.mark.parametrize("backend", WAYS)
def test_held_batches_are_never_overwritten(backend: str) -> None:
    split = make_split(300)
    loader = make_loader(split, backend, batch_size=20)
    held = [(images, labels, images.clone(), labels.clone()) for images, labels in loader.epoch(0)]
    assert len({images.data_ptr() for images, *_ in held}) == len(held)
    for _ in loader.epoch(1):
        pass
    loader.close()
    for images, labels, images_then, labels_then in held:
        assert torch.equal(images, images_then) and torch.equal(labels, labels_then)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("tail", ["drop", "endless"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_interleave_to_the_single_process_batches(backend: str, tail: Any, world_size: int) -> None:
    split = make_split(100)
    whole = make_loader(split, backend, batch_size=12, tail=tail)
    ranks = [
        make_loader(split, backend, batch_size=12, tail=tail, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        epochs = [loader.epoch(epoch) for loader in ranks]
        for images, labels in whole.epoch(epoch):
            for rank, (part, part_labels) in enumerate(next(iterator) for iterator in epochs):
                assert torch.equal(part, images[rank::world_size])
                assert torch.equal(part_labels, labels[rank::world_size])
    for loader in (whole, *ranks):
        loader.close()


@pytest.mark.parametrize("tail", ["drop", "endless"])
def test_starting_anywhere_equals_running_up_to_it(tail: Any) -> None:
    """In any order, with iterators dropped half-way: DALI has batches in flight that must not be taken for others."""
    split = make_split(100)
    straight = make_loader(split, "torch", batch_size=16, tail=tail)
    expected = {epoch: list(straight.epoch(epoch)) for epoch in range(4)}
    for backend in WAYS:
        loader = make_loader(split, backend, batch_size=16, tail=tail)
        for epoch, start, stop in [
            (2, 3, 6),
            (3, 0, 2),
            (3, 2, 6),
            (0, 0, 6),
            (0, 0, 1),
            (0, 2, 3),
            (0, 4, 6),
            (1, 5, 6),
        ]:
            for step, (images, labels) in zip(range(start, stop), loader.epoch(epoch, start), strict=False):
                assert torch.equal(images, expected[epoch][step][0]), (backend, epoch, step)
                assert torch.equal(labels, expected[epoch][step][1]), (backend, epoch, step)
        loader.close()


def test_two_iterators_of_one_loader_do_not_disturb_each_other() -> None:
    split = make_split(100)
    loader, reference = make_loader(split, "dali"), make_loader(split, "torch")
    pairs = zip(loader.epoch(0), loader.epoch(5, 1), reference.epoch(0), reference.epoch(5, 1), strict=False)
    for (a, _), (b, _), (wanted_a, _), (wanted_b, _) in pairs:
        assert torch.equal(a, wanted_a) and torch.equal(b, wanted_b)
    loader.close()


def test_endless_uses_every_image_equally_often() -> None:
    split = Split(np.zeros((50, 1, 1, 3), np.uint8), np.arange(50))
    loader = make_loader(split, "dali", batch_size=20, tail="endless", augment=NO_AUGMENT)
    labels = torch.cat([labels for epoch in range(5) for _, labels in loader.epoch(epoch)])
    assert torch.bincount(labels, minlength=50).tolist() == [4] * 50
    loader.close()


@pytest.mark.parametrize("label_bytes", [0, 1])
def test_read_only_data_is_left_alone(label_bytes: int) -> None:
    split = make_split(40, label_bytes=label_bytes)
    split.pixels.flags.writeable = split.labels.flags.writeable = False
    before, labels_before = split.pixels.copy(), split.labels.copy()
    for backend in WAYS:
        loader = make_loader(split, backend)
        assert_epoch(loader, 0, expected_batches(split, Augment(), 3, 0, 16))
        loader.close()
    np.testing.assert_array_equal(split.pixels, before)
    np.testing.assert_array_equal(split.labels, labels_before)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (30, 1), (50, 1), (77, 1), (12, 3), (64, 4)])
def test_evaluation_sees_every_image_exactly_once(backend: str, batch_size: int, world_size: int) -> None:
    split = make_split(50, 10, 14, 2)
    name, resident = settings_of(backend)
    loaders = [
        EvalLoader(
            split, batch_size=batch_size, device=CPU, backend=name, resident=resident, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert {loader.num_images for loader in loaders} == {50} and len({len(loader) for loader in loaders}) == 1
    next(iter(loaders[0]))  # given up: the next pass starts afresh
    for _ in range(2):
        seen = []
        for loader in loaders:
            for images, labels, valid in loader:
                assert images.shape == (batch_size // world_size, 3, 10, 14) and valid.dtype == torch.bool
                assert labels.shape == valid.shape == (batch_size // world_size,)
                assert images.is_contiguous(memory_format=torch.channels_last)
                assert (hwc(images[~valid]) == split.images[0]).all()
                seen += [
                    (image.tobytes(), label) for image, label in zip(hwc(images[valid]), labels[valid], strict=True)
                ]
        wanted = [(image.tobytes(), label) for image, label in zip(split.images, split.labels, strict=True)]
        assert sorted(seen) == sorted(wanted)
        if world_size == 1:
            assert seen == wanted
    for loader in loaders:
        loader.close()


def test_evaluation_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="10 is not divisible by world size 3"):
        EvalLoader(make_split(20), batch_size=10, device=CPU, backend="torch", world_size=3)


@pytest.mark.parametrize("backend", WAYS)
def test_closed_loader_says_so(backend: str) -> None:
    loader = make_loader(make_split(40), backend)
    next(loader.epoch(0))
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_over_epochs(backend: str) -> None:
    loader = make_loader(make_split(2048), backend, batch_size=256)
    sizes = []
    for epoch in range(60):
        for _ in loader.epoch(epoch):
            pass
        sizes.append(resident_megabytes())
    assert sizes[-1] - sizes[9] < 8, sizes  # an epoch is 6 MB
    loader.close()


@pytest.mark.parametrize(
    "augment", [Augment(), pytest.param(Augment(padding_mode="reflect", cutout=0), marks=pytest.mark.long)]
)
def test_compiled_torch_equals_the_loop(augment: Augment) -> None:
    split = make_split(100)
    loader = make_loader(split, "torch", batch_size=24, augment=augment, compiled=True)
    for epoch in (0, 1):
        assert_epoch(loader, epoch, expected_batches(split, augment, 3, epoch, 24))


def test_compiled_torch_falls_back_to_eager_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("no C++ compiler\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    split = make_split(50)
    loader = make_loader(split, "torch", compiled=True)
    with pytest.warns(RuntimeWarning, match=r"runs eagerly: no C\+\+ compiler$"):
        next(loader.epoch(0))
    assert_epoch(loader, 0, expected_batches(split, Augment(), 3, 0, 16))


def test_auto_takes_dali_where_it_runs() -> None:
    choice = choose_backend("auto", CPU)
    assert choice.name == "dali" and "CPU backend" in choice.reason
    assert choose_backend("dali", CPU) == choice
    assert choose_backend("torch", CPU).name == "torch"


@pytest.fixture(params=["absent", "placeholder", "no driver"])
def broken_dali(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """DALI not installed; the empty package that pip installs on macOS; a pipeline that fails when it runs."""
    if request.param == "absent":
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        yield "pip install nvidia-dali-cuda120"
    elif request.param == "placeholder":
        for name in ("nvidia.dali", "nvidia.dali.fn"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        yield "reinstall nvidia-dali-cuda120"
    else:

        class Pipeline:
            def __init__(self, **options: Any) -> None:
                raise RuntimeError("CUDA driver version is insufficient\nStacktrace (9 entries):")

        import nvidia.dali

        monkeypatch.setattr(nvidia.dali, "Pipeline", Pipeline)
        yield "CUDA driver version is insufficient"


def test_auto_falls_back_to_torch_and_says_why(broken_dali: str) -> None:
    choice = choose_backend("auto", CPU)
    assert choice.name == "torch" and broken_dali in choice.reason and "\n" not in choice.reason


def test_dali_that_cannot_run_is_an_error_in_one_line(broken_dali: str) -> None:
    for use in (lambda: choose_backend("dali", CPU), lambda: make_loader(make_split(20), "dali")):
        with pytest.raises(BackendError, match=r"data\.backend=dali cannot run on cpu") as error:
            use()
        assert broken_dali in str(error.value) and "data.backend=torch" in str(error.value)
        assert "\n" not in str(error.value)


def test_dali_that_gives_wrong_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    rectangles = StripLayout.rectangles

    def one_column_short(layout: StripLayout, plan: Plan) -> Any:
        ids, source, shape, target = rectangles(layout, plan)
        shape[0, 0, 1] -= 1  # of one image a batch
        return ids, source, shape, target

    monkeypatch.setattr(StripLayout, "rectangles", one_column_short)
    choice = choose_backend("auto", CPU)
    assert choice.name == "torch" and "3 of 72 images differ from the reference" in choice.reason
    with pytest.raises(BackendError, match=r"its pixels are wrong .*; use data\.backend=torch"):
        choose_backend("dali", CPU)


def test_what_dali_encountered_is_told_not_where(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    rectangles = StripLayout.rectangles

    def outside(layout: StripLayout, plan: Plan) -> Any:
        ids, source, shape, target = rectangles(layout, plan)
        return ids, source - 1000, shape, target

    monkeypatch.setattr(StripLayout, "rectangles", outside)
    assert "Assert on" in choose_backend("auto", CPU).reason


def test_dali_on_another_device_is_an_error() -> None:
    with pytest.raises(BackendError, match="DALI has no mps backend"):
        choose_backend("dali", torch.device("mps"))
    assert choose_backend("auto", torch.device("mps")).name == "torch"
    with pytest.raises(ValueError, match="'cuda', expected 'auto', 'dali' or 'torch'"):
        choose_backend("cuda", CPU)


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    head = """
        import os, sys, numpy as np, torch
        from dali_pipeline.dataset import Split
        from dali_pipeline.feed import FeedOrder
        from dali_pipeline.loader import EvalLoader, TrainLoader
        from dali_pipeline.plan import Augment
        split = Split(np.zeros((64, 32, 32, 3), np.uint8), np.zeros(64, np.int64))
        order = FeedOrder(batch_size=16, augment=Augment(), fill=(1, 2, 3), device=torch.device("cpu"))
        loader = TrainLoader(split, order, seed=0, backend="dali")
        batches = loader.epoch(0)
        held = next(batches)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_interpreter_exits_with_loaders_left_open() -> None:
    done = run_script("""
        how = {"batch_size": 8, "device": torch.device("cpu")}
        others = [EvalLoader(split, backend="dali", **how), EvalLoader(split, backend="torch", resident="never", **how)]
        for other in others:
            next(iter(other))
    """)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork()")
def test_forked_child_gets_an_error_rather_than_a_hang() -> None:
    done = run_script("""
        child = os.fork()
        if child == 0:
            try:
                next(batches)
            except RuntimeError as error:
                print(error, flush=True)
            loader.close()
            os._exit(0)
        os.waitpid(child, 0)
        print(len(list(loader.epoch(1))))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["a loader does not survive fork(): make it in the process that uses it", "4"]


def test_import_takes_no_dali() -> None:
    code = "import sys, dali_pipeline.loader, dali_pipeline.sources; print('nvidia.dali' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def gpu_batches(split: Split, backend: str, augment: Augment, epoch: int = 0, **options: Any) -> list[Any]:
    loader = make_loader(split, backend, batch_size=128, augment=augment, device=torch.device("cuda"), **options)
    batches = [(images.cpu(), labels.cpu()) for images, labels in loader.epoch(epoch)]
    loader.close()
    return batches


@pytest.mark.gpu
@pytest.mark.parametrize("augment", SWITCHES, ids=str)
def test_gpu_every_way_equals_dali_on_the_cpu(augment: Augment) -> None:
    split = make_split(1000)
    on_cpu = make_loader(split, "dali", batch_size=128, augment=augment)
    wanted = list(on_cpu.epoch(0))
    for backend in WAYS:
        for (images, labels), (wanted_images, wanted_labels) in zip(
            gpu_batches(split, backend, augment), wanted, strict=True
        ):
            assert torch.equal(images, wanted_images) and torch.equal(labels, wanted_labels)
    on_cpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cutout_by", ["paste", "erase"])
def test_gpu_dali_gives_the_same_pixels_by_every_way(padded: bool, cutout_by: Any) -> None:
    split, augment, cuda = make_split(1100), Augment(), torch.device("cuda")
    plan = draw_plan(3, 0, 1100, augment)
    plans = iter([plan.take(slice(start, start + 512)) for start in (0, 512)] + [plan.take(slice(512))] * 9)
    graph = dali_graph.DaliGraph(
        split,
        order(batch_size=512, augment=augment, device=cuda),
        lambda: next(plans),
        cutout_by=cutout_by,
        padded=padded,
    )
    for wanted, _ in expected_batches(split, augment, 3, 0, 512):
        np.testing.assert_array_equal(hwc(graph.run()), wanted)
    graph.close()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 88])
def test_gpu_dali_refuses_widths_that_its_kernel_does_not_stand(width: int) -> None:
    with pytest.raises(BackendError, match=f"image width {width}; use data.backend=torch"):
        make_loader(make_split(40, 32, width), "dali", device=torch.device("cuda"))


@pytest.mark.gpu
def test_gpu_backend_is_named_with_the_device() -> None:
    assert choose_backend("auto", torch.device("cuda")).name == "dali"
    assert "cuda" in choose_backend("auto", torch.device("cuda")).reason


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_batches_are_ordered_on_a_busy_stream_without_waiting_for_it(backend: str) -> None:
    """Batches used on a side stream that is behind by many kernels, and overtaken by later ones, keep their pixels; torch
    sees no synchronisation of its own on the way."""
    split = make_split(2560)
    loader = make_loader(split, backend, batch_size=256, device=torch.device("cuda"))
    expected = expected_batches(split, Augment(), 3, 1, 256)
    for _ in loader.epoch(0):
        pass
    work = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    copies = []
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            torch.cuda.set_sync_debug_mode("error")
            for images, labels in loader.epoch(1):
                work = work @ work * 0
                copies.append((images + 0, labels + 0))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().synchronize()
    for (images, labels), (wanted_images, wanted_labels) in zip(copies, expected, strict=True):
        np.testing.assert_array_equal(hwc(images), wanted_images)
        np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_graph_captured_before_the_first_batch_replays_on_batches(backend: str) -> None:
    split = make_split(512)
    loader = make_loader(split, backend, batch_size=128, device=torch.device("cuda"))
    static = torch.zeros(128, 3, 32, 32, dtype=torch.uint8, device="cuda").to(memory_format=torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = static.long().sum()
    for (images, _), (wanted, _) in zip(loader.epoch(0), expected_batches(split, Augment(), 3, 0, 128), strict=True):
        static.copy_(images)
        graph.replay()
        assert total.item() == wanted.sum(dtype=np.int64)
    loader.close()


@pytest.mark.gpu
def test_gpu_held_batches_are_never_overwritten() -> None:
    loader = make_loader(make_split(2560), "dali", batch_size=128, device=torch.device("cuda"))
    held = [(images, images.clone()) for images, _ in loader.epoch(0)]
    for _ in loader.epoch(1):
        pass
    assert all(torch.equal(images, then) for images, then in held)
    loader.close()


def test_torch_graph_takes_any_plan_length() -> None:
    split = make_split(30, 9, 9)
    zeros = np.zeros(5, np.int64)
    plan = Plan(np.array([3, 3, 29, 0, 1]), zeros, zeros, zeros.astype(bool), zeros, zeros)
    graph = TorchGraph(split, order(augment=NO_AUGMENT), lambda: plan)
    np.testing.assert_array_equal(hwc(graph.run()), split.images[plan.indices])
    engine = Engine(
        split, order(augment=NO_AUGMENT), "torch", plan_of=lambda key: plan, follow=lambda epoch, step: (epoch, step)
    )
    images, labels = engine.batch((0, 0))
    np.testing.assert_array_equal(hwc(images), split.images[plan.indices])
    np.testing.assert_array_equal(labels.numpy(), split.labels[plan.indices])


@pytest.mark.parametrize("backend", WAYS)
def test_planar_and_hwc_splits_give_the_same_batches(backend: str) -> None:
    planar = make_split(100, 12, 20)
    assert planar.planar
    hwc_split = Split(planar.images, planar.labels)
    loaders = [make_loader(split, backend) for split in (planar, hwc_split)]
    for (images, labels), (others, other_labels) in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert images.stride() == others.stride()
    for loader in loaders:
        loader.close()


def test_pixels_stay_where_they_are_on_the_cpu() -> None:
    for label_bytes in (0, 1):
        pixels = make_split(10, label_bytes=label_bytes).pixels
        on_cpu = upload(pixels, CPU)
        assert on_cpu.data_ptr() == pixels.ctypes.data and on_cpu.stride() == pixels.strides


@pytest.mark.gpu
@pytest.mark.parametrize("label_bytes", [0, 1])
def test_gpu_pixels_lie_contiguous_on_the_device(label_bytes: int) -> None:
    pixels = make_split(10, label_bytes=label_bytes).pixels
    on_gpu = upload(pixels, torch.device("cuda"))
    assert on_gpu.is_contiguous()
    np.testing.assert_array_equal(on_gpu.cpu().numpy(), pixels)


@pytest.mark.parametrize("way", ["torch", "torch streamed"])
def test_a_batch_that_failed_can_be_asked_for_again(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split = make_split(64)
    loader = make_loader(split, way)
    expected = expected_batches(split, Augment(), 3, 0, 16)
    next(loader.epoch(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_select", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            next(loader.epoch(0, 2))
    images, labels = next(loader.epoch(0, 2))
    np.testing.assert_array_equal(hwc(images), expected[2][0])
    np.testing.assert_array_equal(labels.numpy(), expected[2][1])


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_graph_says_so(way: str) -> None:
    backend, resident = settings_of(way)
    graph = GRAPHS[backend](
        make_split(32), order(resident=resident), lambda: draw_plan(0, 0, 32, Augment()).take(slice(16))
    )
    graph.run()
    graph.close()
    graph.close()
    with pytest.raises(RuntimeError, match="closed"):
        graph.run()


def test_loader_takes_a_choice_or_a_name() -> None:
    split = make_split(40)
    for backend in ("auto", BackendChoice("torch", "a test"), choose_backend("auto", CPU)):
        loader = make_loader(split, backend)  # type: ignore[arg-type]
        assert_epoch(loader, 0, expected_batches(split, Augment(), 3, 0, 16))
        loader.close()
