"""Milliseconds to read 16 frames at interval 4 from the middle of a video, by decoder; and the loader's throughput.

    python experiments/bench/data.py decode [VIDEO ...]     # default: a 480p video of 300 frames made here
    python experiments/bench/data.py load DATA [--size 256] # a folder in VideoBooth's format

Decoders that are not installed are left out. PyAV is what `dit_booth.data.video.read_video` uses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_booth.data.video import decoder, probe, read_video, write_video

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
    arguments = parser.parse_args()
    if arguments.kind == "load":
        compare_workers(arguments.root, arguments.size, arguments.workers, arguments.batches)
        return
    with tempfile.TemporaryDirectory() as folder:
        for video in arguments.videos or [make_video(Path(folder) / "480p.mp4")]:
            compare_decoders(video, arguments.repeats)


def compare_decoders(video: Path, repeats: int) -> None:
    """Print the median over `repeats` of every decoder, in turns, and its largest difference to `read_video`."""
    info = probe(video)
    start = max(0, (info.frames - FRAMES * STRIDE) // 2)
    readers = available()
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    results: dict[str, NDArray[np.uint8]] = {}
    for _ in range(repeats):
        for name, reader in readers.items():
            begin = time.perf_counter()
            results[name] = reader(video, start)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    print(
        f"{video.name}: {info.width} x {info.height}, {info.frames} frames, from frame {start}; {decoder()}"
    )
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        gap = np.abs(results[name].astype(int) - results["read_video"]).mean()
        ratio = median / min(medians.values())
        print(f"  {name:22} {median:8.1f} ms  {ratio:5.2f} x  mean difference {gap:.2f} of 255")


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


def compare_workers(root: str, size: int, workers: list[int], batches: int) -> None:
    """Print samples per second of a folder in VideoBooth's format, and the memory after each pass."""
    from dit_booth.data.example import Loader
    from dit_booth.data.readers.triplets import Triplets, TripletsConfig

    data = Triplets(TripletsConfig(root=root, frames=FRAMES, stride=STRIDE, size=size, max_broken=10**6))
    for count in workers:
        stream = Loader(data, batch_size=4, workers=count).stream()
        next(stream)
        begin = time.perf_counter()
        for _ in range(batches):
            next(stream)
        seconds = (time.perf_counter() - begin) / batches / 4
        print(f"{count} workers: {1 / seconds:.1f} samples/s, {1000 * seconds:.0f} ms each, {size} x {size}")


if __name__ == "__main__":
    main()
