"""Entropy-regularized Diffusion Policy with Q-Ensembles (ERDP) for offline RL, in one file.

Reference: Zhang, Luo, Sjölund, Schön and Mattsson, "Entropy-regularized Diffusion Policy with Q-Ensembles for Offline
Reinforcement Learning", arXiv:2402.04080. Equation, table and algorithm numbers are the paper's, and the code is in its
order: settings, SDE (Eq. 1-8), networks, sampler (Eq. 10), losses (Eq. 5, 12-17), data, evaluation, Algorithm 1, main.

    python erdp.py                                      # the toy task of Figure 1
    python erdp.py --env antmaze-umaze-v0 --seed 0      # one row of Table 2 with the paper's settings
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import difflib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

DISCOUNT = 0.99
TARGET_RATE = 0.005  # of the Q targets, every step ("eta" in Algorithm 1, not the eta of Eq. 12)
POLICY_EMA_RATE, POLICY_EMA_EVERY, POLICY_EMA_START = 0.005, 5, 1000
CRITIC_LR = 3e-4  # in every domain; Table 4's learning rate is the policy's
BACKUP_CANDIDATES = 10  # next actions of max Q-backup
HIDDEN = 256  # width of every network
TOY_HIDDEN, TOY_CRITIC_LR = 64, 2e-3  # the toy's small networks learn in 4,000 updates
LOG_EVERY = 100  # updates between two readings of the losses, the only waits for the device in the training loop


class UserError(Exception):
    """Bad input: its one sentence goes to stderr and the program ends with status 2."""


# ==== 1. Settings: Section 4.1, Table 4, and the 20 rows of Tables 1 and 2 ============================================

@dataclasses.dataclass
class Args:
    """Entropy-regularized diffusion policy with Q-ensembles (arXiv:2402.04080). What is not given is the row's preset:
    add --env ROW to --help to see it."""

    env: str = "toy"
    """toy, or a row of the paper's Tables 1 and 2, such as antmaze-umaze-v0"""
    seed: int = 0
    """seed of initialisation, batches, noise and evaluation"""
    dataset: str | None = None
    """a Minari id or an .hdf5 path in D4RL's layout, in place of the row's own data"""
    variant: Literal["paper", "released"] = "paper"
    """the equations as the paper means them, or as the authors' released code computes them"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    num_steps: int = 1_000_000
    """updates in all"""
    batch_size: int = 256
    """transitions an update"""
    num_critics: int = 64
    """M, the ensemble's size"""
    lcb_coef: float = 4.0
    """beta of Eq. 17"""
    pessimism: Literal["lcb", "min"] = "lcb"
    """lcb: Eq. 17 with independent targets; min: clipped double Q, the minimum over members in a shared target"""
    entropy_coef: float = 0.01
    """alpha of Eq. 12"""
    num_diffusion_steps: int = 5
    """T"""
    schedule: Literal["cosine", "constant", "linear", "vp"] = "cosine"
    """theta_t of Eq. 1 over t"""
    loss: Literal["noise", "likelihood", "posterior"] = "noise"
    """diffusion loss: Eq. 5; IR-SDE's likelihood loss (Table 4); or the latter without its Euler step"""
    lr: float = 3e-4
    """the policy's learning rate (the critics' is 3e-4)"""
    eta: float = 1.0
    """Q-learning weight of Eq. 12"""
    grad_norm: float = 4.0
    """gradient norm at which the policy's and the whole ensemble's gradients are each clipped"""
    max_q_backup: bool = False
    """targets take the best of 10 next actions for each member"""
    clip_denoised: bool = True
    """clamp x0-hat to the action bounds inside each reverse step (Table 4's action clip)"""
    compile: bool = False
    """compile the losses with torch.compile: on a CPU about 1.5 times as fast, once that has taken half a minute"""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """of matrix products: float32, tf32 (CUDA), or bf16 for the ensemble's; all else is float32"""
    eval_every: int = 50_000
    """updates between two evaluations"""
    eval_episodes: int = 100
    """episodes an evaluation"""
    eval_candidates: int = 50
    """sampled actions among which one is drawn by softmax over their pessimistic value; 1 is a plain sample
    (--eval-only: as in training unless given)"""
    run_dir: str | None = None
    """the run's own folder (default: runs/<env>__<variant>__<seed>)"""
    resume: bool = False
    """go on from the run folder's checkpoint"""
    checkpoint: str | None = None
    """policy.pt or checkpoint.pt that --eval-only evaluates (default: the run folder's policy.pt)"""
    eval_only: bool = False
    """evaluate a trained policy, print its score and write nothing"""


# Table 4 and Section 4.1, one line a domain; the toy is not in the paper's table.
TABLE_4 = "lr", "eta", "max_q_backup", "grad_norm", "loss", "clip_denoised", "num_steps", "eval_episodes"
PRESETS = {
    "gym": (3e-4, 1.0, False, 4.0, "likelihood", False, 2_000_000, 10),
    "antmaze": (3e-4, 2.0, True, 4.0, "noise", True, 1_000_000, 100),  # but umaze: no max Q-backup
    "adroit": (3e-5, 0.1, False, 8.0, "noise", True, 1_000_000, 100),
    "kitchen": (3e-4, 0.005, False, 10.0, "likelihood", False, 1_000_000, 100),
    "toy": (1e-3, 3.0, False, 4.0, "noise", True, 4_000, 100),
}


class Row(NamedTuple):
    """A row of Table 1 or 2: domain, data, evaluation environment (None: the data set's), D4RL's reference returns."""

    domain: str
    dataset: str
    env_id: str | None
    ref_min: float
    ref_max: float


ROBOTS = {
    "halfcheetah": ("HalfCheetah-v4", -280.178953, 12135.0),
    "hopper": ("Hopper-v4", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v4", 1.629008, 4592.3),
}
ROWS = {
    f"{robot}-{level}-v2": Row("gym", f"{robot}_{level.replace('-', '_')}-v2.hdf5", *ROBOTS[robot])
    for level in ("medium", "medium-replay", "medium-expert")
    for robot in ROBOTS
}
for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    ROWS[f"antmaze-{maze}-v0"] = Row("antmaze", f"D4RL/antmaze/{maze}", None, 0.0, 1.0)
for level in ("human", "cloned"):
    ROWS[f"pen-{level}-v1"] = Row("adroit", f"D4RL/pen/{level}", None, 96.262799, 3076.8331017826877)
for level in ("complete", "partial", "mixed"):
    ROWS[f"kitchen-{level}-v0"] = Row("kitchen", f"D4RL/kitchen/{level}", None, 0.0, 4.0)


def domain_of(env: str) -> str:
    """The PRESETS key of a row, of the toy, or (any other name: a bare --dataset) Gym's."""
    return ROWS[env].domain if env in ROWS else "toy" if env == "toy" else "gym"


def preset(env: str) -> Args:
    """The paper's settings for `env`: Section 4.1's, then Table 4's line of its domain."""
    args = dataclasses.replace(Args(env=env), **dict(zip(TABLE_4, PRESETS[domain_of(env)])))
    if env == "antmaze-umaze-v0":  # the asterisk in Table 4
        args.max_q_backup = False
    if env == "toy":
        args.eval_every, args.batch_size, args.num_critics = 400, 64, 8
    if torch.cuda.is_available():
        args.device, args.compile, args.precision = "cuda", True, "tf32"
    return args


# ==== 2. The mean-reverting SDE: Eq. 1-8, 14, 28 ======================================================================

# theta over steps k = 1..T (an array), up to a factor: every schedule is scaled to theta_bar_T = -ln(1e-3).
SCHEDULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": lambda k: 1 - np.cos((k / (len(k) + 1) + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(np.pi / 252) ** 2,
    "constant": lambda k: np.ones(len(k)),
    "linear": lambda k: np.linspace(1, 200, len(k)),
    "vp": lambda k: 1 - np.exp(-0.1 / len(k) - 4.95 * (2 * k - 1) / len(k) ** 2),
}


