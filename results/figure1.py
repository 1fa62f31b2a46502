"""Figure 1, the toy task: every policy at every share of good steps in the data, with intervals over seeds.

`results/report.py` calls it, with the runs that it has read.
"""

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from pages import draw_band, save, table
from runs import ACTIONS, CLONING, Group, label
from scipy.stats import t as student
from scipy.stats import trim_mean, wilcoxon

import erdp

TOY = {  # Figure 1
    "cloning": CLONING,
    "plain Q": dict(num_critics=1, entropy_coef=0),
    "entropy": dict(num_critics=1),
    "ensemble": dict(entropy_coef=0),
    "both": {},
    "both, de Bruijn": dict(variant="debruijn"),
    "both, released": dict(variant="released"),
}
MISSES = 75  # percent of the best return: the low hill and one step to the high one are worth less
PAIRS = [("plain Q", "cloning"), ("entropy", "plain Q"), ("ensemble", "plain Q"), ("both", "plain Q")]
PAIRS += [("both", "entropy"), ("both", "ensemble"), ("both, de Bruijn", "ensemble"), ("both, de Bruijn", "both")]
PAIRS += [("both, released", "ensemble"), ("both, released", "both")]
PAIRS += [(f"debruijn, alpha = {alpha}", "ensemble") for alpha in (0.1, 0.3)]


def interval(values: np.ndarray, statistic, resamples: int = 10_000) -> tuple[float, float]:
    """The 95% bootstrap interval of a statistic (..., n) -> () over the n seeds of `values`."""
    n = values.shape[-1]
    drawn = values[..., np.random.default_rng(0).integers(n, size=(resamples, n))]  # (..., resamples, n)
    low, high = np.nanquantile(statistic(drawn), [0.025, 0.975])
    return low, high


def mean_interval(values: np.ndarray, error: float = 0.05) -> tuple[float, float]:
    """The interval of a mean over seeds by Student's t, which leaves out the truth with that probability."""
    n, mean = len(values), values.mean()
    reach = student.ppf(1 - error / 2, n - 1) * values.std(ddof=1) / n**0.5
    return mean - reach, mean + reach


def middle(values: np.ndarray) -> np.ndarray:
    """The interquartile mean over the last axis."""
    return trim_mean(values, 0.25, axis=-1)


def log_ratio(values: np.ndarray) -> np.ndarray:
    """Of the deviations of two arms, values (2, ..., n)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(values[0].std(-1)) - np.log(values[1].std(-1))


def in_words(value: float, bounds: tuple[float, float], form: str) -> str:
    """A value with its interval, in bold where that leaves out 0 (a difference) or 1 (a ratio)."""
    text = f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"
    least = 0 if "+" in form else 1
    return f"**{text}**" if bounds[0] > least or bounds[1] < least else text


def toy_groups(groups: list[Group]) -> dict[str, dict[str, Group]]:
    """The toy's groups by data set (toy-20: 20% of the steps go to the right), most balanced first, and by arm."""
    found = {}
    for group in (group for group in groups if group.env == "toy"):
        name = next((name for name, arm in TOY.items() if arm == group.arm), label(group.arm))
        found.setdefault(group.data, {})[name] = group
    order = [*TOY, *sorted({name for arms in found.values() for name in arms} - set(TOY))]
    shares = sorted(found, key=lambda data: -share_of(data))
    return {data: {name: found[data][name] for name in order if name in found[data]} for data in shares}


def share_of(data: str) -> int:
    return round(100 * erdp.toy_share(data))


