"""Formats of data on disk: all give the same example, and what is malformed or hostile is named."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_booth.config import DataConfig
from dit_booth.config.data import ImagesOptions, TripletsOptions
from dit_booth.data.example import Example, Loader
from dit_booth.data.listing import _files_of, files_named, list_files
from dit_booth.data.readers.formats import read_images
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.video import write_video

torch.set_num_threads(1)
CAPTION, SUBJECT = "a red car, on a road", "car"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mp4 of 7 frames, mask.png of its first, picture.jpg."""
    root = tmp_path_factory.mktemp("source")
    video = torch.rand(7, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(root / "clip.mp4", video, fps=8)
    mask = np.zeros((24, 32), np.uint8)
    mask[6:18, 8:22] = 255
    Image.fromarray(mask).save(root / "mask.png")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    return root


def make_videobooth(source: Path, root: Path, *, masks: bool = True) -> None:
    (root / "videos" / "web").mkdir(parents=True)
    shutil.copy(source / "clip.mp4", root / "videos" / "web" / "a.mp4")
    with (root / "all.csv").open("w", newline="", encoding="utf-8-sig") as stream:  # with a byte-order mark
        rows = [("videoid", "contentUrl", "page_dir", "name"), ("a", "https://x", "web", CAPTION)]
        csv.writer(stream).writerows(rows)
    if masks:
        (root / "masks" / "a").mkdir(parents=True)
        shutil.copy(source / "mask.png", root / "masks" / "a" / "mask_1.png")
        entry = {"value": 1, "label": SUBJECT, "logit": 0.9, "box": [8, 6, 22, 18]}
        (root / "masks" / "a" / "mask.json").write_text(json.dumps([entry]))


def make_folder(source: Path, root: Path) -> None:
    (root / "deep").mkdir(parents=True)
    shutil.copy(source / "clip.mp4", root / "deep" / "a.mp4")
    shutil.copy(source / "mask.png", root / "deep" / "a.png")
    (root / "deep" / "a.txt").write_text(f"{CAPTION}\n{SUBJECT}\n")


def metadata_of(name: str) -> dict[str, object]:
    return {"file_name": name, "text": CAPTION, "subject": SUBJECT, "mask": "m.png", "box": [8, 6, 22, 18]}


def make_jsonl(source: Path, root: Path) -> None:
    root.mkdir(parents=True)
    shutil.copy(source / "clip.mp4", root / "a.mp4")
    shutil.copy(source / "mask.png", root / "m.png")
    (root / "metadata.jsonl").write_text(json.dumps(metadata_of("a.mp4")) + "\n")


def make_parquet(source: Path, root: Path) -> None:
    import duckdb

    make_jsonl(source, root)
    duckdb.read_json(str(root / "metadata.jsonl")).write_parquet(str(root / "metadata.parquet"))
    (root / "metadata.jsonl").unlink()


def make_shards(source: Path, root: Path, samples: int = 1, shards: int = 1) -> None:
    root.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(root / f"{shard:04}.tar", "w") as tar:
            for number in range(samples):
                about = json.dumps({"caption": CAPTION, "subject": SUBJECT}).encode()
                for name, file in (("mp4", "clip.mp4"), ("png", "mask.png")):
                    tar.add(source / file, f"s{number}.{name}")
                info = tarfile.TarInfo(f"s{number}.json")
                info.size = len(about)
                tar.addfile(info, io.BytesIO(about))


MAKERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "videobooth": ("videobooth", make_videobooth),
    "webvid": ("webvid", make_videobooth),
    "folder": ("folder", make_folder),
    "jsonl": ("metadata", make_jsonl),
    "parquet": ("metadata", make_parquet),
    "shards": ("shards", make_shards),
}


def open_set(root: Path, format: str, **changes: object) -> Triplets:
    options = {"frames": 3, "stride": 2, "size": 16, **changes}
    return Triplets(TripletsConfig(root=str(root), format=format, **options))


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Example:
    root = tmp_path_factory.mktemp("expected") / "set"
    make_videobooth(source, root)
    return open_set(root, "videobooth")[0]


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_gives_the_same_example(
    source: Path, tmp_path: Path, expected: Example, name: str
) -> None:
    format, make = MAKERS[name]
    make(source, tmp_path / "set")
    data = open_set(tmp_path / "set", format)
    assert len(data) == 1 and not data.broken
    made = data[0]
    assert (made.caption, made.subject, made.mask_frames) == (CAPTION, SUBJECT, 1)
    for field in ("video", "image", "mask"):
        assert torch.equal(getattr(made, field), getattr(expected, field)), field
    varied = data.at(0, 3).image
    assert not torch.equal(varied, made.image) and torch.equal(varied, data.at(0, 3).image)


