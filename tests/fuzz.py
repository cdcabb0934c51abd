"""Damaged recipes, checkpoints, run folders and image files without end, each of which must be refused in one line or do no harm.

python tests/fuzz.py recipes|checkpoints|folders|images [--seconds 600] [--seed 0]

The last line says how many cases were tried and what came of them. A case that ends in an exception is kept in the folder that
is named, with its number; `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from training import QUICK, make_trainer  # noqa: E402

from analysis import curves, predict  # noqa: E402
from analysis.run import load_run  # noqa: E402
from dali_pipeline.errors import UserError  # noqa: E402
from train import export  # noqa: E402
from train.__main__ import main as train_main  # noqa: E402
from train.config import KEYS, Config, changed, to_yaml  # noqa: E402
from train.disk.checkpoint import load_checkpoint, save_checkpoint, seal, unseal  # noqa: E402
from train.disk.resume import check_fits, load_for_resume, note_changes  # noqa: E402
from train.disk.snapshot import load_snapshot  # noqa: E402
from train.run import fit  # noqa: E402
from train.screen.clock import Times  # noqa: E402
from train.screen.log import Log  # noqa: E402

Case = Callable[[random.Random, Path], str]

WORDS = ["true", "off", "~", "null", "010", "1e3", "-1", "1:30", "0x10", ".nan", ".inf", "!!int", "&a", "*a", "%", "\0", "\ud800",
         "'", '"', "{", "}", "[", "]", "- ", ": ", "\n", "\n  ", "\t", "#", "|", ">", "é", "🙂", "9" * 30, "9" * 5000, "x" * 3000,
         "2024-01-01", "<<", "=", "?", "---\n", "...\n", "\x1b[31m", "\u202e", "@", "`"]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 10**30, 2.5, float("nan"), float("inf"), "", "x", "\ud800", "x" * 5000, [], [1], {},
    [None], {"x": 1}, [[]], {"test": [1]},
]  # fmt: skip


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    """Cut, flipped, doubled or with a word in it."""
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(content) + 1), draw.choice((1, 2, 8, 64))
        how = draw.randrange(5)
        if how == 0:
            content = content[:place]
        elif how == 1:
            content = content[:place] + draw.randbytes(length) + content[place + length :]
        elif how == 2:
            content = content[:place] + content[place + length :]
        elif how == 3:
            content = content[:place] + content[max(0, place - length) :]
        else:
            content = content[:place] + draw.choice(WORDS).encode("utf-8", "surrogatepass") + content[place:]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def damaged_values(draw: random.Random, value: Any, wrong: list[Any]) -> Any:
    """Some values of nested dicts and lists replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        ways = list(places(value))
        if not ways:
            return draw.choice(wrong)
        first = draw.choice(sorted({str(way[0]) for way in ways}))
        path = draw.choice([way for way in ways if str(way[0]) == first])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = draw.randrange(3)
        if how == 0:
            holder[path[-1]] = draw.choice(wrong)
        elif how == 1:
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw.choice(["x", 1, *holder])] = draw.choice(wrong)
        else:
            holder.append(draw.choice(wrong))
    return value


def command(main: Callable[[list[str]], int], words: list[str]) -> str:
    """A command in this process; what came of it. AssertionError where it ends otherwise than it should."""
    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(str(ended.code))
    said = err.getvalue()
    assert code in (0, 1, 2), f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    assert code == 0 or "error: " in said, f"nothing said: {said!r}"
    assert "\x1b" not in said and len(max(said.splitlines() or [""], key=len)) < 2500, said
    assert time.monotonic() - begun < 60, "it took a minute"
    return f"exit {code}"


def recipes(folder: Path) -> Case:
    sources = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [to_yaml(Config()).encode()]

    def case(draw: random.Random, here: Path) -> str:
        path = here / "recipe.yaml"
        path.write_bytes(damaged_bytes(draw, draw.choice(sources)) if draw.random() < 0.7 else draw.choice(sources))
        words = [
            f"{draw.choice(sorted(KEYS))}={''.join(draw.choices(WORDS, k=draw.randint(1, 3)))}"
            for _ in range(draw.randrange(3))
        ]
        words = [word.replace("\0", "") for word in words]
        return command(train_main, ["--config", str(path), "--print-config", *words])

    return case


def finished_run(folder: Path) -> tuple[Path, Config]:
    config = changed(Config(), QUICK | {"net.width": 1, "data.backend": "torch", "train.ema_decay": 0.9})
    fit(config, folder / "run", log=Log(quiet=True))
    return folder / "run", config


def checkpoints(folder: Path) -> Case:
    run, config = finished_run(folder)
    trainer = make_trainer(config)
    state, content = load_checkpoint(run / "last.pt"), unseal((run / "last.pt").read_bytes())
    wrong = [
        *VALUES,
        b"x",
        (),
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
    ]

    def use(path: Path) -> str:
        done = 0
        with contextlib.suppress(UserError):
            snapshot = load_for_resume(path, config, fallback=False, extend=False, log=Log(quiet=True))
            check_fits(snapshot, trainer.state(), trainer.steps_per_epoch, path)
            trainer.load_state(snapshot.trainer_state)
            Times().add(snapshot.times)
            note_changes(snapshot.machine, {"device": "cpu", "processes": 1}, Log(quiet=True))
            done += 1
        with contextlib.suppress(UserError):
            export.subject(load_snapshot(path / "last.pt"), ema=True)
            load_run(path, checkpoint="last", device="cpu", need_data=False, say=lambda line: None).caption()
            done += 1
        return ("refused", "partly refused", "taken")[done]

    def case(draw: random.Random, here: Path) -> str:
        if draw.random() < 0.4:
            broken = damaged_bytes(draw, content)
            if draw.random() < 0.8 and broken[-2:] == b"\0\0":
                broken = seal(broken)
            (here / "last.pt").write_bytes(broken)
        else:
            save_checkpoint(here / "last.pt", damaged_values(draw, {**state, "format": 3}, wrong))
        return use(here)

    return case


