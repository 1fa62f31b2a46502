"""Entropy-regularized Diffusion Policy with Q-Ensembles (ERDP) for offline RL, in one file.

Reference: Zhang, Luo, Sjölund, Schön and Mattsson, "Entropy-regularized Diffusion Policy with Q-Ensembles for Offline
Reinforcement Learning", arXiv:2402.04080. Equations, tables and algorithms have its numbers. First the paper, in its
order: settings, SDE, networks, sampler, losses, Algorithm 1; then all else: data, evaluation, runs, the command line.

    python erdp.py                                      # the toy task of Figure 1
    python erdp.py --env antmaze-umaze-v0 --seed 0      # one row of Table 2 with the paper's settings
"""

from __future__ import annotations  # the choices in Args come from tables further down

import contextlib
import copy
import csv
import dataclasses
import difflib
import importlib.metadata
import io
import json
import math
import multiprocessing.pool
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.envs.registration import EnvSpec
from tqdm import tqdm

# ==== 1. Settings: Section 4.1 and Table 4, whose lines are in DOMAINS ================================================


@dataclasses.dataclass
class Args:
    """Entropy-regularized diffusion policy with Q-ensembles (arXiv:2402.04080). What is not given is the row's preset:
    add --env ROW to --help to see it."""

    env: str = "toy"  # toy, or a row of the paper's tables, such as antmaze-umaze-v0 (none: the --dataset's id)
    seed: int = 0  # of initialisation, batches, noise and evaluation, and of the toy's data
    dataset: str | None = None  # a Minari id or an .hdf5 path in D4RL's layout, in place of the row's own data
    variant: Variant = "paper"  # the paper; what its authors' code computes; or the paper with de Bruijn's entropy term
    device: str = "cpu"  # cpu, cuda or cuda:N
    num_steps: int = 1_000_000  # updates in all
    batch_size: int = 256  # transitions an update
    hidden: int = 256  # width of every network
    discount: float = 0.99  # gamma
    # critics
    num_critics: int = 64  # M, the ensemble's size
    lcb_coef: float = 4.0  # beta of Eq. 17
    pessimism: Pessimism = "lcb"  # lcb: Eq. 17, independent targets; min: clipped double Q, the minimum and its target
    max_q_backup: bool = False  # targets take the best of 10 next actions for each member
    critic_lr: float = 3e-4  # learning rate of the critics, in every domain
    target_rate: float = 0.005  # of the Q targets, every update ("eta" in Algorithm 1, not the eta of Eq. 12)
    # policy
    num_diffusion_steps: int = 5  # T
    schedule: Schedule = "cosine"  # theta_t of Eq. 1 over t
    loss: Loss = "noise"  # Eq. 5; IR-SDE's likelihood loss (Table 4); or the latter without its Euler step, posterior
    eta: float = 1.0  # Q-learning weight of Eq. 12
    q_time: int | None = None  # last diffusion time t whose a^0-hat Q sees in Eq. 12 (None: T, the paper)
    entropy_coef: float = 0.01  # alpha of Eq. 12 (with --variant debruijn by default 0.03)
    clip_denoised: bool = True  # clamp x0-hat to the action bounds inside each reverse step (Table 4's action clip)
    lr: float = 3e-4  # learning rate of the policy
    grad_norm: float = 4.0  # at which the policy's and the whole ensemble's gradients are each clipped
    ema_rate: float = 0.005  # of the policy that Q's next actions come from
    ema_every: int = 5  # updates between two moves of that policy
    ema_start: int = 1000  # update of its first move
    # evaluation and the program
    eval_every: int = 50_000  # updates between two evaluations
    eval_episodes: int = 100  # episodes an evaluation
    eval_candidates: int = 50  # samples of which one is drawn by softmax over their value; 1: a plain sample
    compile: bool = False  # torch.compile: about twice as fast on a CPU, after half a minute of compiling
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of products: tf32 (CUDA); bf16: the ensemble's alone
    eval_env: str | None = None  # environment in place of the row's or the data set's: an id, module:id or module:Class
    run_dir: str | None = None  # the run's own folder (default: runs/<env>__<variant>__<seed>)
    resume: bool = False  # go on from the run folder's checkpoint
    eval_only: bool = False  # evaluate a trained policy, print its score and write nothing
    checkpoint: str | None = None  # policy.pt or checkpoint.pt for --eval-only (default: the run folder's policy.pt)


Variant = Literal["paper", "released", "debruijn"]

# ==== 2. The mean-reverting SDE: Eq. 1-8, 14, 28 ======================================================================


def cosine(k, T):
    def f(k):
        return np.cos((k / (T + 1) + 0.008) / 1.008 * np.pi / 2) ** 2

    return 1 - f(k) / f(0)


# theta over steps k = 1..T (an array), up to a factor: every schedule is scaled to theta_bar_T = -ln(1e-3).
SCHEDULES = {
    "cosine": cosine,
    "constant": lambda k, T: np.ones(T),
    "linear": lambda k, T: np.linspace(1, 200, T),
    "vp": lambda k, T: 1 - np.exp(-0.1 / T - 4.95 * (2 * k - 1) / T**2),
}
Schedule = Literal[tuple(SCHEDULES)]
GAUSSIAN_WITHIN = 0.01  # nats an action dimension: nearer to a standard Gaussian, x_t counts as one


class MeanRevertingSDE:
    """The SDE of Eq. 1, dx = -theta_t x dt + sqrt(2 theta_t) dw, on the paper's grid t = 0..T, T = num_steps.

    theta_bar (T+1,) holds the integrals of theta from 0 to t: theta_bar[0] == 0, theta_bar[T] = -ln(1e-3). x is (B, A)
    or (A,). Times tau and t are an int or an integer tensor (B,), which gives coefficients of shape (B, 1). Densities
    are summed over the last axis. Coefficients are computed in float64 and rounded to `dtype` where they meet x. Ints
    other than 0 <= tau <= t <= T raise ValueError; tensors are not checked, as that would wait for the device.

    last_time, at least 1, is the last t (2 of the cosine schedule's 5) at which x_t says something of x_0: beyond it,
    with x_0 in [-1, 1]^A, x_t is standard Gaussian to within GAUSSIAN_WITHIN. Its KL divergence from that and what its
    entropy lacks are at most -1/2 log var_t a dimension, as H(x_t) >= H(x_t | x_0).
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
        lacking = -0.5 * np.log(-np.expm1(-2 * theta_bar[1:]))  # nats a dimension at t = 1..T
        self.last_time = max(1, int((lacking >= GAUSSIAN_WITHIN).sum()))
        self.theta_bar = torch.as_tensor(theta_bar, device=device)  # float64

    def between(self, tau, t):
        """theta_bar_{tau:t}, the integral of theta from tau to t; theta'_t where tau = t - 1. In float64."""
        times = [time for time in (tau, t) if isinstance(time, int)]
        bounds = [0, *times, self.num_steps]
        if bounds != sorted(bounds):
            raise ValueError(f"diffusion times {times} must ascend from 0 to T = {self.num_steps}")
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


def mish(x):
    """x tanh(softplus(x)); for the compiler x n / (n + 2), n = e^x (e^x + 2): one exponential, not three functions."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = x.clamp(max=20).exp()  # beyond 20 the quotient is 1 to float64's precision
    n = e * (e + 2)
    return x * (n / (n + 2))


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
        for weight in self.weights[:-1]:
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)  # the first too: 1/16 at the paper's width
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
        q = (h * weights[-1].mT).sum(-1) + biases[-1].squeeze(-1)  # (M, N): no product, so that Mish fuses with it
        return q.reshape(-1, *action.shape[:-1])


# ==== 4. Sampling: Eq. 10 by Eq. 6 and 8 ==============================================================================


def sample_actions(network, sde, state, noise, clip_denoised: bool = True, clip_sample: bool = True):
    """Actions (..., A) for states (..., S) in T steps of optimal sampling (Proposition 3.1).

    network(x_t (..., A), t (...), state) is any predictor of the noise. noise (T, ..., A) is standard Gaussian: x_T,
    then Eq. 6's for t = T..2. `clip_denoised` clamps each x0-hat to [-1, 1], `clip_sample` the finished action.
    """
    T = sde.num_steps
    x_t = noise[0]
    for t in range(T, 0, -1):
        eps = network(x_t, torch.full(x_t.shape[:-1], t, device=x_t.device), state)
        x_0 = sde.predict_x0(x_t, t, eps)  # Eq. 8
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
        mean, var = sde.posterior(x_t, x_0, t)  # Eq. 7
        x_t = mean + var.sqrt() * noise[T - t + 1] if t > 1 else mean  # Eq. 6
    return x_t.clamp(-1, 1) if clip_sample else x_t


# ==== 5. Losses, in the paper's order: Eq. 5, 12-15, 16, 17 ===========================================================


class Batch(NamedTuple):
    """Transitions: state (B, S), action (B, A) in [-1, 1], reward (B,), next_state (B, S), terminal (B,) 0 or 1."""

    state: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_state: torch.Tensor
    terminal: torch.Tensor


class Noise(NamedTuple):
    """All that is random in one update, drawn outside it, so that an update is a function of its arguments."""

    rows: torch.Tensor  # (B,) transitions of the data set
    t: torch.Tensor  # (B,) diffusion times, uniform on 1..T
    eps: torch.Tensor  # (B, A) noise of Eq. 4
    a_T: torch.Tensor  # (B, A) the a^T of Eq. 14
    next_action: torch.Tensor  # (T, C, B, A) noise of the sampler for C candidate next actions a state


def noise_loss(sde, x_0, x_t, t, eps, eps_hat):
    """Eq. 5, squared: noise matching."""
    return F.mse_loss(eps_hat, eps)


def likelihood_loss(sde, x_0, x_t, t, eps, eps_hat):
    """Table 4's (IR-SDE's): an Euler step of Eq. 3's drift, which is not the posterior mean, against that mean."""
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
Loss = Literal[tuple(LOSSES)]