class MeanRevertingSDE:
    """The SDE of Eq. 1, dx = -theta_t x dt + sqrt(2 theta_t) dw, on the paper's grid t = 0..T, T = num_steps.

    theta_prime (T+1,) holds theta'_t, the integral of theta over step t, and theta_bar (T+1,) its cumulative sum:
    theta_bar[0] == 0, theta_bar[T] = -ln(1e-3). x is (B, A) or (A,). Times t and tau are an int or an integer tensor
    (B,), which gives coefficients of shape (B, 1). Densities are summed over the last axis. Coefficients are computed
    in float64 and stored in `dtype`. An int outside 0 <= tau <= t <= T raises ValueError; tensors are not checked, as
    that would wait for the device.
    """

    def __init__(self, num_steps: int = 5, schedule: str = "cosine", dtype=torch.float32, device="cpu"):
        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}, but the SDE needs at least 2 steps")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}")
        self.num_steps = num_steps
        theta = SCHEDULES[schedule](np.arange(1.0, num_steps + 1))
        theta_prime = np.append(0.0, theta * -math.log(1e-3) / theta.sum())
        theta_bar = np.cumsum(theta_prime)
        between = np.maximum(theta_bar[None, :] - theta_bar[:, None], 0)  # (T+1, T+1): theta_bar_{tau:t} at [tau, t]
        var = -np.expm1(-2 * between)
        before = np.arange(num_steps + 1).clip(1) - 1  # t - 1; nothing reads the coefficients at t = 0
        step_var, var_t = -np.expm1(-2 * theta_prime), np.append(1.0, var[0, 1:])
        tables = dict(
            theta_prime=theta_prime,
            theta_bar=theta_bar,
            _scale=np.exp(-between),
            _var=var,
            _std=np.sqrt(var),
            _growth=np.exp(theta_bar),
            _mean_x_t=var[0, before] / var_t * np.exp(-theta_prime),  # Eq. 7
            _mean_x_0=step_var / var_t * np.exp(-theta_bar[before]),
            _posterior_var=var[0, before] * step_var / var_t,
        )
        for name, table in tables.items():
            setattr(self, name, torch.as_tensor(table, dtype=dtype, device=device))

    def _at(self, table, *times, first=0):
        """table[times], with a last axis to broadcast over x where a time is a tensor; ints ascend from `first`."""
        ints = [t for t in times if isinstance(t, int)]
        if any(a > b for a, b in zip([first, *ints], [*ints, self.num_steps])):
            raise ValueError(f"diffusion times {ints} must ascend from {first} to T = {self.num_steps}")
        value = table[times]
        return value[..., None] if value.ndim else value

    def transition(self, tau, t):
        """Eq. 2: (scale, var) of p(x_t | x_tau) = N(scale x_tau, var I), tau <= t."""
        return self._at(self._scale, tau, t), self._at(self._var, tau, t)

    def diffuse(self, x_0, t, eps):
        """Eq. 4: x_t from clean x_0 and standard Gaussian noise eps."""
        return self._at(self._scale, 0, t) * x_0 + self._at(self._std, 0, t) * eps

    def score(self, x_t, x_0, t):
        """Eq. 28: the gradient of log p(x_t | x_0) with respect to x_t, for t >= 1."""
        scale, var = self.transition(0, t)
        return -(x_t - scale * x_0) / var

    def posterior(self, x_t, x_0, t):
        """Eq. 6-7: (mean, var) of p(x_{t-1} | x_t, x_0) for t >= 1; at t = 1, x_0 and 0."""
        mean = self._at(self._mean_x_t, t, first=1) * x_t + self._at(self._mean_x_0, t) * x_0
        return mean, self._at(self._posterior_var, t)

    def predict_x0(self, x_t, t, eps):
        """Eq. 8: x0-hat, the x_0 of which x_t is the diffused value if its noise is eps."""
        return self._at(self._growth, t) * (x_t - self._at(self._std, 0, t) * eps)

    def log_prob(self, x_t, x_tau, tau, t):
        """log p(x_t | x_tau), the density of Eq. 2 for tau < t. Shape: x's without its last axis."""
        scale, var = self.transition(tau, t)
        return (-0.5 * (x_t - scale * x_tau) ** 2 / var - 0.5 * torch.log(2 * torch.pi * var)).sum(-1)

    def log_prob_x1(self, x_1, x_T, x_0):
        """Eq. 14: log p(x_1 | x_T, x_0) by Bayes' rule on the densities of Eq. 2."""
        T = self.num_steps
        return self.log_prob(x_T, x_1, 1, T) + self.log_prob(x_1, x_0, 0, 1) - self.log_prob(x_T, x_0, 0, T)

    def reverse_sde_step(self, x_t, t, score, noise):
        """Eq. 3: one Euler-Maruyama step from t to t - 1, against time, with standard Gaussian noise."""
        theta = self._at(self.theta_prime, t, first=1)
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

    def __init__(self, state_dim: int, action_dim: int, hidden: int = HIDDEN):
        super().__init__()
        self.register_buffer("frequency", 10_000 ** (-torch.arange(8, dtype=torch.float64) / 7), persistent=False)
        self.time = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])
        sizes = [action_dim + 16 + state_dim, hidden, hidden, hidden, action_dim]
        self.layers = nn.ModuleList(nn.Linear(*size) for size in zip(sizes, sizes[1:]))

    def forward(self, x_t, t, state):
        """x_t (B, A), t (B,) integer in 1..T, state (B, S) -> (B, A)."""
        phase = ((t - 1)[:, None] * self.frequency).to(x_t.dtype)  # (B, 8)
        time = self.time[1](mish(self.time[0](torch.cat([phase.sin(), phase.cos()], -1))))  # (B, 16)
        h = torch.cat([x_t, time, state], -1)  # (B, A + 16 + S)
        for layer in self.layers[:-1]:
            h = mish(layer(h))  # (B, H)
        return self.layers[-1](h)


class QEnsemble(nn.Module):
    """M independent Q-functions of three hidden Mish layers, evaluated together in batched matrix products.

    `bf16`: the products between hidden layers in bfloat16, from float32 parameters and to float32 activations.
    """

    def __init__(
        self, state_dim: int, action_dim: int, num_critics: int = 64, hidden: int = HIDDEN, bf16: bool = False
    ):
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
        """state (B, S), action (B, A) -> (M, B). `frozen`: gradients reach the action but not the weights."""
        weights = [w.detach() if frozen else w for w in self.weights]
        biases = [b.detach() if frozen else b for b in self.biases]
        h = torch.cat([state, action], -1)  # (B, S + A), the same for all members
        M, fan_in, hidden = weights[0].shape
        h = h @ weights[0].transpose(0, 1).reshape(fan_in, M * hidden)  # (B, M * H): no copy of h a member
        h = mish(h.view(-1, M, hidden).transpose(0, 1) + biases[0])  # (M, B, H)
        for weight, bias in zip(weights[1:-1], biases[1:-1]):
            product = (h.bfloat16() @ weight.bfloat16()).float() if self.bf16 else h @ weight
            h = mish(product + bias)  # (M, B, H)
        return (h * weights[-1].mT).sum(-1) + biases[-1].squeeze(-1)  # (M, B): no product, so that Mish fuses with it


# ==== 4. Sampling: Eq. 10 by Eq. 6 and 8 ==============================================================================

