"""Slots for points: each is a set of devices, of this machine or another, that runs one point at a time."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dit_booth.files import SLOT
from dit_booth.study.turns import TURN

RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
"""Variables set by the launcher of this process; a point's launcher sets its own."""


@dataclass(frozen=True)
class Slot:
    """Devices that run one point at a time: launcher flags and environment that select them."""

    name: str
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def ahead(self) -> bool:
        """True if points can be launched before their turn; pdsh does not pass on the byte that signals it."""
        return not self.flags

    def places(self) -> set[tuple[str, str]]:
        """Return (machine, device) of each device."""
        return places(socket.gethostname(), self.name)


def environment(slot: Slot) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, with the slot's."""
    own = {name: value for name, value in os.environ.items() if name not in (*RANK, TURN)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"  # the launcher calls `python` by name
    turn = {TURN: "1"} if slot.ahead else {}
    return {**own, "PATH": path, **slot.env, **turn, SLOT: slot.name}


def places(host: str, slot: str) -> set[tuple[str, str]]:
    """Return (machine, device) pairs: `host` for ``gpu:0,1`` and ``cpu``, the named one for ``worker-1:0,1``."""
    machine, _, devices = slot.rpartition(":")
    return {(host if machine in ("", "gpu") else machine, device) for device in devices.split(",")}


def local_slots(ranks: int, devices: Sequence[str] | None) -> list[Slot]:
    """Return slots of `ranks` GPUs of this machine; one CPU slot if there are none. ValueError: too few devices."""
    if devices is None:
        devices = visible_devices()
    if not devices:
        return [Slot("cpu", env={"LOCAL_SIZE": str(ranks)})]  # DeepSpeed's number of ranks on a CPU
    if len(devices) < ranks:
        raise ValueError(
            f"ranks is {ranks} and devices are {','.join(devices)}; give as many devices, or fewer ranks"
        )
    groups = [devices[at : at + ranks] for at in range(0, len(devices) - ranks + 1, ranks)]
    return [Slot(f"gpu:{','.join(group)}", env={"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def hostfile_slots(ranks: int, hostfile: Path, launcher: str = "deepspeed") -> list[Slot]:
    """Return slots of `ranks` devices each on a hostfile's machines (``name slots=8`` lines).

    Raises:
        ValueError: the file is missing or malformed, or points cannot be started on other machines.
    """
    if launcher != "deepspeed":
        raise ValueError(
            f"launcher is {launcher}, which starts points on this machine only; set launcher: deepspeed, or leave"
            " --hostfile out"
        )
    if shutil.which("pdsh") is None:
        raise ValueError(
            "--hostfile: DeepSpeed starts points on other machines by pdsh, which is not installed; apt install pdsh"
        )
    if not hostfile.is_file():
        raise ValueError(f"--hostfile {hostfile} is not a file; write lines such as `worker-1 slots=8`")
    out = []
    for number, line in enumerate(hostfile.read_text().splitlines(), 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        named = re.fullmatch(r"(\S+)\s+slots=(\d+)", entry)
        if named is None:
            raise ValueError(f"{hostfile}:{number}: {line!r}; write lines such as `worker-1 slots=8`")
        host, count = named[1], int(named[2])
        for first in range(0, count - ranks + 1, ranks):
            devices = ",".join(str(device) for device in range(first, first + ranks))
            # Without --force_multi a single machine counts as this one.
            flags = ("--hostfile", str(hostfile), "--include", f"{host}:{devices}", "--force_multi")
            out.append(Slot(f"{host}:{devices}", flags))
    if not out:
        raise ValueError(f"{hostfile}: no machine has {ranks} slots; lower the sweep's ranks")
    return out
