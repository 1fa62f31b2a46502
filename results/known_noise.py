"""Distributions whose noise E(eps | x_t) is known exactly, and samplers that take it from a function: no training.

A distribution is a mixture of equally likely Gaussians of one deviation, `width`, at `modes`.
"""

import numpy as np
import pages  # noqa: F401 (so that erdp.py is found)
import scipy.stats
import torch

from erdp import sample_actions


def exact_noise(sde, x_t, t, modes, width):
    """E(eps | x_t) where each entry of x_0 is a mixture of equally likely Gaussians of deviation `width` at `modes`.

    It is -std_t times the score (Eq. 30) of the marginal, a mixture of Gaussians too. x_t (B, A), modes (..., K).
    """
    scale, var = sde.transition(0, t)  # Eq. 2
    distance = x_t[..., None] - torch.as_tensor(scale)[..., None] * torch.as_tensor(modes, dtype=x_t.dtype)  # (B, A, K)
    spread = torch.as_tensor(scale**2 * width**2 + var)[..., None]  # of x_t within a mode
    share = (-0.5 * distance**2 / spread).softmax(-1)  # p(mode | x_t)
    return var.sqrt() * (share * distance / spread).sum(-1)


def predictor(sde, modes, width):
    return lambda x_t, t, state: exact_noise(sde, x_t, t, modes, width)


def reverse_sde(network, sde, noise, last: float = 1.0):
    """Eq. 3 from x_T = noise[0] in T Euler-Maruyama steps; `last` scales the noise of the last one.

    network(x_t (B, A), t (B,), state) predicts the noise. noise (T + 1, B, A): x_T, then the noise for t = T..1.
    """
    x_t, T = noise[0], sde.num_steps
    for t in range(T, 0, -1):
        times = torch.full((len(x_t),), t)
        score = -network(x_t, times, None) / sde.transition(0, times)[1].sqrt()  # Eq. 30
        x_t = sde.reverse_sde_step(x_t, t, score, noise[T - t + 1] * (last if t == 1 else 1.0))
    return x_t


def optimal(network, sde, noise):
    """The sampler of the policy, with the arguments of `reverse_sde`; it has no use for noise[T]."""
    return sample_actions(network, sde, None, noise[:-1], clip_denoised=False, clip_sample=False)


def closed_form_deviation(sampler, sde, network):
    """Deviation, without sampling, of one-dimensional samples whose network is linear in x_t: so are they in the noise.

    For N(0, width^2) the exact noise is linear.
    """
    unit = torch.eye(sde.num_steps + 1, dtype=torch.float64)[..., None]  # row n is noise 1 at step n and 0 elsewhere
    return float(sampler(network, sde, unit).square().sum().sqrt())


def quantiles(modes, width, n: int = 10_000):
    """n points (n,) that stand for the mixture: the quantiles of each mode."""
    k = len(modes)
    return np.concatenate([m + width * scipy.stats.norm.ppf((np.arange(n // k) + 0.5) / (n // k)) for m in modes])


def deviation_of_x0_hat(sde, width, t: int = 1):
    """Deviation of x0-hat = E(x_0 | x_t) (Eq. 8) at time t, where x_0 is N(0, width^2) and x_t of Eq. 4."""
    scale, var = sde.transition(0, t)
    one = torch.ones(1, 1, dtype=torch.float64)  # x0-hat is linear in x_t
    gain = sde.predict_x0(one, t, exact_noise(sde, one, t, [0.0], width))
    return float(gain * (scale**2 * width**2 + var).sqrt())


def gaussian(*shape, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