def sample_actions(network, sde, state, noise, clip_denoised: bool = True, clip_sample: bool = True):
    """Actions (B, A) for states (B, S) in T steps of optimal sampling (Proposition 3.1).

    network(x_t (B, A), t (B,), state) is any predictor of the noise. noise (T, B, A) is standard Gaussian: x_T, then
    Eq. 6's for t = T..2. `clip_denoised` clamps each x0-hat to [-1, 1], `clip_sample` the finished action.
    """
    T = sde.num_steps
    x_t = noise[0]
    for t in range(T, 0, -1):
        eps = network(x_t, torch.full((len(x_t),), t, device=x_t.device), state)
        x_0 = sde.predict_x0(x_t, t, eps)  # Eq. 8
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
        mean, var = sde.posterior(x_t, x_0, t)  # Eq. 7
        x_t = mean + var.sqrt() * noise[T - t + 1] if t > 1 else mean  # Eq. 6
    return x_t.clamp(-1, 1) if clip_sample else x_t


# ==== 5. Losses: Eq. 5, 16, 17, 12-15 =================================================================================

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
    next_action: torch.Tensor  # (T, C * B, A) noise of the sampler for C candidate next actions a state


def diffusion_loss(sde, x_0, x_t, t, eps, eps_hat, loss: str = "noise"):
    """Mean squared error of the predicted noise eps_hat (B, A), given x_t = sde.diffuse(x_0, t, eps).

    "noise" is Eq. 5. "likelihood" (Table 4; IR-SDE) compares one Euler step of the reverse SDE's drift with the optimal
    x_{t-1} of Eq. 40; an Euler step over a coarse grid is not the posterior mean, and the true noise no minimiser.
    "posterior" compares the posterior means themselves (Eq. 7 with x0-hat of Eq. 8): the true noise does, at any T.
    """
    if loss == "noise":
        return F.mse_loss(eps_hat, eps)
    optimal, _ = sde.posterior(x_t, x_0, t)  # Eq. 40
    if loss == "likelihood":
        score = -eps_hat / sde.transition(0, t)[1].sqrt()  # Eq. 30
        return F.mse_loss(sde.reverse_sde_step(x_t, t, score, 0.0), optimal)
    return F.mse_loss(sde.posterior(x_t, sde.predict_x0(x_t, t, eps_hat), t)[0], optimal)


def critic_loss(critics, critics_target, batch: Batch, next_action, pessimism: str = "lcb", discount: float = DISCOUNT):
    """Eq. 16, squared: the mean over members and batch of (Q_m(s, a) - y_m)^2. Returns it and Q(s, a) (M, B).

    next_action (C, B, A) holds C candidates a next state; y_m takes the best by the target of member m (max Q-backup).
    Targets are independent, y_m from target m, or with pessimism "min" shared, the minimum over members.
    """
    C, B, _ = next_action.shape
    with torch.no_grad():
        next_state = batch.next_state.expand(C, B, -1).reshape(C * B, -1)
        next_q = critics_target(next_state, next_action.reshape(C * B, -1)).view(-1, C, B).amax(1)  # (M, B)
        if pessimism == "min":
            next_q = next_q.amin(0, keepdim=True)  # (1, B)
        target = batch.reward + discount * (1 - batch.terminal) * next_q
    q = critics(batch.state, batch.action)  # (M, B)
    return ((q - target) ** 2).mean(), q


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


def pessimistic_value(q, pessimism: str, beta: float, variant: str):
    """The ensemble's value (B,) from q (M, B): Eq. 17, or the minimum over members."""
    return q.amin(0) if pessimism == "min" else lcb(q, beta, unbiased=variant == "released")


def policy_log_prob(sde, a_0, eps_hat, a_T, variant: str):
    """log p(a^1-hat | a^T, s) of Eq. 13-15 (B,), from a^0-hat (unclamped), its predicted noise and a^T.

    "paper": Eq. 14 at a^1-hat = Eq. 4 of a^0-hat and the predicted noise at t = 1. "released": a^1-hat is an Euler step
    of the drift, and each density has earlier and later state exchanged, at times 1, 2 and T.
    """
    if variant == "paper":
        return sde.log_prob_x1(sde.diffuse(a_0, 1, eps_hat), a_T, a_0)
    T, a_1 = sde.num_steps, (1 - sde.theta_prime[1]) * a_0
    return sde.log_prob(a_1, a_T, 2, T) + sde.log_prob(a_0, a_1, 1, 2) - sde.log_prob(a_0, a_T, 1, T)


def policy_loss(policy, critics, sde, batch: Batch, noise: Noise, q_data, args: Args):
    """Eq. 15, with L_diff of `args.loss`. Returns it with L_diff, the mean pessimistic value and the mean of -log p.

    a^0-hat is Eq. 8 at the noised data action of L_diff, not a sample; only Q sees it clamped, and without gradient
    where it is. q_data (M, B), for the lambda of variant "paper", is Q(s, a) of the batch as this step's `critic_loss`
    gave it, before the Q update: that saves a pass through the ensemble. Q's weights get no gradient.
    """
    x_t = sde.diffuse(batch.action, noise.t, noise.eps)  # Eq. 4
    eps_hat = policy(x_t, noise.t, batch.state)
    l_diff = diffusion_loss(sde, batch.action, x_t, noise.t, noise.eps, eps_hat, args.loss)
    a_0 = sde.predict_x0(x_t, noise.t, eps_hat)  # Eq. 8
    log_p = policy_log_prob(sde, a_0, eps_hat, noise.a_T, args.variant)  # (B,)
    q = critics(batch.state, a_0.clamp(-1, 1), frozen=True)  # (M, B)
    value = pessimistic_value(q, args.pessimism, args.lcb_coef, args.variant)  # (B,)
    if args.variant == "paper":
        scale = pessimistic_value(q_data, args.pessimism, args.lcb_coef, args.variant).abs().mean()
        bonus = value.mean() - args.entropy_coef * log_p.mean() if args.entropy_coef else value.mean()
        loss = l_diff - args.eta / scale.detach() * bonus  # lambda = eta / E|Q(s, a)|
    else:
        loss = l_diff - args.eta / q.abs().mean().detach() * value.mean()
        if args.entropy_coef:
            loss = loss + args.entropy_coef * log_p.mean() / log_p.abs().mean().detach()
    return loss, l_diff.detach(), value.mean().detach(), -log_p.mean().detach()


# ==== 6. Tasks and data ===============================================================================================

D4RL_SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"
PATIENCE = 20  # seconds that a silent server is waited for


@dataclasses.dataclass
class Task:
    """Where a policy is evaluated, and how its observations, actions and returns are to be read."""

    domain: str  # a key of PRESETS
    data: object  # MinariDataset, Path of an HDF5 file, or None for the toy
    dataset_id: str
    spec: gym.envs.registration.EnvSpec
    space: gym.Space  # of what the policy sees: all, or some parts, of an observation
    low: np.ndarray  # (A,) action bounds
    high: np.ndarray
    ref_min: float  # returns of score 0 and 100
    ref_max: float

    @property
    def state_dim(self) -> int:
        return gym.spaces.flatdim(self.space)

    def score(self, returns):
        """D4RL's normalised score."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


@contextlib.contextmanager
def quiet():
    """Keeps off the screen what importing gymnasium_robotics and making a `-v4` environment print."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # Gymnasium's logger warns by `warnings` too
        yield


def short(error: Exception) -> str:
    """The first line of an exception's message, for errors of one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def refusing(problem: str, advice: str):
    """Makes a UserError of any exception within, whatever library raised it: the problem, its reason, what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({short(error)}): {advice}") from error