def policy_log_prob(sde, a_0, eps_hat, a_T, variant: str):
    """log p(a^1-hat | a^T, s) of Eq. 13-15 (B,), from a^0-hat (unclamped), its predicted noise and a^T.

    "paper": Eq. 14 at a^1-hat = Eq. 4 of a^0-hat and the predicted noise at t = 1. "released": a^1-hat is an Euler step
    of the drift, and each density has earlier and later state exchanged, at times 1, 2 and T.
    """
    if variant == "paper":
        return sde.log_prob_x1(sde.diffuse(a_0, 1, eps_hat), a_T, a_0)
    T = sde.num_steps
    a_1 = (1 - sde.between(0, 1)).to(sde.dtype) * a_0
    likelihood = sde.log_prob(a_1, a_T, 2, T)
    prior = sde.log_prob(a_0, a_1, 1, 2)
    evidence = sde.log_prob(a_0, a_T, 1, T)
    return likelihood + prior - evidence


DEBRUIJN_ALPHA = 0.03  # default alpha of --variant debruijn, in nats an action dimension: see results/entropy.md


def entropy_weights(sde):
    """w_t = theta'_t / var_t (T,) for t = 1..T, and 0 after sde.last_time; the sum of w_t var_t is theta_bar there.

    Later times would add at most 0.03 nats an action dimension to `entropy_estimate`, but have most of the weight.
    """
    t = torch.arange(1, sde.num_steps + 1, device=sde.theta_bar.device)
    weight = sde.between(t - 1, t) / sde.var(0, t) * (t <= sde.last_time)[:, None]  # (T, 1)
    return weight[:, 0].to(sde.dtype)


def entropy_estimate(sde, eps_hat, t):
    """H-hat (B,) in nats from the predicted noise eps_hat (B, A) at one diffusion time a row, t (B,) uniform on 1..T.

    De Bruijn's identity for Eq. 1, dH(x_s)/ds = E||grad log p_s||^2 - A over s = theta_bar, with the score
    -E[eps | x_s] / std_s and a Gaussian end, on the grid: A/2 log(2 pi e) - sum_t w_t (||eps_hat||^2 - var_t A). A row
    has the term of its t times T, so that the mean over t is the sum.

    It is taken at noised *data* actions: of the data p's own predictor it is p's entropy (too large on a coarse grid),
    of a policy q that has moved away 2 H(q) - CE(p, q), exact for Gaussians, which also pulls q back to the data.
    """
    A = eps_hat.shape[-1]
    _, var = sde.transition(0, t)  # (B, 1)
    weight = sde.num_steps * entropy_weights(sde)[t - 1]  # (B,)
    return A / 2 * math.log(2 * math.pi * math.e) - weight * (eps_hat**2 - var).sum(-1)


def policy_loss(policy, critics, sde, batch: Batch, noise: Noise, q_data, args: Args) -> dict:
    """Eq. 15, with L_diff of `args.loss`: the "policy_loss", and its "diffusion_loss", "lcb" and "entropy" (-log p).

    a^0-hat is Eq. 8 at the noised data action of L_diff, not a sample; only Q sees it clamped, without gradient where
    it is, and not at times after `q_time`. q_data (M, B), for lambda, is Q(s, a) of the batch as `critic_loss`
    gave it in this step, before the Q update: that saves a pass through the ensemble. Q's weights get no gradient.
    Variant "debruijn": L_diff - lambda Q - alpha H-hat / A, with `entropy_estimate` in place of -log p.
    """
    x_t = sde.diffuse(batch.action, noise.t, noise.eps)  # Eq. 4
    eps_hat = policy(x_t, noise.t, batch.state)
    l_diff = LOSSES[args.loss](sde, batch.action, x_t, noise.t, noise.eps, eps_hat)
    a_0 = sde.predict_x0(x_t, noise.t, eps_hat)  # Eq. 8
    if args.variant == "debruijn":
        entropy = entropy_estimate(sde, eps_hat, noise.t)  # (B,)
    else:
        entropy = -policy_log_prob(sde, a_0, eps_hat, noise.a_T, args.variant)  # (B,)
    q = critics(batch.state, a_0.clamp(-1, 1), frozen=True)  # (M, B)
    seen = noise.t <= (args.q_time or sde.num_steps)  # (B,)
    value = (pessimistic_value(q, args) * seen).sum() / seen.sum().clamp(min=1)
    scale = q if args.variant == "released" else pessimistic_value(q_data, args)
    lambda_ = args.eta / scale.abs().mean().detach()  # eta / E|Q(s, a)|
    if args.variant == "paper":
        weight = lambda_  # alpha stands inside the bracket of Eq. 12
    elif args.variant == "released":
        weight = 1 / entropy.abs().mean().detach()
    else:
        weight = 1 / eps_hat.shape[-1]  # nats an action dimension, over which L_diff is a mean too
    loss = l_diff - lambda_ * value
    if args.entropy_coef:
        loss = loss - args.entropy_coef * weight * entropy.mean()
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
    if len(q) == 1:
        return q[0]
    var = q.var(0, correction=int(unbiased))
    agree = var == 0
    return q.mean(0) - beta * var.masked_fill(agree, 1).sqrt().masked_fill(agree, 0)


PESSIMISM = {
    "lcb": lambda q, args: lcb(q, args.lcb_coef, unbiased=args.variant == "released"),
    "min": lambda q, args: q.amin(0),
}
Pessimism = Literal[tuple(PESSIMISM)]


def pessimistic_value(q, args: Args):
    """The ensemble's value (...) from q (M, ...): Eq. 17, or the minimum over members."""
    return PESSIMISM[args.pessimism](q, args)


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
        compiled = torch.compile if args.compile else lambda function: function
        self.sample_actions = compiled(sample_actions)
        self.critic_loss = compiled(critic_loss)
        self.policy_loss = compiled(policy_loss)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {"updates": self.updates}

    def load_state_dict(self, state: dict):
        for name in self.PARTS:
            part = getattr(self, name)
            groups = {"param_groups": part.state_dict()["param_groups"]} if "optimizer" in name else {}
            part.load_state_dict(state[name] | groups)  # `capturable` is this device's, not the checkpoint's
        self.updates.copy_(state["updates"])


def update(agent: Agent, batch: Batch, noise: Noise) -> dict:
    """One iteration of Algorithm 1, in place. Returns the METRICS as tensors, without waiting for the device."""
    args, sde = agent.args, agent.sde
    # Ensemble-Q learning
    with torch.no_grad():
        next_state = batch.next_state.expand(noise.next_action.shape[1], -1, -1)  # (C, B, S)
        next_action = agent.sample_actions(agent.policy_ema, sde, next_state, noise.next_action, args.clip_denoised)
    critic = agent.critic_loss(agent.critics, agent.critics_target, batch, next_state, next_action, args)
    optimizer_step(critic["critic_loss"], agent.critics, agent.critic_optimizer, args.grad_norm)
    # Diffusion policy learning, against the updated Q
    q = critic["q"]
    policy = agent.policy_loss(agent.policy, agent.critics, sde, batch, noise, q, args)
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
        old.lerp_(new, rate if isinstance(rate, float) else rate.to(old.dtype))


BACKUP_CANDIDATES = 10  # next actions of max Q-backup


def noise_buffers(args: Args, action_dim: int, device) -> Noise:
    """The tensors that `sample_noise` fills."""
    B, T = args.batch_size, args.num_diffusion_steps
    C = BACKUP_CANDIDATES if args.max_q_backup else 1
    rows, t = torch.empty(2, B, dtype=torch.int64, device=device)
    eps, a_T = torch.empty(2, B, action_dim, device=device)
    next_action = torch.empty(T, C, B, action_dim, device=device)
    return Noise(rows, t, eps, a_T, next_action)


def sample_noise(noise: Noise, num_rows: int, generator: torch.Generator):
    """Fills the buffers with fresh values, in place, so that a captured update reads them too."""
    noise.rows.random_(0, num_rows, generator=generator)
    noise.t.random_(1, len(noise.next_action) + 1, generator=generator)
    for gaussian in (noise.eps, noise.a_T, noise.next_action):
        gaussian.normal_(generator=generator)


