"""The page that raters see: one HTML file with the videos in it, or beside it, and no word of whose they are."""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from markupsafe import Markup

from dit_booth.data.video import probe
from dit_booth.files import replacing, write_text
from dit_booth.human.design import Cell, Slot, draw_cells, draw_lists
from dit_booth.human.key import ANSWERS, KEY, PAGE, TEXTS, Clip, Key, KeyPrompt, KeySystem, Trial, write_key
from dit_booth.human.planted import write_broken
from dit_booth.human.settings import Settings
from dit_booth.human.systems import System
from dit_booth.human.texts import ASSETS, Texts
from dit_booth.report.samples import picture_cell
from dit_booth.report.template import render

_SECONDS = 8.0  # that a question takes, for the estimate in the consent


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A clip and the file that it is."""

    clip: Clip
    file: Path


def make_study(systems: Sequence[System], texts: Texts, text: str, settings: Settings, out: Path) -> Key:
    """Write the page, its key and its texts into the folder `out`.

    Raises:
        ValueError: a setting does not fit the runs, the folder has answers already, or the page is too large.
    """
    if (out / ANSWERS).is_file():
        raise ValueError(f"{out} has answers of a study already; choose another folder for a new study")
    rng = np.random.default_rng(settings.seed)
    prompts = list(systems[0].videos)
    cells = draw_cells(settings.design, len(systems), len(prompts), block=settings.block, rng=rng)
    numbers = {"raters": settings.raters, "planted": settings.planted, "repeats": settings.repeats}
    lists = draw_lists(cells, pairs=settings.pairs, rng=rng, **numbers)
    with tempfile.TemporaryDirectory() as folder:
        sources = _sources(systems, cells, settings, Path(folder))
        # A clip's number says nothing of its system.
        sources = [sources[index] for index in rng.permutation(len(sources))]
        where = {(s.clip.system, s.clip.prompt, s.clip.intact): number for number, s in enumerate(sources)}
        planted = _planted_prompts(len(prompts), settings)
        key = Key(
            title=texts.title,
            seed=settings.seed,
            design=settings.design,
            systems=tuple(
                KeySystem(
                    name=s.name,
                    folder=os.path.relpath(s.folder.resolve(), out.resolve()),
                    noise_seed=next(iter(s.videos.values())).noise_seed,
                )
                for s in systems
            ),
            prompts=tuple(
                KeyPrompt(name=name, caption=row.caption, subject=row.subject)
                for name, row in systems[0].videos.items()
            ),
            questions=tuple(texts.questions),
            clips=tuple(source.clip for source in sources),
            lists=tuple(tuple(_trial(slot, cells, where, planted) for slot in own) for own in lists),
        ).signed()
        example = (
            (planted[-1], where[None, planted[-1], True], where[None, planted[-1], False])
            if planted
            else None
        )
        _write(key, systems[0], [source.file for source in sources], example, texts, settings, out)
    write_text(out / TEXTS, text)
    write_key(out / KEY, key)
    return key


def _planted_prompts(prompts: int, settings: Settings) -> list[int]:
    """Return the prompts of the planted pairs, and of the example, which is the last. ValueError: too few prompts."""
    if not settings.planted:
        return []
    if settings.planted + 1 > prompts:
        raise ValueError(
            f"planted is {settings.planted}, and with the example that needs {settings.planted + 1} prompts, of which"
            f" the runs have {prompts}; lower planted (0: no attention checks)"
        )
    return list(range(settings.planted + 1))


def _sources(
    systems: Sequence[System], cells: Sequence[Cell], settings: Settings, folder: Path
) -> list[_Source]:
    """Return all clips of the page: those of the cells, and an intact and a broken one for each planted pair."""
    prompts = list(systems[0].videos)
    wanted = sorted({(system, cell.prompt) for cell in cells for system in (cell.first, cell.second)})
    found = [
        _source(systems[system].file(prompts[prompt]), Clip(system=system, prompt=prompt))
        for system, prompt in wanted
    ]
    for prompt in _planted_prompts(len(prompts), settings):
        intact = systems[0].truth(prompts[prompt]) or systems[0].file(prompts[prompt])
        other = prompts[(prompt + 1) % len(prompts)]
        broken = folder / f"{prompt}.mp4"
        source = systems[0].truth(other) or systems[0].file(other)
        write_broken(source, broken, like=intact, seed=prompt)
        found += [_source(intact, Clip(prompt=prompt)), _source(broken, Clip(prompt=prompt, intact=False))]
    return found


def _source(file: Path, clip: Clip) -> _Source:
    digest = sha256(file.read_bytes()).hexdigest()[:16]
    return _Source(clip=Clip(**{**vars(clip), "digest": digest}), file=file)


def _trial(
    slot: Slot, cells: Sequence[Cell], where: dict[tuple[int | None, int, bool], int], planted: Sequence[int]
) -> Trial:
    if slot.kind == "planted":
        prompt = planted[slot.index]
        pair = where[None, prompt, True], where[None, prompt, False]
    else:
        cell = cells[slot.index]
        prompt, pair = (
            cell.prompt,
            (where[cell.first, cell.prompt, True], where[cell.second, cell.prompt, True]),
        )
    left, right = reversed(pair) if slot.swapped else pair
    return Trial(kind=slot.kind, prompt=prompt, left=left, right=right)


def _write(
    key: Key,
    system: System,
    files: Sequence[Path],
    example: tuple[int, int, int] | None,
    texts: Texts,
    settings: Settings,
    out: Path,
) -> None:
    """Write the page, and its videos beside it if asked for. ValueError: the page is larger than it may be."""
    size = sum(file.stat().st_size for file in files) * (0 if settings.beside else 4 / 3)
    if size > settings.max_mb * 1e6:
        raise ValueError(
            f"the page would have {size / 1e6:.0f} MB, more than max_mb={settings.max_mb:g}; put the videos beside it"
            " (--beside), or take fewer prompts (--prompts)"
        )
    trials = max(map(len, key.lists)) * len(key.questions)
    minutes = max(1, round(trials * _SECONDS / 60 + settings.min_seconds * len(key.lists[0]) / 60))
    text = {
        name: [part.replace("{minutes}", str(minutes)) for part in texts.paragraphs(getattr(texts, name))]
        for name in ("consent", "instructions")
    }
    embedded = {f"m{n}": base64.b64encode(file.read_bytes()).decode() for n, file in enumerate(files)}
    html = render(
        (ASSETS / "study.html").read_text(),
        title=texts.title,
        filters=None,
        **text,
        example=example is not None,
        policy=_policy(settings.post),
        study=_script_json(_shown(key, system, texts, settings, example)),
        media={} if settings.beside else embedded,
        css=Markup((ASSETS / "study.css").read_text()),
        js=Markup((ASSETS / "study.js").read_text()),
    )
    if settings.beside:
        for number, file in enumerate(files):
            with replacing(out / "media" / f"{number}.mp4") as partial:
                shutil.copyfile(file, partial)
    write_text(out / PAGE, html)


def _shown(
    key: Key, system: System, texts: Texts, settings: Settings, example: tuple[int, int, int] | None
) -> dict[str, object]:
    """Return what the page's script knows: clips are numbers, and no trial says what it is for."""
    return {
        "id": key.study,
        "questions": [{"name": name, "text": text} for name, text in texts.questions.items()],
        "min_seconds": settings.min_seconds,
        "post": settings.post,
        "beside": settings.beside,
        "prompts": list(_shown_prompts(system)),
        "lists": [[[trial.prompt, trial.left, trial.right] for trial in own] for own in key.lists],
        "example": example
        and {
            "pair": example,
            "right": "left",
            "text": "Video A was made for this picture and this text; B shows something else, coarse and jumping.",
        },
    }


def _shown_prompts(system: System) -> Iterator[dict[str, object]]:
    for name, row in system.videos.items():
        image, info = picture_cell([system.folder / row.image]), probe(system.file(name))
        if image.missing:
            raise ValueError(
                f"the image of prompt {name!r}: {image.missing}; {system.folder / row.image} is needed"
            )
        yield {
            "image": image.uri,
            "tiny_image": image.tiny,
            "caption": row.caption,
            "subject": row.subject,
            "frames": info.frames,
            "fps": info.fps,
            "width": info.width,
            "height": info.height,
        }


def _script_json(value: object) -> Markup:
    """Return JSON that no text in it can end: a caption may hold ``</script>``."""
    return Markup(json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _policy(post: str) -> str:
    """Return the page's content security policy: nothing from elsewhere, and answers to one address at most."""
    parts = urlsplit(post)
    target = f" {parts.scheme}://{parts.netloc}" if post else ""
    return (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
        f" media-src blob: 'self' file:; connect-src 'self'{target}; form-action 'none'; base-uri 'none'"
    )
