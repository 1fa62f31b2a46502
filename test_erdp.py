"""pytest -m paper --collect-only -q    # the page of claims: what is proved of the paper, in its order

Each line of that list is a claim about the paper that erdp.py is held to: its equations and schedules, the networks,
Figure 2, Algorithm 1, Tables 1, 2 and 4, and what here goes beyond it. The other tests are of the program around it.

Expectations never come from the code under test. They are SciPy's densities, simulations of the SDE, Bayes' rule,
finite differences, closed forms, or a slow second implementation written here, term by term from the paper (the
`literal_*` functions and `Algorithm1`). A test is named after the equation it proves, and its message says what was
expected of it.

Identities are drawn by Hypothesis (schedule, T, shapes, times, values) and hold in float64 to a relative 1e-10, or to
what their rounding allows. Monte-Carlo tests have fixed seeds, stand outside @given, and have a tolerance at which a
correct program fails for less than one seed in a million (RATE), shared among all comparisons of the test. Each says
which error it `sees`, and fails if it could miss such an error for more than one seed in a million.

    pytest                           # everything
    pytest -m "not slow"             # the quick part, which alone catches a wrong equation
    pytest -m paper                  # the claims
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socketserver
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, get_args
from unittest.mock import MagicMock, Mock

import gymnasium as gym
import h5py
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import erdp
from erdp import Agent, Args, Batch, MeanRevertingSDE, Noise, NoiseNetwork, QEnsemble, UserError

settings.register_profile("erdp", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("erdp")
torch.set_num_threads(1)  # every tensor here is small
# A signal that is ignored, as after `nohup pytest &`, would be ignored by every process that is started here, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

RATE = 1e-6  # chance that a correct program fails a Monte-Carlo test, over the choice of its seed
SCHEDULES = [*erdp.SCHEDULES]


# ==== Assertions, and what the tests draw =============================================================================
def numbers(value) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def agree(claim: str, actual, expected, rtol=1e-10, atol=1e-10):
    """Equal shapes, and equal values up to rounding."""
    actual, expected = numbers(actual), numbers(expected)
    assert actual.shape == expected.shape, f"{claim}: shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=claim)


def assert_mean(claim: str, samples, expected, sees, comparisons=1):
    """The mean of independent samples (N, ...) is `expected`, by a two-sided normal test at RATE / comparisons.

    An error is seen for certain from twice the bound on, as sampling alone moves the mean by as much as the bound.
    """
    samples = numbers(samples)
    entries = comparisons * samples[0].size
    bound = norm.isf(RATE / 2 / entries) * samples.std(0) / math.sqrt(len(samples))
    assert np.all(2 * bound <= sees), f"{claim}: an error of {sees} could be missed, as {2 * bound} could"
    error = np.abs(samples.mean(0) - expected)
    assert np.all(error <= bound), f"{claim}: mean {samples.mean(0)}, expected {expected} within {bound}"


def assert_law(claim: str, samples, law, sees, comparisons=1):
    """Independent samples have a law of scipy.stats, by Kolmogorov-Smirnov. `sees`: a distance between two cdfs."""
    samples = numbers(samples).ravel()
    bound = scipy.stats.kstwo.isf(RATE / comparisons, len(samples))
    assert 2 * bound <= sees, f"{claim}: a distance of {sees} could be missed, as {2 * bound} could"
    distance = scipy.stats.kstest(samples, law.cdf).statistic
    assert distance <= bound, f"{claim}: Kolmogorov-Smirnov distance {distance}, expected at most {bound}"


def assert_gaussian(claim: str, samples, mean, std, sees, comparisons=1):
    """Independent samples of N(mean, std^2). `sees`: deviations by which the mean, or share by which std, is off."""
    z = (numbers(samples).ravel() - mean) / std
    assert_mean(f"{claim}: mean", z, 0.0, sees, 3 * comparisons)
    assert_mean(f"{claim}: variance", z**2, 1.0, 2 * sees, 3 * comparisons)
    assert_law(f"{claim}: law", z, norm, sees, 3 * comparisons)


def assert_counts(claim: str, counts, p, sees, comparisons=1):
    """Counts of outcomes of probabilities `p` (K,), by chi-square. `sees`: other probabilities (N, K)."""
    counts, p, alpha = numbers(counts), np.asarray(p), RATE / comparisons
    bound = scipy.stats.chi2.isf(alpha, len(p) - 1)
    for other in np.atleast_2d(sees):
        missed = scipy.stats.ncx2.cdf(bound, len(p) - 1, counts.sum() * ((other - p) ** 2 / p).sum())
        assert missed < RATE, f"{claim}: {other} in place of {p} could be missed"
    statistic = (((counts - counts.sum() * p) ** 2) / (counts.sum() * p)).sum()
    assert len(counts) == len(p) and statistic <= bound, f"{claim}: {counts}, expected shares {p}"


def own(table: str, name: str):
    """This file's own formula for an option that erdp.py offers."""
    formulas = globals()[table]
    advice = f"add an independent formula of it to {table}, which has {', '.join(formulas)}"
    assert name in formulas, f"erdp.py offers {name!r}: {advice}"
    return formulas[name]


def test_every_option_that_erdp_offers_has_an_independent_formula_here():
    for table in ("SCHEDULES", "LOSSES", "VARIANTS", "PESSIMISM"):
        for name in getattr(erdp, table):
            own(f"LITERAL_{table}", name)
    members_of(QEnsemble(1, 1, 1, 1))  # whose message says what a new critic wants


