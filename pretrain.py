"""One training run, from the command line to the last checkpoint.

    python pretrain.py PRESET [--train.total-steps 50 ...]                one process
    torchrun --nproc-per-node 8 pretrain.py PRESET [...]                  many

A run lives in temp_data/runs/RUN_NAME, and the same command goes on where it stopped. `train(config)`
is the whole run and can be called from Python. Shapes: B sequences, T positions.
"""

import src  # noqa: F401 (before torch: see there)
from src.utils.stop_signals import end_at_once_on_ctrl_c

if __name__ == "__main__":
    end_at_once_on_ctrl_c()  # before the seconds that importing torch takes

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.data_processing.shards import read_manifest, stray_files
from src.data_processing.training_data_loader import TrainingDataLoader, WindowDataset
from src.data_processing.verification import ensure_verified
from src.model_assessment.periodic_evaluation import Assessment
from src.model_assessment.trackers import require_packages
from src.model_configs.command_line import config_from_command_line
from src.model_utils.adamw_opt import learning_rate
from src.model_utils.autotune import out_of_memory
from src.model_utils.disk_need import refuse_full_disk
from src.model_utils.profiling import profiler
from src.model_utils.step_numbers import StepNumbers
from src.params import Config
from src.run_log import STOP_FILE, Outcome, already_done, finish, log_training, record_saves, record_skip, write_status
from src.run_setup import Run, check_alike, check_machines, of_this_launch, open_data, prepare, where_to_go_on
from src.utils import hardware
from src.utils.errors import EXIT_DONE, StoppedError, exit_with, say
from src.utils.files import claim_file, claimed
from src.utils.handle_ddp import processes, world_size
from src.utils.logger import RunLogger
from src.utils.root import RUNS, dataset_dir
from src.utils.stop_signals import stop_on_signals


def train(config: Config, stop: Callable[[], str | bool] = lambda: False) -> Outcome:
    """Trains until the last step, or until `stop()` is true in any process; a later call goes on from there.

    What `stop()` returns may say in words who asks. Raises ConfigError or UserError for what cannot work, BusyError,
    StorageError, NonFiniteError, StoppedError before the first step and LostPeerError.
    """
    with ExitStack() as stack:
        procs = stack.enter_context(processes(config.train.device, config.train.timeout_s, stop))
        procs.together(lambda: config.grad_accumulation_steps(procs.world_size))  # refused before anything is touched
        procs.main_only(lambda: require_packages(config.report_to))
        folder, run_dir = dataset_dir(config.data.dir), RUNS / config.run_name
        manifest = procs.together(lambda: read_manifest(folder))
        # before anything reads a token; on each machine, because its disk may be its own
        procs.doing("verifying the dataset")
        verify = procs.is_machines_first
        procs.together_for_long(lambda: ensure_verified(folder, manifest, stop=stop) if verify else None)
        procs.doing("opening the dataset")
        training, assessment = procs.together_for_long(lambda: open_data(config, folder, manifest))
        precision = hardware.choose_precision(config.train.precision, procs.device)
        if procs.device.type == "cpu":  # where it is measured
            precision = procs.from_main(precision)
        check_alike(config, procs, manifest, precision, assessment.items)
        procs.doing("claiming the run's folder")
        procs.main_only(lambda: stack.enter_context(claimed(run_dir, stop)), for_long=True)
        log = RunLogger(run_dir, procs.is_main)
        config = procs.main_only(lambda: of_this_launch(config, log))
        apart = check_machines(run_dir, claim_file(run_dir), procs)
        procs.doing("looking for a checkpoint")
        checkpoint = procs.main_only(lambda: where_to_go_on(config, manifest, precision, procs, log), for_long=True)
        if checkpoint and config.train.precision == "auto":
            precision = getattr(torch, checkpoint.state["precision"].removeprefix("torch."))
        at_the_end = checkpoint is not None and checkpoint.step == config.total_steps
        if procs.main_only(lambda: at_the_end and not assessment.missing(config.total_steps, log.recorded())):
            return already_done(config, procs, log)
        for note in (stray_files(folder, manifest), assessment.note, apart):
            if note:
                log.info(f"warning: {note}")
        procs.main_only(lambda: refuse_full_disk(config, run_dir))
        run = prepare(config, procs, manifest, checkpoint, precision, log)  # one refused here keeps the status it had
        stack.callback(run.watching.close)
        stack.callback(run.saver.close)
        write_status(run, "running", None, "")
        try:
            outcome = run_steps(run, training, assessment, stop)
            procs.doing("the last report")
            procs.together_for_long(run.watching.close)
            return outcome
        except Exception as raised:
            error = raised
            if isinstance(raised, torch.OutOfMemoryError):
                where = f"step {run.state.progress.step + 1}"
                error = out_of_memory(raised, procs.device, run.config.micro_batch_size, where)
            procs.leave()  # the others may be gone before the save under way is done
            write_status(run, "failed", getattr(error, "exit_code", None) or 1, str(error))
            if error is raised:
                raise
            raise error from raised
        finally:
            gc.unfreeze()
            log.close_bar()


