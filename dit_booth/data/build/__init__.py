"""From raw videos with captions to training triplets: shots, subjects, masks, filters, files."""

from dit_booth.data.build.build import Report, build
from dit_booth.data.build.settings import BuildSettings, FilterSettings

__all__ = ["BuildSettings", "FilterSettings", "Report", "build"]
