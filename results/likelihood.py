"""The likelihood loss (Table 4's, Gym and Kitchen) against noise matching and `posterior`, where the answer is known.

    python results/likelihood.py                # makes the tables of likelihood.md
    python results/likelihood.py --out FOLDER

The data: 2-D actions a ~ N(mu(s), WIDTH^2) of states s on [-1, 1]. For each loss and number of steps T a small network
is trained, and beside it stands the loss's minimiser in closed form, whose error is no lack of training. `posterior` is
least where the posterior mean (Eq. 7) from the predicted noise is the one from E(x_0 | x_t), which the exact noise
E(eps | x_t) gives. The likelihood loss asks one Euler step of the reverse SDE (Eq. 3) to hit that mean, and Eq. 8 then
takes the answer for the noise.
"""

import argparse
import functools
import itertools
import math

import torch
from known_noise import exact_noise, gaussian
from pages import fill, start, table

import erdp

LOSSES = "noise", "posterior", "likelihood"
STEPS = 3, 5, 10, 20, 50
WIDTH = 0.1  # deviation of an action given its state
UPDATES, LONGER = 2_000, 8_000  # the latter for T = 5 alone
STATES, SAMPLES = 50, 400  # of the measurement, samples a state


def mean_action(state):
    """mu(s): states (..., 1) -> (..., 2), on an arc of radius 0.6."""
    return 0.6 * torch.cat([(math.pi / 2 * state).sin(), (math.pi / 2 * state).cos()], -1)


def minimiser(sde, loss: str, x_t, t, state):
    """The predictor at which that loss is least for the data above. x_t (B, 2), t (B,), state (B, 1).

    Noise matching and `posterior`: E(eps | x_t, s). Likelihood: the Euler step of Eq. 3 is affine in the prediction,
    and the quotient below is the prediction that lets it hit the mean, over x_0 given x_t, of Eq. 40's x_{t-1}.
    """
    eps = exact_noise(sde, x_t, t, mean_action(state)[..., None], WIDTH)
    if loss != "likelihood":
        return eps
    goal, _ = sde.posterior(x_t, sde.predict_x0(x_t, t, eps), t)  # Eq. 40 is affine in x_0: its mean, at E(x_0 | x_t)
    drift = sde.reverse_sde_step(x_t, t, 0.0, 0.0)
    unit_score = -1 / sde.transition(0, t)[1].sqrt()  # Eq. 30 for a predicted noise of 1
    return (goal - drift) / sde.reverse_sde_step(torch.zeros_like(x_t), t, unit_score, 0.0)


