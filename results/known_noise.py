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


def optimal(network, sde, noise):
    """The sampler of the policy, from x_T = noise[0] and the noise for t = T..2; it has no use for noise[T], for t = 1.

    network(x_t (B, A), t (B,), state) predicts the noise. noise (T + 1, B, A).
    """
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


def gaussian(*shape, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