class ToyEnv(gym.Env):
    """Figure 1: from 0, two steps in [-1, 1] along a line; each pays the reward of the state that it reaches."""

    observation_space = gym.spaces.Box(-2, 2, (2,))  # (position, steps taken)
    action_space = gym.spaces.Box(-1, 1, (1,))

    @staticmethod
    def reward(x):
        """A mixture of Gaussians: a low hill on the left, where most of the data is, and a high one on the right."""
        return np.exp(-0.5 * ((x + 0.9) / 0.4) ** 2) + 3 * np.exp(-0.5 * ((x - 0.9) / 0.4) ** 2)

    @classmethod
    def best_return(cls) -> float:
        first, second = np.meshgrid(np.linspace(-1, 1, 2001), np.linspace(-1, 1, 2001))
        return float((cls.reward(first) + cls.reward(first + second)).max())

    def reset(self, *, seed=None, options=None):
        self.state = np.zeros(2, np.float32)
        return self.state, {}

    def step(self, action):
        self.state = self.state + np.array([action[0], 1], np.float32)
        return self.state, float(self.reward(self.state[0])), bool(self.state[1] == 2), False, {}


def toy_data(seed: int, episodes: int = 256) -> Batch:
    """Unbalanced two-step episodes: four steps in five drift to the left, away from the high reward."""
    rng = np.random.default_rng(seed)
    drift = np.where(rng.random((episodes, 2)) < 0.8, -0.3, 0.5)
    action = rng.normal(drift, 0.4, (episodes, 2)).clip(-1, 1)
    position = np.concatenate([np.zeros((episodes, 1)), action.cumsum(1)], 1)  # (E, 3)
    state = np.stack([position, np.broadcast_to([0.0, 1.0, 2.0], position.shape)], -1)  # (E, 3, 2)
    reward, terminal = ToyEnv.reward(position[:, 1:]), np.broadcast_to([0.0, 1.0], (episodes, 2))
    before, after = state[:, :2].reshape(-1, 2), state[:, 1:].reshape(-1, 2)
    return Batch(before, action.reshape(-1, 1), reward.ravel(), after, terminal.ravel())


def shapes(space: gym.Space) -> str:
    """An observation space in words, to be compared: 'achieved_goal (2,), observation (27,)'."""
    if isinstance(space, gym.spaces.Dict):
        return ", ".join(f"{key} {shapes(part)}" for key, part in space.items())
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"{space} is not supported: observations must be Box spaces or Dicts of them")
    return str(space.shape)


