"""Entropy-regularized Diffusion Policy with Q-Ensembles (ERDP) for offline RL, in one file.

Reference: Zhang, Luo, Sjölund, Schön and Mattsson, "Entropy-regularized Diffusion Policy with Q-Ensembles for Offline
Reinforcement Learning", arXiv:2402.04080. Equations, tables and algorithms have its numbers. First comes the paper, in
its order: settings, SDE, networks, sampler, losses, Algorithm 1. Then comes the program: data, evaluation, training.

    python erdp.py                                      # the toy task of Figure 1
    python erdp.py --env antmaze-umaze-v0 --seed 0      # one row of Table 2 with the paper's settings
"""

from __future__ import annotations  # the choices in Args come from tables further down

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import gymnasium as gym
import h5py
import minari
import numpy as np
import pooch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm


# ==== 1. Settings: Section 4.1 and Table 4, whose lines are in DOMAINS ================================================
@dataclasses.dataclass
class Start:
    """The settings that say which run is meant. They are read first, as the defaults of all others follow from them."""

    env: Literal[tuple(ROWS)] | None = None  # None: own if --dataset names a data set, else toy
    dataset: str | None = None  # a Minari id, an .hdf5 file in D4RL's layout, or toy-0 to toy-99, for the row's data
    variant: Literal[tuple(VARIANTS)] = "paper"  # the paper; its authors' code; or the paper with de Bruijn's entropy
    seed: int = 0  # seeds weights, batches, noise, evaluation and the toy's data
    device: str = "cpu"  # cpu, cuda or cuda:N (where there is a GPU, the default is cuda, with --compile and TF32)
    run_dir: str | None = None  # the run's folder (None: runs/<env or data set>__<variant>__<seed>)
    resume: bool = False  # go on from the run folder's checkpoint
    eval_only: str | None = None  # a policy.pt or checkpoint.pt to be evaluated; nothing is trained or written


@dataclasses.dataclass
class Args(Start):
    """Entropy-regularized diffusion policy with Q-ensembles (arXiv:2402.04080). The defaults are those of --env's row
    in the paper: add --env ROW to --help to see them, and take them from `preset` in Python."""

    env: Literal[tuple(ROWS)] = "toy"  # a row of the tables, Figure 1's toy, or own: --dataset in its environment
    num_steps: int = 1_000_000  # updates in all
    batch_size: int = 256  # transitions in an update
    hidden: int = 256  # width of every hidden layer
    discount: float = 0.99  # gamma
    # critics
    num_critics: int = 64  # M, the size of the ensemble
    lcb_coef: float = 4.0  # beta of Eq. 17
    pessimism: Literal[tuple(PESSIMISM)] = "lcb"  # lcb: Eq. 17, independent targets; min: clipped double Q, one target
    max_q_backup: bool = False  # whether a target takes the best of 10 next actions
    critic_lr: float = 3e-4  # learning rate of the critics, the same in every domain of the paper
    target_rate: float = 0.005  # rate at which Q's targets follow Q (Algorithm 1's "eta", which is not Eq. 12's)
    # policy
    num_diffusion_steps: int = 5  # T
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # theta_t of Eq. 1 over t
    loss: Literal[tuple(LOSSES)] = "noise"  # noise: Eq. 5; likelihood: Table 4's; posterior: that without Euler's step
    eta: float = 1.0  # weight of Q-learning in Eq. 12
    q_time: int | None = None  # last diffusion time t whose a^0-hat Q sees in Eq. 12 (None: T, as in the paper)
    entropy_coef: float = 0.01  # alpha of Eq. 12 (with --variant debruijn its default is 0.03)
    clip_denoised: bool = True  # clamp x0-hat to the action bounds inside each reverse step (Table 4's action clip)
    lr: float = 3e-4  # learning rate of the policy
    grad_norm: float = 4.0  # norm to which the policy's gradient and the whole ensemble's are each clipped
    ema_rate: float = 0.005  # rate at which the EMA policy, from which Q's next actions come, follows the policy
    ema_every: int = 5  # updates between two moves of the EMA policy
    ema_start: int = 1000  # updates before the EMA policy may move
    # evaluation
    eval_every: int = 50_000  # updates between two evaluations
    eval_episodes: int = 100  # episodes in an evaluation
    eval_candidates: int = 50  # samples of which one is drawn by softmax over their value; 1: a plain sample
    eval_env: str | None = None  # an environment in place of the row's or the data's: an id, module:id or module:Class
    # speed
    compile: bool = False  # torch.compile, on CUDA also one CUDA graph an update; on a CPU 1.7 to 2.1 times as fast
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of matrix products; tf32: on CUDA, bf16: in Q

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # of a sweep, say; saved files hold plain values alone
                setattr(self, name, value.item())
            elif isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
        check_settings(self)


# ==== 2. The mean-reverting SDE: Eq. 1-8, 14, 28 ======================================================================
def cosine(k, T):
    f = np.cos((np.append(0, k) / (T + 1) + 0.008) / 1.008 * np.pi / 2) ** 2  # at 0, then at k
    return 1 - f[1:] / f[0]


# theta over steps k = 1..T (an array), up to a factor: every schedule is scaled to theta_bar_T = -ln(1e-3).
SCHEDULES = {
    "cosine": cosine,
    "constant": lambda k, T: np.ones(T),
    "linear": lambda k, T: np.linspace(1, 200, T),
    "vp": lambda k, T: 1 - np.exp(-0.1 / T - 4.95 * (2 * k - 1) / T**2),
}


class MeanRevertingSDE:
    """The SDE of Eq. 1, dx = -theta_t x dt + sqrt(2 theta_t) dw, on the paper's grid t = 0..T, T = num_steps.

    theta_bar (T+1,) holds the integrals of theta from 0 to t: theta_bar[0] == 0, theta_bar[T] = -ln(1e-3). x is (B, A)
    or (A,). Times tau and t are an int or an int64 tensor (B,), which gives coefficients of shape (B, 1). Densities are
    summed over the last axis. Coefficients are computed in float64 and rounded to `dtype` where they meet x. Two ints
    other than 0 <= tau <= t <= T raise ValueError; tensors are not checked, as that would wait for the device.
    """

    def __init__(self, num_steps: int = 5, schedule: str = "cosine", dtype=torch.float32, device="cpu"):
        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}, but the SDE needs at least 2 steps")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}")
        self.num_steps, self.dtype = num_steps, dtype
        theta = SCHEDULES[schedule](np.arange(1, num_steps + 1), num_steps)
        if not np.all(theta > 0):
            raise ValueError(f"the schedule {schedule!r} is not positive")
        theta_bar = np.cumsum([0, *theta])
        theta_bar *= -math.log(1e-3) / theta_bar[-1]
        self.theta_bar = torch.as_tensor(theta_bar, device=device)  # float64

    def between(self, tau, t):
        """theta_bar_{tau:t}, the integral of theta from tau to t; theta'_t where tau = t - 1. In float64."""
        known = isinstance(tau, int) and isinstance(t, int)
        if known and not 0 <= tau <= t <= self.num_steps:
            raise ValueError(f"the diffusion times {tau} and {t} must ascend, from 0 to T = {self.num_steps}")
        theta_bar = self.theta_bar[t] - self.theta_bar[tau]
        return theta_bar[..., None] if theta_bar.ndim else theta_bar  # a last axis, to broadcast over x

    def decay(self, tau, t):
        return torch.exp(-self.between(tau, t))

    def var(self, tau, t):
        return -torch.expm1(-2 * self.between(tau, t))

    def transition(self, tau, t):
        """Eq. 2: (decay, var) of p(x_t | x_tau) = N(decay x_tau, var I), tau <= t."""
        return self.decay(tau, t).to(self.dtype), self.var(tau, t).to(self.dtype)

    def diffuse(self, x_0, t, eps):
        """Eq. 4: x_t from clean x_0 and standard Gaussian noise eps."""
        decay, var = self.transition(0, t)
        return decay * x_0 + var.sqrt() * eps

    def score(self, x_t, x_0, t):
        """Eq. 28: the gradient of log p(x_t | x_0) with respect to x_t, for t >= 1."""
        decay, var = self.transition(0, t)
        return -(x_t - decay * x_0) / var

    def posterior(self, x_t, x_0, t):
        """Eq. 6 and Eq. 7: (mean, var) of p(x_{t-1} | x_t, x_0) for t >= 1; at t = 1, x_0 and 0."""
        before = self.var(0, t - 1)  # of p(x_{t-1} | x_0)
        step = self.var(t - 1, t)  # of p(x_t | x_{t-1})
        whole = self.var(0, t)  # of p(x_t | x_0)
        from_x_t = before / whole * self.decay(t - 1, t)
        from_x_0 = step / whole * self.decay(0, t - 1)
        mean = from_x_t.to(self.dtype) * x_t + from_x_0.to(self.dtype) * x_0
        return mean, (before * step / whole).to(self.dtype)

    def predict_x0(self, x_t, t, eps):
        """Eq. 8: x0-hat, the x_0 of which x_t is the diffused value if its noise is eps."""
        decay, var = self.transition(0, t)
        return (x_t - var.sqrt() * eps) / decay

    def log_prob(self, x_t, x_tau, tau, t):
        """log p(x_t | x_tau), the density of Eq. 2 for tau < t. Shape: x's without its last axis."""
        decay, var = self.transition(tau, t)
        squares = (x_t - decay * x_tau) ** 2 / var
        return -0.5 * (squares + torch.log(2 * torch.pi * var)).sum(-1)

    def log_prob_x1(self, x_1, x_T, x_0):
        """Eq. 14: log p(x_1 | x_T, x_0) by Bayes' rule on the densities of Eq. 2."""
        T = self.num_steps
        likelihood = self.log_prob(x_T, x_1, 1, T)
        prior = self.log_prob(x_1, x_0, 0, 1)
        evidence = self.log_prob(x_T, x_0, 0, T)
        return likelihood + prior - evidence

    def reverse_sde_step(self, x_t, t, score, noise):
        """Eq. 3: one Euler-Maruyama step from t to t - 1, against time, with standard Gaussian noise."""
        theta = self.between(t - 1, t).to(self.dtype)
        return x_t + theta * x_t + 2 * theta * score + (2 * theta).sqrt() * noise