def literal_cosine(k, T):
    def f(k):
        return math.cos((k / (T + 1) + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    return 1 - f(k) / f(0)


LITERAL_SCHEDULES = dict(
    cosine=literal_cosine,
    constant=lambda k, T: 1.0,
    linear=lambda k, T: 1 + (200 - 1) * (k - 1) / (T - 1),
    vp=lambda k, T: 1 - math.exp(-0.1 / T - 4.95 * (2 * k - 1) / T**2),
)


@functools.cache
def literal_theta(schedule: str, T: int):
    """theta'_t and theta_bar_t over t = 0..T, term by term."""
    steps = [own("LITERAL_SCHEDULES", schedule)(k, T) for k in range(1, T + 1)]
    prime = [0.0] + [step * math.log(1000) / math.fsum(steps) for step in steps]
    return np.array(prime), np.array([math.fsum(prime[: t + 1]) for t in range(T + 1)])


@functools.cache
def sde64(T: int = 5, schedule: str = "cosine") -> MeanRevertingSDE:
    return MeanRevertingSDE(T, schedule, dtype=torch.float64)


class Case(NamedTuple):
    """Times tau < t of a drawn SDE, one a row, what the paper's symbols are there, and three arrays of values."""

    sde: MeanRevertingSDE
    theta_bar: np.ndarray  # (T + 1,)
    tau: torch.Tensor  # (B,)
    t: torch.Tensor  # (B,)
    between: np.ndarray  # (B, 1) theta_bar_{tau:t}
    prime: np.ndarray  # (B, 1) theta'_t
    bar: np.ndarray  # (B, 1) theta_bar_t
    before: np.ndarray  # (B, 1) theta_bar_{t-1}
    x: torch.Tensor  # (B, A)
    y: torch.Tensor
    z: torch.Tensor


@st.composite
def cases(draw, first=1):
    T, schedule = draw(st.integers(2, 100)), draw(st.sampled_from(SCHEDULES))
    B, A = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    t = np.array([draw(st.integers(first, T)) for _ in range(B)])
    tau = np.array([draw(st.integers(0, last - 1)) for last in t])
    values = draw(arrays(np.float64, (3, B, A), elements=st.floats(-4, 4), fill=st.nothing()))
    prime, bar = literal_theta(schedule, T)
    between = np.array([math.fsum(prime[a + 1 : b + 1]) for a, b in zip(tau, t)])
    columns = (column[:, None] for column in (between, prime[t], bar[t], bar[t - 1]))
    return Case(sde64(T, schedule), bar, torch.tensor(tau), torch.tensor(t), *columns, *torch.tensor(values))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The mixture of two Gaussians and the single one that analytic predictors are made of.
WEIGHTS, MEANS, WIDTHS = np.array([0.35, 0.65]), np.array([-0.6, 0.5]), np.array([0.2, 0.15])


def mixture_score(x, bar, weights=WEIGHTS, means=MEANS, widths=WIDTHS):
    """The gradient of the log density of a Gaussian mixture after Eq. 4 with theta_bar = bar, at x of any shape."""
    x = np.asarray(x)[..., None]
    mean, var = math.exp(-bar) * means, math.exp(-2 * bar) * widths**2 + 1 - math.exp(-2 * bar)
    log_part = np.log(weights) - 0.5 * (x - mean) ** 2 / var - 0.5 * np.log(var)
    part = np.exp(log_part - log_part.max(-1, keepdims=True))
    return (part * (mean - x) / var).sum(-1) / part.sum(-1)


def analytic_predictor(bar, weights=WEIGHTS, means=MEANS, widths=WIDTHS):
    """E(eps | x_t) = -std * score, for data from the mixture (Eq. 30), as a network of the sampler."""

    def network(x_t, t, state):
        b = bar[int(t[0])]
        score = mixture_score(x_t.numpy(), b, weights, means, widths)
        return torch.tensor(-math.sqrt(1 - math.exp(-2 * b)) * score)

    return network


# ==== Eq. 1 and 2: the SDE and its transitions ========================================================================
@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_eq01_theta_has_its_schedules_formula_and_its_integral(T, schedule):
    sde, (prime, bar) = sde64(T, schedule), literal_theta(schedule, T)
    assert sde.num_steps == T and sde.theta_bar.dtype == torch.float64
    agree(f"theta_bar of {schedule}", sde.theta_bar, bar, atol=0)
    steps = torch.arange(1, T + 1)
    agree(f"theta' of {schedule}, (T, 1)", sde.between(steps - 1, steps), prime[1:, None], atol=1e-13)


def simulated(x, schedule, T, tau, t, seed=1, substeps=100):
    """Paths of Eq. 1 from x (N,) at time tau to t, by Euler-Maruyama."""
    rng = np.random.default_rng(seed)
    for h in np.repeat(literal_theta(schedule, T)[0][tau + 1 : t + 1] / substeps, substeps):
        x = x - h * x + np.sqrt(2 * h) * rng.standard_normal(len(x))
    return x


def test_eq02_has_the_moments_and_the_law_of_simulated_paths_of_eq01():
    for schedule, T, tau, t in (("cosine", 5, 1, 4), ("linear", 8, 0, 5)):
        x_t = simulated(np.full(100_000, -1.7), schedule, T, tau, t)
        decay, var = (float(c) for c in sde64(T, schedule).transition(tau, t))
        assert_gaussian(f"Eq. 1: paths, {schedule}", x_t, decay * -1.7, math.sqrt(var), sees=0.035, comparisons=2)


@given(cases())
def test_eq02_transitions_from_0_to_tau_to_t_compose_by_chapman_and_kolmogorov(case):
    spans = (0, case.tau), (case.tau, case.t), (0, case.t)
    (decay, var), (further, fresh), (whole, total) = (case.sde.transition(*span) for span in spans)
    agree("Eq. 2: decays multiply", further * decay, whole)
    agree("Eq. 2: variance at tau, decayed, and that of the rest", further**2 * var + fresh, total)


@given(cases())
def test_eq02_log_density_is_scipys(case):
    law = norm(np.exp(-case.between) * case.y.numpy(), np.sqrt(-np.expm1(-2 * case.between)))
    expected = law.logpdf(case.x.numpy()).sum(-1)
    agree("log_prob: SciPy's, summed over dimensions", case.sde.log_prob(case.x, case.y, case.tau, case.t), expected)


# Each equation of the SDE at one time, as a function of (sde, t, x, y, z).
AT_ONE_TIME = {
    "transition": lambda sde, t, x, y, z: torch.stack(sde.transition(0, t)),
    "diffuse": lambda sde, t, x, y, z: sde.diffuse(x, t, y),
    "score": lambda sde, t, x, y, z: sde.score(x, y, t),
    "posterior mean": lambda sde, t, x, y, z: sde.posterior(x, y, t)[0],
    "posterior variance": lambda sde, t, x, y, z: sde.posterior(x, y, t)[1],
    "predict_x0": lambda sde, t, x, y, z: sde.predict_x0(x, t, y),
    "log_prob": lambda sde, t, x, y, z: sde.log_prob(x, y, 0, t),
    "reverse_sde_step": lambda sde, t, x, y, z: sde.reverse_sde_step(x, t, y, z),
}


def test_sde_rejects_ints_off_its_grid_times_that_descend_too_few_steps_and_bad_schedules(monkeypatch):
    sde, x = sde64(), torch.zeros(2)
    for tau, t in ((2, 1), (-1, 3), (0, 6)):
        for function in (sde.transition, sde.between, sde.decay, sde.var, functools.partial(sde.log_prob, x, x)):
            with pytest.raises(ValueError, match=rf"{tau} and {t} must ascend, from 0 to T = 5"):
                function(tau, t)
    for name, function in AT_ONE_TIME.items():
        for t in (-1, 6, *[0] * (name.startswith("posterior") or name == "reverse_sde_step")):
            with pytest.raises(ValueError, match="must ascend, from 0 to T = 5"):
                function(sde, t, x, x, x)
        function(sde, 1, x, x, x), function(sde, 5, x, x, x)
    for T in (1, 0, -3):
        with pytest.raises(ValueError, match=f"num_steps is {T}"):
            MeanRevertingSDE(T)
    with pytest.raises(ValueError, match="schedule is 'sine'.*" + ", ".join(SCHEDULES)):
        MeanRevertingSDE(5, "sine")
    for first in (0.0, -1.0, math.nan):
        monkeypatch.setitem(erdp.SCHEDULES, "sine", lambda k, T, first=first: np.array([first, 1, 2, 3, 4]))
        with pytest.raises(ValueError, match="schedule 'sine' is not positive"):
            MeanRevertingSDE(5, "sine")


@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_sde_coefficients_are_computed_in_float64_and_rounded(T, schedule):
    single, t = MeanRevertingSDE(T, schedule), torch.arange(1, T + 1)
    coefficients = AT_ONE_TIME.keys() - {"log_prob", "score"}  # which are computed from Eq. 2's, in x's own precision
    for name, alone in itertools.product(coefficients, torch.eye(3)):  # of x, y and z one is 1, the others are 0
        exact = AT_ONE_TIME[name](sde64(T, schedule), t, *alone.double().expand(T, 1, 3).unbind(-1))
        found = AT_ONE_TIME[name](single, t, *alone.expand(T, 1, 3).unbind(-1))
        assert found.dtype == torch.float32
        agree(f"{name} in float32: one coefficient, rounded", found, exact.float(), rtol=3e-7, atol=0)
    assert [c.shape for at in (1, t) for c in single.transition(0, at)] == [(), (), (T, 1), (T, 1)]
    decay, var = MeanRevertingSDE(T, schedule, torch.float16, "meta").transition(0, t)
    assert (decay.dtype, var.device.type) == (torch.float16, "meta"), "of the dtype and on the device asked for"


# ==== Eq. 3 and 4: the reverse SDE, and diffusing =====================================================================
def test_eq03_one_step_keeps_the_sdes_own_law_to_second_order_in_the_step():
    """From the variance of x_t to that of x_{t-1}, of x_0 ~ N(0, 0.3^2), with its exact score. Sees a wrong factor."""
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    for share in (0.1, 0.25, 0.7):
        errors = []
        for T in (400, 800, 1600):
            sde, t, (_, bar) = sde64(T, "constant"), round(share * T), literal_theta("constant", T)
            before, at = (1 - 0.91 * math.exp(-2 * theta_bar) for theta_bar in (bar[t - 1], bar[t]))
            gain, spread = sde.reverse_sde_step(one, t, -one / at, zero), sde.reverse_sde_step(zero, t, zero, one)
            errors.append(float(gain**2 * at + spread**2 - before))
        claim = f"Eq. 3 at {share} T: half the step, a quarter of the error"
        agree(claim, np.divide(errors[:2], errors[1:]), (4.0, 4.0), rtol=0.1)


@given(cases())
def test_eq04_is_the_mean_of_eq02_and_its_deviation_times_the_noise(case):
    expected = np.exp(-case.bar) * case.x.numpy() + np.sqrt(-np.expm1(-2 * case.bar)) * case.y.numpy()
    agree("Eq. 4", case.sde.diffuse(case.x, case.t, case.y), expected)


# ==== Eq. 5 and the other diffusion losses ============================================================================
def literal_eq40(prime, bar, before, x_0, x_t):
    exp, var = torch.exp, 1 - torch.exp(-2 * bar)
    of_x_t, of_x_0 = (1 - exp(-2 * before)) / var * exp(-prime), (1 - exp(-2 * prime)) / var * exp(-before)
    return of_x_t * x_t + of_x_0 * x_0


def literal_likelihood_loss(prime, bar, before, x_0, x_t, eps, eps_hat):
    euler = (1 + prime) * x_t - 2 * prime / torch.sqrt(1 - torch.exp(-2 * bar)) * eps_hat  # a step of Eq. 3
    return ((euler - literal_eq40(prime, bar, before, x_0, x_t)) ** 2).mean()


def literal_posterior_loss(prime, bar, before, x_0, x_t, eps, eps_hat):
    x_0_hat = torch.exp(bar) * (x_t - torch.sqrt(1 - torch.exp(-2 * bar)) * eps_hat)
    means = (literal_eq40(prime, bar, before, start, x_t) for start in (x_0_hat, x_0))
    return ((next(means) - next(means)) ** 2).mean()


# From the SDE's symbols (B, 1) and arrays (B, A).
LITERAL_LOSSES = dict(
    noise=lambda prime, bar, before, x_0, x_t, eps, eps_hat: ((eps_hat - eps) ** 2).mean(),
    likelihood=literal_likelihood_loss,
    posterior=literal_posterior_loss,
)


@given(cases())
def test_eq05_is_the_mean_squared_error_of_the_noise_and_the_other_losses_are_of_means_of_eq07(case):
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    symbols = *map(torch.tensor, (case.prime, case.bar, case.before)), case.x, x_t, case.y, case.z
    for name, loss in erdp.LOSSES.items():
        expected = own("LITERAL_LOSSES", name)(*symbols)
        agree(f"loss {name}", loss(case.sde, case.x, x_t, case.t, case.y, case.z), expected, rtol=1e-8)


# ==== Eq. 6-8: the posterior, and x0-hat ==============================================================================
def test_eq06_and_eq07_are_the_law_of_simulated_states_before_x_t_and_after_x_0():
    for t in (2, 3, 4):
        before = simulated(np.full(100_000, 0.9), "cosine", 5, 0, t - 1, seed=5)
        x_t = simulated(before, "cosine", 5, t - 1, t, seed=6)
        mean, var = sde64().posterior(torch.tensor(x_t), torch.tensor(0.9), t)
        residual, std = before - mean.numpy(), math.sqrt(var)
        assert_gaussian(f"Eq. 7 at t = {t}: residual", residual, 0.0, std, sees=0.04, comparisons=6)
        products = residual / std * (x_t - x_t.mean()) / x_t.std()
        assert_mean(f"Eq. 7 at t = {t}: slope over x_t", products, 0.0, sees=0.04, comparisons=6)


def log_densities_of_eq34(case, x, x_t, x_0):
    """log p(x_t | x_{t-1}), log p(x_{t-1} | x_0) and log p(x_t | x_0) by SciPy, at x_{t-1} = x."""

    def log_p(later, earlier, duration):
        return norm.logpdf(later, np.exp(-duration) * earlier, np.sqrt(-np.expm1(-2 * duration)))

    return log_p(x_t, x, case.prime), log_p(x, x_0, case.before), log_p(x_t, x_0, case.bar)


@given(cases(first=2))
def test_eq07_posterior_is_bayes_rule(case):
    mean, var = case.sde.posterior(case.x, case.y, case.t)
    likelihood, prior, evidence = log_densities_of_eq34(case, case.z.numpy(), case.x.numpy(), case.y.numpy())
    size = 1 + max(np.abs(term).max() for term in (likelihood, prior, evidence))
    log_p = norm.logpdf(case.z.numpy(), mean.numpy(), var.sqrt().numpy())
    agree("Eq. 6-7: log density, as of Eq. 34", log_p, likelihood + prior - evidence, atol=1e-10 * size)


@given(cases())
def test_eq07_last_step_returns_x_0_without_noise(case):
    for t in (1, torch.ones_like(case.t)):
        mean, var = case.sde.posterior(case.x, case.y, t)
        assert torch.equal(mean, case.y) and not var.any(), "Eq. 7 at t = 1 has mean x_0 and variance 0"


@given(cases())
def test_eq08_inverts_eq04(case):
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    agree("Eq. 8 of Eq. 4", case.sde.predict_x0(x_t, case.t, case.y), case.x)


# ==== Eq. 10 and Figure 2: sampling ===================================================================================
def literal_sample(network, schedule, T, state, noise, clip_denoised, clip_sample):
    """Eq. 10 by Eq. 8, 7 and 6, from x_T = noise[0], with scalars for the SDE's symbols. noise (T, B, A)."""
    prime, bar = literal_theta(schedule, T)
    x, used = noise[0], 1
    for t in range(T, 0, -1):
        var, past, step = (1 - math.exp(-2 * theta) for theta in (bar[t], bar[t - 1], prime[t]))
        eps = network(x, torch.tensor([t] * len(x)), state)
        x_0 = math.exp(bar[t]) * (x - math.sqrt(var) * eps)
        if clip_denoised:
            x_0 = x_0.clip(-1, 1)
        x = past / var * math.exp(-prime[t]) * x + step / var * math.exp(-bar[t - 1]) * x_0
        if t > 1:
            x, used = x + math.sqrt(past * step / var) * noise[used], used + 1
    return x.clip(-1, 1) if clip_sample else x


@given(st.integers(2, 30), st.sampled_from(SCHEDULES), st.booleans(), st.booleans(), st.integers(0, 999))
def test_eq10_sampler_follows_eq08_eq07_and_eq06_step_by_step(T, schedule, clip_denoised, clip_sample, seed):
    def rough_network(x_t, t, state):
        """Far off enough for every clamp to bite, and different for each time and state."""
        return 0.8 * x_t + torch.sin(1.7 * t)[:, None] + 0.3 * state.sum(-1, keepdim=True)

    noise, state = gaussian(T, 4, 2, seed=seed), gaussian(4, 3, seed=seed + 1000)
    arguments = state, noise, clip_denoised, clip_sample
    expected = literal_sample(rough_network, schedule, T, *arguments)
    action = erdp.sample_actions(rough_network, sde64(T, schedule), *arguments)
    agree("Eq. 10", action, expected, rtol=1e-9)


def gaussian_recursion(schedule, T, mean, width):
    """Moments of a^1 and a^0 of the sampler with the analytic predictor of N(mean, width^2), by recursion."""
    prime, bar = literal_theta(schedule, T)
    m, v, at_1 = 0.0, 1.0, None
    for t in range(T, 0, -1):
        var, past, step = (1 - math.exp(-2 * theta) for theta in (bar[t], bar[t - 1], prime[t]))
        decay = math.exp(-bar[t])
        gain = decay * width**2 / (decay**2 * width**2 + var)  # x0-hat = E(x_0 | x_t) = mean + gain (x_t - decay mean)
        of_x_t, of_x_0 = past / var * math.exp(-prime[t]), step / var * math.exp(-bar[t - 1])
        at_1 = (m, v)
        m = of_x_t * m + of_x_0 * (mean + gain * (m - decay * mean))
        v = (of_x_t + of_x_0 * gain) ** 2 * v + past * step / var
    return at_1, (m, v)


def test_eq10_samples_approach_a_mixture_as_the_steps_grow():
    """Each distance is known to half of `tolerance`, by the Dvoretzky-Kiefer-Wolfowitz bound on samples in [-2, 2]."""
    n, x, steps = 400_000, np.linspace(-2, 2, 4001), (5, 10, 30)
    tolerance = 2 * 4 * math.sqrt(math.log(2 * len(steps) / RATE) / (2 * n))
    expected, distances = (WEIGHTS * norm.cdf((x[:, None] - MEANS) / WIDTHS)).sum(-1), []
    for T in steps:
        network, noise = analytic_predictor(literal_theta("cosine", T)[1]), gaussian(T, n, 1, seed=T)
        action = erdp.sample_actions(network, sde64(T), None, noise, False, False).numpy().ravel()
        assert np.abs(action).max() <= 2
        cdf = np.searchsorted(np.sort(action), x) / n
        distances.append(np.abs(cdf - expected).sum() * (x[1] - x[0]))
    assert np.all(-np.diff(distances) > tolerance), f"Wasserstein distances {distances} at T = {steps}"


@given(st.integers(2, 100), st.sampled_from(SCHEDULES), st.floats(-1, 1), st.integers(0, 999))
def test_figure2_optimal_sampling_reconstructs_x_0_exactly_at_every_t(T, schedule, x_0, seed):
    bar = torch.tensor(literal_theta(schedule, T)[1])

    def true_noise(x_t, t, state):
        return (x_t - torch.exp(-bar[t])[:, None] * x_0) / torch.sqrt(1 - torch.exp(-2 * bar[t]))[:, None]

    noise = gaussian(T, 3, 2, seed=seed)
    for clips in ((True, True), (False, False)):
        action = erdp.sample_actions(true_noise, sde64(T, schedule), None, noise, *clips)
        agree("Figure 2: the sampler returns x_0", action, np.full((3, 2), x_0))


# ==== Eq. 12-15: the policy's loss, and the log probability in it =====================================================
VARIANTS = get_args(erdp.Variant)


def literal_log_prob(variant, prime, bar, a_0, eps_hat, a_T):
    """log p(a^1 | a^T) as the paper means it, or as the released code computes it, from densities of PyTorch's own."""

    def g(u, v, duration):
        law = torch.distributions.Normal(math.exp(-duration) * v, math.sqrt(1 - math.exp(-2 * duration)))
        return law.log_prob(u).sum(-1)

    if variant == "paper":
        a_1 = math.exp(-bar[1]) * a_0 + math.sqrt(1 - math.exp(-2 * bar[1])) * eps_hat
        return g(a_T, a_1, bar[-1] - bar[1]) + g(a_1, a_0, bar[1]) - g(a_T, a_0, bar[-1])
    a_1 = (1 - prime[1]) * a_0
    return g(a_1, a_T, bar[-1] - bar[2]) + g(a_0, a_1, bar[2] - bar[1]) - g(a_0, a_T, bar[-1] - bar[1])


# Eq. 15 of alpha, lambda, L_diff, Q's value, the entropy h (of `literal_policy_loss`), the number of action dimensions
# and h's magnitude.
LITERAL_VARIANTS = dict(
    paper=lambda alpha, lambda_, l_diff, q, h, A, h_size: l_diff - lambda_ * (q + alpha * h),
    released=lambda alpha, lambda_, l_diff, q, h, A, h_size: l_diff - lambda_ * q - alpha * h / h_size,
    debruijn=lambda alpha, lambda_, l_diff, q, h, A, h_size: l_diff - lambda_ * q - alpha * h / A,
)


class Problem(NamedTuple):
    """One draw of everything that the policy loss takes, and its prediction of the noise as a leaf."""

    args: Args
    sde: MeanRevertingSDE
    critics: QEnsemble
    batch: Batch
    noise: Noise
    q_data: torch.Tensor
    eps_hat: torch.Tensor
    x_t: torch.Tensor  # Eq. 4, and Eq. 8 of it
    a_0: torch.Tensor

    def loss(self, **changes):
        """erdp's policy loss, the prediction standing in for the policy."""
        p = self._replace(**changes)

        def policy(x_t, t, state):
            agree("the policy sees the noised data action", x_t, p.x_t)
            assert t is p.noise.t and state is p.batch.state
            return p.eps_hat

        return erdp.policy_loss(policy, p.critics, p.sde, p.batch, p.noise, p.q_data, p.args)

    def gradient(self, **changes):
        eps_hat = changes.pop("eps_hat", self.eps_hat).detach().clone().requires_grad_()
        self.loss(eps_hat=eps_hat, **changes)["policy_loss"].backward()
        return eps_hat.grad


def problem(seed=0, B=4, M=3, **choices) -> Problem:
    args = Args(**dict(num_diffusion_steps=4, entropy_coef=0.3, eta=0.7, lcb_coef=1.3) | choices)
    T, critics, batch = args.num_diffusion_steps, tiny_critics(M=M, seed=seed), random_batch(B, seed=seed)
    t = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    noise = Noise(t, gaussian(B, 2, seed=seed + 20), gaussian(B, 2, seed=seed + 21), None)
    eps_hat = noise.eps + 0.3 * gaussian(B, 2, seed=seed + 22)  # near enough for some x0-hat to lie inside the bounds
    q_data = critics(batch.state, batch.action).detach()
    bar = torch.tensor(literal_theta(args.schedule, T)[1])[t, None]
    decay, std = torch.exp(-bar), torch.sqrt(1 - torch.exp(-2 * bar))
    x_t = decay * batch.action + std * noise.eps
    a_0 = (x_t - std * eps_hat) / decay
    return Problem(args, sde64(T, args.schedule), critics, batch, noise, q_data, eps_hat, x_t, a_0)


STANDARD = 0.5 * math.log(2 * math.pi * math.e)  # entropy of a standard Gaussian


def last_used(bar) -> int:
    """The last t at which -1/2 log var_t is 0.01 or more, or 1, from theta_bar (T+1,): after it x_t is Gaussian."""
    return max([1, *(t for t in range(1, len(bar)) if -0.5 * math.log(-math.expm1(-2 * bar[t])) >= 0.01)])


def literal_entropy(prime, bar, t, eps_hat):
    """De Bruijn's identity from the noise predicted at one time a row: a term of a sum over t, times T."""
    T, A, var = len(bar) - 1, eps_hat.shape[1], 1 - np.exp(-2 * bar)
    weights = [T * prime[k] / var[k] if k <= last_used(bar) else 0 for k in t]
    rows = [w * ((e**2).sum() - A * var[k]) for w, k, e in zip(weights, t, eps_hat)]
    return A * STANDARD - torch.stack(rows)


def literal_policy_loss(args, members, batch, noise, q_data, eps_hat):
    """Eq. 15 as each variant has it: its terms by name."""
    prime, bar = literal_theta(args.schedule, args.num_diffusion_steps)
    t = noise.t.numpy()
    prime_t, bar_t, before_t = (torch.tensor(column)[:, None] for column in (prime[t], bar[t], bar[t - 1]))
    std_t = torch.sqrt(1 - torch.exp(-2 * bar_t))
    x_t = torch.exp(-bar_t) * batch.action + std_t * noise.eps
    l_diff = own("LITERAL_LOSSES", args.loss)(prime_t, bar_t, before_t, batch.action, x_t, noise.eps, eps_hat)
    a_0 = torch.exp(bar_t) * (x_t - std_t * eps_hat)
    clipped = torch.where(a_0.abs() <= 1, a_0, a_0.sign().detach())  # without gradient outside
    if args.variant == "debruijn":
        entropy = literal_entropy(prime, bar, t, eps_hat)
    else:
        entropy = -literal_log_prob(args.variant, prime, bar, a_0, eps_hat, noise.a_T)
    pessimistic = own("LITERAL_PESSIMISM", args.pessimism)
    seen = [b for b in range(len(t)) if t[b] <= (args.q_time or args.num_diffusion_steps)]  # rows whose a_0 Q sees
    q = literal_q_of(members, batch.state, clipped)
    value = pessimistic(q[:, seen], args).mean() if seen else 0 * q.sum()
    lambda_ = args.eta / (q if args.variant == "released" else pessimistic(q_data, args)).abs().mean().detach()
    terms = l_diff, value, entropy.mean(), eps_hat.shape[1], entropy.abs().mean().detach()
    loss = own("LITERAL_VARIANTS", args.variant)(args.entropy_coef, lambda_, *terms)
    return dict(policy_loss=loss, diffusion_loss=l_diff, lcb=value, entropy=entropy.mean())


OPTIONS = [
    dict(variant=variant, loss=loss, pessimism=pessimism)
    for variant, loss, pessimism in itertools.product(VARIANTS, erdp.LOSSES, erdp.PESSIMISM)
    if (variant, loss) != ("debruijn", "likelihood")  # which erdp.py refuses
]
SIZES = dict(num_diffusion_steps=st.integers(3, 30), M=st.integers(1, 3), B=st.integers(1, 3))
SIZES |= dict(schedule=st.sampled_from(SCHEDULES), q_time=st.integers(1, 3) | st.none(), seed=st.integers(0, 999))
WEIGHTINGS = dict(entropy_coef=st.floats(0, 2), eta=st.floats(0, 3), lcb_coef=st.floats(0, 5))


@given(st.sampled_from(OPTIONS), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_eq12_q_terms_gradient_does_not_change_with_the_scale_of_q(options, c, seed):
    p = problem(seed, entropy_coef=0.0, **options)
    gradient = p.gradient(critics=lambda *given, **flags: c * p.critics(*given, **flags), q_data=c * p.q_data)
    agree("Eq. 12: lambda takes out the scale of Q", gradient, p.gradient(), rtol=1e-8)
    without_q = p.gradient(args=dataclasses.replace(p.args, eta=0.0))
    inside = p.a_0.abs() < 1
    assert torch.equal(without_q != p.gradient(), inside), "Eq. 12: Q's gradient reaches all actions inside the bounds"


def test_eq12_alpha_zero_removes_the_entropy_term_exactly():
    for variant in ("paper", "released"):
        p = problem(variant=variant, entropy_coef=0.0)
        other = p.noise._replace(a_T=p.noise.a_T + 1)
        assert p.loss(noise=other)["entropy"] != p.loss()["entropy"], f"{variant}: the entropy depends on a_T"
        loss, of_other = (p.loss(noise=noise)["policy_loss"] for noise in (p.noise, other))
        assert torch.equal(loss, of_other), f"{variant}, alpha = 0: the loss does not contain it"
        assert torch.equal(p.gradient(noise=other), p.gradient()), f"{variant}, alpha = 0: nor does its gradient"
        with_it = p.gradient(args=dataclasses.replace(p.args, entropy_coef=0.01))
        assert not torch.equal(with_it, p.gradient()), f"{variant}, alpha = 0.01: the gradient contains it"


def last_step(network, a_1, T=5):
    """a^0 and log abs(d a^0 / d a^1) of the sampler's last step, by central differences."""
    h, t = 1e-5, torch.ones(len(a_1), dtype=torch.int64)
    below, at, above = (sde64(T).predict_x0(a, 1, network(a, t, None)) for a in (a_1 - h, a_1, a_1 + h))
    return at, torch.log(torch.abs(above - below) / (2 * h))


@given(st.sampled_from([2, 5, 20]), st.floats(-0.5, 0.5), st.floats(0.1, 1))
def test_eq13_holds_with_a_constant_for_a_gaussian_policy(T, mean, width):
    """log pi(a^1) - log pi(a^0), with both densities from the sampler's closed form, at many points."""
    network = analytic_predictor(literal_theta("cosine", T)[1], np.ones(1), np.array([mean]), np.array([width]))
    (m_1, v_1), (m_0, v_0) = gaussian_recursion("cosine", T, mean, width)
    a_1 = m_1 + math.sqrt(v_1) * torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    a_0, log_slope = last_step(network, a_1, T)
    difference = norm.logpdf(a_1, m_1, math.sqrt(v_1)) - norm.logpdf(a_0, m_0, math.sqrt(v_0))
    agree("Eq. 13: the same at every point", difference, np.full((13, 1), difference[0, 0]), atol=1e-8)
    agree("Eq. 13: and is log abs(d a^0 / d a^1)", difference, log_slope, atol=1e-5)


def test_eq13_does_not_hold_for_a_mixture():
    network, a_1 = analytic_predictor(literal_theta("cosine", 5)[1]), torch.linspace(-1, 1, 41, dtype=torch.float64)
    _, log_slope = last_step(network, a_1[:, None])
    assert log_slope.max() - log_slope.min() > 1, "for a mixture log pi(a^1) - log pi(a^0) is not constant"


@given(cases())
def test_eq14_is_the_joint_gaussians_conditional_density(case):
    """(x_1, x_T) given x_0 is jointly Gaussian; SciPy's joint density less that of x_T."""
    first, last = case.theta_bar[1], case.theta_bar[-1]
    var_1, var_T = -math.expm1(-2 * first), -math.expm1(-2 * last)
    covariance = math.exp(-(last - first)) * var_1
    expected, size = np.zeros(len(case.t)), 1.0
    for b, a in np.ndindex(*case.x.shape):
        x_1, x_T, x_0 = (float(value[b, a]) for value in (case.x, case.y, case.z))
        mean = math.exp(-first) * x_0, math.exp(-last) * x_0
        joint = scipy.stats.multivariate_normal(mean, [[var_1, covariance], [covariance, var_T]]).logpdf([x_1, x_T])
        expected[b] += joint - norm.logpdf(x_T, mean[1], math.sqrt(var_T))
        size = max(size, abs(joint))
    agree("Eq. 14", case.sde.log_prob_x1(case.x, case.y, case.z), expected, atol=1e-9 * size)


@settings(max_examples=100)
@given(st.sampled_from(OPTIONS), st.fixed_dictionaries(SIZES | WEIGHTINGS))
def test_eq15_policy_loss_and_its_gradient_equal_literal_ones(options, choices):
    p = problem(**options, **choices)
    eps_hat = p.eps_hat.clone().requires_grad_()
    expected = literal_policy_loss(p.args, members_of(p.critics), p.batch, p.noise, p.q_data, eps_hat)
    (slope,) = torch.autograd.grad(expected["policy_loss"], eps_hat)
    size, found = 1e-9 * (1 + float(slope.abs().max())), p.loss()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        agree(f"Eq. 15: {name}", found[name], reference, rtol=1e-8, atol=1e-9)
    agree("Eq. 15: gradient to the predicted noise", p.gradient(), slope, rtol=1e-8, atol=size)


def test_eq15_gradient_equals_finite_differences():
    """Where no magnitude that the gradient holds constant depends on the prediction, as in `released`."""
    for options in ("paper", "noise", "lcb"), ("paper", "likelihood", "min"), ("debruijn", "posterior", "lcb"):
        p = problem(1, **dict(zip(("variant", "loss", "pessimism"), options)))
        assert (p.a_0.abs() < 1).sum() == 5, "of 8 components Q has a gradient to 5"
        tight = dict(rtol=1e-5, atol=1e-7, raise_exception=False)
        loss = [lambda eps_hat, p=p: p.loss(eps_hat=eps_hat)["policy_loss"], p.eps_hat.clone().requires_grad_()]
        assert torch.autograd.gradcheck(*loss, **tight), f"Eq. 15's gradient, {options}"


def test_eq15_gradients_flow_into_the_policy_alone():
    for variant in VARIANTS:
        p = problem(variant=variant)
        q_data, action = p.q_data.clone().requires_grad_(), p.batch.action.clone().requires_grad_()
        eps_hat = p.eps_hat.clone().requires_grad_()
        found = p.loss(q_data=q_data, eps_hat=eps_hat, batch=p.batch._replace(action=action))
        found.pop("policy_loss").backward()
        assert all(weight.grad is None for weight in p.critics.parameters()), f"{variant}: Q's weights get no gradient"
        assert q_data.grad is None, f"{variant}: lambda is a constant of Eq. 15"
        assert not any(part.requires_grad for part in found.values()), f"{variant}: what is reported carries no graph"
        assert eps_hat.grad.ne(0).all(), f"{variant}: every component of the prediction has a gradient"


# ==== In place of Eq. 14: the entropy by de Bruijn's identity =========================================================
@given(st.integers(2, 200), st.sampled_from(SCHEDULES), st.floats(-1, 1))
@example(2, "constant", 1.0)  # x_1 is Gaussian already
def test_debruijn_sum_ends_where_x_t_is_gaussian_to_within_a_hundredth_nat(T, schedule, action):
    """Of one action in [-1, 1]: KL of x_t from the standard Gaussian, and what its entropy lacks, by SciPy."""
    prime, bar = literal_theta(schedule, T)
    last, t = last_used(bar), np.arange(1, T + 1)
    weights = np.where(t <= last, prime[t] / -np.expm1(-2 * bar[t]), 0)
    found = erdp.entropy_weights(sde64(T, schedule))
    agree("w_t: theta'_t / var_t up to the last informative time, then 0", found, weights, atol=0)

    def lacks(t, action):
        law = norm(math.exp(-bar[t]) * action, math.sqrt(-math.expm1(-2 * bar[t])))
        kl = 0.5 * math.log(2 * math.pi) + 0.5 * (law.var() + law.mean() ** 2) - law.entropy()
        return kl, STANDARD - law.entropy()

    for t in range(last + 1, T + 1):
        assert max(lacks(t, action)) < 0.01, "x_t after the last time"
    if last > 1:
        assert min(lacks(last, 1.0)) >= 0.01 - 1e-12, "at the last time an action on the bounds is still seen"
    left_out = prime[last + 1 :] * (1 / -np.expm1(-2 * bar[last + 1 :]) - 1)
    assert left_out.sum() <= 0.03, "as E||E(eps | x_t)||^2 lies between var_t and 1 a dimension"


def of_mixture(T, weights=WEIGHTS, means=MEANS, widths=WIDTHS, schedule="cosine", data=None) -> float:
    """H-hat on the grid with the exact noise of a mixture, by Gauss-Hermite quadrature over x_t of `data`, else it."""
    weights, means, widths = (np.asarray(part, float) for part in (weights, means, widths))
    share, at, width = data or (weights, means, widths)
    bar, total = literal_theta(schedule, T)[1], 0.0
    predictor = analytic_predictor(bar, weights, means, widths)
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    for t in range(1, T + 1):
        spread = np.sqrt(math.exp(-2 * bar[t]) * width**2 - math.expm1(-2 * bar[t]))
        x = torch.tensor(math.exp(-bar[t]) * at[:, None] + spread[:, None] * node).reshape(-1, 1)
        times = torch.full((len(x),), t)
        rows = erdp.entropy_estimate(sde64(T, schedule), predictor(x, times, None), times)
        total += rows.numpy() @ (share[:, None] * weight / weight.sum()).ravel()
    return total / T


def test_debruijn_estimate_of_a_mixture_approaches_its_entropy_at_first_order():
    """Up to what x_t at the last time used lacks of a Gaussian's entropy. The entropies are by quadrature."""

    def entropy(bar):
        means, spread = math.exp(-bar) * MEANS, np.sqrt(math.exp(-2 * bar) * WIDTHS**2 - math.expm1(-2 * bar))
        quad = functools.partial(scipy.integrate.quad, points=[-1, 0, 1], limit=400, epsabs=1e-10)
        return quad(lambda x: scipy.special.entr((WEIGHTS * norm.pdf(x, means, spread)).sum()), -8, 8)[0]

    for schedule in ("cosine", "linear", "vp"):  # "constant" has a long first step at any such T
        errors = []
        for T in (100, 200, 400):
            bar = literal_theta(schedule, T)[1]
            lacking = STANDARD - entropy(bar[last_used(bar)])
            errors.append(of_mixture(T, schedule=schedule) - (entropy(0.0) + lacking))
        assert 0 < errors[-1] < 0.15, f"{schedule}: errors {errors}"
        agree(f"{schedule}: half the step, half the error", np.divide(errors[:2], errors[1:]), (2.0, 2.0), rtol=0.1)


def test_debruijn_estimate_of_a_policy_away_from_the_data_is_twice_h_less_the_cross_entropy():
    """Of the data's and the policy's Gaussian (mean, deviation), with CE(p, q) = -E_p log q by quadrature."""
    for p, q in (((0.0, 0.3), (0.0, 0.5)), ((0.1, 0.4), (-0.3, 0.25)), ((0.0, 0.3), (0.4, 0.3))):

        def twice_h_less_ce(bar, p=p, q=q):
            scale, var = math.exp(-bar), math.exp(-2 * bar)
            data, policy = (norm(scale * mean, math.sqrt(var * (width**2 - 1) + 1)) for mean, width in (p, q))
            return 2 * policy.entropy() + data.expect(policy.logpdf)

        errors, data = [], (np.ones(1), np.array([p[0]]), np.array([p[1]]))
        for T in (200, 400):
            bar = literal_theta("cosine", T)[1]
            end = STANDARD - twice_h_less_ce(bar[last_used(bar)])
            errors.append(of_mixture(T, [1.0], [q[0]], [q[1]], data=data) - twice_h_less_ce(0.0) - end)
        assert abs(errors[1]) < 0.08, f"{p}, {q}: the grid's error"
        claim = f"{p}, {q}: without the grid's error, which is of first order"
        agree(claim, 2 * errors[1] - errors[0], 0.0, atol=2e-3)
        assert abs(twice_h_less_ce(0.0) - norm(*q).entropy()) > 0.1, f"{p}, {q}: which is not H(q)"


def test_debruijn_minimiser_without_q_divides_the_noise():
    """By 1 + alpha T w_t: a smaller predicted noise is a larger entropy."""
    grids = (5, "cosine"), (5, "linear"), (8, "vp"), (2, "constant")
    for (T, schedule), alpha in itertools.product(grids, (0.0, 0.1, 1.0)):
        case = f"{schedule}, T = {T}, alpha = {alpha}"
        choices = dict(variant="debruijn", entropy_coef=alpha, eta=0.0, num_diffusion_steps=T, schedule=schedule)
        p, (prime, bar) = problem(B=20, **choices), literal_theta(schedule, T)
        assert set(p.noise.t.tolist()) == set(range(1, T + 1)), f"{case}: every time is drawn"
        weight = [prime[t] / (1 - math.exp(-2 * bar[t])) if t <= last_used(bar) else 0.0 for t in p.noise.t.tolist()]
        best = p.noise.eps / (1 + alpha * T * torch.tensor(weight, dtype=torch.float64))[:, None]
        agree(f"{case}: no gradient at the minimiser", p.gradient(eps_hat=best), 0 * best, atol=1e-12)
        assert (p.gradient(eps_hat=best + 0.1) > 0).all(), f"{case}: the loss grows above it"
        assert (p.gradient(eps_hat=best - 0.1) < 0).all(), f"{case}: and below it"


# ==== Eq. 16: Q-learning ==============================================================================================
def tiny_critics(S=3, A=2, M=3, seed=0, hidden=4):
    """Members with weights large enough to differ."""
    torch.manual_seed(seed)
    critics = QEnsemble(S, A, M, hidden).double()
    with torch.no_grad():
        for p in critics.parameters():
            p.normal_()
    return critics


def random_batch(B=5, S=3, A=2, seed=0):
    data = [gaussian(B, size, seed=seed + k) for k, size in enumerate((S, A, 1, S))]
    terminal = (torch.arange(B) % 3 == 1).double()
    return Batch(data[0], data[1].tanh(), 2 * data[2][:, 0], data[3], terminal)


def literal_targets(members, batch, next_action, discount, pessimism):
    """y_m of Eq. 16, (M, B), in loops over members, transitions and candidates."""
    rows = []
    for member in members:
        q = [[literal_q(member, s, candidate[b]) for candidate in next_action] for b, s in enumerate(batch.next_state)]
        rows.append([max(of_candidates) for of_candidates in q])
    if pessimism == "min":
        rows = [[min(column) for column in zip(*rows)]] * len(members)
    not_over = 1 - batch.terminal
    return torch.stack([batch.reward + discount * not_over * torch.stack(row) for row in rows])


def literal_q(member, state, action):
    """Q of one member, from its parameters by name, at one state and action: a scalar."""
    h = torch.cat([state, action])
    for layer in range(4):
        h = h @ member[f"weights.{layer}"] + member[f"biases.{layer}"][0]
        h = literal_mish(h) if layer < 3 else h
    return h[0]


def literal_q_of(members, state, action):
    return torch.stack([torch.stack([literal_q(member, s, a) for s, a in zip(state, action)]) for member in members])


def eq16(critics, target, batch, next_action, **choices):
    """Loss and Q(s, a) of erdp's critic loss."""
    next_state = batch.next_state.expand(len(next_action), -1, -1)
    found = erdp.critic_loss(critics, target, batch, next_state, next_action, Args(**choices))
    assert found.keys() == {"critic_loss", "q"}
    return found["critic_loss"], found["q"]


@settings(max_examples=25)
@given(*[st.integers(1, 4)] * 3, st.floats(0, 1), st.sampled_from([*erdp.PESSIMISM]), st.integers(0, 999))
def test_eq16_equals_loops_over_members_transitions_and_candidates(M, B, C, discount, pessimism, seed):
    critics, target = tiny_critics(M=M, seed=seed), tiny_critics(M=M, seed=seed + 1)
    batch, next_action = random_batch(B, seed=seed), gaussian(C, B, 2, seed=seed + 9).tanh()
    loss, q = eq16(critics, target, batch, next_action, pessimism=pessimism, discount=discount)
    y = literal_targets(members_of(target), batch, next_action, discount, pessimism)
    expected = literal_q_of(members_of(critics), batch.state, batch.action)
    agree("Eq. 16: Q(s, a) (M, B)", q, expected)
    agree("Eq. 16: squared error, mean over members and batch", loss, ((expected - y) ** 2).sum() / (M * B))


def test_eq16_leaves_the_target_networks_and_the_next_actions_without_gradient():
    critics, target, batch = tiny_critics(), tiny_critics(seed=1), random_batch()
    next_action = gaussian(2, 5, 2).requires_grad_()
    loss, q = eq16(critics, target, batch, next_action)
    loss.backward()
    assert next_action.grad is None and all(p.grad is None for p in target.parameters()), "y is a constant of Eq. 16"
    assert not q.requires_grad, "Q(s, a) is reported without its graph"
    assert all(p.grad is not None and p.grad.any() for p in critics.parameters()), "Eq. 16 trains all of Q"


# ==== Eq. 17: the ensemble's pessimism ================================================================================
@given(arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 4)), elements=st.floats(-9, 9)), st.floats(0, 9))
def test_eq17_is_the_mean_less_beta_deviations(q, beta):
    """With divisor M, or M - 1 as the released code has it; of one member there is no deviation."""
    for variant, correction in dict(paper=0, released=1, debruijn=0).items():
        deviation = q.std(0, ddof=correction) if len(q) > 1 else 0.0
        value = erdp.pessimistic_value(torch.tensor(q), Args(variant=variant, lcb_coef=beta))
        agree(f"Eq. 17, {variant}", value, q.mean(0) - beta * deviation, atol=1e-9)
    least = erdp.pessimistic_value(torch.tensor(q), Args(pessimism="min", lcb_coef=beta))
    agree("clipped double Q: the least", least, q.min(0), rtol=0, atol=0)


