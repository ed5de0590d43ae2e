"""Run folders and sweeps as one self-contained HTML page, with the table as CSV and LaTeX.

    study       points, groups
    read        files -> a study
    statistics  intervals, paired differences
    table       groups -> rows of values (page, CSV and LaTeX all write this one object)
    plots, svg, samples, settings, caveats   the other parts of the page
    page        all of it -> HTML (template, style and script are in page/)

It knows files only: no training, no strategy, no model.
"""