# ==== 3. Networks =====================================================================================================
class NoiseNetwork(nn.Module):
    """eps_phi(x_t, t, s): three hidden Mish layers over (noisy action, time embedding, state)."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()
        frequency = 10_000 ** (-torch.arange(8, dtype=torch.float64) / 7)
        self.register_buffer("frequency", frequency, persistent=False)
        self.time = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])
        sizes = [action_dim + 16 + state_dim, hidden, hidden, hidden, action_dim]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in zip(sizes, sizes[1:]))

    def forward(self, x_t, t, state):
        """x_t (..., A), t (...) integer in 1..T, state (..., S) -> (..., A)."""
        phase = ((t - 1)[..., None] * self.frequency).to(x_t.dtype)  # (..., 8)
        time = torch.cat([phase.sin(), phase.cos()], -1)  # (..., 16)
        time = self.time[1](mish(self.time[0](time)))  # (..., 16)
        h = torch.cat([x_t, time, state], -1)  # (..., A + 16 + S)
        for layer in self.layers[:-1]:
            h = mish(layer(h))  # (..., H)
        return self.layers[-1](h)


class QEnsemble(nn.Module):
    """M independent Q-functions of three hidden Mish layers in batched products (`bf16`: two of them in bfloat16)."""

    def __init__(self, state_dim: int, action_dim: int, num_critics: int = 64, hidden: int = 256, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        sizes = [state_dim + action_dim, hidden, hidden, hidden, 1]
        self.weights = nn.ParameterList(torch.empty(num_critics, *size) for size in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.full((num_critics, 1, size), 0.1) for size in sizes[1:])
        # Hidden weights in ±1/16 at the paper's width, those of the first layer too: the released code at 145390c935,
        # agents/model.py:25-26 and 62-67, takes the number of outputs for the number of inputs.
        for weight in self.weights[:-1]:
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)
        for last in (self.weights[-1], self.biases[-1]):
            nn.init.uniform_(last, -3e-3, 3e-3)

    def forward(self, state, action, frozen: bool = False):
        """state (..., S), action (..., A) -> (M, ...). `frozen`: gradients reach the action but not the weights."""
        weights = [weight.detach() if frozen else weight for weight in self.weights]
        biases = [bias.detach() if frozen else bias for bias in self.biases]
        x = torch.cat([state, action], -1)
        x = x.reshape(1, -1, x.shape[-1]).expand(len(biases[0]), -1, -1)  # (M, N, S + A), the same for all members
        h = mish(x @ weights[0] + biases[0])  # (M, N, H)
        for weight, bias in zip(weights[1:-1], biases[1:-1]):
            product = (h.bfloat16() @ weight.bfloat16()).float() if self.bf16 else h @ weight
            h = mish(product + bias)  # (M, N, H)
        q = (h * weights[-1].mT).sum(-1) + biases[-1].squeeze(-1)  # (M, N): by a sum, which fuses with Mish
        return q.reshape(-1, *action.shape[:-1])


# ==== 4. Sampling (Eq. 10 by Eq. 6 and 8) and acting ==================================================================
def sample_actions(network, sde, state, noise, clip_denoised: bool = True, clip_sample: bool = True):
    """Actions (..., A) for states (..., S) in T steps of optimal sampling (Proposition 3.1).

    network(x_t (..., A), t (...), state) is any predictor of the noise. noise (T, ..., A) is standard Gaussian: x_T,
    then Eq. 6's for t = T..2. `clip_denoised` clamps each x0-hat to [-1, 1], `clip_sample` the finished action.
    """
    x_t, *fresh = noise
    for t, z in zip(range(sde.num_steps, 0, -1), [*fresh, 0.0], strict=True):
        eps = network(x_t, torch.full(x_t.shape[:-1], t, device=x_t.device), state)
        x_0 = sde.predict_x0(x_t, t, eps)  # Eq. 8
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
        mean, var = sde.posterior(x_t, x_0, t)  # Eq. 7
        x_t = mean + var.sqrt() * z  # Eq. 6; at t = 1 the mean is x0-hat and the variance 0
    return x_t.clamp(-1, 1) if clip_sample else x_t


def choose_action(actions, value, u):
    """One of C samples, drawn by softmax over their values: the released code's way to act, as the paper names none.

    actions (N, C, A), value (N, C), u (N, 1) uniform on [0, 1) in float64 -> (N, A).
    """
    below = value.double().softmax(-1).cumsum(-1)  # (N, C)
    chosen = torch.searchsorted(below, u, right=True)  # (N, 1)
    chosen = chosen.clamp(max=actions.shape[1] - 1)  # where rounding leaves the last sum below u
    return actions.take_along_dim(chosen[..., None], 1).squeeze(1)


def act(policy, critics, sde, state, noise, u, args: Args):
    """Actions (N, A) for states (N, S).

    From noise (T, N, C, A) come C samples a state, of which `choose_action` draws one with u (N, 1).
    """
    state = state[:, None].expand(-1, noise.shape[2], -1)  # (N, C, S)
    actions = sample_actions(policy, sde, state, noise, args.clip_denoised)  # (N, C, A)
    if actions.shape[1] == 1:
        return actions[:, 0]
    value = pessimistic_value(critics(state, actions), args)  # (N, C)
    return choose_action(actions, value, u)


# ==== 5. Losses, in the paper's order: Eq. 5, 12-15, 16, 17 ===========================================================
class Batch(NamedTuple):
    """Transitions: state (B, S), action (B, A) in [-1, 1], reward (B,), next_state (B, S), terminal (B,) 0 or 1."""

    state: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_state: torch.Tensor
    terminal: torch.Tensor


class Noise(NamedTuple):
    """All that is random in one update, drawn before it by `sample_noise`: an update is a function of its arguments."""

    t: torch.Tensor  # (B,) diffusion times, uniform on 1..T
    eps: torch.Tensor  # (B, A) noise of Eq. 4
    a_T: torch.Tensor  # (B, A) the a^T of Eq. 14
    next_action: torch.Tensor  # (T, C, B, A) noise of the sampler for C candidate next actions a state


def noise_loss(sde, x_0, x_t, t, eps, eps_hat):
    """Eq. 5, squared: noise matching."""
    return F.mse_loss(eps_hat, eps)


def likelihood_loss(sde, x_0, x_t, t, eps, eps_hat):
    """Table 4's loss: an Euler step of Eq. 3's drift, held against the posterior mean (Eq. 40).

    The two differ even for the true noise. IR-SDE at 2598d73cde, codes/utils/sde_utils.py:41 and 196; the released code
    at 145390c935, agents/diffusion.py:75.
    """
    optimal, _ = sde.posterior(x_t, x_0, t)  # Eq. 40
    score = -eps_hat / sde.transition(0, t)[1].sqrt()  # Eq. 30
    return F.mse_loss(sde.reverse_sde_step(x_t, t, score, 0.0), optimal)


def posterior_loss(sde, x_0, x_t, t, eps, eps_hat):
    """The posterior means themselves (Eq. 7 with x0-hat of Eq. 8): the true noise is the minimiser at any T."""
    optimal, _ = sde.posterior(x_t, x_0, t)  # Eq. 40
    mean, _ = sde.posterior(x_t, sde.predict_x0(x_t, t, eps_hat), t)
    return F.mse_loss(mean, optimal)


# L_diff of Eq. 15: mean squared errors for the predicted noise eps_hat (B, A), given x_t = sde.diffuse(x_0, t, eps).
LOSSES = {"noise": noise_loss, "likelihood": likelihood_loss, "posterior": posterior_loss}


def paper_entropy(sde, a_0, eps_hat, noise):
    """-log p(a^1-hat | a^T, s) of Eq. 13-15 (B,), by Eq. 14.

    a^1-hat is Eq. 4 of a^0-hat (unclamped) and its predicted noise eps_hat at t = 1.
    """
    a_1 = sde.diffuse(a_0, 1, eps_hat)
    return -sde.log_prob_x1(a_1, noise.a_T, a_0)


def released_entropy(sde, a_0, eps_hat, noise):
    """The released code's -log p(a^1-hat | a^T, s) (B,), from densities at the times 1, 2 and T.

    a^1-hat is an Euler step of the drift, and each density has its earlier and its later state exchanged.
    """
    T = sde.num_steps
    a_1 = (1 - sde.between(0, 1)).to(sde.dtype) * a_0
    likelihood = sde.log_prob(a_1, noise.a_T, 2, T)
    prior = sde.log_prob(a_0, a_1, 1, 2)
    evidence = sde.log_prob(a_0, noise.a_T, 1, T)
    return -(likelihood + prior - evidence)


def entropy_weights(sde):
    """w_t = theta'_t / var_t (T,) for t = 1..T, but 0 where x_t says nothing more of x_0 (cosine, T = 5: after t = 2).

    There, with x_0 in [-1, 1]^A, x_t is standard Gaussian to within 0.01 nats a dimension: its KL divergence from that
    and what its entropy lacks are at most -1/2 log var_t, as H(x_t) >= H(x_t | x_0). These times would add at most
    0.03 nats a dimension to `debruijn_entropy`, but have most of the weight.
    """
    t = torch.arange(1, sde.num_steps + 1, device=sde.theta_bar.device)
    var = sde.var(0, t)  # (T, 1)
    informative = (-0.5 * var.log() >= 0.01) | (t == 1)[:, None]
    weight = sde.between(t - 1, t) / var * informative
    return weight[:, 0].to(sde.dtype)


def debruijn_entropy(sde, a_0, eps_hat, noise):
    """H-hat (B,) in nats from the predicted noise eps_hat (B, A) at one diffusion time a row, noise.t uniform on 1..T.

    De Bruijn's identity for Eq. 1, dH(x_s)/ds = E||grad log p_s||^2 - A over s = theta_bar, with the score
    -E[eps | x_s] / std_s and a Gaussian end, on the grid: A/2 log(2 pi e) - sum_t w_t (||eps_hat||^2 - var_t A). A row
    has the term of its t times T, so that the mean over t is the sum.

    It is taken at noised *data* actions: of the data p's own predictor it is p's entropy (too large on a coarse grid).
    Of a policy q that has moved away it is 2 H(q) - CE(p, q) if both are Gaussian (and not exactly that of others),
    which also pulls q back.
    """
    A = eps_hat.shape[-1]
    _, var = sde.transition(0, noise.t)  # (B, 1)
    weight = sde.num_steps * entropy_weights(sde)[noise.t - 1]  # (B,)
    return A / 2 * math.log(2 * math.pi * math.e) - weight * (eps_hat**2 - var).sum(-1)


# For each variant: the policy's entropy (B,), and the factor by which alpha is multiplied in Eq. 15.
VARIANTS = {
    "paper": (paper_entropy, lambda entropy, lambda_, A: lambda_),  # alpha stands inside the bracket of Eq. 12
    "released": (released_entropy, lambda entropy, lambda_, A: 1 / entropy.abs().mean().detach()),
    "debruijn": (debruijn_entropy, lambda entropy, lambda_, A: 1 / A),  # nats a dimension, as L_diff is
}


def policy_loss(policy, critics, sde, batch: Batch, noise: Noise, q_data, args: Args) -> dict:
    """Eq. 15, with L_diff of `args.loss`: the "policy_loss", and its "diffusion_loss", "lcb" and "entropy".

    a^0-hat is Eq. 8 at the noised data action of L_diff, not a sample. Q sees it clamped to the bounds, so that
    components outside have no gradient, and only at times up to `q_time`; the entropy sees it unclamped. q_data (M, B),
    for lambda, is Q(s, a) of `critic_loss`, from before the Q update. Q's weights get no gradient.
    """
    x_t = sde.diffuse(batch.action, noise.t, noise.eps)  # Eq. 4
    eps_hat = policy(x_t, noise.t, batch.state)
    l_diff = LOSSES[args.loss](sde, batch.action, x_t, noise.t, noise.eps, eps_hat)
    a_0 = sde.predict_x0(x_t, noise.t, eps_hat)  # Eq. 8
    entropy_of, weight_of = VARIANTS[args.variant]
    entropy = entropy_of(sde, a_0, eps_hat, noise)  # (B,)
    q = critics(batch.state, a_0.clamp(-1, 1), frozen=True)  # (M, B)
    seen = noise.t <= (args.q_time or sde.num_steps)  # (B,)
    # A mean over the rows that Q sees: with q_time 3 of 5, a row's weight is 5/3 of the paper's.
    value = (pessimistic_value(q, args) * seen).sum() / seen.sum().clamp(min=1)
    scale = q if args.variant == "released" else pessimistic_value(q_data, args)
    lambda_ = args.eta / scale.abs().mean().detach()  # eta / E|Q(s, a)|, Q by Eq. 17; released: each Q_m at a^0-hat
    weight = args.entropy_coef * weight_of(entropy, lambda_, eps_hat.shape[-1])
    bonus = weight * entropy.mean() if args.entropy_coef else 0.0  # 0 times an infinite entropy would be NaN
    loss = l_diff - lambda_ * value - bonus  # Eq. 15
    measured = dict(diffusion_loss=l_diff, lcb=value, entropy=entropy.mean())
    return {"policy_loss": loss} | {name: term.detach() for name, term in measured.items()}


def critic_loss(critics, critics_target, batch: Batch, next_state, next_action, args: Args) -> dict:
    """Eq. 16, squared: "critic_loss", the mean over members and batch of (Q_m(s, a) - y_m)^2, and "q", Q(s, a) (M, B).

    next_action (C, B, A) holds C candidates for next_state (C, B, S); y_m takes the best by the target of member m (max
    Q-backup). Targets are independent, y_m from target m, or with pessimism "min" shared, the minimum over members.
    """
    with torch.no_grad():
        next_q = critics_target(next_state, next_action).amax(1)  # (M, C, B) -> (M, B)
        if args.pessimism == "min":
            next_q = next_q.amin(0, keepdim=True)  # (1, B)
        target = batch.reward + args.discount * (1 - batch.terminal) * next_q
    q = critics(batch.state, batch.action)  # (M, B)
    return {"critic_loss": ((q - target) ** 2).mean(), "q": q.detach()}


def lcb(q, beta: float = 4.0, unbiased: bool = False):
    """Eq. 17: mean - beta * standard deviation over the first axis, (M, ...) -> (...).

    The divisor is M (`unbiased`: M - 1, as the released code). One member has no deviation, and where all members agree
    the gradient of the deviation is taken as 0.
    """
    var = q.var(0, correction=int(unbiased and len(q) > 1))
    std = var.clamp(min=torch.finfo(q.dtype).tiny).sqrt()  # its gradient would be infinite at 0
    return q.mean(0) - beta * std


PESSIMISM = {"lcb": lcb, "min": lambda q, beta, unbiased: q.amin(0)}  # min: clipped double Q's value


def pessimistic_value(q, args: Args):
    """The ensemble's value (...) from q (M, ...), by `args.pessimism`."""
    return PESSIMISM[args.pessimism](q, args.lcb_coef, args.variant == "released")