def test_eq17_has_the_means_gradient_where_members_agree():
    for unbiased in (False, True):
        value_of = functools.partial(erdp.lcb, beta=4.0, unbiased=unbiased)
        q = torch.full((4, 3), 0.7, dtype=torch.float64)
        q[:, 1] = gaussian(4)
        value_of(q.requires_grad_()).sum().backward()
        case = f"divisor M - {int(unbiased)}"
        agree(f"Eq. 17: gradient at equal members, {case}", q.grad[:, [0, 2]], np.full((4, 2), 1 / 4))
        elsewhere = torch.autograd.gradcheck(value_of, gaussian(4, 3).requires_grad_(), raise_exception=False)
        assert elsewhere, f"Eq. 17: gradient elsewhere, {case}"


# Of q (M, B), in loops over the members.
LITERAL_PESSIMISM = dict(lcb=lambda q, args: literal_lcb(q, args), min=lambda q, args: torch.stack([*map(min, q.T)]))


def literal_lcb(q, args):
    M, mean = len(q), sum(q) / len(q)
    if M == 1:
        return mean
    squares = sum((member - mean) ** 2 for member in q)
    return mean - args.lcb_coef * torch.sqrt(squares / (M - 1 if args.variant == "released" else M))


# ==== Networks ========================================================================================================
def literal_mish(x):
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def literal_noise_network(weights, x_t, t, state):
    """The noise network from its parameters by name, a row at a time."""
    rows = []
    for b in range(len(x_t)):
        angles = [(int(t[b]) - 1) * 10_000 ** (-i / 7) for i in range(8)]
        time = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=x_t.dtype)
        time = literal_mish(weights["time.0.weight"] @ time + weights["time.0.bias"])
        time = weights["time.1.weight"] @ time + weights["time.1.bias"]
        h = torch.cat([x_t[b], time, state[b]])
        for layer in range(3):
            h = literal_mish(weights[f"layers.{layer}.weight"] @ h + weights[f"layers.{layer}.bias"])
        rows.append(weights["layers.3.weight"] @ h + weights["layers.3.bias"])
    return torch.stack(rows)


LEADING = st.lists(st.integers(1, 3), max_size=3)  # axes before the last one


@settings(max_examples=15)
@given(LEADING, st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 999))
def test_noise_network_equals_a_literal_one_over_any_leading_axes(lead, S, A, hidden, seed):
    torch.manual_seed(seed)
    network = NoiseNetwork(S, A, hidden).double()
    x_t, t, state = gaussian(*lead, A, seed=seed), torch.randint(1, 101, lead), gaussian(*lead, S, seed=seed + 1)
    rows = x_t.reshape(-1, A), t.reshape(-1), state.reshape(-1, S)
    expected = literal_noise_network(dict(network.named_parameters()), *rows).reshape(*lead, A)
    agree("NoiseNetwork", network(x_t, t, state), expected)


def test_noise_network_takes_phases_of_late_times_in_float64():
    network, x_t, t = NoiseNetwork(2, 1, 8), torch.zeros(50, 1), torch.arange(51, 101)
    weights = {name: weight.double() for name, weight in network.named_parameters()}
    expected = literal_noise_network(weights, x_t.double(), t, torch.zeros(50, 2).double())
    out = network(x_t, t, torch.zeros(50, 2))
    assert out.dtype == torch.float32
    agree("NoiseNetwork in float32", out, expected, atol=2e-6, rtol=1e-5)


def test_noise_network_has_the_papers_sizes_and_pytorchs_initialisation():
    torch.manual_seed(0)
    network = NoiseNetwork(11, 3)
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    sizes = {"time.0": (32, 16), "time.1": (16, 32)}
    sizes |= {"layers.0": (256, 30), "layers.1": (256, 256), "layers.2": (256, 256), "layers.3": (3, 256)}
    expected = {f"{name}.weight": size for name, size in sizes.items()}
    assert shapes == expected | {f"{name}.bias": size[:1] for name, size in sizes.items()}
    of_bound = {name: p * sizes[name.rpartition(".")[0]][1] ** 0.5 for name, p in network.named_parameters()}
    for name, part in of_bound.items():
        if "weight" in name:
            assert_law(f"{name}: uniform in ±1/sqrt(fan-in)", part, scipy.stats.uniform(-1, 2), 0.26, comparisons=7)
            assert 0.98 < part.abs().max() <= 1
    biases = torch.cat([part for name, part in of_bound.items() if "bias" in name])
    assert_law("biases: uniform in ±1/sqrt(fan-in)", biases, scipy.stats.uniform(-1, 2), 0.26, comparisons=7)


OF_A_MEMBER = [f"{kind}.{layer}" for kind in ("weights", "biases") for layer in range(4)]  # what `literal_q` reads


def members_of(critics, requires_grad=False):
    """The parameters of each member of the ensemble on their own, by name, copied: `literal_q` computes with them."""
    named = dict(critics.named_parameters())
    assert [*named] == OF_A_MEMBER, (
        f"critics of the class {type(critics).__name__} are new here: write in `literal_q` how one member's Q is "
        f"computed, as an independent formula, in `members_of` which of {[*named]} a member has, and in `joined` the "
        "way back; the tests of the old ones' sizes and of bf16, and results/benchmark.py, read the old ones' layers"
    )
    numbers = range(len(named[OF_A_MEMBER[0]]))
    return [{k: p[m].detach().clone().requires_grad_(requires_grad) for k, p in named.items()} for m in numbers]


def joined(members) -> list:
    """Of tensors by name for each member: those of the ensemble, in the order of its parameters."""
    return [torch.stack([member[name] for member in members]) for name in OF_A_MEMBER]


def by_member(tensors) -> list[dict]:
    """Tensors listed member after member, by name for each."""
    size = len(OF_A_MEMBER)
    return [dict(zip(OF_A_MEMBER, tensors[k : k + size])) for k in range(0, len(tensors), size)]


@settings(max_examples=20)
@given(st.integers(1, 5), LEADING, *[st.integers(1, 4)] * 2, st.integers(2, 9), st.integers(0, 999))
def test_ensemble_equals_separate_networks_over_any_leading_axes(M, lead, S, A, hidden, seed):
    torch.manual_seed(seed)
    critics = QEnsemble(S, A, M, hidden).double()
    state, weight = gaussian(*lead, S, seed=seed), gaussian(M, *lead, seed=seed + 1)
    action = gaussian(*lead, A, seed=seed + 2).requires_grad_()
    members = members_of(critics, requires_grad=True)
    expected = literal_q_of(members, state.reshape(-1, S), action.reshape(-1, A)).reshape(M, *lead)
    parameters = [p for member in members for p in member.values()]
    slope, *slopes = torch.autograd.grad((expected * weight).sum(), [action, *parameters])
    q, still = critics(state, action), critics(state, action, frozen=True)
    agree("QEnsemble (M, ...), state before action", q, expected)
    assert torch.equal(still, q), "frozen does not change the values"
    (still * weight).sum().backward()
    agree("QEnsemble: gradient to the action, frozen", action.grad, slope)
    assert all(p.grad is None for p in critics.parameters()), "frozen: no gradient reaches the weights"
    action.grad = None
    (q * weight).sum().backward()
    agree("QEnsemble: gradient to the action", action.grad, slope)
    for (name, p), theirs in zip(critics.named_parameters(), joined(by_member(slopes))):
        agree(f"QEnsemble: gradient to {name}", p.grad, theirs)


def rounded(x):
    """x in bfloat16: the nearest number of 8 significant bits."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(fraction * 2**8), exponent - 8)


def test_precision_bf16_rounds_the_factors_and_the_products_between_hidden_layers_and_nothing_else():
    torch.manual_seed(0)
    critics = QEnsemble(3, 2, 4, 16, bf16=True)
    state, action = (gaussian(6, n, seed=n).float().requires_grad_() for n in (3, 2))
    q, expected = critics(state, action), []
    for member in members_of(critics):
        *weights, last, b_0, b_1, b_2, b_3 = (p.double().numpy() for p in member.values())
        h = np.concatenate([state.detach(), action.detach()], 1).astype(float) @ weights[0] + b_0
        for weight, bias in zip(weights[1:], (b_1, b_2)):
            h = rounded(rounded(F.mish(torch.tensor(h)).numpy()) @ rounded(weight)) + bias
        expected.append((F.mish(torch.tensor(h)).numpy() @ last + b_3)[:, 0])
    step = 2**-8 * np.abs(np.subtract(expected, b_3)).max()  # a tie may be rounded either way
    agree("QEnsemble in bfloat16", q, expected, rtol=0, atol=step / 8)
    critics.bf16 = False
    exact = critics(state, action)
    error = (q - exact).abs().max()
    assert step / 100 < error < 4 * step, "the flag has an effect, and a small one"
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), [action, *critics.parameters()]) for out in (q, exact))):
        assert ours.dtype == theirs.dtype == torch.float32, "parameters and their gradients stay in float32"
        agree("gradient in bfloat16", ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_ensemble_has_the_papers_sizes_and_the_released_initialisation():
    torch.manual_seed(0)
    critics = QEnsemble(40, 2, 8)
    assert len(members_of(critics)) == 8 and len(members_of(QEnsemble(1, 1))) == 64, "64 members by default"
    assert [tuple(p.shape) for p in critics.weights] == [(8, 42, 256), (8, 256, 256), (8, 256, 256), (8, 256, 1)]
    assert [tuple(p.shape) for p in critics.biases] == [(8, 1, 256), (8, 1, 256), (8, 1, 256), (8, 1, 1)]
    for weight in critics.weights[:3]:
        law = scipy.stats.uniform(-1 / 16, 1 / 8)
        assert_law("hidden weights, the first layer's too", weight, law, sees=0.03, comparisons=4)
        assert 0.0624 < weight.abs().max() <= 1 / 16
    assert all((bias == 0.1).all() for bias in critics.biases[:3]), "hidden biases are 0.1"
    assert_law("last weights", critics.weights[3], scipy.stats.uniform(-3e-3, 6e-3), sees=0.13, comparisons=4)
    many = QEnsemble(1, 1, 1000, 4).biases[3]
    assert 2.9e-3 < many.max() <= 3e-3 and -3e-3 <= many.min() < -2.9e-3, "last biases are uniform in +-3e-3"
    assert len(critics.weights[3].unique()) > 2000, "members differ"


def test_mishs_compiled_formula_equals_pytorchs(monkeypatch):
    points = torch.cat([torch.linspace(-100, 100, 801), torch.linspace(-3, 3, 61), torch.tensor([1e4, -1e4])])
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        x, y = (points.to(dtype).requires_grad_() for _ in range(2))
        agree(f"mish, as it runs uncompiled, {dtype}", erdp.mish(x), F.mish(x), rtol=0, atol=0)
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            value, expected = erdp.mish(x), F.mish(y)
        agree(f"mish, as it is compiled, {dtype}", value, expected, rtol=tolerance, atol=1e-37)
        value.sum().backward()
        expected.sum().backward()
        agree(f"mish's gradient, as it is compiled, {dtype}", x.grad, y.grad, rtol=tolerance, atol=10 * tolerance)


# ==== Section 4.1: acting =============================================================================================
def test_acting_is_by_softmax_over_the_candidates_values():
    value = torch.tensor([0.3, -1.0, 1.2, 0.5])
    p, *others = (scipy.special.softmax(scale * value.numpy()) for scale in (1.0, 0.9, 1.1, -1.0, 0.0))
    N, generator = 200_000, torch.Generator().manual_seed(0)
    candidates = torch.arange(4.0)[:, None].expand(N, 4, 2)
    u = torch.rand(N, 1, generator=generator, dtype=torch.float64)
    chosen = erdp.choose_action(candidates, value.expand(N, 4), u)
    assert torch.equal(chosen[:, 0], chosen[:, 1]), "both dimensions are of the same candidate"
    assert_counts("softmax", chosen[:, 0].long().bincount(minlength=4), p, [*others, np.roll(p, 1)])


def test_acting_takes_at_any_u_the_first_candidate_whose_cumulative_share_exceeds_it():
    quarters, tenths, first_is_out = [0.0] * 4, [5e4] * 10, [-math.inf, 0.0, 0.0]
    last = np.nextafter(1, 0)  # which ten rounded shares of 0.1 do not exceed
    edges = [(quarters, u, n) for u, n in ((0.0, 0), (np.nextafter(0.25, 0), 0), (0.25, 1), (0.75, 3), (last, 3))]
    edges += [([0.0] * 3, 1 / 3, 1), (tenths, last, 9), (first_is_out, 0.0, 1)]  # 1/3 is larger in float32
    for value, u, expected in edges:
        candidates, column = torch.arange(len(value))[None, :, None], torch.tensor([[u]], dtype=torch.float64)
        found = erdp.choose_action(candidates, torch.tensor([value]), column).item()
        assert found == expected, f"u = {u}, values {value}: {found}, expected {expected}"
    assert np.cumsum([0.1] * 10)[-1] == last, "ten shares of 0.1 end at the last u below 1"


# ==== Algorithm 1 =====================================================================================================
class Adam:
    """Adam (Kingma and Ba, 2014) in plain numbers, after clipping the gradients of all parameters as one vector."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.step = parameters, lr, 0
        self.m, self.v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    def descend(self, loss, max_norm):
        gradients = torch.autograd.grad(loss, self.parameters)
        length = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        self.step += 1
        for p, g, m, v in zip(self.parameters, gradients, self.m, self.v):
            g = g * min(1.0, max_norm / (length + 1e-6))
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            with torch.no_grad():
                p -= self.lr * (m / (1 - 0.9**self.step)) / (torch.sqrt(v / (1 - 0.999**self.step)) + 1e-8)


class Algorithm1:
    """A literal second implementation, from an agent's initial parameters; nothing of erdp.py computes in it."""

    def __init__(self, agent: Agent):
        self.args, self.updates = agent.args, int(agent.updates)
        self.policy = {name: p.detach().clone().requires_grad_() for name, p in agent.policy.named_parameters()}
        self.policy_ema = {name: p.clone() for name, p in agent.policy_ema.named_parameters()}
        self.critics = members_of(agent.critics, requires_grad=True)
        self.critics_target = members_of(agent.critics_target)
        self.policy_adam = Adam(list(self.policy.values()), self.args.lr)
        self.critic_adam = Adam([p for member in self.critics for p in member.values()], self.args.critic_lr)

    def update(self, batch, noise):
        args, T, B = self.args, self.args.num_diffusion_steps, len(batch.state)
        # next actions, at s_{i+1}, by the EMA policy
        candidates = []
        for c in range(10 if args.max_q_backup else 1):
            network = functools.partial(literal_noise_network, self.policy_ema)
            given = batch.next_state, noise.next_action[:, c], args.clip_denoised, True
            candidates.append(literal_sample(network, args.schedule, T, *given))
        y = literal_targets(self.critics_target, batch, candidates, args.discount, args.pessimism)
        q = literal_q_of(self.critics, batch.state, batch.action)
        q_loss = ((q - y) ** 2).sum() / (B * len(self.critics))
        self.critic_adam.descend(q_loss, args.grad_norm)
        # the policy, against the updated Q
        bar = literal_theta(args.schedule, T)[1][noise.t.numpy()]
        scale, std = (torch.tensor(c)[:, None] for c in (np.exp(-bar), np.sqrt(1 - np.exp(-2 * bar))))
        eps_hat = literal_noise_network(self.policy, scale * batch.action + std * noise.eps, noise.t, batch.state)
        terms = literal_policy_loss(args, self.critics, batch, noise, q.detach(), eps_hat)
        self.policy_adam.descend(terms["policy_loss"], args.grad_norm)
        # the target networks
        with torch.no_grad():
            if self.updates >= args.ema_start and self.updates % args.ema_every == 0:
                for name, p in self.policy.items():
                    self.policy_ema[name] = args.ema_rate * p + (1 - args.ema_rate) * self.policy_ema[name]
            for target, member in zip(self.critics_target, self.critics):
                rate = args.target_rate
                target |= {key: rate * new + (1 - rate) * target[key] for key, new in member.items()}
        self.updates += 1
        return dict(critic_loss=q_loss.detach(), q=q.mean().detach()) | {k: v.detach() for k, v in terms.items()}

    def compare(self, agent: Agent, claim: str):
        for name in ("policy", "policy_ema"):
            for key, p in getattr(agent, name).named_parameters():
                agree(f"{claim}: {name}, {key}", p, getattr(self, name)[key], rtol=1e-9)
        for name in ("critics", "critics_target"):
            for m, member in enumerate(members_of(getattr(agent, name))):
                for key, p in member.items():
                    agree(f"{claim}: {name}, member {m}, {key}", p, getattr(self, name)[m][key], rtol=1e-9)
        policy, critics = (o.state_dict()["state"] for o in (agent.policy_optimizer, agent.critic_optimizer))
        tight = dict(rtol=1e-8, atol=1e-13)
        for name, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):  # of PyTorch's Adam, and of ours
            for k, state in policy.items():
                agree(f"{claim}: {name} of the policy", state[name], getattr(self.policy_adam, moment)[k], **tight)
            for k, theirs in enumerate(joined(by_member(getattr(self.critic_adam, moment)))):
                agree(f"{claim}: {name} of Q", critics[k][name], theirs, **tight)


def tiny_agent(device="cpu", dtype=torch.float64, **choices) -> Agent:
    """A toy-sized agent whose targets and EMA differ from the networks that they follow, the same on any device."""
    torch.manual_seed(0)
    sizes = dict(num_diffusion_steps=4, num_critics=3, batch_size=4, hidden=32)
    args = Args(**sizes | dict(lr=1e-3, critic_lr=2e-3) | choices)
    agent = Agent(3, 2, args, device)
    agent.sde = MeanRevertingSDE(args.num_diffusion_steps, args.schedule, dtype, device)
    with torch.no_grad():
        for module in (agent.policy, agent.critics, agent.policy_ema, agent.critics_target):
            module.to(dtype)
        for p in agent.critics.parameters():
            p.add_(0.1 * torch.randn(p.shape).to(p))  # at first Q is all but 0
        for module, source in ((agent.policy_ema, agent.policy), (agent.critics_target, agent.critics)):
            for p, followed in zip(module.parameters(), source.parameters()):
                p.copy_(followed + 0.02 * torch.randn(p.shape).to(p))
    return agent


def random_noise(args: Args, generator) -> Noise:
    """What `sample_noise` fills, in float64."""
    noise = moved(erdp.noise_buffers(args, 2, "cpu"), "cpu")
    erdp.sample_noise(noise, generator)
    return noise


def moved(values, device, dtype=torch.float64):
    return type(values)(*(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in values))


ALGORITHM1 = {
    "paper": dict(),
    "released": dict(variant="released"),
    "gym": dict(loss="likelihood", clip_denoised=False, schedule="vp"),
    "antmaze": dict(max_q_backup=True, eta=2.0, num_diffusion_steps=3),
    "clipped gradients": dict(grad_norm=0.05, entropy_coef=0.5, lr=3e-5),
    "min": dict(pessimism="min", variant="released", loss="posterior", schedule="linear"),
    "debruijn": dict(variant="debruijn", q_time=2, entropy_coef=0.1),
    "one member": dict(num_critics=1, variant="released", entropy_coef=0.0, schedule="constant"),
    "other rates": dict(discount=0.9, target_rate=0.1, ema_rate=0.2, ema_every=3, ema_start=0, critic_lr=1e-2),
}


