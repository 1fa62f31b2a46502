"""The likelihood loss (Table 4's, Gym and Kitchen) against noise matching and `posterior`, where the answer is known.

    python results/likelihood.py                # writes likelihood.png and likelihood.md beside this file
    python results/likelihood.py --out FOLDER

The data: 2-D actions a ~ N(mu(s), WIDTH^2) of states s on [-1, 1]. For each loss and number of steps T a small network
is trained, and beside it stands the loss's minimiser in closed form, whose error is no lack of training. `posterior` is
least where the posterior mean (Eq. 7) from the predicted noise is the one from E(x_0 | x_t), which the exact noise
E(eps | x_t) gives. The likelihood loss asks one Euler step of the reverse SDE (Eq. 3) to hit that mean, and Eq. 8 then
takes the answer for the noise.
"""

import argparse
import functools
import math
from pathlib import Path

import torch
from known_noise import exact_noise, gaussian
from matplotlib import pyplot as plt
from pages import save, start, table

import erdp

LOSSES = "noise", "posterior", "likelihood"
STEPS = 3, 5, 10, 20, 50
WIDTH = 0.1  # deviation of an action given its state
UPDATES, LONGER = 2_000, 8_000  # the latter for T = 5 alone
TICKS = 0.003, 0.01, 0.03, 0.1, 0.3, 1  # of the picture
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


def trained(sde, loss: str, updates: int = UPDATES):
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


def results() -> dict:
    """[(loss, clip, T)] -> (bias, deviation) of the trained network, then of the minimiser."""
    result = {}
    for T in STEPS:
        exact, sde = erdp.MeanRevertingSDE(T, dtype=torch.float64), erdp.MeanRevertingSDE(T)
        for loss in LOSSES:
            network = trained(sde, loss)
            for clip in (False, True):
                best = functools.partial(minimiser, exact, loss)
                result[loss, clip, T] = *measure(network, sde, clip), *measure(best, exact, clip)
    return result


def longer_training() -> list:
    """The lines of a table: bias and deviation at T = 5 of networks trained for LONGER updates."""
    sde, lines = erdp.MeanRevertingSDE(5), []
    for loss in LOSSES:
        network = trained(sde, loss, LONGER)
        lines.append([loss, *(f"{value:.3g}" for clip in (False, True) for value in measure(network, sde, clip))])
    return lines


def deviations_on_the_way(loss: str, T: int = 5, n: int = 20_000) -> list[float]:
    """Deviation of x_t for t = 1..T, at state 0, as a sampler meets it that has the minimiser and clips nothing."""
    sde, met = erdp.MeanRevertingSDE(T, dtype=torch.float64), []

    def network(x_t, t, state):
        met.append(float(x_t.std(0).mean()))
        return minimiser(sde, loss, x_t, t, state)

    state = torch.zeros(n, 1, dtype=torch.float64)
    erdp.sample_actions(network, sde, state, gaussian(T, n, 2, seed=2), clip_denoised=False)
    return met[::-1]


