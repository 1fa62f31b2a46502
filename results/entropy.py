"""The entropy term of Eq. 15: what it follows, what it does to a policy; and one that measures entropy.

    python results/entropy.py                # makes the tables of entropy.md
    python results/entropy.py --out FOLDER

(a) The estimate, as `erdp.policy_loss` computes it, beside the entropy that it stands for, where both the distribution
and its noise E(eps | x_t) are known exactly. (b) Small policies trained with the term and without Q. (d) The term by de
Bruijn's identity: its estimate on finer grids, and what alpha does. What else the page has, gradients (c), the policy's
own samples, the toy, an earlier version of this script measured.
"""

import argparse
import itertools
import math

import numpy as np
import scipy.special
import scipy.stats
import torch
from known_noise import closed_form_deviation, gaussian, optimal, predictor, quantiles
from pages import fill, start, table

import erdp

VARIANTS = "paper", "released", "debruijn"
KINDS = "true", "sampler", *(f"estimate, {variant}" for variant in VARIANTS)
MODE_WIDTH = 0.1
GAUSSIANS = {f"Gaussian, deviation {width:g}": ([0.0], width) for width in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)}
MIXTURES = {f"modes at ±{mode:g}": ([-mode, mode], MODE_WIDTH) for mode in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)}
MOVED = {f"Gaussian, deviation {MODE_WIDTH}, moved to {mean:g}": ([mean], MODE_WIDTH) for mean in (0.2, 0.4, 0.6, 0.8)}
ROWS = 100_000  # samples of (a)
ALPHAS = 0.01, 0.1, 1.0, 10.0
TARGET = [0.0], 0.3  # of (b)
SEEDS, UPDATES = range(3), 1_500  # a seed's runs differ in nothing but alpha and variant
FINER = 5, 20, 100, 500  # T of (d)
SHOWN = 0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0  # alphas of (d)
SEARCHED = np.geomspace(0.01, 10, 61)  # alphas among which (d) finds that of the largest entropy
BINS = 100  # of the histogram on [-1, 1] that (d) takes the samples' entropy from
TARGETS = {"Gaussian, deviation 0.3": ([0.0], 0.3), "modes at ±0.5": ([-0.5, 0.5], MODE_WIDTH)}  # of (d)
TIMES = {"t = 1, 2": False, "all": True}  # of (d): whether the late times are kept

# ==== (a) The estimate ================================================================================================


def flat_critics(state, action, frozen: bool = False):
    """An ensemble of one member that is 1 everywhere: it leaves no Q term, and lambda = eta in variant "paper"."""
    return torch.ones(1, len(action), dtype=action.dtype)


def policy_terms(policy, sde, action, args, generator):
    """`erdp.policy_loss` of actions (B, 1) with fresh noise, a state that is always 0 and no Q term: its dict."""
    t = torch.randint(1, sde.num_steps + 1, (len(action),), generator=generator)
    eps, a_T = torch.randn(2, *action.shape, generator=generator).to(action.dtype)
    zeros = torch.zeros_like(action)
    batch, noise = erdp.Batch(zeros, action, zeros[:, 0], zeros, zeros[:, 0]), erdp.Noise(t, eps, a_T, None)
    return erdp.policy_loss(policy, flat_critics, sde, batch, noise, flat_critics(None, action), args)


def true_entropy(modes, width) -> float:
    """The differential entropy of equally likely Gaussians at `modes`, by integration over a fine grid."""
    x = np.linspace(min(modes) - 10 * width, max(modes) + 10 * width, 20_001)
    density = scipy.stats.norm.pdf(x[:, None], modes, width).mean(1)
    return float(np.trapezoid(scipy.special.entr(density), x))


def estimates(modes, width) -> list[float]:
    """Of one target: true entropy, that of the sampler's output at T = 5, and the estimate of each variant."""
    sde, generator = sde_of(), torch.Generator().manual_seed(0)
    action = torch.as_tensor(quantiles(modes, width, ROWS))[:, None]
    network = predictor(sde, modes, width)
    sample = optimal(network, sde, gaussian(6, ROWS, 1, seed=1))
    terms = [policy_terms(network, sde, action, erdp.Args(variant=v), generator)["entropy"] for v in VARIANTS]
    return [true_entropy(modes, width), scipy.stats.differential_entropy(sample[:, 0]), *map(float, terms)]


def estimates_table(estimated: dict) -> str:
    lines = [[name, *(f"{value:.3f}" for value in values)] for name, values in estimated.items()]
    return table(["target", *KINDS], lines)


