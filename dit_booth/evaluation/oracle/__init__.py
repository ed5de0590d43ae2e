"""Oracle metrics of the toy world: analysis by synthesis with the exact renderer, no learned network."""

from dit_booth.evaluation.oracle.scores import oracle_scores, track_subject
from dit_booth.evaluation.oracle.shape import best_shapes, shape_overlaps
from dit_booth.evaluation.oracle.subject import Track

ORACLE = ("appearance", "right_shape", "shape", "right_texture", "speed", "growth", "rotation")
"""Names of the oracle's metrics."""

__all__ = ["ORACLE", "Track", "best_shapes", "oracle_scores", "shape_overlaps", "track_subject"]
