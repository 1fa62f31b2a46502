"""The paper's Figure 2, and what it leaves out: optimal sampling (Eq. 6-8) against the reverse SDE (Eq. 3), by T.

    python results/figure2.py                # makes figure2.png and the tables of figure2.md
    python results/figure2.py --out FOLDER

(a) The paper's experiment, the reconstruction of a known x_0: the samplers start at x_T of Eq. 4 and know the exact
noise of x_t given x_0. (b) What a policy needs, samples of a distribution: they start at standard Gaussian noise and
know the exact noise of the distribution, E(eps | x_t), which is all that a perfectly trained network could know.
Nothing is trained and nothing is clipped, so that all error is the sampler's own. T changes the grid: every grid ends
at the same theta_bar_T. As optimal sampling adds no noise in its last step (Eq. 7 at t = 1), the reverse SDE is shown
with that noise, as Eq. 3 has it, and without. All of it in float64.
"""

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from known_noise import closed_form_deviation, exact_noise, gaussian, optimal, predictor, quantiles
from matplotlib import pyplot as plt
from pages import fill, save, start, table

from erdp import SCHEDULES, MeanRevertingSDE

STEPS = 2, 3, 5, 10, 20, 30, 50, 100, 200
ROWS = 10_000  # samples a distribution, sampler and T
ONE, TWO = ([0.0], 0.3), ([-0.5, 0.5], 0.1)  # the targets of (b): equally likely modes, and the deviation of each
BETWEEN = 0.3  # two deviations from the modes of TWO
BOUNDS = 0.3, 0.2, 0.05, 0.02  # of the rms error in (a)


def reverse_sde(network, sde, noise, last: float = 1.0):
    """Eq. 3 from x_T = noise[0] in T Euler-Maruyama steps; `last` scales the noise of the last one.

    The arguments are those of `optimal`.
    """
    x_t, T = noise[0], sde.num_steps
    for t in range(T, 0, -1):
        times = torch.full((len(x_t),), t)
        score = -network(x_t, times, None) / sde.transition(0, times)[1].sqrt()  # Eq. 30
        x_t = sde.reverse_sde_step(x_t, t, score, noise[T - t + 1] * (last if t == 1 else 1.0))
    return x_t


def reconstruct(sampler, sde, x_0, seed: int = 0):
    """x_0 (B, A), diffused to x_T (Eq. 4) and back by a sampler that knows the exact noise of x_t given x_0."""

    def network(x_t, t, state):
        return -sde.transition(0, t)[1].sqrt() * sde.score(x_t, x_0, t)  # Eq. 28, 30

    noise = gaussian(sde.num_steps + 1, *x_0.shape, seed=seed)
    noise[0] = sde.diffuse(x_0, sde.num_steps, noise[0])
    return sampler(network, sde, noise)


SAMPLERS = {
    "optimal sampling": optimal,
    "reverse SDE": reverse_sde,
    "reverse SDE, quiet end": functools.partial(reverse_sde, last=0.0),
}


class Measure(NamedTuple):
    """What one sampler does on one grid."""

    error: float  # rms, of the reconstruction (a)
    exact: float  # deviation for ONE, closed form
    one: float  # deviation of the samples for ONE, and their Wasserstein-1 distance from it
    distance_one: float
    two: float  # deviation of the absolute value of the samples for TWO: the width of a mode
    between: float  # share of those samples between the modes, within BETWEEN of 0
    distance_two: float


def measure(schedule: str, T: int, sampler) -> Measure:
    sde = MeanRevertingSDE(T, schedule, dtype=torch.float64)
    x_0 = torch.linspace(-1, 1, ROWS, dtype=torch.float64)[:, None]
    error = (reconstruct(sampler, sde, x_0) - x_0).square().mean().sqrt()
    noise = gaussian(T + 1, ROWS, 1, seed=1)
    one, two = (sampler(predictor(sde, *target), sde, noise)[:, 0].numpy() for target in (ONE, TWO))
    distances = (scipy.stats.wasserstein_distance(a, quantiles(*target)) for a, target in ((one, ONE), (two, TWO)))
    exact = closed_form_deviation(sampler, sde, predictor(sde, *ONE))
    width, between = np.abs(two).std(), (np.abs(two) < BETWEEN).mean()
    return Measure(float(error), exact, one.std(), next(distances), width, between, next(distances))