def check_algorithm1(name, updates, start):
    """Updates from number `start` on are the literal ones: metrics, weights, targets, the optimisers' moments."""
    agent, generator = tiny_agent(**ALGORITHM1[name]), torch.Generator().manual_seed(1)
    agent.updates.fill_(start)
    literal = Algorithm1(agent)
    for k in range(updates):
        batch, noise = random_batch(agent.args.batch_size, seed=100 * k), random_noise(agent.args, generator)
        metrics, expected = erdp.update(agent, batch, noise), literal.update(batch, noise)
        assert metrics.keys() == expected.keys() == set(erdp.METRICS)
        for key, value in metrics.items():
            assert not value.requires_grad, f"{name}: metrics must not keep the graphs of all updates alive"
            agree(f"Algorithm 1, {name}, update {start + k}: {key}", value, expected[key], rtol=1e-8)
        literal.compare(agent, f"Algorithm 1, {name}, after update {start + k}")
    assert agent.updates == start + updates


def test_algorithm1_updates_equal_literal_ones():
    for name, start in itertools.product(ALGORITHM1, (0, 1000)):
        check_algorithm1(name, 1, start)
    for name in ("clipped gradients", "other rates"):
        check_algorithm1(name, 3, 999)


@pytest.mark.slow
def test_algorithm1_twenty_updates_in_a_row_equal_literal_ones():
    for name in ALGORITHM1:
        check_algorithm1(name, 20, 990)


def test_algorithm1_moves_the_ema_policy_at_multiples_of_ema_every_from_ema_start_on():
    agent, generator, moves = tiny_agent(ema_start=7, ema_every=5), torch.Generator().manual_seed(0), []
    for k in range(21):
        before = [p.clone() for p in agent.policy_ema.parameters()]
        erdp.update(agent, random_batch(4), random_noise(agent.args, generator))
        if not all(map(torch.equal, before, agent.policy_ema.parameters())):
            moves.append(k)
    assert moves == [10, 15, 20], "at multiples of 5, as in the released code, and not at 7, 12, 17"


def test_algorithm1_agent_has_the_papers_networks_and_optimisers():
    agent = Agent(11, 3, erdp.preset("pen-human-v1"))
    assert agent.policy.layers[0].weight.shape == (256, 30) and agent.policy.layers[3].weight.shape == (3, 256)
    assert len(members_of(agent.critics)) == 64
    assert agent.critics(torch.zeros(2, 11), torch.zeros(2, 3)).shape == (64, 2)
    assert agent.updates == 0 and agent.sde.dtype == torch.float32
    policies, critics = (agent.policy, agent.policy_ema), (agent.critics, agent.critics_target)
    optimizers = (agent.policy_optimizer, 3e-5), (agent.critic_optimizer, 3e-4)
    for (module, target), (optimizer, lr) in zip((policies, critics), optimizers):
        for p, copied in zip(module.parameters(), target.parameters()):
            assert torch.equal(p, copied), "targets begin as copies"
            assert p.requires_grad and not copied.requires_grad and p.data_ptr() != copied.data_ptr()
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and group["lr"] == lr, "Table 4's rate is the policy's"
        assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, 0, False)
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    others = dict(schedule="vp", num_diffusion_steps=7, hidden=9, critic_lr=0.1, precision="bf16")
    for choices in (dict(), dict(precision="tf32", device="cuda"), others):
        args = Args(num_critics=2, **choices)
        agent = Agent(2, 1, args)
        agree("the agent's SDE", agent.sde.theta_bar, literal_theta(args.schedule, args.num_diffusion_steps)[1])
        assert agent.policy.layers[0].out_features == agent.critics.weights[0].shape[2] == args.hidden
        rates = (optimizer.param_groups[0]["lr"] for optimizer in (agent.policy_optimizer, agent.critic_optimizer))
        assert [*rates] == [3e-4, args.critic_lr]
        assert agent.critics.bf16 == agent.critics_target.bf16 == (args.precision == "bf16")


def test_algorithm1_draws_times_and_gaussians_of_their_laws():
    noise = erdp.noise_buffers(Args(batch_size=60_000), 1, "cpu")
    places = [part.data_ptr() for part in noise]
    erdp.sample_noise(noise, torch.Generator().manual_seed(0))
    assert [part.data_ptr() for part in noise] == places, "the buffers are filled in place"
    assert noise.t.min() == 1, "times begin at 1"
    p, counts = np.full(5, 0.2), noise.t.bincount()[1:]
    assert_counts("times are uniform on 1..T", counts, p, 0.975 * p + 0.025 * np.eye(5), comparisons=12)
    gaussians = [noise.eps, noise.a_T, *noise.next_action[:, 0]]
    for gaussian_part in gaussians:
        assert_law("standard Gaussian noise", gaussian_part, norm, sees=0.03, comparisons=12)
    products = torch.stack([a * b for k, a in enumerate(gaussians) for b in gaussians[:k]], -1)
    assert_mean("the noises are independent", products, 0.0, sees=0.05, comparisons=3)
    for seed, same in ((0, True), (1, False)):
        again = erdp.noise_buffers(Args(batch_size=60_000), 1, "cpu")
        erdp.sample_noise(again, torch.Generator().manual_seed(seed))
        assert [torch.equal(a, b) for a, b in zip(noise, again)] == [same] * 4, "noise is a function of the generator"


@functools.cache
def learned_on_the_toy(eta):
    """A short run on the toy with a fifth of good steps, and its policy's mean return, no action being chosen by Q."""
    small = dict(num_critics=2, hidden=32, num_diffusion_steps=3, batch_size=128, eval_candidates=1)
    fast = dict(lr=2e-3, critic_lr=1e-2, target_rate=0.05)
    args = dataclasses.replace(erdp.preset("toy", device="cpu"), dataset="toy-20", **small, **fast)
    args.eta = eta  # below 0, which the command line refuses, the policy loss has Q with the other sign
    task, data = erdp.load_data(args)
    run = erdp.Run(args, task, data, Path())
    for _ in range(800):
        run.rows.random_(0, len(data.reward), generator=run.generator)
        erdp.sample_noise(run.noise, run.generator)
        run.learn()
    generator, state, mean_return = np.random.default_rng(0), np.zeros((2000, 2)), 0.0
    for _ in range(2):
        state = state + np.insert(run.actor(state, generator), 1, 1, axis=1)
        mean_return += erdp.ToyEnv.reward(state[:, 0]).mean()
    return run, mean_return


@pytest.mark.slow
def test_algorithm1_critics_on_the_toy_are_its_q_by_dynamic_programming():
    """Up to update 1,000 the next actions come from a policy that stays as it is: Q converges to its evaluation."""
    run, _ = learned_on_the_toy(3.0)
    agent, (state, action, *_) = run.agent, run.data
    first, reached = state[:, 1] == 0, state[:, :1] + action
    expected = erdp.ToyEnv.reward(reached[:, 0].numpy())
    next_state = torch.cat([reached, torch.ones_like(reached)], 1)[first].expand(500, -1, -1)
    noise = gaussian(3, *next_state.shape[:2], 1).float()
    with torch.no_grad():
        next_action = erdp.sample_actions(agent.policy_ema, agent.sde, next_state, noise)
        q = agent.critics(state, action).mean(0).numpy()
    last = (next_state[..., :1] + next_action).squeeze(-1).numpy()
    expected[first] += 0.99 * erdp.ToyEnv.reward(last).mean(0)
    for step, rows in dict(first=first.numpy(), second=~first.numpy()).items():
        error = np.sqrt(np.mean((q - expected)[rows] ** 2))
        assert error < expected[rows].std() / 3, f"Q of the {step} step is wrong by {error}, of {expected[rows].std()}"


@pytest.mark.slow
def test_algorithm1_on_the_toy_ends_above_the_data_and_above_cloning():
    (run, ours), (_, cloning) = learned_on_the_toy(3.0), learned_on_the_toy(0.0)
    assert ours > max(run.task.data_return, cloning) + 1, f"{ours}; the data {run.task.data_return}, cloning {cloning}"


@pytest.mark.slow
def test_algorithm1_on_the_toy_stays_below_the_data_where_q_has_the_other_sign():
    run, theirs = learned_on_the_toy(-3.0)
    assert theirs < run.task.data_return, f"{theirs}; the data {run.task.data_return}"


# ==== Appendix: Eq. 28, 30, 40 and A.3 ================================================================================
@given(cases())
def test_eq28_score_is_the_gradient_of_scipys_log_density(case):
    x_t, std = case.x.numpy(), np.sqrt(-np.expm1(-2 * case.bar))
    law = norm(np.exp(-case.bar) * case.y.numpy(), std)
    gradient = (law.logpdf(x_t + std) - law.logpdf(x_t - std)) / (2 * std)  # exact: the log density is a parabola
    scale = 1 + np.abs(law.logpdf(x_t)).max() / std.min()
    agree("Eq. 28", case.sde.score(case.x, case.y, case.t), gradient, atol=1e-12 * scale)


@given(cases())
def test_eq30_score_of_a_diffused_state_is_minus_its_noise_over_its_deviation(case):
    x_0, eps = case.x, case.y
    score = case.sde.score(case.sde.diffuse(x_0, case.t, eps), x_0, case.t)
    agree("Eq. 30 of Eq. 4", score, -eps.numpy() / np.sqrt(1 - np.exp(-2 * case.bar)))


@given(cases(first=2))
def test_eq38_posterior_mean_is_the_optimal_reverse_path(case):
    """Eq. 38's cost is a parabola in x_{t-1}: its least value lies halfway between two points of equal cost."""

    def cost(x):
        likelihood, prior, _ = log_densities_of_eq34(case, x, case.x.numpy(), case.y.numpy())
        return -likelihood - prior

    mean, var = (moment.numpy() for moment in case.sde.posterior(case.x, case.y, case.t))
    before, at, after = (cost(mean + step * np.sqrt(var)) for step in (-1, 0, 1))
    agree("A.3: as far before the mean as after it", after - before, 0 * mean, atol=1e-9 * (1 + np.abs(at).max()))
    assert (after > at).all(), "A.3: a minimum of Eq. 37"


@given(cases())
def test_eq40_posterior_loss_has_the_true_noise_as_its_minimiser(case):
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    found, least = (erdp.LOSSES["posterior"](case.sde, case.x, x_t, case.t, case.y, eps) for eps in (case.z, case.y))
    agree("at the true noise", least, 0.0, atol=1e-18)
    weight = 2 * np.sinh(case.prime) / np.sqrt(1 - np.exp(-2 * case.bar))  # Eq. 8's factor in the posterior mean
    expected = np.mean((weight * (case.z - case.y).numpy()) ** 2)
    agree("elsewhere, the weighted error of the noise", found, expected)


# ==== Tables 1, 2 and 4, and Section 4.1's settings ===================================================================
# Copied from arXiv:2402.04080: Section 4.1 and the lines of Table 4 that all domains share; then its other lines.
SHARED = dict(variant="paper", num_critics=64, lcb_coef=4.0, entropy_coef=0.01, num_diffusion_steps=5, hidden=256)
SHARED |= dict(batch_size=256, discount=0.99, critic_lr=3e-4, eval_every=50_000, eval_candidates=50, schedule="cosine")
SHARED |= dict(target_rate=0.005, ema_rate=0.005, ema_every=5, ema_start=1000, pessimism="lcb")
COLUMNS_OF_TABLE_4 = "lr eta max_q_backup grad_norm loss clip_denoised num_steps eval_episodes".split()
TABLE_4 = dict(
    gym=(3e-4, 1.0, False, 4.0, "likelihood", False, 2_000_000, 10),
    antmaze=(3e-4, 2.0, True, 4.0, "noise", True, 1_000_000, 100),  # max Q-backup is off in antmaze-umaze-v0
    adroit=(3e-5, 0.1, False, 8.0, "noise", True, 1_000_000, 100),
    kitchen=(3e-4, 0.005, False, 10.0, "likelihood", False, 1_000_000, 100),
)
# The rows of Table 1 (Gym) and of Table 2 (AntMaze, Adroit, Kitchen).
ROWS_OF_TABLES_1_AND_2 = """
halfcheetah-medium-v2 hopper-medium-v2 walker2d-medium-v2 halfcheetah-medium-replay-v2 hopper-medium-replay-v2
walker2d-medium-replay-v2 halfcheetah-medium-expert-v2 hopper-medium-expert-v2 walker2d-medium-expert-v2
antmaze-umaze-v0 antmaze-umaze-diverse-v0 antmaze-medium-play-v0 antmaze-medium-diverse-v0 antmaze-large-play-v0
antmaze-large-diverse-v0 pen-human-v1 pen-cloned-v1 kitchen-complete-v0 kitchen-partial-v0 kitchen-mixed-v0
""".split()
D4RL = dict(  # domain, environment, time limit, and the returns of score 0 and 100, as d4rl/infos.py has them
    halfcheetah=("gym", "HalfCheetah-v4", 1000, -280.178953, 12135.0),
    hopper=("gym", "Hopper-v4", 1000, -20.272305, 3234.3),
    walker2d=("gym", "Walker2d-v4", 1000, 1.629008, 4592.3),
    antmaze=("antmaze", None, 1000, 0, 1),
    pen=("adroit", None, 100, 96.262799, 3076.8331017826877),
    kitchen=("kitchen", None, 280, 0, 4),
)
PROGRAM = dict(env="toy", seed=0, device="cpu", compile=False, precision="float32", resume=False)
PROGRAM |= dict.fromkeys(("dataset", "eval_env", "run_dir", "eval_only", "q_time"))
OWN_ROWS = {"toy", "own"}  # rows that are not the paper's


def test_tables_1_and_2_have_these_rows_by_d4rls_rules():
    for env in ROWS_OF_TABLES_1_AND_2:
        robot, level = env[:-3].split("-", 1)
        domain, env_id, steps, *returns = D4RL[robot]
        steps = 700 if level.startswith("umaze") else steps
        version = 1 if robot == "antmaze" else 2
        dataset = f"D4RL/{robot}/{level}-v{version}" if env_id is None else f"{env[:-3].replace('-', '_')}-v2.hdf5"
        assert erdp.ROWS[env] == (domain, dataset, env_id, steps, *returns), env
    others = erdp.ROWS.keys() - ROWS_OF_TABLES_1_AND_2
    assert others == OWN_ROWS, f"add the names of rows of your own to OWN_ROWS: {others - OWN_ROWS}"
    for env in others:
        row = erdp.ROWS[env]
        assert row.domain in erdp.DOMAINS and (row.max_steps or 1) > 0, env
        assert row.ref_min != row.ref_max, f"{env}: two returns, of score 0 and 100"


def test_table_4_is_the_preset_of_every_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for env in ROWS_OF_TABLES_1_AND_2:
        expected = SHARED | dict(zip(COLUMNS_OF_TABLE_4, TABLE_4[D4RL[env.partition("-")[0]][0]]))
        if env == "antmaze-umaze-v0":
            expected["max_q_backup"] = False
        assert vars(erdp.preset(env)) == expected | PROGRAM | dict(env=env), env


def test_table_4_defaults_in_signatures_are_the_papers():
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    assert defaults(MeanRevertingSDE) == dict(num_steps=5, schedule="cosine", dtype=torch.float32, device="cpu")
    assert defaults(NoiseNetwork) == dict(hidden=256)
    assert defaults(QEnsemble) == dict(num_critics=64, hidden=256, bf16=False)
    assert defaults(QEnsemble.forward) == dict(frozen=False)
    assert defaults(erdp.sample_actions) == dict(clip_denoised=True, clip_sample=True)
    assert defaults(erdp.lcb) == dict(beta=4.0, unbiased=False)
    columns = zip(COLUMNS_OF_TABLE_4, (3e-4, 1.0, False, 4.0, "noise", True, 1_000_000, 100))
    assert vars(Args()) == SHARED | dict(columns) | PROGRAM


def test_table_4_holds_in_every_variant_but_for_debruijns_alpha():
    for env in ("toy", "antmaze-umaze-v0", "hopper-medium-v2"):
        for variant, alpha in (("paper", 0.01), ("released", 0.01), ("debruijn", 0.03)):
            argv = ["--env", env, "--variant", variant, "--loss", "posterior"]
            changes = dict(variant=variant, loss="posterior", entropy_coef=alpha)
            assert erdp.parse(argv) == dataclasses.replace(erdp.preset(env), **changes), f"{env}, {variant}"
    assert erdp.parse([*argv, "--entropy-coef", "0.2"]).entropy_coef == 0.2


def test_presets_of_the_toy_and_of_ones_own_data_and_with_a_gpu(monkeypatch):
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        args = erdp.preset("hopper-medium-v2")
        assert (args.device, args.compile, args.precision) == (device, available, "tf32" if available else "float32")
    toy = erdp.preset("toy")
    assert (toy.max_q_backup, toy.loss, toy.clip_denoised, toy.variant) == (False, "noise", True, "paper")
    assert (toy.num_diffusion_steps, toy.entropy_coef, toy.lcb_coef, toy.pessimism) == (5, 0.01, 4.0, "lcb")
    assert erdp.preset("own") == Args(env="own", device="cuda", compile=True, precision="tf32")
    for device, precision in (("cpu", "float32"), ("cuda:1", "tf32"), ("cuda", "tf32")):
        args = erdp.parse(["--device", device])
        assert (args.device, args.compile, args.precision) == (device, device != "cpu", precision), "what is its own"
    assert erdp.parse([]) == args, "a GPU that is there is used"


def test_use_device_makes_a_gpu_the_current_one_and_gives_small_networks_one_thread(monkeypatch):
    for choices, gpu, threads, products in (
        (dict(device="cuda"), [0], [], ["highest"]),
        (dict(device="cuda:1", precision="tf32"), [1], [], ["high"]),
        (dict(device="cuda", precision="bf16"), [0], [], ["high"]),  # of what is not in bfloat16
        (dict(hidden=64), [], [1], None),  # None: by the kind of CPU
        (dict(hidden=65), [], [], None),
    ):
        done = [], [], []
        monkeypatch.setattr(torch._C, "_cuda_setDevice", done[0].append, raising=False)  # what PyTorch itself calls
        monkeypatch.setattr(torch, "set_num_threads", done[1].append)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", done[2].append)
        erdp.use_device(Args(**choices))
        assert done == (gpu, threads, products or done[2]), choices


# The page of claims: of the tests above, those whose names begin with what the paper or its extension here says.
CLAIMS = "eq|figure2|debruijn|noise_network|ensemble|acting|algorithm1|table"
for name, claim in [*globals().items()]:
    if re.match(f"test_({CLAIMS})", name):
        pytest.mark.paper(claim)


# ==== Data ============================================================================================================
class Made(gym.Env):
    """An environment of which only the spaces matter. Its arguments are plain, as a specification keeps them."""

    def __init__(self, states=2, part=None, low=(-1,), high=(1,), dtype="float32"):
        states = Box(-9, 9, (states,))
        self.observation_space = Dict({part: states}) if part else states
        self.action_space = Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype))


def made(name, steps=3, **kwargs) -> EnvSpec:
    """An environment of this file as Minari writes it down."""
    return EnvSpec("Made-v0", f"{__name__}:{name}", max_episode_steps=steps, kwargs=kwargs)


def episode(number, rewards, ended=False, **changes) -> erdp.Episode:
    """An episode whose state i is (number, i) and whose actions are 0. It ends in a terminal state or by a timeout."""
    n = len(rewards)
    states = np.stack([np.full(n + 1, float(number)), np.arange(n + 1.0)], 1)
    at_end = np.arange(1, n + 1) == n
    columns = states, np.zeros((n, 1), np.float32), np.array(rewards, float), at_end & ended, at_end & (not ended)
    return erdp.Episode(*columns)._replace(**changes)