def markdown(result: dict, longer: list) -> str:
    sections = []
    for i, (title, what) in enumerate((("Bias", "0"), ("Deviation", f"{WIDTH:g} in the data"))):
        rows = [
            [loss, "yes" if clip else "no", who, *(f"{result[loss, clip, T][i + 2 * j]:.3g}" for T in STEPS)]
            for loss in LOSSES
            for clip in (False, True)
            for j, who in enumerate(("trained", "minimiser"))
        ]
        sections.append(f"## {title} ({what})\n\n" + table(["loss", "x0-hat clipped", "network", *STEPS], rows))
    sde, x = erdp.MeanRevertingSDE(5, dtype=torch.float64), torch.tensor([[0.0] * 2, [1.0] * 2], dtype=torch.float64)
    gains = []
    for loss in ("noise", "likelihood"):
        eps = [minimiser(sde, loss, x, torch.full((2,), t), torch.zeros(2, 1).double())[:, :1] for t in range(1, 6)]
        x_0 = [sde.predict_x0(x[:, :1], t, e) for t, e in zip(range(1, 6), eps, strict=True)]
        gains.append([f"{loss}: slope of the noise", *(f"{float(e[1] - e[0]):.3g}" for e in eps)])
        gains.append([f"{loss}: slope of x0-hat", *(f"{float(e[1] - e[0]):.3g}" for e in x_0)])
        gains.append([f"{loss}: deviation of x_t met", *(f"{met:.3g}" for met in deviations_on_the_way(loss))])
    coefficients = [sde.transition(0, t) for t in range(1, 6)]
    seen = [f"{float((scale**2 * WIDTH**2 + var).sqrt()):.3g}" for scale, var in coefficients]
    gains.append(["deviation of x_t in training (Eq. 4)", *seen])
    return f"""# The likelihood loss on a coarse grid

`python results/likelihood.py`, picture: [likelihood.png](likelihood.png).

Data: 2-D actions, Gaussian of deviation {WIDTH} around a known function of the state. Networks: three hidden layers of
64, {UPDATES:,} updates at batch 256, schedule cosine. Minimiser: the predictor at which the loss is least, in closed
form. {SAMPLES} samples for each of {STATES} states; finished samples are clamped to [-1, 1]. Columns: T.

Bias: rms error of the mean sample of a state. With no bias it would be about the deviation of the samples divided by
{math.isqrt(SAMPLES)}. Deviation: of the samples of a state. From the exact noise it is below the data's on a coarse
grid, because each step takes x0-hat for x_0, the last one without adding noise (see [figure2.md](figure2.md)).

{sections[0]}

{sections[1]}

## Longer training

T = 5, after {LONGER:,} updates in place of {UPDATES:,}.

{table(["loss", *(f"{kind}: {m}" for kind in ("not clipped", "clipped") for m in ("bias", "deviation"))], longer)}

## Where it comes from

The minimisers are affine in x_t. T = 5: their slope in x_t; that of the x0-hat that Eq. 8 makes of them; the deviation
of the x_t, at state 0, that a sampler meets with them, unclipped; and that of the x_t that a network is trained on.
Where a sampler meets x_t far outside of those, a trained network need not be near the minimiser.

{table(["T = 5", *(f"t = {t}" for t in range(1, 6))], gains)}
"""


def draw(result: dict, path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.3))
    for i, panel in enumerate(axes):
        for loss, colour in zip(LOSSES, ("tab:blue", "tab:green", "tab:red"), strict=True):
            if loss != "likelihood":  # clipping moves no point of these to be seen
                panel.plot(STEPS, [result[loss, True, T][i] for T in STEPS], "o-", color=colour, label=loss)
                continue
            for clip, mark, how in ((False, "o", "not clipped"), (True, "x", "clipped")):
                trained, best = ([result[loss, clip, T][i + j] for T in STEPS] for j in (0, 2))
                panel.plot(STEPS, trained, mark + "-", color=colour, label=f"{loss}, x0-hat {how}")
                panel.plot(STEPS, best, mark + ":", color="0.5", label=f"its minimiser, x0-hat {how}")
        panel.set(xscale="log", yscale="log", xlabel="T")
        panel.set_xticks(STEPS, STEPS)
        ticks = [tick for tick in TICKS if panel.get_ylim()[0] < tick < panel.get_ylim()[1]]
        panel.set_yticks(ticks, ticks)
        panel.minorticks_off()
    axes[1].axhline(WIDTH, color="k", linewidth=0.8, label="the data")
    axes[0].set(ylabel="rms error of a state's mean sample", title="Bias")
    axes[1].set(ylabel="deviation of a state's samples", title="Deviation")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path, dpi=110)


def main():
    folder = start(argparse.ArgumentParser(description=__doc__)).out
    result, longer = results(), longer_training()
    draw(result, folder / "likelihood.png")
    (folder / "likelihood.md").write_text(markdown(result, longer))


if __name__ == "__main__":
    main()