def flatten(space: gym.Space, observations) -> np.ndarray:
    """Observations (N, ...) of a Box, or nested dicts of them, as (N, S) float32 in the space's order."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, observations[key]) for key, part in space.items()], 1)
    return np.asarray(observations, np.float32).reshape(len(observations), -1)


def open_minari(dataset_id: str):
    """The Minari data set of that id, its newest version where the id has none: the installed one, else downloaded."""
    with quiet():
        import minari
    if not re.fullmatch(r"([-\w]+/)*[-\w]+", dataset_id):
        raise UserError(f"--dataset {dataset_id} is neither an .hdf5 path nor a Minari id such as D4RL/pen/human-v2")
    name = re.sub(r"-v\d+$", "", dataset_id)
    command = f"`minari download {dataset_id}`" + " (with the version in `minari list remote`)" * (dataset_id == name)

    def newest(ids):
        """The id itself, or if it names no version, the id of its highest version."""
        ids = [i for i in ids if dataset_id in (i, i.rpartition("-v")[0])]
        return max(ids, key=lambda i: int(i.rpartition("-v")[2]), default=None)

    with refusing(f"{dataset_id} cannot be read", f"delete it and run {command}"), quiet():
        if found := newest(minari.list_local_datasets()):
            return minari.load_dataset(found)
    folder = os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")
    with refusing(f"{dataset_id} cannot be downloaded", f"run {command} later, or copy it to {folder}"):
        with quiet(), ThreadPool(1) as pool:  # Minari itself would wait for ever
            ids = pool.apply_async(minari.list_remote_datasets, kwds=dict(prefix=name, compatible_minari_version=True))
            ids.wait(PATIENCE)
            if not ids.ready():
                raise TimeoutError(f"no answer in {PATIENCE} s")
        found = newest(ids.get())
        if found is None:
            raise UserError(f"{dataset_id} is neither in {folder} nor on the server: see `minari list remote`")
        minari.download_dataset(found)
        return minari.load_dataset(found)


def download_hdf5(path: Path, url: str):
    """Fetches `url` into the file `path`, which appears when it is complete."""
    part = path.with_name(path.name + ".part")
    hint = f"fetch it later and save it as {path}"
    with refusing(f"{url} cannot be downloaded", hint), contextlib.ExitStack() as end:
        path.parent.mkdir(parents=True, exist_ok=True)
        end.callback(part.unlink, missing_ok=True)
        with urllib.request.urlopen(url, timeout=PATIENCE) as source, open(part, "wb") as file:
            size = int(source.headers["Content-Length"])
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while chunk := source.read(1 << 20):
                    bar.update(file.write(chunk))
            if file.tell() != size:
                raise OSError(f"{file.tell()} of {size} bytes came")
        part.replace(path)


def open_task(args: Args) -> Task:
    """The task that --env and --dataset name: its environment, and the way to its data, which is not read yet."""
    row, domain = ROWS.get(args.env), domain_of(args.env)
    if args.env == "toy":
        if args.dataset:
            raise UserError(f"--dataset {args.dataset} does not go with --env toy, which makes its own data")
        spec, actions = gym.envs.registration.EnvSpec("Toy-v0", ToyEnv), ToyEnv.action_space
        space, best = ToyEnv.observation_space, ToyEnv.best_return()
        return Task(domain, None, "toy", spec, space, actions.low, actions.high, 0.0, best)
    if row is None and args.env != args.dataset:
        near = difflib.get_close_matches(args.env, ["toy", *ROWS], 3, 0)
        raise UserError(f"--env {args.env} is not a row of the paper's tables: the nearest names are {', '.join(near)}")
    with quiet():
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    source = args.dataset or row.dataset
    if source.endswith((".hdf5", ".h5")):
        if row is None or row.env_id is None:
            raise UserError(f"--dataset {source} names no environment: add a Gym row such as --env hopper-medium-v2")
        folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
        data = Path(args.dataset) if args.dataset else folder / source
        if not os.path.exists(data):
            if args.dataset:
                raise UserError(f"--dataset {data} does not exist")
            download_hdf5(data, D4RL_SERVER + source)
        dataset_id, env_id, metadata = str(data), row.env_id, {}
    else:
        data = open_minari(source)
        dataset_id, env_id, metadata = data.spec.dataset_id, row and row.env_id, data.storage.metadata
    with refusing(f"the evaluation environment of {dataset_id} cannot be made", "install what it needs"), quiet():
        env = gym.make(env_id) if env_id else data.recover_environment(eval_env=True)
        env.close()
        if domain == "antmaze":
            maze = evaluation_maze(data, env.spec.kwargs["maze_map"])
            env = gym.make(env.spec, continuing_task=False, maze_map=maze)
            env.close()
    space, actions = env.observation_space, env.action_space
    for box in (actions, data.spec.action_space) if metadata else (actions,):
        if not isinstance(box, gym.spaces.Box) or not box.is_bounded():
            raise UserError(f"{dataset_id} in {env.spec.id} has the actions {box}: not a bounded, continuous Box")
    if metadata:
        ours, other = (shapes(space), actions), (shapes(data.spec.observation_space), data.spec.action_space)
        bounds = [np.stack([box.low, box.high]) for box in (ours[1], other[1])]
        if ours[0] != other[0] or bounds[0].shape != bounds[1].shape or not np.allclose(*bounds):
            raise UserError(f"{dataset_id} and its environment {env.spec.id} differ: {other} against {ours}")
    if domain == "kitchen":
        if not (isinstance(space, gym.spaces.Dict) and "observation" in space.keys()):
            raise UserError(f"{dataset_id} is no Kitchen data set: it observes {shapes(space)}, without 'observation'")
        space = gym.spaces.Dict(observation=space["observation"])
    ref = (row.ref_min, row.ref_max) if row else (metadata.get("ref_min_score"), metadata.get("ref_max_score"))
    if None in ref:
        print(f"{dataset_id} has no reference scores: its score is the return")
        ref = (0.0, 100.0)
    low, high = actions.low.ravel().astype(float), actions.high.ravel().astype(float)
    return Task(domain, data, dataset_id, env.spec, space, low, high, *ref)


def evaluation_maze(data, maze: list) -> list:
    """The maze to evaluate in: `maze`, mirrored if the data was collected between mirrored walls (Minari issue 304)."""

    def walls(maze):
        return [[cell == 1 for cell in line] for line in maze]

    collected = walls(data.env_spec.kwargs.get("maze_map") or gym.spec(data.env_spec.id).kwargs["maze_map"])
    if walls(maze) == collected:
        return maze
    for mirrored in ([line[::-1] for line in maze], maze[::-1]):
        if walls(mirrored) == collected:
            print(f"{data.spec.dataset_id}: its evaluation maze is mirrored here, to match the walls of its data")
            return mirrored
    raise UserError(f"{data.spec.dataset_id} was collected in another maze than its evaluation environment's")


def load_minari(task: Task) -> Batch:
    """All transitions of a Minari data set. AntMaze is read as D4RL meant it: the goal ends an episode, terminal."""
    parts = []
    with refusing(f"{task.dataset_id} cannot be read", "delete it and fetch it again"):
        for episode in task.data.iterate_episodes():
            try:
                state = flatten(task.space, episode.observations)
            except ValueError as error:
                raise UserError(f"{task.dataset_id} has arrays of unequal length: {short(error)}") from error
            action, reward = np.asarray(episode.actions, np.float32), np.asarray(episode.rewards, np.float64)
            terminal, n = np.array(episode.terminations, np.float32), len(reward)
            if not len(state) - 1 == len(action) == len(terminal) == n:
                lengths = f"{len(state)} observations, {len(action)} actions, {n} rewards, {len(terminal)} terminations"
                raise UserError(f"{task.dataset_id} has arrays of unequal length: episode {episode.id} has {lengths}")
            if task.domain == "antmaze" and (reward > 0).any():
                n = int(np.argmax(reward > 0)) + 1
                terminal[n - 1] = 1
            parts.append((state[:n], action[:n].reshape(n, -1), reward[:n], state[1 : n + 1], terminal[:n]))
    return Batch(*map(np.concatenate, zip(*parts))) if parts else Batch(*[np.empty(0)] * 5)


def load_hdf5(task: Task) -> Batch:
    """All transitions of a D4RL file, paired as D4RL does: row i with row i + 1, but for timeouts and the last row."""
    import h5py

    keys = "observations", "actions", "rewards", "terminals", "timeouts"
    with refusing(f"{task.data} is not a whole HDF5 file", "fetch it again"), quiet(), h5py.File(task.data) as file:
        rows = {key: np.asarray(file[key][()], np.float64) for key in keys if key in file}
    if missing := [key for key in keys if key not in rows]:
        raise UserError(f"{task.data} lacks {', '.join(missing)}, which D4RL's files have")
    found = {key: np.shape(values) for key, values in rows.items()}
    n = len(rows["rewards"]) if found["rewards"] else 0
    wanted = dict.fromkeys(keys, (n,)) | dict(observations=(n, task.state_dim), actions=(n, len(task.low)))
    if found != wanted:
        raise UserError(f"{task.data} does not fit {task.spec.id}: its arrays are {found}, expected {wanted}")
    state, action, reward, terminal, timeout = rows.values()
    keep = timeout[:-1] == 0
    return Batch(*(x[keep] for x in (state[:-1], action[:-1], reward[:-1], state[1:], np.sign(np.abs(terminal[:-1])))))


def load_data(task: Task, args: Args) -> Batch:
    """The data set as float32 tensors on the device: actions scaled to [-1, 1], rewards as the domain has them."""
    read = toy_data if task.data is None else load_hdf5 if isinstance(task.data, Path) else load_minari
    data = read(args.seed if task.data is None else task)
    if len(data.reward) == 0:
        raise UserError(f"{task.dataset_id} is empty: it holds no transition")
    for name, values in data._asdict().items():
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise UserError(f"{task.dataset_id} has NaN or infinity among its {name} values")
    action = 2 * (data.action - task.low) / (task.high - task.low) - 1
    if (most := np.abs(action).max()) > 1 + 1e-3:
        raise UserError(f"{task.dataset_id} has actions outside their bounds: {most:.4g} on a scale where those are ±1")
    reward = data.reward
    if task.domain == "antmaze":
        reward = 4 * (reward - 0.5)
    elif task.domain == "adroit":
        reward = (reward - reward.mean()) / (reward.std() or 1)
    data = data._replace(action=action.clip(-1, 1), reward=reward)
    return Batch(*(torch.as_tensor(np.ascontiguousarray(x, np.float32), device=args.device) for x in data))


# ==== 7. Acting and evaluation ========================================================================================

class Actor:
    """The policy as it acts: of `args.eval_candidates` samples, one drawn by softmax over their pessimistic value."""

    def __init__(self, policy, critics, sde, low, high, args: Args):
        self.policy, self.critics, self.sde, self.args = policy, critics, sde, args
        self.low, self.high = np.asarray(low), np.asarray(high)
        self.sizes = critics.weights[0].shape[1] - len(self.low), len(self.low)  # of states and actions

    @torch.no_grad()
    def __call__(self, state, streams=None) -> np.ndarray:
        """States (N, S) -> actions (N, A) in the environment's bounds; state n draws from the generator streams[n]."""
        streams = streams or [np.random.default_rng() for _ in state]
        args, device, N = self.args, self.sde.theta_bar.device, len(state)
        shape = T, C, A = self.sde.num_steps, args.eval_candidates, len(self.low)
        noise = np.stack([stream.standard_normal(shape, np.float32) for stream in streams], 1)  # (T, N, C, A)
        noise = torch.as_tensor(noise, device=device).view(T, N * C, A)
        state = torch.as_tensor(np.asarray(state, np.float32), device=device).repeat_interleave(C, 0)  # (N * C, S)
        action = sample_actions(self.policy, self.sde, state, noise, args.clip_denoised)
        if C > 1:
            value = pessimistic_value(self.critics(state, action), args.pessimism, args.lcb_coef, args.variant)
            below = value.view(N, C).double().softmax(-1).cumsum(-1)
            u = torch.tensor([[stream.random()] for stream in streams], dtype=torch.float64, device=device)
            chosen = torch.searchsorted(below, u, right=True).clamp(max=C - 1)  # (N, 1)
            action = action.view(N, C, A).take_along_dim(chosen[..., None], 1)[:, 0]
        action = self.low + (action.double().cpu().numpy() + 1) / 2 * (self.high - self.low)
        return np.clip(action, self.low, self.high)