def load(episodes, row="hopper-medium-v2", steps=1000, **spaces) -> tuple[erdp.Task, Batch]:
    """Task and batch of a row whose data are these episodes, and whose environment has these spaces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp, "read_data", lambda _: episodes)
        patch.setattr(erdp, "make_env", lambda *_: gym.make(made("Made", steps, **spaces)))
        return erdp.load_data(Args(env=row))


def transitions(batch: Batch) -> list:
    """(episode, index, next episode, next index, terminal) of states that are (episode, index)."""
    return torch.cat([batch.state, batch.next_state, batch.terminal[:, None]], 1).int().tolist()


def test_data_pair_states_within_an_episode_and_keep_timeouts_apart_from_terminals():
    task, data = load([episode(0, [1, 2, 3], ended=True), episode(1, [4, 5]), episode(2, [6])])
    expected = [[0, 0, 0, 1, 0], [0, 1, 0, 2, 0], [0, 2, 0, 3, 1], [1, 0, 1, 1, 0], [1, 1, 1, 2, 0], [2, 0, 2, 1, 0]]
    assert transitions(data) == expected, "every step once, with its own episode's next state; a timeout is no terminal"
    assert data.reward.tolist() == [1, 2, 3, 4, 5, 6], "Gym's rewards are unchanged"
    assert {x.dtype for x in data} == {torch.float32} and data.reward.shape == data.terminal.shape == (6,)
    assert (task.transitions, task.data_episodes, task.layout, task.low, task.high) == (6, 3, [2], [-1], [1])


def test_data_antmaze_episodes_end_terminal_at_the_goal_and_nothing_later_is_used():
    # reached in mid-episode, left and reached again; at the first step; never; at the last; at the only; never
    rewards = [0, 0, 1, 1, 0, 1], [1, 1], [0, 0], [0, 1], [1], [0]
    episodes = [episode(number, of_steps) for number, of_steps in enumerate(rewards)]
    _, data = load(episodes, "antmaze-umaze-v0")
    expected = [[0, 0, 0, 1, 0], [0, 1, 0, 2, 0], [0, 2, 0, 3, 1], [1, 0, 1, 1, 1], [2, 0, 2, 1, 0], [2, 1, 2, 2, 0]]
    expected += [[3, 0, 3, 1, 0], [3, 1, 3, 2, 1], [4, 0, 4, 1, 1], [5, 0, 5, 1, 0]]
    assert transitions(data) == expected, "AntMaze: the first step at the goal is the episode's last, and terminal"
    assert data.reward.tolist() == [-2, -2, 2, 2, -2, -2, -2, 2, 2, -2], "AntMaze: 4 (r - 0.5)"
    returns = [load([alone], "antmaze-umaze-v0")[0].data_return for alone in episodes]
    assert returns == [1, 1, 0, 1, 1, 0], "played, each would have ended at the goal"
    _, elsewhere = load(episodes[:1])
    assert len(elsewhere.reward) == 6 and not elsewhere.terminal.any(), "other domains go on after a reward"


def test_data_rewards_are_scaled_by_domain():
    rewards, std = [0.0, 1.0, 1.0, 6.0], statistics.pstdev([0, 1, 1, 6])
    scaled = dict.fromkeys(["hopper-medium-v2", "own", "kitchen-mixed-v0"], rewards)
    scaled["pen-human-v1"] = [(reward - 2) / std for reward in rewards]
    for row, expected in scaled.items():
        part = "observation" if row.startswith("kitchen") else None
        states = [{part: np.ones((n, 45))} if part else np.ones((n, 45)) for n in (4, 2)]
        halves = [episode(k, rewards[3 * k :][:3], observations=states[k]) for k in (0, 1)]
        _, data = load(halves, row, states=45, part=part)
        agree(f"rewards of {row}", data.reward, np.array(expected, np.float32), rtol=1e-6, atol=1e-7)
    _, same = load([episode(0, [3, 3], observations=np.ones((3, 45)))], "pen-human-v1", states=45)
    assert same.reward.tolist() == [0, 0], "standardised rewards that do not differ are 0, not NaN"
    refused = {"antmaze-umaze-v0": "rewards of 0 and 1.*sparse", "kitchen-mixed-v0": "without the part 'observation'"}
    for row, words in refused.items():
        with pytest.raises(ValueError, match=words):
            load([episode(0, [0.1, 0.9])], row)


def columns_of(space, samples):
    """Samples of a space as Minari keeps them: an array, or a dict of such."""
    if isinstance(space, Dict):
        return {key: columns_of(part, [sample[key] for sample in samples]) for key, part in space.items()}
    return np.array(samples)


BOXES = st.lists(st.integers(1, 3), max_size=2).map(lambda shape: Box(-9, 9, tuple(shape), np.float64))
DICTS = st.dictionaries(st.sampled_from("abcd"), BOXES, min_size=1, max_size=3)
NESTED = st.dictionaries(st.sampled_from("wxyz"), BOXES | DICTS.map(Dict), min_size=1, max_size=3).map(Dict)


@given(BOXES | NESTED, st.integers(1, 4))
def test_data_nested_observations_are_flattened_in_gymnasiums_order(space, n):
    samples = [space.sample() for _ in range(n)]
    expected = np.stack([gym.spaces.flatten(space, sample) for sample in samples]).astype(np.float32)
    parts = erdp.layout(space)
    assert erdp.size(parts) == expected.shape[1] and json.loads(json.dumps(parts)) == parts, "a file can keep it"
    agree("flattened observations", erdp.flatten(parts, columns_of(space, samples)), expected, atol=0, rtol=0)
    agree("one alone", erdp.flatten(parts, samples[0]), expected[0], atol=0, rtol=0)
    if isinstance(space, Dict):  # as of Kitchen's observations
        (key, part), *_ = space.items()
        some = np.stack([gym.spaces.flatten(part, sample[key]) for sample in samples]).astype(np.float32)
        agree("a part", erdp.flatten({key: erdp.layout(part)}, columns_of(space, samples)), some, atol=0, rtol=0)


def fixed_actor(sample, low, high, critics=None, dtype="float32", **choices) -> erdp.Actor:
    """An actor whose sampler gives the rows of `sample` (C, A) in every state, where that is `sample_actions`."""
    sample = torch.as_tensor(np.asarray(sample, np.float32))
    args = Args(eval_candidates=len(sample), **choices)
    agent = SimpleNamespace(policy=sample, critics_target=critics, sde=MeanRevertingSDE(), args=args)
    agent.compiled = lambda function: function
    return erdp.Actor(agent, [2], low, high, dtype)


BOUNDS = st.tuples(st.floats(-5, 5), st.floats(0.5, 80)).map(lambda b: (b[0], b[0] + b[1]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@example([(3.4, 7.8)], np.ones((4, 1)))  # 3.4 + (7.8 - 3.4) > 7.8
@given(st.lists(BOUNDS, min_size=1, max_size=3), arrays(np.float64, (4, 1), elements=st.floats(0, 1)))
def test_data_actions_are_scaled_by_the_bounds_of_each_and_back_in_their_dtype(dtype, bounds, where):
    low, high = np.array(bounds, dtype).T
    action = (low + where * (high - low)).clip(low, high)
    task, data = load([episode(0, [0] * 4, actions=action)], low=low.tolist(), high=high.tolist(), dtype=dtype)
    agree("low is -1, high is 1", data.action, np.broadcast_to(2 * where - 1, action.shape), rtol=0, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp, "sample_actions", lambda *_: data.action[:, None])
        back = fixed_actor(data.action[:1], task.low, task.high, dtype=task.dtype)(np.zeros((4, 2)))
    agree("and back", back, action, rtol=1e-5, atol=1e-5 * np.abs(bounds).max())
    space = Box(low, high, dtype=np.dtype(dtype))
    assert back.dtype == dtype and all(space.contains(each) for each in back), "what is played is in the action space"


@pytest.mark.parametrize("action, scaled", [(1, 1), (1.0009, 1), (-1.0009, -1), (1.0011, None), (-1.5, None)])
def test_data_actions_outside_their_bounds_by_more_than_a_thousandth_are_refused_and_less_is_clipped(action, scaled):
    episodes = [episode(0, [0, 0, 0], actions=np.array([[0.5], [action], [action]]))]
    if scaled is None:
        outside = f"2 of its 3 actions are outside the bounds of Made-v0, by up to {abs(action) - 1:.4g}: clip them"
        with pytest.raises(ValueError, match=outside):
            load(episodes)
    else:
        assert load(episodes)[1].action.tolist() == [[0.5], [scaled], [scaled]]


def d4rl_file(path: Path, n: int = 6, **changes) -> Path:
    """A file in D4RL's layout for Hopper: state i is i, reward i is i, no ends. A change to None drops a key."""
    column = np.arange(float(n))
    rows = dict(observations=np.tile(column[:, None], 11), actions=np.zeros((n, 3)), rewards=column)
    rows |= dict(terminals=np.zeros(n, bool), timeouts=np.zeros(n, bool), next_observations=np.full((n, 11), 77.0))
    with h5py.File(path, "w") as file:
        for key, values in (rows | changes).items():
            if isinstance(values, dict):
                file.create_group(key)
            elif values is not None:
                file[key] = values
    return path


def load_hopper(path: Path, steps=1000) -> tuple[erdp.Task, Batch]:
    return load(erdp.hdf5_episodes(path), steps=steps, states=11, low=[-1] * 3, high=[1] * 3)


@given(st.lists(st.sampled_from(["", "terminal", "timeout", "both"]), min_size=2, max_size=9))
def test_data_hdf5_pairs_rows_as_d4rl_does(tmp_path_factory, ends):
    """Row i with row i + 1, but for timeouts and the last row; terminal rows stay and say so."""
    terminals, timeouts = ([end in names for end in ends] for names in (("terminal", "both"), ("timeout", "both")))
    path = d4rl_file(tmp_path_factory.mktemp("d4rl") / "a.hdf5", len(ends), terminals=terminals, timeouts=timeouts)
    expected = [(i, i + 1, i, terminals[i]) for i in range(len(ends) - 1) if not timeouts[i]]
    if not expected:
        with pytest.raises(ValueError, match="no transition"):
            load_hopper(path)
        return
    _, data = load_hopper(path)
    assert data.state.shape == data.next_state.shape == (len(expected), 11)
    found = torch.stack([data.state[:, 10], data.next_state[:, 0], data.reward, data.terminal], 1)
    assert list(map(tuple, found.tolist())) == expected


def test_data_know_what_their_own_episodes_would_have_returned_if_played(tmp_path, capsys):
    """Up to the time limit, which is their own where the environment has none, and by the rule of the row. An episode
    that a D4RL file breaks off within does not count."""
    episodes = [episode(0, [1, 2, 4], ended=True), episode(1, [8, 16, 32, 64]), episode(2, [128])]
    for steps, expected in ((1000, [7, 120, 128]), (3, [7, 56, 128]), (2, [3, 24, 128]), (None, [7, 120, 128])):
        task, data = load(episodes, steps=steps)
        assert data.reward.sum() == 255 and (task.data_return, task.data_episodes) == (sum(expected) / 3, 3)
        assert EnvSpec.from_json(task.spec).max_episode_steps == (steps or 4)
    assert "Made-v0 has no time limit: its episodes are cut after 4 steps" in capsys.readouterr().out
    ends = dict(terminals=np.arange(7) == 1, timeouts=np.arange(7) == 4)
    for steps, expected in ((1000, [0 + 1, 2 + 3 + 4]), (2, [0 + 1, 2 + 3])):
        task, _ = load_hopper(d4rl_file(tmp_path / "a.hdf5", 7, **ends), steps)
        assert (task.data_return, task.data_episodes) == (sum(expected) / 2, 2)
    task, _ = load_hopper(d4rl_file(tmp_path / "a.hdf5"))
    assert task.data_return == 15, "a file within one episode"
    height = np.array([0.2, 0.2, 0.07, 0.2, 0.07])[:, None] * (np.arange(45) == 26)
    task, pen = load([episode(0, [1, 2, 4, 8], observations=height)], "pen-human-v1", states=45)
    assert len(pen.reward) == 4 and task.data_return == 3, "D4RL's Pen ends where the pen is dropped"


MAZE = [[1, 1, 1, 1], [1, "r", 0, 1], [1, "g", 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_data_evaluation_maze_is_mirrored_where_the_data_was_collected_in_its_mirror_image(capsys):
    def maze_for(walls):
        return erdp.same_walls(*(SimpleNamespace(id="Maze-v4", kwargs=dict(maze_map=maze)) for maze in (MAZE, walls)))

    plain = [[c if c == 1 else 0 for c in line] for line in MAZE]
    assert maze_for(plain) == MAZE, "the same walls: start and goal may differ"
    assert capsys.readouterr().out == ""
    assert maze_for([line[::-1] for line in plain]) == [line[::-1] for line in MAZE]
    assert "the walls of Maze-v4 are mirrored here" in capsys.readouterr().out
    assert maze_for(plain[::-1]) == MAZE[::-1]
    one_wall_less = [*plain[:-2], [1, 1, 0, 1], plain[-1]]
    for other in (one_wall_less, [list(line) for line in zip(*plain)], [line[::-1] for line in plain[::-1]]):
        with pytest.raises(ValueError, match="recorded in another maze"):
            maze_for(other)
    with pytest.raises(UserError, match="must be recorded in a maze"):
        erdp.same_walls(SimpleNamespace(id="Maze-v4", kwargs=dict(maze_map=MAZE)), None)


def toy_reward(x):
    """Of Figure 1: a low hill on the left and one three times as high on the right."""
    return 0.4 * math.sqrt(2 * math.pi) * (norm.pdf(x, -0.9, 0.4) + 3 * norm.pdf(x, 0.9, 0.4))


@functools.cache
def toy_best() -> float:
    """The largest return of two steps in [-1, 1] from 0."""
    return max(toy_reward(a) + toy_reward(np.linspace(a - 1, a + 1, 2001)).max() for a in np.linspace(-1, 1, 401))


def toy_data(seed) -> Batch:
    return erdp.load_data(Args(env="toy", seed=seed))[1]


def test_toy_data_is_unbalanced_and_follows_the_environment():
    data, env = toy_data(3), erdp.ToyEnv()
    assert all(map(torch.equal, data, toy_data(3))) and not torch.equal(data.action, toy_data(4).action)
    assert len(data.reward) == 512 and data.action.abs().max() <= 1
    data = Batch(*(column.numpy() for column in data))
    for first in range(0, 40, 2):
        state, _ = env.reset()
        for row in (first, first + 1):
            agree("state", data.state[row], state, rtol=1e-5, atol=1e-6)
            state, reward, terminal, truncated, _ = env.step(data.action[row])
            agree("next state", data.next_state[row], state, rtol=1e-5, atol=1e-6)
            assert reward == pytest.approx(data.reward[row], rel=1e-5) == toy_reward(state[0])
            assert terminal == data.terminal[row] and not truncated
    end = data.next_state[1::2, 0]
    assert (end < 0).mean() > 0.6 and 0 < (end > 0.8).mean() < 0.2, "most of the data is away from the high reward"
    actions = [np.stack([each.actions for each in erdp.toy_episodes(0, share, 2000)]) for share in (0.05, 0.2, 0.5)]
    right = [(action > 0.1).mean() for action in actions]
    agree("a drift of 0.5 in a share of the steps, of -0.3 in the rest", right, [0.19, 0.29, 0.5], rtol=0, atol=0.03)
    assert erdp.ROWS["toy"].ref_max == pytest.approx(toy_best(), rel=1e-4)
    for name, share in (("toy-5", 0.05), ("toy-20", 0.2)):
        expected = np.concatenate([each.actions for each in erdp.toy_episodes(3, share)])
        found = erdp.load_data(Args(env="toy", dataset=name, seed=3))[1].action
        agree(f"the actions of {name}", found, expected.astype(np.float32), rtol=0, atol=1e-6)


# ==== Acting and evaluation ===========================================================================================
class Ledger(gym.Env):
    """Episodes of 1 to 7 steps that are recorded in `played`. Odd ones end terminal, even ones by a timeout; step 2 is
    a success. Observations are nested, the actions' bounds differ.

    The episode of seed `unstable` returns NaN. Where the file `doom` is, a step kills the process that makes it.
    """

    observation_space = Dict(goal=Box(-9, 9, (1,)), me=Dict(clock=Box(-9, 9, (1,)), place=Box(-9, 9, (2,))))
    played: list = []

    def __init__(self, low=(-1, 0), high=(3, 0.5), dtype="float32", style="success", unstable=None, doom=""):
        self.action_space = Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype))
        self.style, self.unstable, self.doom = style, unstable, doom

    def observe(self):
        place = self.np_random.normal(size=2).clip(-9, 9).astype(np.float32)
        clock = np.array([len(self.record["rewards"])], np.float32)
        return {"goal": np.array([self.length], np.float32), "me": {"clock": clock, "place": place}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.record = int(self.np_random.integers(1, 8)), dict(seed=seed, rewards=[], ended=False)
        self.played.append(self.record)
        return self.observe(), {}

    def step(self, action):
        if self.doom and Path(self.doom).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        assert not self.record["ended"], "an episode that has ended is left alone"
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action)
        rewards = self.record["rewards"]
        rewards.append(len(rewards) + float(action.ravel()[0]) - float(action.ravel()[-1]))
        self.record["ended"] = ended = len(rewards) == self.length
        odd = self.length % 2 == 1
        reward = math.nan if self.unstable == self.record["seed"] else rewards[-1]
        success = {"success": float(len(rewards) == 2)}
        reported = {  # reward and info, as environments differ in them
            "success": (reward, success),
            "is_success": (reward, {"is_success": bool(success["success"])}),
            "success None": (reward, {"success": None}),
            "None, and is_success": (reward, {"success": None, "is_success": success["success"]}),
            "arrays": (np.array([reward]), {"success": np.array([success["success"]])}),
        }[self.style]
        return self.observe(), reported[0], ended and odd, ended and not odd, reported[1]


def task_of(spec: EnvSpec, domain="toy") -> erdp.Task:
    """A task whose scores 0 and 100 are the returns 2 and 12. The toy's domain plays in this process, others do not."""
    about = erdp.describe_env(gym.make(spec), None)
    return erdp.Task(domain, "made/data-v0", 8, 0, 2, 1.5, spec.to_json(), **about, ref_min=2, ref_max=12)


class Gambler:
    """Acts by its streams and the clock alone."""

    low, high = np.array([[-1, 0], [3, 0.5]], np.float32)

    def __call__(self, state, streams):
        assert len(state) == len(streams) and state.shape[1] == 4, "flat observations, a stream each"
        return np.stack([[s.random() * 2 - 1, 0.1 * clock / 9] for s, clock in zip(streams, state[:, 1])])


def score(actor, episodes=9, num_envs=None, seed=5, domain="toy", **kwargs) -> dict:
    Ledger.played.clear()
    task = task_of(made("Ledger", 1000, **kwargs), domain)
    with contextlib.closing(erdp.make_envs(task, episodes, num_envs)) as envs:
        return erdp.evaluate(actor, envs, episodes, seed)


@pytest.mark.parametrize("num_envs", [1, 2, 4, 9])
def test_evaluation_plays_every_episode_once_and_to_its_end(num_envs):
    """In waves of as many episodes as there are environments; what those beyond the last episode do does not count."""
    result = score(Gambler(), num_envs=num_envs)
    assert len(Ledger.played) == math.ceil(9 / num_envs) * num_envs
    played = Ledger.played[:9]
    assert all(record["ended"] for record in played)
    assert len({record["seed"] for record in played}) == 9, "every episode has a seed of its own"
    lengths = np.array([len(record["rewards"]) for record in played])
    assert min(lengths) == 1 and max(lengths) >= 6, "short and long episodes"
    assert result["length"].tolist() == lengths.tolist() and result["success"].tolist() == (lengths >= 2).tolist()
    agree("returns", result["return"], [sum(record["rewards"]) for record in played])