# ######################################################################################################################
# Nothing below is specific to the paper: data, evaluation, the run's folder and loop, the command line.
# ######################################################################################################################

# ==== 7. What the rest of the file shares =============================================================================

D4RL_SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
PATIENCE = 20  # seconds that a silent server is waited for
CANNOT_MAKE = "see that what it needs is installed, or name another by --eval-env"
HDF5 = ".hdf5", ".h5"  # endings of a D4RL file
STOPS = [signal.SIGINT, signal.SIGTERM]  # signals at which a run saves its checkpoint and ends
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup has ignored
    STOPS.append(signal.SIGHUP)  # of a terminal that is closed


class UserError(Exception):
    """Bad input: its one sentence goes to stderr and the program ends with status 2."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, for errors of one sentence."""
    if isinstance(error.__context__, OSError):  # a full disk, say, and not what PyTorch made of it
        error = error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


@contextlib.contextmanager
def refusing(problem: str, advice: str):
    """Makes a UserError of any exception within, whatever library raised it: the problem, its reason, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({first_line(error)}): {advice}") from error


def expand(path) -> Path:
    """The path with ~ and ~user replaced."""
    with refusing(f"{path} is no path here", "give another"):
        return Path(path).expanduser()


@contextlib.contextmanager
def quiet():
    """Keeps off the screen what importing gymnasium_robotics and making a `-v4` environment print."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # Gymnasium's logger warns by `warnings` too
        yield


def say(words: str):
    """Prints a line, above the progress bar if there is one. A closed pipe costs the line, never the run."""
    try:
        tqdm.write(words)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def lock(path: Path, waiting: str | None = None):
    """Holds the file `path` as this process's own: if another has it, says `waiting` and waits, or is refused.

    A POSIX lock ends with its process and is not inherited by workers. Where there is none, the program runs without.
    """
    with contextlib.ExitStack() as end:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = end.enter_context(open(path, "a"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if waiting is None:
                    problem = f"another process is at work in {path.parent}"
                    raise UserError(f"{problem}: wait for it, or give another --run-dir") from None
                say(waiting)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, write: Callable, mode: str = "wb"):
    """Writes a file so that it is there as a whole or as it was: `write` gets another one, open in `mode`."""
    part = path.with_name(".part-" + path.name)
    with refusing(f"{path} cannot be written", "what was there is as before; make room, then --resume"):
        try:
            with open(part, mode) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # or a lost machine may leave the new name without its content
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


# ==== 8. The rows of Tables 1 and 2, and their data ===================================================================


class Domain(NamedTuple):
    """What the rows of a domain share: Table 4's settings, how their data are read and their episodes played."""

    settings: dict  # Table 4's line and Section 4.1, where they differ from Args
    reward: Callable = lambda reward: reward  # the data's rewards (N,) -> the critics'
    observation: str | None = None  # the part of an observation that the policy sees; None: all of it
    goal_ends: bool = False  # an episode of the data ends, terminal, at its first reward
    env: dict = {}  # arguments that make the environment play by D4RL's rule
    over: Callable = lambda state: False  # ... and the states in which D4RL ends an episode, where it does not


def sparse_reward(reward):
    if not np.isin(reward, (0, 1)).all():
        raise UserError("AntMaze's rows learn from rewards of 0 and 1: give a data set with sparse rewards")
    return 4 * (reward - 0.5)


DOMAINS = {
    "toy": Domain(
        dict(
            lr=1e-3,
            critic_lr=2e-3,
            hidden=64,
            eta=3.0,
            num_critics=8,
            batch_size=64,
            num_steps=4000,
            eval_every=400,
        )
    ),
    "own": Domain({}),
    "gym": Domain(
        dict(loss="likelihood", clip_denoised=False, num_steps=2_000_000, eval_episodes=10),
    ),
    "antmaze": Domain(
        dict(eta=2.0, max_q_backup=True),
        reward=sparse_reward,
        goal_ends=True,
        env=dict(continuing_task=False),
    ),
    "adroit": Domain(
        dict(lr=3e-5, eta=0.1, grad_norm=8.0),
        reward=lambda reward: (reward - reward.mean()) / (reward.std() or 1),
        over=lambda state: state[26] < 0.075,  # the pen's height: it was dropped
    ),
    "kitchen": Domain(
        dict(eta=0.005, grad_norm=10.0, loss="likelihood", clip_denoised=False),
        observation="observation",
        env=dict(terminate_on_tasks_completed=True, remove_task_when_completed=True),
    ),
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

    @classmethod
    def best_return(cls) -> float:
        step = np.linspace(-1, 1, 2001)
        first = step[:, None]
        returns = cls.reward(first) + cls.reward(first + step)
        return float(returns.max())

    def reset(self, *, seed=None, options=None):
        self.state = np.zeros(2, np.float32)
        return self.state, {}

    def step(self, action):
        self.state = self.state + np.array([action[0], 1], np.float32)
        position, steps = self.state
        reward = float(self.reward(position))
        return self.state, reward, bool(steps == 2), False, {}


class Row(NamedTuple):
    """A row of Table 1 or 2, or the toy: domain and data, and how D4RL plays and scores it."""

    domain: str
    dataset: str
    env: str | EnvSpec | None  # for evaluation, as --eval-env; None: the one that the data name
    max_steps: int  # of an episode
    ref_min: float  # returns of score 0 and 100
    ref_max: float


ROBOTS = {
    "halfcheetah": ("HalfCheetah-v4", 1000, -280.178953, 12135.0),
    "hopper": ("Hopper-v4", 1000, -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1000, 1.629008, 4592.3),
}
TOY = EnvSpec("Toy-v0", ToyEnv, max_episode_steps=2)
ROWS = {"toy": Row("toy", "toy-5", TOY, 2, 0.0, ToyEnv.best_return())}
for level in ("medium", "medium-replay", "medium-expert"):
    for robot, rule in ROBOTS.items():
        ROWS[f"{robot}-{level}-v2"] = Row("gym", f"{robot}_{level.replace('-', '_')}-v2.hdf5", *rule)
for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    steps = 700 if maze.startswith("umaze") else 1000
    ROWS[f"antmaze-{maze}-v0"] = Row("antmaze", f"D4RL/antmaze/{maze}", None, steps, 0.0, 1.0)
for level in ("human", "cloned"):
    ROWS[f"pen-{level}-v1"] = Row("adroit", f"D4RL/pen/{level}", None, 100, 96.262799, 3076.8331017826877)
for level in ("complete", "partial", "mixed"):
    ROWS[f"kitchen-{level}-v0"] = Row("kitchen", f"D4RL/kitchen/{level}", None, 280, 0.0, 4.0)


def domain_of(env: str) -> str:
    """The DOMAINS key of a row or (any other name: a bare --dataset) of a user's own data."""
    return ROWS[env].domain if env in ROWS else "own"


def preset(env: str, variant: str = "paper", device: str = "") -> Args:
    """The paper's settings for `env`, on `device` or this machine's own."""
    args = Args(env=env, **DOMAINS[domain_of(env)].settings)
    if variant == "debruijn":
        args.entropy_coef = DEBRUIJN_ALPHA
    if env == "antmaze-umaze-v0":  # the asterisk in Table 4
        args.max_q_backup = False
    args.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu":
        args.compile = True
        args.precision = "tf32"
    return args


@dataclasses.dataclass
class Task:
    """Where a policy is evaluated, and how its observations, actions and returns are to be read."""

    domain: str  # a key of DOMAINS
    data: object  # MinariDataset, Path of an HDF5 file, the toy's share of good steps, or None where none is read
    dataset_id: str
    spec: EnvSpec
    space: gym.Space  # of what the policy sees: all, or some parts, of an observation
    low: np.ndarray  # action bounds, in the environment's shape
    high: np.ndarray
    ref_min: float  # returns of score 0 and 100
    ref_max: float
    returns: np.ndarray | None = None  # of the data's own episodes, by this row's rule; `load_data` fills them in

    @property
    def state_dim(self) -> int:
        return gym.spaces.flatdim(self.space)

    def score(self, returns):
        """D4RL's normalised score."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


def layout(space: gym.Space):
    """How an observation is flattened: the shape of a Box, or the layouts of a Dict's parts."""
    if isinstance(space, gym.spaces.Dict):
        return {key: layout(part) for key, part in space.items()}
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"{space} is not supported: observations must be Box spaces or Dicts of them")
    return list(space.shape)


def flatten(parts, observation) -> np.ndarray:
    """Observations (..., *shape), or nested dicts of them, as (..., S) float32 in the order of the layout `parts`."""
    if isinstance(parts, dict):
        flat = [flatten(part, observation[key]) for key, part in parts.items()]
        return np.concatenate(flat, -1)
    array = np.asarray(observation, np.float32)
    leading = array.shape[: array.ndim - len(parts)]
    return array.reshape(*leading, -1)


def spaces_of(source, name: str) -> dict:
    """What an environment or a Minari set says of its observations and actions, to be compared."""
    actions = source.action_space
    if not isinstance(actions, gym.spaces.Box):
        raise UserError(f"{name} has the actions {actions}: not a bounded, continuous Box")
    spread = actions.high.astype(float) - actions.low
    if not ((spread > 0) & (spread < 1e6)).all():  # farther apart, float32 would hardly tell actions apart
        raise UserError(f"{name} has the actions {actions}: not a bounded, continuous Box with 0 < high - low < 1e6")
    return dict(
        observation=layout(source.observation_space),
        low=actions.low.tolist(),
        high=actions.high.tolist(),
    )


def written(spec: EnvSpec) -> str | None:
    """The specification as files keep it; None for the toy's, which holds the class itself."""
    return None if spec.entry_point is ToyEnv else spec.to_json()


def make_task(domain: str, data, dataset_id: str, spec, refs, **kwargs) -> Task:
    """The Task of an environment, which is made, with the arguments `kwargs`, to see its spaces."""
    with refusing(f"the environment of {dataset_id} cannot be made", CANNOT_MAKE), quiet():
        env = gym.make(spec, **kwargs)
        env.close()
    name, space = env.spec.id, env.observation_space
    with refusing(f"{name} cannot be kept in a policy file", "register it with plain numbers, lists and words"):
        written(env.spec)
    found = spaces_of(env, name)
    if recorded := getattr(data, "spec", None):  # what a Minari set says of itself
        theirs = spaces_of(recorded, dataset_id)
        if theirs != found:
            raise UserError(f"{dataset_id} and its environment {name} differ: {theirs} against {found}")
    if key := DOMAINS[domain].observation:
        if key not in layout(space):
            raise UserError(f"{name} is not of the domain {domain}: it observes {layout(space)}, without {key!r}")
        space = gym.spaces.Dict({key: space[key]})
    with refusing(f"{name} is not of the domain {domain}", "give an environment that is"):
        DOMAINS[domain].over(np.zeros(gym.spaces.flatdim(space)))
    with refusing(f"{dataset_id} has the reference scores {refs}", "they must be two different numbers"):
        refs = [float(ref) for ref in refs]
        if not np.isfinite(refs).all() or refs[0] == refs[1]:
            raise ValueError("no scale")
    low = np.array(found["low"])
    high = np.array(found["high"])
    return Task(domain, data, dataset_id, env.spec, space, low, high, *refs)


def open_task(args: Args) -> Task:
    """The task that --env and --dataset name: its environment, and the way to its data, which is not read yet."""
    row = ROWS.get(args.env)
    domain = domain_of(args.env)
    source = args.dataset or row.dataset
    if domain == "toy":
        if args.eval_env:
            raise UserError(f"--eval-env {args.eval_env} does not go with --env toy, which has its own environment")
        refs = row.ref_min, row.ref_max
        return make_task(domain, toy_share(source), source, row.env, refs)
    register_robots()
    collected, metadata = None, {}
    if source.endswith(HDF5):
        dataset_id = source
        data = open_hdf5(source, download=args.dataset is None)
    else:
        data = open_minari(source)
        dataset_id = data.spec.dataset_id
        collected = data.spec.env_spec
        metadata = data.storage.metadata
    spec = find_env(args.eval_env or (row and row.env))
    if spec is None and collected:
        with refusing(f"the environment of {dataset_id} cannot be made", CANNOT_MAKE), quiet():
            with data.recover_environment(eval_env=True) as env:
                spec = env.spec
    if spec is None:
        raise UserError(f"{dataset_id} names no environment: give --eval-env ID, or with a D4RL file a Gym row's --env")
    kwargs = dict(DOMAINS[domain].env)
    if row:
        refs = row.ref_min, row.ref_max
        kwargs["max_episode_steps"] = row.max_steps
    else:
        refs = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in refs:
        say(f"{dataset_id} has no reference scores: its score is the return")
        refs = 0.0, 100.0
    if DOMAINS[domain].goal_ends:
        kwargs["maze_map"] = evaluation_maze(dataset_id, spec, collected)
    return make_task(domain, data, dataset_id, spec, refs, **kwargs)


def register_robots():
    """Makes Gymnasium-Robotics' environments known to Gymnasium, and those in modules of the current folder."""
    os.environ.pop("MUJOCO_GL", None)  # nothing is rendered, so nothing may fail for want of a renderer
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with quiet():
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)


