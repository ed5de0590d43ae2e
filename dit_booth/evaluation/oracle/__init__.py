"""Oracle metrics of the toy world: analysis by synthesis with the exact renderer, no learned network."""

from dit_booth.evaluation.oracle.scores import oracle_scores, track_subject
from dit_booth.evaluation.oracle.subject import Track

__all__ = ["Track", "oracle_scores", "track_subject"]
