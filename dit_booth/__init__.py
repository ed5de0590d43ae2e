"""Dit-Booth: subject-driven video diffusion. One image and a sentence in, a video out.

    import dit_booth

    pipe = dit_booth.load("toyworld")  # embedded; or a run's folder, or an adapter's file
    video = pipe("star.png", "a star is spinning on snow", subject="star", seed=0)
    video.save("star.mp4")

Names are imported when they are first used: ``import dit_booth`` takes milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_booth.config import RunConfig as RunConfig
    from dit_booth.lora import export_lora as export_lora
    from dit_booth.lora import import_lora as import_lora
    from dit_booth.models.registry import create_model as create_model
    from dit_booth.models.registry import list_models as list_models
    from dit_booth.pipeline import Pipeline as Pipeline
    from dit_booth.pipeline import load as load
    from dit_booth.run import train as train
    from dit_booth.sampling.video import Video as Video
    from dit_booth.strategy import list_strategies as list_strategies

_HOMES = {
    "Pipeline": "dit_booth.pipeline",
    "RunConfig": "dit_booth.config",
    "Video": "dit_booth.sampling.video",
    "create_model": "dit_booth.models.registry",
    "export_lora": "dit_booth.lora",
    "import_lora": "dit_booth.lora",
    "list_models": "dit_booth.models.registry",
    "list_strategies": "dit_booth.strategy",
    "load": "dit_booth.pipeline",
    "train": "dit_booth.run",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_booth' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