def find_env(name):
    """The specification of an environment: an id that Gymnasium knows or, in a module, `module:id`, `module:Class`.

    A specification, or None, is returned as it is.
    """
    if not isinstance(name, str):
        return name
    module, _, inner = name.rpartition(":")
    with refusing(f"environment {name} is not there", "give an id, or module:Class with the module in this folder"):
        if module and hasattr(importlib.import_module(module), inner):
            return EnvSpec(f"{inner}-v0", entry_point=name)
        return gym.spec(inner)


def evaluation_maze(dataset_id: str, spec, collected_spec) -> list:
    """The maze to evaluate in: the spec's, mirrored if the data was collected between mirrored walls (Minari 304)."""

    def maze_of(spec):
        return spec.kwargs.get("maze_map") or gym.spec(spec.id).kwargs["maze_map"]

    def walls(maze):
        return [[cell == 1 for cell in line] for line in maze]

    with refusing(f"{dataset_id} was not collected in a maze", "AntMaze's rows need one: give another --dataset"):
        maze = maze_of(spec)
        collected = walls(maze_of(collected_spec))
    left_to_right = [line[::-1] for line in maze]
    upside_down = maze[::-1]
    for possible in (maze, left_to_right, upside_down):
        if walls(possible) == collected:
            if possible is not maze:
                say(f"{dataset_id}: its evaluation maze is mirrored here, to match the walls of its data")
            return possible
    raise UserError(f"{dataset_id} was collected in another maze than its evaluation environment's")


