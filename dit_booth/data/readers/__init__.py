"""Readers of data sets on disk, one file for each format."""

from dit_booth.data.readers.triplets import Triplets, TripletsConfig, check_caption

__all__ = ["Triplets", "TripletsConfig", "check_caption"]