# ==== 6. Algorithm 1 ==================================================================================================
METRICS = "critic_loss", "policy_loss", "diffusion_loss", "q", "lcb", "entropy"


class Agent:
    """What Algorithm 1 updates: the policy pi_phi and its EMA, the ensemble Q_psi and its targets, two optimisers."""

    PARTS = "policy", "critics", "policy_ema", "critics_target", "policy_optimizer", "critic_optimizer"

    def __init__(self, state_dim: int, action_dim: int, args: Args, device="cpu"):
        self.args = args
        self.sde = MeanRevertingSDE(args.num_diffusion_steps, args.schedule, device=device)
        bf16 = args.precision == "bf16"
        self.policy = NoiseNetwork(state_dim, action_dim, args.hidden).to(device)
        self.critics = QEnsemble(state_dim, action_dim, args.num_critics, args.hidden, bf16).to(device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critics_target = copy.deepcopy(self.critics).requires_grad_(False)
        options = dict(fused=True, capturable=torch.device(device).type == "cuda")
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.lr, **options)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=args.critic_lr, **options)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # on the device: a captured update counts too
        self.compiled = functools.cache(torch.compile) if args.compile else nn.Identity()

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {"updates": self.updates}

    def load_state_dict(self, state: dict):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.updates.copy_(state["updates"])


def update(agent: Agent, batch: Batch, noise: Noise) -> dict:
    """One iteration of Algorithm 1, in place. Returns the METRICS as tensors, without waiting for the device."""
    args, sde = agent.args, agent.sde
    # Ensemble-Q learning
    with torch.no_grad():
        next_state = batch.next_state.expand(noise.next_action.shape[1], -1, -1)  # (C, B, S)
        sample = agent.compiled(sample_actions)
        next_action = sample(agent.policy_ema, sde, next_state, noise.next_action, args.clip_denoised)  # (C, B, A)
    critic = agent.compiled(critic_loss)(agent.critics, agent.critics_target, batch, next_state, next_action, args)
    optimizer_step(critic["critic_loss"], agent.critics, agent.critic_optimizer, args.grad_norm)
    # Diffusion policy learning, against the updated Q
    q = critic["q"]
    policy = agent.compiled(policy_loss)(agent.policy, agent.critics, sde, batch, noise, q, args)
    optimizer_step(policy["policy_loss"], agent.policy, agent.policy_optimizer, args.grad_norm)
    # Target networks
    due = (agent.updates >= args.ema_start) & (agent.updates % args.ema_every == 0)
    soft_update(agent.policy_ema, agent.policy, due.double() * args.ema_rate)
    soft_update(agent.critics_target, agent.critics, args.target_rate)
    agent.updates += 1
    measured = critic | policy | {"q": q.mean()}
    return {name: value.detach() for name, value in measured.items()}


def optimizer_step(loss, module: nn.Module, optimizer, grad_norm: float):
    """One optimiser step on `loss`, the gradient of all of `module` clipped as one vector."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), grad_norm)
    optimizer.step()


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, rate):
    """target <- target + rate (source - target), parameter by parameter. rate is a float or a tensor of no axes."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, rate.to(old.dtype) if isinstance(rate, torch.Tensor) else rate)


def noise_buffers(args: Args, action_dim: int, device) -> Noise:
    """The tensors that `sample_noise` fills."""
    B, T = args.batch_size, args.num_diffusion_steps
    C = 10 if args.max_q_backup else 1
    t = torch.empty(B, dtype=torch.int64, device=device)
    eps, a_T = torch.empty(2, B, action_dim, device=device)
    next_action = torch.empty(T, C, B, action_dim, device=device)
    return Noise(t, eps, a_T, next_action)


def sample_noise(noise: Noise, generator: torch.Generator):
    """Fills the buffers with fresh values, in place, so that a captured update reads them too."""
    noise.t.random_(1, len(noise.next_action) + 1, generator=generator)
    for gaussian in (noise.eps, noise.a_T, noise.next_action):
        gaussian.normal_(generator=generator)


