"""The page of the study of drift (`experiments.bench.drift`), from the scores in its folder."""

PRIMARY = ("keyframes-8", "first")
TRUTH = "truth"


def write_page(file, out, names):
    raise SystemExit
