"""python -m train --config configs/onecycle.yaml [section.key=value ...]"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dali_pipeline.words import to_stderr
from train.config import Config, ConfigError, find_recipe, help_text, load_config, recipes, to_yaml
from train.machine.openmp import wait_passively
from train.machine.place import (
    GroupError,
    end_with_torchrun,
    place_from_environment,
    restarted,
    speaks_for_machine,
    torchrun_job,
)
from train.machine.signals import Interrupted, ending_at_once
from train.screen.streams import Parser, standard_streams, write_out

USAGE = 2
COMMAND = "cifar-train"  # the console command of setup.cfg

if TYPE_CHECKING:
    from train.screen.log import Log

EXAMPLES = """
examples:
  python -m train --config configs/quickstart.yaml
      the embedded digits: a whole run within two minutes on a laptop
  cifar-train --config quickstart
      the same from any folder: where no such file lies, the recipe of that name that is installed
  python -m train --config configs/onecycle.yaml data.root=~/data run.dir=runs/first
  python -m train --config configs/onecycle.yaml net.width=16 train.epochs=3 schedule.peak_epoch=1
  python -m train --config configs/onecycle.yaml --find-lr
  python -m train --config configs/onecycle.yaml run.dir=runs/first --resume
  torchrun --nproc-per-node=4 -m train --config configs/onecycle.yaml

exit codes: 0 done; 2 the configuration, the data or the machine does not allow the run; 3 the loss became NaN or infinite;
129, 130, 138 and 143 ended by SIGHUP, SIGINT, SIGUSR1 and SIGTERM, with the state saved where training had begun; 1 the run could
not go on: disk full, out of memory, another process lost, or a bug.
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog=COMMAND if Path(sys.argv[0]).stem == COMMAND else "python -m train",
        description="Train an image classifier from a recipe. Every key of the recipe can be overridden by section.key=value.",
        epilog=f"keys, with their defaults:\n\n{help_text()}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help=f"a YAML file or, where none lies there, the name of a recipe that is installed: {', '.join(recipes())}",
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    result.add_argument("--print-config", action="store_true", help="print the whole resolved recipe and end")
    result.add_argument("--find-lr", action="store_true", help="run the LR range test alone, draw it, and end")
    what = result.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="continue the run in run.dir from its last.pt")
    what.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    result.add_argument(
        "--fallback", action="store_true", help="with --resume: where last.pt is damaged, continue from previous.pt"
    )
    result.add_argument(
        "--extend",
        action="store_true",
        help="with --resume: train on to a larger train.epochs; what is left follows the schedule of the longer training",
    )
    return result


def main(arguments: list[str] | None = None) -> int:
    end_with_torchrun()
    with standard_streams():
        return _command(arguments)


def _command(arguments: list[str] | None) -> int:
    options = parser().parse_intermixed_args(arguments)
    for flag in ("fallback", "extend"):
        if getattr(options, flag) and not options.resume:
            return _fail(f"--{flag} goes with --resume")
    if options.find_lr and options.resume:
        return _fail("--find-lr cannot resume; it is over in one go")
    try:
        recipe = find_recipe(options.config)
        config = load_config(recipe, options.overrides, _note)
        if options.print_config:
            return write_out(to_yaml(config))
        first = place_from_environment().first
    except (ConfigError, GroupError) as error:
        return _fail(str(error))
    with ending_at_once():
        try:
            return _run(options, config, recipe, first)
        except (KeyboardInterrupt, Interrupted) as error:  # while torch was imported
            number = error.code - 128 if isinstance(error, Interrupted) else signal.SIGINT
            _tell(f"{signal.Signals(number).name}: ended before the training began")
            return 128 + number


def _run(options: argparse.Namespace, config: Config, recipe: Path, first: bool) -> int:
    wait_passively()
    # torch is imported from here on: --help, --print-config and a wrong key answer without waiting for it
    from dali_pipeline.errors import at_home
    from train.errors import explained
    from train.run import find_rates_only, fit
    from train.screen.log import Log

    log = Log(quiet=not first)
    train = config.train
    lower = (
        f" at train.batch_size={train.batch_size}, train.eval_batch_size={train.eval_batch_size}, "
        f"net.width={config.net.width}: lower one of them; nothing was changed by itself"
    )
    with explained(log, out_of_memory=lower, place=config.run.dir) as outcome:
        if recipe != Path(options.config):
            log(f"recipe: {recipe}, as no file {options.config} lies here")
        name = recipe.stem + ("-lr" if options.find_lr else "")
        folder = (
            at_home(config.run.dir, "run.dir", ConfigError) if config.run.dir else _default_folder(name, options.resume)
        )
        if options.find_lr:
            find_rates_only(
                config, folder, log=log, overwrite=options.overwrite, on_range_test=partial(_draw_range_test, log)
            )
            drawn = " (lr_finder.csv, lr_finder.png)" if (folder / "lr_finder.png").exists() else " (lr_finder.csv)"
            log(f"run folder     {folder}{drawn}")
        else:
            fit(
                config,
                folder,
                log=log,
                resume=options.resume,
                overwrite=options.overwrite,
                fallback=options.fallback,
                extend=options.extend,
                on_range_test=partial(_draw_range_test, log),
            )
            if config.run.analyse and not log.quiet_by_rank:
                _analyse(folder, config, log)
    return outcome.code


def _default_folder(name: str, resume: bool) -> Path:
    from train.disk.folder import default_run_dir, goes_on_from

    newest = default_run_dir(name, resume=True)
    goes_on = resume or (restarted() and goes_on_from(newest, torchrun_job()))
    return newest if goes_on else default_run_dir(name, resume=False)


def _analyse(folder: Path, config: Config, log: Log) -> None:
    """Draw the pictures and the report of the finished run. A failure is only logged: the run itself is complete."""
    log("drawing the pictures and the report ...")
    try:
        from analysis.report import analyse

        report = analyse(folder, data_root=Path(config.data.root), device=config.train.device, log=log)
    except Exception as error:  # whatever a drawing library raises
        log(
            f"WARNING: the run is complete, its analysis is not: {_reason(error)}. Again with: python -m analysis {folder}"
        )
        return
    log(
        f"next           open {report}; python -m analysis.predict {folder} IMAGES; "
        f"python -m analysis.compare {folder} OTHER-RUN"
    )


def _draw_range_test(log: Log, folder: Path) -> None:
    """Draw lr_finder.png. A failure is only logged: no picture ends a run."""
    try:
        from analysis.curves import draw_lr_finder

        draw_lr_finder(folder / "lr_finder.csv", folder / "lr_finder.png")
    except Exception as error:  # whatever a drawing library raises
        log(f"WARNING: {folder / 'lr_finder.png'} is not drawn: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fail(message: str) -> int:
    _tell(f"error: {message}")
    return USAGE


def _note(message: str) -> None:
    _tell(f"note: {message}")


def _tell(line: str) -> None:
    if speaks_for_machine():  # the other processes on this machine would print the same
        to_stderr(line)


if __name__ == "__main__":
    sys.exit(main())
