"""TensorBoard's HParams table of a sweep: options, final scores and costs of every finished point."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from dit_booth.files import partial_of, remove_partials
from dit_booth.study.plan import Point, SweepPlan
from dit_booth.study.rows import ALL_COSTS, SweepRow


def write_hparams(plan: SweepPlan, point: Point, row: SweepRow) -> None:
    """Write ``tensorboard/<point>/`` in the sweep's folder, in one step, unless it is there."""
    folder = plan.folder / "tensorboard" / point.id
    if folder.is_dir():
        return
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    summaries: Callable[[object, object], Iterable[object]] = hparams  # untyped
    options = {name: _plain(value) for name, value in {**point.options, "seed": point.seed}.items()}
    means = {f"scores/{name}": score["mean"] for name, score in row["metrics"].items()}
    fields = cast(Mapping[str, float | None], row)
    costs = {f"costs/{name}": fields[name] for name in ALL_COSTS}
    scores = {name: float(value) for name, value in {**means, **costs}.items() if value is not None}
    remove_partials(folder.parent, f"{point.id}.*")
    partial = partial_of(folder)
    with SummaryWriter(str(partial)) as board:
        for summary in summaries(options, scores):
            board._get_file_writer().add_summary(summary)
        for name, value in scores.items():
            board.add_scalar(name, value)
    try:
        partial.replace(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # else another process has written the same
            raise


def _plain(value: object) -> bool | int | float | str:
    """Return a value that HParams takes; a list becomes ``a+b``, as on a label."""
    if isinstance(value, (bool, int, float, str)):
        return value
    items = list(value) if isinstance(value, Iterable) else []
    return "+".join(map(str, items or ["none"]))