def open_minari(dataset_id: str):
    """The Minari data set of that id, its newest version where the id has none: the installed one, else downloaded."""
    if not re.fullmatch(r"([-\w]+/)*[-\w]+", dataset_id):
        raise UserError(f"--dataset {dataset_id} is neither an .hdf5 path nor a Minari id such as D4RL/pen/human-v2")
    folder = expand(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets"))
    with quiet():
        import minari

    def load(name):
        data = minari.load_dataset(name)
        data.spec  # noqa: B018 (read at first use: what is damaged shows here)
        return data

    def newest(ids):
        """The id itself, or if it names no version, the id of its highest version."""
        found = [i for i in ids if re.fullmatch(rf"{dataset_id}(-v\d+)?", i)]
        return max(found, key=lambda i: int(i.rpartition("-v")[2]), default=None)

    with refusing(f"{folder} cannot be used", "set MINARI_DATASETS_PATH to a folder that can"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".erdp-lock", f"waiting for another process that is at work in {folder}"):
        with refusing(f"{dataset_id} cannot be read", f"see that it is whole in {folder}"), quiet():
            installed = (path.parent.relative_to(folder) for path in folder.glob(f"{dataset_id}*/data"))
            if found := newest(map(Path.as_posix, installed)):
                return load(found)
            there = f"{folder} has {', '.join(minari.list_local_datasets()) or 'no set'}"
        say(f"looking for {dataset_id} on Minari's server")
        with refusing(f"{dataset_id} cannot be downloaded", f"see `minari list remote`; {there}"), quiet():
            with multiprocessing.pool.ThreadPool(1) as pool:  # Minari itself would wait for ever
                remote = pool.apply_async(minari.list_remote_datasets, kwds=dict(compatible_minari_version=True))
                found = newest(remote.get(PATIENCE))
            if found is None:
                raise LookupError("the server does not have it")
            fetch_minari(found, folder)
            return load(found)


def fetch_minari(dataset_id: str, folder: Path):
    """Downloads a Minari set, which appears in `folder` when it is whole."""
    import minari

    with tempfile.TemporaryDirectory(prefix=".erdp-", dir=folder) as part:
        os.environ["MINARI_DATASETS_PATH"] = part
        try:
            minari.download_dataset(dataset_id)
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(folder)
        (folder / dataset_id).parent.mkdir(parents=True, exist_ok=True)
        os.replace(Path(part) / dataset_id, folder / dataset_id)


def open_hdf5(source: str, download: bool) -> Path:
    """The path of a D4RL file; where `download`, a row's own, which is fetched at first use."""
    if not download:
        path = expand(source)
        if not path.exists():
            raise UserError(f"--dataset {path} does not exist")
        return path
    path = expand(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")) / source
    if path.exists():
        return path
    url = D4RL_SERVER + source
    failed = f"{url} cannot be downloaded", f"fetch it later and save it as {path}"

    def fetch(file):
        say(f"downloading {url}")
        with refusing(*failed), urllib.request.urlopen(url, timeout=PATIENCE) as reply:
            size = int(reply.headers["Content-Length"])
            with tqdm.wrapattr(reply, "read", total=size, desc=source, disable=None) as body:
                shutil.copyfileobj(body, file)
            if file.tell() != size:
                raise OSError(f"{file.tell()} of {size} bytes came")

    with refusing(*failed):
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{path.name}.lock"), f"waiting for another process that fetches {path}"):
            if not path.exists():
                write_whole(path, fetch)
    return path


def toy_share(source: str) -> float:
    """toy-5 -> 0.05: the share of the toy's recorded steps that go towards the high reward."""
    if not (share := re.fullmatch(r"toy-(\d\d?)", source)):
        raise UserError(f"--dataset {source} does not go with --env toy, whose data are toy-0 to toy-99")
    return int(share[1]) / 100


def toy_data(seed: int, share: float = 0.05, episodes: int = 256) -> Batch:
    """Unbalanced two-step episodes: but for a `share` of them, steps drift to the left, away from the high reward."""
    rng = np.random.default_rng(seed)
    away = rng.random((episodes, 2)) < 1 - share
    mean = np.where(away, -0.3, 0.5)
    action = rng.normal(mean, 0.4).clip(-1, 1)  # (E, 2)
    position = np.insert(action.cumsum(1), 0, 0, axis=1)  # (E, 3)
    steps = np.broadcast_to(np.arange(3), position.shape)
    state = np.stack([position, steps], -1)  # (E, 3, 2)
    before = state[:, :-1].reshape(-1, 2)
    after = state[:, 1:].reshape(-1, 2)
    reward = ToyEnv.reward(after[:, 0])
    terminal = np.tile([0.0, 1.0], episodes)
    return Batch(before, action.reshape(-1, 1), reward, after, terminal)


def load_minari(task: Task):
    """All transitions of a Minari set, and each episode's rewards. AntMaze as D4RL meant it: the goal ends an episode.

    Of the rewards, none after a state in which D4RL would have ended the episode.
    """
    domain = DOMAINS[task.domain]
    parts, rewards = [], []
    for episode in task.data.iterate_episodes():
        n = len(episode.rewards)
        state = flatten(layout(task.space), episode.observations)
        action = np.asarray(episode.actions, np.float32)
        reward = np.asarray(episode.rewards, float)
        terminal = np.array(episode.terminations, np.float32)
        found = state.shape, action.shape, reward.shape, terminal.shape
        wanted = (n + 1, task.state_dim), (n, *task.low.shape), (n,), (n,)
        if found != wanted:
            arrays = f"observations, actions, rewards, terminations of episode {episode.id} are {found}, not {wanted}"
            raise UserError(f"{task.dataset_id} has arrays of unequal length: {arrays}")
        if domain.goal_ends and (reward > 0).any():
            n = int(np.argmax(reward > 0)) + 1
            terminal[n - 1] = 1
        action = action[:n].reshape(n, -1)
        reward = reward[:n]
        next_state = state[1 : n + 1]
        parts.append(Batch(state[:n], action, reward, next_state, terminal[:n]))
        over = [step for step in range(1, n) if domain.over(state[step])]
        rewards.append(reward[: min(over, default=n)])
    if not parts:
        return None, rewards
    columns = [np.concatenate(column) for column in zip(*parts)]
    return Batch(*columns), rewards


def load_hdf5(task: Task):
    """All transitions of a D4RL file, and each episode's rewards. As in D4RL, row i is paired with row i + 1.

    A timeout row is left out, as the next row belongs to another episode, and so is the last row.
    """
    import h5py

    keys = "observations", "actions", "rewards", "terminals", "timeouts"
    with h5py.File(task.data) as file:
        if missing := [key for key in keys if key not in file]:
            raise UserError(f"{task.data} lacks {', '.join(missing)}, which D4RL's files have")
        columns = [np.asarray(file[key][()], float) for key in keys]
    state, action, reward, terminal, timeout = columns
    n = reward.size
    found = [column.shape for column in columns]
    wanted = [(n, task.state_dim), (n, task.low.size), (n,), (n,), (n,)]
    if found != wanted:
        raise UserError(f"{task.data} does not fit {task.spec.id}: its {', '.join(keys)} are {found}, not {wanted}")
    terminal, timeout = terminal != 0, timeout != 0
    ends = np.flatnonzero(terminal | timeout) + 1
    episodes = np.split(reward, ends)[: len(ends)] or [reward]  # the file may end within one
    rows = np.flatnonzero(~timeout[:-1])
    next_state = state[rows + 1]
    return Batch(state[rows], action[rows], reward[rows], next_state, terminal[rows]), episodes


def load_data(task: Task, args: Args) -> Batch:
    """The data set as float32 tensors on the device: actions scaled to [-1, 1], rewards as the domain has them.

    Fills in task.returns and, where the environment has no time limit, the longest recorded episode's length as one.
    """
    name, spec = task.dataset_id, task.spec
    with refusing(f"{name} cannot be read", "see that it is whole, and not open elsewhere"):
        with quiet(), np.errstate(over="ignore"):
            if isinstance(task.data, float):
                data = toy_data(args.seed, task.data)
                rewards = data.reward.reshape(-1, 2)
            elif isinstance(task.data, Path):
                data, rewards = load_hdf5(task)
            else:
                data, rewards = load_minari(task)
    if data is None or len(data.reward) == 0:
        raise UserError(f"{name} is empty: it holds no transition")
    largest = np.finfo(np.float32).max
    for column, values in data._asdict().items():
        if not (np.abs(values) <= largest).all():
            raise UserError(f"{name} has NaN or infinity among its {column} values")
    if spec.max_episode_steps is None:
        spec.max_episode_steps = max(map(len, rewards))
        say(f"{spec.id} has no time limit: its episodes are cut after {spec.max_episode_steps} steps")
    limit = spec.max_episode_steps
    returns = [reward[:limit].sum() for reward in rewards]
    task.returns = np.array(returns)
    low, high = task.low.ravel(), task.high.ravel()
    action = 2 * (data.action - low) / (high - low) - 1
    most = np.abs(action).max()
    if most > 1 + 1e-3:
        raise UserError(f"{name} has actions outside their bounds: {most:.4g} on a scale where those are ±1")
    reward = DOMAINS[task.domain].reward(data.reward)
    data = data._replace(action=action.clip(-1, 1), reward=reward)
    columns = [np.ascontiguousarray(column, np.float32) for column in data]
    return Batch(*(torch.as_tensor(column, device=args.device) for column in columns))


# ==== 9. Acting and evaluation ========================================================================================


class Actor:
    """The policy as it acts: of `args.eval_candidates` samples, one drawn by softmax over their pessimistic value."""

    def __init__(self, agent: Agent, parts, low, high):
        self.agent, self.layout = agent, parts
        self.low, self.high = np.asarray(low), np.asarray(high)  # the actions' bounds, in their shape

    @torch.no_grad()
    def __call__(self, observation, streams=None) -> np.ndarray:
        """Flat states (N, S), or dicts as the environment has them -> actions (N, ...) within the environment's bounds.

        One observation, in any shape, gives one action. State n draws from the random generator streams[n].
        """
        if isinstance(observation, dict) or list(np.shape(observation)) == self.layout:
            observation = flatten(self.layout, observation)
        state = np.asarray(observation, np.float32)
        if alone := state.ndim == 1:
            state = state[None]
        agent, args = self.agent, self.agent.args
        device = agent.sde.theta_bar.device
        T, C = agent.sde.num_steps, args.eval_candidates
        A = self.low.size
        streams = streams or [np.random.default_rng() for _ in state]
        noise = [stream.standard_normal((T, C, A), np.float32) for stream in streams]
        noise = np.stack(noise, 1)
        noise = torch.as_tensor(noise, device=device)  # (T, N, C, A)
        state = torch.as_tensor(state, device=device)
        state = state[:, None].expand(-1, C, -1)  # (N, C, S)
        action = sample_actions(agent.policy, agent.sde, state, noise, args.clip_denoised)  # (N, C, A)
        if C > 1:
            value = pessimistic_value(agent.critics_target(state, action), args)  # (N, C)
            below = value.double().softmax(-1).cumsum(-1)
            u = [[stream.random()] for stream in streams]
            u = torch.tensor(u, dtype=torch.float64, device=device)
            chosen = torch.searchsorted(below, u, right=True)  # (N, 1)
            chosen = chosen.clamp(max=C - 1)
            action = action.take_along_dim(chosen[..., None], 1)
        action = action.double().cpu().numpy()
        action = action.reshape(-1, *self.low.shape)
        action = self.low + (action + 1) / 2 * (self.high - self.low)
        action = action.clip(self.low, self.high)
        return action[0] if alone else action


class Episode(gym.Wrapper):
    """One episode of flat states. Once it has ended, as `info` says, it stands still until the next reset."""

    def __init__(self, env: gym.Env, task: Task):
        super().__init__(env)
        self.layout = layout(task.space)
        self.over = DOMAINS[task.domain].over
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (task.state_dim,))

    def reset(self, **kwargs):
        observation, _ = self.env.reset(**kwargs)
        self.state = flatten(self.layout, observation)
        self.ended = False
        return self.state, {}

    def step(self, action):
        reward, success = 0.0, np.nan
        if not self.ended:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.state = flatten(self.layout, observation)
            self.ended = terminated or truncated or bool(self.over(self.state))
            success = float(info.get("success", np.nan))
        return self.state, reward, False, False, {"ended": self.ended, "success": success}


def make_envs(task: Task, episodes: int, num_envs: int | None = None) -> gym.vector.VectorEnv:
    """Environments that step together in worker processes, by default two a core and at most one an episode."""

    def make():
        if multiprocessing.parent_process():  # in a worker: to stop is the main process's business
            for number in STOPS:
                signal.signal(number, signal.SIG_IGN)
        with quiet():
            return Episode(gym.make(task.spec, disable_env_checker=True), task)

    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        cores = os.cpu_count()
    number = min(episodes, num_envs or 2 * cores)
    makers = [make] * number
    if task.domain == "toy":
        return gym.vector.SyncVectorEnv(makers)
    with quiet():  # on Linux by fork: a worker starts at once, and touches neither GPU nor threads
        return gym.vector.AsyncVectorEnv(makers, context="fork" if sys.platform == "linux" else None)


def evaluate(actor, envs, episodes: int, seed: int, stops=()) -> dict | None:
    """Plays `episodes` episodes: their return, success (NaN where the environment has none), length; None if stopped.

    Episode e has its own seed and random stream, whichever environment plays it: neither the number of environments
    nor anything in training changes the result.
    """
    K = envs.num_envs
    played = []
    with tqdm(total=episodes, desc=f"evaluating {episodes} episodes", leave=False, disable=None) as bar:
        for first in range(0, episodes, K):  # K episodes at a time
            wave = range(first, first + K)
            sources = [np.random.SeedSequence((seed, e)) for e in wave]
            streams = [np.random.default_rng(source) for source in sources]
            seeds = [int(source.generate_state(1)[0]) for source in sources]
            state, _ = envs.reset(seed=seeds)
            actions = np.stack([actor.low] * K)
            alive = np.array(wave) < episodes
            total = np.zeros(K)
            success = np.full(K, np.nan)
            length = np.zeros(K)
            while alive.any():
                if stops:  # which a signal fills
                    return None
                playing = [streams[k] for k in np.flatnonzero(alive)]
                actions[alive] = actor(state[alive], playing)
                state, reward, _, _, info = envs.step(actions)
                total += reward  # 0 of an episode that has ended
                success = np.fmax(success, info["success"])
                length += alive
                bar.update(int((alive & info["ended"]).sum()))
                alive &= ~info["ended"]
            played.append((total, success, length))
    columns = np.concatenate(played, 1)[:, :episodes]
    return dict(zip(("return", "success", "length"), columns))


def summary(task: Task, result: dict) -> dict:
    """The evaluation's part of a row of metrics.csv: means and standard deviations over episodes."""
    returns = result["return"]
    score = task.score(returns)
    success = float(result["success"].mean())
    if math.isnan(success):  # the environment has none
        success = None
    return dict(
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        score_mean=float(score.mean()),
        score_std=float(score.std()),
        success=success,
        length=float(result["length"].mean()),
    )


def in_words(row: dict) -> str:
    words = "score {score_mean:.1f} ± {score_std:.1f}, return {return_mean:.2f} ± {return_std:.2f}, length {length:.0f}"
    if row["success"] is not None:
        words += ", success {success:.0%}"
    return words.format(**row)


# ==== 10. Training, and the folder that a run leaves ==================================================================

FORMAT = 2  # of the files below
ACTING = "policy", "critics_target"  # what a policy.pt has of an agent
SAVE_EVERY = 600  # seconds of updates between two checkpoints at the most
LOG_EVERY = 100  # updates between two readings of the losses
SPEAK_EVERY = 300  # seconds between two lines in a log file
COLUMNS = "step", "return_mean", "return_std", "score_mean", "score_std", "success", "length", *METRICS, "seconds"


def run_folder(args: Args) -> Path:
    name = (args.env or args.dataset or "toy").replace("/", "-")
    return expand(args.run_dir or f"runs/{name}__{args.variant}__{args.seed}")


def policy_file(args: Args) -> Path:
    return expand(args.checkpoint or run_folder(args) / "policy.pt")


def load_file(path: Path, device="cpu") -> dict:
    """What a policy.pt or checkpoint.pt of this version holds. Raises UserError where it is not a whole one."""
    if not path.exists():
        raise UserError(f"{path} does not exist: check --run-dir or --checkpoint")
    with refusing(f"{path} is not a whole policy or checkpoint of this program", "give another file"):
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError("PyTorch cannot read it safely") from None
        if saved.get("format") != FORMAT:
            raise UserError(f"{path} was made by another version of this program, which can read it")
        saved["dataset_id"] = str(saved["dataset_id"])
        saved["args"] = Args(**saved["args"])
        for name, hint in get_type_hints(Args).items():
            value = getattr(saved["args"], name)
            allowed = get_args(hint) or (hint,)  # types, or the words of a Literal
            fits = type(value) in allowed or value in allowed
            if not fits or value != value:  # NaN
                raise TypeError(f"its {name} is {value}")
        return saved


class Captured:
    """A function without arguments as one CUDA graph. Each call runs it once: three times as it is, then as a replay.

    The function must read and write the same tensors in place, and wait for nothing.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self):
        self.calls += 1
        if self.calls <= 3:  # what is initialised on first use must not be captured, and wants a stream of its own
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if self.calls == 4:
            with torch.cuda.graph(self.graph):
                self.function()
        self.graph.replay()


@contextlib.contextmanager
def interruptible():
    """Yields a list that one of STOPS fills, to be looked at between updates; a second one ends the program."""
    stops = []
    with contextlib.ExitStack() as handlers:

        def stop(number, _):
            stops.append(number)
            handlers.close()  # puts the old ones back

        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            for number in STOPS:
                previous = signal.signal(number, stop)
                handlers.callback(signal.signal, number, previous)
        yield stops


def check_moments(optimizer):
    """Raises where an optimiser's state does not fit its parameters: fused Adam itself would read beyond them."""
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        if not state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape:
            raise ValueError("an optimiser's moments do not fit")


class Run:
    """A run of Algorithm 1: the agent, how far it is, and what it leaves in its folder.

    `rows` are the lines of metrics.csv, one an evaluation; `latest` and `totals` the METRICS of the last update and
    summed since the last evaluation. A file is there as a whole or not at all.
    """

    def __init__(self, args: Args, folder: Path, task: Task, data: Batch):
        self.args = args
        self.folder = folder
        self.task = task
        self.data = data
        device = args.device
        rows, action_dim = data.action.shape
        checksum = 0
        for column in data:
            checksum = zlib.crc32(column.cpu().numpy(), checksum)
        self.about = dict(
            transitions=rows,
            state_dim=task.state_dim,
            action_dim=action_dim,
            data=checksum,
        )
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.agent = Agent(task.state_dim, action_dim, args, device)
        self.actor = Actor(self.agent, layout(task.space), task.low, task.high)
        self.noise = noise_buffers(args, action_dim, device)
        self.latest = torch.zeros(len(METRICS), device=device)
        self.totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)  # the last: of so many updates
        self.step = 0
        self.rows = []
        self.began = self.saved = time.monotonic()
        self.timed = None  # (when, step) from which updates are timed; None where they have been interrupted
        self.spoke = None  # when progress was last said
        self.evaluating = None  # seconds an evaluation

    def learn(self):
        """One update, all of it on the device."""
        batch = Batch(*(column[self.noise.rows] for column in self.data))
        measured = update(self.agent, batch, self.noise)
        self.latest.copy_(torch.stack([measured[name] for name in METRICS]))
        self.totals[:-1] += self.latest
        self.totals[-1] += 1

    def write(self, name: str, **content):
        """A file that `load_file` reads: `content`, and what a policy needs to be evaluated without the data."""
        task = self.task
        saved = dict(
            format=FORMAT,
            args=vars(self.args),
            about=self.about,
            dataset_id=task.dataset_id,
            spec=written(task.spec),
            refs=(task.ref_min, task.ref_max),
            layout=self.actor.layout,
            low=task.low.tolist(),
            high=task.high.tolist(),
        )
        saved |= content
        write_whole(self.folder / name, lambda file: torch.save(saved, file))

    def write_json(self, name: str, content: dict):
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self.folder / name, lambda file: file.write(text), "w")

    def write_table(self, file):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)

    def save(self):
        """The checkpoint: all that the rest of the run depends on."""
        self.saved = time.monotonic()
        self.timed = None
        self.write(
            "checkpoint.pt",
            step=self.step,
            seconds=self.saved - self.began,
            rows=self.rows,
            totals=self.totals,
            generator=self.generator.get_state(),
            agent=self.agent.state_dict(),
        )

    def restore(self):
        """Takes up the checkpoint. Raises UserError where it is damaged, or of other data than these."""
        path = self.folder / "checkpoint.pt"
        saved = load_file(path)
        with refusing(f"{path} is damaged", "start anew with another --run-dir"):
            if saved["about"] != self.about:
                raise UserError(f"{path} belongs to the data {saved['about']}, not to {self.about}: give those")
            self.agent.load_state_dict(saved["agent"])
            if self.agent.updates > 0:
                check_moments(self.agent.policy_optimizer)
                check_moments(self.agent.critic_optimizer)
            self.totals.copy_(saved["totals"])
            self.step = int(saved["step"])
            self.began -= float(saved["seconds"])
            self.rows = [{name: row[name] for name in COLUMNS} for row in saved["rows"]]
            numbers = [row[name] for row in self.rows for name in COLUMNS[:5]]
            good = all(isinstance(number, int | float) for number in numbers)
            if self.step < 0 or not good:
                raise ValueError("its progress is no number")
            there = torch.device(saved["args"].device)
            if there.type == self.generator.device.type:
                self.generator.set_state(saved["generator"])
            else:  # the two kinds of device have different generators
                self.generator.manual_seed(self.args.seed + self.step)

    def describe(self):
        """Writes config.json, and says what is learned from and where."""
        args, task = self.args, self.task
        mean = float(task.returns.mean())
        data = dict(
            data_episodes=len(task.returns),
            data_return=mean,
            data_score=task.score(mean),
        )
        packages = "numpy", "minari", "gymnasium", "gymnasium-robotics", "mujoco"
        versions = {name: importlib.metadata.version(name) for name in packages}
        versions |= dict(torch=torch.__version__, python=sys.version.split()[0])  # torch with its build, as +cu130
        device = f"CPU ({torch.get_num_threads()} threads)"
        if args.device.startswith("cuda"):
            device = torch.cuda.get_device_name(args.device)
        settings = vars(args) | dict(dataset_id=task.dataset_id)
        machine = dict(device_name=device, versions=versions)
        self.write_json("config.json", settings | self.about | data | machine)
        say(f"{args.env}: {self.about['transitions']} transitions of {task.dataset_id}")
        say("its {data_episodes} episodes: mean return {data_return:.2f}, score {data_score:.1f}".format(**data))
        say(f"variant {args.variant} on {device}, into {self.folder}")

    def log(self, values: dict):
        """Values for TensorBoard, which must never cost a run."""
        with contextlib.suppress(OSError):
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.flush()

    def check(self, bar):
        """Reads the losses, the only wait for the device, and shows them. Raises FloatingPointError at a NaN."""
        losses = dict(zip(METRICS, self.latest.tolist()))
        numbers = [self.totals]
        numbers += self.agent.policy.parameters()
        numbers += self.agent.critics.parameters()
        if not all(x.isfinite().all() for x in numbers):
            good = f"{self.folder / 'checkpoint.pt'} is the last good checkpoint"
            raise FloatingPointError(f"a loss is NaN or infinite at or just before update {self.step}: {good}")
        self.log({f"losses/{name}": value for name, value in losses.items()})
        words = "critic {critic_loss:.3g}, diffusion {diffusion_loss:.3g}, Q {q:.4g}".format(**losses)
        bar.set_postfix_str(words)
        now = time.monotonic()
        due = self.spoke is None or (bar.disable and now - self.spoke > SPEAK_EVERY)
        if self.timed and due:
            then, step = self.timed
            rate = (self.step - step) / (now - then)
            say(f"update {self.step}: {words}; {rate:.1f} updates a second, {self.to_go(rate)} to go with evaluations")
            self.spoke = now
        self.timed = time.monotonic(), self.step

    def to_go(self, rate: float) -> str:
        """The time to the run's end, evaluations included: the last one's or, before it, a guess from one action."""
        args = self.args
        if self.evaluating is None:
            envs = self.envs.num_envs
            for _ in range(2):  # the first one is slow
                began = time.monotonic()
                self.actor(np.zeros((envs, self.task.state_dim)))
            steps = math.ceil(args.eval_episodes / envs) * self.task.spec.max_episode_steps
            self.evaluating = steps * (time.monotonic() - began)
        updating = (args.num_steps - self.step) / rate
        evaluations = math.ceil(args.num_steps / args.eval_every) - (self.step - 1) // args.eval_every
        return tqdm.format_interval(updating + evaluations * self.evaluating)

    def due(self) -> bool:
        """Whether the policy of this step is to be evaluated and has not been."""
        evaluated = self.rows[-1]["step"] if self.rows else 0
        at_end = self.step == self.args.num_steps
        return self.step > evaluated and (at_end or self.step % self.args.eval_every == 0)

    def evaluate(self, stops):
        """Evaluates the policy and keeps what comes out, the checkpoint last; nothing if it is stopped."""
        args, began = self.args, time.monotonic()
        result = evaluate(self.actor, self.envs, args.eval_episodes, args.seed, stops)
        if result is None:
            return
        now = time.monotonic()
        self.evaluating = now - began
        means = self.totals[:-1] / self.totals[-1]
        row = dict(step=self.step) | summary(self.task, result)
        row.update(zip(METRICS, means.tolist()))
        row["seconds"] = round(now - self.began, 1)
        score = row["score_mean"]
        is_best = all(score > earlier["score_mean"] for earlier in self.rows)
        self.rows.append(row)
        self.totals.zero_()
        self.log(dict(score=score))
        write_whole(self.folder / "metrics.csv", self.write_table, "w")
        weights = {part: getattr(self.agent, part).state_dict() for part in ACTING}
        self.write("policy.pt", agent=weights)
        if is_best:
            self.write("policy-best.pt", agent=weights)
        self.save()  # last: a run cut off before it evaluates again
        say(f"update {self.step}: {in_words(row)}")

    def loop(self, envs) -> int:
        """Updates and evaluations to the end. Returns the exit status: 0, or 128 and the number of a signal."""
        from torch.utils.tensorboard import SummaryWriter

        args, self.envs = self.args, envs
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        learn = Captured(self.learn) if args.device.startswith("cuda") else self.learn
        if args.compile:
            say("compiling, which takes half a minute or more")
        bar = tqdm(total=args.num_steps, initial=self.step, unit="update", disable=None)
        with contextlib.closing(self.writer), bar, interruptible() as stops:
            while True:
                if self.due() and not stops:
                    self.evaluate(stops)
                if stops or self.step == args.num_steps:
                    break
                sample_noise(self.noise, len(self.data.reward), self.generator)
                learn()
                self.step += 1
                bar.update()
                if stops or self.due() or self.step % LOG_EVERY == 0:
                    self.check(bar)
                    if self.due() or time.monotonic() - self.saved > SAVE_EVERY:
                        self.save()
            if stops:
                self.save()
                say(f"stopped at update {self.step}: --resume goes on from there")
                return 128 + stops[0]
        return 0

    def finish(self):
        write_whole(self.folder / "curve.png", lambda file: draw_curve(file, self))
        best = max(self.rows, key=lambda row: row["score_mean"])
        scores = dict(
            final=self.rows[-1]["score_mean"],
            best=best["score_mean"],
            best_step=best["step"],
            steps=self.step,
        )
        self.write_json("result.json", scores)
        words = "final score {final:.1f}, best {best:.1f} at update {best_step}".format(**scores)
        say(f"{words}; see {self.folder}")


