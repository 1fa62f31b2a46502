"""Figure 1, the toy task: every policy at every share of good steps in the data, with intervals over seeds.

`results/report.py` calls it, with the runs that it has read.
"""

import itertools
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
SHOWN = 5  # percent of good steps, the toy's default
MISSES = 75  # percent of the best return: the low hill and one step to the high one are worth less
PAIRS = [
    ("plain Q", "cloning"),
    ("entropy", "plain Q"),
    ("ensemble", "plain Q"),
    ("both", "plain Q"),
    ("both", "entropy"),
    ("both", "ensemble"),
    ("both, de Bruijn", "ensemble"),
    ("both, de Bruijn", "both"),
    ("both, released", "ensemble"),
    ("both, released", "both"),
    ("debruijn, alpha = 0.1", "ensemble"),
    ("debruijn, alpha = 0.3", "ensemble"),
]

# ==== 1. Statistics ===================================================================================================


def interval(statistic, *samples) -> tuple[float, float]:
    """The 95% bootstrap interval (BCa) over seeds, of samples (n,); NaN where they do not vary."""
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(action="ignore"):
        return tuple(bootstrap(samples, statistic, paired=True, random_state=rng).confidence_interval)


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


# ==== 2. Tables =======================================================================================================


def toy_groups(groups: list[Group]) -> dict[tuple[int, str], Group]:
    """The toy's groups by percent of good steps, most balanced first, and policy; other settings have their flags."""
    names = {label(arm, untold=()): name for name, arm in TOY.items()}
    found = {}
    for group in groups:
        if group.env == "toy":
            arm = label(group.arm, untold=())
            found[int(group.data.removeprefix("toy-")), names.get(arm, arm)] = group
    order = [*TOY, *sorted({name for _, name in found} - set(TOY))]
    return {key: found[key] for key in sorted(found, key=lambda key: (-key[0], order.index(key[1])))}


def arms_table(toy: dict[tuple[int, str], Group]) -> str:
    lines = []
    for (share, name), group in toy.items():
        x, (_, curve) = np.array([*group.finals().values()]), group.curve()
        unsteady = curve[:, curve.shape[1] // 2 :].std(1).mean()
        bounds = "[{:.1f}, {:.1f}]".format(*interval(middle, x)) if len(x) > 2 else ""
        figures = f"{middle(x):.1f} {bounds}", f"{x.std():.1f}", f"{(x < MISSES).sum()}"
        lines.append([f"{share}%", name, *figures, f"{unsteady:.1f}", len(x)])
    head = ["share", "policy", "final return", "deviation", "seeds that miss", "deviation in training", "seeds"]
    return table(head, lines)


def pairs_table(toy: dict[tuple[int, str], Group]) -> str:
    """Every pair of PAIRS that has three seeds or more in common."""
    lines = []
    for share, (first, second) in itertools.product(shares_of(toy), PAIRS):
        if not ((share, first) in toy and (share, second) in toy):
            continue
        a, b = paired(toy[share, first], toy[share, second])
        if len(a) < 3:
            continue
        gain = a - b
        returns = in_words(middle(gain), interval(middle, gain), "+.1f")
        spread = in_words(np.exp(log_ratio(a, b)), np.exp(interval(log_ratio, a, b)), ".2f")
        better, each = f"{(gain > 0).sum()} of {len(gain)}", ", ".join(f"{x:+.0f}" for x in np.sort(gain))
        names = f"{share}%", f"{first} against {second}"
        lines.append([*names, returns, mean_gain(a, b), f"{wilcoxon(gain).pvalue:.2g}", better, spread, each])
    head = ["share", "policies", "interquartile mean", "mean", "Wilcoxon's p", "better seeds", "ratio of deviations"]
    return table([*head, "each seed, in order of size"], lines)


def shares_of(toy) -> list[int]:
    return sorted({share for share, _ in toy}, reverse=True)


def figure1(groups: list[Group], out: Path, bare: bool):
    """figure1.md (of `fill`), figure1.png (its three panels) and figure1-shares.png, from the toy runs."""
    toy = toy_groups(groups)
    if toy:
        draw_panels(out / "figure1.png", toy)
        draw_shares(out / "figure1-shares.png", toy)
        fill("figure1.md", out, bare, arms=arms_table(toy), pairs=pairs_table(toy))


# ==== 3. Pictures =====================================================================================================


def draw_shares(path: Path, toy: dict[tuple[int, str], Group]):
    """Final return over the share: interquartile means, with bands of their intervals."""
    figure, axis = plt.subplots(figsize=(8, 5))
    shares = shares_of(toy)
    for name in dict.fromkeys(name for _, name in toy):
        at = [share for share in shares if (share, name) in toy]
        if len(at) < min(2, len(shares)):  # a single point among lines is not to be seen
            continue
        finals = [np.array([*toy[share, name].finals().values()]) for share in at]
        (line,) = axis.plot(at, [middle(values) for values in finals], "o-", label=name)
        low, high = np.transpose([interval(middle, values) if len(values) > 2 else (np.nan,) * 2 for values in finals])
        axis.fill_between(at, low, high, alpha=0.15, color=line.get_color())
    axis.set(xscale="log", xlabel="percent of the recorded steps that go towards the high reward")
    axis.set(ylabel="final return, percent of the best", title="Interquartile mean over seeds, 95% intervals")
    axis.set_xticks(shares, shares)
    axis.minorticks_off()
    axis.invert_xaxis()
    if axis.lines:
        axis.legend(fontsize="small")
    save(figure, path)


def draw_panels(path: Path, toy: dict[tuple[int, str], Group]):
    """Figure 1's three panels, at one share: reward and data; return while training; Q of the first action."""
    share = SHOWN if SHOWN in shares_of(toy) else shares_of(toy)[0]
    arms = {name: group for (percent, name), group in toy.items() if percent == share}
    figure, (left, centre, right) = plt.subplots(1, 3, figsize=(18, 5.5))
    x = np.linspace(-2, 2, 401)
    left.plot(x, erdp.ToyEnv.reward(x))
    left.set(xlabel="state", ylabel="reward", title=f"Reward and data, {share}% of good steps")
    density = left.twinx()
    recorded = [episode.observations[1:, 0] for episode in erdp.toy_episodes(0, share / 100)]
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
        (line,) = right.plot(a, q.mean(0), label=f"{name}, mean ± deviation ({len(q)} seeds)")
        right.fill_between(a[:, 0], q.mean(0) - q.std(0), q.mean(0) + q.std(0), alpha=0.1, color=line.get_color())
    right.set(xlabel="first action", ylabel="value (of an ensemble: Eq. 17)", title="Q at state 0")
    for axis in (centre, right):
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    save(figure, path)
