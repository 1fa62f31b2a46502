"""The PointMaze study of pointmaze.md, from its runs' metrics and from their last policies' scores.

    python results/pointmaze_study.py                  # from results/pointmaze/, once all 24 runs are there
    python results/pointmaze_study.py --keep FOLDER    # copies what runs below FOLDER have left into results/pointmaze/

Written before the first comparison was made: the design is pointmaze.md's. Nothing is compared before all runs are
there, so that nothing that is seen on the way can end the study early.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
from pages import RESULTS, table
from scipy import stats

KEPT = RESULTS / "pointmaze"
ARMS = {"all": "all times", "early": "early times", "cloning": "cloning with critics"}
SEEDS = range(1, 9)
LATE = range(20_000, 30_001, 2_500)  # the updates whose evaluations are a run's score


def run_score(path: Path) -> float:
    """A run's score: the mean of its last five evaluations. Raises ValueError where one is missing."""
    with open(path, newline="") as file:
        scores = {int(row["step"]): float(row["score_mean"]) for row in csv.DictReader(file)}
    if missing := [step for step in LATE if step not in scores]:
        raise ValueError(f"{path} has no evaluation at update {missing[0]}")
    return float(np.mean([scores[step] for step in LATE]))


def paired(a, b) -> dict:
    """The mean of a - b over seeds with its 95% interval, and p, both of the paired t-test."""
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    return dict(mean=float(np.mean(a) - np.mean(b)), low=float(low), high=float(high), p=float(test.pvalue))


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p)
    steps = (len(p) - np.arange(len(p))) * np.array(p)[order]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def keep(top: Path):
    """Copies metrics.csv of each run below `top`, and acting.jsonl, into results/pointmaze/."""
    KEPT.mkdir(exist_ok=True)
    for path in sorted(top.glob("*/metrics.csv")):
        shutil.copy(path, KEPT / f"{path.parent.name}.csv")
    if (top / "acting.jsonl").exists():
        shutil.copy(top / "acting.jsonl", KEPT / "acting.jsonl")


def tables(scores: dict, acting: dict) -> str:
    """The page's tables, from scores[arm] (seeds,) and acting[arm, candidates] (seeds,)."""
    rows = []
    for arm, name in ARMS.items():
        columns = scores[arm], acting[arm, 50], acting[arm, 1]
        rows.append([name, *(f"{np.mean(column):.1f} ± {np.std(column):.1f}" for column in columns)])
    arms = table(["arm", "score", "best of 50, last policy", "plain sample, last policy"], rows)
    headline = paired(scores["all"], scores["cloning"])
    words = "all times less cloning with critics: {mean:+.1f} [{low:.1f}, {high:.1f}], p = {p:.2g}"
    secondary = {
        "early less all times": (scores["early"], scores["all"]),
        "all times less cloning, plain samples": (acting["all", 1], acting["cloning", 1]),
        "early times less cloning, plain samples": (acting["early", 1], acting["cloning", 1]),
        "cloning, best of 50 less plain sample": (acting["cloning", 50], acting["cloning", 1]),
        "all times, best of 50 less plain sample": (acting["all", 50], acting["all", 1]),
    }
    found = [paired(*pair) for pair in secondary.values()]
    rows = []
    for name, test, p in zip(secondary, found, holm([test["p"] for test in found])):
        rows.append([name, f"{test['mean']:+.1f} [{test['low']:.1f}, {test['high']:.1f}]", f"{p:.2g}"])
    rest = table(["secondary", "difference, 95% interval", "p by Holm"], rows)
    return f"{arms}\n\n**Headline**, {words.format(**headline)}\n\n{rest}\n"


def main(argv=None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("pointmaze_study.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.keep:
        keep(args.keep)
        return 0
    lines = (KEPT / "acting.jsonl").read_text().splitlines() if (KEPT / "acting.jsonl").exists() else []
    acted = {(line["run"], line["candidates"]): line["score"] for line in map(json.loads, lines)}
    try:
        scores = {arm: [run_score(KEPT / f"{arm}__{seed}.csv") for seed in SEEDS] for arm in ARMS}
        acting = {(arm, c): [acted[f"{arm}__{seed}", c] for seed in SEEDS] for arm in ARMS for c in (50, 1)}
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"pointmaze_study.py: the study is not complete, and nothing is compared before: {error}\n")
    print(tables(scores, acting), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
