"""The paper's Figure 2, and what it leaves out: optimal sampling (Eq. 6-8) against the reverse SDE (Eq. 3), by T.

    python results/figure2.py                # writes figure2.png and figure2.md beside this file
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
from known_noise import closed_form_deviation, deviation_of_x0_hat, gaussian, optimal, predictor, quantiles, reverse_sde
from matplotlib import pyplot as plt
from pages import save, start, table

from erdp import SCHEDULES, MeanRevertingSDE

STEPS = 2, 3, 5, 10, 20, 30, 50, 100, 200
ROWS = 10_000  # samples a distribution, sampler and T
ONE, TWO = ([0.0], 0.3), ([-0.5, 0.5], 0.1)  # the targets of (b): equally likely modes, and the deviation of each
BETWEEN = 0.3  # two deviations from the modes of TWO
BOUNDS = 0.3, 0.2, 0.05, 0.02  # of the rms error in (a)


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


def markdown(results: dict) -> str:
    """results[schedule][T][sampler] is a Measure."""
    cosine, two = results["cosine"], np.abs(quantiles(*TWO))
    errors = [[name, *(f"{cosine[T][name].error:.2g}" for T in STEPS)] for name in SAMPLERS]
    first = [
        [schedule, name, *(next((T for T in STEPS if of_T[T][name].error < bound), "none") for bound in BOUNDS)]
        for schedule, of_T in results.items()
        for name in SAMPLERS
    ]
    last_step = {T: deviation_of_x0_hat(MeanRevertingSDE(T, dtype=torch.float64), ONE[1]) for T in STEPS}
    exact = [[T, *(f"{cosine[T][name].exact:.3f}" for name in SAMPLERS), f"{last_step[T]:.3f}"] for T in STEPS]

    def samples(**fields):
        header = ["schedule", "T", *(f"{field}: {name}" for field in fields.values() for name in SAMPLERS)]
        rows = [
            [schedule, T, *(f"{getattr(of_T[T][name], field):.3f}" for field in fields for name in SAMPLERS)]
            for schedule, of_T in results.items()
            for T in STEPS
        ]
        return table(header, rows)

    return f"""# Figure 2: optimal sampling against the reverse SDE

`python results/figure2.py`, picture: [figure2.png](figure2.png). "Quiet end": Eq. 3, but without the noise of the
step from t = 1 to 0, which optimal sampling does not have either (Eq. 7).

## (a) Reconstruction of a known x_0, the paper's experiment

Rms error over {ROWS:,} x_0 evenly on [-1, 1], schedule cosine. From x_T (Eq. 4) back with the exact noise of x_t
given x_0: by Eq. 6-8, and by Eq. 3 in Euler-Maruyama steps. With that noise Eq. 8 gives x_0 itself at every t, and
Eq. 7 at t = 1 gives x0-hat: optimal sampling returns x_0 whatever T is.

{table(["T", *STEPS], errors)}

The smallest of these T at which the rms error is below a bound:

{table(["schedule", "sampler", *(f"below {bound:g}" for bound in BOUNDS)], first)}

## (b) The distribution that each sampler gives

One Gaussian of deviation {ONE[1]:.2f}, from standard Gaussian noise and with the exact noise of the distribution,
E(eps given x_t): deviation of the samples in closed form (each sampler is linear in its noise here), schedule cosine.
Optimal sampling takes x0-hat = E(x_0 given x_t) for x_0 in each step, and so loses variance that x_0 has given x_t; in
the last step, which adds no noise, all of it. The last column is what that step alone makes of an x_1 that is
distributed as it should be. So a policy that knows the noise exactly still samples nearer to the mean of the data's
actions than the data does.

{table(["T", *SAMPLERS, "E(x_0 given x_1)"], exact)}

From {ROWS:,} samples, the same Gaussian. sd: deviation of the samples (target {ONE[1]:.3f}). W1: Wasserstein-1 distance
to the target.

{samples(one="sd", distance_one="W1")}

Two equally likely modes at ±{TWO[0][1]:.2f} of deviation {TWO[1]:.2f} each. mode sd: deviation of the samples'
absolute value, the width of a mode where the modes lie apart (target {two.std():.3f}). between: share of the samples
between the modes, within ±{BETWEEN} (target {(two < BETWEEN).mean():.3f}): on a coarse grid a step's x0-hat, a mean
over both modes, pulls samples to where there is no data.

{samples(two="mode sd", between="between", distance_two="W1")}
"""


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


def main():
    folder = start(argparse.ArgumentParser(description=__doc__)).out
    results = {
        schedule: {T: {name: measure(schedule, T, sampler) for name, sampler in SAMPLERS.items()} for T in STEPS}
        for schedule in SCHEDULES
    }
    draw(results["cosine"], folder / "figure2.png")
    (folder / "figure2.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
