"""The systems that a human study compares: their videos of the same prompts, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dit_booth.data.video import VideoInfo, probe
from dit_booth.evaluation.folder import VideoRow, find_list, read_rows

_SAME_SHAPE = 1.02  # ratio of two videos' width / height, at most


@dataclass(frozen=True, kw_only=True)
class System:
    """A run, or a folder of videos of any tool: one video of each prompt, by the prompt's name."""

    name: str
    folder: Path
    videos: Mapping[str, VideoRow]

    def file(self, prompt: str) -> Path:
        return self.folder / self.videos[prompt].video

    def truth(self, prompt: str) -> Path | None:
        """Return the prompt's real video, if there is one."""
        truth = self.videos[prompt].truth
        return self.folder / truth if truth and (self.folder / truth).is_file() else None


def read_systems(runs: Sequence[str], prompts: int = 0, seed: int = 0) -> list[System]:
    """Read runs (``FOLDER`` or ``NAME=FOLDER``): their own videos of the first noise seed.

    prompts: number of prompts to draw by `seed`; 0: all.

    Raises:
        ValueError: fewer than two runs, two of one name, a missing or broken video, or runs that differ in their
        prompts, captions, lengths or shapes.
    """
    if len(runs) < 2:
        raise ValueError(
            f"runs has {len(runs)} of the at least 2 that a comparison needs; name more run folders"
        )
    systems = [_read(run) for run in runs]
    counts = Counter(system.name for system in systems)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"two runs are called {twice[0]!r}; name them: A=FOLDER B=FOLDER")
    first, *others = systems
    for other in others:
        _check_same_prompts(first, other)
    chosen = draw_prompts(list(first.videos), prompts, seed)
    systems = [
        System(name=s.name, folder=s.folder, videos={prompt: s.videos[prompt] for prompt in chosen})
        for s in systems
    ]
    _check_videos(systems)
    return systems


def draw_prompts(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw `count` prompts (0: all), in their order. ValueError: there are not as many."""
    if count < 0 or count > len(names):
        raise ValueError(f"prompts is {count}, and the runs have {len(names)}; use 0 (all) to {len(names)}")
    if not count:
        return list(names)
    drawn = np.random.default_rng(seed).choice(len(names), size=count, replace=False)
    return [names[index] for index in sorted(drawn)]


def _read(run: str) -> System:
    """Read one run; a path with ``=`` in it that exists is a path."""
    name, _, path = run.partition("=") if "=" in run and not Path(run).exists() else ("", "", run)
    file = find_list(Path(path))
    place = file.parent.resolve()
    own = [row for row in read_rows(file) if not row.control]
    if not own:
        raise ValueError(f"{file}: has no videos but controls; name a run that has sampled videos of its own")
    seed = own[0].noise_seed
    videos = {row.prompt: row for row in own if row.noise_seed == seed}
    label = place.parent.name if place.name == "samples" else place.name
    return System(name=name or label, folder=file.parent, videos=videos)


def _check_same_prompts(first: System, other: System) -> None:
    ours, theirs = set(first.videos), set(other.videos)
    if ours != theirs:
        only = sorted(ours ^ theirs)
        raise ValueError(
            f"{first.name} and {other.name} have other prompts: {len(only)} are in one only, such as {only[0]!r};"
            " sample both for the same prompts"
        )
    for prompt, row in first.videos.items():
        caption = other.videos[prompt].caption
        if caption != row.caption:
            raise ValueError(
                f"prompt {prompt!r} reads {row.caption!r} in {first.name} and {caption!r} in {other.name};"
                " give both the same caption"
            )


def _check_videos(systems: Sequence[System]) -> None:
    """Raise ValueError for a broken video, and for other lengths or shapes for one prompt: raters would see them."""
    for prompt in systems[0].videos:
        infos: dict[str, VideoInfo] = {system.name: probe(system.file(prompt)) for system in systems}
        lengths = {name: f"{info.frames} at {round(info.fps, 3):g} fps" for name, info in infos.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"videos of prompt {prompt!r} differ in length ({_listed(lengths)}); cut them to the same"
            )
        ratios = [info.width / info.height for info in infos.values()]
        if max(ratios) > _SAME_SHAPE * min(ratios):
            shapes = {name: f"{info.width} x {info.height}" for name, info in infos.items()}
            raise ValueError(
                f"videos of prompt {prompt!r} differ in shape ({_listed(shapes)}); crop them to the same"
            )


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
