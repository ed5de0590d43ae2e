"""Formats of data sets on disk. Each lists its examples as `Row`s; all give the same `Example`.

videobooth  root/*.csv with videoid,page_dir,name (the caption) and maybe image_from;
            root/videos/<page_dir>/<videoid>.mp4; of its frame 0, root/masks/<videoid>/mask.json and mask_<value>.png
webvid      the same CSV files and videos; masks where there are some
folder      clip.mp4, clip.txt (the caption; a second line names the subject), and maybe clip.png (the mask of frame 0)
metadata    metadata.jsonl, .csv or .parquet with file_name (or video) and text (or caption, prompt), and maybe subject,
            mask (a path), box: as Hugging Face's folders and the trainers that read them
shards      tar files of WebDataset: <key>.mp4, <key>.txt or <key>.json (caption, subject, box), <key>.png (the mask)
images      picture.jpg (or .png), picture.txt as in folder, and maybe picture.mask.png: examples of one frame

Pictures that are the image prompts, instead of a cut of frame 0, in order:

videobooth, webvid      root/references/<videoid>/*.png (or .jpg), by name
folder, images, shards  clip.1.png (or .jpg), clip.2.png, ... beside the clip, without captions of their own
metadata                a list of paths in the column references (in .csv, as JSON)
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit_booth.data.image_files import Box
from dit_booth.data.listing import LISTS, list_files
from dit_booth.data.media import Member, members_of, open_media
from dit_booth.data.parquet import read_parquet
from dit_booth.data.readers.item import Row, safe
from dit_booth.files import read_table

FormatName = Literal["videobooth", "webvid", "folder", "metadata", "shards", "images"]
COLUMNS = ("videoid", "page_dir", "name")
VIDEOS = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MASK = ".mask.png"
VIDEO_NAMES, CAPTION_NAMES = ("file_name", "video", "video_path"), ("text", "caption", "prompt")
"""Columns of metadata that name the video, and the caption; the first that is there counts."""


@dataclass(frozen=True)
class Format:
    """A format: its name, and the reader of a file that lists examples (or of the folder, `listing.LISTS`)."""

    name: FormatName
    read: Callable[[Path, Path], Iterable[Row]]

    def files(self, root: Path, glob: str) -> list[Path]:
        """Return the files that list examples. ValueError: there are none."""
        files = list_files(root, self.name, glob)
        if not files:
            raise ValueError(
                f"data.triplets.csv is {glob or LISTS[self.name]!r}, and {root} has no such file; "
                "name the files that list the examples"
            )
        return files

    def rows(self, root: Path, glob: str) -> list[Row]:
        """Return all rows, in the order of the files. ValueError: a malformed list, or a path that leaves `root`."""
        return [row for file in self.files(root, glob) for row in self.read(file, root)]


def read_videobooth(file: Path, root: Path) -> Iterable[Row]:
    """Read a CSV file of VideoBooth's data; every example needs its masks."""
    for number, line in read_table(file, COLUMNS, f"must be {','.join(COLUMNS)}"):
        videoid, page_dir, name = (line[column] for column in COLUMNS)
        if not videoid or page_dir is None or not name or None in line:
            raise ValueError(
                f"{file}, line {number}: must have the values {', '.join(COLUMNS)}; "
                "fill them in, and quote a caption that has commas"
            )
        yield Row(
            key=videoid,
            caption=name,
            video=safe(root, Path("videos", page_dir, f"{videoid}.mp4")),
            masks=safe(root, Path("masks", videoid)),
            references=pictures_in(root, Path("references", videoid)),
            image_from=line.get("image_from") or "",
        )


def read_webvid(file: Path, root: Path) -> Iterable[Row]:
    """Read a CSV file of WebVid; examples without masks show their whole first frame, and have no subject."""
    for row in read_videobooth(file, root):
        assert row.masks is not None
        has_masks = (row.masks / "mask.json").is_file()
        yield row if has_masks else replace(row, masks=None, image_from="")