def trained(sde, loss: str, updates: int):
    """A NoiseNetwork after `updates` updates of Adam at 1e-3, the rate falling to 0 over the second half."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = erdp.NoiseNetwork(1, 2, hidden=64)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, 2 - 2 * n / updates))
    for _ in range(updates):
        state = 2 * torch.rand(256, 1, generator=generator) - 1
        eps, data = torch.randn(2, 256, 2, generator=generator)
        x_0 = mean_action(state) + WIDTH * data
        t = torch.randint(1, sde.num_steps + 1, (256,), generator=generator)
        x_t = sde.diffuse(x_0, t, eps)
        loss_value = erdp.LOSSES[loss](sde, x_0, x_t, t, eps, network(x_t, t, state))
        erdp.optimizer_step(loss_value, network, optimizer, grad_norm=4.0)
        schedule.step()
    return network


@torch.no_grad()
def measure(network, sde, clip: bool) -> tuple[float, float]:
    """Bias, the rms error of a state's mean sample, and deviation, the rms distance from that mean, of each coordinate.

    Finished samples are clamped to [-1, 1], as always when acting; `clip` clamps each x0-hat too.
    """
    state = torch.linspace(-1, 1, STATES, dtype=sde.dtype)[:, None]
    noise = gaussian(sde.num_steps, STATES * SAMPLES, 2, seed=1).to(state.dtype)
    a = erdp.sample_actions(network, sde, state.repeat_interleave(SAMPLES, 0), noise, clip)
    a = a.view(STATES, SAMPLES, 2)
    bias = (a.mean(1) - mean_action(state)).square().mean().sqrt()
    return float(bias), float((a - a.mean(1, keepdim=True)).square().mean().sqrt())


def measurements() -> dict:
    """[loss, clip, who, T] -> (bias, deviation)."""
    found = {}
    for T, loss in itertools.product(STEPS, LOSSES):
        exact, sde = erdp.MeanRevertingSDE(T, dtype=torch.float64), erdp.MeanRevertingSDE(T)
        network, best = trained(sde, loss, UPDATES), functools.partial(minimiser, exact, loss)
        for clip in (False, True):
            found[loss, clip, "trained", T] = measure(network, sde, clip)
            found[loss, clip, "minimiser", T] = measure(best, exact, clip)
    return found


def measured_table(found: dict, column: int) -> str:
    lines = []
    for loss, clip, who in itertools.product(LOSSES, (False, True), ("trained", "minimiser")):
        figures = [f"{found[loss, clip, who, T][column]:.3g}" for T in STEPS]
        lines.append([loss, "yes" if clip else "no", who, *figures])
    return table(["loss", "x0-hat clipped", "network", *STEPS], lines)


def longer_table() -> str:
    """Of networks trained for LONGER updates at T = 5."""
    sde, lines = erdp.MeanRevertingSDE(5), []
    for loss in LOSSES:
        network = trained(sde, loss, LONGER)
        lines.append([loss, *(f"{value:.3g}" for clip in (False, True) for value in measure(network, sde, clip))])
    head = "not clipped: bias", "not clipped: deviation", "clipped: bias", "clipped: deviation"
    return table(["loss", *head], lines)


def deviations_on_the_way(loss: str, T: int = 5, n: int = 20_000) -> list[float]:
    """Deviation of x_t for t = 1..T, at state 0, as a sampler meets it that has the minimiser and clips nothing."""
    sde, met = erdp.MeanRevertingSDE(T, dtype=torch.float64), []

    def network(x_t, t, state):
        met.append(float(x_t.std(0).mean()))
        return minimiser(sde, loss, x_t, t, state)

    state = torch.zeros(n, 1, dtype=torch.float64)
    erdp.sample_actions(network, sde, state, gaussian(T, n, 2, seed=2), clip_denoised=False)
    return met[::-1]


def slopes_table() -> str:
    sde = erdp.MeanRevertingSDE(5, dtype=torch.float64)
    x, state = torch.tensor([[0.0] * 2, [1.0] * 2], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    lines = {}
    for loss in ("noise", "likelihood"):
        for t in range(1, 6):
            eps = minimiser(sde, loss, x, torch.full((2,), t), state)
            x_0 = sde.predict_x0(x, t, eps)
            lines.setdefault(f"{loss}: slope of the noise", []).append(float((eps[1] - eps[0])[0]))
            lines.setdefault(f"{loss}: slope of x0-hat", []).append(float((x_0[1] - x_0[0])[0]))
        lines[f"{loss}: deviation of x_t met"] = deviations_on_the_way(loss)
    in_training = [(decay**2 * WIDTH**2 + var) ** 0.5 for decay, var in (sde.transition(0, t) for t in range(1, 6))]
    lines["deviation of x_t in training (Eq. 4)"] = in_training
    rows = [[name, *(f"{value:.3g}" for value in values)] for name, values in lines.items()]
    return table(["T = 5", *(f"t = {t}" for t in range(1, 6))], rows)


def main(argv=None):
    folder = start(argparse.ArgumentParser(description=__doc__), argv).out
    found = measurements()
    fill(
        "likelihood.md",
        folder,
        bias=measured_table(found, 0),
        deviation=measured_table(found, 1),
        longer=longer_table(),
        slopes=slopes_table(),
    )


if __name__ == "__main__":
    main()
