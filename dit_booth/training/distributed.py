"""Ranks: starting DeepSpeed on GPUs or on the CPU, with or without its launcher, and agreeing across ranks."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._tensor_str import printoptions

from dit_booth.files import Lock, remove_partials

log = logging.getLogger(__name__)
T = TypeVar("T")
_NO_COMPILER = "TORCHDYNAMO_DISABLE"


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, *values: float) -> list[float]:
        """Average each value over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(v) / self.world for v in tensor]

    def broadcast(self, value: T) -> T:
        """Return the first rank's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, mine: dict[int, T]) -> dict[int, T]:
        """Return the entries of all ranks, which have keys of their own, on every rank; one needs no process group."""
        if self.world == 1:
            return dict(mine)
        gathered: list[dict[int, T]] = [{} for _ in range(self.world)]
        dist.all_gather_object(gathered, mine)
        return {key: value for part in gathered for key, value in part.items()}

    def barrier(self) -> None:
        dist.barrier()


@contextlib.contextmanager
def owning(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Own a folder (`dit_booth.files.Lock`); wait until no other run does, however long that takes."""
    lock, logged = Lock(folder), False
    while not ranks.broadcast(ranks.first and lock.take()):  # not a barrier: those give up after some minutes
        if ranks.first and not logged and (logged := True):
            log.info("%s is another process's (%s); waiting for it", folder, lock.owner())
        time.sleep(1)
    try:
        if ranks.first:
            remove_partials(folder)
        else:
            lock.join(ranks.rank)
        yield
    finally:
        lock.release()


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, quiet, and without the op for which it would need a compiler on the CPU.

    That shared-memory op would be compiled at the first start and leaks 69 MB of /dev/shm per rank and port; gloo does
    the same work.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})  # a private name: only where it exists
    if not on_gpu and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    _import_muon()
    module: ModuleType = deepspeed
    return module


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which every ZeRO engine imports and no run uses, without torch.compile.

    As a decorator that loads Inductor: two of the start's seconds, in every rank.
    """
    asked = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        with contextlib.suppress(ImportError):  # another version may keep it elsewhere, or have none
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ[_NO_COMPILER]
        if asked is not None:
            os.environ[_NO_COMPILER] = asked


def initialize(**arguments: object) -> Any:
    """Return ``deepspeed.initialize``'s engine, without stage 3's formatting of messages that it does not print."""
    with printoptions(threshold=0, edgeitems=1):  # half of its time in a profile of small networks
        engine, *_ = import_deepspeed().initialize(**arguments)
    return engine


def start() -> Ranks:
    """Join the process group: the launcher's, or one of this process alone."""
    on_gpu, deepspeed = torch.cuda.is_available(), import_deepspeed()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = f"RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        for name, value in (pair.split("=") for pair in alone.split()):
            os.environ.setdefault(name, value)
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:
        raise ValueError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}, where the ranks meet, cannot be used:"
            f" {str(error).splitlines()[0]}; give the launcher a free one: deepspeed --master_port 29501 ..."
        ) from error
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
    return Ranks(
        dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if on_gpu else torch.device("cpu")
    )


def free_memory(ranks: Ranks) -> None:
    """Free unreferenced GPU memory; CUDA's own context stays until the process ends."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


def stop() -> None:
    """Leave the process group; the process may `start` again."""
    if dist.is_initialized():
        dist.destroy_process_group()
        import_deepspeed().utils.groups._WORLD_GROUP = None  # else the next engine would be given this one