# #### The paper's mathematics ends here. Below: its tables, data, evaluation, training, the command line. #############
# ==== 7. Speed: for the compiler, and for one CUDA graph an update ====================================================
def mish(x):
    """x tanh(softplus(x)); for the compiler x n / (n + 2), n = e^x (e^x + 2): one exponential, not three functions."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = x.clamp(max=20).exp()  # beyond 20 the quotient is 1 to float64's precision
    n = e * (e + 2)
    return x * (n / (n + 2))


class Captured:
    """Runs a function without arguments, from the fourth call on by replaying one CUDA graph of it.

    The function must read and write the same tensors in place at every call, and must not wait for the device.
    """

    def __init__(self, function: Callable[[], None]):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()  # of the first calls and of the capture

    def __call__(self):
        self.calls += 1
        if self.calls <= 3:  # what is initialised on first use must not be captured, and wants a stream of its own
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.function()
        self.graph.replay()


def use_device(args: Args):
    """Sets for this process the GPU or the CPU's threads, and how products are computed; tries the compiler.

    "medium" sends a CPU's float32 products from MKL, which uses no AVX-512 on AMD and takes twice as long, to oneDNN.
    That may round factors to bfloat16, but only with AMX instructions or on ARM; elsewhere products stay float32.
    On a GPU all products are float32, or with --precision tf32 all TF32; with bf16 the ensemble's hidden products are
    bfloat16 and all others TF32. Raises UserError where torch.compile is asked for and does not work.
    """
    if args.device == "cpu":
        if args.hidden <= 64:
            torch.set_num_threads(1)  # in such small products more would only wait for each other
        exact = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
        torch.set_float32_matmul_precision("medium" if exact else "highest")
    else:
        warnings.filterwarnings("ignore", ".*capturable=True")  # of updates outside a graph: the first, or all
        torch.cuda.set_device(torch.device(args.device).index or 0)  # which "cuda" alone has not
        torch.set_float32_matmul_precision("highest" if args.precision == "float32" else "high")  # high: TF32
    if args.compile:
        torch.compiler.reset()  # what an earlier run in this process compiled was for its own settings
        say("compiling, which takes half a minute or more")
        with refusing("torch.compile does not work here, and --no-compile does without it", Exception):
            torch.compile(lambda x: x + 1)(torch.zeros(64, device=args.device))


# ==== 8. Settings and rows: Tables 1, 2 and 4 =========================================================================
class Domain(NamedTuple):
    """What the rows of a domain share: Table 4's settings, how their data are read and their episodes played."""

    settings: dict  # Table 4's line and Section 4.1, where they differ from Args
    reward: Callable = lambda reward: reward  # the data's rewards (N,) -> the critics'
    part: str | None = None  # the part of an observation that the policy sees; None: all of it
    goal_ends: bool = False  # an episode of the data ends, terminal, at its first reward
    env: dict = {}  # arguments that make the environment play by D4RL's rule
    over: Callable = lambda state: False  # states that end an episode in D4RL, but not in this environment


def sparse_reward(reward):
    if not np.isin(reward, (0, 1)).all():
        raise ValueError("AntMaze's rows learn from rewards of 0 and 1, but these are dense: give a sparse data set")
    return 4 * (reward - 0.5)


TOY = dict(lr=1e-3, critic_lr=2e-3, hidden=64, eta=3.0, num_critics=8, batch_size=64, num_steps=4000, eval_every=400)
LIKELIHOOD = dict(loss="likelihood", clip_denoised=False)
KITCHEN = dict(terminate_on_tasks_completed=True, remove_task_when_completed=True)
DOMAINS = {
    "toy": Domain(TOY),
    "own": Domain({}),
    "gym": Domain(LIKELIHOOD | dict(num_steps=2_000_000, eval_episodes=10)),
    "antmaze": Domain(dict(eta=2.0, max_q_backup=True), sparse_reward, goal_ends=True, env=dict(continuing_task=False)),
    "adroit": Domain(
        dict(lr=3e-5, eta=0.1, grad_norm=8.0),
        reward=lambda reward: (reward - reward.mean()) / (reward.std() or 1),
        # The pen was dropped: D4RL at 89141a689b, hand_manipulation_suite/pen_v0.py:85-87, and what state 26 is in
        # Gymnasium-Robotics at df28ecdb8e, envs/adroit_hand/adroit_pen.py:105
        over=lambda state: len(state) > 26 and state[26] < 0.075,
    ),
    "kitchen": Domain(LIKELIHOOD | dict(eta=0.005, grad_norm=10.0), part="observation", env=KITCHEN),
}


class ToyEnv(gym.Env):
    """Figure 1: from 0, two steps in [-1, 1] along a line; each pays the reward of the state that it reaches."""

    observation_space = gym.spaces.Box(-2, 2, (2,))  # (position, steps taken)
    action_space = gym.spaces.Box(-1, 1, (1,))

    @staticmethod
    def reward(x):
        """A mixture of Gaussians: a low hill on the left, where most of the data is, and a high one on the right."""
        low = np.exp(-0.5 * ((x + 0.9) / 0.4) ** 2)
        high = np.exp(-0.5 * ((x - 0.9) / 0.4) ** 2)
        return low + 3 * high

    def reset(self, *, seed=None, options=None):
        self.state = np.zeros(2, np.float32)
        return self.state, {}

    def step(self, action):
        self.state = self.state + np.array([action[0], 1], np.float32)
        position, steps = self.state
        reward = float(self.reward(position))
        return self.state, reward, bool(steps == 2), False, {}


class Row(NamedTuple):
    """A row of Table 1 or 2, the toy, or one's own data: domain and data, and how D4RL plays and scores it."""

    domain: str
    dataset: str | None  # a Minari id with its version, or D4RL's file; None: --dataset names it
    env: str | None  # for evaluation, as --eval-env; None: the one that the data name
    max_steps: int | None  # of an episode; None: the environment's own limit
    ref_min: float  # returns of score 0 and 100
    ref_max: float


# Returns of score 0 and 100: D4RL at 89141a689b, d4rl/infos.py:106-253
ROBOTS = {
    "halfcheetah": ("HalfCheetah-v4", 1000, -280.178953, 12135.0),
    "hopper": ("Hopper-v4", 1000, -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1000, 1.629008, 4592.3),
}
MODULE = Path(globals().get("__file__", "erdp")).stem  # this file's, also of a copy; a notebook has none
ROWS = {"toy": Row("toy", "toy-5", f"{MODULE}:ToyEnv", 2, 0.0, 6.000080130594786)}  # 100: two steps, of 2,001 the best
for level in ("medium", "medium-replay", "medium-expert"):
    for robot, rule in ROBOTS.items():
        ROWS[f"{robot}-{level}-v2"] = Row("gym", f"{robot}_{level.replace('-', '_')}-v2.hdf5", *rule)
for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    steps = 700 if maze.startswith("umaze") else 1000
    ROWS[f"antmaze-{maze}-v0"] = Row("antmaze", f"D4RL/antmaze/{maze}-v1", None, steps, 0.0, 1.0)
for level in ("human", "cloned"):
    ROWS[f"pen-{level}-v1"] = Row("adroit", f"D4RL/pen/{level}-v2", None, 100, 96.262799, 3076.8331017826877)
for level in ("complete", "partial", "mixed"):
    ROWS[f"kitchen-{level}-v0"] = Row("kitchen", f"D4RL/kitchen/{level}-v2", None, 280, 0.0, 4.0)
ROWS["own"] = Row("own", None, None, None, 0.0, 100.0)


def preset(env: str, variant: str = "paper", device: str = "") -> Args:
    """The paper's settings for `env`, on `device` or this machine's own."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fast = {} if device == "cpu" else dict(compile=True, precision="tf32")
    args = Args(env=env, device=device, **DOMAINS[ROWS[env].domain].settings | fast)
    args.variant = variant  # not above, where Table 4's likelihood loss, which a user may replace, would be refused
    if variant == "debruijn":
        args.entropy_coef = 0.03  # chosen on the toy with 20% of good steps (entropy.md)
    if env == "antmaze-umaze-v0":  # the asterisk in Table 4
        args.max_q_backup = False
    return args


def check_settings(args: Args):
    """Raises ValueError where a number, or two settings together, cannot be used on any machine."""
    least = dict(seed=0, ema_start=0, lr=1e-12, critic_lr=1e-12, grad_norm=1e-12)
    least["num_diffusion_steps"] = 2 + (args.variant == "released")  # whose entropy term needs t = 2 < T
    most = dict(q_time=args.num_diffusion_steps, discount=1, target_rate=1, ema_rate=1, seed=2**63 - 1)
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        if isinstance(value, int | float):
            low = least.get(name, 1 if field.type.startswith("int") else 0)
            high = most.get(name, math.inf)
            if not low <= value <= high or value == math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {value} but must be from {low} to {high}")
    if args.precision == "tf32" and args.device == "cpu":
        raise ValueError("--precision tf32 is CUDA's: give float32 or bf16 with --device cpu")
    if args.variant == "debruijn" and args.loss == "likelihood":
        raise ValueError("--variant debruijn needs E[eps | x_t]: give it --loss noise or --loss posterior")


# ==== 9. Data: episodes from any source, and from those a Task and a Batch ============================================
D4RL_SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
HDF5 = ".hdf5", ".h5"  # endings of a D4RL file
say = tqdm.write  # a line, above the progress bar if there is one


class UserError(Exception):
    """A problem that its reader can solve: the one sentence goes to stderr, and the program ends with status 2."""


@contextlib.contextmanager
def refusing(problem: str, *also: type[Exception]):
    """Turns a ValueError, an OSError or one of `also` into a UserError, which names the problem and its reason.

    Any other exception is a mistake of ours, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, *also) as error:
        full = isinstance(error.__context__, OSError)  # a full disk, say, and not what PyTorch made of it
        reason = str(error.__context__ if full else error).strip() or type(error).__name__
        raise UserError(f"{problem}: {reason.splitlines()[0][:300]}") from error


def toy_episodes(seed: int, share: float = 0.05, episodes: int = 256) -> list[minari.EpisodeData]:
    """Unbalanced two-step episodes: steps, but for a `share` of them, drift to the left, away from the high reward."""
    rng = np.random.default_rng(seed)
    away = rng.random((episodes, 2)) < 1 - share
    mean = np.where(away, -0.3, 0.5)
    action = rng.normal(mean, 0.4).clip(-1, 1)  # (E, 2)
    position = np.insert(action.cumsum(1), 0, 0, axis=1)  # (E, 3)
    steps = np.broadcast_to(np.arange(3), position.shape)
    state = np.stack([position, steps], -1)  # (E, 3, 2)
    reward = ToyEnv.reward(position[:, 1:])  # (E, 2)
    terminal = np.tile([0.0, 1.0], (episodes, 1))
    columns = state, action[..., None], reward, terminal, 0 * terminal
    return [minari.EpisodeData(number, *each, infos={}) for number, each in enumerate(zip(*columns))]


