"""Doing the units of a job: one after the other in this process, or in several processes at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from .directory import Directory, Record
from .job import Job


def do_units(
    job: Job, target: Directory, numbers: Sequence[int], workers: int, device: torch.device
) -> Iterator[tuple[int, Record]]:
    """Do units, and give each as it is finished.

    Args:
        job: what to prepare.
        target: where to.
        numbers: the units' places in the plan.
        workers: how many processes; each needs the working set of a unit. 1 stays in this one.
        device: where matrices are decomposed; several CUDA devices are dealt out to the workers.

    Raises:
        RuntimeError: a worker died.
    """
    if workers == 1 or len(numbers) < 2:
        for number in numbers:
            yield number, job.do(number, target, device)
        return
    # Large units first: none is left alone at the end.
    order = sorted(numbers, key=lambda number: -job.units[number].cost)
    workers = min(workers, len(order))
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks, and cannot use CUDA
    devices = _devices(device, workers, context)
    pool = ProcessPoolExecutor(workers, context, _start, (job, target.folder, threads, devices))
    try:
        futures: dict[Future[Record], int] = {pool.submit(_do, number): number for number in order}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"one of {workers} workers died, perhaps for lack of memory (each takes a working set of its own); "
            "expected them to live. What is finished is kept: run the same again, with fewer workers."
        ) from error
    finally:
        _stop(pool)


def _devices(device: torch.device, workers: int, context: Any) -> Any:
    """A queue from which each worker takes the device that it computes on."""
    queue = context.SimpleQueue()
    for worker in range(workers):
        several = str(device) == "cuda" and torch.cuda.device_count() > 1
        queue.put(f"cuda:{worker % torch.cuda.device_count()}" if several else str(device))
    return queue


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once; after an error or an interruption what they have in hand is given up."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


_worker: tuple[Job, Directory, torch.device] | None = None


def _start(job: Job, folder: Path, threads: int, devices: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker = job, job.target(folder), torch.device(devices.get())


def _end_with_parent() -> None:
    """A killed parent tells nobody; without it a worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(number: int) -> Record:
    assert _worker is not None
    job, target, device = _worker
    return job.do(number, target, device)