def load_policy(path, device="cpu", candidates: int | None = None) -> Actor:
    """The Actor of a run's policy.pt or checkpoint.pt. Raises UserError where the file is not a whole one."""
    with refusing(f"{path} is not a whole policy or checkpoint of this program", "give another file"):
        saved = torch.load(path, map_location=device, weights_only=True)
        args = dataclasses.replace(Args(**saved["args"]), compile=False)
        args.eval_candidates = candidates or args.eval_candidates
        agent = Agent(saved["about"]["state_dim"], saved["about"]["action_dim"], args, device)
        agent.policy.load_state_dict(saved["agent"]["policy"])
        agent.critics_target.load_state_dict(saved["agent"]["critics_target"])
        return agent.actor(saved["low"], saved["high"])


class Episode(gym.Wrapper):
    """One episode. Once it has ended, as `info` says, it stands still until the next reset."""

    def reset(self, **kwargs):
        self.last, self.ended = self.env.reset(**kwargs)[0], False
        return self.last, {}

    def step(self, action):
        reward, info = 0.0, {}
        if not self.ended:
            self.last, reward, terminated, truncated, info = self.env.step(action)
            self.ended = terminated or truncated
        return self.last, reward, False, False, {"ended": self.ended, "success": float(info.get("success", np.nan))}


def make_envs(task: Task, episodes: int, num_envs: int | None = None) -> gym.vector.VectorEnv:
    """Environments that step together in worker processes, by default two a core and at most one an episode."""

    def make():
        if multiprocessing.parent_process():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's business
        with quiet():
            env = gym.make(task.spec, disable_env_checker=True)
        flat = gym.spaces.flatten_space(task.space)
        return Episode(gym.wrappers.TransformObservation(env, lambda o: gym.spaces.flatten(task.space, o), flat))

    makers = [make] * min(episodes, num_envs or 2 * os.cpu_count())
    if task.domain == "toy":
        return gym.vector.SyncVectorEnv(makers)
    with quiet():  # on Linux by fork: a worker starts at once, and touches neither GPU nor threads
        return gym.vector.AsyncVectorEnv(makers, context="fork" if sys.platform == "linux" else None)


def evaluate(actor: Actor, envs, episodes: int, seed: int, stopped=lambda: False) -> dict | None:
    """Plays `episodes` episodes: their return, success (NaN where the environment has none), length; None if stopped.

    Episode e has its own seed and random stream, whichever environment plays it: neither the number of environments
    nor anything in training changes the result.
    """
    K = envs.num_envs
    returns, success, length = np.zeros(episodes), np.full(episodes, np.nan), np.zeros(episodes)
    seeds = [int(np.random.SeedSequence((seed, e)).generate_state(1)[0]) for e in range(episodes)]
    streams = [np.random.default_rng((seed, e)) for e in range(episodes)]
    playing, following = np.arange(K), K  # the episode that each environment plays, and the next in line
    alive, actions = np.ones(K, bool), np.tile(actor.low, (K, 1))
    state, _ = envs.reset(seed=[seeds[e] for e in playing])
    while alive.any():
        if stopped():
            return None
        now = playing[alive]
        actions[alive] = actor(state[alive], [streams[e] for e in now])
        state, reward, _, _, info = envs.step(actions)
        returns[now] += reward[alive]
        length[now] += 1
        success[now] = np.fmax(success[now], info["success"][alive])
        fresh = np.zeros(K, bool)
        for k in np.flatnonzero(alive & info["ended"]):
            alive[k] = fresh[k] = following < episodes
            if fresh[k]:
                playing[k], following = following, following + 1
        if fresh.any():
            state, _ = envs.reset(seed=[seeds[e] for e in playing], options={"reset_mask": fresh})
    return {"return": returns, "success": success, "length": length}


def summary(task: Task, result: dict) -> dict:
    """The evaluation's part of a row of metrics.csv: means and standard deviations over episodes."""
    measures = {"return": result["return"], "score": task.score(result["return"])}
    row = {f"{name}_{f}": float(getattr(values, f)()) for name, values in measures.items() for f in ("mean", "std")}
    success = None if np.isnan(result["success"]).all() else float(result["success"].mean())
    return row | dict(success=success, length=float(result["length"].mean()))


def in_words(row: dict) -> str:
    words = "score {score_mean:.1f} ± {score_std:.1f}, return {return_mean:.2f} ± {return_std:.2f}, length {length:.0f}"
    return (words + ", success {success:.0%}" * (row["success"] is not None)).format(**row)


# ==== 8. Training: Algorithm 1, and the folder that a run leaves ======================================================

class Agent:
    """What Algorithm 1 updates: the policy pi_phi and its EMA, the ensemble Q_psi and its targets, two optimisers."""

    PARTS = "policy", "critics", "policy_ema", "critics_target", "policy_optimizer", "critic_optimizer"

    def __init__(self, state_dim: int, action_dim: int, args: Args, device="cpu"):
        self.args = args
        toy = args.env == "toy"
        hidden = TOY_HIDDEN if toy else HIDDEN
        self.sde = MeanRevertingSDE(args.num_diffusion_steps, args.schedule, device=device)
        self.policy = NoiseNetwork(state_dim, action_dim, hidden).to(device)
        self.critics = QEnsemble(state_dim, action_dim, args.num_critics, hidden, args.precision == "bf16").to(device)
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        self.critics_target = copy.deepcopy(self.critics).requires_grad_(False)
        options = dict(fused=True, capturable=torch.device(device).type == "cuda")
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.lr, **options)
        critic_lr = TOY_CRITIC_LR if toy else CRITIC_LR
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=critic_lr, **options)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # on the device: a captured update counts too
        self.functions = sample_actions, critic_loss, policy_loss
        if args.compile:
            self.functions = tuple(torch.compile(function) for function in self.functions)

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {"updates": self.updates}

    def load_state_dict(self, state: dict):
        for name in self.PARTS:
            part = getattr(self, name)
            groups = {"param_groups": part.state_dict()["param_groups"]} if "optimizer" in name else {}
            part.load_state_dict(state[name] | groups)  # `capturable` is this device's, not the checkpoint's
        self.updates.copy_(state["updates"])

    def actor(self, low, high) -> Actor:
        return Actor(self.policy, self.critics_target, self.sde, low, high, self.args)


METRICS = "critic_loss", "policy_loss", "diffusion_loss", "q", "lcb", "entropy"


def update(agent: Agent, batch: Batch, noise: Noise):
    """One iteration of Algorithm 1, in place. Returns the METRICS (6,) without waiting for the device."""
    args, sde, (B, S) = agent.args, agent.sde, batch.state.shape
    sample_actions, critic_loss, policy_loss = agent.functions
    # Ensemble-Q learning
    C = noise.next_action.shape[1] // B
    with torch.no_grad():
        next_state = batch.next_state.expand(C, B, S).reshape(C * B, S)
        next_action = sample_actions(agent.policy_ema, sde, next_state, noise.next_action, args.clip_denoised)
    q_loss, q = critic_loss(agent.critics, agent.critics_target, batch, next_action.view(C, B, -1), args.pessimism)
    descend(q_loss, agent.critics, agent.critic_optimizer, args.grad_norm)
    # Diffusion policy learning, against the updated Q
    q = q.detach()
    pi_loss, l_diff, value, entropy = policy_loss(agent.policy, agent.critics, sde, batch, noise, q, args)
    descend(pi_loss, agent.policy, agent.policy_optimizer, args.grad_norm)
    # Target networks
    due = (agent.updates >= POLICY_EMA_START) & (agent.updates % POLICY_EMA_EVERY == 0)
    move(agent.policy_ema, agent.policy, due.double() * POLICY_EMA_RATE)
    move(agent.critics_target, agent.critics, TARGET_RATE)
    agent.updates += 1
    return torch.stack([q_loss.detach(), pi_loss.detach(), l_diff, q.mean(), value, entropy])


