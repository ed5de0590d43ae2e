"""Milliseconds to read 16 frames at interval 4 from the middle of a video, by decoder; and the loader's throughput.

    python experiments/bench/data.py decode [VIDEO ...]      # default: a 480p video of 300 frames made here
    python experiments/bench/data.py load DATA [--size 256]  # in VideoBooth's format: the files, and encoded once
    python experiments/bench/data.py memory                  # of a loader over 10,000 samples of small videos made here

Decoders that are not installed are left out. PyAV is what `dit_booth.data.video.read_video` uses. CPU milliseconds are
those of all threads of this process. torchcodec needs FFmpeg's shared libraries: those
of PyAV's wheel do, linked by their plain names (libavcodec.so.62, ...) in a folder of LD_LIBRARY_PATH.
"""

from __future__ import annotations

import argparse
import itertools
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_booth.components import build
from dit_booth.config import RunConfig
from dit_booth.data.example import Loader, stack
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.video import decoder, probe, read_video, write_video
from dit_booth.training.encoded import EncodedData, encode_data

FRAMES, STRIDE = 16, 4
Reader = Callable[[Path, int], NDArray[np.uint8]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    decode = kinds.add_parser("decode")
    decode.add_argument("videos", nargs="*", type=Path)
    decode.add_argument("--repeats", type=int, default=9)
    load = kinds.add_parser("load")
    load.add_argument("root")
    load.add_argument("--size", type=int, default=256)
    load.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    load.add_argument("--batches", type=int, default=8)
    load.add_argument("--clip", default="ViT-L-14")
    load.add_argument("--repeats", type=int, default=5)
    memory = kinds.add_parser("memory")
    memory.add_argument("--samples", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kind == "memory":
            watch_memory(Path(folder), arguments.samples)
            return
        if arguments.kind == "load":
            options = vars(arguments)
            options.pop("kind")
            compare_cache(**options, folder=Path(folder))
            return
        for video in arguments.videos or [make_video(Path(folder) / "480p.mp4")]:
            compare_decoders(video, arguments.repeats)


def compare_decoders(video: Path, repeats: int) -> None:
    """Print the median over `repeats` of every decoder, in turns, and its largest difference to `read_video`."""
    info = probe(video)
    start = max(0, (info.frames - FRAMES * STRIDE) // 2)
    readers = available()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    results: dict[str, NDArray[np.uint8]] = {}
    for _ in range(repeats):
        for name, reader in readers.items():
            begin = time.perf_counter(), time.process_time()
            results[name] = reader(video, start)
            seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    medians = {name: 1000 * statistics.median(wall for wall, _ in values) for name, values in seconds.items()}
    cpu = {name: 1000 * statistics.median(used for _, used in values) for name, values in seconds.items()}
    print(
        f"{video.name}: {info.width} x {info.height}, {info.frames} frames, from frame {start}; {decoder()}"
    )
    for name, used in sorted(cpu.items(), key=lambda item: item[1]):
        gap = np.abs(results[name].astype(int) - results["read_video"]).mean()
        print(
            f"  {name:22} {medians[name]:8.1f} ms, {used:6.1f} ms of CPU  {used / min(cpu.values()):5.2f} x"
            f"  mean difference {gap:.2f} of 255"
        )


def available() -> dict[str, Reader]:
    """Return the decoders that are installed here."""
    readers: dict[str, Reader] = {
        "read_video": lambda path, start: read_video(path, start=start, frames=FRAMES, stride=STRIDE),
        "pyav, from frame 0": lambda path, start: read_video(path, frames=start + FRAMES * STRIDE)[
            start::STRIDE
        ],
    }
    try:
        import cv2  # noqa: F401
    except ImportError:
        pass
    else:
        readers["opencv, seeking"] = opencv
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except (ImportError, RuntimeError):  # it needs FFmpeg's shared libraries
        pass
    else:
        readers["torchcodec"] = torchcodec
    return readers


def opencv(path: Path, start: int) -> NDArray[np.uint8]:
    import cv2

    capture, pictures = cv2.VideoCapture(str(path)), []
    capture.set(cv2.CAP_PROP_POS_FRAMES, start)
    for number in range((FRAMES - 1) * STRIDE + 1):
        capture.grab()
        if number % STRIDE == 0:
            pictures.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(pictures).astype(np.uint8)


def torchcodec(path: Path, start: int) -> NDArray[np.uint8]:
    from torchcodec.decoders import VideoDecoder

    places = list(range(start, start + FRAMES * STRIDE, STRIDE))
    frames: NDArray[np.uint8] = (
        VideoDecoder(str(path), dimension_order="NHWC").get_frames_at(places).data.numpy()
    )
    return frames


def make_video(path: Path, frames: int = 300) -> Path:
    """Write a 480p H.264 video: drifting smooth noise, with the encoder's usual keyframes."""
    ground = torch.nn.functional.interpolate(
        torch.rand(1, 3, 40, 80, generator=torch.Generator().manual_seed(0)), size=(600, 1200), mode="bicubic"
    )[0].clamp(0, 1)
    video = torch.stack([ground[:, i % 120 : i % 120 + 480, i : i + 854] for i in range(frames)])
    write_video(path, video * 2 - 1, fps=24)
    return path


def compare_cache(
    root: str, size: int, clip: str, workers: list[int], batches: int, repeats: int, folder: Path
) -> None:
    """Print CPU time of a sample, samples per second and memory of a run's components, from files and encoded data.

    The encoders are random and the autoencoder narrow; what is read has the sizes of the released ones' results, Stable
    Diffusion's and CLIP's.
    """
    config = config_of(root, size, clip, folder)
    components = build(config)
    for line in encode_data(components, folder / "cache"):
        print(line)
    cached = replace(config, data=replace(config.data, cache=str(folder / "cache")))
    files, encoded = components.dataset(), EncodedData(cached)
    del components
    print(f"{FRAMES} frames at {size} x {size}, {clip}'s states")
    cost = {}
    for name, dataset in {"from the files": files, "encoded": encoded}.items():
        used = [cpu_seconds(dataset, i % len(files)) for i in range(repeats * len(files))]
        cost[name] = statistics.median(used)
        print(f"{name}: {1000 * cost[name]:.2f} ms of CPU a sample")
        for count in workers:
            rate, used_each = throughput(dataset, count, batches)
            print(
                f"  {count} workers: {rate:.1f} samples/s, {1000 * used_each:.1f} ms of CPU of all processes each"
            )
    print(f"encoded data are {cost['from the files'] / cost['encoded']:.0f} times faster")
    whole = write_autoencoder(folder / "whole", channels=(128, 256, 512, 512), groups=32, layers=2)
    for name, parts in {"from the files": config, "encoded": cached}.items():
        parts = replace(parts, autoencoder=replace(parts.autoencoder, path=str(whole)))
        print(
            f"components of a run, Stable Diffusion's autoencoder, {clip}, {name}: {memory_of(parts):.0f} MiB"
        )


def memory_of(config: RunConfig) -> float:
    """Return the size of the tensors of a run's components once they are built, which go to its device, in MiB."""
    components = build(config)
    modules = (components.model, components.built_autoencoder, components.built_image_encoder)
    tensors = {
        id(t): t for m in modules if m is not None for t in itertools.chain(m.parameters(), m.buffers())
    }
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20


def write_autoencoder(folder: Path, *, channels: tuple[int, ...], groups: int, layers: int) -> Path:
    """Write a random autoencoder of Stable Diffusion's kind as diffusers does; return its folder."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": channels, "norm_num_groups": groups, "layers_per_block": layers}
    made: Any = AutoencoderKL
    made(**blocks, **sizes, latent_channels=4).save_pretrained(folder)
    return folder


def config_of(root: str, size: int, clip: str, folder: Path) -> RunConfig:
    """Return a run on a set in VideoBooth's format, with random encoders."""
    vae = write_autoencoder(folder / "vae", channels=(8, 8, 8, 8), groups=4, layers=1)
    triplets = {"root": root, "stride": STRIDE}
    data = {"kind": "triplets", "frames": FRAMES, "size": size, "variations": 1, "triplets": triplets}
    return RunConfig.create(
        strategy="none",
        weights="none",
        schedule=["base"],
        clip={"model": clip, "pretrained": "none"},
        autoencoder={"kind": "kl", "path": str(vae), "patch": 1},
        data=data,
        train={"batch_size": 1},
    )


def cpu_seconds(dataset: Any, index: int) -> float:
    """Return the CPU time to read a batch of one sample, as training does (a row alone is mapped, and not read)."""
    begin = time.process_time()
    stack(dataset, [dataset.at(index, 0)])
    return time.process_time() - begin


def throughput(dataset: Any, workers: int, batches: int) -> tuple[float, float]:
    """Return samples per second of a loader of batches of 4, and its CPU seconds a sample, with those of the workers.

    The workers' count once they have ended, so what they read ahead counts, too.
    """
    stream = Loader(dataset, batch_size=4, workers=workers).stream()
    next(stream)
    begin, used = time.perf_counter(), used_of_all()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - begin
    del stream
    read = batches + (1 + 2 * workers if workers else 0)  # and those of the start and ahead
    return 4 * batches / seconds, (used_of_all() - used) / (4 * read)


def used_of_all() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def watch_memory(folder: Path, samples: int) -> None:
    """Print the process's own memory, without mapped files, after each tenth of the samples."""
    for number in range(20):
        video = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_video(folder / f"{number}.mp4", video, fps=8)
        (folder / f"{number}.txt").write_text(f"a box, number {number}\nbox\n")
    data = Triplets(TripletsConfig(root=str(folder), format="folder", frames=8, stride=1, size=32))
    stream = Loader(data, batch_size=4).stream()
    for number in range(samples // 4 + 1):
        next(stream)
        if number % (samples // 40) == 0:
            print(f"{4 * (number + 1):6} samples: {own_memory():7.1f} MiB", flush=True)


def own_memory() -> float:
    """Return the memory of this process that no file backs, in MiB."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**10


if __name__ == "__main__":
    main()