def ranks_table(estimated: dict) -> str:
    groups = {"Gaussians": GAUSSIANS, "modes": MIXTURES, "moved Gaussian": MOVED, "all": estimated}
    lines = []
    for group, names in groups.items():
        true, *others = np.array([estimated[name] for name in names]).T
        ranks = [f"{scipy.stats.spearmanr(true, x).statistic:.2f}" if np.ptp(true) > 1e-6 else "" for x in others]
        lines.append([group, *ranks, *(f"{np.ptp(x):.3f}" for x in (true, *others))])
    return table(["targets", *(f"rank: {k}" for k in KINDS[1:]), *(f"range: {k}" for k in KINDS)], lines)


# ==== (b) What it does to a policy ====================================================================================


def trained(alpha: float, variant: str, seed: int):
    """A NoiseNetwork after UPDATES updates on TARGET with diffusion loss and entropy term (eta = 1, so lambda = 1)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy, sde = erdp.NoiseNetwork(1, 1, hidden=64), erdp.MeanRevertingSDE()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    args = erdp.Args(entropy_coef=alpha, variant=variant)
    modes, width = TARGET
    for _ in range(UPDATES):
        mode = torch.tensor(modes)[torch.randint(len(modes), (256,), generator=generator)]
        action = (mode + width * torch.randn(256, generator=generator))[:, None]
        loss = policy_terms(policy, sde, action, args, generator)["policy_loss"]
        erdp.optimizer_step(loss, policy, optimizer, grad_norm=4.0)
    return policy


@torch.no_grad()
def spread(policy, clip: bool, n: int = 20_000) -> tuple[float, float, float]:
    """Deviation, entropy and mean magnitude of T = 5 samples, with x0-hat and sample clamped to [-1, 1] or neither."""
    state, noise = torch.zeros(n, 1), gaussian(5, n, 1, seed=2).float()
    a = erdp.sample_actions(policy, erdp.MeanRevertingSDE(), state, noise, clip, clip)[:, 0].double().numpy()
    heaped = len(np.unique(a)) < 0.99 * n  # on the bounds: a distribution without a density
    return a.std(), -np.inf if heaped else scipy.stats.differential_entropy(a), np.abs(a).mean()


def expected_deviation(variant: str, alpha: float) -> str:
    """Of unclamped samples, from the noise that minimises the loss on TARGET where that is known in closed form.

    Variant "paper": -log p is all but eps_hat^2 / 2 and a constant, and E (eps_hat - eps)^2 - alpha eps_hat^2 / 2 least
    at E(eps | x_t) / (1 - alpha / 2), without a minimum from alpha = 2 on.
    """
    if variant == "released":
        return ""
    if variant == "paper" and alpha >= 2:
        return "no minimum"
    sde = sde_of()
    divisor = 1 - alpha / 2 if variant == "paper" else 1.0
    best = widened(sde, TARGET, weights(sde), alpha if variant == "debruijn" else 0.0)
    return f"{closed_form_deviation(optimal, sde, lambda *x: best(*x) / divisor):.3g}"


def policies_table(spreads: dict) -> str:
    """spreads: (variant, alpha) -> `spread` clamped and not (seeds, 6)."""
    lines = []
    for (variant, alpha), runs in spreads.items():
        with np.errstate(invalid="ignore"):  # the deviation of infinities
            pairs = zip(runs.mean(0), runs.std(0), strict=True)
        values = [f"{mean:.3g} ± {deviation:.1g}" if np.isfinite(mean) else f"{mean}" for mean, deviation in pairs]
        change = runs[:, 0] - spreads["none", 0.0][:, 0]
        values.insert(1, f"{change.mean():+.3f} ± {change.std():.1g}" if alpha else "")
        lines.append([variant, f"{alpha:g}", *values, expected_deviation(variant, alpha)])
    header = [f"{clip}: {m}" for clip in ("clamped", "not clamped") for m in ("deviation", "entropy", "mean abs a")]
    header.insert(1, "clamped: change of the deviation")
    return table(["variant", "alpha", *header, "expected"], lines)


# ==== (d) A term that measures entropy ================================================================================


def sde_of(T: int = 5):
    return erdp.MeanRevertingSDE(T, dtype=torch.float64)


def weights(sde, all_times: bool = False):
    """w_t (T,) of H-hat: `erdp.entropy_weights`, or theta'_t / var_t at the late times, too."""
    t = torch.arange(1, sde.num_steps + 1)
    return (sde.between(t - 1, t) / sde.var(0, t))[:, 0] if all_times else erdp.entropy_weights(sde)


def widened(sde, target, w, alpha: float):
    """The minimiser of L_diff (Eq. 5) - alpha H-hat / A without Q: the exact noise of `target` / (1 + alpha T w_t).

    At x_t the loss of one dimension is E (eps_hat - eps)^2 + alpha T w_t eps_hat^2 and a constant.
    """
    exact, divisor = predictor(sde, *target), 1 + alpha * sde.num_steps * w
    return lambda x_t, t, state: exact(x_t, t, state) / divisor[t - 1, None]