def run_steps(run: Run, training: WindowDataset, assessment: Assessment, stop: Callable[[], str | bool]) -> Outcome:
    """The loop: measure and save when due, then one step, until the last or until asked to stop."""
    config, procs, log, progress = run.config, run.procs, run.log, run.state.progress
    recorded = procs.main_only(log.recorded)
    first_step, started = progress.step, time.perf_counter()
    log.start_bar(first_step, config.total_steps)
    gc.collect()
    with (
        profiler(config.profile, first_step, log) as recording,
        TrainingDataLoader(
            training,
            seed=config.train.seed,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=procs.rank,
            world_size=procs.world_size,
            device=procs.device,
            first_step=first_step,
        ) as batches,
    ):
        while True:
            for kind in assessment.missing(progress.step, recorded):
                if not who_asks_to_stop(run, stop):
                    pause(run, batches)
                    if measure(run, assessment, kind, stop):
                        recorded.add((kind, progress.step))
            asked_by = who_asks_to_stop(run, stop)
            ending = bool(asked_by) or progress.step == config.total_steps
            if asked_by:
                log.info(f"stopping after step {progress.step}, asked for by {asked_by}")
            due = ending or (progress.step and progress.step % config.checkpoint.every_steps == 0)
            if due:
                pause(run, batches)
            if ending or (due and not progress.skipped_in_a_row):  # those of a failing stretch would push out good ones
                save(run)
            record_saves(run, run.saver.finished())
            if ending:
                return finish(run, asked_by, assessment.missing(progress.step, recorded))
            if progress.step == first_step:
                started = time.perf_counter()  # measuring before the first step is not part of the pace

            run.clock.run()
            numbers = train_step(run, batches)
            run.unread.append(numbers)
            if recording:
                recording.step()
            line_due = progress.step % config.train.log_every_steps == 0 or progress.step == config.total_steps
            take_in(run, batches, leave=1 if run.reads_late and not line_due else 0)
            if progress.step == first_step + 1:
                gc.freeze()  # from now on the collector looks at new objects only, and steps don't wait for it
            if line_due:
                pace = (time.perf_counter() - started) / (progress.step - first_step)
                log_training(run, numbers, seconds_left=pace * (config.total_steps - progress.step))


def pause(run: Run, batches: TrainingDataLoader) -> None:
    """Catches up with the steps taken, before something else than the next of them."""
    take_in(run, batches)
    run.clock.stop()


def who_asks_to_stop(run: Run, stop: Callable[[], str | bool]) -> str:
    """Who asks any of the processes to stop, in words, or ""; all call it together."""
    mine = asks_to_stop(run, stop)
    return next(filter(None, run.procs.gather(mine)), "") if run.procs.any(bool(mine)) else ""


def asks_to_stop(run: Run, stop: Callable[[], str | bool]) -> str:
    """Who asks this process to stop, in words, or ""."""
    if asked := stop():
        return str(asked)
    if run.saver.failed:
        return "a save that failed"
    return f"the file {STOP_FILE}" if run.procs.is_main and (run.log.run_dir / STOP_FILE).exists() else ""