def hdf5_episodes(path: Path) -> list[minari.EpisodeData]:
    """The episodes of a file in D4RL's layout. As there, row i is paired with row i + 1, but for timeouts and the last.

    Of an episode that ends by a timeout, or with the file, the state after its last step is not known: it has n
    observations for n steps, and others n + 1.
    """
    keys = "observations", "actions", "rewards", "terminals", "timeouts"
    with refusing(f"{path} is not in D4RL's layout of {', '.join(keys)}", KeyError, TypeError), h5py.File(path) as file:
        state, action, reward, terminal, timeout = columns = [file[key][()] for key in keys]
        n = len(reward)
        flat = reward.shape == terminal.shape == timeout.shape == (n,)
        if not flat or not len(state) == len(action) == n > 0:
            raise ValueError(f"these have the shapes {', '.join(str(column.shape) for column in columns)}")
    ends = np.union1d(np.flatnonzero((terminal != 0) | (timeout != 0)) + 1, n)
    episodes = []
    for first, end in zip([0, *ends], ends):
        steps = slice(first, end)
        states = state[first : end if timeout[end - 1] else end + 1]
        columns = action[steps], reward[steps], terminal[steps], timeout[steps]
        episodes.append(minari.EpisodeData(len(episodes), states, *columns, infos={}))
    return episodes


def read_data(args: Args):
    """The episodes of --dataset or of the row's own data: a list, or a Minari set, which knows its environment."""
    row = ROWS[args.env]
    name = args.dataset or row.dataset or ""
    if row.domain == "toy":
        if not (share := re.fullmatch(r"toy-(\d\d?)", name)):
            raise ValueError("the toy's data are called toy-0 to toy-99")
        return toy_episodes(args.seed, int(share[1]) / 100)
    if name.endswith(HDF5):
        return hdf5_episodes(Path(os.path.expanduser(name)) if args.dataset else fetch_d4rl(name))
    if not re.search(r"-v\d+$", name):
        raise ValueError("--dataset must name an .hdf5 file, or a Minari id with its version, as D4RL/pen/human-v2")
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # no word of each of its attempts
    folder = minari.storage.get_dataset_path()
    with contextlib.ExitStack() as stack:  # of many that start at once, one downloads and the others wait
        with contextlib.suppress(OSError):  # of a folder or a lock of others', where the data may well be
            stack.enter_context(filelock.FileLock(folder / ".erdp.lock", mode=0o666))
        problem = f"{name} is in {folder}, but cannot be read (if it is damaged or cut off, delete it there)"
        if not (folder / name).exists():
            say(f"{name} is not in {folder}: looking for it on Minari's server")
            problem = f"{name} cannot be downloaded, and is not in {folder}"
        with refusing(problem, Exception):
            return minari.load_dataset(name, download=True)


