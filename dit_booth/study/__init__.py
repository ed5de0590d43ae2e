"""Sweeps: a study's points from one description, their shared stages, and what runs them.

    description.py   the YAML file, and the points that it spans; primary.py: what is tested on them
    plan.py          every point's settings and stages, checked before anything starts
    folder.py         who may run in a sweep's folder
    rows.py          what is there: states of points and stages, `sweep.jsonl`
    launch.py        runs what is missing, on slots.py's devices; processes.py ends what is left of it
    emit.py          writes a job list instead
    statistics.py    intervals over seeds and prompts, and tests

Nothing here needs PyTorch before a plan has to be made anew: repeating a finished sweep answers at once.
"""