def pictures_in(root: Path, folder: Path) -> tuple[Path, ...]:
    """Return the pictures of a folder below `root`, by name; none if there is no such folder."""
    names = sorted(path.name for path in safe(root, folder).glob("*") if path.suffix.lower() in IMAGES)
    return tuple(safe(root, folder / name) for name in names)


def read_folder(folder: Path, root: Path) -> Iterable[Row]:
    """List the videos below a folder that have a caption beside them."""
    for video in sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS):
        yield beside(video, video.with_suffix(".png"), root, still=False)


def read_images(folder: Path, root: Path) -> Iterable[Row]:
    """List the pictures below a folder that have a caption beside them."""
    pictures = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.endswith(MASK))
    found = sorted(pictures)
    references = {reference for picture in found for reference in numbered(picture)}
    for picture in (p for p in found if p not in references):
        yield beside(picture, picture.with_name(picture.stem + MASK), root, still=True)


def beside(video: Path, mask: Path, root: Path, *, still: bool) -> Row:
    """Make a row of a file and those beside it. `Escapes`: a link leads out of `root`."""
    name = video.relative_to(root)
    text = safe(root, name.with_suffix(".txt"))
    found = safe(root, mask.relative_to(root)) if mask.is_file() else None
    row = Row(
        key=str(name.with_suffix("")),
        caption="",
        video=safe(root, name),
        mask=found,
        references=tuple(safe(root, path.relative_to(root)) for path in numbered(video)),
        still=still,
    )
    if not text.is_file():
        return replace(
            row, fault=f"{video} has no caption; write it into {text.name} beside it, or move the file away"
        )
    try:
        caption, subject = parse_text(text, text.read_bytes())
    except ValueError as error:
        return replace(row, fault=str(error))
    return replace(row, caption=caption, subject=subject)


def numbered(video: Path) -> Iterator[Path]:
    """Iterate over the reference pictures beside a file: ``clip.1.png``, ``clip.2.jpg``, ... up to a missing one.

    One with a caption of its own (``clip.1.txt``) is an example, not a reference.
    """
    for number in itertools.count(1):
        named = (video.with_name(f"{video.stem}.{number}{suffix}") for suffix in IMAGES)
        picture = next((path for path in named if path.is_file()), None)
        if picture is None or picture.with_suffix(".txt").is_file():
            return
        yield picture


def parse_text(name: object, data: bytes) -> tuple[str, str]:
    """Return caption and subject: the first two lines of a text. ValueError: it is empty, or not UTF-8."""
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error}); save it as such") from error
    if not lines or not lines[0]:
        raise ValueError(f"{name}: has no caption in its first line; write one")
    return lines[0], lines[1] if len(lines) > 1 else ""


def read_metadata(file: Path, root: Path) -> Iterable[Row]:
    """Read metadata.jsonl, .csv or .parquet; paths are relative to the file."""
    folder = file.parent.relative_to(root)
    for number, line in enumerate(metadata_rows(file), 1):
        where = f"{file}, row {number}"
        video = str(pick(line, VIDEO_NAMES, where))
        mask = line.get("mask")
        yield Row(
            key=str(folder / Path(video).with_suffix("")),
            caption=str(pick(line, CAPTION_NAMES, where)),
            subject=str(line.get("subject") or ""),
            video=safe(root, folder / video),
            mask=safe(root, folder / str(mask)) if mask else None,
            box=parse_box(line.get("box"), where),
            references=tuple(
                safe(root, folder / name) for name in parse_paths(line.get("references"), where)
            ),
            still=Path(video).suffix.lower() in IMAGES,
        )


