"""Figure 1, the toy task: every policy at every share of good steps in the data, with intervals over seeds.

`results/report.py` calls it, with the runs that it has read. The text of figure1.md stands in that page alone.
"""

import warnings
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from pages import fill, save, table
from runs import ACTIONS, CLONING, Group, label
from scipy.stats import bootstrap, trim_mean, ttest_rel, wilcoxon

import erdp

TOY = {  # Figure 1
    "cloning": CLONING,
    "plain Q": dict(num_critics=1, entropy_coef=0.0),
    "entropy": dict(num_critics=1),
    "ensemble": dict(entropy_coef=0.0),
    "both": {},
    "both, de Bruijn": dict(variant="debruijn"),
    "both, released": dict(variant="released"),
}
MISSES = 75  # percent of the best return: the low hill and one step to the high one are worth less
PAIRS = [("plain Q", "cloning"), ("entropy", "plain Q"), ("ensemble", "plain Q"), ("both", "plain Q")]
PAIRS += [("both", "entropy"), ("both", "ensemble"), ("both, de Bruijn", "ensemble"), ("both, de Bruijn", "both")]
PAIRS += [("both, released", "ensemble"), ("both, released", "both")]
PAIRS += [(f"debruijn, alpha = {alpha}", "ensemble") for alpha in (0.1, 0.3)]


def interval(statistic, *samples) -> tuple[float, float]:
    """The 95% bootstrap interval (BCa; of a statistic that does not vary percentiles) over seeds, of samples (n,)."""
    for method in ("BCa", "percentile"):
        rng = np.random.default_rng(0)
        with warnings.catch_warnings(action="ignore"):
            found = bootstrap(samples, statistic, paired=True, method=method, random_state=rng).confidence_interval
        if np.isfinite(found).all():
            break
    return tuple(found)


def middle(values, axis=-1):
    """The interquartile mean."""
    return trim_mean(values, 0.25, axis=axis)


def log_ratio(first, second, axis=-1):
    """Of the deviations of two samples; 0 of a resample that is one seed alone and has none."""
    ratio = first.std(axis).clip(1e-9) / second.std(axis).clip(1e-9)
    return np.log(ratio)


def in_words(value: float, bounds: tuple[float, float], form: str) -> str:
    """A value with its interval, in bold where that leaves out 0 (a difference) or 1 (a ratio)."""
    text = f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"
    least = 0 if "+" in form else 1
    return f"**{text}**" if bounds[0] > least or bounds[1] < least else text


def paired(first: Group, second: Group) -> np.ndarray:
    """Final scores of both (2, n) on the seeds that both have."""
    a, b = first.finals(), second.finals()
    return np.array([[a[seed], b[seed]] for seed in sorted(a.keys() & b.keys())]).reshape(-1, 2).T


def mean_gain(first, second) -> str:
    """The mean of the differences of paired samples, with its interval by Student's t."""
    return in_words(np.mean(first - second), ttest_rel(first, second).confidence_interval(), "+.1f")


def toy_groups(groups: list[Group]) -> dict[str, dict[str, Group]]:
    """The toy's groups by data set (toy-20: 20% of the steps go to the right), most balanced first, and by arm."""
    found = {}
    for group in (group for group in groups if group.env == "toy"):
        name = next((name for name, arm in TOY.items() if arm == group.arm), label(group.arm, untold=()))
        found.setdefault(group.data, {})[name] = group
    order = [*TOY, *sorted({name for arms in found.values() for name in arms} - set(TOY))]
    shares = sorted(found, key=share_of, reverse=True)
    return {data: {name: found[data][name] for name in order if name in found[data]} for data in shares}


def share_of(data: str) -> int:
    return int(data.partition("-")[2])