def train(args: Args) -> int:
    """A run, from its start or its checkpoint to its end. Returns the exit status."""
    folder = run_folder(args)
    left = {path.name for path in folder.glob("[!.]*")} - {"config.json"}  # which may be there before a checkpoint
    if left and not args.resume:
        raise UserError(f"the run folder {folder} exists: --resume goes on with it, --run-dir names another")
    result = folder / "result.json"
    if result.exists():
        with refusing(f"{result} is damaged", "move it away, then --resume"):
            steps = json.loads(result.read_text())["steps"]
            if steps >= args.num_steps:
                say(f"{folder} is finished, with {steps} updates")
                return 0
    if args.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(args.device).index or 0)  # which "cuda" alone has not
    task = open_task(args)
    data = load_data(task, args)
    with refusing("the networks and batches cannot be made", "give smaller sizes"):
        run = Run(args, folder, task, data)
    with refusing(f"{folder} cannot be written", "give another --run-dir"):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        if args.resume and (folder / "checkpoint.pt").exists():  # asked now, as another process may have begun it
            run.restore()
        if run.step > args.num_steps:
            raise UserError(f"{folder} is at update {run.step} already, past --num-steps {args.num_steps}")
        run.describe()
        result.unlink(missing_ok=True)  # of a finished run that now goes on
        if run.step == 0:
            run.save()  # from here on, --resume works whenever the run is cut off
        with contextlib.closing(make_envs(task, args.eval_episodes)) as envs:
            status = run.loop(envs)
        if status == 0:
            run.finish()
    return status


