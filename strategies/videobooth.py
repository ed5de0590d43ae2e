"""VideoBooth (arXiv 2312.00777, section 3): coarse and fine, in the stages that the two strategies declare."""

from dit_booth.strategy import alias

alias("videobooth", "token_replacement+kv_concat")
