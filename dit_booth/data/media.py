"""Files of a data set: on disk, or within an uncompressed tar archive, which is read in place."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO


@dataclass(frozen=True)
class Member:
    """A file in a tar archive: the bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"


Media = Path | Member


def open_media(media: Media) -> BinaryIO:
    """Open a file for reading. OSError: it is not there, or its archive is shorter than its index says."""
    if isinstance(media, Path):
        return media.open("rb")
    with media.archive.open("rb") as stream:
        stream.seek(media.offset)
        data = stream.read(media.size)
    if len(data) < media.size:
        raise OSError(f"{media}: the archive is truncated")
    return io.BytesIO(data)


def is_file(media: Media) -> bool:
    """Return True if a file is there."""
    return (media if isinstance(media, Path) else media.archive).is_file()


def size_of(media: Media) -> int:
    """Return a file's size in bytes."""
    return media.stat().st_size if isinstance(media, Path) else media.size


def members_of(archive: Path) -> Iterator[Member]:
    """Iterate over the files in a tar archive, without reading their contents.

    Raises:
        ValueError: it is no uncompressed tar archive, it is truncated, or it has a link or a path that leads out of
        it: an archive that could write elsewhere when it is unpacked is not trusted.
    """
    size = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as tar:
            for item in tar:
                path = PurePosixPath(item.name)
                if path.is_absolute() or ".." in path.parts or item.issym() or item.islnk():
                    raise ValueError(
                        f"{archive} has the member {item.name!r}, a link or a path that leads out of it; "
                        "pack the files anew, by relative names and without links"
                    )
                if item.offset_data + item.size > size:
                    raise ValueError(f"{archive}: truncated in {item.name!r}; copy it anew")
                if item.isfile():
                    yield Member(archive, str(path), item.offset_data, item.size)
    except tarfile.TarError as error:
        raise ValueError(
            f"{archive}: not an uncompressed tar archive ({error}); write .tar shards"
        ) from error