def folders(folder: Path) -> Case:
    run, config = finished_run(folder)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    from PIL import Image

    Image.new("RGB", (32, 32)).save(folder / "image.png")
    names = ["config.yaml", "environment.json", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "previous.pt"]

    def damage(draw: random.Random, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        how = draw.randrange(7)
        if how < 3 and path.suffix in (".json", ".jsonl") and content:
            found = (
                [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
            )
            made = damaged_values(draw, found, VALUES)
            lines = made if path.suffix == ".jsonl" and isinstance(made, list) else [made]
            path.write_text("\n".join(json.dumps(value) for value in lines), encoding="utf-8")
        elif how < 4 and content:
            path.write_bytes(damaged_bytes(draw, content))
        else:
            path.unlink(missing_ok=True)
            if how == 4:
                path.mkdir()
            elif how == 5:
                os.mkfifo(path)
            elif how == 6:
                path.symlink_to(draw.choice(["/dev/zero", "nowhere", "/", "metrics.jsonl"]))

    def case(draw: random.Random, here: Path) -> str:
        copied = here / "run"
        shutil.copytree(run, copied)
        for name in draw.sample(names, draw.randint(1, 3)):
            damage(draw, copied / name)
        what = draw.randrange(4)
        if what == 0:
            return "curves " + command(curves.main, [str(copied)])
        if what == 1:
            return "predict " + command(predict.main, [str(copied), str(folder / "image.png")])
        option = ["--resume"] if what == 2 else draw.choice([["--overwrite"], ["--resume", "--fallback"], []])
        words = ["--config", str(folder / "recipe.yaml"), f"run.dir={copied}", "train.epochs=2", *option]
        return f"train {' '.join(option)} ".replace("  ", " ") + command(train_main, words)

    return case


def images(folder: Path) -> Case:
    """Batches of 80 image files, some of them damaged: those that are whole must be read as they are alone, and a damaged one
    costs at most itself."""
    import numpy as np
    from PIL import Image, features

    from dali_pipeline.image_files import ImageFiles
    from dali_pipeline.images import ImageError, read_image

    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 4), np.uint8)
    kinds = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "I;16"), "BMP": ("RGB",), "GIF": ("P",)}
    kinds |= {"TIFF": ("RGB", "CMYK", "F"), "WEBP": ("RGB", "RGBA")}
    kinds |= {"AVIF": ("RGB",)} if features.check("avif") else {}
    whole: list[bytes] = []
    for kind, modes in kinds.items():
        for mode in modes:
            image = Image.fromarray(noise, "RGBA").resize((37, 29)).convert("RGB")
            image = image.convert("L").convert("F") if mode == "F" else image.convert(mode)
            stream = io.BytesIO()
            image.save(stream, kind)
            whole.append(stream.getvalue())
    paths = [folder / str(number) for number in range(len(whole))]
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    expected = [read_image(path, 32, 32) for path in paths]
    reader = ImageFiles(32, 32)

    def alone(path: Path) -> Any:
        with contextlib.suppress(ImageError):
            return read_image(path, 32, 32)
        return None

    def case(draw: random.Random, here: Path) -> str:
        chosen = [draw.randrange(len(whole)) for _ in range(80)]
        bad = {place for place in range(80) if draw.random() < draw.choice((0.02, 0.3))}
        for place, number in enumerate(chosen):
            content = whole[number]
            (here / str(place)).write_bytes(damaged_bytes(draw, content) if place in bad else content)
        found = list(reader.read([str(here / str(place)) for place in range(80)]))
        pixels = np.concatenate([part.pixels for part in found])
        firsts = np.cumsum([0] + [len(part.pixels) for part in found]).tolist()
        problems = {first + place for first, part in zip(firsts, found, strict=False) for place in part.problems}
        assert len(pixels) == 80 and problems <= bad, f"refused, and whole: {sorted(problems - bad)}"
        for place, number in enumerate(chosen):
            if place not in bad:
                assert (pixels[place] == expected[number]).all(), f"file {place}: other pixels"
        differ = 0
        for place in bad:
            own = alone(here / str(place))
            if own is None or place in problems:
                differ += (own is None) != (place in problems)
            else:
                differ += bool((own != pixels[place]).any())
        return f"damaged files that DALI and Pillow read differently: {'some' if differ else 'none'}"

    return case


KINDS = {"recipes": recipes, "checkpoints": checkpoints, "folders": folders, "images": images}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (kept / "base").mkdir()
    case = KINDS[options.kind](kept / "base")
    came, failures, number = Counter[str](), 0, options.only or 0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        here = kept / str(number)
        here.mkdir()
        try:
            came[case(random.Random(f"{options.seed} {number}"), here)] += 1
        except Exception:
            failures += 1
            print(f"case {number}, kept in {here}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(here)
        number += 1
        if options.only is not None:
            break
    print(
        f"{options.kind}, seed {options.seed}: {came.total() + failures} cases, {failures} failed; {dict(sorted(came.items()))}"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
