"""Trains a configuration into a run folder; `python -m train` and `train.fit` call this."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import Config, ConfigError, changed, to_yaml
from train.disk.atomic import write_csv
from train.disk.folder import RunFolder, goes_on_from
from train.disk.resume import check_fits, check_same_data, load_for_resume, note_changes, restore_last
from train.disk.snapshot import Position, Snapshot
from train.loop import Run
from train.machine.place import restarted, torchrun_job
from train.screen.log import Log
from train.screen.notice import LongRunNotice
from train.screen.summary import summary_lines
from train.session import Session
from train.step.range_test import RangeTest, RangeTestError, range_test, suggest
from train.step.schedule import Rates, make_schedule

MAX_NAMES_SHOWN = 10  # file names in one line of the log


def fit(
    config: Config,
    run_dir: Path | None,
    *,
    log: Log | None = None,
    resume: bool = False,
    overwrite: bool = False,
    fallback: bool = False,
    extend: bool = False,
    on_range_test: Callable[[Path], None] | None = None,
    owns_process: bool = True,
) -> dict[str, Any]:
    """Train `config`, write the run into `run_dir` (nowhere with None) and return the summary.

    `resume` continues from last.pt. With `fallback` it continues from previous.pt where last.pt is damaged; with `extend`
    train.epochs may be larger than before, and the steps that are left take their learning rates from the schedule of the
    longer training. A command that torchrun has restarted resumes by itself, also with `overwrite`, where it has left a last.pt.
    `on_range_test` is called with the folder once lr_finder.csv is written. With `owns_process` false a
    second signal does not end the process. The exit codes of the errors are in train/errors.py.
    """
    options = {"--resume": resume, "--fallback": fallback, "--extend": extend}
    with Session(config, log, handle_signals=True, owns_process=owns_process, options=options) as session:
        group, log = session.group, session.log
        snapshot = None
        with group.phase("opening the run folder"):
            if restarted() and not resume and run_dir is not None:
                resume = group.from_first(lambda: goes_on_from(run_dir, torchrun_job()))
                overwrite = overwrite and not resume
                log("restarted by torchrun" + (f": continuing the run in {run_dir}" if resume else ""))
            folder = _open_folder(session, run_dir, resume=resume, overwrite=overwrite)
            if resume:
                assert run_dir is not None, "resuming needs the folder that holds last.pt"
                snapshot = group.from_first(
                    lambda: load_for_resume(run_dir, config, fallback=fallback, extend=extend, log=log)
                )
                session.go_on_as(snapshot.machine)
        session.build(
            check=None if snapshot is None else lambda dataset: check_same_data(snapshot, dataset),
            resuming=snapshot is not None,
        )
        trainer, steps_left = session.trainer, _steps_left(session, snapshot)
        session.warm_up(steps_left, None if snapshot is None else snapshot.machine)

        notice = LongRunNotice(steps_left, config, session.runtime, log)
        position, rates = Position(), Rates.given(config.schedule)
        if snapshot is not None:
            position, rates = snapshot.position, snapshot.rates
            with group.phase("preparing the run"), group.together():
                check_fits(snapshot, trainer.state(), trainer.steps_per_epoch, Path(run_dir or "."))
                trainer.load_state(snapshot.trainer_state)
                session.times.add(snapshot.times)
                if folder is not None and fallback:
                    restore_last(folder.path)
            note_changes(snapshot.machine, session.machine(), log)
            log(f"resumed from {run_dir} at epoch {position.epoch}, step {position.step}")
        elif rates is None:
            rates = find_rates(session, folder, notice, overwrite=overwrite)
            if folder is not None and on_range_test is not None:
                on_range_test(folder.path)
        elif overwrite:
            with group.phase("preparing the run"), group.together():
                if folder is not None:
                    _start_over(folder, log)
        assert rates is not None
        # from here on the rates that were found are part of the recipe
        session.config = changed(config, {"schedule.lr_max": rates.lr_max, "schedule.lr_min": rates.lr_min})
        with group.phase("preparing the run"), group.together():
            if folder is not None:
                # environment.json first: it proves that a run lies here, so that after a kill the folder can be overwritten
                folder.write_json("environment.json", session.environment())
                folder.write_text("config.yaml", to_yaml(session.config))
        schedule = make_schedule(config.schedule, rates, config.train.epochs, trainer.steps_per_epoch)
        with group.phase("preparing the run"), group.together():
            run = Run(session, schedule, folder, position, notice)
        session.at_end(run.close)
        run.train()
        final = None
        if session.dataset.validation is not None:
            log("measuring the test set, once ...")
            with group.phase("measuring the test set"):
                final = run.measure_test()
        summary, lines = summary_lines(run, run_dir, final)
        with group.phase("saving"), group.together():
            if folder is not None:
                folder.write_json("summary.json", summary)
        for line in lines:
            log(line)
        return summary


def find_rates_only(
    config: Config,
    run_dir: Path,
    *,
    log: Log | None = None,
    overwrite: bool = False,
    on_range_test: Callable[[Path], None] | None = None,
) -> Rates:
    """Run the range test without a training: write lr_finder.csv into the folder and return the suggested rates."""
    config = changed(config, {"schedule.lr_max": "find", "schedule.lr_min": "find"})
    with Session(config, log, handle_signals=True, options={"--find-lr": True}) as session:
        with session.group.phase("opening the run folder"):
            folder = _open_folder(session, run_dir, overwrite=overwrite, range_test=True)
        session.build()
        session.warm_up(config.schedule.find_steps)
        notice = LongRunNotice(config.schedule.find_steps, config, session.runtime, session.log)
        rates = find_rates(session, folder, notice, overwrite=overwrite)
        if folder is not None and on_range_test is not None:
            on_range_test(folder.path)
        return rates


def _steps_left(session: Session, snapshot: Snapshot | None) -> int:
    """The steps still to train, and those of a range test before them."""
    trainer, schedule = session.trainer, session.config.schedule
    if snapshot is not None:
        position = snapshot.position
        return trainer.total_steps - position.epoch * trainer.steps_per_epoch - position.step
    return trainer.total_steps + (schedule.find_steps if Rates.given(schedule) is None else 0)


def _open_folder(session: Session, run_dir: Path | None, **how: bool) -> RunFolder | None:
    """The run folder, locked until the session ends; None on all processes but the first."""
    folder = None
    with session.group.together():
        if run_dir is not None and session.group.first:
            folder = RunFolder(run_dir, **how)
            session.at_end(folder.close)
            if folder.unlocked is not None:
                session.note(folder.unlocked)
    return folder


def find_rates(session: Session, folder: RunFolder | None, notice: LongRunNotice, *, overwrite: bool = False) -> Rates:
    """Run the range test, write lr_finder.csv, and return the rates. A rate that the recipe gives as a number is kept.

    With `overwrite` the old run in the folder is removed, but only once the test has found rates. The first process reads the
    rates off the curve for all, so that what is wrong with it is told once.
    """
    schedule = session.config.schedule
    with session.group.phase("the range test"):
        with session.times.on("lr_search", session.runtime.device):
            result = range_test(
                session.trainer,
                start=schedule.find_start,
                end=schedule.find_end,
                steps=schedule.find_steps,
                log=session.log,
                bar=session.log.terminal and not session.log.quiet,
                after_step=notice.step,
            )
        return session.group.from_first(lambda: _rates_of(result, session, folder, overwrite=overwrite))


def _rates_of(result: RangeTest, session: Session, folder: RunFolder | None, *, overwrite: bool) -> Rates:
    schedule = session.config.schedule
    try:
        suggestion = suggest(result)
    except RangeTestError:
        if folder is not None and not folder.holds_run():
            write_csv(
                folder.path / "lr_finder.csv", result.rows()
            )  # also where no rates were found: the curve shows why
        raise
    session.log(suggestion.sentence())
    lr_max = suggestion.lr_max if isinstance(schedule.lr_max, str) else schedule.lr_max
    lr_min = min(suggestion.lr_min, lr_max) if isinstance(schedule.lr_min, str) else schedule.lr_min
    if lr_min > lr_max:
        raise ConfigError(
            f"schedule.lr_min: {lr_min:g} is above the lr_max found, {lr_max:.4g}; set schedule.lr_max too"
        )
    if folder is not None:
        if overwrite:
            _start_over(folder, session.log)
        write_csv(folder.path / "lr_finder.csv", result.rows())
    return Rates(lr_max, lr_min)


def _start_over(folder: RunFolder, log: Log) -> None:
    stays = folder.start_over()
    if stays:
        more = f" and {len(stays) - MAX_NAMES_SHOWN} more" if len(stays) > MAX_NAMES_SHOWN else ""
        log(f"--overwrite: left in {folder.path}, as no run wrote it: {', '.join(stays[:MAX_NAMES_SHOWN])}{more}")