def descend(loss, module: nn.Module, optimizer, grad_norm: float):
    """One optimiser step on `loss`, the gradient of all of `module` clipped as one vector."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), grad_norm)
    optimizer.step()


@torch.no_grad()
def move(target: nn.Module, source: nn.Module, rate):
    """target <- target + rate (source - target), parameter by parameter. rate is a float or a tensor of no axes."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.lerp_(new, rate if isinstance(rate, float) else rate.to(old.dtype))


def empty_noise(args: Args, action_dim: int, device) -> Noise:
    """The buffers that `draw` fills."""
    B, T, C = args.batch_size, args.num_diffusion_steps, BACKUP_CANDIDATES if args.max_q_backup else 1
    rows, t = torch.empty(2, B, dtype=torch.int64, device=device)
    eps, a_T = torch.empty(2, B, action_dim, device=device)
    return Noise(rows, t, eps, a_T, torch.empty(T, C * B, action_dim, device=device))


def draw(noise: Noise, num_rows: int, generator: torch.Generator):
    """Fills the buffers with fresh values, in place, so that a captured update reads them too."""
    noise.rows.random_(0, num_rows, generator=generator)
    noise.t.random_(1, len(noise.next_action) + 1, generator=generator)
    for gaussian in (noise.eps, noise.a_T, noise.next_action):
        gaussian.normal_(generator=generator)


class Captured:
    """A function without arguments as one CUDA graph. Each call runs it once: three times as it is, then as a replay.

    The function must read and write the same tensors in place, and wait for nothing.
    """

    def __init__(self, function: Callable[[], None]):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

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
    """Yields a list that Ctrl-C fills, to be looked at between two updates; a second Ctrl-C ends the program."""
    stops, previous = [], signal.getsignal(signal.SIGINT)

    def stop(*_):
        stops.append(True)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, previous)


# Settings that a resumed run may change, as they do not change what it learns.
FREE = {"num_steps", "device", "compile", "precision", "run_dir", "resume", "checkpoint", "eval_only"}
FREE |= {"eval_every", "eval_episodes", "eval_candidates"}


class RunFolder:
    """A run's own folder. `rows` are the lines of metrics.csv, one an evaluation. Files are replaced as a whole."""

    COLUMNS = "step", "return_mean", "return_std", "score_mean", "score_std", "success", "length", *METRICS, "seconds"

    def __init__(self, args: Args):
        self.args, self.rows = args, []
        self.path = Path(args.run_dir or f"runs/{args.env.replace('/', '-')}__{args.variant}__{args.seed}")

    def replace(self, name: str, write: Callable[[Path], None]):
        part = self.path / f".part-{name}"
        write(part)
        part.replace(self.path / name)

    def write_json(self, name: str, content: dict):
        self.replace(name, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))

    def load_checkpoint(self) -> dict:
        path = self.path / "checkpoint.pt"
        if not os.path.exists(path):
            raise UserError(f"there is no checkpoint {path}: check --run-dir, or start without --resume")
        with refusing(f"{path} is damaged", "start anew with another --run-dir"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
            theirs, self.rows, step = dict(saved["args"]), saved["rows"], saved["step"]
        for name, ours in dataclasses.asdict(self.args).items():
            if name not in FREE and theirs.get(name) != ours:
                made = f"--{name.replace('_', '-')} {theirs.get(name)}"
                raise UserError(f"{path} was made with {made}, not {ours}: give the same, or another --run-dir")
        if step > self.args.num_steps and not (self.path / "result.json").exists():
            raise UserError(f"{path} is at update {step} already, past --num-steps {self.args.num_steps}")
        return saved

    def create(self, about: dict):
        with refusing(f"{self.path} cannot be written", "give another --run-dir"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", dataclasses.asdict(self.args) | about)
            (self.path / "result.json").unlink(missing_ok=True)  # of a finished run that now goes on

    def add(self, row: dict):
        def write(path):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)

        self.rows.append(row)
        self.replace("metrics.csv", write)

    def finish(self, step: int):
        best, final = max(self.rows, key=lambda row: row["score_mean"]), self.rows[-1]["score_mean"]
        self.write_json("result.json", dict(final=final, best=best["score_mean"], best_step=best["step"], steps=step))
        print(f"final score {final:.1f}, best {best['score_mean']:.1f} at update {best['step']}; see {self.path}")


def train(args: Args) -> int:
    """Algorithm 1, and what a run leaves. Returns the exit status: 0, 1 if a loss diverged, 130 after Ctrl-C."""
    folder = RunFolder(args)
    saved = folder.load_checkpoint() if args.resume else None
    if saved is None and os.path.exists(folder.path):
        raise UserError(f"the run folder {folder.path} exists: --resume goes on with it, --run-dir names another")
    if saved and (folder.path / "result.json").exists() and saved["step"] >= args.num_steps:
        print(f"{folder.path} is finished, with {saved['step']} updates")
        return 0
    with quiet():
        from torch.utils.tensorboard import SummaryWriter
    task = open_task(args)
    data = load_data(task, args)
    (size, state_dim), action_dim = data.state.shape, data.action.shape[1]
    about = dict(dataset_id=task.dataset_id, transitions=size, state_dim=state_dim, action_dim=action_dim)
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.manual_seed(args.seed)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    agent = Agent(state_dim, action_dim, args, args.device)
    latest = torch.zeros(len(METRICS), device=args.device)
    totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=args.device)  # since the last evaluation; count
    step, seconds = 0, 0.0
    if saved:
        if saved["about"] != about:
            raise UserError(f"{folder.path}/checkpoint.pt belongs to {saved['about']}, not to {about}")
        agent.load_state_dict(saved["agent"])
        totals.copy_(saved["totals"])
        step, seconds = saved["step"], saved["seconds"]
        if torch.device(saved["args"]["device"]).type == torch.device(args.device).type:
            generator.set_state(saved["generator"])
        else:  # the two kinds of device have different generators
            generator.manual_seed(args.seed + step)
    here = machine(args.device)
    folder.create(about | here)
    noise, envs = empty_noise(args, action_dim, args.device), make_envs(task, args.eval_episodes)
    header = dict(args=dataclasses.asdict(args), about=about, low=task.low.tolist(), high=task.high.tolist())
    actor = agent.actor(task.low, task.high)
    writer, first, began = SummaryWriter(str(folder.path), purge_step=step), step, time.monotonic() - seconds
    print(f"{args.env}: {size} transitions of {task.dataset_id}, {args.variant} variant", end=", ")
    print(f"on {here['device_name']}, into {folder.path}")

    def learn():
        latest.copy_(update(agent, Batch(*(column[noise.rows] for column in data)), noise))
        totals.add_(F.pad(latest, (0, 1), value=1.0))

    def save():
        progress = dict(step=step, seconds=time.monotonic() - began, rows=folder.rows, totals=totals)
        content = header | progress | dict(generator=generator.get_state(), agent=agent.state_dict())
        folder.replace("checkpoint.pt", lambda path: torch.save(content, path))

    if not saved:
        save()  # from here on, --resume works whenever the run is cut off
    if args.device.startswith("cuda"):
        learn = Captured(learn)
    bar = tqdm(total=args.num_steps, initial=step, unit="update", disable=None)
    with contextlib.closing(envs), contextlib.closing(writer), bar, interruptible() as stops:
        while True:
            due = step > 0 and (step % args.eval_every == 0 or step == args.num_steps)
            due = due and not (folder.rows and folder.rows[-1]["step"] == step)
            if step > first and (due or stops or step % LOG_EVERY == 0):
                losses = dict(zip(METRICS, latest.tolist()))  # only here does the loop wait for the device
                numbers = totals, *agent.policy.parameters(), *agent.critics.parameters()
                if not all(x.isfinite().all() for x in numbers):
                    good = f"{folder.path / 'checkpoint.pt'} is the last good checkpoint"
                    print(f"erdp: a loss is NaN or infinite at or just before update {step}: {good}", file=sys.stderr)
                    return 1
                for name, value in losses.items():
                    writer.add_scalar(f"losses/{name}", value, step)
                bar.set_postfix(losses)
            if step == first + LOG_EVERY:  # not from `first`: the first updates may compile
                mark = time.monotonic()
            if step == first + 2 * LOG_EVERY:
                rate = LOG_EVERY / (time.monotonic() - mark)
                left = tqdm.format_interval((args.num_steps - step) / rate)
                bar.write(f"{rate:.1f} updates a second: {left} to go, evaluations not counted")
            if due and (result := evaluate(actor, envs, args.eval_episodes, args.seed, lambda: stops)):
                row = dict(step=step) | summary(task, result) | dict(zip(METRICS, (totals[:-1] / totals[-1]).tolist()))
                folder.add(row | dict(seconds=round(time.monotonic() - began, 1)))
                writer.add_scalar("score", row["score_mean"], step)
                bar.write(f"update {step}: {in_words(row)}")
                totals.zero_()
                save()
            if stops:
                save()
                print(f"stopped at update {step}: --resume goes on from there")
                return 130
            if step == args.num_steps:
                break
            draw(noise, size, generator)
            learn()
            step += 1
            bar.update()
    trained = dict(policy=agent.policy.state_dict(), critics_target=agent.critics_target.state_dict())
    folder.replace("policy.pt", lambda path: torch.save(header | dict(agent=trained), path))
    folder.replace("curve.png", lambda path: draw_curve(path, folder.rows, agent, data))
    folder.finish(step)
    return 0