def add_references(root: Path, name: str) -> None:
    """Two pictures: a red one, and a blue square that is cut out by its transparency."""
    folder = {"videobooth": root / "references" / "a", "folder": root / "deep"}.get(name, root)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{'' if name == 'videobooth' else 'a.'}{number}.png" for number in (1, 2)]
    Image.new("RGB", (20, 20), (200, 0, 0)).save(files[0])
    cut = Image.new("RGBA", (20, 20), (0, 200, 0, 0))
    cut.paste((0, 0, 200, 255), (5, 5, 15, 15))
    cut.save(files[1])
    if name == "shards":
        with tarfile.open(root / "0000.tar", "a") as tar:
            for number, file in enumerate(files, 1):
                tar.add(file, f"s0.{number}.png")
                file.unlink()
    if name == "metadata":
        line = json.loads((root / "metadata.jsonl").read_text())
        (root / "metadata.jsonl").write_text(json.dumps({**line, "references": ["a.1.png", "a.2.png"]}))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("videobooth", make_videobooth),
        ("folder", make_folder),
        ("metadata", make_jsonl),
        ("shards", make_shards),
    ],
)
def test_every_format_has_reference_pictures(
    source: Path, tmp_path: Path, expected: Example, name: str, make: Callable[[Path, Path], None]
) -> None:
    root = tmp_path / "set"
    make(source, root)
    before = files_named(root, name, list_files(root, name)[0])
    add_references(root, name)
    _files_of.cache_clear()
    if name != "shards":  # a shard counts by its size, which is a multiple of a tar record's
        assert files_named(root, name, list_files(root, name)[0]) != before, "they count in the address"
    made = open_set(root, name, image_prompts=3)[0]
    assert torch.equal(made.video, expected.video) and torch.equal(made.mask, expected.mask)
    red, blue, absent = made.images
    assert (red.mean(dim=(1, 2)) - torch.tensor([0.57, -1, -1])).abs().max() < 0.05
    assert (blue.mean(dim=(1, 2)) - torch.tensor([-1, -1, 0.57])).abs().max() < 0.05, "the opaque part alone"
    assert not absent.any() and len(made.further) == 2
    assert torch.equal(open_set(root, name)[0].image, made.image), "one image prompt: the first picture"
    data = open_set(root, name, image_prompts=3)
    varied = data.at(0, 1).images
    assert torch.equal(torch.stack(data.images_at(0, 1)), varied) and not torch.equal(varied, made.images)


def test_pictures_with_numbers_are_references_unless_they_have_a_caption(
    source: Path, tmp_path: Path
) -> None:
    for name in ("a", "a.1", "a.2", "b", "b.1"):
        shutil.copy(source / "picture.png", tmp_path / f"{name}.png")
    for name in ("a", "b", "b.1"):
        (tmp_path / f"{name}.txt").write_text(CAPTION)
    rows = list(read_images(tmp_path, tmp_path))
    assert [(row.key, len(row.references)) for row in rows] == [("a", 2), ("b.1", 0), ("b", 0)]
    shutil.copy(source / "picture.png", tmp_path / "c.1.png")
    (broken,) = [row.fault for row in read_images(tmp_path, tmp_path) if row.fault]
    assert "c.1.png has no caption" in broken


def test_bad_reference_pictures(source: Path, tmp_path: Path) -> None:
    make_folder(source, tmp_path)
    Image.new("RGBA", (8, 8)).save(tmp_path / "deep" / "a.1.png")
    with pytest.raises(ValueError, match=r"a\.1\.png: no pixel is half opaque"):
        open_set(tmp_path, "folder")
    Image.new("L", (8, 8)).save(tmp_path / "deep" / "a.1.png")
    with pytest.raises(ValueError, match=r"a\.1\.png: the image's mode is L, and it must be RGB"):
        open_set(tmp_path, "folder")
    (tmp_path / "deep" / "a.1.png").unlink()
    (tmp_path / "deep" / "a.1.png").symlink_to(source / "picture.png")
    with pytest.raises(ValueError, match="leads out of"):
        open_set(tmp_path, "folder")


def test_a_video_without_a_mask_shows_its_whole_first_frame(source: Path, tmp_path: Path) -> None:
    make_videobooth(source, tmp_path / "set", masks=False)
    made = open_set(tmp_path / "set", "webvid")[0]
    assert made.subject == "" and not made.mask.any()
    assert (made.image[:, 2:-2] < 0.99).float().mean() > 0.9 and (made.image[:, 0] > 0.9).all()
    with pytest.raises(ValueError, match=r"mask\.json: no such file"):
        open_set(tmp_path / "set", "videobooth")