def arms_table(shares: dict[str, dict[str, Group]]) -> str:
    lines = []
    for data, arms in shares.items():
        for name, group in arms.items():
            x, (_, curve) = np.array([*group.finals().values()]), group.curve()
            unsteady = curve[:, curve.shape[1] // 2 :].std(1).mean()
            bounds = "[{:.1f}, {:.1f}]".format(*interval(middle, x)) if len(x) > 2 else ""
            figures = f"{middle(x):.1f} {bounds}", f"{x.std():.1f}", f"{(x < MISSES).sum()}"
            lines.append([f"{share_of(data)}%", name, *figures, f"{unsteady:.1f}", len(x)])
    head = ["share", "policy", "final return", "deviation", "seeds that miss", "deviation in training", "seeds"]
    return table(head, lines)


def pairs_table(shares: dict[str, dict[str, Group]]) -> tuple[str, str]:
    """The table, and what it says of the claim on variances."""
    lines, unsteadier = [], []
    for data, arms in shares.items():
        for first, second in PAIRS:
            if not (first in arms and second in arms):
                continue
            a, b = paired(arms[first], arms[second])
            if len(a) < 3:
                continue
            gain = a - b
            returns = in_words(middle(gain), interval(middle, gain), "+.1f")
            bounds = np.exp(interval(log_ratio, a, b))
            spread = in_words(np.exp(log_ratio(a, b)), bounds, ".2f")
            if second == "plain Q" and first in ("ensemble", "both") and bounds[0] > 1:
                unsteadier.append(f"of {first} at {share_of(data)}% ({spread.strip('*')})")
            better, each = f"{(gain > 0).sum()} of {len(gain)}", ", ".join(f"{x:+.0f}" for x in np.sort(gain))
            p = f"{wilcoxon(gain).pvalue:.2g}" if gain.any() else ""
            names = f"{share_of(data)}%", f"{first} against {second}"
            lines.append([*names, returns, mean_gain(a, b), p, better, spread, each])
    head = ["share", "policies", "interquartile mean", "mean", "Wilcoxon's p", "better seeds", "ratio of deviations"]
    text = table([*head, "each seed, in order of size"], lines)
    words = f"Comparisons, for none of whose number anything is corrected: {len(lines)}."
    if unsteadier:
        words += f" The least variance fails: larger than plain Q's is the deviation {', '.join(unsteadier)}."
    return text, words


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
    own, rule = erdp.ROWS["toy"].dataset, default_by_rule(shares)
    shown = own if own in shares else next(iter(shares))
    draw_panels(out / "figure1.png", shown, shares[shown])
    if len(shares) > 1:
        draw_shares(out / "figure1-shares.png", shares)
    pairs, claim = pairs_table(shares)
    chosen = f"that is {share_of(rule)}%" if rule else "there is none"
    fill(
        "figure1.md",
        out,
        arms=arms_table(shares),
        pairs=pairs,
        claim=claim,
        rule=f"Of these shares {chosen}; the toy's default is {share_of(own)}%, the panels are of {share_of(shown)}%.",
        shares="![Final return over the share of good steps](figure1-shares.png)" * (len(shares) > 1),
    )


def draw_shares(path: Path, shares: dict[str, dict[str, Group]]):
    """Final return over the share: interquartile means, with bands of their intervals."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for name in TOY:
        at = [data for data, arms in shares.items() if name in arms]
        if len(at) < 2:  # no line to be seen
            continue
        finals = [np.array([*shares[data][name].finals().values()]) for data in at]
        x = [share_of(data) for data in at]
        (line,) = axis.plot(x, [middle(values) for values in finals], "o-", label=name)
        low, high = np.transpose([interval(middle, values) if len(values) > 2 else (np.nan,) * 2 for values in finals])
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
    recorded = [episode.observations[1:, 0] for episode in erdp.toy_episodes(0, share_of(data) / 100)]
    density.hist(np.concatenate(recorded), 60, density=True, alpha=0.4, color="tab:orange")
    density.set(ylabel="density of the states in the data, seed 0")
    for name, group in arms.items():
        group.draw(centre, name)
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