def arms_table(shares: dict[str, dict[str, Group]]) -> str:
    lines = []
    for data, arms in shares.items():
        for name, group in arms.items():
            x, (_, curve) = np.array([*group.finals().values()]), group.curve()
            unsteady = curve[:, curve.shape[1] // 2 :].std(1).mean()
            bounds = "[{:.1f}, {:.1f}]".format(*interval(x, middle)) if len(x) > 2 else ""
            figures = f"{middle(x):.1f} {bounds}", f"{x.std():.1f}", f"{(x < MISSES).sum()}"
            lines.append([f"{share_of(data)}%", name, *figures, f"{unsteady:.1f}", len(x)])
    head = ["share", "policy", "final return", "deviation", "seeds that miss", "deviation in training", "seeds"]
    return table(head, lines)


def pairs_table(shares: dict[str, dict[str, Group]]) -> tuple[str, int]:
    """The table with what it says of the claim on variances, and its number of lines."""
    lines, unsteadier = [], []
    for data, arms in shares.items():
        for first, second in PAIRS:
            if not (first in arms and second in arms):
                continue
            a, b = arms[first].finals(), arms[second].finals()
            seeds = sorted(a.keys() & b.keys())
            if len(seeds) < 3:
                continue
            x = np.array([[a[seed] for seed in seeds], [b[seed] for seed in seeds]])
            gain = x[0] - x[1]
            returns = in_words(middle(gain), interval(gain, middle), "+.1f")
            means = in_words(gain.mean(), mean_interval(gain), "+.1f")
            ratio, bounds = np.exp(log_ratio(x)), np.exp(interval(x, log_ratio))
            spread = in_words(ratio, bounds, ".2f")
            if second == "plain Q" and first in ("ensemble", "both") and bounds[0] > 1:
                unsteadier.append(f"of {first} at {share_of(data)}% ({spread.strip('*')})")
            better, each = f"{(gain > 0).sum()} of {len(seeds)}", ", ".join(f"{x:+.0f}" for x in np.sort(gain))
            p = f"{wilcoxon(gain).pvalue:.2g}" if gain.any() else ""
            lines.append([f"{share_of(data)}%", f"{first} against {second}", returns, means, p, better, spread, each])
    head = ["share", "policies", "interquartile mean", "mean", "Wilcoxon's p", "better seeds", "ratio of deviations"]
    text = table([*head, "each seed, in order of size"], lines)
    if unsteadier:
        text += f"\n\nThe least variance fails: larger than plain Q's is the deviation {', '.join(unsteadier)}."
    return text if lines else "No two policies have three seeds in common yet.", len(lines)


def default_by_rule(shares: dict[str, dict[str, Group]]) -> str | None:
    """The largest share at which plain Q's median seed misses the high mode."""
    for data, arms in shares.items():
        if "plain Q" in arms and np.median([*arms["plain Q"].finals().values()]) < MISSES:
            return data
    return None


def figure1(groups: list[Group], out: Path):
    """figure1.md, figure1.png (its three panels) and figure1-shares.png, from the toy runs."""
    shares = toy_groups(groups)
    if not shares:
        return
    own = erdp.ROWS["toy"].dataset
    shown = own if own in shares else next(iter(shares))
    draw_panels(out / "figure1.png", shown, shares[shown])
    steps = sorted({group.runs[0].config["num_steps"] for arms in shares.values() for group in arms.values()})
    rule, (pairs, compared) = default_by_rule(shares), pairs_table(shares)
    text = [
        "# Figure 1: the toy task\n",
        f"Made by `python results/report.py`, from runs of {' and '.join(f'{x:,}' for x in steps)} updates "
        "(`bash run_all.sh toy-sweep`, `bash run_all.sh quick`). Returns are in percent of the best possible one, of a "
        "run's last evaluation. Share: of the recorded steps that go towards the high reward. A seed makes its own "
        f"data, networks and noise; policies are compared seed by seed. A seed misses below {MISSES}%. Values over "
        "seeds are interquartile means with a 95% bootstrap interval (percentiles), deviations have the divisor n. "
        "These intervals are somewhat too narrow: of values from one Gaussian, or from two modes far apart, they hold "
        "the truth in 92 to 94% at 10 seeds and in 90 to 93% at 5 (simulated); corrected ones (BCa) do no better.\n",
        "## Every policy at every share\n",
        "Deviation: over seeds. In training: over the evaluations of a run's last half, averaged over seeds.\n",
        arms_table(shares) + "\n",
        "## Policies held against each other\n",
        "The paper's claim is that entropy and ensemble together have the best return and the least variance. The "
        "differences in return between two policies with the same seed: their interquartile mean; their mean, with "
        "its 95% interval by Student's t; the p-value of Wilcoxon's signed ranks, of five seeds at least 0.06; on how "
        "many seeds the first is better; and last each of them, as some have two modes, which no mean shows. Ratio: "
        "the first's deviation over seeds divided by the second's. Bold: the interval leaves out 0, or 1. Nothing is "
        f"corrected for the number of comparisons, {compared}: of those without any difference one in twenty would be "
        "bold all the same.\n",
        pairs + "\n",
        "## Which share to show\n",
        "A rule fixed before looking: the largest share at which the median seed of plain Q misses. Of the shares "
        + (f"above that is {share_of(rule)}%" if rule else "above there is none")
        + f"; the toy's default is {share_of(own)}%, and the panels are of {share_of(shown)}%.\n",
        "![Reward and data; return while training; learned Q at state 0](figure1.png)\n",
    ]
    if len(shares) > 1:
        draw_shares(out / "figure1-shares.png", shares)
        text.append("![Final return over the share of good steps](figure1-shares.png)\n")
    (out / "figure1.md").write_text("\n".join(text))


def draw_shares(path: Path, shares: dict[str, dict[str, Group]]):
    """Final return over the share: interquartile means, with bands of their intervals."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for name in TOY:
        at = [data for data, arms in shares.items() if name in arms]
        if not at:
            continue
        finals = [np.array([*shares[data][name].finals().values()]) for data in at]
        low, high = np.transpose([interval(x, middle) for x in finals])
        x = [share_of(data) for data in at]
        (line,) = axis.plot(x, [middle(values) for values in finals], "o-", label=name)
        axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
    ticks = [share_of(data) for data in shares]
    axis.set(xscale="log", xlabel="percent of the recorded steps that go towards the high reward")
    axis.set(ylabel="final return, percent of the best", title="Interquartile mean over seeds, 95% intervals")
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.legend(fontsize="small")
    save(figure, path)


def draw_panels(path: Path, data: str, arms: dict[str, Group]):
    """Figure 1's three panels: reward and data; return while training; Q of the first action."""
    figure, (left, centre, right) = plt.subplots(1, 3, figsize=(18, 5.5))
    x = np.linspace(-2, 2, 401)
    left.plot(x, erdp.ToyEnv.reward(x))
    left.set(xlabel="state", ylabel="reward", title=f"Reward and data, {data}")
    density = left.twinx()
    recorded = erdp.toy_data(0, erdp.toy_share(data)).next_state[:, 0]
    density.hist(recorded, 60, density=True, alpha=0.4, color="tab:orange")
    density.set(ylabel="density of the states in the data, seed 0")
    for name, group in arms.items():
        draw_band(centre, group, name)
    centre.axhline(100, color="gray", linestyle="--", label="best possible")
    centre.set(xlabel="updates", ylabel="percent: mean ± deviation (seeds)", title="Percent of the best return")
    a = ACTIONS.numpy()  # (41, 1)
    second = erdp.ToyEnv.reward(a + np.linspace(-1, 1, 401)).max(1, keepdims=True)
    best = erdp.ToyEnv.reward(a) + erdp.Args().discount * second
    right.plot(a, best, "--", color="gray", label="best policy's true Q")
    for name in ("plain Q", "ensemble", "both"):
        kept = [run.start_q for run in (arms[name].runs if name in arms else []) if run.start_q]
        if not kept:
            continue
        q = np.array([values["pessimistic"] for values in kept])  # (seeds, 41)
        (line,) = right.plot(a, q.mean(0), label=f"{name}" + f", mean ± deviation of {len(q)} seeds" * (len(q) > 1))
        right.fill_between(a[:, 0], q.mean(0) - q.std(0), q.mean(0) + q.std(0), alpha=0.1, color=line.get_color())
    right.set(xlabel="first action", ylabel="value (of an ensemble: Eq. 17)", title="Q at state 0")
    for axis in (centre, right):
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    save(figure, path)