def test_pictures_are_videos_of_one_frame(source: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copy(source / "picture.png", tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{CAPTION}\n{SUBJECT}")
    shutil.copy(source / "mask.png", tmp_path / "a.mask.png")
    data = DataConfig(kind="images", size=16, images=ImagesOptions(root=str(tmp_path))).build()
    first, second = data[0], data[1]
    assert len(data) == 2 and first.video.shape == second.video.shape == (1, 3, 16, 16)
    assert 0.2 < first.mask[0].float().mean() < 0.5 and not second.mask.any()
    assert not torch.equal(first.image, second.image)
    with pytest.raises(ValueError, match=r"data\.images\.root is empty"):
        DataConfig(kind="images")


def test_shards_are_split_over_ranks_and_resume(source: Path, tmp_path: Path) -> None:
    make_shards(source, tmp_path / "set", samples=3, shards=2)
    data = open_set(tmp_path / "set", "shards", frames=1, size=8)
    assert len(data) == 6
    whole = Loader(data, batch_size=4, seed=1)
    ranks = [Loader(data, batch_size=2, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert whole.batch(1).keys == [key for rank in ranks for key in rank.batch(1).keys]
    stream = whole.stream(1)
    assert next(stream).keys == whole.batch(1).keys
    assert (
        len({key for number in range(3) for key in Loader(data, batch_size=2, seed=1).batch(number).keys})
        == 6
    )


def test_a_shard_that_webdataset_wrote(source: Path, tmp_path: Path, expected: Example) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        parts = {"mp4": (source / "clip.mp4").read_bytes(), "png": (source / "mask.png").read_bytes()}
        sink.write({"__key__": "x/s0", **parts, "json": {"caption": CAPTION, "subject": SUBJECT}})
    assert torch.equal(open_set(tmp_path, "shards")[0].video, expected.video)


@pytest.mark.parametrize("fault", ["traversal", "absolute", "link", "truncated", "compressed", "no caption"])
def test_hostile_and_broken_shards(source: Path, tmp_path: Path, fault: str) -> None:
    words = {
        "traversal": "leads out of it",
        "absolute": "leads out of it",
        "link": "leads out of it",
        "truncated": "truncated",
        "compressed": "not an uncompressed tar",
        "no caption": "no .txt and no .json",
    }
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz" if fault == "compressed" else "w") as tar:
        name = {"traversal": "../s.mp4", "absolute": "/s.mp4"}.get(fault, "s.mp4")
        info = tarfile.TarInfo(name)
        if fault == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        else:
            data = (source / "clip.mp4").read_bytes()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=words[fault]):
        open_set(tmp_path, "shards")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "a car"}, "none of file_name, video, video_path"),
        ({"file_name": "a.mp4"}, "none of text, caption, prompt"),
        ({**metadata_of("../a.mp4")}, "leads out of"),
        ({**metadata_of("a.mp4"), "mask": "/etc/passwd"}, "leads out of"),
        ({**metadata_of("a.mp4"), "box": [1, 2]}, "box is"),
        ({**metadata_of("a.mp4"), "references": "b.png"}, "references is 'b.png'; write a list of paths"),
        ({**metadata_of("a.mp4"), "references": ["../b.png"]}, "leads out of"),
        ({**metadata_of("a.mp4"), "subject": "bird"}, "does not contain the subject 'bird'"),
        ("no object", "one object in each line"),
    ],
)
def test_malformed_metadata(source: Path, tmp_path: Path, line: object, words: str) -> None:
    make_jsonl(source, tmp_path / "set")
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=words):
        open_set(tmp_path / "set", "metadata")


def test_a_folder_whose_caption_is_missing_or_not_utf8(source: Path, tmp_path: Path) -> None:
    make_folder(source, tmp_path)
    (tmp_path / "deep" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        open_set(tmp_path, "folder")
    shutil.copy(tmp_path / "deep" / "a.mp4", tmp_path / "b.mp4")
    shutil.copy(tmp_path / "deep" / "a.mp4", tmp_path / "c.mp4")
    (tmp_path / "b.txt").write_text(CAPTION)
    with pytest.raises(ValueError, match=r"c\.mp4 has no caption; write it into c\.txt"):
        open_set(tmp_path, "folder", max_broken=1)
    data = open_set(tmp_path, "folder", max_broken=2)
    assert [item.row.key for item in data.items] == ["b"] and set(data.broken) == {"c", "deep/a"}


def test_a_table_that_is_no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"metadata\.parquet: not a readable Parquet file"):
        open_set(tmp_path, "metadata")


def test_the_configuration_chooses_the_format(source: Path, tmp_path: Path) -> None:
    make_folder(source, tmp_path)
    options = TripletsOptions(root=str(tmp_path), format="folder", stride=2)
    assert DataConfig(kind="triplets", frames=3, size=16, triplets=options).build()[0].caption == CAPTION