def errors_table(cosine: dict) -> str:
    return table(["T", *STEPS], [[name, *(f"{cosine[T][name].error:.2g}" for T in STEPS)] for name in SAMPLERS])


def bounds_table(results: dict) -> str:
    lines = []
    for schedule, of_T in results.items():
        for name in SAMPLERS:
            first = [next((T for T in STEPS if of_T[T][name].error < bound), "none") for bound in BOUNDS]
            lines.append([schedule, name, *first])
    return table(["schedule", "sampler", *(f"below {bound:g}" for bound in BOUNDS)], lines)


def deviation_of_x0_hat(sde, width, t: int = 1):
    """Deviation of x0-hat = E(x_0 | x_t) (Eq. 8) at time t, where x_0 is N(0, width^2) and x_t of Eq. 4."""
    scale, var = sde.transition(0, t)
    one = torch.ones(1, 1, dtype=torch.float64)  # x0-hat is linear in x_t
    gain = sde.predict_x0(one, t, exact_noise(sde, one, t, [0.0], width))
    return float(gain * (scale**2 * width**2 + var).sqrt())


def exact_table(cosine: dict) -> str:
    lines = []
    for T in STEPS:
        last_step = deviation_of_x0_hat(MeanRevertingSDE(T, dtype=torch.float64), ONE[1])
        lines.append([T, *(f"{cosine[T][name].exact:.3f}" for name in SAMPLERS), f"{last_step:.3f}"])
    return table(["T", *SAMPLERS, "E(x_0 given x_1)"], lines)


def samples_table(results: dict, **fields: str) -> str:
    """Those fields of Measure, under their titles."""
    lines = []
    for schedule, of_T in results.items():
        for T in STEPS:
            values = (getattr(of_T[T][name], field) for field in fields for name in SAMPLERS)
            lines.append([schedule, T, *(f"{value:.3f}" for value in values)])
    titles = [f"{title}: {name}" for title in fields.values() for name in SAMPLERS]
    return table(["schedule", "T", *titles], lines)


def draw(cosine: dict, path: Path):
    figure, (known, one, two) = plt.subplots(1, 3, figsize=(15, 4.3))
    for name, colour in zip(SAMPLERS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        error, exact, sd, *_, distance = zip(*(cosine[T][name] for T in STEPS), strict=True)
        known.plot(STEPS, error, "o-", color=colour, label=name)
        one.plot(STEPS, exact, color=colour, label=name)
        one.plot(STEPS, sd, "o", color=colour)
        two.plot(STEPS, distance, "o-", color=colour, label=name)
    one.axhline(ONE[1], color="0.4", linestyle="--", label="the target")
    one.plot([], [], "k-", label="line: closed form, points: samples")
    known.set(ylabel="rms error", title="(a) a known x_0, reconstructed", ylim=(-0.03, 1))
    one.set(ylabel="deviation of the samples", title="(b) one Gaussian, from its exact noise", ylim=(-0.03, 1))
    two.set(ylabel="Wasserstein-1 distance", title="(c) two modes, from their exact noise", ylim=(-0.02, 0.7))
    for axes in (known, one, two):
        axes.axvline(5, color="0.85", zorder=0, label="T = 5, the paper's")
        axes.set(xscale="log", xlabel="T (some points lie above the frame)")
        axes.set_xticks(STEPS, STEPS)
        axes.minorticks_off()
        axes.legend()
    save(figure, path)


def main(argv=None):
    folder = start(argparse.ArgumentParser(description=__doc__), argv).out
    results = {}  # [schedule][T][sampler]
    for schedule in SCHEDULES:
        results[schedule] = {T: {name: measure(schedule, T, each) for name, each in SAMPLERS.items()} for T in STEPS}
    cosine = results["cosine"]
    draw(cosine, folder / "figure2.png")
    fill(
        "figure2.md",
        folder,
        errors=errors_table(cosine),
        bounds=bounds_table(results),
        exact=exact_table(cosine),
        one=samples_table(results, one="sd", distance_one="W1"),
        two=samples_table(results, two="mode sd", between="between", distance_two="W1"),
    )


if __name__ == "__main__":
    main()
