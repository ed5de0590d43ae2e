"""TensorBoard's HParams table of a sweep: one line of options, final scores and costs for every finished point."""

from __future__ import annotations

import shutil
from typing import Any

from dit_booth.files import partial_of, remove_partials
from dit_booth.study.plan import Plan, Point
from dit_booth.study.rows import ALL_COSTS


def write_hparams(plan: Plan, point: Point, row: dict[str, Any]) -> None:
    """``tensorboard/<point>/`` in the sweep's folder: there whole or not at all, and not written twice."""
    folder = plan.folder / "tensorboard" / point.id
    if folder.is_dir():
        return
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    options = {name: _plain(value) for name, value in {**point.options, "seed": point.seed}.items()}
    scores = {f"scores/{name}": float(score["mean"]) for name, score in row["metrics"].items()}
    scores |= {f"costs/{name}": float(row[name]) for name in ALL_COSTS if row[name] is not None}
    remove_partials(folder.parent, f"{point.id}.*")
    partial = partial_of(folder)
    with SummaryWriter(str(partial)) as board:
        for summary in hparams(options, scores):
            board._get_file_writer().add_summary(summary)
        for name, value in scores.items():
            board.add_scalar(name, value)
    try:
        partial.replace(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # else another sweep has written the same meanwhile
            raise


def _plain(value: Any) -> Any:
    """What HParams takes: a list is written as the sum that it would be on a label."""
    return value if isinstance(value, (bool, int, float, str)) else "+".join(map(str, value or ["none"]))