def metadata_rows(file: Path) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a table. ValueError: it is no such file."""
    if file.suffix == ".csv":
        return [line for _, line in read_table(file, (), "names the columns")]
    if file.suffix == ".parquet":
        return read_parquet(file)
    try:
        rows = [
            json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()
        ]
    except ValueError as error:
        raise ValueError(
            f"{file}: not JSON lines in UTF-8 ({error}); write one object in each line"
        ) from error
    if wrong := [row for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"{file}: has {wrong[0]!r}; write one object in each line")
    return rows


def pick(line: Mapping[str, Any], names: tuple[str, ...], where: str) -> object:
    """Return the first value that is there. ValueError: none is."""
    value = next((line[name] for name in names if line.get(name)), None)
    if value is None:
        raise ValueError(f"{where}: has none of {', '.join(names)}; add one of them")
    return value


def parse_box(value: object, where: str) -> Box | None:
    """Return a box given as four numbers, or none. ValueError: it is something else."""
    if value is None or value == "":
        return None
    try:
        numbers = json.loads(value) if isinstance(value, str) else value
        x0, y0, x1, y1 = (float(number) for number in numbers)  # type: ignore[union-attr]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: box is {value!r}; write [x0, y0, x1, y1] in pixels") from error
    return x0, y0, x1, y1


def parse_paths(value: object, where: str) -> list[str]:
    """Return a list of paths, maybe written as JSON; empty if there is none. ValueError: it is something else."""
    if value is None or value == "":
        return []
    try:
        names = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        names = value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{where}: references is {value!r}; write a list of paths: ["a.png", "b.png"]')
    return names


def read_shard(archive: Path, root: Path) -> Iterable[Row]:
    """List the samples of a tar file of WebDataset; they are read in place, so any order costs the same."""
    samples: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in members_of(archive):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        samples[f"{folder}/{stem}" if folder else stem][f".{suffix.lower()}"] = member
    for stem, parts in samples.items():
        found = (parts[suffix] for suffix in (*VIDEOS, ".jpg", ".jpeg", ".webp") if suffix in parts)
        video = next(found, None)
        row = Row(
            key=f"{archive.relative_to(root).with_suffix('')}/{stem}",
            caption="",
            video=video or next(iter(parts.values())),
            mask=parts.get(".png") or parts.get(MASK),
            references=tuple(numbered_parts(parts)),
            still=video is not None and f".{video.name.rpartition('.')[2].lower()}" in IMAGES,
        )
        try:
            if video is None:
                raise ValueError(
                    f"{archive}, sample {stem}: has no video or image; it has {', '.join(parts)}"
                )
            caption, subject, box = describe_sample(archive, stem, parts)
            yield replace(row, caption=caption, subject=subject, box=box)
        except ValueError as error:
            yield replace(row, fault=str(error))


def numbered_parts(parts: Mapping[str, Member]) -> Iterator[Member]:
    """Iterate over a sample's reference pictures: those with the suffixes ``.1.png``, ``.2.jpg``, ..."""
    for number in itertools.count(1):
        picture = next((parts[s] for end in IMAGES if (s := f".{number}{end}") in parts), None)
        if picture is None:
            return
        yield picture


def describe_sample(archive: Path, stem: str, parts: Mapping[str, Member]) -> tuple[str, str, Box | None]:
    """Return a sample's caption, subject and box. ValueError: it has no caption."""
    where = f"{archive}, sample {stem}"
    if ".json" in parts:
        try:
            line = json.loads(open_media(parts[".json"]).read())
        except ValueError as error:
            raise ValueError(f"{where}: its .json is not JSON ({error})") from error
        return (
            str(pick(line, CAPTION_NAMES, where)),
            str(line.get("subject") or ""),
            parse_box(line.get("box"), where),
        )
    if ".txt" not in parts:
        raise ValueError(f"{where}: has no .txt and no .json with a caption; it has {', '.join(parts)}")
    return *parse_text(where, open_media(parts[".txt"]).read()), None


READERS: dict[FormatName, Callable[[Path, Path], Iterable[Row]]] = {
    "videobooth": read_videobooth,
    "webvid": read_webvid,
    "folder": read_folder,
    "metadata": read_metadata,
    "shards": read_shard,
    "images": read_images,
}
FORMATS = {name: Format(name, read) for name, read in READERS.items()}
