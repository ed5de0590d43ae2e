"""Readers of data sets on disk: formats list examples, which are checked once and loaded on demand."""

from dit_booth.data.readers.item import check_caption
from dit_booth.data.readers.triplets import Triplets, TripletsConfig

__all__ = ["Triplets", "TripletsConfig", "check_caption"]