def draw_curve(file, run: Run):
    """A picture of the score over updates; for the toy, between Figure 1's two other panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    if run.task.domain == "toy":
        figure.set_figwidth(16)
        left, curve, right = figure.subplots(1, 3)
        draw_toy(left, right, run)
    else:
        curve = figure.subplots()
    step = [row["step"] for row in run.rows]
    mean = np.array([row["score_mean"] for row in run.rows])
    std = np.array([row["score_std"] for row in run.rows])
    curve.plot(step, mean)
    curve.fill_between(step, mean - std, mean + std, alpha=0.2)
    level = run.task.score(run.task.returns.mean())
    curve.axhline(level, color="gray", linestyle=":", label="the data's own episodes")
    curve.set(xlabel="updates", ylabel="score ± deviation over episodes", title=f"{run.args.env}, {run.args.seed}")
    curve.legend()
    figure.savefig(file, format="png")


def draw_toy(left, right, run: Run):
    """Figure 1: the reward beside the density of the data, and the learned Q of the first action."""
    x = np.linspace(-2, 2, 401)
    position = run.data.next_state[:, 0].cpu()
    left.plot(x, ToyEnv.reward(x))
    left.twinx().hist(position, 60, density=True, alpha=0.4, color="tab:orange")
    left.set(xlabel="state", ylabel="reward", title="Reward, and density of the data")
    action = torch.linspace(-1, 1, 201, device=run.args.device)
    action = action[:, None]
    state = torch.zeros_like(action).expand(-1, 2)
    with torch.no_grad():
        q = run.agent.critics(state, action).cpu()  # (M, 201)
    x = action[:, 0].cpu()
    mean, std = q.mean(0), q.std(0, correction=0)
    right.plot(x, mean, label="mean of the ensemble, ± deviation")
    right.fill_between(x, mean - std, mean + std, alpha=0.2)
    right.plot(x, lcb(q, run.args.lcb_coef), label=f"LCB, beta = {run.args.lcb_coef:g}")
    right.set(xlabel="first action", title="Q at state 0")
    right.legend()


def set_matmul_precision(args: Args):
    """The process's precision of float32 products, and on a CPU the library that makes them.

    "medium" sends them from MKL, which uses no AVX-512 on AMD and takes twice as long, to oneDNN. That may then round
    factors to bfloat16, but does so only with AMX instructions or on ARM; everywhere else the products stay float32.
    """
    exact = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
    on_cpu = "medium" if exact and args.device == "cpu" else "highest"
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else on_cpu)


# ==== 11. Trained policies, and the command line ======================================================================


def load_policy(path, device="cpu", candidates: int | None = None) -> Actor:
    """The Actor of a run's policy.pt or checkpoint.pt. Raises UserError where the file is not a whole one."""
    return actor_of(load_file(Path(path), device), path, device, candidates)