def test_evaluation_does_not_depend_on_how_many_environments_step_together():
    one = score(Gambler(), num_envs=1)
    for num_envs, domain in ((2, "toy"), (3, "toy"), (9, "toy"), (2, "gym")):  # "gym": in worker processes
        for key, values in score(Gambler(), num_envs=num_envs, domain=domain).items():
            agree(f"{key} of the episodes, {num_envs} environments", values, one[key], rtol=0, atol=0)
    assert len(set(one["return"])) == 9, "no two episodes share a random stream"
    longer = score(Gambler(), episodes=12)
    agree("an episode is the same in a longer evaluation", longer["return"][:9], one["return"], rtol=0, atol=0)
    assert not set(score(Gambler(), seed=6)["return"]) & set(one["return"]), "another seed plays other episodes"
    torch.manual_seed(0)
    agent = Agent(4, 2, Args(eval_candidates=4, num_critics=2, hidden=16))
    actor = erdp.Actor(agent, erdp.layout(Ledger.observation_space), Gambler.low, Gambler.high)
    one = score(actor, num_envs=1)
    for num_envs in (2, 9):
        for key, values in score(actor, num_envs=num_envs).items():
            agree(f"{key}, of a diffusion policy", values, one[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("style", ["is_success", "success None", "None, and is_success", "arrays"])
def test_evaluation_takes_rewards_and_success_in_the_forms_that_environments_give_them(style):
    plain, found = score(Gambler()), score(Gambler(), style=style)
    agree("returns", found["return"], plain["return"], rtol=0, atol=0)
    success = np.full(9, np.nan) if style == "success None" else plain["success"]
    agree("success, which None is not", found["success"], success, rtol=0, atol=0)


def test_evaluation_with_a_return_of_nan_names_the_episodes_seed():
    plain = score(Gambler(), num_envs=2)
    seeds = [record["seed"] for record in Ledger.played]
    for number in (0, 3, 8):
        with pytest.raises(FloatingPointError, match=f"the episode of seed {seeds[number]} has a return of NaN"):
            score(Gambler(), num_envs=2, unstable=seeds[number])
    found = score(Gambler(), num_envs=2, unstable=seeds[9])
    agree("what comes after the last episode does not count", found["return"], plain["return"], rtol=0, atol=0)


def test_runs_of_the_toy_need_none_of_the_packages_of_other_environments(tmp_path, monkeypatch):
    def version(name):
        if name in ("mujoco", "minari", "gymnasium-robotics"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert erdp.main([*SHORT.split(), "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["versions"].keys() >= {"numpy", "torch", "python"}


def test_evaluation_knows_a_broken_pipe_that_is_not_a_workers():
    with pytest.raises(BrokenPipeError), erdp.playing(task_of(made("Ledger")), 1):
        raise BrokenPipeError


def test_evaluation_uses_two_workers_a_thread_whatever_the_machine_has_and_one_an_episode_at_most(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # as OMP_NUM_THREADS=3 on a part of a large machine
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for episodes, num_envs, expected in ((3, 8, 3), (8, 3, 3), (1, None, 1), (10_000, None, 6)):
        with contextlib.closing(erdp.make_envs(task_of(made("Ledger")), episodes, num_envs)) as envs:
            assert envs.num_envs == expected


def test_evaluation_reports_mean_deviation_score_success_and_length():
    result, task = dict(length=np.array([1.0, 2, 6]), success=np.array([0.0, 1, 1])), task_of(made("Ledger"))
    result["return"] = np.array([2.0, 7, 12])  # scores 0, 50 and 100
    row = erdp.summary(task, result)
    deviation = math.sqrt(50 / 3)
    expected = dict(return_mean=7, return_std=deviation, score_mean=50, score_std=10 * deviation)
    assert row == pytest.approx(expected | dict(success=2 / 3, length=3))
    assert erdp.in_words(row) == "score 50.0 ± 40.8, return 7.00 ± 4.08, length 3, success 67%"
    without = erdp.summary(task, result | dict(success=np.full(3, np.nan)))
    assert without["success"] is None and "success" not in erdp.in_words(without)


# Values of five candidates by three members, in each of two states, and the value that is drawn by.
Q = np.array([[[1.0, 0.2, 0.5, 2.0, -1.0], [0.4, 0.3, 0.5, 0.2, 0.0], [0.1, 0.1, 0.2, -0.4, 1.0]], -np.eye(3, 5)])
CHOOSE = {
    "lcb": (dict(lcb_coef=0.7), Q.mean(1) - 0.7 * Q.std(1)),
    "released": (dict(lcb_coef=0.7, variant="released"), Q.mean(1) - 0.7 * Q.std(1, ddof=1)),
    "min": (dict(pessimism="min"), Q.min(1)),
}


@pytest.mark.parametrize("name", CHOOSE)
def test_actor_draws_a_candidate_by_softmax_over_its_pessimistic_value(name, monkeypatch):
    """Sees a temperature of 0.7, the value of the other state, and the mean of the members in place of their value."""

    def critics(state, action):  # (N, C, 2), (N, C, 2) -> (M, N, C)
        return torch.tensor(Q)[state[..., 0].long(), :, ((action[..., 0] + 1) * 2).round().long()].movedim(-1, 0)

    def sample_actions(sample, sde, state, noise, clip_denoised):
        assert noise.shape == (5, len(state), *sample.shape), "the sampler gets T noises a candidate"
        return sample.expand(len(state), -1, -1)

    monkeypatch.setattr(erdp, "sample_actions", sample_actions)
    choices, value = CHOOSE[name]
    low, high, N = np.array([-1.0, 0.0]), np.array([3.0, 0.5]), 24_000
    grid = np.linspace(-1, 1, 5)
    actor = fixed_actor(np.stack([grid, grid[::-1]], 1), low, high, critics, **choices)
    states = np.stack([np.arange(N) % 2, np.zeros(N)], 1)
    actions = actor(states, np.random.default_rng(3).spawn(N))
    chosen = actions[:, 0] + 1  # candidates 0..4
    agree("both dimensions are of the same candidate", actions[:, 1], 0.5 - chosen / 8, atol=1e-6)
    for state in (0, 1):
        counts = np.bincount(chosen[state::2].round().astype(int), minlength=5)
        others = [value[state] / 0.7, value[1 - state], Q[state].mean(0)]
        p, *others = (scipy.special.softmax(v) for v in (value[state], *others))
        assert_counts(f"{name}, state {state}", counts, p, others, comparisons=2 * len(CHOOSE))


def actor_of(candidates=6, **choices) -> erdp.Actor:
    """In states of three numbers, which the environment has as a dict."""
    torch.manual_seed(0)
    agent = Agent(3, 2, Args(hidden=32, num_critics=2, eval_candidates=candidates, **choices))
    return erdp.Actor(agent, dict(a=[1], b=[2, 1]), [-1, 0], [3, 0.5])


@pytest.mark.parametrize("candidates", [1, 6])
def test_actor_in_a_state_depends_on_its_own_stream_alone(candidates):
    actor, states = actor_of(candidates), np.random.default_rng(0).normal(size=(5, 3))

    def act(observation, *seeds):
        return actor(observation, [np.random.default_rng(seed) for seed in seeds])

    streams = [np.random.default_rng(seed) for seed in range(5)]
    together = actor(states, streams)
    assert together.shape == (5, 2)
    alone = [act(states[n], n) for n in range(5)]
    agree("action of a state among others and alone", together, np.array(alone), rtol=1e-4, atol=1e-5)
    assert (actor(states, streams) != together).any(), "a stream goes on"
    agree("dicts", act(dict(a=states[:, :1], b=states[:, 1:, None]), *range(5)), together, rtol=0, atol=0)
    agree("a dict", act(dict(a=states[2, :1], b=states[2, 1:, None]), 2), alone[2], rtol=0, atol=0)
    for layout, observation in (([3, 1], states[2][:, None]), ([1, 3], states[2][None])):  # a column, a row
        actor.layout = layout
        agree("as the environment observes it", act(observation, 2), alone[2], rtol=0, atol=0)
        agree("flat states, there too", act(states, *range(5)), together, rtol=0, atol=0)


def test_actor_with_one_generator_repeats_itself_and_with_none_does_not():
    actor, many = actor_of(), np.zeros((40, 3))
    first, again, other = (actor(many, generator=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(np.unique(first[:, 0])) > 9, "equal states do not share their noise"
    assert not np.array_equal(actor(many), actor(many)), "without a generator every call is another draw"
    with pytest.raises(ValueError, match="lacks the parts a, b"):
        actor(dict(a=np.zeros(1)))


@pytest.mark.parametrize("clip_denoised", [True, False], ids=["action clip", "none"])
def test_actors_samples_are_those_of_eq10_by_the_policy_clipped_as_in_training(clip_denoised):
    """One candidate a state, with the stream's Gaussians as x_T and the noise of the steps that follow."""
    actor, states = actor_of(1, clip_denoised=clip_denoised), torch.zeros(4, 3)
    noise = np.stack([np.random.default_rng(n).standard_normal((5, 2), np.float32) for n in range(4)], 1)
    network = functools.partial(literal_noise_network, dict(actor.agent.policy.named_parameters()))
    with torch.no_grad():
        sample = literal_sample(network, "cosine", 5, states, torch.tensor(noise), clip_denoised, True)
    found = actor(states.numpy(), [np.random.default_rng(n) for n in range(4)])
    low, high = np.array([-1.0, 0.0]), np.array([3.0, 0.5])
    agree("actions", found, low + (sample.double().numpy() + 1) / 2 * (high - low), rtol=1e-3, atol=1e-4)


# ==== Runs ============================================================================================================
RUN = "--num-critics 2 --num-steps 12 --eval-every 4 --eval-episodes 2 --eval-candidates 3 --batch-size 8 --device cpu"
RUN += " --ema-start 3"
LOSSES = "critic_loss", "policy_loss", "diffusion_loss", "q", "lcb", "entropy"


def run(folder, *more, settings=RUN) -> int:
    """A short run, of the toy if nothing else is said, without its picture, whose losses are read within it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp, "LOG_EVERY", 5)
        patch.setattr(erdp, "draw_curve", lambda file, _: file.write(b"a picture"))
        return erdp.main([*settings.split(), "--run-dir", str(folder), *more])


def checkpoint(folder, name="checkpoint.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def stands(folder) -> tuple:
    """How far the checkpoint is: its update, and the updates that were evaluated."""
    saved = checkpoint(folder)
    return saved["step"], [row["step"] for row in saved["evaluations"]]


def files(folder) -> dict:
    """What a folder holds, byte by byte, but for a lock."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def outcome(folder) -> dict:
    """All that a run learnt and measured, clocks and settings that may change aside."""
    with open(folder / "metrics.csv", newline="") as file:
        lines = [dict(line, seconds="") for line in csv.DictReader(file)]
    saved = checkpoint(folder)
    policies = [checkpoint(folder, name)["agent"] for name in ("policy.pt", "policy-best.pt")]
    evaluations = [dict(row, seconds=0) for row in saved["evaluations"]]
    kept = {key: saved[key] for key in ("step", "totals", "generator", "agent", "task")}
    result = json.loads((folder / "result.json").read_text())
    return kept | dict(result=result, lines=lines, evaluations=evaluations, policies=policies)


def assert_same(claim, ours, theirs):
    """The same bit for bit, through nested dicts and lists."""
    if isinstance(ours, dict | list):
        ours, theirs = (dict(enumerate(parts) if isinstance(parts, list) else parts) for parts in (ours, theirs))
        assert ours.keys() == theirs.keys(), f"{claim}: {ours.keys()}, expected {theirs.keys()}"
        for key in ours:
            assert_same(f"{claim}, {key}", ours[key], theirs[key])
    else:
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, f"{claim}: {ours}, expected {theirs}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder) == 0
    return folder


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """A copy of that folder as it was before its last file was written."""
    copied = Path(shutil.copytree(finished, tmp_path / "copied"))
    (copied / "result.json").unlink()
    return copied


def test_runs_leave_a_folder_with_their_settings_and_measurements(finished):
    names = sorted(path.name for path in finished.iterdir() if not path.name.startswith("events.out.tfevents."))
    expected = ".lock checkpoint.pt config.json curve.png metrics.csv policy-best.pt policy.pt result.json"
    assert names == expected.split() and len(list(finished.iterdir())) == len(names) + 1
    config, rows = config_of(finished), checkpoint(finished)["evaluations"]
    assert {field.name for field in dataclasses.fields(Args)} < config.keys()
    given = dict(env="toy", num_critics=2, num_steps=12, eval_every=4, batch_size=8, lr=1e-3, run_dir=str(finished))
    about = dict(dataset_id="toy-5", transitions=512, data_episodes=256, layout=[2], low=[-1], high=[1], device="cpu")
    assert {key: config[key] for key in given | about} == given | about
    assert config["device_name"] == "CPU (1 thread)" and config["versions"].keys() > {"numpy", "minari", "mujoco"}
    assert config["versions"]["torch"] == torch.__version__
    for name, part in itertools.product(("checkpoint.pt", "policy.pt", "policy-best.pt"), ("args", "task")):
        saved = checkpoint(finished, name)[part]
        assert saved == {key: config[key] for key in saved}
    with open(finished / "metrics.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*"step return_mean return_std score_mean score_std success length".split(), *LOSSES, "seconds"]
    assert [line[0] for line in lines] == ["4", "8", "12"] and all(len(line) == len(header) for line in lines)
    for line, row in zip(lines, rows):
        assert line == ["" if row[name] is None else str(row[name]) for name in header]
        assert row["success"] is None and row["length"] == 2, "the toy has no success and episodes of two steps"
        agree("score of the toy", row["score_mean"], 100 * row["return_mean"] / toy_best(), rtol=1e-4)
    of_data = toy_reward(toy_data(0).next_state[:, 0].double().numpy()).sum() / 256
    found = config["data_return"], config["data_score"]
    assert found == pytest.approx((of_data, 100 * of_data / toy_best()), rel=1e-4) and of_data < 0.6 * toy_best()


def test_runs_keep_their_last_and_their_best_policy_and_say_which(tmp_path, monkeypatch, capsys):
    ours, short, scores, summary = tmp_path / "ours", tmp_path / "short", iter([10.0, 30.0, 30.0, 20.0]), erdp.summary
    with monkeypatch.context() as patch:
        patch.setattr(erdp, "summary", lambda *given: summary(*given) | dict(score_mean=next(scores)))
        assert run(ours, "--num-steps", "16") == 0
    assert "final score 20.0, best 30.0 at update 8" in capsys.readouterr().out
    assert json.loads((ours / "result.json").read_text()) == dict(final=20, best=30, best_step=8, steps=16)
    assert run(short, "--num-steps", "8") == 0
    best, last, end = (checkpoint(ours, f"{name}.pt")["agent"] for name in ("policy-best", "policy", "checkpoint"))
    assert_same("the best policy, of two the older", best, checkpoint(short, "policy.pt")["agent"])
    assert_same("the last policy", last["policy"], end["policy"])


def losses(**changes) -> dict:
    """What an update returns."""
    return {name: torch.tensor(value) for name, value in (dict.fromkeys(LOSSES, 1.0) | changes).items()}


def test_runs_report_mean_losses_since_the_last_evaluation(tmp_path, monkeypatch):
    values = iter(np.arange(1.0, 13.0))
    monkeypatch.setattr(erdp, "update", lambda *_: (v := next(values)) and losses(q=2 * v, critic_loss=v, lcb=-v))
    assert run(tmp_path / "run", "--eval-every", "5") == 0
    rows = checkpoint(tmp_path / "run")["evaluations"]
    found = [(row["step"], row["critic_loss"], row["q"], row["lcb"], row["entropy"]) for row in rows]
    assert found == [(5, 3, 6, -3, 1), (10, 8, 16, -8, 1), (12, 11.5, 23, -11.5, 1)]


def test_runs_of_a_seed_are_the_same_however_often_evaluated_and_of_two_seeds_not(finished, tmp_path):
    torch.manual_seed(99)  # what happened in the process before does not matter
    often = ["--eval-every", "1", "--eval-episodes", "3", "--eval-candidates", "1"]
    for name, more in dict(again=[], often=often, other=["--seed", "1"]).items():
        assert run(tmp_path / name, *more) == 0
    ours, again, often, other = map(outcome, (finished, tmp_path / "again", tmp_path / "often", tmp_path / "other"))
    assert_same("two runs of a seed", again, ours)
    assert len(often["evaluations"]) == 12
    for key in ("agent", "generator"):
        assert_same(f"{key} of a run with more evaluations", often[key], ours[key])
    for key in ("policy", "critics", "policy_ema", "critics_target"):
        pairs = zip(ours["agent"][key].values(), other["agent"][key].values())
        assert not any(torch.equal(*pair) for pair in pairs if pair[0].unique().numel() > 2), f"{key} of two seeds"
    assert not torch.equal(ours["generator"], other["generator"])
    assert ours["evaluations"][0]["return_mean"] != other["evaluations"][0]["return_mean"]


kill = functools.partial(pytest.fail, "killed")  # which nothing of erdp.py catches
ctrl_c, sigterm = (functools.partial(signal.raise_signal, number) for number in (signal.SIGINT, signal.SIGTERM))
full_disk = Mock(side_effect=OSError(28, "No space left on device"))


def broken_by(stop):
    """A signal that ends a compiler as well, in an update that is half made."""
    stop()
    raise RuntimeError("the compiler was interrupted")


PLACES = {"update": (erdp, "update"), "act": (erdp.Actor, "__call__"), "save": (torch, "save")}


def cut(folder, place, number, how, *more) -> int:
    """The status of a run in which something happens at the call `number` of a place; None if that kills it."""
    function, calls = getattr(*PLACES[place]), itertools.count(1)

    def disturbed(*given):
        happens = next(calls) == number
        if happens and place == "save":
            given[1].write(b"a part of the file")
        if happens:
            how()
        return function(*given)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(pytest.fail.Exception):
        patch.setattr(*PLACES[place], disturbed)
        return run(folder, *more)


CUTS = {  # what happens to a run, one after the other: place, call, how; and its status and where it then stands
    "killed before its first evaluation": [("update", 4, kill, None, 0, [])],
    "killed in an update": [("update", 11, kill, None, 8, [4, 8])],
    "killed in an update, saved by time": [("update", 12, kill, None, 10, [4, 8])],
    "killed in its second evaluation": [("act", 3, kill, None, 8, [4])],
    "killed while it saves": [("save", 6, kill, None, 4, [4])],
    "Ctrl-C before its first evaluation": [("update", 3, ctrl_c, 130, 3, [])],
    "Ctrl-C when an evaluation is due": [("update", 8, ctrl_c, 130, 8, [4])],
    "Ctrl-C in an evaluation": [("act", 3, ctrl_c, 130, 8, [4])],
    "Ctrl-C in its last evaluation": [("act", 5, ctrl_c, 130, 12, [4, 8])],
    "Ctrl-C in a compiler": [("update", 7, lambda: broken_by(ctrl_c), 130, 4, [4])],
    "SIGTERM": [("update", 7, sigterm, 143, 7, [4])],
    "SIGTERM in the last step of an evaluation": [("act", 4, sigterm, 143, 8, [4, 8])],
    "full disk": [("save", 6, full_disk, 2, 4, [4])],
    "again and again": [
        ("update", 2, ctrl_c, 130, 2, []),
        ("update", 1, kill, None, 2, []),
        ("update", 5, sigterm, 143, 7, [4]),
        ("act", 1, kill, None, 8, [4]),
        ("update", 2, ctrl_c, 130, 10, [4, 8]),
    ],
    "finished, with more updates to go": [("update", 99, kill, 0, 8, [4, 8], "--num-steps", "8")],
}


@pytest.mark.parametrize("name", CUTS)
def test_runs_resumed_are_the_uninterrupted_one_bit_for_bit(name, finished, tmp_path, monkeypatch, capsys):
    folder, resume = tmp_path / "run", []
    assert erdp.SAVE_EVERY == 600
    monkeypatch.setattr(erdp, "SAVE_EVERY", 0 if "by time" in name else 600)
    for place, number, how, status, step, evaluated, *more in CUTS[name]:
        assert cut(folder, place, number, how, *resume, *more) == status
        assert stands(folder) == (step, evaluated)
        assert (folder / "result.json").exists() == (status == 0), "result.json marks a finished run"
        assert not list(folder.glob(".part*")), "no part of a file is left"
        said, resume = capsys.readouterr(), ["--resume"]
        if status in (130, 143):
            assert f"stopped {'within a step' if 'compiler' in name else f'at update {step}:'}" in said.out
            assert "--resume goes on" in said.out and said.err == ""
        if status == 2:
            assert re.fullmatch("erdp: [^\n]*--resume[^\n]*No space left on device\n", said.err)
    assert run(folder, *resume) == 0
    assert_same(name, outcome(folder), outcome(finished))


def test_runs_end_at_once_at_a_second_signal_and_put_handlers_back(tmp_path, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cut(tmp_path / "run", "update", 6, lambda: (sigterm(), ctrl_c())) == 130
    assert capsys.readouterr().err == "" and stands(tmp_path / "run") == (4, [4]), "nothing is saved at a second"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("stop, status", [(ctrl_c, 130), (sigterm, 143)])
def test_runs_stopped_while_the_compiler_is_tried_save_nothing(stop, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda _: broken_by(stop))
    assert run(tmp_path / "run", "--compile") == status and capsys.readouterr().err == ""
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_runs_log_for_tensorboard_without_a_gap_where_they_were_resumed(tmp_path, finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cut(tmp_path / "run", "update", 11, kill) is None  # after update 10 was logged, but not saved
    assert run(tmp_path / "run", "--resume") == 0
    for folder in (finished, tmp_path / "run"):
        events = EventAccumulator(str(folder))
        events.Reload()
        scores = [(event.step, event.value) for event in events.Scalars("score")]
        rows = checkpoint(folder)["evaluations"]
        agree("scores", scores, [(row["step"], row["score_mean"]) for row in rows], rtol=1e-6)
        for name in LOSSES:
            assert [event.step for event in events.Scalars(f"losses/{name}")] == [4, 5, 8, 10, 12]


def test_runs_that_are_finished_say_so_and_can_be_extended(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, "--num-steps", "10") == 0
    assert stands(folder) == (10, [4, 8, 10]), "they end with an evaluation wherever they end"
    before = files(folder)
    capsys.readouterr()
    for steps in ("10", "9"):
        assert run(folder, "--resume", "--num-steps", steps) == 0
        assert capsys.readouterr() == (f"{folder} is finished\n", "") and files(folder) == before
    assert cut(folder, "update", 1, ctrl_c, "--resume") == 130
    assert not (folder / "result.json").exists() and config_of(folder)["num_steps"] == 12
    assert run(folder, "--resume") == 0 and stands(folder) == (12, [4, 8, 10, 12])
    assert_same("10 updates and 2 more", outcome(folder)["agent"], outcome(finished)["agent"])


def spoilt(agent, *_) -> dict:
    agent.policy.layers[0].bias.data[0] = math.nan
    return losses()


def once(value, update):
    """Updates that do nothing; in one of them Q is not finite."""
    calls = itertools.count(1)
    return lambda *_: losses(q=value if next(calls) == update else 1.0)


NOT_FINITE = {  # updates, the update in which it happens, and the last good checkpoint's
    "at once": (once(math.nan, 3), 3, 0),
    "after an evaluation": (once(math.inf, 6), 6, 4),
    "at the end": (once(-math.inf, 12), 12, 8),
    "in the weights": (spoilt, 1, 0),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_runs_stop_where_a_number_is_not_finite_and_never_save_it(name, tmp_path, monkeypatch, capsys):
    (update, step, last), folder = NOT_FINITE[name], tmp_path / "run"
    monkeypatch.setattr(erdp, "update", update)
    assert run(folder) == 1
    said = re.fullmatch(r"erdp: a loss is NaN or infinite .* update (\d+): (.*)\n", capsys.readouterr().err)
    assert step <= int(said[1]) <= step + 3 and f"{folder / 'checkpoint.pt'} is the last good checkpoint" == said[2]
    assert stands(folder)[0] == last and checkpoint(folder)["totals"].isfinite().all()
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_runs_of_the_toy_draw_figure_1(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **kw: figures.append(figure) or save(figure, *to, **kw))
    assert erdp.main([*RUN.split(), "--run-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve, reward, q = figures[0].axes
    scores = [(row["step"], row["score_mean"]) for row in checkpoint(tmp_path / "run")["evaluations"]]
    agree("the score while training", curve.containers[0].lines[0].get_xydata(), scores)
    (level,) = {height for line in curve.lines if line.get_linestyle() == ":" for height in line.get_ydata()}
    assert level == config_of(tmp_path / "run")["data_score"], "beside that of the data"
    x, y = reward.lines[0].get_data()
    agree("the reward", y, toy_reward(x))
    assert len(reward.patches) == 60, "the data's density, beside it"
    mean, below = (line.get_ydata() for line in q.lines)
    assert (np.asarray(below) <= np.asarray(mean)).all(), "Q, and its LCB below"


def test_runs_are_at_work_in_their_folder_alone(refused, unfinished):
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    command = [sys.executable, "-c", f"{code}; sys.stdin.read()", str(unfinished / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        refused([*RUN.split(), "--resume"], f"{unfinished} ", "another process is at work", folder=unfinished)
    assert run(unfinished, "--resume") == 0, "a lock ends with its process"


@pytest.mark.parametrize("hidden, device, expected", [(64, "cpu", [1]), (65, "cpu", []), (64, "cuda:1", [])])
def test_runs_with_small_networks_on_a_cpu_use_one_thread(hidden, device, expected, monkeypatch, request):
    request.addfinalizer(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    erdp.use_device(Args(hidden=hidden, device=device))
    assert threads == expected


def test_load_policy_has_the_trained_weights_and_the_runs_settings(finished):
    for name in ("policy.pt", "policy-best.pt", "checkpoint.pt"):
        saved, actor = checkpoint(finished, name), erdp.load_policy(finished / name)
        assert actor.agent.args == Args(**saved["args"])
        assert erdp.load_policy(finished / name, candidates=1).agent.args.eval_candidates == 1
        for part in ("policy", "critics_target"):
            assert_same(f"{part} of {name}", getattr(actor.agent, part).state_dict(), saved["agent"][part])
    first, again = (actor([0.5, 1], generator=np.random.default_rng(0)) for _ in range(2))
    assert first == again and first.shape == (1,), "it repeats itself"
    for shape in ((1,), (3,), (5, 3), (2, 1), (2, 1, 2), (), (0,)):
        with pytest.raises(ValueError, match=re.escape(f"states have 2 numbers here, but these are of shape {shape}")):
            actor(np.zeros(shape))


def test_eval_only_scores_a_policy_as_it_was_trained_unless_told_otherwise_and_writes_nothing(finished, capsys):
    before, rows = files(finished), checkpoint(finished)["evaluations"]
    best = max(rows, key=lambda row: row["score_mean"])
    for name, row in {"policy.pt": rows[-1], "checkpoint.pt": rows[-1], "policy-best.pt": best}.items():
        assert erdp.main(["--eval-only", str(finished / name)]) == 0
        assert capsys.readouterr().out.endswith(f"{erdp.in_words(row)}\n"), "the run's own evaluation, again"
    for other in ("--eval-candidates", "--seed"):
        assert erdp.main(["--eval-only", str(finished / "policy.pt"), other, "7"]) == 0
        assert not capsys.readouterr().out.endswith(f"{erdp.in_words(rows[-1])}\n")
    assert files(finished) == before


# ==== Data sets and environments, end to end ==========================================================================
SHORT = "--num-critics 2 --num-steps 4 --eval-every 2 --eval-episodes 3 --eval-candidates 2 --batch-size 4 --device cpu"
SHORT += " --hidden 16"
learn = functools.partial(run, settings=SHORT)


@pytest.fixture
def minari_root(tmp_path, monkeypatch) -> Path:
    """An empty folder for Minari's data sets, without a network."""
    from minari.storage import hosting

    def download(name):
        hosting.parse_dataset_id(name)  # as Minari does first
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr(hosting, "download_dataset", download)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def make_minari(env, steps=4, actions=None, rewards=None, name="made/data-v0", seed=0, **more) -> str:
    """A Minari data set of two episodes of random numbers in the spaces of an environment."""
    import minari
    from minari.data_collector import EpisodeBuffer

    made = gym.make(env)
    space, buffers = made.observation_space, []
    space.seed(seed)
    for number in range(2):
        ends, observations = [False] * (steps - 1) + [True], [space.sample() for _ in range(steps + 1)]
        rows = dict(rewards=rewards or [0.5] * steps, terminations=[False] * steps, truncations=ends)
        rows["actions"] = actions or [made.action_space.sample() for _ in range(steps)]
        buffers.append(EpisodeBuffer(id=number, observations=columns_of(space, observations), infos={}, **rows))
    minari.create_dataset_from_buffers(name, buffers, env=more.pop("recorded", env), **more)
    return name


def test_run_on_a_tiny_minari_data_set_and_evaluation_without_it(minari_root, tmp_path, capsys):
    """From data to score, with nested observations, action bounds that differ and the set's own reference scores."""
    dataset, folder = make_minari(made("Ledger"), ref_min_score=2.0, ref_max_score=12.0), tmp_path / "run"
    capsys.readouterr()
    assert learn(folder, "--dataset", dataset) == 0
    said = capsys.readouterr()
    assert said.err == "", "nothing on stderr, whatever the packages print"
    assert "mean return 1.50, score -5.0" in said.out, "of the data's first 3 steps"
    config, rows = config_of(folder), checkpoint(folder)["evaluations"]
    found = [config[key] for key in ("dataset_id", "transitions", "layout", "env", "loss")]
    layout = dict(goal=[1], me=dict(clock=[1], place=[2]))
    assert found == ["made/data-v0", 8, layout, "own", "noise"], "Args' own settings"
    assert [row["step"] for row in rows] == [2, 4] and {row["success"] for row in rows} <= {0, 1 / 3, 2 / 3, 1}
    for row in rows:
        agree("score", row["score_mean"], 100 * (row["return_mean"] - 2) / 10)
        assert 1 <= row["length"] <= 3, "the environment's time limit is kept"
    shutil.rmtree(minari_root)
    for name in ("policy.pt", "checkpoint.pt"):
        assert erdp.main(["--eval-only", str(folder / name)]) == 0, "a policy knows its environment"
        assert capsys.readouterr().out.endswith(f"{erdp.in_words(rows[-1])}\n")
    actor = erdp.load_policy(folder / "policy.pt")
    assert (actor.low.tolist(), actor.high.tolist()) == ([-1, 0], [3, 0.5])
    assert actor(Ledger.observation_space.sample()).shape == (2,), "it takes observations as the environment has them"


ACTIONS = {  # low, high, dtype; the environment refuses an action of another dtype or shape
    "matrices": ([[-1, -1], [-1, -1]], [[1, 2], [3, 4]], "float32"),
    "numbers": (-1, 1, "float64"),
    "rows of float64": ([[-0.1, -0.2, -0.3]], [[0.1, 0.2, 0.3]], "float64"),
    "tenths in float32": ([-0.1], [0.1], "float32"),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_run_with_actions_of_any_shape_and_dtype(name, minari_root, tmp_path):
    low, high, dtype = ACTIONS[name]
    env = made("Ledger", low=low, high=high, dtype=dtype)
    assert learn(tmp_path / "run", "--dataset", make_minari(env)) == 0
    actor, space = erdp.load_policy(tmp_path / "run" / "policy.pt"), gym.make(env).action_space
    assert actor(np.zeros((5, 4))).shape == (5, *np.shape(low))
    assert actor(np.zeros(4)).dtype == dtype and space.contains(actor(np.zeros(4)))
    for row in checkpoint(tmp_path / "run")["evaluations"]:
        agree("without reference scores the score is the return", row["score_mean"], row["return_mean"])


@pytest.fixture
def ledger_v7():
    """The Ledger by the name Ledger-v7, with episodes of 3 steps."""
    gym.register("Ledger-v7", f"{__name__}:Ledger", max_episode_steps=3)
    yield "Ledger-v7"
    gym.registry.pop("Ledger-v7")


@pytest.mark.slow
def test_run_in_an_environment_that_the_data_set_does_not_name(refused, minari_root, tmp_path, monkeypatch, ledger_v7):
    spaces = dict(observation_space=Ledger.observation_space, action_space=gym.make(ledger_v7).action_space)
    argv = ["--dataset", make_minari(made("Ledger"), recorded=None, **spaces)]
    refused([*SHORT.split(), *argv], "names no environment", "--eval-env")
    for name in ("Nowhere-v0", "nowhere:Env", "nowhere:Env-v0", f"{__name__}:Nowhere"):
        refused([*SHORT.split(), *argv, "--eval-env", name], f"the environment {name} cannot be made")
    (tmp_path / "made_here.py").write_text(f"from {__name__} import Ledger\n")
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate((ledger_v7, f"{__name__}:Ledger", f"{__name__}:{ledger_v7}", "made_here:Ledger")):
        assert learn(tmp_path / f"run{k}", *argv, "--eval-env", name) == 0
    monkeypatch.setitem(erdp.ROWS, "ledger", erdp.Row("own", argv[-1], ledger_v7, 2, 0.0, 10.0))
    assert erdp.train(dataclasses.replace(erdp.parse(SHORT.split()), env="ledger", run_dir=str(tmp_path / "row"))) == 0
    assert all(row["length"] <= 2 for row in checkpoint(tmp_path / "row")["evaluations"]), "by the row's rule"
    named = dict(env="own", dataset=make_minari(made("Ledger"), name="made/named-v0"))
    for source, its_own in ((dict(env="ledger"), "Ledger-v7"), (named, "Made-v0")):
        for eval_env, expected in ((None, its_own), (f"{__name__}:Ledger", "Ledger-v0")):
            task, _ = erdp.load_data(Args(**source, eval_env=eval_env))
            assert EnvSpec.from_json(task.spec).id == expected


def test_run_says_where_its_environment_is_not_the_datas(minari_root, capsys, ledger_v7):
    other = make_minari(made("Ledger", 9), eval_env=made("Ledger", 2, style="arrays"))
    same = make_minari(made("Ledger", 9), name="made/same-v0")
    by_env = "max_episode_steps 9 / 2, style None / arrays"
    by_name = "id Made-v0 / Ledger-v7, max_episode_steps 9 / 3"
    for dataset, eval_env, differing in ((other, None, by_env), (other, ledger_v7, by_name), (same, None, "")):
        capsys.readouterr()
        erdp.load_data(Args(env="own", dataset=dataset, eval_env=eval_env))
        words = differing and f"the data were recorded / are evaluated with {differing}\n"
        assert capsys.readouterr().out == words


def test_eval_only_plays_in_another_environment_if_its_spaces_are_the_policys(refused, minari_root, tmp_path, capfd):
    folder, policy = tmp_path / "run", str(tmp_path / "run" / "policy.pt")
    assert learn(folder, "--dataset", make_minari(made("Ledger", 1))) == 0
    before = files(folder)
    for more in ([], ["--eval-env", f"{__name__}:Ledger"]):  # the latter has no time limit, and takes the policy's
        capfd.readouterr()
        assert erdp.main(["--eval-only", policy, *more]) == 0
        assert "length 1," in capfd.readouterr().out and files(folder) == before
    for name in ("Pendulum-v1", "erdp:ToyEnv"):
        refused(["--eval-only", policy, "--eval-env", name], name, "other observations or actions than the policy")
    refused(["--eval-only", policy, "--eval-env", "CartPole-v1"], "CartPole-v1", "Discrete(2)")
    refused(["--eval-only", policy, "--eval-env", "Nowhere-v0"], "Nowhere-v0 cannot be made")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minari", "hdf5"])
def test_run_resumed_elsewhere_takes_its_own_data_by_any_name_and_no_other(kind, refused, minari_root, tmp_path):
    if kind == "minari":
        argv, same = ["--dataset", make_minari(made("Ledger"))], "made/moved-v0"
        other, here, there = make_minari(made("Ledger"), name="made/other-v0", seed=1), minari_root, minari_root
    else:
        argv, same = hopper(d4rl_file(tmp_path / "a.hdf5")), str(tmp_path / "moved.hdf5")
        other, here, there = str(d4rl_file(tmp_path / "b.hdf5", rewards=np.ones(6))), Path(), Path()
    folder, few = tmp_path / "run", ["--eval-episodes", "1", "--eval-every", "9"]
    assert learn(folder, *few, *argv) == 0
    (here / argv[-1]).rename(there / same)
    refused(["--resume", "--num-steps", "5"], argv[-1], folder=folder)
    refused(["--resume", "--num-steps", "5", "--dataset", other], "other data than these", argv[-1], folder=folder)
    for more in (["5", "--dataset", same], ["6"]):  # then it knows its data
        assert erdp.main(["--run-dir", str(folder), "--resume", "--num-steps", *more]) == 0
    assert (checkpoint(folder)["step"], config_of(folder)["dataset_id"]) == (6, same)


@pytest.mark.parametrize("when", ["within a step", "between two steps"])
def test_run_with_a_dead_worker_ends_in_one_sentence_and_goes_on(when, minari_root, tmp_path, capfd):
    """It dies in the second evaluation."""
    folder, doom, act = tmp_path / "run", tmp_path / "doom", erdp.Actor.__call__
    argv = ["--dataset", make_minari(made("Ledger", doom=str(doom)))]

    def disturbed(*given):
        if stands(folder) == (4, [2]) and when == "within a step":
            doom.touch()
        elif stands(folder) == (4, [2]):
            worker = multiprocessing.active_children()[0]
            worker.kill()
            worker.join()
        return act(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp.Actor, "__call__", disturbed)
        capfd.readouterr()
        assert learn(folder, *argv) == 2
    assert re.fullmatch("erdp: a process of the evaluation has died.*--resume.*\n", capfd.readouterr().err)
    assert multiprocessing.active_children() == [] and stands(folder) == (4, [2])
    doom.unlink(missing_ok=True)
    assert learn(folder, *argv, "--resume") == 0 and stands(folder) == (4, [2, 4])


def test_run_with_a_return_of_nan_ends_in_one_sentence_and_writes_no_row(minari_root, tmp_path, capfd):
    seed, folder = int(np.random.SeedSequence((0, 1)).generate_state(1)[0]), tmp_path / "run"  # of the second episode
    dataset = make_minari(made("Ledger", unstable=seed))
    capfd.readouterr()
    assert learn(folder, "--dataset", dataset) == 1
    words = f"erdp: the episode of seed {seed} has a return of NaN .*the checkpoint before it stands\n"
    assert re.fullmatch(words, capfd.readouterr().err)
    assert stands(folder) == (2, []) and not (folder / "metrics.csv").exists()
    assert multiprocessing.active_children() == [], "no process is left"


UMAZE = [[1, 1, 1, 1, 1], [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1, 1, 1, 1, 1]]
MIRRORED = [[1, 1, 1, 1, 1], [1, "r", 0, 0, 1], [1, 1, 1, 0, 1], [1, "g", 0, 0, 1], [1, 1, 1, 1, 1]]


def test_run_on_a_tiny_antmaze_data_set_is_mirrored_and_ends_at_the_goal(minari_root, capsys):
    """It was collected in the environment's own maze and is to be evaluated in UMAZE."""
    import minari

    erdp.register_robots()
    kwargs = dict(reward_type="sparse", continuing_task=True, reset_target=False)
    env = dataclasses.replace(gym.spec("AntMaze_UMaze-v4"), max_episode_steps=4, kwargs=kwargs)
    eval_env = dataclasses.replace(env, kwargs=kwargs | dict(maze_map=UMAZE))
    dataset = make_minari(env, eval_env=eval_env, rewards=[0.0, 1.0, 1.0, 0.0])
    capsys.readouterr()
    task, data = erdp.load_data(Args(env="antmaze-umaze-diverse-v0", dataset=dataset))
    said, spec = capsys.readouterr(), EnvSpec.from_json(task.spec)
    assert "the walls of AntMaze_UMaze-v4 are mirrored here" in said.out and said.err == ""
    assert spec.kwargs["maze_map"] == MIRRORED and not spec.kwargs["continuing_task"]
    assert (task.ref_min, task.ref_max, spec.max_episode_steps) == (0, 1, 700)
    assert data.state.shape == (4, 31) and data.action.shape == (4, 8), "two steps an episode"
    assert data.terminal.tolist() == [0, 1, 0, 1] and data.reward.tolist() == [-2, 2, -2, 2]
    first = next(iter(minari.load_dataset(dataset))).observations
    flat = np.concatenate([first[key][0] for key in ("achieved_goal", "desired_goal", "observation")])
    agree("states are goals, then the ant", data.state[0], flat.astype(np.float32), rtol=0, atol=0)
    with contextlib.closing(gym.make(spec)) as env:
        assert env.unwrapped.maze.maze_map == MIRRORED
        at_goal = dict(goal_cell=np.array([3, 1]), reset_cell=np.array([3, 1]))
        ends = []
        for seed in range(20):
            env.reset(seed=seed, options=at_goal)
            _, reward, terminated, *_, info = env.step(np.zeros(8))
            assert terminated == info["success"] == (reward == 1), "evaluation ends at the goal"
            ends.append(terminated)
        assert any(ends)


RECORDED = {
    "antmaze-umaze-v0": ("standin/antmaze/umaze-v0", (31, 8)),
    "kitchen-complete-v0": ("standin/kitchen/random-v0", (59, 9)),
    "pen-human-v1": ("standin/pen/human-v0", (45, 24)),
    "walker2d-medium-v2": ("standin/d4rl/walker2d-medium-v2.hdf5", (17, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("env", RECORDED)
def test_run_on_recorded_data(env, minari_root, tmp_path, capfd):
    if not os.environ.get("ERDP_DATA"):
        pytest.skip("ERDP_DATA is not set: no folder of recorded data")
    data, (source, sizes) = Path(os.environ["ERDP_DATA"]), RECORDED[env]
    (minari_root / "standin").symlink_to(data / "minari" / "standin")  # no lock is left where the data are
    argv = ["--env", env, "--dataset", str(data / source) if source.endswith("5") else source]
    assert learn(tmp_path / "run", *argv, "--eval-every", "4", "--eval-episodes", "1") == 0
    assert capfd.readouterr().err == "", "nothing on stderr, whatever the packages print"
    task, (row,) = checkpoint(tmp_path / "run")["task"], checkpoint(tmp_path / "run")["evaluations"]
    assert (erdp.size(task["layout"]), len(task["low"])) == sizes
    assert row["length"] >= 1 and (row["success"] is None) == (not env.startswith(("antmaze", "pen")))


# ==== Bad input =======================================================================================================
@pytest.fixture
def refused(capfd, tmp_path):
    """Checks that main refuses its arguments with status 2 and one sentence, with `words`, and writes nothing."""

    def check(argv, *words, folder=tmp_path / "run"):
        before = files(folder)
        capfd.readouterr()
        status, said = erdp.main([*argv, "--run-dir", str(folder)]), capfd.readouterr().err
        assert status == 2, f"status {status}, expected 2 ({said!r})"
        assert re.fullmatch("erdp: [^\n]+\n", said), f"not one sentence: {said!r}"
        for word in words:
            assert word in said, f"{said!r} does not say {word!r}"
        assert files(folder) == before

    return check


BAD_SETTINGS = {  # what makes no sense on any machine, and words that tyro's box must have
    "--env hoper-medium-v2": ["hoper-medium-v2", "hopper-medium-v2"],
    "--env=": ["--env", "toy"],
    "--variant other": ["other", "released"],
    "--num-steps many": ["--num-steps", "many"],
    "--num-stepz 3": ["--num-stepz", "--num-steps"],
    "--seed -1": ["--seed is -1 but must be from 0"],
    "--q-time 6": ["--q-time is 6 but must be from 1 to 5"],
    "--variant released --num-diffusion-steps 2": ["--num-diffusion-steps is 2 but must be from 3"],
    "--variant debruijn --env hopper-medium-v2": ["give it --loss noise or --loss posterior"],
    "--precision tf32 --device cpu": ["--precision tf32", "--device cpu"],
}


@pytest.mark.parametrize("argv", BAD_SETTINGS)
def test_bad_settings_are_refused_in_a_box(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        erdp.main([*RUN.split(), *argv.split()])
    said = re.sub(r"[\s│|]+", " ", capsys.readouterr().err)
    assert stop.value.code == 2 and all(word in said for word in BAD_SETTINGS[argv]), said


COUNTS = "num_steps batch_size hidden num_critics ema_every eval_every eval_episodes eval_candidates".split()
LIMITS = {  # values that a setting takes, and values that it refuses
    **dict.fromkeys(COUNTS, ([1, 2**40], [0, -7])),
    **dict.fromkeys(["seed", "ema_start"], ([0], [-1])),
    "num_diffusion_steps": ([2], [1, 0]),
    "q_time": ([1, 5, None], [0, -1, 6]),
    **dict.fromkeys(["lcb_coef", "entropy_coef", "eta"], ([0.0, 2.0], [-0.001, math.nan, math.inf])),
    **dict.fromkeys(["lr", "critic_lr", "grad_norm"], ([0.001, 2.0], [0.0, -0.001, math.nan, math.inf])),
    **dict.fromkeys(["discount", "target_rate", "ema_rate"], ([0.0, 1.0], [1.001, -0.001, math.nan, math.inf])),
}


@pytest.mark.parametrize("name", LIMITS)
def test_bad_numbers_are_those_beyond_their_limits(name):
    taken, refused = LIMITS[name]
    for value in taken:
        assert getattr(Args(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value} but must be "):
            Args(**{name: value})
    numbers = {field.name for field in dataclasses.fields(Args) if type(getattr(Args(), field.name)) in (int, float)}
    assert numbers | {"q_time"} == LIMITS.keys(), "every number is thought of"


WORDS = st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=8)
FLAGS = st.sampled_from(["--" + field.name.replace("_", "-") for field in dataclasses.fields(Args)])


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(FLAGS | WORDS.filter(lambda word: word not in ("-h", "--help")), min_size=1, max_size=4))
def test_mangled_settings_are_parsed_or_refused(argv):
    try:
        assert isinstance(erdp.parse(argv), Args)
    except SystemExit as stop:
        assert stop.code == 2
    except UserError as error:
        assert len(str(error).splitlines()) == 1, f"not one sentence: {error}"


def hopper(path) -> list[str]:
    return ["--env", "hopper-medium-v2", "--dataset", str(path)]


def hdf5(n=6, change=bytes, **rows):
    """A D4RL file of n rows, in which some rows or the bytes are changed."""

    def make(folder):
        path = d4rl_file(folder / "a.hdf5", n, **rows)
        path.write_bytes(change(path.read_bytes()))
        return hopper(path)

    return make


def minari_set(env=None, row=None, damage=lambda folder: None, **more):
    """A Minari set of an environment, by default of the Ledger, whose files are damaged."""

    def make(folder):
        dataset = make_minari(env or made("Ledger"), **more)
        damage(folder / "minari" / dataset / "data")
        return ["--dataset", dataset, *(["--env", row] if row else [])]

    return make


def changed(key, change):
    """Damage to one array of the second episode."""

    def damage(folder):
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            rows = file[f"episode_1/{key}"][()]
            del file[f"episode_1/{key}"]
            file[f"episode_1/{key}"] = change(rows)

    return minari_set(damage=damage)


def half(name):
    return minari_set(damage=lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2))


class Odd(Ledger):
    """It has a discrete space, or cannot be made."""

    def __init__(self, discrete=None):
        assert discrete, "the simulator\nis not installed"
        super().__init__()
        setattr(self, discrete, Discrete(3))


def boxed(low, high) -> EnvSpec:
    return made("Ledger", low=low, high=high)


LAST_NAN = np.array([[0.0] * 11] * 5 + [[math.nan] * 11])
MATRICES = boxed([[-1, -1], [-1, -1]], [[1, 1], [1, 1]])
DISCRETE = {part: made("Odd", discrete=f"{part}_space") for part in ("action", "observation")}
BAD = {  # arguments, or what makes the data that they name; and words that the sentence must have
    "a file for the toy": ("--env toy --dataset a.hdf5", ["a.hdf5", "toy-0 to toy-99"]),
    "own data without a name": ("--env own", ["--dataset"]),
    "no such file": ("--dataset a.hdf5", ["a.hdf5", "No such file"]),
    "no such home": ("--env hopper-medium-v2 --dataset ~nobodyhere/a.hdf5", ["~nobodyhere"]),
    "a path as an id": ("--dataset ../data-v0", ["../data-v0", "Malformed"]),
    "an id without version": ("--dataset made/data", ["made/data", "a Minari id with its version"]),
    "no such set": ("--env pen-human-v1", ["D4RL/pen/human-v2", "Network is unreachable", "minari has no set"]),
    "another environment for the toy": ("--eval-env Hopper-v4", ["Hopper-v4"]),
    "too large a batch": ("--batch-size 100000000000000", ["smaller"]),
    "no such GPU": ("--device cuda", ["--device cuda is not there: PyTorch sees cpu"]),
    "no policy": ("--eval-only nowhere.pt", ["nowhere.pt", "No such file"]),
    "a folder as a policy": ("--eval-only .", ["Is a directory"]),
    "nothing to resume": ("--resume", ["checkpoint.pt", "--run-dir", "--env"]),
    "hdf5: no timeouts and rewards": (hdf5(timeouts=None, rewards=None), ["rewards"]),
    "hdf5: fewer observations": (hdf5(observations=np.zeros((5, 11))), ["[5, 6, 6, 6, 6]"]),
    "hdf5: more timeouts": (hdf5(timeouts=np.zeros(7)), ["[6, 6, 6, 6, 7]"]),
    "hdf5: wide observations": (hdf5(observations=np.zeros((6, 12))), ["(6, 12)", "(7, 11)"]),
    "hdf5: wide actions": (hdf5(actions=np.zeros((6, 4))), ["(6, 4)", "(6, 3)"]),
    "hdf5: rewards in a column": (hdf5(rewards=np.zeros((6, 1))), ["(6, 1)"]),
    "hdf5: a number": (hdf5(rewards=1.0), ["a.hdf5"]),
    "hdf5: a group": (hdf5(rewards={}), ["a.hdf5"]),
    "hdf5: infinite in float32": (hdf5(observations=np.full((6, 11), 1e39)), ["NaN or infinity"]),
    "hdf5: NaN in the last state": (hdf5(observations=LAST_NAN), ["NaN or infinity", "next_state"]),
    "hdf5: NaN action": (hdf5(actions=np.full((6, 3), math.nan)), ["NaN or infinity", "action"]),
    "hdf5: infinite reward": (hdf5(rewards=np.full(6, -math.inf)), ["NaN or infinity", "reward"]),
    "hdf5: action outside": (hdf5(actions=np.full((6, 3), 1.1)), ["5 of its 5 actions are outside", "0.1: clip"]),
    "hdf5: all timeouts": (hdf5(timeouts=np.ones(6)), ["no transition"]),
    "hdf5: no row": (hdf5(0), ["lengths [0, 0, 0, 0, 0]"]),
    "hdf5: one row": (hdf5(1), ["no transition"]),
    "hdf5: another format": (hdf5(change=lambda content: b"1, 2\n"), ["a.hdf5"]),
    "hdf5: half of the file": (hdf5(change=lambda content: content[: len(content) // 2]), ["a.hdf5"]),
    "hdf5: a folder": (lambda folder: hopper(folder.joinpath("a.h5").mkdir() or folder / "a.h5"), ["a.h5"]),
    "hdf5: no environment": (lambda folder: hdf5()(folder)[2:], ["names no environment", "--eval-env", "--env"]),
    "fewer rewards": (changed("rewards", lambda rows: rows[:-1]), ["of episode 1 are", "(3,)"]),
    "wide actions": (changed("actions", lambda rows: np.repeat(rows, 2, 1)), ["(4, 4)", "not ((5, 4), (4, 2)"]),
    "fewer goals": (changed("observations/goal", lambda rows: rows[:-1]), []),
    "NaN places": (changed("observations/me/place", lambda rows: rows * math.nan), ["NaN or infinity"]),
    "rewards beyond float32": (changed("rewards", lambda rows: rows * 1e300), ["NaN or infinity"]),
    "half of the data": (half("main_data.hdf5"), ["made/data-v0", "delete"]),
    "half of the metadata": (half("metadata.json"), ["made/data-v0", "delete"]),
    "discrete actions": (minari_set(DISCRETE["action"]), ["Discrete(3)"]),
    "discrete observations": (minari_set(DISCRETE["observation"]), ["observations", "Discrete(3)"]),
    "unbounded actions": (minari_set(boxed([-1] * 60, [math.inf] * 60)), ["a Box of floats with 0 < high - low < 1e6"]),
    "bounds without width": (minari_set(boxed([-1, 1], [1, 1]), actions=[np.ones(2)] * 4), ["0 < high - low"]),
    "huge bounds": (minari_set(boxed([-3.4e38] * 2, [3.4e38] * 2)), ["high - low < 1e6"]),
    "evaluation: it cannot be made": (minari_set(eval_env=made("Odd")), ["cannot be made", "the simulator"]),
    "evaluation: other shape": (minari_set(boxed([-1] * 4, [1] * 4), eval_env=MATRICES), ["(4, 4)", "(4, 2, 2)"]),
    "another row's data: Hopper": (minari_set(row="hopper-medium-v2"), ["made/data-v0"]),
    "another row's data: Kitchen": (minari_set(row="kitchen-complete-v0"), ["cannot be made"]),
    "another row's data: AntMaze": (minari_set(row="antmaze-umaze-v0"), ["cannot be made"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name, refused, minari_root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    argv, words = BAD[name]
    refused([*SHORT.split(), *(argv.split() if isinstance(argv, str) else argv(tmp_path))], *words)


def test_minari_data_in_a_folder_that_cannot_be_written_are_read_without_a_lock(minari_root, monkeypatch):
    args, access = Args(env="own", dataset=make_minari(made("Ledger"))), os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
        assert erdp.load_data(args)[0].transitions == 8 and not list(minari_root.glob(".*"))
    assert erdp.load_data(args)[0].transitions == 8 and list(minari_root.glob(".*")), "elsewhere one is taken"


@contextlib.contextmanager
def server(reply: bytes, silent_for: float = 0):
    """A server on this machine that gives the same reply to all. Yields its address and who has asked."""
    done, asked = threading.Event(), []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(self.client_address)
            self.request.recv(10_000)
            self.request.sendall(reply)
            done.wait(silent_for)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener, contextlib.ExitStack() as ends:
        threading.Thread(target=listener.serve_forever, args=[0.05]).start()
        ends.callback(listener.shutdown)
        ends.callback(done.set)
        yield f"http://127.0.0.1:{listener.server_address[1]}/", asked


@pytest.fixture
def d4rl_folder(monkeypatch, tmp_path) -> Path:
    """Where D4RL's files are kept. A download has a hundredth of its patience."""
    import pooch

    patient = pooch.HTTPDownloader
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda timeout, **more: patient(timeout=timeout / 100, **more))
    return tmp_path / "d4rl"


OK = b"HTTP/1.0 200 OK\r\n"
REPLIES = {
    "silence": (b"", 5),
    "a stall": (OK + b"Content-Length: 99\r\n\r\nabc", 5),
    "an end too early": (OK + b"Content-Length: 99\r\n\r\nabc", 0),
    "no such file": (b"HTTP/1.0 404 Not Found\r\n\r\n", 0),
}


@pytest.mark.parametrize("name", REPLIES)
def test_bad_download_of_hdf5_ends_soon_and_leaves_no_part_of_a_file(name, d4rl_folder, monkeypatch):
    with server(*REPLIES[name]) as (address, _):
        monkeypatch.setattr(erdp, "D4RL_SERVER", address)
        began = time.monotonic()
        with pytest.raises(UserError, match="fetch it by hand"):
            erdp.fetch_d4rl("hopper_medium-v2.hdf5")
        assert time.monotonic() - began < 4, "a silent server is not waited for"
    assert [path.name for path in d4rl_folder.iterdir()] in ([], [".hopper_medium-v2.hdf5.lock"])


def test_bad_download_of_hdf5_is_refused_in_one_sentence(refused, d4rl_folder, monkeypatch):
    with server(*REPLIES["an end too early"]) as (address, _):
        monkeypatch.setattr(erdp, "D4RL_SERVER", address)
        refused([*SHORT.split(), "--env", "hopper-medium-v2"], "hopper_medium-v2.hdf5 cannot be downloaded")


def test_hdf5_is_downloaded_whole_and_once_for_all_processes(d4rl_folder, monkeypatch, tmp_path):
    content, name = d4rl_file(tmp_path / "a.hdf5").read_bytes(), "hopper_medium-v2.hdf5"
    with server(OK + f"Content-Length: {len(content)}\r\n\r\n".encode() + content) as (address, asked):
        monkeypatch.setattr(erdp, "D4RL_SERVER", address)
        with multiprocessing.get_context("fork").Pool(4) as pool:
            paths = pool.map(erdp.fetch_d4rl, [name] * 4, chunksize=1)
    assert set(paths) == {d4rl_folder / name} and paths[0].read_bytes() == content and len(asked) == 1
    task, data = erdp.load_data(Args(env="hopper-medium-v2"))  # the server is gone
    assert data.reward.tolist() == [0, 1, 2, 3, 4]
    assert (EnvSpec.from_json(task.spec).id, task.ref_max, len(task.low)) == ("Hopper-v4", 3234.3, 3)


@pytest.mark.parametrize("below", ["", "more/folders"])
def test_bad_folders_of_data_are_refused(below, refused, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for variable, row in (("D4RL_DATASET_DIR", "hopper-medium-v2"), ("MINARI_DATASETS_PATH", "pen-human-v1")):
        monkeypatch.setenv(variable, str(tmp_path / "file" / below))
        refused([*SHORT.split(), "--env", row], str(tmp_path / "file"))


CHANGED = "--seed=1 --variant=released --batch-size=9 --num-critics=3 --lcb-coef=1 --pessimism=min --entropy-coef=0"
CHANGED += " --num-diffusion-steps=6 --schedule=vp --loss=posterior --lr=0.01 --eta=2 --grad-norm=1 --max-q-backup"
CHANGED += " --no-clip-denoised --env=hopper-medium-v2 --hidden=9 --discount=0.9 --critic-lr=0.1 --target-rate=0.1"
CHANGED += " --ema-rate=1 --ema-every=2 --ema-start=5 --q-time=1"


@pytest.mark.slow
def test_bad_change_of_a_setting_is_refused_by_its_name_for_a_resumed_run_and_in_its_folder(refused, unfinished):
    for flag in CHANGED.split():
        name = flag.split("=")[0].replace("--no-", "--")
        refused([*RUN.split(), "--resume", flag], f" was made with {name} ", "give the same", folder=unfinished)
        first = "--" if name == "--env" else name  # which changes others
        refused([*RUN.split(), flag], f"another run, made with {first}", "give the same", folder=unfinished)
    refused(RUN.split(), f"{unfinished} exists: --resume goes on with it, --run-dir names another", folder=unfinished)
    flags = {flag.split("=")[0].replace("--no-", "--")[2:].replace("-", "_") for flag in CHANGED.split()}
    free = {"num_steps", "eval_every", "eval_episodes", "eval_candidates", "device", "compile", "precision"}
    places = {"dataset", "eval_env", "run_dir", "resume", "eval_only"}
    assert flags | free | places == {field.name for field in dataclasses.fields(Args)}, "every setting is thought of"


def test_resumed_run_of_ten_steps_may_be_given_its_q_time_again(tmp_path):
    """Its preset has five, of which 7 is none."""
    argv = ["--num-diffusion-steps", "10", "--q-time", "7"]
    assert run(tmp_path / "run", *argv, "--num-steps", "4") == 0
    for steps, more in ((5, []), (6, argv[2:]), (7, argv)):
        assert run(tmp_path / "run", "--resume", *more, "--num-steps", str(steps)) == 0


def test_bad_resume_where_nothing_is_says_so_and_starts_anew_where_told_what(refused, finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / ".part-checkpoint.pt").write_bytes(b"PK")  # as a killed process leaves it
    refused(["--resume"], str(tmp_path / "run" / "checkpoint.pt"), "--run-dir", "--env")
    assert run(tmp_path / "run", "--resume", "--env", "toy") == 0
    assert_same("begun by --resume", outcome(tmp_path / "run"), outcome(finished))


def test_bad_resume_past_the_end_or_on_other_data_or_another_kind_of_device_is_refused(refused, unfinished):
    refused(["--resume", "--num-steps", "11"], "at update 12", "--num-steps 11", folder=unfinished)
    refused(["--resume", "--dataset", "toy-21"], "made from other data", "toy-5", folder=unfinished)
    saved = checkpoint(unfinished)
    torch.save(saved | dict(args=saved["args"] | dict(device="cuda:1")), unfinished / "checkpoint.pt")
    refused(["--resume", "--device", "cpu"], "made on cuda:1", "--eval-only", folder=unfinished)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_bad_sizes_for_the_memory_are_refused_and_mistakes_keep_their_traceback(error, refused, monkeypatch):
    monkeypatch.setattr(erdp, "flatten", Mock(side_effect=error))
    refused(["--env", "toy"], "needs more memory than there is")
    monkeypatch.setattr(erdp, "flatten", Mock(side_effect=KeyError("a mistake")))
    with pytest.raises(KeyError, match="a mistake"):
        erdp.main(["--env", "toy"])


@pytest.mark.parametrize("name, argv", [("checkpoint.pt", ["--resume"]), ("policy.pt", ["--eval-only"])])
def test_bad_files_of_a_run_are_refused(name, argv, refused, unfinished):
    """They are cut short, of another version, lack something, or have weights of other sizes."""
    path, whole = unfinished / name, checkpoint(unfinished, name)
    argv, content = [*argv, str(path)] if name == "policy.pt" else argv, path.read_bytes()
    for keep in (0, 1, 1000, len(content) // 2, -1):
        path.write_bytes(content[:keep])
        refused(argv, str(path), "not whole", folder=unfinished)
    for form in (2, 4):  # 2: of the program before
        torch.save(whole | dict(format=form), path)
        refused(argv, f"{path} is no policy or checkpoint of this program", "another version", folder=unfinished)
    without = [{k: v for k, v in whole.items() if k != key} for key in whole]
    agents = [{k: v for k, v in whole["agent"].items() if k != key} for key in whole["agent"]]
    without += [whole | dict(agent=agent) for agent in agents] + [whole | dict(args=whole["args"] | dict(hidden=9))]
    for content in [*without, "a text"]:
        torch.save(content, path)
        refused(argv, str(path), folder=unfinished)


def test_bad_run_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(RUN.split(), "file", "--run-dir", folder=tmp_path / "file" / "run")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 0, "an empty folder is as good as none"


def test_help_shows_the_rows_own_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        erdp.main(["--env", "pen-human-v1", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "3e-05" in said
    assert all("--" + field.name.replace("_", "-") in said for field in dataclasses.fields(Args))


# ==== Real processes ==================================================================================================
PLAIN = dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")  # a terminal without Unicode
CPU = "--device cpu --num-steps 20 --eval-every 20 --eval-episodes 1 --run-dir run"
REAL = {  # arguments, environment variables, status, and what stderr must be
    "missing file": ("--env hopper-medium-v2 --dataset missing.hdf5", {}, 2, "erdp: missing.hdf5 .*"),
    "no renderer": ("--env hopper-medium-v2 --dataset a.h5", dict(MUJOCO_GL="osmesa"), 2, "erdp: a.h5 .*"),
    "no Unicode": ("--dataset ü.hdf5", PLAIN, 2, "erdp: .*hdf5 .*"),
    "no compiler": (f"{CPU} --compile", dict(CXX="no-compiler"), 2, "erdp: torch.compile .*--no-compile .*"),
    "no cache": (f"{CPU} --compile", dict(TORCHINDUCTOR_CACHE_DIR="/proc/none"), 2, "erdp: .*--no-compile .*"),
    "a run": (CPU, PLAIN, 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_processes_say_one_sentence_of_bad_input_or_nothing(name, tmp_path):
    argv, env, status, words = REAL[name]
    command = [sys.executable, erdp.__file__, *argv.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and re.fullmatch(f"{words}\n" if words else "", done.stderr), done
    if status:
        left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
        assert not left, "before anything is written"


def waited_for(condition, child=None):
    """Waits until the condition holds, which it returns, and no longer than the child runs."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline and not (child and child.poll() is not None), child and child.communicate()
        time.sleep(0.05)
    return found


TO_ONE, TO_ALL = os.kill, os.killpg
SIGNALS = {  # which signal comes to the process, or to its workers too; when, and the status
    "SIGINT": (signal.SIGINT, TO_ONE, "update", 130),
    "SIGTERM": (signal.SIGTERM, TO_ONE, "update", 143),
    "SIGKILL": (signal.SIGKILL, TO_ONE, "update", -9),
    "SIGINT to all": (signal.SIGINT, TO_ALL, "evaluation", 130),
    "SIGTERM to all": (signal.SIGTERM, TO_ALL, "evaluation", 143),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("name", SIGNALS)
def test_real_processes_end_with_their_workers_and_go_on(name, minari_root, tmp_path):
    number, send, when, status = SIGNALS[name]
    ours, theirs, dataset = tmp_path / "ours", tmp_path / "theirs", make_minari(made("Ledger"))
    argv = [*SHORT.split(), "--dataset", dataset]
    long = ["--eval-episodes", "1000000", "--eval-every", "3"] if when == "evaluation" else ["--eval-every", "1000000"]
    command = [sys.executable, erdp.__file__, *argv, "--run-dir", str(ours), "--num-steps", "1000000", *long]
    options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    options["env"] = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent))
    with subprocess.Popen(command, start_new_session=True, **options) as child, contextlib.ExitStack() as end:
        end.callback(child.kill)  # if anything fails
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        workers = waited_for(lambda: len(found := children.read_text().split()) >= 2 and found, child)
        waited_for(lambda: list(ours.glob("events*")), child)
        if when == "evaluation":
            waited_for(lambda: checkpoint(ours)["step"] == 3, child)
        time.sleep(1)
        send(child.pid, number)
        out, err = child.communicate(timeout=120)
    assert child.returncode == status, err
    waited_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    step = checkpoint(ours)["step"]
    if number == signal.SIGKILL:
        assert step == 0
    else:
        assert err == "" and re.search("stopped .*: --resume goes on from", out) and step > 0
    for folder, resume in ((ours, ["--resume"]), (theirs, [])):
        assert erdp.main([*argv, "--run-dir", str(folder), "--num-steps", str(step + 3), *resume]) == 0
    for key in ("agent", "generator"):
        assert_same(f"stopped at update {step}: {key}", checkpoint(ours)[key], checkpoint(theirs)[key])


@pytest.mark.slow
def test_readmes_own_environment_is_recorded_learned_and_acted_in_as_printed(tmp_path):
    """From ten recorded episodes of an own environment to a trained policy, by the README's blocks alone."""
    text = Path(erdp.__file__).with_name("README.md").read_text().partition("## Your own data and environment")[2]
    (environment, commands), folder = re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)[:2], tmp_path / "copy"
    folder.mkdir()
    shutil.copy(erdp.__file__, folder)
    (folder / "reach.py").write_text(environment)
    bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    there = os.environ | {"MINARI_DATASETS_PATH": str(tmp_path / "minari"), "PATH": bin_folder, "OMP_NUM_THREADS": "1"}
    for command in commands.splitlines():
        done = subprocess.run(command, shell=True, cwd=folder, env=there, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    result = json.loads((folder / "runs" / "mine-reach-v0__paper__0" / "result.json").read_text())
    assert result["steps"] == 400 and abs(float(done.stdout.strip("[]\n"))) <= 1, "it prints an action"


# ==== What a CUDA graph of `update` needs, without a GPU ==============================================================
IN_PLACE = ALGORITHM1 | {"bf16": dict(precision="bf16")}


class NoWaitNorDraw(TorchDispatchMode):
    """Refuses what waits for the device on CUDA, a value that Python reads or a shape that depends on values, and what
    draws random numbers."""

    REFUSED = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}
    REFUSED |= {"bincount", "pin_memory"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.REFUSED, f"{function} waits for the device"
        assert torch.Tag.nondeterministic_seeded not in function.tags, f"{function} draws inside the update"
        if name.startswith("index"):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if isinstance(args[1], list) else []
            assert not masks, f"{function} with a mask waits for the device"
        return function(*args, **(kwargs or {}))


class NoHostCopies(TorchFunctionMode):
    """Refuses what copies a tensor to the host: on the CPU such a copy does nothing, so no dispatch mode sees it."""

    REFUSED = {"cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "cuda"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        assert name not in self.REFUSED, f"{name} copies to the host"
        to_device = name == "to" and any(isinstance(x, str) for x in (*args[1:], *kwargs.values()))
        assert not to_device, "`to` names a device"
        return function(*args, **kwargs)


WAITS = ["x.sum().item()", "x[x > 0]", "bool(x.sum() > 0)", "x.nonzero()", "x.to('cpu')", "x.to(device='cpu')"]
WAITS += ["x.cpu()", "x.numpy()", "torch.zeros(3)[x.sum().long()]", "x.tolist()"]


@pytest.mark.parametrize("code", [*WAITS, "torch.randn(3)", "x.uniform_()"])
def test_update_checks_see_what_waits_or_draws(code):
    x = torch.ones(4)
    with pytest.raises(AssertionError), NoWaitNorDraw(), NoHostCopies():
        eval(code, dict(torch=torch, x=x))


def prepared(**choices):
    """(a function that makes one update in place, agent, noise, data, latest metrics), as a Run sets them up."""
    agent = tiny_agent(dtype=torch.float32, **choices)
    noise = random_noise(agent.args, torch.Generator().manual_seed(0))
    data, noise = (moved(values, "cpu", torch.float32) for values in (random_batch(100), noise))
    latest, rows = torch.zeros(len(erdp.METRICS)), torch.arange(agent.args.batch_size)

    def learn():
        measured = erdp.update(agent, Batch(*(column[rows] for column in data)), noise)
        latest.copy_(torch.stack([measured[name] for name in erdp.METRICS]))

    return learn, agent, noise, data, latest


def addresses(agent, noise, data, latest) -> dict:
    """data_ptr of every tensor that a replay reads or writes, by name."""
    tensors = dict(noise=noise, data=data, latest=latest, agent=agent.state_dict(), sde=vars(agent.sde))
    tensors |= {part: dict(getattr(agent, part).named_buffers()) for part in ("policy", "policy_ema")}
    leaves, _ = pytree.tree_flatten_with_path(tensors)
    return {pytree.keystr(path): x.data_ptr() for path, x in leaves if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("name", IN_PLACE)
def test_update_neither_waits_nor_draws_and_works_in_place_at_static_addresses(name):
    learn, *tensors = prepared(**IN_PLACE[name])
    learn()  # what is initialised on first use runs outside the graph too
    agent, noise, *_ = tensors
    before, values = addresses(*tensors), [p.detach().clone() for p in agent.critics.parameters()]
    drawn = torch.get_rng_state()
    for seed in range(3):
        erdp.sample_noise(noise, torch.Generator().manual_seed(seed))
        with NoWaitNorDraw(), NoHostCopies():
            learn()
    assert addresses(*tensors) == before and torch.equal(torch.get_rng_state(), drawn)
    assert any("exp_avg" in key for key in before) and any("sde" in key for key in before)
    assert not all(torch.equal(p, old) for p, old in zip(agent.critics.parameters(), values)), "something was learnt"
    assert agent.updates == 4


def test_update_works_at_the_same_addresses_after_a_checkpoint_was_loaded():
    (_, *tensors), (_, other, *_) = prepared(), prepared(entropy_coef=0.5)
    before = addresses(*tensors)
    tensors[0].load_state_dict(other.state_dict())
    after = addresses(*tensors)
    assert all(after[key] == where for key, where in before.items())


def test_captured_calls_run_thrice_on_a_stream_of_their_own_then_as_replays_of_one_capture(monkeypatch):
    """By the calls of torch.cuda, in their order."""
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    step = erdp.Captured(cuda.run)
    wait = ["current_stream", "Stream().wait_stream"], ["current_stream", "current_stream().wait_stream"]
    plain = [*wait[0], "stream", "stream().__enter__", "run", "stream().__exit__", *wait[1]]
    capture, replay = ["graph", "graph().__enter__", "run", "graph().__exit__"], ["CUDAGraph().replay"]
    for k, expected in enumerate([plain, plain, plain, capture + replay, replay, replay]):
        cuda.reset_mock()
        step()
        assert [name for name, *_ in cuda.mock_calls] == expected, f"call {k}"


@pytest.mark.parametrize("rows, inner, columns", [(256, 256, 256), (8, 39, 256), (2560, 55, 256), (3, 5, 2)])
@pytest.mark.parametrize("lead", [(), (1,), (64,)], ids=str)
def test_float32_products_stay_float32_whatever_library_makes_them(rows, inner, columns, lead, request):
    """bfloat16 factors would be wrong by 2**-9 an element, TF32 ones by 2**-12."""
    request.addfinalizer(functools.partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    erdp.use_device(Args())
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*lead, *size, generator=generator) for size in ((rows, inner), (inner, columns)))
    for x, y in ((a, b), (a.mT, a @ b), (a @ b, b.mT)):  # as in a forward and a backward pass
        exact = x.double() @ y.double()
        error, scale = (x @ y - exact).abs().max(), exact.square().mean().sqrt()
        assert error < 2**-14 * scale, "the products have float32's precision"


# ==== Compiled and captured updates, and CUDA =========================================================================
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@needs_cuda
@pytest.mark.parametrize("name", ALGORITHM1)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_cuda_losses_and_gradients_agree_with_the_cpus(name, dtype, tolerance):
    found = []
    for device in ("cpu", "cuda"):
        agent = tiny_agent(device, dtype, **ALGORITHM1[name])
        noise = random_noise(agent.args, torch.Generator().manual_seed(0))
        batch, noise = (moved(values, device, dtype) for values in (random_batch(4), noise))
        args, state = agent.args, batch.next_state.expand(noise.next_action.shape[1], -1, -1)
        action = erdp.sample_actions(agent.policy_ema, agent.sde, state, noise.next_action, args.clip_denoised)
        values = erdp.critic_loss(agent.critics, agent.critics_target, batch, state, action, args)
        values |= erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, values["q"], args)
        (values["critic_loss"] + values["policy_loss"]).backward()
        for part in ("policy", "critics"):
            values |= {f"gradient of {key} of {part}": p.grad for key, p in getattr(agent, part).named_parameters()}
        found.append({key: x.detach().cpu() for key, x in (values | {"next actions": action}).items()})
    for key, value in found[0].items():
        scale = 1 + float(value.abs().max())
        agree(f"{key}, CPU and CUDA, {dtype}", found[1][key], value, rtol=tolerance, atol=tolerance * scale)


def check_fast_updates(device, updates, capture=False, **choices):
    """Updates of a compiled or captured agent equal the eager ones, fed the same batches and noise, in float64."""
    eager, fast = tiny_agent(device, **choices | dict(compile=False)), tiny_agent(device, **choices)
    generator = torch.Generator().manual_seed(1)
    data, noise = moved(random_batch(100), device), moved(random_noise(eager.args, generator), device)
    rows = torch.zeros(eager.args.batch_size, dtype=torch.int64, device=device)
    latest = torch.zeros(len(erdp.METRICS), dtype=torch.float64, device=device)

    def measured(agent):
        found = erdp.update(agent, Batch(*(column[rows] for column in data)), noise)
        return torch.stack([found[name] for name in erdp.METRICS])

    def learn():
        latest.copy_(measured(fast))

    step = erdp.Captured(learn) if capture else learn
    for k in range(updates):
        rows.copy_(torch.randint(100, rows.shape, generator=generator))
        for buffer, fresh in zip(noise, random_noise(eager.args, generator)):
            buffer.copy_(fresh)
        step()
        agree(f"metrics of update {k}", latest.cpu(), measured(eager).cpu(), rtol=1e-7, atol=1e-9)
    assert fast.updates == eager.updates == updates
    for name in ("policy", "critics", "policy_ema", "critics_target"):
        for (key, ours), theirs in zip(getattr(fast, name).named_parameters(), getattr(eager, name).parameters()):
            agree(f"{key} of {name} after {updates} updates", ours.cpu(), theirs.cpu(), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_compiled_updates_are_the_eager_ones(device, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    choices = dict(compile=True, ema_start=3, max_q_backup=True, num_diffusion_steps=2)
    check_fast_updates(device, 12, capture=device == "cuda", **choices)


@needs_cuda
@pytest.mark.parametrize("name", ALGORITHM1)
def test_cuda_captured_updates_are_the_eager_ones(name):
    check_fast_updates("cuda", 100, capture=True, **dict(ema_start=20) | ALGORITHM1[name])