def fetch_d4rl(name: str) -> Path:
    """The path of a file of D4RL's, which is downloaded at first use."""
    folder = Path(os.path.expanduser(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")))
    if not (folder / name).exists():
        pooch.get_logger().setLevel("WARNING")
        problem = f"{name} cannot be downloaded, fetch it by hand and save it in {folder}"
        with refusing(problem, Exception), filelock.FileLock(folder / f".{name}.lock"):
            pooch.retrieve(D4RL_SERVER + name, None, name, folder, progressbar=sys.stderr.isatty())
    return folder / name


def register_robots():
    """Makes Gymnasium-Robotics' environments known to Gymnasium, and those in modules of the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    gym.logger.min_level = gym.logger.ERROR  # no word of a version newer than `-v4`
    with contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics  # noqa: F401 (which registers them)


def describe_env(args: Args, data=None) -> tuple[EnvSpec, dict]:
    """The environment of --eval-env, else the row's, else the one that the Minari set `data` names, by D4RL's rule.

    Returns its specification, and the layout of what the policy sees and the actions' bounds. Raises ValueError or
    UserError where it cannot be made, or no policy could act in it.
    """
    row = ROWS[args.env]
    domain = DOMAINS[row.domain]
    if row.domain != "toy" or args.eval_env:
        register_robots()
    name = args.eval_env or row.env
    recorded = getattr(data, "env_spec", None) or getattr(data, "_eval_env_spec", None)  # a set may name either
    if name is None and recorded is None:
        raise ValueError("it names no environment: give --eval-env ID, or with a D4RL file a Gym row's --env")
    with refusing(f"the environment {name or recorded.id} cannot be made", Exception):
        options = dict(disable_env_checker=True, max_episode_steps=row.max_steps, **domain.env)
        if name and re.search(r":\w+$", name):  # module:Class
            name = EnvSpec(f"{name.rpartition(':')[2]}-v0", entry_point=name)
        env = gym.make(name, **options) if name else data.recover_environment(eval_env=True, **options)
    env.close()
    spec, space, actions = env.spec, env.observation_space, env.action_space
    if domain.goal_ends and data is not None:
        spec.kwargs["maze_map"] = same_walls(spec, recorded)
    if any(wrapper.name.startswith("Normalize") for wrapper in spec.additional_wrappers):
        raise ValueError(f"{spec.id} has a wrapper with running statistics, which a policy's file cannot keep")
    if name:  # wrappers that its entry point adds it will add again
        spec.additional_wrappers = (name if isinstance(name, EnvSpec) else gym.spec(spec.id)).additional_wrappers
    if domain.part:
        if domain.part not in getattr(space, "spaces", ()):
            raise ValueError(f"{spec.id} observes {space}, without the part {domain.part!r} that its policies see")
        space = gym.spaces.Dict({domain.part: space[domain.part]})
    box = isinstance(actions, gym.spaces.Box) and actions.dtype.kind == "f"
    width = actions.high.astype(float) - actions.low if box else np.zeros(1)
    if not ((width > 0) & (width < 1e6)).all():  # farther apart, float32 would hardly tell actions apart
        raise ValueError(f"{spec.id} has the actions {actions}, not a Box of floats with 0 < high - low < 1e6")
    if recorded:
        say_differences(recorded, spec)
    bounds = dict(low=actions.low.tolist(), high=actions.high.tolist(), dtype=actions.dtype.name)
    return spec, dict(layout=layout(space), **bounds)


def same_walls(spec: EnvSpec, recorded: EnvSpec | None) -> list:
    """The maze to evaluate in: the spec's, mirrored if the data were recorded between mirrored walls (Minari 304)."""
    if recorded is None:
        raise ValueError("AntMaze's rows need a Minari set, as a file does not say in which maze it was recorded")
    with refusing("AntMaze's data must be recorded in a maze", KeyError, AttributeError, gym.error.Error):
        maps = [each.kwargs.get("maze_map") or gym.spec(each.id).kwargs["maze_map"] for each in (spec, recorded)]
    maze, theirs = (np.array(each, object) for each in maps)
    for possible in (maze, maze[:, ::-1], maze[::-1]):
        if np.array_equal(possible == 1, theirs == 1):
            if possible is not maze:
                say(f"the walls of {spec.id} are mirrored here, to match those of the data")
            return possible.tolist()
    raise ValueError("the data were recorded in another maze")


def say_differences(recorded: EnvSpec, spec: EnvSpec):
    """Says in one line where the environment of the evaluation differs from the data's."""
    about = [json.loads(as_json(each)) for each in (recorded, spec)]
    about = [x | dict(wrappers=[wrapper["name"] for wrapper in x["additional_wrappers"]]) for x in about]
    theirs, ours = ({name: x[name] for name in ("id", "max_episode_steps", "wrappers")} | x["kwargs"] for x in about)
    pairs = {name: (theirs.get(name, "its default"), ours.get(name, "its default")) for name in theirs | ours}
    words = [f"{name} {str(a)[:30]} / {str(b)[:30]}" for name, (a, b) in pairs.items() if a != b]
    if words:
        say(f"the data were recorded / are evaluated with {', '.join(words)}")


def layout(space: gym.Space):
    """How an observation is flattened: the shape of a Box, or the layouts of a Dict's parts."""
    if isinstance(space, gym.spaces.Dict):
        return {key: layout(space[key]) for key in sorted(space)}
    if not isinstance(space, gym.spaces.Box) or (space.dtype == np.uint8 and len(space.shape) > 1):
        raise ValueError(f"observations must be Boxes, but no images, or Dicts of them, not {space}")
    return list(space.shape)


def size(shapes) -> int:
    """The number of values that observations of the layout `shapes` are flattened to."""
    return sum(map(size, shapes.values())) if isinstance(shapes, dict) else math.prod(shapes)


def flatten(shapes, observation) -> np.ndarray:
    """Observations (..., *shape), or nested dicts of them, as (..., S) float32 in the order of the layout `shapes`."""
    if isinstance(shapes, dict):
        if missing := sorted(shapes.keys() - (observation if isinstance(observation, dict) else {})):
            raise ValueError(f"an observation lacks the parts {', '.join(missing)}")
        return np.concatenate([flatten(part, observation[key]) for key, part in shapes.items()], -1)
    if isinstance(observation, dict):
        raise ValueError(f"an observation has the parts {', '.join(observation)}, but is to be of the shape {shapes}")
    array = np.asarray(observation, np.float32)
    return array.reshape(*array.shape[: array.ndim - len(shapes)], -1)


@dataclasses.dataclass
class Task:
    """What a policy plays and how its returns are scored, in plain values, as they are saved beside its weights."""

    domain: str  # a key of DOMAINS
    dataset_id: str
    transitions: int
    data_checksum: int
    data_episodes: int
    data_return: float  # mean over the data's own episodes, by this row's rule
    spec: str  # the environment's specification as JSON
    layout: dict | list  # of what the policy sees
    low: list  # bounds of an action, in its shape
    high: list
    dtype: str  # of an action
    ref_min: float  # returns of score 0 and 100
    ref_max: float

    def score(self, returns):
        """D4RL's normalised score."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


def as_json(spec: EnvSpec) -> str:
    with refusing(f"{spec.id} cannot be kept in a policy's file, as its arguments are not plain", TypeError):
        spec.kwargs.pop("render_mode", None)  # nothing is rendered
        return spec.to_json()


@np.errstate(over="ignore")  # what float32 cannot hold is refused below
def load_data(args: Args) -> tuple[Task, Batch]:
    """The task that --env and --dataset name, and its data as float32 tensors, with actions in [-1, 1]."""
    row = ROWS[args.env]
    domain = DOMAINS[row.domain]
    data, dataset_id = read_data(args), args.dataset or row.dataset
    spec, about = describe_env(args, data)
    state_dim, shape = size(about["layout"]), np.shape(about["low"])
    episodes, rewards, ended = [], [], []
    for number in tqdm(range(len(data)), "reading episodes", delay=3, leave=False, disable=None):
        with refusing(f"an episode of {dataset_id} cannot be read (if it is damaged or cut off, delete it)", Exception):
            episode = data[number]
        state = flatten(about["layout"], episode.observations)
        columns = episode.actions, episode.rewards, episode.terminations, episode.truncations
        action, reward, terminal, truncated = (np.array(column, float) for column in columns)
        n = len(reward)
        found = state.shape, action.shape, reward.shape, terminal.shape
        wanted = (n + 1, state_dim), (n, *shape), (n,), (n,)
        if found not in (wanted, ((n, state_dim), *wanted[1:])):
            names = "observations, actions, rewards and terminations"
            raise ValueError(f"the {names} of episode {number} are {found}, not {wanted} as in {spec.id}")
        if not np.isin(terminal, (0, 1)).all():
            raise ValueError(f"the terminations of episode {number} are not all 0 or 1")
        ended.append(terminal[-1:].any() or truncated[-1:].any())
        if domain.goal_ends and (reward > 0).any():
            n = int(np.argmax(reward > 0)) + 1
            terminal[n - 1] = 1
        if len(state) == len(reward) and terminal[-1:].any() and not isinstance(data, list):
            state = np.concatenate([state, state[-1:]])  # Q's target ignores the state after a terminal step
        steps = slice(min(n, len(state) - 1))  # those whose next state is known
        episodes.append(Batch(state[steps], action[steps], reward[steps], state[1:][steps], terminal[steps]))
        over = [step for step in range(1, n) if domain.over(state[step])]
        rewards.append(reward[: min(over, default=n)])  # in the data's own return, none after D4RL's end of an episode
    if not any(len(episode.reward) for episode in episodes):
        raise ValueError("it holds no transition")
    batch = Batch(*map(np.concatenate, zip(*episodes)))
    low, high = np.array([about["low"], about["high"]])  # in an action's shape, as the data have them until here
    action = 2 * (batch.action - low) / (high - low) - 1
    action = action.reshape(len(action), low.size)
    if outside := (np.abs(action) > 1 + 1e-3).any(1).sum():
        most = max((low - batch.action).max(), (batch.action - high).max())
        problem = f"{outside} of its {len(action)} actions are outside the bounds of {spec.id}, by up to {most:.4g}"
        raise ValueError(f"{problem}: clip them in the data, if they are meant to be there")
    batch = batch._replace(action=action.clip(-1, 1), reward=domain.reward(batch.reward))
    columns = [np.ascontiguousarray(column, np.float32) for column in batch]
    for name, column in [*zip(Batch._fields, columns), ("reward", np.concatenate(rewards))]:
        if not np.isfinite(column).all():
            raise ValueError(f"NaN or infinity among its {name} values")
    if spec.max_episode_steps is None:
        spec.max_episode_steps = max(map(len, rewards))
        say(f"{spec.id} has no time limit: its episodes are cut after {spec.max_episode_steps} steps")
    returns = [reward[: spec.max_episode_steps].sum() for reward in rewards]
    own = [value for value, whole in zip(returns, ended) if whole] or returns  # a file may end within an episode
    known = data.storage.metadata if args.env == "own" and not isinstance(data, list) else {}
    ref_min, ref_max = (float(known.get(f"{name}_score", getattr(row, name))) for name in ("ref_min", "ref_max"))
    if not ref_min < ref_max:
        raise ValueError(f"its reference scores are {ref_min} and {ref_max}, but must ascend")
    about |= dict(domain=row.domain, dataset_id=dataset_id, spec=as_json(spec), ref_min=ref_min, ref_max=ref_max)
    about |= dict(transitions=len(action), data_episodes=len(own), data_return=float(np.mean(own)))
    about["data_checksum"] = functools.reduce(lambda crc, column: zlib.crc32(column, crc), columns, 0)
    return Task(**about), Batch(*map(torch.as_tensor, columns))


# ==== 10. Acting and evaluation =======================================================================================
class Actor:
    """The policy as it acts: of `args.eval_candidates` samples, one drawn by softmax over their pessimistic value."""

    def __init__(self, agent: Agent, parts, low, high, dtype="float32"):
        self.agent, self.layout, self.dtype = agent, parts, dtype
        self.low, self.high = np.array([low, high], float)  # the actions' bounds, in their shape

    @torch.no_grad()
    def __call__(self, observation, generator=None) -> np.ndarray:
        """Flat states (N, S), or dicts as the environment has them -> actions (N, ...) within the environment's bounds.

        One observation, flat or in its own shape, gives one action. `generator` is NumPy's, for all states, or a list
        of one each. Raises ValueError where an observation has another size than the policy's.
        """
        if isinstance(observation, dict) or list(np.shape(observation)) == self.layout:
            observation = flatten(self.layout, observation)
        state = np.asarray(observation, np.float32)
        if state.ndim not in (1, 2) or state.shape[-1] != size(self.layout):
            raise ValueError(f"states have {size(self.layout)} numbers here, but these are of shape {state.shape}")
        agent, args = self.agent, self.agent.args
        device = agent.sde.theta_bar.device
        T, C, A = agent.sde.num_steps, args.eval_candidates, self.low.size
        states = torch.as_tensor(np.atleast_2d(state), device=device)
        streams = generator if isinstance(generator, list) else [np.random.default_rng(generator)] * len(states)
        noise = [stream.standard_normal((T, C, A), np.float32) for stream in streams]
        noise = torch.as_tensor(np.stack(noise, 1), device=device)  # (T, N, C, A)
        u = [[stream.random() if C > 1 else 0.0] for stream in streams]
        u = torch.tensor(u, dtype=torch.float64, device=device)
        action = agent.compiled(act)(agent.policy, agent.critics_target, agent.sde, states, noise, u, args)  # (N, A)
        action = action.double().cpu().numpy().reshape(-1, *self.low.shape)
        action = self.low + (action + 1) / 2 * (self.high - self.low)
        action = action.clip(self.low, self.high).astype(self.dtype)
        return action[0] if state.ndim == 1 else action


class OneEpisode(gym.Wrapper):
    """Observes flat states, and tells in `info` what its episode has come to. After its end it waits for a reset."""

    def __init__(self, env: gym.Env, task: Task):
        super().__init__(env)
        self.layout, self.over = task.layout, DOMAINS[task.domain].over
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size(task.layout),))

    def reset(self, *, seed=None, options=None):
        if multiprocessing.parent_process():  # in a worker, for environments that draw from global generators
            for set_seed in (random.seed, np.random.seed, torch.manual_seed):
                set_seed(seed)
        observation, _ = self.env.reset(seed=seed, options=options)
        self.state = flatten(self.layout, observation)
        self.so_far = {"return": 0.0, "success": np.nan, "length": 0, "ended": False}
        return self.state, {}

    def step(self, action):
        so_far = self.so_far
        if not so_far["ended"]:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.state = flatten(self.layout, observation)
            so_far["return"] += np.asarray(reward, float).item()
            known = [np.asarray(info[name]) for name in ("success", "is_success") if name in info]
            known = [value.item() for value in known if value.size == 1 and value.dtype.kind in "biuf"]
            so_far["success"] = np.fmax(so_far["success"], known[0] if known else np.nan)
            so_far["length"] += 1
            so_far["ended"] = bool(terminated or truncated or self.over(self.state))
        return self.state, 0.0, False, False, so_far


@contextlib.contextmanager
def playing(task: Task, episodes: int, num_envs: int | None = None):
    """Yields environments that step together in worker processes, by default two a thread and at most one an episode.

    The toy's step in this process. Ends all of them. Raises UserError where one cannot be made, or a process has died.
    """
    main_process = os.getpid()

    def make():
        if os.getpid() != main_process:  # in a worker: Ctrl-C is the main process's business
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            torch.set_num_threads(1)  # a fork has no other threads, and an environment's torch would wait for them
        return OneEpisode(gym.make(EnvSpec.from_json(task.spec), disable_env_checker=True), task)

    makers = [make] * min(episodes, num_envs or 2 * torch.get_num_threads())
    with refusing("the evaluation's environments cannot be made, others can be named by --eval-env", Exception):
        if task.domain != "toy":
            register_robots()
        if task.domain == "toy" or multiprocessing.current_process().daemon:  # which may have no children
            envs = gym.vector.SyncVectorEnv(makers)
        else:  # on Linux by fork: a worker starts at once, and touches neither GPU nor threads
            envs = gym.vector.AsyncVectorEnv(makers, context="fork" if sys.platform == "linux" else None)
    try:
        if task.domain != "toy":
            with refusing("a step in the evaluation's environment fails, others can be named by --eval-env", Exception):
                envs.reset(seed=0)
                envs.step(envs.action_space.sample())
        yield envs
        with contextlib.suppress(EOFError, ConnectionError):  # of a worker that a signal to all has ended first
            envs.close()
    except (EOFError, ConnectionError) as error:  # of a pipe whose other end is gone
        time.sleep(0.1)  # until it counts as dead
        if all(process.is_alive() for process in getattr(envs, "processes", ())):
            raise  # of another pipe
        problem = "a process of the evaluation has died, most often for want of memory"
        raise UserError(f"{problem}: --resume goes on from what was saved before it") from error
    finally:
        envs.closed = True
        for process in getattr(envs, "processes", ()):
            process.kill()
            process.join()


def evaluate(actor: Actor, envs, episodes: int, seed: int, stops=()) -> dict | None:
    """Plays `episodes` episodes: their return, success (NaN where the environment has none), length; None if stopped.

    Episode e has its own seed and random stream, whichever environment plays it: neither the number of environments
    nor anything in training changes the result, but for rounding, which depends on how many states act together.
    """
    K = envs.num_envs
    played = []
    with tqdm(total=episodes, desc=f"evaluating {episodes} episodes", leave=False, disable=None) as bar:
        for first in range(0, episodes, K):  # K episodes at a time
            wave = np.arange(first, first + K)
            sources = [np.random.SeedSequence((seed, e)) for e in wave]
            streams = [np.random.default_rng(source) for source in sources]
            seeds = [int(source.generate_state(1)[0]) for source in sources]
            state, _ = envs.reset(seed=seeds)
            alive = wave < episodes
            while alive.any():
                if stops:  # which a signal fills
                    return None
                action = actor(state, streams).reshape(envs.action_space.shape)  # also where an episode has ended
                state, _, _, _, info = envs.step(action)
                bar.update(int((alive & info["ended"]).sum()))
                alive &= ~info["ended"]
            played.append([info["return"], info["success"], info["length"]])
    returns, success, length = np.concatenate(played, 1)[:, :episodes]
    if not (finite := np.isfinite(returns)).all():
        problem = f"episode {finite.argmin()} of the evaluation has a return of NaN or infinity"
        raise FloatingPointError(f"{problem}: its environment is unstable; the checkpoint before it stands")
    return {"return": returns, "success": success, "length": length}


def summary(task: Task, result: dict) -> dict:
    """The evaluation's part of a row of metrics.csv: means and standard deviations over episodes."""
    returns, scores, success = result["return"], task.score(result["return"]), result["success"]
    row = dict(return_mean=returns.mean(), return_std=returns.std(), score_mean=scores.mean(), score_std=scores.std())
    row |= dict(success=np.nan_to_num(success).mean(), length=result["length"].mean())
    row = {name: float(value) for name, value in row.items()}
    return row | dict(success=None) if np.isnan(success).all() else row  # said by none, or by some


def in_words(row: dict) -> str:
    words = "score {score_mean:.1f} ± {score_std:.1f}, return {return_mean:.2f} ± {return_std:.2f}, length {length:.0f}"
    success = "" if row["success"] is None else ", success {success:.0%}"
    return (words + success).format(**row)


# ==== 11. Training, and the folder that a run leaves ==================================================================
FORMAT = 3  # of the files below
ACTING = "policy", "critics_target"  # what a policy.pt has of an agent
SAVE_EVERY = 600  # seconds after a checkpoint when the next reading of the losses saves again
LOG_EVERY = 100  # updates between two readings of the losses


def run_folder(args: Args) -> Path:
    name = args.dataset or "own" if args.env == "own" else args.env
    default = f"runs/{name.replace('/', '-').lstrip('.-')}__{args.variant}__{args.seed}"
    return Path(os.path.expanduser(args.run_dir or default))


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w"):
    """Opens another file, which takes the name `path` when it is written, so that `path` is whole or as it was."""
    unfinished = path.with_name(".part-" + path.name)
    with refusing(f"{path} cannot be written, and is as it was: make room, then --resume", RuntimeError):
        try:
            with open(unfinished, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def load_file(path) -> dict:
    """What a policy.pt or checkpoint.pt of this version holds. Raises UserError where it is not a whole one."""
    with refusing(f"{path} is no policy or checkpoint of this program, or not whole", Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError("another version of this program made it, which can read it")
        return saved | dict(args=Args(**saved["args"]), task=Task(**saved["task"]))


def load_policy(path, device="cpu", **settings) -> Actor:
    """The Actor of a run's policy.pt or checkpoint.pt: not compiled and in float32, unless `settings` of Args say more.

    Raises UserError where the file is not a whole one, or its weights do not fit the settings.
    """
    saved = load_file(path)
    task = saved["task"]
    args = dataclasses.replace(saved["args"], **dict(device=device, compile=False, precision="float32") | settings)
    agent = Agent(size(task.layout), np.size(task.low), args, device)
    with refusing(f"{path} is damaged, or its weights do not fit the settings", KeyError, RuntimeError):
        for name in ACTING:
            getattr(agent, name).load_state_dict(saved["agent"][name])
    return Actor(agent, task.layout, task.low, task.high, task.dtype)


@contextlib.contextmanager
def interruptible():
    """Yields a list that SIGINT or SIGTERM fills, to be looked at between updates. A later signal ends the program.

    The signal may reach a compiler or a worker too: what fails because of that ends the program without a traceback.
    Python hands signals to its main thread alone: in another thread, as in a sweep's agent, the list stays empty.
    """
    stops, times = [], []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def stop(number, _):
        stops.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > 1:  # sooner it may be the same one, from a scheduler and from run_all.sh
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stops
    except Exception as error:
        if isinstance(error, EOFError | ConnectionError):  # of a worker that is gone
            time.sleep(1)  # a scheduler's signal to all processes may reach this one last
        if not stops or isinstance(error, FloatingPointError | UserError):  # of a loss, of a full disk
            raise
        say("stopped within a step: --resume goes on from what was saved before it")
        sys.exit(128 + stops[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """A run of Algorithm 1: the agent, its data, how far it is, and what it leaves in its folder."""

    def __init__(self, args: Args, task: Task, data: Batch, folder: Path):
        device, A = args.device, data.action.shape[1]
        self.args, self.task, self.folder = args, task, folder
        self.data = Batch(*(column.to(device) for column in data))
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.agent = Agent(size(task.layout), A, args, device)
        self.actor = Actor(self.agent, task.layout, task.low, task.high, task.dtype)
        self.rows = torch.empty(args.batch_size, dtype=torch.int64, device=device)  # of the data, for one update
        self.noise = noise_buffers(args, A, device)
        self.latest = torch.zeros(len(METRICS), device=device)  # metrics of the last update
        self.totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)  # the last: of so many updates
        self.step = 0
        self.evaluations = []  # the lines of metrics.csv
        self.began = self.saved = time.monotonic()

    def learn(self):
        """One update on `rows` and `noise`, all of it on the device."""
        batch = Batch(*(column[self.rows] for column in self.data))
        measured = update(self.agent, batch, self.noise)
        self.latest.copy_(torch.stack([measured[name] for name in METRICS]))
        self.totals[:-1] += self.latest
        self.totals[-1] += 1

    def losses(self) -> dict:
        """The last update's, for which it waits. Raises FloatingPointError at a NaN, which is never saved."""
        numbers = self.totals, *self.agent.policy.parameters(), *self.agent.critics.parameters()
        finite = torch.stack([x.isfinite().all() for x in numbers]).all()
        *losses, finite = torch.cat([self.latest, finite[None]]).tolist()
        if not finite:
            good = f"{self.folder / 'checkpoint.pt'} is the last good checkpoint"
            raise FloatingPointError(f"a loss is NaN or infinite at or just before update {self.step}: {good}")
        return dict(zip(METRICS, losses))

    def evaluation_due(self) -> bool:
        """Whether the policy of this step is to be evaluated and has not been."""
        evaluated = self.evaluations[-1]["step"] if self.evaluations else 0
        at_end = self.step >= self.args.num_steps
        return self.step > evaluated and (at_end or self.step % self.args.eval_every == 0)

    def write(self, name: str, **content):
        """A file that `load_file` reads: `content`, and what a policy needs to be evaluated without the data."""
        with whole_file(self.folder / name, "wb") as file:
            torch.save(dict(format=FORMAT, args=vars(self.args), task=vars(self.task)) | content, file)

    def save(self):
        """The checkpoint: all that the rest of the run depends on."""
        state = dict(step=self.step, seconds=time.monotonic() - self.began, evaluations=self.evaluations)
        state |= dict(totals=self.totals, generator=self.generator.get_state(), agent=self.agent.state_dict())
        self.write("checkpoint.pt", **state)
        self.saved = time.monotonic()

    def restore(self):
        """Takes up the checkpoint. Raises UserError where it is damaged, or of other data or another kind of device."""
        path = self.folder / "checkpoint.pt"
        saved = load_file(path)
        if saved["task"].data_checksum != self.task.data_checksum:
            raise UserError(f"{path} was made from other data than these: give those of {saved['task'].dataset_id}")
        same_run(saved["args"], self.args, path)
        there = saved["args"].device
        if torch.device(there).type != self.generator.device.type:
            raise UserError(f"{path} was made on {there}, and goes on there alone; --eval-only evaluates it anywhere")
        with refusing(f"{path} is damaged, or of a program that was changed", KeyError, RuntimeError):
            self.agent.load_state_dict(saved["agent"])
            self.generator.set_state(saved["generator"])
            self.totals.copy_(saved["totals"])
            self.step, self.evaluations = saved["step"], saved["evaluations"]
            self.began -= saved["seconds"]

    def describe(self):
        """Writes config.json, and says what is learned from and where."""
        args, task = self.args, self.task
        packages = "torch", "numpy", "gymnasium", "gymnasium_robotics", "mujoco", "minari"
        versions = {name: sys.modules[name].__version__ for name in packages if name in sys.modules}
        versions["python"] = sys.version.split()[0]
        device = f"CPU (threads: {torch.get_num_threads()})"
        if args.device != "cpu":
            device = torch.cuda.get_device_name(args.device)
        score = task.score(task.data_return)
        about = dict(data_score=score, device_name=device, versions=versions)
        with whole_file(self.folder / "config.json") as file:
            json.dump(vars(args) | vars(task) | about, file, indent=1)
        say(f"{args.env}: {task.transitions} transitions of {task.dataset_id}")
        say(f"its {task.data_episodes} episodes: mean return {task.data_return:.2f}, score {score:.1f}")
        say(f"variant {args.variant} on {device}, into {self.folder}")

    def record(self, result: dict) -> dict:
        """Keeps an evaluation, the checkpoint last: a run cut off before it evaluates again. Returns its row."""
        means = self.totals[:-1] / self.totals[-1]
        row = dict(step=self.step) | summary(self.task, result) | dict(zip(METRICS, means.tolist()))
        row["seconds"] = round(time.monotonic() - self.began, 1)
        best = all(row["score_mean"] > earlier["score_mean"] for earlier in self.evaluations)
        self.evaluations.append(row)
        self.totals.zero_()
        with whole_file(self.folder / "metrics.csv") as file:
            table = csv.DictWriter(file, row, lineterminator="\n")
            table.writeheader()
            table.writerows(self.evaluations)
        weights = {name: getattr(self.agent, name).state_dict() for name in ACTING}
        for name in ["policy.pt"] + ["policy-best.pt"] * best:
            self.write(name, agent=weights)
        self.save()
        return row

    def finish(self):
        """Draws the curve, and writes the result last."""
        with whole_file(self.folder / "curve.png", "wb") as file:
            draw_curve(file, self)
        final, best = self.evaluations[-1], max(self.evaluations, key=lambda row: row["score_mean"])
        scores = dict(final=final["score_mean"], best=best["score_mean"], best_step=best["step"], steps=self.step)
        with whole_file(self.folder / "result.json") as file:
            json.dump(scores, file, indent=1)
        words = "final score {final:.1f}, best {best:.1f} at update {best_step}".format(**scores)
        say(f"{words}; see {self.folder}")


def train(args: Args) -> int:
    """A run of Algorithm 1, from its start or its checkpoint to its end. Returns the exit status."""
    from torch.utils.tensorboard import SummaryWriter

    args = dataclasses.replace(args)  # which checks what a caller has assigned
    folder = run_folder(args)
    result = folder / "result.json"
    if any(folder.glob("[!.]*")) and not args.resume:
        raise UserError(f"the run folder {folder} exists: --resume goes on with it, --run-dir names another")
    if result.exists() and json.loads(result.read_text())["steps"] >= args.num_steps:
        say(f"{folder} is finished")
        return 0
    if (folder / "metrics.csv").exists() and not (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} has results, but no checkpoint.pt to go on from: give another --run-dir")
    with refusing(f"{args.dataset or args.env} cannot be learned from"):
        task, data = load_data(args)
    with contextlib.ExitStack() as stack:
        envs = stack.enter_context(playing(task, args.eval_episodes))  # forked before the lock and the GPU are taken
        busy = "or another process is at work there (if none is, delete its .lock): give another --run-dir"
        with refusing(f"{folder} cannot be used, {busy}"):
            stack.enter_context(filelock.FileLock(folder / ".lock", timeout=0))
        use_device(args)  # before the folder has a file
        with refusing("the networks and batches cannot be made: give smaller sizes", RuntimeError):
            run = Run(args, task, data, folder)
        if (folder / "checkpoint.pt").exists():
            run.restore()
        result.unlink(missing_ok=True)  # of a finished run that now goes on
        run.save()  # from here on, --resume works whenever the run is cut off
        run.describe()
        writer = stack.enter_context(SummaryWriter(str(folder), purge_step=run.step + 1))
        bar = stack.enter_context(tqdm(total=args.num_steps, initial=run.step, unit=" updates", disable=None))
        learn = Captured(run.learn) if args.compile and args.device != "cpu" else run.learn
        with interruptible() as stops:
            while True:
                if run.evaluation_due() and not stops:
                    if played := evaluate(run.actor, envs, args.eval_episodes, args.seed, stops):
                        row = run.record(played)
                        writer.add_scalar("score", row["score_mean"], run.step)
                        say(f"update {run.step}: {in_words(row)}")
                if stops or run.step >= args.num_steps:
                    break
                run.rows.random_(0, len(data.reward), generator=run.generator)
                sample_noise(run.noise, run.generator)
                learn()
                run.step += 1
                bar.update()
                if stops or run.evaluation_due() or run.step % LOG_EVERY == 0:
                    losses = run.losses()
                    for name, value in losses.items():
                        writer.add_scalar(f"losses/{name}", value, run.step)
                    words = "critic {critic_loss:.3g}, diffusion {diffusion_loss:.3g}, Q {q:.4g}".format(**losses)
                    bar.set_postfix_str(words)
                    if run.evaluation_due() or time.monotonic() - run.saved > SAVE_EVERY:
                        run.save()
                        say(f"update {run.step}: {words}")  # for whoever reads a log file
            if stops:
                run.losses()  # a NaN would not be saved
                run.save()
                say(f"stopped at update {run.step}: --resume goes on from there")
                return 128 + stops[0]
        run.finish()
        return 0


@torch.no_grad()
def draw_curve(file, run: Run):
    """The score over updates; for the toy also Figure 1: the reward, the density of the data, Q of the first action."""
    from matplotlib.figure import Figure

    task, toy = run.task, run.task.domain == "toy"
    figure = Figure(figsize=(16 if toy else 6, 4), layout="tight")
    curve, *others = figure.subplots(1, 3 if toy else 1, squeeze=False)[0]
    points = ([row[name] for row in run.evaluations] for name in ("step", "score_mean", "score_std"))
    curve.errorbar(*points, marker="o", capsize=3, label="the policy, ± deviation over episodes")
    curve.axhline(task.score(task.data_return), color="gray", linestyle=":", label="the data's own episodes")
    curve.set(xlabel="updates", ylabel="score", title=f"{task.dataset_id}, {run.args.variant}, seed {run.args.seed}")
    if toy:
        reward, value = others
        x = np.linspace(-2, 2, 401)
        reward.plot(x, ToyEnv.reward(x), label="reward")
        reward.hist(run.data.next_state[:, 0].cpu(), 60, density=True, alpha=0.4, label="density of the data")
        reward.set(xlabel="position", title="The task")
        action = torch.linspace(-1, 1, 201, device=run.args.device)[:, None]
        q = run.agent.critics(action.new_zeros(201, 2), action).cpu()  # (M, 201)
        value.plot(action.cpu(), q.mean(0), label="mean of the ensemble")
        value.plot(action.cpu(), pessimistic_value(q, run.args), label=f"pessimistic value ({run.args.pessimism})")
        value.set(xlabel="first action", ylabel="Q", title="The learned Q at position 0")
    for axes in figure.axes:
        axes.legend()
    figure.savefig(file, format="png")


# ==== 12. The command line ============================================================================================
# Settings that a resumed or evaluated run may change: but for rounding, what it learns does not depend on them.
FREE = set("num_steps device compile precision dataset eval_env eval_every eval_episodes eval_candidates".split())
FREE |= set("run_dir resume eval_only".split())


def same_run(saved: Args, args: Args, path):
    """Raises UserError at the first setting that differs between a saved run and this one, unless it is free."""
    free = FREE | {"seed"} if args.eval_only else FREE
    for name, value in vars(args).items():
        if name not in free and value != getattr(saved, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{path} was made with {flag} {getattr(saved, name)}, not {value}: give the same")


def parse(argv: list[str]) -> Args:
    """Settings from the command line over the row's preset, or over those of the run that it goes on with.

    Raises UserError where they would change what a run has learned, SystemExit where they make no sense.
    """
    if any(re.fullmatch(r"(--[\w-]+=)?", word) for word in argv):
        raise UserError("an option has an empty value, of an unset variable perhaps: give it one, or leave it out")
    options = dict(prog="erdp.py", return_unknown_args=True, add_help=False)
    start, _ = tyro.cli(Start, args=argv, default=Start(device=""), **options)
    named = start.env or start.dataset
    own = start.dataset and not re.fullmatch(r"toy-\d+", start.dataset)
    start.env = start.env or ("own" if own else "toy")
    default = preset(start.env, start.variant, start.device)
    path = Path(start.eval_only or run_folder(start) / "checkpoint.pt")
    begun = start.eval_only or (start.resume and path.exists())
    if start.resume and not begun and not named:
        raise UserError(f"there is no checkpoint {path}: check --run-dir, or give --env to start a run")
    if begun:
        saved = load_file(path)["args"]
        device = dict(device=default.device, compile=False, precision="float32") if start.eval_only else {}
        default = dataclasses.replace(saved, run_dir=start.run_dir, resume=False, **device)
    args = tyro.cli(Args, args=argv, default=default, prog="erdp.py")
    if begun:
        same_run(saved, args, path)
    return args


def evaluate_only(args: Args) -> int:
    """--eval-only: the score of a saved policy in its environment, or in --eval-env's, without its data."""
    path = args.eval_only
    saved = load_file(path)
    task = saved["task"]
    if args.eval_env != saved["args"].eval_env:
        with refusing(f"--eval-env {args.eval_env} cannot be used"):
            spec, about = describe_env(args)
            trained = EnvSpec.from_json(task.spec)
            spec.max_episode_steps = spec.max_episode_steps or trained.max_episode_steps
            if DOMAINS[task.domain].goal_ends:
                with contextlib.suppress(ValueError, UserError):  # where another maze, or none, is meant
                    spec.kwargs["maze_map"] = same_walls(spec, trained)
            task.spec = as_json(spec)
        if vars(task) | about != vars(task):
            raise UserError(f"--eval-env {args.eval_env} has other observations or actions than the policy")
    with playing(task, args.eval_episodes) as envs:
        use_device(args)
        actor = load_policy(path, **vars(args))
        result = evaluate(actor, envs, args.eval_episodes, args.seed)
    say(f"{path}: {in_words(summary(task, result))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit status (--help, mistyped settings, a stop within a step: SystemExit)."""
    threads = torch.get_num_threads()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        count = torch.cuda.device_count()
        there = ["cpu"] + ["cuda"] * (count > 0) + [f"cuda:{n}" for n in range(count)]
        if args.device not in there:
            problem = f"--device {args.device} is not there: PyTorch sees {', '.join(there)}"
            raise UserError(problem + ", and a run goes on only on the kind of device where it began" * args.resume)
        return evaluate_only(args) if args.eval_only else train(args)
    except (UserError, OSError, FloatingPointError) as error:
        print("erdp:", *str(error).splitlines(), file=sys.stderr)  # a large Box describes itself in several lines
        return 1 if isinstance(error, FloatingPointError) else 2
    except (MemoryError, RuntimeError) as error:
        full = "allocate memory", "out of memory", "ALLOC_FAILED"  # of a CPU, of CUDA, of its libraries
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in full):
            raise
        print("erdp: this needs more memory than there is: give smaller sizes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        torch.set_num_threads(threads)  # for the next run in this process


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="replace")  # a log file is as far as the run is
    os.environ.pop("MUJOCO_GL", None)  # nothing is rendered, so nothing may fail for want of a renderer
    sys.exit(main())
