"""The comparison with cloning on the Hopper medium-replay stand-in, whose number of seeds was not fixed beforehand.

    python results/looks.py    # from runs.jsonl; writes the tables of looks.md

Each look that was taken, what looking does to the rate of false positives, and intervals that allow for it.
"""

import argparse

import numpy as np
from pages import fill, start, table
from runs import CLONING, group_runs, read_records
from scipy.stats import ttest_1samp

ROW, EARLY = "hopper-medium-replay-v2", dict(q_time=3, entropy_coef=0.0)
SEEN = {20_000: (6,), 40_000: (3, 5, 6), 60_000: (4, 5)}  # updates: numbers of seeds at which the scores were compared
LOOKS = {"5 and 6 seeds": (5, 6), "3, 5 and 6 seeds": (3, 5, 6)}  # at 40,000 updates
DRAWS = 10  # millions of made-up comparisons


def gains_of(groups) -> dict[int, np.ndarray]:
    """Updates: scores of ERDP less those of cloning (seeds,), of the seeds that both have, in order."""
    found = {}
    for group in (group for group in groups if group.env == ROW):
        for i, arm in enumerate((EARLY, CLONING)):
            for run in group.runs if arm.items() <= group.arm.items() else []:
                for step, score in zip(run.evaluations["step"], run.evaluations["score_mean"]):
                    found.setdefault(int(step), ({}, {}))[i][run.config["seed"]] = score
    gains = {}
    for step, (ours, theirs) in sorted(found.items()):
        gains[step] = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])
    return gains


def least_p(looks, later=(), correlation: float = 0.0, draws: int = DRAWS) -> np.ndarray:
    """The least p-value of Student's t test over looks at these numbers of seeds, of gains whose mean is 0.

    `later`: looks at a second horizon, whose gains have that correlation with the first's. Returns (draws million,).
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        first, second = rng.standard_normal((2, 1_000_000, 6))
        second = correlation * first + (1 - correlation**2) ** 0.5 * second
        samples = [first[:, :n] for n in looks] + [second[:, :n] for n in later]
        found.append(np.min([ttest_1samp(x, 0, axis=1).pvalue for x in samples], 0))
    return np.concatenate(found)


def in_words(gains: np.ndarray, error: float = 0.05) -> str:
    low, high = ttest_1samp(gains, 0).confidence_interval(1 - error)
    return f"{gains.mean():+.1f} [{low:.1f}, {high:.1f}]"


def seen_table(gains: dict[int, np.ndarray]) -> str:
    shown = [(step, 0, n) for step, numbers in SEEN.items() for n in numbers] + [(40_000, 1, 6)]
    lines = []
    for step, first, end in shown:
        x = gains[step][first:end]
        p, ahead = f"{ttest_1samp(x, 0).pvalue:.3f}", f"{(x > 0).sum()} of {len(x)}"
        lines.append([f"{step:,}", f"{first} to {end - 1}", in_words(x), p, ahead])
    return table(["updates", "seeds", "ahead of cloning by", "p", "ahead in"], lines)


def allowed_table(gains: dict[int, np.ndarray]) -> str:
    x, y = gains[40_000], gains[60_000]
    lines = []
    for name, looks in LOOKS.items():
        p = least_p(looks)
        level = np.quantile(p, 0.05)
        lines.append([name, f"{(p < 0.05).mean():.0%}", f"{level:.3f}", in_words(x, level)])
    correlation = np.corrcoef(x[: len(y)], y)[0, 1]
    p = least_p(SEEN[40_000], SEEN[60_000], correlation, DRAWS // 10)
    name, level = f"these, and 4 and 5 seeds at 60,000, correlated by {correlation:.2f}", np.quantile(p, 0.05)
    lines.append([name, f"{(p < 0.05).mean():.0%}", f"{level:.3f}", in_words(x, level)])
    return table(["looks", "false positives", "level", "ahead of cloning by"], lines)


def main():
    args = start(argparse.ArgumentParser(description=__doc__))
    gains = gains_of(group_runs(read_records()))
    fill("looks.md", args.out, seen=seen_table(gains), allowed=allowed_table(gains))


if __name__ == "__main__":
    main()
