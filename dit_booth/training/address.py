"""A stage's address: the hash of everything that determines its result. Equal addresses are one training.

What enters: the stage's own settings and those of the stages before it (through their addresses), the seed, backbone,
start weights, encoders, objective, training data, DeepSpeed's settings, and the active strategies with their options;
for strategies of plug-in files, the content of those files.
What does not: how a finished network is sampled and measured, where files lie, strategies that are not active, the
number of ranks (rows are drawn alike on any), and the package's own code: `SCHEMA` stands for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dit_booth.config import PlainDict, RunConfig, StageName, decisive
from dit_booth.config.parse import is_plugin
from dit_booth.config.pipeline_folder import is_pipeline
from dit_booth.data.listing import files_named
from dit_booth.data.readers.formats import FORMATS
from dit_booth.models.wan.image_encoder import ENCODER
from dit_booth.models.weights import ASSETS
from dit_booth.strategy import find
from dit_booth.training.stage import active_strategies, declared_globs, schedule_of, stage_config

SCHEMA = 4
"""Raise it with a change of the code after which a stage of equal settings results in something else."""

ENCODING_SCHEMA = 2
"""Raise it with a change of the files that hold encoded data."""
ELSEWHERE = (
    "strategy",
    "schedule",
    "stages",
    "dit",
    "unet",
    "wan",
    "ds_config",
    "strategy_weights",
    "plugin",
    "subject",
    "known",
)
"""Settings that enter otherwise: by stage, by backbone, by content."""
WITHOUT_EFFECT = ("sample", "sampler", "guidance", "start", "clips")
"""Settings that change no stage's weights."""
BY_CONTENT = {
    "clip": ("pretrained",),
    "text": ("path",),
    "autoencoder": ("path",),
}
"""Fields of other sections that enter as the content of the file that they name."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run's schedule, with its address (twelve hex digits)."""

    index: int
    name: StageName
    steps: int
    active: tuple[str, ...]
    address: str

    def folder(self, config: RunConfig) -> Path:
        """Return the folder it is trained in: under its address in the store, or among the run's checkpoints."""
        if config.store:
            return Path(config.store) / f"{self.name}-{self.address}"
        return Path(config.folder()) / "checkpoints" / f"{self.index}_{self.name}"


def stages_of(config: RunConfig) -> list[Stage]:
    """Return the stages of a run, in order. ValueError: an impossible stage, or missing start weights."""
    schedule, common, out = schedule_of(config), _common(config), list[Stage]()
    settings_of = decisive(config.as_dict())["stages"]
    for index, name in enumerate(schedule):
        active = active_strategies(config, schedule, index)
        own = {
            "parent": out[-1].address if out else None,
            "stage": name,
            "settings": {**settings_of[name], "strategies": active},
            "globs": _globs(config, name, active),
            "strategies": _strategies(config, active),
            **_plugins(config, active),
            **_known_frames(config, active),
            **_image_encoder(config, active),
            **(_subject(config) if name == "subject" else {}),
        }
        out.append(Stage(index, name, stage_config(config, name).steps, active, digest({**common, **own})))
    return out


def encoding_address(config: RunConfig) -> str:
    """Return the hash of all that the encoded training data depend on: files, decoder, settings, and encoders."""
    settings = decisive(config.as_dict())
    data = settings["data"]
    for name in ("dev_csv", "test_csv"):
        data.get("triplets", {}).pop(name, None)
    encoders = {
        section: {k: v for k, v in settings[section].items() if k not in (*names, "chunk")}
        for section, names in BY_CONTENT.items()
        if section in settings
    }
    contents = [_local_or_hub(config.clip.pretrained), *_text(config), _autoencoder(config)]
    files = _data_files(config)
    return digest({"schema": ENCODING_SCHEMA, "data": data, "files": files, "contents": contents, **encoders})


def digest(value: object, length: int = 12) -> str:
    """Return the first hex digits of a hash of plain containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _common(config: RunConfig) -> PlainDict:
    """Return the settings that every stage of a run depends on."""
    settings = decisive(config.as_dict())
    rest = {k: v for k, v in settings.items() if k not in (*ELSEWHERE, *WITHOUT_EFFECT)}
    rest = {k: v for k, v in rest.items() if k not in find(config.strategy)}  # the strategies' own sections
    for name in ("dev_csv", "test_csv"):  # sampled from, not trained on
        rest["data"].get("triplets", {}).pop(name, None)
    for section, names in BY_CONTENT.items():
        for name in names:
            rest.get(section, {}).pop(name, None)
    token = {"token": config.subject.token} if config.subject.token else {}
    return {
        "schema": SCHEMA,
        **token,
        **rest,
        config.backbone: {k: v for k, v in settings.get(config.backbone, {}).items() if k != "image_encoder"},
        "weights": _weights(config),
        "strategy_weights": [_local("strategy_weights", source) for source in config.strategy_weights],
        "clip_weights": _local_or_hub(config.clip.pretrained),
        **{f"text_weights_{i}": content for i, content in enumerate(_text(config))},
        "autoencoder_weights": _autoencoder(config),
        "data_files": _data_files(config),
        "engine": config.engine_settings(),
    }


def _strategies(config: RunConfig, active: tuple[str, ...]) -> PlainDict:
    """Return the active strategies, with their places in the sum and their options."""
    settings, options = decisive(config.as_dict()), config.options()
    return {
        name: {"place": place, "options": settings[name] if name in options else {}}
        for place, name in enumerate(active)
    }


def _plugins(config: RunConfig, active: tuple[str, ...]) -> dict[str, list[str]]:
    """Return hashes of all plug-in files if an active strategy is from one (they may import each other).

    Other stages get an empty mapping, so that their addresses are the same with and without plug-ins.
    """
    classes = find(config.strategy)
    if not any(is_plugin(classes[name].__module__) for name in active):
        return {}
    return {"plugins": [content_of(Path(path)) for path in config.plugin]}


def _subject(config: RunConfig) -> PlainDict:
    """Return the subject's settings with the content of its files, and what samples its class images."""
    settings = {k: v for k, v in asdict(config.subject).items() if k != "prompts"}
    for name in ("image", "mask", "video"):
        if settings[name]:
            settings[name] = _local(f"subject.{name}", settings[name])
    whole = decisive(config.as_dict())
    sampling = {"sampler": whole["sampler"], "guidance": whole["guidance"]}
    return {"subject": settings, **(sampling if config.subject.prior else {})}


