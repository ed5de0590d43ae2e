"""Comparing systems at one budget per subject, counted in FLOPs.

budget.py    the budget: FLOPs, or seconds at a measured throughput
systems.py   the systems by name, and what one step, one video and the class images of each cost
plan.py      the steps that a budget buys, and the units of work: system x seed (x subject)
subjects.py  the subjects of the test split: image, prompt, and a video of another scene
work.py      train, sample and score; every finished piece has a marker
results.py   the folder as a sweep's, which the report reads
compare.py   all of it in order
"""
