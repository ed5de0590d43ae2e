"""Run folders and sweeps as one self-contained HTML page, with the tables as CSV and LaTeX.

    study       points, groups
    read, read_samples   files -> a study
    values      a study -> seeds x prompts, and frames, of one metric
    measures    columns: metrics of the catalogue, and costs
    contrasts   the declared contrasts, tested (study/statistics.py)
    table       groups, floors and ceilings -> rows (page, CSV and LaTeX all write this one object)
    plots, curves, svg, samples, extremes, settings, caveats   the other parts of the page
    page        all of it -> HTML (template, style and script are in page/, and template renders)

It knows files only: no training, no strategy, no model.
"""