def train_step(run: Run, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> StepNumbers:
    """One optimizer step, which changes nothing if its loss or gradient is not finite or its loss is a spike."""
    config, procs, optimizer, progress = run.config, run.procs, run.state.optimizer, run.state.progress
    procs.doing(f"step {progress.step + 1}")
    lr = learning_rate(progress.step, config.total_steps, config.warmup_steps, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = lr
    accumulation = config.grad_accumulation_steps(procs.world_size)
    losses = []
    for micro_step in range(accumulation):
        inputs_BT, targets_BT = next(batches)
        # Gradients travel between processes once a step, with the last micro-batch.
        is_last = micro_step + 1 == accumulation
        with (
            run.forward.no_sync() if not is_last and isinstance(run.forward, DistributedDataParallel) else nullcontext()
        ):
            with hardware.autocast(procs.device, run.precision):
                loss = run.forward(inputs_BT, targets_BT) / accumulation
            with procs.collective():
                loss.backward()
        losses.append(loss.detach())
    losses_M = torch.stack(losses)
    mean_loss = procs.mean(losses_M.sum())
    parameters = list(run.state.model.parameters())
    norms_P = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
    grad_norm = torch.linalg.vector_norm(norms_P)
    # The same numbers in every process, so all take the step or none. The optimizer looks at the flag on the device.
    skip = (~torch.isfinite(mean_loss + grad_norm)).float()
    if run.guard.z:
        loss_now = mean_loss.item()
        skip.clamp_(min=float(run.guard.is_spike(loss_now)))
        run.guard.add(loss_now)
    nn.utils.clip_grads_with_norm_(parameters, config.optim.clip_grad_norm, grad_norm)
    optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    return StepNumbers.send(progress.step, lr, losses_M, norms_P, torch.stack([mean_loss, grad_norm, skip]))


def take_in(run: Run, batches: TrainingDataLoader, leave: int = 0) -> None:
    """Reads the numbers of the steps taken, but for the last `leave`; all processes call it after the same step."""
    while len(run.unread) > leave:
        numbers = run.unread.popleft()
        loss, _, skipped = numbers.read()
        seconds = run.clock.lap()
        run.log.advance_bar(loss=f"{loss:.3f}")
        if skipped:
            record_skip(run, batches, numbers)
        else:
            run.state.progress.add_loss(loss, seconds)


def measure(run: Run, assessment: Assessment, kind: str, stop: Callable[[], str | bool]) -> bool:
    """Makes and logs the records of one kind for this step, or none, and False, if asked to stop in the middle."""
    procs, step = run.procs, run.state.progress.step
    procs.doing(f"{kind} at step {step}")
    context = hardware.autocast(procs.device, run.precision)
    model, asked = run.state.model, lambda: bool(asks_to_stop(run, stop))
    try:
        records = assessment.run(
            kind, model, run.config.micro_batch_size, context, procs.rank, procs.world_size, procs.sum, asked
        )
    except StoppedError:
        return False  # made when the run goes on
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, procs.device, run.config.micro_batch_size, f"{kind} at step {step}") from error
    for record in records:
        run.log.metric(record.kind, step, **record.values)
        run.log.info(f"step {step}  {record.words}")
    return True


def save(run: Run) -> None:
    """Starts to save a checkpoint of this step, once the one before is saved and the tensors are copied."""
    procs, state = run.procs, run.state
    procs.doing(f"the checkpoint of step {state.progress.step}")
    parts = state.parts(procs)
    plain = state.plain(run.config, run.manifest.sha256, run.precision, procs.world_size)
    # for long: the save before may still be under way
    procs.main_only(lambda: record_saves(run, run.saver.start(state.progress.step, parts, plain)), for_long=True)


def main() -> int:
    """The command line: a preset, and overrides of any of its fields."""
    dry_run = "--dry-run" in sys.argv[1:]
    if dry_run:
        sys.argv.remove("--dry-run")
    config = config_from_command_line(
        "Train a language model. The same command goes on where an earlier one stopped. With --dry-run, only check the "
        "settings, for as many processes as the environment variable WORLD_SIZE says."
    )
    if dry_run:
        config.grad_accumulation_steps(world_size())
        require_packages(config.report_to)
        steps = f"{config.total_steps:,} steps of {config.train.batch_tokens:,} tokens"
        say(f"{steps}: the settings are sound; data and disk were not looked at: that does python -m src.preflight")
        return EXIT_DONE
    with stop_on_signals() as stop:
        return train(config, stop).exit_code


if __name__ == "__main__":
    exit_with(main)