def actor_of(saved: dict, path, device, candidates: int | None) -> Actor:
    """The Actor of what `load_file` read from `path`."""
    with refusing(f"{path} is not a whole policy or checkpoint of this program", "give another file"):
        args, about = saved["args"], saved["about"]
        args = dataclasses.replace(args, compile=False, eval_candidates=candidates or args.eval_candidates)
        agent = Agent(about["state_dim"], about["action_dim"], args, device)
        for part in ACTING:
            getattr(agent, part).load_state_dict(saved["agent"][part])
        low, high = np.array([saved["low"], saved["high"]])  # of one shape
        actor = Actor(agent, saved["layout"], low, high)
        action = actor(np.zeros(about["state_dim"]))  # what does not fit together shows here
        if not ((low < high) & np.isfinite(action)).all():
            raise ValueError("its bounds or weights make no action")
        return actor


def evaluate_only(args: Args) -> int:
    """--eval-only: the score of a saved policy in the environment that its file names."""
    path = policy_file(args)
    saved = load_file(path, args.device)
    actor = actor_of(saved, path, args.device, args.eval_candidates)
    if args.env != "toy":
        register_robots()
    with refusing(f"{path} names no environment that can be made", "see that what it needs is installed"):
        spec = TOY if args.env == "toy" else EnvSpec.from_json(saved["spec"])
        domain = domain_of(args.env)
        task = make_task(domain, None, saved["dataset_id"], spec, saved["refs"])
    with contextlib.closing(make_envs(task, args.eval_episodes)) as envs:
        result = evaluate(actor, envs, args.eval_episodes, args.seed)
    say(f"{path}: {in_words(summary(task, result))}")
    return 0


# Settings that a resumed or evaluated run may change, as but for rounding they do not change what it learns or learned.
FREE = set("num_steps device compile precision dataset eval_env eval_every eval_episodes eval_candidates".split())
FREE |= set("run_dir resume checkpoint eval_only".split())
ZERO_TOO = "seed", "ema_start"  # counts that may be 0
POSITIVE = "lr", "critic_lr", "grad_norm"
AT_MOST_ONE = "discount", "target_rate", "ema_rate"


def read_words(argv: list[str], default: Args) -> Args:
    """The settings of a command line. Raises UserError with tyro's sentence where it makes no sense of it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Args, args=argv, default=default, prog="erdp.py")
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        text = re.sub("[│╭╮╰╯|+]", " ", said.getvalue())
        _, *parts = re.split("[─-]{4,}", text)  # a title, then what it says
        words = " ".join(" ".join(parts).split())
        raise UserError(words or "the settings make no sense: --help shows them") from None


def saved_settings(given: Args) -> Args | None:
    """The settings of the run that --resume or --eval-only name, but for where it goes on; None for a new run."""
    path = policy_file(given) if given.eval_only else run_folder(given) / "checkpoint.pt"
    if given.resume and not path.exists():
        if given.env or given.dataset:
            return None
        raise UserError(f"there is no checkpoint {path}: check --run-dir, or give --env to start")
    saved = load_file(path)
    args = dataclasses.replace(saved["args"], run_dir=given.run_dir, resume=False)
    if not saved["dataset_id"].endswith(HDF5):
        args.dataset = saved["dataset_id"]  # with the version that it had
    if args.device != "cpu" and (given.device == "cpu" or not torch.cuda.is_available()):
        args.device = "cpu"
        args.compile = False
        if args.precision == "tf32":
            args.precision = "float32"
    return args


def parse(argv: list[str]) -> Args:
    """Settings from the command line over the row's preset, or over those of the run that it goes on with.

    Raises UserError where they make no sense, or would change what a run has learned.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    nothing = Args(env="", device="")
    given = read_words(words, nothing)  # read twice: first to see which row or run the defaults come from
    default = saved_settings(given) if given.resume or given.eval_only else None
    name = given.env or given.dataset or "toy"
    if re.fullmatch(r"toy-\d+", name):
        name = "toy"
    args = read_words(argv, default or preset(name, given.variant, given.device))
    if not default and args.env not in (*ROWS, args.dataset):  # a bare --dataset is its own row
        near = ", ".join(difflib.get_close_matches(args.env, ROWS, 3, 0))
        raise UserError(f"--env {args.env} is not a row of the paper's tables: the nearest names are {near}")

    def require(good: bool, name: str, words: str):
        if not good:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)} but must be {words}")

    T, steps = args.num_diffusion_steps, 2
    if args.variant == "released":
        steps = 3  # its entropy term has the times 1, 2 and T
    require(T >= steps, "num_diffusion_steps", f"at least {steps} here")
    require(args.q_time is None or 1 <= args.q_time <= T, "q_time", f"a diffusion time, 1 to {T}")
    free = FREE - {"eval_env"} | {"seed"} if given.eval_only else FREE
    for name, value in vars(args).items():
        if default and name not in free and value != getattr(default, name):
            problem = f"the run was made with --{name.replace('_', '-')} {getattr(default, name)}"
            raise UserError(f"{problem}, not {value}: give the same")
        if isinstance(value, int | float):
            least = 1 if type(value) is int and name not in ZERO_TOO else 0
            require(value >= least, name, f"at least {least}")
            require(value < math.inf, name, "finite")
            require(type(value) is float or value < 2**63, name, "less than 2**63")
        if name in POSITIVE:
            require(value > 0, name, "more than 0")
        if name in AT_MOST_ONE:
            require(value <= 1, name, "at most 1")
    if args.variant == "debruijn" and args.loss == "likelihood":
        problem = "--loss likelihood does not go with --variant debruijn"
        raise UserError(f"{problem}, which needs E[eps | x_t]: give --loss noise or --loss posterior")
    if args.checkpoint and not args.eval_only:
        raise UserError("--checkpoint goes with --eval-only; --resume goes on from the run folder's own checkpoint")
    count = torch.cuda.device_count()
    devices = {"cpu"} | {f"cuda:{n}" for n in range(count)}
    if count:
        devices.add("cuda")
    if args.device not in devices:
        there = f"PyTorch sees {count} CUDA devices"
        raise UserError(f"--device {args.device} is not there: {there}; give --device cpu, cuda or cuda:N")
    if args.precision == "tf32" and args.device == "cpu":
        raise UserError("--precision tf32 is CUDA's: give float32 or bf16 with --device cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit status (`--help` raises SystemExit)."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        set_matmul_precision(args)
        return evaluate_only(args) if args.eval_only else train(args)
    except UserError as error:
        print("erdp:", *str(error).splitlines(), file=sys.stderr)  # a large Box describes itself in several lines
        return 2
    except FloatingPointError as error:
        print("erdp:", error, file=sys.stderr)
        return 1
    except (MemoryError, torch.OutOfMemoryError):
        print("erdp: this needs more memory than there is: give smaller sizes", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of --help, whose reader has seen enough
        sys.stdout = open(os.devnull, "w")
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(line_buffering=True, errors="replace")  # a log file is as far as the run is
    sys.exit(main())