def h_hat(sde, network, target, w) -> float:
    """H-hat at noised actions of `target`, whose quantiles at each t stand for its law: no noise."""
    modes, width = target
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    for t in range(1, sde.num_steps + 1):
        scale, var = sde.transition(0, t)
        spread = (scale**2 * width**2 + var).sqrt()
        x_t = torch.as_tensor(quantiles(float(scale) * np.array(modes), float(spread)))[:, None]
        eps_hat = network(x_t, torch.full((len(x_t),), t), None)
        entropy -= float(w[t - 1] * (eps_hat**2 - var).mean())
    return entropy


def least_h_hat(T: int) -> float:
    """H-hat of one point with its exact noise, ||E(eps | x_t)||^2 = ||eps||^2; no action set in [-1, 1] has less."""
    sde = sde_of(T)
    var = sde.transition(0, torch.arange(1, T + 1))[1][:, 0]
    return float(0.5 * math.log(2 * math.pi * math.e) - (weights(sde) * (1 - var)).sum())


def grids_table() -> str:
    names = "Gaussian, deviation 0.1", "Gaussian, deviation 0.3", "Gaussian, deviation 1", *list(MIXTURES)[3:6]
    lines = []
    for name in names:
        target = (GAUSSIANS | MIXTURES)[name]
        values = [h_hat(sde, predictor(sde, *target), target, weights(sde)) for sde in map(sde_of, FINER)]
        lines.append([name, *(f"{value:.3f}" for value in (true_entropy(*target), *values))])
    lines.append(["a single point", "-inf", *(f"{least_h_hat(T):.3f}" for T in FINER)])
    return table(["target", "true", *(f"T = {T}" for T in FINER)], lines)


def sampled(network, sde, clip: bool, rows: int = ROWS) -> tuple[float, float, float]:
    """Entropy of the samples' histogram, their deviation and their share on the bounds.

    Of T steps of sampling, x0-hat clipped or not. The finished sample is clamped, as the policy's always is.
    """
    noise = gaussian(sde.num_steps, rows, 1, seed=3)
    a = erdp.sample_actions(network, sde, None, noise, clip, clip_sample=True)[:, 0].numpy()
    share = np.histogram(a, BINS, (-1, 1))[0] / rows
    entropy = scipy.special.entr(share).sum() + np.log(2 / BINS)
    return entropy, a.std(), (np.abs(a) == 1).mean()


def widening_tables() -> tuple[str, str]:
    """What alpha does to samples, and the alphas up to which their entropy rises."""
    sde, lines, best = sde_of(), [], []
    for (name, target), (times, late) in itertools.product(TARGETS.items(), TIMES.items()):
        w = weights(sde, late)
        for alpha in SHOWN:
            network = widened(sde, target, w, alpha)
            cells = [f"{h_hat(sde, network, target, w):.2f}"]
            for clip in (True, False):
                entropy, deviation, on_bounds = sampled(network, sde, clip)
                cells += [f"{entropy:.2f}", f"{deviation:.2f}", f"{on_bounds:.1%}"]
            lines.append([name, times, f"{alpha:g}", *cells])
        largest = []
        for clip in (True, False):
            found = [sampled(widened(sde, target, w, alpha), sde, clip, ROWS // 5)[0] for alpha in SEARCHED]
            largest.append(f"{SEARCHED[np.argmax(found)]:.2g}")
        best.append([name, times, *largest])
    header = [f"{c}: {m}" for c in ("clipped", "not clipped") for m in ("entropy", "deviation", "on the bounds")]
    widening = table(["target", "times", "alpha", "H-hat", *header], lines)
    return widening, table(["target", "times", "up to, clipped", "up to, not clipped"], best)


# ==== The page ========================================================================================================


def main(argv=None):
    folder = start(argparse.ArgumentParser(description=__doc__), argv).out
    estimated = {name: estimates(*target) for name, target in (GAUSSIANS | MIXTURES | MOVED).items()}
    spreads = {}
    for variant, alpha in [("none", 0.0), *itertools.product(VARIANTS, ALPHAS)]:
        policies = [trained(alpha, variant if alpha else "paper", seed) for seed in SEEDS]
        spreads[variant, alpha] = np.array([spread(p, True) + spread(p, False) for p in policies])
    widening, best = widening_tables()
    fill(
        "entropy.md",
        folder,
        estimates=estimates_table(estimated),
        ranks=ranks_table(estimated),
        policies=policies_table(spreads),
        grids=grids_table(),
        widening=widening,
        best=best,
    )


if __name__ == "__main__":
    main()