def _known_frames(config: RunConfig, active: tuple[str, ...]) -> PlainDict:
    """Return the settings of known frames if an active strategy reads which they are: else there are none."""
    classes = find(config.strategy)
    read = any(classes[name].reads_known_frames for name in active)
    return {"known": asdict(config.known)} if read else {}


def _image_encoder(config: RunConfig, active: tuple[str, ...]) -> dict[str, str]:
    """Return the hash of the image encoder that image-to-video weights read, if an active strategy passes it on."""
    classes = find(config.strategy)
    if not config.image_states_width or not any(classes[name].reads_first_frame for name in active):
        return {}
    return {
        "image_encoder": _local("wan.image_encoder", os.fspath(Path(config.image_encoder_source, ENCODER)))
    }


def _globs(config: RunConfig, name: StageName, active: tuple[str, ...]) -> tuple[str, ...]:
    """Return the globs that a stage trains, from the strategies' classes; none for a stage without steps."""
    classes = find(config.strategy)
    if not stage_config(config, name).steps:
        return ()
    return declared_globs(config, name, {strategy: classes[strategy] for strategy in active})


def _data_files(config: RunConfig) -> Mapping[str, object]:
    """Return, for data on disk, the decoder, and hashes of the files that list the examples and of those they name."""
    if config.data.kind == "toyworld":
        return {}
    from dit_booth.data.video import decoder

    root, name = Path(config.data.on_disk.root), config.data.format
    listed = {}
    for file in FORMATS[name].files(root, config.data.lists("train")):
        read = (
            [content_of(file)] if file.is_file() and file.suffix != ".tar" else []
        )  # a shard counts by its size
        listed[str(file.relative_to(root))] = [*read, files_named(root, name, file)]
    return {"decoder": decoder(), **listed}


def _weights(config: RunConfig) -> str:
    """Return the hash of the backbone's start weights; empty for random ones."""
    if config.weights == "none":
        return ""
    if config.weights == "embedded":
        return content_of(ASSETS / f"{config.backbone}.safetensors")
    if is_pipeline(config.weights):  # its other parts count by themselves
        return _local("weights", os.fspath(Path(config.weights).expanduser() / "transformer"))
    return _local("weights", config.weights)


def _local(name: str, source: str) -> str:
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f"{name} has {source!r}, which is neither a file nor a folder; give weights that are there"
        )
    return content_of(path)


def _local_or_hub(source: str) -> str:
    """Return the hash of an encoder's embedded or local weights, or the name of those to download."""
    if source == "embedded":
        return content_of(ASSETS / "clip.safetensors")
    path = Path(source.removeprefix("local-dir:")).expanduser()
    return content_of(path) if source and path.exists() else source


def _text(config: RunConfig) -> list[str]:
    """Return the hashes of umT5's encoder and tokenizer; none where the text encoder is CLIP's."""
    if config.text.kind == "clip":
        return []
    section = config.text_source
    return [
        _local_or_hub(os.fspath(Path(section.path, folder)))
        for folder in (section.subfolder, section.tokenizer)
    ]


def _autoencoder(config: RunConfig) -> str:
    """Return the hash of the autoencoder's weights, or the name of those to download."""
    section = config.autoencoder_source
    if section.kind != "wan":
        return _local_or_hub(section.path)
    return _local_or_hub(os.fspath(Path(section.path, section.subfolder)))


def content_of(path: Path) -> str:
    """Return a hash of a file, or of a folder's weights and settings (of a run folder: its own weights)."""
    if path.is_file():
        status = path.stat()
        return _hash_file(os.fspath(path.resolve()), status.st_size, status.st_mtime_ns)
    own = [path / f"{name}.safetensors" for name in ("weights", "strategy")]
    files = [file for file in own if file.is_file()]
    files = files or sorted(
        file
        for suffix in ("json", "safetensors", "bin", "pt")
        for file in path.rglob(f"*.{suffix}")
        if file.is_file()
    )
    return digest({str(file.relative_to(path)): content_of(file) for file in files}, 64)


@functools.cache
def _hash_file(path: str, size: int, changed: int) -> str:
    """Hash a file once for each path, size and modification time: the points of a sweep share their weights."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