def draw_curve(path: Path, rows: list[dict], agent: Agent, data: Batch):
    """A picture of score (for the toy, return) over updates; for the toy, the three panels of Figure 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    toy = agent.args.env == "toy"
    measure = "return" if toy else "score"
    figure, axes = plt.subplots(1, 3 if toy else 1, figsize=(16 if toy else 6, 4), squeeze=False)
    curve = axes[0, 1] if toy else axes[0, 0]
    steps, mean, std = np.array([[row[key] for row in rows] for key in ("step", f"{measure}_mean", f"{measure}_std")])
    curve.plot(steps, mean)
    curve.fill_between(steps, mean - std, mean + std, alpha=0.2)
    title = f"{agent.args.env}, seed {agent.args.seed}"
    curve.set(xlabel="updates", ylabel=f"{measure} ± deviation over episodes", title=title)
    if toy:
        x = np.linspace(-2, 2, 401)
        axes[0, 0].plot(x, ToyEnv.reward(x))
        axes[0, 0].set(xlabel="state", ylabel="reward", title="Reward and data")
        density = axes[0, 0].twinx()
        density.hist(data.next_state[:, 0].cpu(), 60, density=True, alpha=0.4, color="tab:orange")
        density.set(ylabel="density of the states in the data")
        action = torch.linspace(-1, 1, 201)[:, None]
        with torch.no_grad():
            q = agent.critics(torch.zeros(201, 2).to(data.action), action.to(data.action)).cpu()  # (M, 201)
        mean, std = q.mean(0), q.std(0, correction=0)
        axes[0, 2].plot(action, mean, label="mean of the ensemble, ± deviation")
        axes[0, 2].fill_between(action[:, 0], mean - std, mean + std, alpha=0.2)
        axes[0, 2].plot(action, lcb(q, agent.args.lcb_coef), label=f"LCB, beta = {agent.args.lcb_coef:g}")
        axes[0, 2].set(xlabel="first action", title="Q at state 0")
        axes[0, 2].legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def machine(device: str) -> dict:
    """What config.json says of the machine."""
    packages = "torch", "numpy", "minari", "gymnasium", "gymnasium-robotics", "mujoco"
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": sys.version.split()[0]}
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else f"CPU ({torch.get_num_threads()} threads)"
    return dict(device_name=name, versions=versions)


# ==== 9. The command line =============================================================================================

def parse(argv: list[str]) -> Args:
    """Settings from the command line over the row's preset. Raises UserError where they make no sense."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the row decides the defaults of all the rest
    first.add_argument("--env", nargs="?")
    first.add_argument("--dataset", nargs="?")
    known, _ = first.parse_known_args(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = tyro.cli(Args, args=argv, default=preset(known.env or known.dataset or "toy"), prog="erdp.py")
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        boxes = re.split("[─-]{4,}", said.getvalue())  # tyro draws its sentence in a box, before one of advice
        words = " ".join(re.sub("[│|╮+]", " ", boxes[1]).split())
        raise UserError(f"{words.rstrip('.')}: --help shows the settings") from None
    counts = "num_steps", "batch_size", "num_critics", "eval_every", "eval_episodes", "eval_candidates"
    least = dict.fromkeys(counts, 1) | dict.fromkeys(("seed", "lcb_coef", "entropy_coef", "eta", "lr", "grad_norm"), 0)
    least["num_diffusion_steps"] = 3 if args.variant == "released" else 2  # its entropy term uses the times 1, 2, T
    for name, bound in least.items():
        value, above = getattr(args, name), name in ("lr", "grad_norm")
        if not bound <= value < math.inf or (above and value == bound):
            flag, where = "--" + name.replace("_", "-"), " with --variant released" if bound == 3 else ""
            raise UserError(f"{flag} is {value} but must be {'more than' if above else 'at least'} {bound}{where}")
    if args.seed >= 2**63:
        raise UserError(f"--seed is {args.seed} but must be less than 2**63")
    if args.checkpoint and not args.eval_only:
        raise UserError("--checkpoint goes with --eval-only; --resume goes on from the run folder's own checkpoint")
    count = torch.cuda.device_count()
    if args.device not in ("cpu", *["cuda"] * (count > 0), *(f"cuda:{n}" for n in range(count))):
        there = f"PyTorch sees {count} CUDA devices"
        raise UserError(f"--device {args.device} is not there: {there}; give --device cpu, cuda or cuda:N")
    if args.precision == "tf32" and args.device == "cpu":
        raise UserError("--precision tf32 is CUDA's: give float32 or bf16 with --device cpu")
    return args


def evaluate_only(args: Args, candidates: int | None) -> int:
    """--eval-only: the score of a saved policy, with the settings (None: also the candidates) of its training."""
    path = Path(args.checkpoint or RunFolder(args).path / "policy.pt")
    actor, task = load_policy(path, args.device, candidates), open_task(args)
    if actor.args.env != args.env:
        raise UserError(f"{path} was trained on {actor.args.env}, not on {args.env}: give --env {actor.args.env}")
    sizes = task.state_dim, len(task.low)
    if sizes != actor.sizes:
        raise UserError(f"{path} is for states and actions of sizes {actor.sizes}, {task.dataset_id} has {sizes}")
    with contextlib.closing(make_envs(task, args.eval_episodes)) as envs:
        print(f"{path}: {in_words(summary(task, evaluate(actor, envs, args.eval_episodes, args.seed)))}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the program and returns its exit status (`--help` raises SystemExit)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        if not args.eval_only:
            return train(args)
        asked = any(re.match("--eval.candidates", word) for word in argv)
        return evaluate_only(args, args.eval_candidates if asked else None)
    except UserError as error:
        print("erdp:", *str(error).splitlines(), file=sys.stderr)  # a large Box describes itself in several lines
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file is as far as the run is
    sys.exit(main())
