"""`pytest -m paper --collect-only -q` lists what is proved of the paper, in its order, a claim a line: its equations
and schedules, the networks, Figure 2, Algorithm 1, Tables 1, 2 and 4, and what here goes beyond it. The other tests are
of the program around it.

What is expected of an equation does not come from the code under test. It is taken from SciPy's densities, simulations
of the SDE, Bayes' rule, finite differences, closed forms, or a slow second implementation written here, term by term
from the paper (the `literal_*` functions and `Algorithm1`). A test is named after the equation it proves, and its
message says what was expected of it.

Identities are drawn by Hypothesis (schedule, T, shapes, times, values) and hold in float64 to a relative 1e-10, or to
what their rounding allows. Monte-Carlo tests have fixed seeds, stand outside @given, and have a tolerance at which a
correct program fails for less than one seed in a million (RATE), shared among all comparisons of the test. Each says
which error it `sees`, and fails if it could miss such an error for more than one seed in a million.

`pytest -m "not slow"` is the quick part, which alone catches a wrong equation.
"""

import contextlib
import csv
import dataclasses
import functools
import http.server
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock, Mock, call

import filelock
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
from gymnasium.spaces import Box, Dict
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import erdp
from erdp import Agent, Args, Batch, MeanRevertingSDE, Noise, NoiseNetwork, QEnsemble

phases = set(Phase) - {Phase.explain}  # which would run a failing test for a minute more, and say little of tensors
slow = [HealthCheck.too_slow]
settings.register_profile("erdp", deadline=None, max_examples=30, suppress_health_check=slow, phases=phases)
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
    for table in ("SCHEDULES", "LOSSES", "ENTROPIES", "VARIANTS", "PESSIMISM"):
        for name in getattr(erdp, table.replace("ENTROPIES", "VARIANTS")):
            own(f"LITERAL_{table}", name)
    members_of(copied(QEnsemble(1, 1, 1, 1)))  # whose message says what a new critic wants


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


@st.composite
def cases(draw, first=1):
    """Times tau < t of a drawn SDE, one a row (B,), three tensors of values (B, A), and what the paper's symbols are
    there (B, 1): theta_bar_{tau:t}, theta'_t, theta_bar_t and theta_bar_{t-1}."""
    T, schedule = draw(st.integers(2, 100)), draw(st.sampled_from(SCHEDULES))
    B, A = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    t = np.array([draw(st.integers(first, T)) for _ in range(B)])
    tau = np.array([draw(st.integers(0, last - 1)) for last in t])
    x, y, z = torch.tensor(draw(arrays(np.float64, (3, B, A), elements=st.floats(-4, 4), fill=st.nothing())))
    prime, bar = literal_theta(schedule, T)
    between = np.array([math.fsum(prime[a + 1 : b + 1]) for a, b in zip(tau, t)])
    columns = dict(between=between[:, None], prime=prime[t, None], bar=bar[t, None], before=bar[t - 1, None])
    times = dict(theta_bar=bar, tau=torch.tensor(tau), t=torch.tensor(t))
    return SimpleNamespace(sde=sde64(T, schedule), x=x, y=y, z=z, **times, **columns)


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
def test_eq02_log_density_is_scipys(case):
    law = norm(np.exp(-case.between) * case.y.numpy(), np.sqrt(-np.expm1(-2 * case.between)))
    expected = law.logpdf(case.x.numpy()).sum(-1)
    agree("log_prob: SciPy's, summed over dimensions", case.sde.log_prob(case.x, case.y, case.tau, case.t), expected)


def test_sde_rejects_ints_off_its_grid_times_that_descend_too_few_steps_and_bad_schedules(monkeypatch):
    sde, x = sde64(), torch.zeros(2)
    for tau, t in ((2, 1), (-1, 3), (0, 6)):
        with pytest.raises(ValueError, match=f"{tau} and {t} must ascend, from 0 to T = 5"):
            sde.transition(tau, t)
    with pytest.raises(ValueError, match="must ascend"):
        sde.reverse_sde_step(x, 0, x, x)
    with pytest.raises(ValueError, match="num_steps is 1"):
        MeanRevertingSDE(1)
    with pytest.raises(ValueError, match="schedule is 'sine'.*" + ", ".join(SCHEDULES)):
        MeanRevertingSDE(5, "sine")
    for first in (0.0, math.nan):
        monkeypatch.setitem(erdp.SCHEDULES, "sine", lambda k, T, first=first: np.array([first, 1, 2, 3, 4]))
        with pytest.raises(ValueError, match="schedule 'sine' is not positive"):
            MeanRevertingSDE(5, "sine")


@settings(max_examples=10)
@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_sde_coefficients_are_computed_in_float64_and_rounded(T, schedule):
    t = torch.arange(1, T + 1)

    def coefficients(sde):
        """Each equation's, as of x, y and z one is 1 and the others are 0."""
        yield from sde.transition(0, t)
        for x, y, z in torch.eye(3, dtype=sde.dtype)[..., None, None].expand(3, 3, T, 1):
            yield from sde.posterior(x, y, t)
            yield from (sde.diffuse(x, t, y), sde.predict_x0(x, t, y), sde.reverse_sde_step(x, t, y, z))

    for found, exact in zip(coefficients(MeanRevertingSDE(T, schedule)), coefficients(sde64(T, schedule))):
        assert found.dtype == torch.float32
        agree("one coefficient, rounded", found, exact.float(), rtol=3e-7, atol=0)
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


# Each takes the SDE's symbols (B, 1) and arrays (B, A).
LITERAL_LOSSES = dict(
    noise=lambda prime, bar, before, x_0, x_t, eps, eps_hat: ((eps_hat - eps) ** 2).mean(),
    likelihood=literal_likelihood_loss,
    posterior=literal_posterior_loss,
)


@given(cases(), st.sampled_from([*erdp.LOSSES]))
def test_eq05_eq30_and_eq40_each_loss_is_a_literal_one(case, name):
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    symbols = *map(torch.tensor, (case.prime, case.bar, case.before)), case.x, x_t, case.y, case.z
    found, expected = erdp.LOSSES[name](case.sde, case.x, x_t, case.t, case.y, case.z), own("LITERAL_LOSSES", name)
    agree(f"loss {name}", found, expected(*symbols), rtol=1e-8)


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
    with pytest.raises(ValueError):
        erdp.sample_actions(rough_network, sde64(T, schedule), state, noise[1:])


def test_eq10_samples_approach_a_mixture_as_the_steps_grow():
    """Each distance is known to half of `tolerance`, by the Dvoretzky-Kiefer-Wolfowitz bound on samples in [-2, 2]."""
    n, x, steps = 100_000, np.linspace(-2, 2, 4001), (3, 5, 10)
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
VARIANTS = [*erdp.VARIANTS]


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


# The entropy h (B,) that each variant adds, from theta' and theta_bar over t = 0..T, each row's time, a^0-hat, the
# predicted noise and a^T.
LITERAL_ENTROPIES = dict(
    paper=lambda prime, bar, t, a_0, eps_hat, a_T: -literal_log_prob("paper", prime, bar, a_0, eps_hat, a_T),
    released=lambda prime, bar, t, a_0, eps_hat, a_T: -literal_log_prob("released", prime, bar, a_0, eps_hat, a_T),
    debruijn=lambda prime, bar, t, a_0, eps_hat, a_T: literal_entropy(prime, bar, t, eps_hat),
)
# Eq. 15 of alpha, lambda, L_diff, Q's value, the entropy's mean, the number of action dimensions and the mean of
# the entropy's magnitude.
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
    a_0: torch.Tensor  # Eq. 8

    def loss(self, **changes):
        """erdp's policy loss, the prediction standing in for the policy."""
        p = self._replace(**changes)
        return erdp.policy_loss(lambda *_: p.eps_hat, p.critics, p.sde, p.batch, p.noise, p.q_data, p.args)

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
    return Problem(args, sde64(T, args.schedule), critics, batch, noise, q_data, eps_hat, a_0)


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
    entropy = own("LITERAL_ENTROPIES", args.variant)(prime, bar, t, a_0, eps_hat, noise.a_T)
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


SCALING = [options for options in OPTIONS if options["pessimism"] in ("lcb", "min")]  # values that scale with Q


@given(st.sampled_from(SCALING), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_eq12_q_terms_gradient_does_not_change_with_the_scale_of_q(options, c, seed):
    p = problem(seed, entropy_coef=0.0, **options)
    gradient = p.gradient(critics=lambda *given, **flags: c * p.critics(*given, **flags), q_data=c * p.q_data)
    agree("Eq. 12: lambda takes out the scale of Q", gradient, p.gradient(), rtol=1e-8)


def test_eq12_alpha_zero_removes_the_entropy_term_exactly():
    """It does even where the entropy is infinite."""
    for variant in ("paper", "released"):
        p = problem(variant=variant, entropy_coef=0.0)
        infinite = p.noise._replace(a_T=p.noise.a_T * math.inf)
        assert not p.loss(noise=infinite)["entropy"].isfinite(), f"{variant}: the entropy depends on a_T"
        agree(f"{variant}: loss", p.loss(noise=infinite)["policy_loss"], p.loss()["policy_loss"], rtol=0, atol=0)
        agree(f"{variant}: gradient", p.gradient(noise=infinite), p.gradient(), rtol=0, atol=0)


def last_step(network, a_1, T=5):
    """log abs(d a^0 / d a^1) of the sampler's last step, by central differences."""
    h, t = 1e-5, torch.ones(len(a_1), dtype=torch.int64)
    below, above = (sde64(T).predict_x0(a, 1, network(a, t, None)) for a in (a_1 - h, a_1 + h))
    return torch.log(torch.abs(above - below) / (2 * h))


@given(st.sampled_from([2, 5, 20]), st.floats(-0.5, 0.5), st.floats(0.1, 1))
def test_eq13_holds_with_a_constant_for_a_gaussian_policy(T, mean, width):
    """log pi(a^1) - log pi(a^0) is log abs(d a^0 / d a^1), by the change of variables of the last step."""
    _, bar = literal_theta("cosine", T)
    network = analytic_predictor(bar, np.ones(1), np.array([mean]), np.array([width]))
    log_slope = last_step(network, torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None], T)
    decay, var = math.exp(-bar[1]), width**2
    expected = math.log(decay * var / (decay**2 * (var - 1) + 1))  # of E(a^0 | a^1), by Bayes' rule
    agree("Eq. 13: the same at every point", log_slope, np.full((13, 1), expected), atol=1e-5)


def test_eq13_does_not_hold_for_a_mixture():
    network, a_1 = analytic_predictor(literal_theta("cosine", 5)[1]), torch.linspace(-1, 1, 41, dtype=torch.float64)
    log_slope = last_step(network, a_1[:, None])
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
    expected = literal_policy_loss(p.args, members_of(copied(p.critics)), p.batch, p.noise, p.q_data, eps_hat)
    (slope,) = torch.autograd.grad(expected["policy_loss"], eps_hat)
    size, found = 1e-9 * (1 + float(slope.abs().max())), p.loss()
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        agree(f"Eq. 15: {name}", found[name], reference, rtol=1e-8, atol=1e-9)
    agree("Eq. 15: gradient to the predicted noise", p.gradient(), slope, rtol=1e-8, atol=size)


def test_eq15_gradient_equals_finite_differences():
    """Not of "released": there a magnitude that its gradient holds constant depends on the prediction."""
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


# ==== In place of Eq. 14: the entropy by de Bruijn's identity =========================================================
@given(st.integers(2, 200), st.sampled_from(SCHEDULES), st.floats(-1, 1))
@example(2, "constant", 1.0)  # x_1 is Gaussian already
def test_debruijn_sum_ends_where_x_t_is_gaussian_to_within_a_hundredth_nat(T, schedule, action):
    """Of one action in [-1, 1]: KL of x_t from the standard Gaussian, and what its entropy lacks, by SciPy."""
    (prime, bar), used = literal_theta(schedule, T), erdp.entropy_weights(sde64(T, schedule)).numpy() > 0

    def lacks(t, action):
        law = norm(math.exp(-bar[t]) * action, math.sqrt(-math.expm1(-2 * bar[t])))
        kl = 0.5 * math.log(2 * math.pi) + 0.5 * (law.var() + law.mean() ** 2) - law.entropy()
        return kl, STANDARD - law.entropy()

    last = last_used(bar)
    assert used.tolist() == [t <= last for t in range(1, T + 1)]
    assert last == T or max(lacks(last + 1, action)) < 0.01, "x_t after the last time"
    assert last == 1 or min(lacks(last, 1.0)) >= 0.01 - 1e-12, "at the last time an action on the bounds is still seen"
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
        noise = SimpleNamespace(t=times)
        rows = erdp.debruijn_entropy(sde64(T, schedule), None, predictor(x, times, None), noise)
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
    """Of the data's and the policy's Gaussian (mean, deviation), with CE(p, q) = -E_p log q in closed form."""
    for p, q in (((0.0, 0.3), (0.0, 0.5)), ((0.1, 0.4), (-0.3, 0.25)), ((0.0, 0.3), (0.4, 0.3))):

        def twice_h_less_ce(bar, p=p, q=q):
            (at, var), (mean, spread) = ((math.exp(-bar) * m, math.exp(-2 * bar) * (s**2 - 1) + 1) for m, s in (p, q))
            ce = 0.5 * math.log(2 * math.pi * spread) + (var + (at - mean) ** 2) / (2 * spread)
            return 2 * (STANDARD + 0.5 * math.log(spread)) - ce

        errors, data = [], (np.ones(1), np.array([p[0]]), np.array([p[1]]))
        for T in (200, 400):
            bar = literal_theta("cosine", T)[1]
            end = STANDARD - twice_h_less_ce(bar[last_used(bar)])
            errors.append(of_mixture(T, [1.0], [q[0]], [q[1]], data=data) - twice_h_less_ce(0.0) - end)
        assert abs(errors[1]) < 0.08, f"{p}, {q}: the grid's error"
        agree(f"{p}, {q}: up to the grid's error of first order", 2 * errors[1] - errors[0], 0.0, atol=2e-3)
        assert abs(twice_h_less_ce(0.0) - norm(*q).entropy()) > 0.1, f"{p}, {q}: which is not H(q)"


def test_debruijn_minimiser_without_q_divides_the_noise():
    """By 1 + alpha T w_t: a smaller predicted noise is a larger entropy."""
    for T, schedule, alpha in ((5, "cosine", 0.0), (5, "cosine", 1.0), (5, "linear", 0.1), (8, "vp", 1.0)):
        choices = dict(variant="debruijn", entropy_coef=alpha, eta=0.0, num_diffusion_steps=T, schedule=schedule)
        p, (prime, bar) = problem(B=20, **choices), literal_theta(schedule, T)
        assert set(p.noise.t.tolist()) == set(range(1, T + 1)), f"{choices}: every time is drawn"
        weight = [prime[t] / (1 - math.exp(-2 * bar[t])) if t <= last_used(bar) else 0.0 for t in p.noise.t.tolist()]
        best = p.noise.eps / (1 + alpha * T * torch.tensor(weight, dtype=torch.float64))[:, None]
        agree(f"{choices}: no gradient at the minimiser", p.gradient(eps_hat=best), 0 * best, atol=1e-12)
        assert (p.gradient(eps_hat=best + 0.1) > 0).all() and (p.gradient(eps_hat=best - 0.1) < 0).all(), "a minimum"


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
    y = literal_targets(members_of(copied(target)), batch, next_action, discount, pessimism)
    expected = literal_q_of(members_of(copied(critics)), batch.state, batch.action)
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
@given(st.sampled_from([*erdp.PESSIMISM]), st.integers(1, 8), st.floats(0, 9), st.integers(0, 999))
def test_eq17_is_the_mean_less_beta_deviations(name, M, beta, seed):
    """With divisor M, or M - 1 as the released code has it, and over the members alone: in acting Q is (M, N, C)."""
    q = gaussian(M, 3, 4, seed=seed)
    for variant in VARIANTS:
        args = Args(pessimism=name, variant=variant, lcb_coef=beta)
        expected = torch.stack([own("LITERAL_PESSIMISM", name)(q[:, n], args) for n in range(3)])
        agree(f"Eq. 17, {name}, {variant}: (M, N, C) -> (N, C)", erdp.pessimistic_value(q, args), expected, atol=1e-9)


def test_eq17_has_the_means_gradient_where_members_agree():
    for unbiased in (False, True):
        value_of = functools.partial(erdp.lcb, beta=4.0, unbiased=unbiased)
        case = f"divisor M - {int(unbiased)}"
        for dtype in (torch.float64, torch.float32):
            q = torch.full((4, 3), 0.7, dtype=dtype)
            q[:, 1] = gaussian(4)
            value_of(q.requires_grad_()).sum().backward()
            agree(f"Eq. 17: gradient at equal members, {case}", q.grad[:, [0, 2]], np.full((4, 2), 1 / 4))
        elsewhere = torch.autograd.gradcheck(value_of, gaussian(4, 3).requires_grad_(), raise_exception=False)
        assert elsewhere, f"Eq. 17: gradient elsewhere, {case}"


# Each takes q (M, B) and loops over the members.
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
    network = NoiseNetwork(S, A, hidden)
    x_t, t, state = gaussian(*lead, A, seed=seed), torch.randint(1, 101, lead), gaussian(*lead, S, seed=seed + 1)
    rows = x_t.reshape(-1, A), t.reshape(-1), state.reshape(-1, S)
    weights = {name: p.double() for name, p in copied(network).items()}
    expected, single = literal_noise_network(weights, *rows).reshape(*lead, A), network(x_t.float(), t, state.float())
    assert single.dtype == torch.float32
    agree("NoiseNetwork in float32", single, expected, rtol=1e-5, atol=2e-6)
    agree("NoiseNetwork", network.double()(x_t, t, state), expected)


def test_noise_network_has_the_papers_sizes_and_pytorchs_initialisation():
    torch.manual_seed(0)
    network = NoiseNetwork(11, 3)
    torch.manual_seed(0)
    sizes = (16, 32), (32, 16), (30, 256), (256, 256), (256, 256), (256, 3)
    layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in sizes)
    for ours, theirs in zip(network.parameters(), layers.parameters(), strict=True):
        agree("as PyTorch makes a layer of this size", ours, theirs, rtol=0, atol=0)


OF_A_MEMBER = [f"{kind}.{layer}" for kind in ("weights", "biases") for layer in range(4)]  # what `literal_q` reads


def copied(module, requires_grad=False) -> dict:
    """Its parameters by name."""
    return {name: p.detach().clone().requires_grad_(requires_grad) for name, p in module.named_parameters()}


def members_of(named) -> list[dict]:
    """Of the ensemble's parameters by name those of each member on its own, with which `literal_q` computes."""
    assert [*named] == OF_A_MEMBER, (
        f"the critics are new here: write in `literal_q` how one member's Q is computed from {[*named]}, as an "
        "independent formula, in OF_A_MEMBER these names, and in `members_of` which of them a member has; the tests "
        "of the old ones' sizes and of bf16, and results/benchmark.py, read the old ones' layers"
    )
    return [{name: p[m] for name, p in named.items()} for m in range(len(named[OF_A_MEMBER[0]]))]


@settings(max_examples=20)
@given(st.integers(1, 5), LEADING, *[st.integers(1, 4)] * 2, st.integers(2, 9), st.integers(0, 999))
def test_ensemble_equals_separate_networks_over_any_leading_axes(M, lead, S, A, hidden, seed):
    torch.manual_seed(seed)
    critics = QEnsemble(S, A, M, hidden).double()
    state, weight = gaussian(*lead, S, seed=seed), gaussian(M, *lead, seed=seed + 1)
    action, named = gaussian(*lead, A, seed=seed + 2).requires_grad_(), copied(critics, requires_grad=True)
    expected = literal_q_of(members_of(named), state.reshape(-1, S), action.reshape(-1, A)).reshape(M, *lead)
    slopes = torch.autograd.grad((expected * weight).sum(), [action, *named.values()])
    q, frozen = critics(state, action), critics(state, action, frozen=True)
    agree("QEnsemble (M, ...), state before action (of new critics, `literal_q` has the formula)", q, expected)
    assert torch.equal(frozen, q), "frozen does not change the values"
    found = torch.autograd.grad((q * weight).sum(), [action, *critics.parameters()])
    for name, ours, theirs in zip(["the action", *named], found, slopes):
        agree(f"QEnsemble: gradient to {name}", ours, theirs)
    (frozen * weight).sum().backward()
    agree("QEnsemble: gradient to the action, frozen", action.grad, slopes[0])
    assert all(p.grad is None for p in critics.parameters()), "frozen: no gradient reaches the weights"


def test_precision_bf16_rounds_the_factors_and_the_products_between_hidden_layers_and_nothing_else():
    torch.manual_seed(0)
    critics, exact = QEnsemble(3, 2, 4, 16, bf16=True), QEnsemble(3, 2, 4, 16)
    exact.load_state_dict(critics.state_dict())
    state, action = (gaussian(6, n, seed=n).float().requires_grad_() for n in (3, 2))
    q, q_exact, expected = critics(state, action), exact(state, action), []
    for member in members_of(copied(critics)):
        h = F.mish(torch.cat([state, action], 1) @ member["weights.0"] + member["biases.0"])
        for layer in (1, 2):
            product = (h.bfloat16() @ member[f"weights.{layer}"].bfloat16()).float()
            h = F.mish(product + member[f"biases.{layer}"])
        expected.append((h @ member["weights.3"] + member["biases.3"])[:, 0])
    step = 2**-8 * (q_exact - critics.biases[3][:, 0]).abs().max().item()  # a tie may be rounded either way
    agree("QEnsemble in bfloat16", q, torch.stack(expected), rtol=0, atol=step / 8)
    assert step / 100 < (q - q_exact).abs().max() < 4 * step, "the flag has an effect, and a small one"
    torch.autograd.grad(q.sum(), [action, *critics.parameters()])  # which fails where one has no gradient


def test_ensemble_has_the_papers_sizes_and_the_released_initialisation():
    torch.manual_seed(0)
    critics = QEnsemble(40, 2, 8)
    assert [tuple(p.shape) for p in critics.weights] == [(8, 42, 256), (8, 256, 256), (8, 256, 256), (8, 256, 1)]
    assert [tuple(p.shape) for p in critics.biases] == [(8, 1, 256), (8, 1, 256), (8, 1, 256), (8, 1, 1)]
    for weight in critics.weights[:3]:
        law = scipy.stats.uniform(-1 / 16, 1 / 8)
        assert_law("hidden weights, the first layer's too", weight, law, sees=0.03, comparisons=5)
    assert all((bias == 0.1).all() for bias in critics.biases[:3]), "hidden biases are 0.1"
    for weight in QEnsemble(40, 2, 8, 16).weights[:3]:
        assert 0.24 < weight.abs().max() <= 0.25, "of another width, hidden weights within 1 / sqrt(width)"
    last = scipy.stats.uniform(-3e-3, 6e-3)
    assert_law("last weights", critics.weights[3], last, sees=0.13, comparisons=5)
    assert_law("last biases", QEnsemble(1, 1, 1000, 4).biases[3], last, sees=0.18, comparisons=5)
    assert len(critics.weights[3].unique()) > 2000, "members differ"


def test_mishs_compiled_formula_equals_pytorchs(monkeypatch):
    points = torch.cat([torch.linspace(-100, 100, 801), torch.linspace(-3, 3, 61), torch.tensor([1e4, -1e4])])
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        x, y = (points.to(dtype).requires_grad_() for _ in range(2))
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            value, expected = erdp.mish(x), F.mish(y)
        agree(f"mish, as it is compiled, {dtype}", value, expected, rtol=tolerance, atol=1e-37)
        (slope,), (expected,) = torch.autograd.grad(value.sum(), x), torch.autograd.grad(expected.sum(), y)
        agree(f"its gradient, {dtype}", slope, expected, rtol=tolerance, atol=10 * tolerance)


# ==== Section 4.1: acting =============================================================================================
def test_acting_takes_at_any_u_the_first_candidate_whose_cumulative_share_exceeds_it():
    quarters, tenths, first_is_out = [0.0] * 4, [5e4] * 10, [-math.inf, 0.0, 0.0]
    last = np.nextafter(1, 0)  # which ten rounded shares of 0.1 do not exceed
    edges = [(quarters, u, n) for u, n in ((0.0, 0), (np.nextafter(0.25, 0), 0), (0.25, 1), (0.75, 3), (last, 3))]
    edges += [([0.0] * 3, 1 / 3, 1), (tenths, last, 9), (first_is_out, 0.0, 1)]  # 1/3 is larger in float32
    value = [0.3, -1.0, 1.2, 0.5]
    for n, share in enumerate(np.cumsum(scipy.special.softmax(value))[:-1]):
        edges += [(value, share - 1e-6, n), (value, share + 1e-6, n + 1)]
    for value, u, expected in edges:
        candidates, column = torch.arange(len(value))[None, :, None], torch.tensor([[u]], dtype=torch.float64)
        found = erdp.choose_action(candidates, torch.tensor([value]), column).item()
        assert found == expected, f"u = {u}, values {value}: {found}, expected {expected}"


def actor_of(candidates=6, **choices) -> erdp.Actor:
    """It acts in states of three numbers, which the environment has as a dict, by members that differ."""
    torch.manual_seed(0)
    agent = Agent(3, 2, Args(hidden=32, num_critics=3, eval_candidates=candidates, **choices))
    for p in agent.critics_target.parameters():
        p.copy_(0.5 * torch.randn(p.shape))
    return erdp.Actor(agent, dict(a=[1], b=[2, 1]), [-1, 0], [3, 0.5])


def literal_action(actor, state, stream):
    """The action (2,) in one state (3,) by its stream's numbers, and the largest chance that a candidate has."""
    agent, args = actor.agent, actor.agent.args
    noise = torch.tensor(stream.standard_normal((5, args.eval_candidates, 2), np.float32)).double()
    states = torch.tensor(state).expand(args.eval_candidates, -1)
    network = functools.partial(literal_noise_network, copied(agent.policy.double()))
    members = members_of(copied(agent.critics_target.double()))
    with torch.no_grad():
        actions = literal_sample(network, "cosine", 5, states, noise, args.clip_denoised, True)
        value = own("LITERAL_PESSIMISM", args.pessimism)(literal_q_of(members, states, actions), args)
    share = scipy.special.softmax(value.numpy())
    chosen = np.searchsorted(np.cumsum(share), stream.random()) if len(share) > 1 else 0
    return np.array([-1, 0]) + (actions[chosen].numpy() + 1) / 2 * np.array([4, 0.5]), share.max()


def check_actor(claim, actor, N=30):
    states = np.random.default_rng(0).normal(size=(N, 3))
    streams, same = ([np.random.default_rng(n) for n in range(N)] for _ in range(2))
    found = actor(states, streams)
    expected, shares = zip(*(literal_action(actor, state, stream) for state, stream in zip(states, same)))
    agree(claim, found, np.array(expected), rtol=1e-3, atol=1e-3)
    assert [s.random() for s in streams] == [s.random() for s in same], f"{claim}: no other number is drawn"
    return shares


def test_acting_draws_a_candidate_by_softmax_over_its_pessimistic_value():
    for choices in (dict(lcb_coef=0.7), dict(lcb_coef=0.7, variant="released"), dict(pessimism="min")):
        shares = check_actor(f"actions, {choices}", actor_of(**choices))
        assert 0.3 < np.mean(shares) < 0.9, "the values matter, and so does chance"


@pytest.mark.parametrize("clip_denoised", [True, False], ids=["action clip", "none"])
def test_acting_samples_by_eq10_from_the_policy_clipped_as_in_training(clip_denoised):
    """One candidate a state, with the stream's Gaussians as x_T and the noise of the steps that follow."""
    check_actor("actions", actor_of(1, clip_denoised=clip_denoised))


# ==== Algorithm 1 =====================================================================================================
class Adam:
    """PyTorch's, after clipping the gradients of all parameters as one vector."""

    def __init__(self, parameters, lr):
        self.parameters, self.adam = parameters, torch.optim.Adam(parameters, lr, (0.9, 0.999), 1e-8, fused=False)

    def descend(self, loss, max_norm):
        gradients = torch.autograd.grad(loss, self.parameters)
        length = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for p, g in zip(self.parameters, gradients):
            p.grad = g * min(1.0, max_norm / (length + 1e-6))
        self.adam.step()


def follow(target: dict, source: dict, rate: float) -> dict:
    return {name: rate * source[name] + (1 - rate) * p for name, p in target.items()}


class Algorithm1:
    """A literal second implementation, from an agent's initial parameters; nothing of erdp.py computes in it."""

    def __init__(self, agent: Agent):
        self.args, self.updates = agent.args, int(agent.updates)
        self.policy, self.policy_ema = copied(agent.policy, requires_grad=True), copied(agent.policy_ema)
        self.critics, self.critics_target = copied(agent.critics, requires_grad=True), copied(agent.critics_target)
        self.policy_adam = Adam([*self.policy.values()], self.args.lr)
        self.critic_adam = Adam([*self.critics.values()], self.args.critic_lr)

    def update(self, batch, noise):
        args, T, B = self.args, self.args.num_diffusion_steps, len(batch.state)
        # next actions, at s_{i+1}, by the EMA policy
        candidates = []
        for c in range(10 if args.max_q_backup else 1):
            network = functools.partial(literal_noise_network, self.policy_ema)
            given = batch.next_state, noise.next_action[:, c], args.clip_denoised, True
            candidates.append(literal_sample(network, args.schedule, T, *given))
        y = literal_targets(members_of(self.critics_target), batch, candidates, args.discount, args.pessimism)
        q = literal_q_of(members_of(self.critics), batch.state, batch.action)
        q_loss = ((q - y) ** 2).sum() / (B * len(q))
        self.critic_adam.descend(q_loss, args.grad_norm)
        # the policy, against the updated Q
        bar = literal_theta(args.schedule, T)[1][noise.t.numpy()]
        scale, std = (torch.tensor(c)[:, None] for c in (np.exp(-bar), np.sqrt(1 - np.exp(-2 * bar))))
        eps_hat = literal_noise_network(self.policy, scale * batch.action + std * noise.eps, noise.t, batch.state)
        terms = literal_policy_loss(args, members_of(self.critics), batch, noise, q.detach(), eps_hat)
        self.policy_adam.descend(terms["policy_loss"], args.grad_norm)
        # the target networks
        with torch.no_grad():
            if self.updates >= args.ema_start and self.updates % args.ema_every == 0:
                self.policy_ema = follow(self.policy_ema, self.policy, args.ema_rate)
            self.critics_target = follow(self.critics_target, self.critics, args.target_rate)
        self.updates += 1
        return dict(critic_loss=q_loss.detach(), q=q.mean().detach()) | {k: v.detach() for k, v in terms.items()}

    def compare(self, agent: Agent, claim: str):
        for name in ("policy", "policy_ema", "critics", "critics_target"):
            for key, p in getattr(agent, name).named_parameters():
                agree(f"{claim}: {name}, {key}", p, getattr(self, name)[key], rtol=1e-9)
        for name in ("exp_avg", "exp_avg_sq"):
            pairs = (self.policy_adam, agent.policy_optimizer), (self.critic_adam, agent.critic_optimizer)
            for ours, theirs in pairs:
                for p, of_erdp in zip(ours.parameters, theirs.param_groups[0]["params"]):
                    found, expected = theirs.state[of_erdp][name], ours.adam.state[p][name]
                    agree(f"{claim}: {name}", found, expected, rtol=1e-8, atol=1e-13)


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
    "other rates": dict(discount=0.9, target_rate=0.1, ema_rate=0.2, ema_every=3, ema_start=2, critic_lr=1e-2),
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


def test_algorithm1_agent_has_the_papers_networks_and_optimisers():
    others = dict(schedule="vp", num_diffusion_steps=7, hidden=9, critic_lr=0.1, precision="bf16", num_critics=2)
    for args in (erdp.preset("pen-human-v1", device="cpu"), Args(**others)):
        agent = Agent(11, 3, args)
        agree("the agent's SDE", agent.sde.theta_bar, literal_theta(args.schedule, args.num_diffusion_steps)[1])
        assert agent.updates == 0 and agent.sde.dtype == torch.float32
        assert agent.policy.layers[0].weight.shape == (args.hidden, 30) and agent.policy.layers[3].out_features == 3
        assert agent.critics.weights[0].shape == (args.num_critics, 14, args.hidden)
        assert agent.critics.bf16 == agent.critics_target.bf16 == (args.precision == "bf16")
        policies, critics = (agent.policy, agent.policy_ema), (agent.critics, agent.critics_target)
        optimizers = (agent.policy_optimizer, args.lr), (agent.critic_optimizer, args.critic_lr)
        for (module, target), (optimizer, lr) in zip((policies, critics), optimizers):
            for p, other in zip(module.parameters(), target.parameters()):
                assert torch.equal(p, other), "targets begin as copies"
                assert p.requires_grad and not other.requires_grad and p.data_ptr() != other.data_ptr()
            (group,) = optimizer.param_groups
            assert type(optimizer) is torch.optim.Adam and group["lr"] == lr, "Table 4's rate is the policy's"
            assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
            assert group["fused"] and not group["capturable"], "nothing is captured on a CPU"
            assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]


def test_algorithm1_optimisers_can_be_captured_on_any_gpu(monkeypatch):
    adam = Mock()
    monkeypatch.setattr(torch.optim, "Adam", adam)
    monkeypatch.setattr(torch, "zeros", Mock())
    for name in ("NoiseNetwork", "QEnsemble", "MeanRevertingSDE"):
        monkeypatch.setattr(erdp, name, MagicMock())
    for device, capturable in (("cuda", True), ("cuda:1", True), ("cpu", False)):
        Agent(3, 2, Args(), device)
        assert [made.kwargs["capturable"] for made in adam.call_args_list[-2:]] == [capturable] * 2, device


def test_algorithm1_draws_times_and_gaussians_of_their_laws():
    noise = erdp.noise_buffers(Args(batch_size=60_000), 1, "cpu")
    places = [part.data_ptr() for part in noise]
    erdp.sample_noise(noise, torch.Generator().manual_seed(0))
    assert [part.data_ptr() for part in noise] == places, "the buffers are filled in place"
    p, counts = np.full(5, 0.2), noise.t.bincount()[1:]
    assert noise.t.min() == 1, "times begin at 1"
    assert_counts("times are uniform on 1..T", counts, p, 0.975 * p + 0.025 * np.eye(5), comparisons=12)
    gaussians = [noise.eps, noise.a_T, *noise.next_action[:, 0]]
    for gaussian_part in gaussians:
        assert_law("standard Gaussian noise", gaussian_part, norm, sees=0.03, comparisons=12)
    products = torch.stack([a * b for k, a in enumerate(gaussians) for b in gaussians[:k]], -1)
    assert_mean("the noises are independent", products, 0.0, sees=0.05, comparisons=3)


def test_algorithm1_draws_rows_uniformly_with_replacement_by_the_runs_own_generator(tmp_path, monkeypatch):
    """Of 100 rows, what `train` draws; without replacement their counts would differ too little."""
    argv = [*in_made(d4rl_file(tmp_path / "a.hdf5", 101)), "--batch-size", "5000", "--num-steps", "20"]
    seen = []
    for name in ("ours", "other"):

        def update(agent, batch, noise, name=name):
            torch.rand(1 + (name == "other"))  # what others draw does not matter
            seen.append((batch.state[:, 0].long(), noise.t.clone()))
            return losses()

        monkeypatch.setattr(erdp, "update", update)
        assert learn(tmp_path / name, *argv, "--eval-every", "20") == 0
    rows, times = (torch.stack(drawn) for drawn in zip(*seen))
    assert torch.equal(rows[:20], rows[20:]) and torch.equal(times[:20], times[20:])
    counts, p = rows[:20].ravel().bincount(minlength=100), np.full(100, 0.01)
    one_less_likely = p + 0.006 / 99 - 0.006 * (1 + 1 / 99) * np.eye(100)[[0, 50, 99]]
    assert_counts("rows are uniform", counts, p, one_less_likely, comparisons=2)
    assert ((counts - 1000) ** 2 / 1000).sum() > scipy.stats.chi2.ppf(RATE / 2, 99), "they are drawn with replacement"


@functools.cache
def learned_on_the_toy(eta):
    """Agent, data and their return after a short run on the toy with a fifth of good steps, and the policy's mean
    return, no action being chosen by Q."""
    small = dict(num_critics=2, hidden=32, num_diffusion_steps=3, batch_size=128, eval_candidates=1, eval_episodes=1)
    fast = dict(lr=2e-3, critic_lr=1e-2, target_rate=0.05, num_steps=800, eval_every=800)
    args = dataclasses.replace(erdp.preset("toy", device="cpu"), dataset="toy-20", **small, **fast)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp, "check_settings", lambda args: None)
        args.eta, args.run_dir = eta, folder  # below 0, which is refused, the policy loss has Q with the other sign
        assert erdp.train(args) == 0
        saved = checkpoint(Path(folder))
    agent = Agent(2, 1, args)
    agent.load_state_dict(saved["agent"])
    actor, generator = erdp.Actor(agent, [2], [-1], [1]), np.random.default_rng(0)
    first = actor(np.zeros((2000, 2)), generator)
    last = first + actor(np.insert(first, 1, 1, axis=1), generator)
    mean_return = (toy_reward(first) + toy_reward(last)).mean()
    return agent, toy_data(0, 20), saved["task"]["data_return"], mean_return


@pytest.mark.slow
def test_algorithm1_critics_on_the_toy_are_its_q_by_dynamic_programming():
    """Up to update 1,000 the next actions come from a policy that stays as it is: Q converges to its evaluation."""
    agent, (state, action, *_), _, _ = learned_on_the_toy(3.0)
    first, reached = state[:, 1] == 0, state[:, :1] + action
    expected = toy_reward(reached[:, 0].numpy())
    next_state = torch.cat([reached, torch.ones_like(reached)], 1)[first].expand(500, -1, -1)
    noise = gaussian(3, *next_state.shape[:2], 1).float()
    with torch.no_grad():
        next_action = erdp.sample_actions(agent.policy_ema, agent.sde, next_state, noise)
        q = agent.critics(state, action).mean(0).numpy()
    last = (next_state[..., :1] + next_action).squeeze(-1).numpy()
    expected[first] += 0.99 * toy_reward(last).mean(0)
    for step, rows in dict(first=first.numpy(), second=~first.numpy()).items():
        error = np.sqrt(np.mean((q - expected)[rows] ** 2))
        assert error < expected[rows].std() / 3, f"Q of the {step} step is wrong by {error}, of {expected[rows].std()}"


@pytest.mark.slow
def test_algorithm1_on_the_toy_ends_above_the_data_and_above_cloning():
    """It ends below the data where Q has the other sign."""
    (*_, of_data, ours), (*_, cloning), (*_, other_sign) = (learned_on_the_toy(eta) for eta in (3.0, 0.0, -3.0))
    words = f"{ours}; the data {of_data}, cloning {cloning}, with Q's other sign {other_sign}"
    assert ours > max(of_data, cloning) + 1 and other_sign < of_data, words


# ==== Appendix: Eq. 28, 40 and A.3 ====================================================================================
@given(cases())
def test_eq28_score_is_the_gradient_of_scipys_log_density(case):
    x_t, std = case.x.numpy(), np.sqrt(-np.expm1(-2 * case.bar))
    law = norm(np.exp(-case.bar) * case.y.numpy(), std)
    gradient = (law.logpdf(x_t + std) - law.logpdf(x_t - std)) / (2 * std)  # exact: the log density is a parabola
    scale = 1 + np.abs(law.logpdf(x_t)).max() / std.min()
    agree("Eq. 28", case.sde.score(case.x, case.y, case.t), gradient, atol=1e-12 * scale)


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
# From arXiv:2402.04080: Section 4.1 and what all lines of Table 4 (Appendix B.1) share; what neither says is the
# released code's, or a setting of erdp.py's own.
SHARED = dict(variant="paper", num_critics=64, lcb_coef=4.0, entropy_coef=0.01, num_diffusion_steps=5, hidden=256)
SHARED |= dict(batch_size=256, discount=0.99, critic_lr=3e-4, eval_every=50_000, eval_candidates=50, schedule="cosine")
SHARED |= dict(target_rate=0.005, ema_rate=0.005, ema_every=5, ema_start=1000, pessimism="lcb")
SHARED |= dict(seed=0, device="cpu", compile=False, precision="float32", resume=False)
SHARED |= dict.fromkeys(("dataset", "eval_env", "run_dir", "eval_only", "q_time"))
COLUMNS_OF_TABLE_4 = "lr eta max_q_backup grad_norm loss clip_denoised num_steps eval_episodes".split()
TABLE_4 = dict(
    own=(3e-4, 1.0, False, 4.0, "noise", True, 1_000_000, 100),  # what Args has if nothing is said
    gym=(3e-4, 1.0, False, 4.0, "likelihood", False, 2_000_000, 10),
    antmaze=(3e-4, 2.0, True, 4.0, "noise", True, 1_000_000, 100),  # max Q-backup is off in antmaze-umaze-v0
    adroit=(3e-5, 0.1, False, 8.0, "noise", True, 1_000_000, 100),
    kitchen=(3e-4, 0.005, False, 10.0, "likelihood", False, 1_000_000, 100),
)
GYM = "medium medium-replay medium-expert"
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
# Tables 1 and 2: domain, version, levels, environment, time limit, and the returns to which D4RL gives 0 and 100.
ROBOTS = dict(
    halfcheetah=("gym", "v2", GYM, "HalfCheetah-v4", 1000, -280.178953, 12135.0),
    hopper=("gym", "v2", GYM, "Hopper-v4", 1000, -20.272305, 3234.3),
    walker2d=("gym", "v2", GYM, "Walker2d-v4", 1000, 1.629008, 4592.3),
    antmaze=("antmaze", "v0", MAZES, None, 1000, 0, 1),
    pen=("adroit", "v1", "human cloned", None, 100, 96.262799, 3076.8331017826877),
    kitchen=("kitchen", "v0", "complete partial mixed", None, 280, 0, 4),
)


def rows_of_tables_1_and_2() -> dict:
    rows = {}
    for robot, (domain, version, levels, env, steps, *returns) in ROBOTS.items():
        for level in levels.split():
            limit = 700 if level.startswith("umaze") else steps
            data = f"D4RL/{robot}/{level}-v{1 if robot == 'antmaze' else 2}"
            if domain == "gym":
                data = f"{robot}_{level.replace('-', '_')}-v2.hdf5"
            rows[f"{robot}-{level}-{version}"] = domain, data, env, limit, *returns
    return rows


ROWS_OF_TABLES_1_AND_2 = rows_of_tables_1_and_2()
OWN_ROWS = {"toy", "own"}  # rows that are not the paper's


def settings_of_table_4(domain) -> dict:
    return SHARED | dict(zip(COLUMNS_OF_TABLE_4, TABLE_4[domain]))


def test_tables_1_and_2_have_these_rows_by_d4rls_rules():
    for env, expected in ROWS_OF_TABLES_1_AND_2.items():
        assert erdp.ROWS[env] == expected, env
    others = erdp.ROWS.keys() - ROWS_OF_TABLES_1_AND_2
    assert others == OWN_ROWS, f"add the names of rows of your own to OWN_ROWS: {others - OWN_ROWS}"
    for env, row in erdp.ROWS.items():
        assert row.domain in erdp.DOMAINS and row.ref_min < row.ref_max, env
        assert erdp.preset(env).env == env, "its domain's settings are there"
    of_figure1 = dict(lr=1e-3, critic_lr=2e-3, hidden=64, eta=3.0, num_critics=8, batch_size=64, num_steps=4000)
    assert erdp.DOMAINS["toy"].settings == of_figure1 | dict(eval_every=400), "those of the runs in runs.jsonl"


def test_table_4_is_the_preset_of_every_row(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for env, (domain, *_) in ROWS_OF_TABLES_1_AND_2.items():
        expected = settings_of_table_4(domain) | dict(env=env)
        if env == "antmaze-umaze-v0":
            expected["max_q_backup"] = False
        assert vars(erdp.preset(env)) == expected, env
        argv = ["--env", env, "--loss", "noise", "--variant"]
        for variant, alpha in (("released", 0.01), ("debruijn", 0.03)):
            changes = dict(variant=variant, loss="noise", entropy_coef=alpha)
            assert vars(erdp.parse([*argv, variant])) == expected | changes, f"{env}, {variant}"
            assert erdp.preset(env, variant).variant == variant


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
    assert vars(Args()) == settings_of_table_4("own") | dict(env="toy")


def test_settings_from_a_sweep_of_numpys_become_plain_numbers():
    args = Args(lr=np.float64(0.1), seed=np.int64(3), q_time=np.int32(2), compile=np.bool_(True))
    assert [type(value) for value in (args.lr, args.seed, args.q_time, args.compile)] == [float, int, int, bool]
    with pytest.raises(ValueError, match="--lr is -1.0"):
        Args(lr=np.float32(-1))
    source, target = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    erdp.soft_update(target, source, Args(target_rate=1).target_rate)
    assert torch.equal(target.weight, source.weight), "a whole number is a rate too"


def test_settings_assigned_one_by_one_are_checked_and_make_files_that_can_be_read(tmp_path):
    args = erdp.preset("toy", device="cpu")
    vars(args).update(num_steps=2, eval_every=2, eval_episodes=1, run_dir=tmp_path / "run", lr=np.float64(1e-3))
    assert erdp.train(args) == 0
    assert erdp.load_file(tmp_path / "run" / "policy.pt")["args"].run_dir == str(tmp_path / "run")
    args.q_time = 9
    with pytest.raises(ValueError, match="--q-time is 9 but must be from 1 to 5"):
        erdp.train(args)


def test_presets_use_a_gpu_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert erdp.preset("own") == Args(env="own", device="cuda", compile=True, precision="tf32")
    for device, precision in (("cpu", "float32"), ("cuda:1", "tf32"), ("cuda", "tf32")):
        args = erdp.parse(["--device", device])
        assert (args.device, args.compile, args.precision) == (device, device != "cpu", precision), "what is its own"
    assert erdp.parse(["--run-dir", "own"]).env == "toy", "a word is the environment's only after its option"
    assert erdp.parse([]) == args and erdp.parse(["--dataset", "toy-20"]) == dataclasses.replace(args, dataset="toy-20")


def test_use_device_makes_a_gpu_the_current_one_and_gives_small_networks_one_thread(monkeypatch):
    done = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", done.append, raising=False)  # what PyTorch itself calls
    monkeypatch.setattr(torch, "set_num_threads", lambda n: done.append(f"{n} thread"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", done.append)
    for capability, amx, choices, expected in (
        ("AVX512", False, dict(device="cuda"), [0, "highest"]),
        ("AVX512", False, dict(device="cuda:1", precision="tf32"), [1, "high"]),
        ("AVX512", False, dict(device="cuda", precision="bf16"), [0, "high"]),  # of what is not in bfloat16
        ("AVX512", False, dict(hidden=64), ["1 thread", "medium"]),
        ("AVX512", True, dict(hidden=65), ["highest"]),  # "medium" would round to bfloat16 there, and on ARM
        ("AVX2", False, dict(hidden=65), ["highest"]),
    ):
        done.clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        erdp.use_device(Args(**choices))
        assert done == expected, choices
    monkeypatch.setattr(torch, "compile", lambda function: done.append("compiled") or function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("forgotten"))
    erdp.use_device(Args(compile=True))
    assert done[-2:] == ["forgotten", "compiled"], "nothing is left of what another run compiled"


# The page of claims: of the tests above, those whose names begin with what the paper or its extension here says.
CLAIMS = "eq|figure2|debruijn|noise_network|ensemble|acting|algorithm1|table"
for name, claim in [*globals().items()]:
    if re.match(f"test_({CLAIMS})", name):
        pytest.mark.paper(claim)


# ==== Data ============================================================================================================
class Made(gym.Env):
    """An environment of which only the spaces matter. Its arguments are plain, as a specification keeps them."""

    def __init__(self, states=2, part=None, low=(-1,), high=(1,), dtype="float32", **rule):
        states = Box(-9, 9, (states,))
        goal = Box(-9, 9, (3,))
        self.observation_space = Dict({part: states, "goal": goal}) if part else states
        self.action_space = Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


def made(name, steps=3, **kwargs) -> EnvSpec:
    """An environment of this file as Minari writes it down."""
    return EnvSpec("Made-v0", f"{__name__}:{name}", max_episode_steps=steps, kwargs=kwargs)


def columns_of(space, samples):
    """Samples of a space as Minari keeps them: an array, or a dict of such."""
    if isinstance(space, Dict):
        return {key: columns_of(part, [sample[key] for sample in samples]) for key, part in space.items()}
    return np.array(samples)


def random_episodes(env) -> list[dict]:
    """Two episodes of four steps of random numbers in the spaces of an environment."""
    env = gym.make(env)
    env.observation_space.seed(0)
    episodes = []
    for _ in range(2):
        states = [env.observation_space.sample() for _ in range(5)]
        columns = dict(observations=columns_of(env.observation_space, states), rewards=[0.5] * 4)
        columns |= dict(actions=[env.action_space.sample() for _ in range(4)])
        episodes.append(columns | dict(terminations=[False] * 4, truncations=[False] * 3 + [True]))
    return episodes


def make_minari(env, episodes=None, name="made/data-v0", **more) -> str:
    """The name of a new Minari data set of an environment: these episodes, or two random ones."""
    import minari
    from minari.data_collector import EpisodeBuffer

    episodes = random_episodes(env) if episodes is None else episodes
    buffers = [EpisodeBuffer(id=number, infos={}, **columns) for number, columns in enumerate(episodes)]
    minari.create_dataset_from_buffers(name, buffers, env=more.pop("recorded", env), **more)
    return name


def episode(number, rewards, ended=False, **changes) -> dict:
    """An episode whose state i is (number, i) and whose actions are 0. It ends in a terminal state or by a timeout."""
    n = len(rewards)
    at_end = np.arange(1, n + 1) == n
    columns = dict(observations=np.stack([np.full(n + 1, float(number)), np.arange(n + 1.0)], 1))
    columns |= dict(actions=np.zeros((n, 1), np.float32), rewards=np.array(rewards, float))
    return columns | dict(terminations=at_end & ended, truncations=at_end & (not ended)) | changes


def load(episodes, row="own", steps=1000, **spaces) -> tuple[erdp.Task, Batch]:
    """Task and batch of a row, from a Minari set of these episodes of `Made` with these spaces."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", folder)
        return erdp.load_data(Args(env=row, dataset=make_minari(made("Made", steps, **spaces), episodes)))


def transitions(batch: Batch) -> list:
    """(episode, index, next episode, next index, terminal) of states that are (episode, index)."""
    return torch.cat([batch.state, batch.next_state, batch.terminal[:, None]], 1).int().tolist()


def test_data_pair_states_within_an_episode_and_keep_timeouts_apart_from_terminals():
    task, data = load([episode(0, [1, 2, 3], ended=True), episode(1, [4, 5]), episode(2, [6])])
    expected = [[0, 0, 0, 1, 0], [0, 1, 0, 2, 0], [0, 2, 0, 3, 1], [1, 0, 1, 1, 0], [1, 1, 1, 2, 0], [2, 0, 2, 1, 0]]
    assert transitions(data) == expected, "every step once, with its own episode's next state; a timeout is no terminal"
    assert data.reward.tolist() == [1, 2, 3, 4, 5, 6], "rewards are unchanged"
    assert {x.dtype for x in data} == {torch.float32} and data.reward.shape == data.terminal.shape == (6,)
    assert (task.transitions, task.data_episodes, task.layout, task.low, task.high) == (6, 3, [2], [-1], [1])
    one = episode(0, [1, 2])
    others = [episode(0, [1, 3]), episode(0, [1, 2], ended=True), one | dict(actions=one["actions"] + 0.5)]
    others += [one | dict(observations=one["observations"] + np.eye(3)[:, [row]]) for row in (0, 2)]
    assert len({load([each])[0].data_checksum for each in (one, *others)}) == 6, "the checksum sees every column"


def test_data_keep_a_terminal_step_whose_next_state_was_not_recorded():
    """Minari also takes episodes of as many observations as steps."""
    short = [episode(k, [1, 2], ended, observations=np.full((2, 2), float(k))) for k, ended in ((0, True), (1, False))]
    _, data = load(short)
    assert data.reward.tolist() == [1, 2, 1] and data.terminal.tolist() == [0, 1, 0], "a timeout's next state is needed"


def test_data_of_images_or_with_running_statistics_are_refused():
    with pytest.raises(ValueError, match="no images"):
        erdp.layout(Dict(a=Box(0, 255, (8, 8, 3), np.uint8)))
    assert erdp.layout(Box(0, 255, (128,), np.uint8)) == [128], "Atari's memory is none"
    with pytest.raises(ValueError, match="running statistics"):
        env = gym.wrappers.NormalizeObservation(gym.make(made("Made")))
        erdp.describe_env(Args(env="own"), SimpleNamespace(env_spec=env.spec, recover_environment=lambda **_: env))


def test_data_of_an_environment_that_was_shown_are_evaluated_without_a_window():
    spec = EnvSpec("Shown-v0", kwargs=dict(render_mode="human", size=2))
    assert json.loads(erdp.as_json(spec))["kwargs"] == dict(size=2)


def test_data_are_read_under_a_lock_but_where_none_can_be_taken(minari_root, monkeypatch):
    dataset, lock = make_minari(made("Ledger")), MagicMock()
    monkeypatch.setattr(filelock, "FileLock", lock)
    assert erdp.load_data(Args(env="own", dataset=dataset))[0].transitions == 8
    names = [name for name, *_ in lock.mock_calls]
    assert names == ["", "().__enter__", "().__exit__"], "once, and for all of it"
    monkeypatch.setattr(filelock, "FileLock", Mock(side_effect=PermissionError("the lock is another user's")))
    assert erdp.load_data(Args(env="own", dataset=dataset))[0].transitions == 8


MAZE = [[1, 1, 1, 1], [1, "r", 0, 1], [1, "g", 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_data_antmaze_episodes_end_terminal_at_the_goal_and_nothing_later_is_used():
    # reached in mid-episode, left and reached again; at the first step; never; at the last; at the only; never
    rewards = [0, 0, 1, 1, 0, 1], [1, 1], [0, 0], [0, 1], [1], [0]
    episodes = [episode(number, of_steps) for number, of_steps in enumerate(rewards)]
    _, data = load(episodes, "antmaze-umaze-v0", maze_map=MAZE)
    expected = [[0, 0, 0, 1, 0], [0, 1, 0, 2, 0], [0, 2, 0, 3, 1], [1, 0, 1, 1, 1], [2, 0, 2, 1, 0], [2, 1, 2, 2, 0]]
    expected += [[3, 0, 3, 1, 0], [3, 1, 3, 2, 1], [4, 0, 4, 1, 1], [5, 0, 5, 1, 0]]
    assert transitions(data) == expected, "AntMaze: the first step at the goal is the episode's last, and terminal"
    assert data.reward.tolist() == [-2, -2, 2, 2, -2, -2, -2, 2, 2, -2], "AntMaze: 4 (r - 0.5)"
    returns = [load([alone], "antmaze-umaze-v0", maze_map=MAZE)[0].data_return for alone in episodes]
    assert returns == [1, 1, 0, 1, 1, 0], "played, each would have ended at the goal"
    _, elsewhere = load(episodes[:1])
    assert len(elsewhere.reward) == 6 and not elsewhere.terminal.any(), "other domains go on after a reward"


def test_data_rewards_are_scaled_by_domain(tmp_path):
    rewards, std = [0.0, 1.0, 1.0, 6.0], statistics.pstdev([0, 1, 1, 6])
    scaled = {"own": rewards, "kitchen-mixed-v0": rewards, "pen-human-v1": [(reward - 2) / std for reward in rewards]}
    for row, expected in scaled.items():
        part = "observation" if row.startswith("kitchen") else None
        states = [{part: np.ones((n, 45)), "goal": np.ones((n, 3))} if part else np.ones((n, 45)) for n in (4, 2)]
        halves = [episode(k, rewards[3 * k :][:3], observations=states[k]) for k in (0, 1)]
        task, data = load(halves, row, states=45, part=part)
        agree(f"rewards of {row}", data.reward, np.array(expected, np.float32), rtol=1e-6, atol=1e-7)
        assert task.layout == ({part: [45]} if part else [45]), "Kitchen's policies see this part alone"
        rule = {"terminate_on_tasks_completed", "remove_task_when_completed"} if part else {}
        assert EnvSpec.from_json(task.spec).kwargs.items() >= dict.fromkeys(rule, True).items(), "by D4RL's rule"
    hopper = Args(env="hopper-medium-v2", dataset=str(d4rl_file(tmp_path / "hopper.hdf5", sizes=(11, 3))))
    assert erdp.load_data(hopper)[1].reward.tolist() == [0, 1, 2, 3, 4], "Gym's rewards stay as they are"
    _, same = load([episode(0, [3, 3], observations=np.ones((3, 45)))], "pen-human-v1", states=45)
    assert same.reward.tolist() == [0, 0], "standardised rewards that do not differ are 0, not NaN"
    assert len(load([episode(0, [0, 1])], "pen-human-v1")[1].reward) == 2, "also where no state says where a pen is"
    refused = {"antmaze-umaze-v0": "rewards of 0 and 1.*sparse", "kitchen-mixed-v0": "without the part 'observation'"}
    for row, words in refused.items():
        with pytest.raises(ValueError, match=words):
            load([episode(0, [0.1, 0.9])], row, maze_map=MAZE)


def test_data_nested_observations_are_flattened_in_gymnasiums_order(minari_root):
    task, data = erdp.load_data(Args(env="own", dataset=make_minari(made("Ledger"))))
    for number, columns in enumerate(random_episodes(made("Ledger"))):
        observations = columns["observations"]
        for step in range(4):
            me = {key: values[step] for key, values in observations["me"].items()}
            one = dict(goal=observations["goal"][step], me=me)
            expected = gym.spaces.flatten(Ledger.observation_space, one)
            agree("a flattened observation", data.state[4 * number + step], expected, rtol=0, atol=0)
    assert task.layout == json.loads(json.dumps(task.layout)) == LAYOUT, "a file can keep the layout"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_data_actions_are_scaled_by_the_bounds_of_each_and_back_in_their_dtype(dtype, monkeypatch):
    low, high = np.array([[3.4, -0.1, -80], [7.8, 0.1, 0.5]], dtype)  # 3.4 + (7.8 - 3.4) > 7.8
    where = np.linspace(0, 1, 5)[:, None]
    actions = (low + where * (high - low)).clip(low, high)
    spaces = dict(low=low.tolist(), high=high.tolist(), dtype=dtype)
    task, data = load([episode(0, [0] * 5, actions=actions)], **spaces)
    agree("low is -1, high is 1", data.action, np.broadcast_to(2 * where - 1, (5, 3)), rtol=0, atol=1e-5)
    monkeypatch.setattr(erdp, "sample_actions", lambda *_: data.action[:, None])
    agent = Agent(2, 3, Args(num_critics=1, hidden=4, eval_candidates=1))
    back = erdp.Actor(agent, task.layout, task.low, task.high, task.dtype)(np.zeros((5, 2)))
    agree("and back", back, actions, rtol=1e-5, atol=1e-3)
    space = Made(**spaces).action_space
    assert back.dtype == dtype and all(space.contains(each) for each in back), "what is played is in the action space"


def test_data_actions_outside_their_bounds_by_more_than_a_thousandth_are_refused_and_less_is_clipped():
    a_little, more = ([episode(0, [0, 0], actions=np.array([[0.5], [x]]))] for x in (-1.0009, -1.0011))
    assert load(a_little)[1].action.tolist() == [[0.5], [-1]]
    with pytest.raises(ValueError, match="1 of its 2 actions are outside the bounds of Made-v0, by up to 0.0011: clip"):
        load(more)


def d4rl_file(path: Path, n: int = 6, sizes=(2, 1), **changes) -> Path:
    """A file in D4RL's layout: state i is i, reward i is i, no ends. A change to None drops a key."""
    column = np.arange(float(n))
    rows = dict(observations=np.tile(column[:, None], sizes[0]), actions=np.zeros((n, sizes[1])), rewards=column)
    rows |= dict(terminals=np.zeros(n, bool), timeouts=np.zeros(n, bool), next_observations=np.full((n, sizes[0]), 7.0))
    with h5py.File(path, "w") as file:
        for key, values in (rows | changes).items():
            if values is not None:
                file[key] = values
    return path


def in_made(path) -> list[str]:
    """The arguments of a run on a D4RL file in the environment `Made`, which has no time limit."""
    return ["--dataset", str(path), "--eval-env", f"{__name__}:Made"]


def load_hdf5(path: Path) -> tuple[erdp.Task, Batch]:
    return erdp.load_data(erdp.parse(in_made(path)))


def test_data_hdf5_pairs_rows_as_d4rl_does(tmp_path, monkeypatch):
    """Row i with row i + 1, but for timeouts and the last row; terminal rows stay and say so."""
    ends = dict(terminals=[0, 1, 0, 0, 1, 1, 0, 0], timeouts=[0, 0, 1, 0, 1, 0, 0, 0])
    monkeypatch.setenv("HOME", str(d4rl_file(tmp_path / "a.h5", 8, **ends).parent))
    _, data = load_hdf5("~/a.h5")
    found = torch.stack([data.state[:, 1], data.next_state[:, 0], data.reward, data.terminal], 1)
    assert found.tolist() == [[0, 1, 0, 0], [1, 2, 1, 1], [3, 4, 3, 0], [5, 6, 5, 1], [6, 7, 6, 0]]


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
    task, _ = load_hdf5(d4rl_file(tmp_path / "a.hdf5", 7, **ends))
    assert (task.data_return, task.data_episodes) == ((0 + 1 + 2 + 3 + 4) / 2, 2)
    assert load_hdf5(d4rl_file(tmp_path / "a.hdf5"))[0].data_return == 15, "a file within one episode"
    height = np.array([0.07, 0.0751, 0.0749, 0.07, 0.2])[:, None] * (np.arange(45) == 26)
    task, pen = load([episode(0, [1, 2, 4, 8], observations=height)], "pen-human-v1", states=45)
    assert len(pen.reward) == 4 and task.data_return == 3, "D4RL's Pen ends after the first step that drops the pen"


def test_data_evaluation_maze_is_mirrored_where_the_data_was_collected_in_its_mirror_image(minari_root, capsys):
    numbers = itertools.count()

    def spec_for(walls):
        """Of the evaluation in MAZE or its mirror image, for data that were recorded between these walls."""
        env, eval_env = (made("Made", maze_map=maze) for maze in (walls, MAZE))
        dataset = make_minari(env, [episode(0, [0])], f"made/maze-v{next(numbers)}", eval_env=eval_env)
        return EnvSpec.from_json(erdp.load_data(Args(env="antmaze-umaze-v0", dataset=dataset))[0].spec)

    plain = [[c if c == 1 else 0 for c in line] for line in MAZE]
    assert spec_for(plain).kwargs == dict(maze_map=MAZE, continuing_task=False), "start and goal may differ"
    assert "mirrored" not in capsys.readouterr().out
    assert spec_for([line[::-1] for line in plain]).kwargs["maze_map"] == [line[::-1] for line in MAZE]
    assert "the walls of Made-v0 are mirrored here" in capsys.readouterr().out
    assert spec_for(plain[::-1]).kwargs["maze_map"] == MAZE[::-1] and spec_for(plain).max_episode_steps == 700
    one_wall_less = [*plain[:-2], [1, 1, 0, 1], plain[-1]]
    for other in (one_wall_less, [list(line) for line in zip(*plain)], [line[::-1] for line in plain[::-1]]):
        with pytest.raises(ValueError, match="recorded in another maze"):
            spec_for(other)
    for spec in EnvSpec("Elsewhere-v0"), EnvSpec("Hopper-v4"):  # unknown here, without a maze
        with pytest.raises(erdp.UserError, match="must be recorded in a maze"):
            erdp.same_walls(made("Made", maze_map=MAZE), spec)
    with pytest.raises(ValueError, match="need a Minari set"):
        erdp.same_walls(made("Made", maze_map=MAZE), None)  # a file's
    registered = EnvSpec("AntMaze_UMaze-v4"), made("Made", maze_map=gym.spec("AntMaze_UMaze-v4").kwargs["maze_map"])
    assert erdp.same_walls(*registered) == registered[1].kwargs["maze_map"], "a maze that only the registry knows"
    spec, _ = erdp.describe_env(Args(env="antmaze-umaze-v0", eval_env=f"{__name__}:Made"))  # a policy's, without data
    assert (spec.max_episode_steps, spec.kwargs) == (700, dict(continuing_task=False)), "by the row's rule"


def toy_reward(x):
    """Of Figure 1: a low hill on the left and one three times as high on the right."""
    return 0.4 * math.sqrt(2 * math.pi) * (norm.pdf(x, -0.9, 0.4) + 3 * norm.pdf(x, 0.9, 0.4))


@functools.cache
def toy_best() -> float:
    """The largest return of two steps in [-1, 1] from 0."""
    return max(toy_reward(a) + toy_reward(np.linspace(a - 1, a + 1, 2001)).max() for a in np.linspace(-1, 1, 401))


def toy_data(seed, share=5) -> Batch:
    return erdp.load_data(Args(env="toy", dataset=f"toy-{share}", seed=seed))[1]


def test_toy_data_is_unbalanced_and_follows_the_environment():
    data, env = toy_data(3), erdp.ToyEnv()
    assert all(map(torch.equal, data, toy_data(3))) and not torch.equal(data.action, toy_data(4).action)
    assert len(data.reward) == 512 and data.action.abs().max() <= 1
    data = Batch(*(column.numpy() for column in data))
    for first in range(0, 40, 2):
        state, _ = env.reset()
        for row in (first, first + 1):
            state, reward, terminal, truncated, _ = env.step(data.action[row])
            agree("next state", data.next_state[row], state, rtol=1e-5, atol=1e-6)
            agree("reward", [reward, data.reward[row]], [toy_reward(state[0])] * 2, rtol=1e-5)
            assert terminal == data.terminal[row] and not truncated
    x = np.array([-0.7, -0.3, 0.1, 0.5, 0.9])
    for share in (5, 20, 50):
        episodes = [erdp.read_data(Args(env="toy", dataset=f"toy-{share}", seed=seed)) for seed in range(80)]
        actions = np.concatenate([each.actions for each in itertools.chain(*episodes)])  # (40960, 1)
        good, rest = norm.cdf(x, 0.5, 0.4), norm.cdf(x, -0.3, 0.4)
        law = f"N(0.5, 0.4^2) in {share}% of the steps, N(-0.3, 0.4^2) in the rest"
        assert_mean(law, actions <= x, share / 100 * good + (1 - share / 100) * rest, sees=0.03, comparisons=6)
        first, last = actions.reshape(-1, 2).T
        products = (first - first.mean()) * (last - last.mean())
        assert_mean("each step's mean and noise are its own", products, 0.0, sees=0.03, comparisons=6)
    assert erdp.ROWS["toy"].ref_max == pytest.approx(toy_best(), rel=1e-4)


# ==== Acting and evaluation ===========================================================================================
class Ledger(gym.Env):
    """Episodes of 1 to 7 steps that are recorded in `played`. Odd ones end terminal, even ones by a timeout; step 2 is
    a success. Observations are nested, the actions' bounds differ, and success has either of its names.

    The episode of seed `unstable` returns NaN. Where the file `doom` is, a step kills the process that makes it.
    """

    observation_space = Dict(goal=Box(-9, 9, (1,)), me=Dict(clock=Box(-9, 9, (1,)), place=Box(-9, 9, (2,))))
    played: list = []

    def __init__(self, low=(-1, 0), high=(3, 0.5), dtype="float32", unstable=None, doom=""):
        self.action_space = Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype))
        self.unstable, self.doom = unstable, doom

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
        success = len(rewards) == 2
        odd_one = [None, np.ones(2), "yes"][len(rewards) % 3]  # no success at all
        forms = {"success": np.array([success]), "is_success": False}, {"success": odd_one, "is_success": success}
        return self.observe(), np.array([reward]), ended and odd, ended and not odd, forms[odd]


class OldReset(Ledger):
    """As Gym had it."""

    def reset(self):
        return super().reset()


class OldStep(Ledger):
    """As Gym had it."""

    def step(self, action):
        return super().step(action)[:4]


class Careless(Ledger):
    """Its first reward is greater by what `more` returns; it ignores the seed of its episode but for the Ledger's."""

    def __init__(self, more, **kwargs):
        super().__init__(**kwargs)
        self.more = {"random": random.random, "numpy": np.random.random, "torch": lambda: torch.rand(()).item()}[more]

    def step(self, action):
        state, reward, *others = super().step(action)
        return state, reward + self.more() * (len(self.record["rewards"]) == 1), *others


class Learned(Ledger):
    """Its reward might come from a network."""

    def reset(self, **kwargs):
        assert torch.get_num_threads() == 1 and (torch.ones(500, 500) @ torch.ones(500, 500)).sum() == 500**3
        return super().reset(**kwargs)


class Gambler:
    """Acts by its streams and the clock alone."""

    low, high = np.array([[-1, 0], [3, 0.5]], np.float32)

    def __call__(self, state, streams):
        assert len(state) == len(streams) and state.shape[1] == 4, "flat observations, a stream each"
        actions = [[s.random() * 2 - 1, 0.1 * clock / 9] for s, clock in zip(streams, state[:, 1])]
        return np.array(actions, np.float32)


LAYOUT = dict(goal=[1], me=dict(clock=[1], place=[2]))


def score(actor, episodes=9, num_envs=None, seed=5, domain="toy", env="Ledger", **kwargs) -> dict:
    """An evaluation in Ledgers: the toy's domain plays in this process, others in worker processes."""
    Ledger.played.clear()
    about = dict(domain=domain, dataset_id="made/data-v0", transitions=8, data_checksum=0, data_episodes=2)
    about |= dict(data_return=1.5, spec=made(env, 1000, **kwargs).to_json(), layout=LAYOUT, dtype="float32")
    task = erdp.Task(low=[-1, 0], high=[3, 0.5], ref_min=2, ref_max=12, **about)
    with erdp.playing(task, episodes, num_envs) as envs:
        return erdp.evaluate(actor, envs, episodes, seed)


def test_evaluation_plays_every_episode_once_and_to_its_end(monkeypatch):
    """In waves of as many episodes as there are environments; what those beyond the last episode do does not count."""
    for num_envs in (1, 2, 4, 9):
        result = score(Gambler(), num_envs=num_envs)
        assert len(Ledger.played) == math.ceil(9 / num_envs) * num_envs
        played = Ledger.played[:9]
        assert all(record["ended"] for record in played)
        assert len({record["seed"] for record in played}) == 9, "every episode has a seed of its own"
        lengths = np.array([len(record["rewards"]) for record in played])
        assert min(lengths) == 1 and max(lengths) >= 6, "short and long episodes"
        assert result["length"].tolist() == lengths.tolist() and result["success"].tolist() == (lengths >= 2).tolist()
        agree("returns", result["return"], [sum(record["rewards"]) for record in played])
    score(Gambler(), episodes=1)
    assert len(Ledger.played) == 1, "at most one environment an episode"
    alone = score(lambda *given: Gambler()(*given)[0], episodes=1)  # as where observations are of shape (1, 4)
    agree("an action without the axis of environments", alone["return"], score(Gambler(), episodes=1)["return"])
    monkeypatch.setitem(erdp.DOMAINS, "toy", erdp.DOMAINS["toy"]._replace(over=lambda state: state[1] == 3))
    assert score(Gambler())["length"].tolist() == np.minimum(lengths, 3).tolist(), "D4RL's own end of an episode"


def test_evaluation_in_a_child_process_leaves_its_signals_alone_and_needs_no_children():
    """A process of a multiprocessing.Pool may have none."""

    def child():
        result = score(Gambler(), domain="gym")
        os._exit(result["return"].tolist() != expected or signal.getsignal(signal.SIGINT) is signal.SIG_IGN)

    expected = score(Gambler())["return"].tolist()
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("generator", ["random", "numpy", "torch"])
def test_evaluation_in_workers_is_repeated_also_where_an_environment_draws_from_a_global_generator(generator):
    careless = dict(domain="gym", env="Careless", more=generator)
    three, two = (score(Gambler(), num_envs=num_envs, **careless)["return"] for num_envs in (3, 2))
    agree("whichever environment plays an episode", three, two, rtol=0, atol=0)
    drawn = three - score(Gambler())["return"]
    assert len(set(drawn.round(9))) == 9, "no two episodes draw the same"


def test_evaluation_in_workers_of_an_environment_with_a_network_after_this_process_had_threads():
    """Torch's threads do not survive a fork: a worker that wanted them would wait for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(500, 500) @ torch.ones(500, 500)
        score(Gambler(), episodes=2, domain="gym", env="Learned")
    finally:
        torch.set_num_threads(threads)


def test_evaluation_does_not_depend_on_how_many_environments_step_together():
    one = score(Gambler(), num_envs=1)
    for num_envs, domain in ((2, "toy"), (9, "toy"), (2, "gym")):  # "gym": in worker processes
        for key, values in score(Gambler(), num_envs=num_envs, domain=domain).items():
            agree(f"{key} of the episodes, {num_envs} environments", values, one[key], rtol=0, atol=0)
    assert len(set(one["return"])) == 9, "no two episodes share a random stream"
    longer = score(Gambler(), episodes=12)
    agree("an episode is the same in a longer evaluation", longer["return"][:9], one["return"], rtol=0, atol=0)
    seeds = [record["seed"] for record in Ledger.played]
    assert not set(score(Gambler(), seed=6)["return"]) & set(one["return"]), "another seed plays other episodes"
    for number in (0, 8):
        with pytest.raises(FloatingPointError, match=f"episode {number} of the evaluation has a return of NaN"):
            score(Gambler(), num_envs=2, unstable=seeds[number])
    score(Gambler(), num_envs=2, unstable=seeds[9])  # what comes after the last episode does not count


def test_actor_takes_observations_flat_or_as_the_environment_has_them_one_or_many():
    actor, states = actor_of(), np.random.default_rng(0).normal(size=(5, 3))

    def act(observation, *seeds):
        return actor(observation, [np.random.default_rng(seed) for seed in seeds])

    together, alone = act(states, *range(5)), act(states[2], 2)
    agree("one state, alone and among others", alone, together[2], rtol=1e-4, atol=1e-5)
    copy = pickle.loads(pickle.dumps(actor))
    agree("a pickled copy", copy(states[2], np.random.default_rng(2)), alone, rtol=0, atol=0)
    agree("dicts", act(dict(a=states[:, :1], b=states[:, 1:, None]), *range(5)), together, rtol=0, atol=0)
    agree("a dict", act(dict(a=states[2, :1], b=states[2, 1:, None]), 2), alone, rtol=0, atol=0)
    for layout, observation in (([3, 1], states[2][:, None]), ([1, 3], states[2][None])):  # a column, a row
        actor.layout = layout
        agree("as the environment observes it", act(observation, 2), alone, rtol=0, atol=0)
        agree("flat states, there too", act(states, *range(5)), together, rtol=0, atol=0)


def test_actor_with_one_generator_repeats_itself_and_with_none_does_not():
    actor, many = actor_of(), np.zeros((40, 3))
    first, again, other = (actor(many, generator=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(np.unique(first[:, 0])) > 9, "equal states do not share their noise"
    assert not np.array_equal(actor(many), actor(many)), "without a generator every call is another draw"
    for bad, words in ((dict(a=np.zeros(1)), "lacks the parts b$"), (np.zeros((3, 1)), "states have 3 numbers")):
        with pytest.raises(ValueError, match=words):
            actor(bad)


# ==== Runs ============================================================================================================
RUN = "--num-critics 2 --num-steps 12 --eval-every 4 --eval-episodes 2 --eval-candidates 3 --batch-size 8 --device cpu"
RUN += " --ema-start 3"
LOSSES = "critic_loss", "policy_loss", "diffusion_loss", "q", "lcb", "entropy"


def run(folder, *more, settings=RUN) -> int:
    """A short run, of the toy if nothing else is said, without its picture, whose losses are read within it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(erdp, "LOG_EVERY", 5)
        patch.setattr(erdp, "draw_curve", lambda file, _: file.write(b"a picture"), raising=False)
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


def read_json(folder, name="config.json") -> dict:
    return json.loads((folder / name).read_text())


def rows_of(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def in_words(row) -> str:
    return "score {score_mean:.1f} ± {score_std:.1f}, return {return_mean:.2f} ± {return_std:.2f}, ".format(**row)


def outcome(folder) -> dict:
    """All that a run learnt and measured, clocks and settings that may change aside."""
    saved = checkpoint(folder)
    policies = [checkpoint(folder, name)["agent"] for name in ("policy.pt", "policy-best.pt")]
    kept = {key: saved[key] for key in ("step", "totals", "generator", "agent", "task")}
    lines = [dict(line, seconds="") for line in rows_of(folder)]
    return kept | dict(result=read_json(folder, "result.json"), lines=lines, policies=policies)


def assert_same(claim, ours, theirs):
    """The same bit for bit, through nested dicts and lists."""
    (ours, form), (theirs, other_form) = (pytree.tree_flatten_with_path(tree) for tree in (ours, theirs))
    assert form == other_form, f"{claim}: {form}, expected {other_form}"
    for (path, found), (_, expected) in zip(ours, theirs):
        same = torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
        assert same, f"{claim}, {pytree.keystr(path)}: {found}, expected {expected}"


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
    names = "checkpoint.pt config.json curve.png metrics.csv policy-best.pt policy.pt result.json".split()
    assert {path.name for path in finished.iterdir()} > {*names}
    config, rows = read_json(finished), rows_of(finished)
    assert {field.name for field in dataclasses.fields(Args)} < config.keys()
    expected = dict(env="toy", num_critics=2, num_steps=12, batch_size=8, lr=1e-3, run_dir=str(finished), device="cpu")
    expected |= dict(dataset_id="toy-5", transitions=512, data_episodes=256, layout=[2], low=[-1], high=[1])
    expected["device_name"] = "CPU (threads: 1)"
    assert {key: config[key] for key in expected} == expected
    assert config["versions"].keys() > {"torch", "numpy"} and config["versions"]["torch"] == torch.__version__
    for name, part in itertools.product(("checkpoint.pt", "policy.pt", "policy-best.pt"), ("args", "task")):
        saved = checkpoint(finished, name)[part]
        assert saved == {key: config[key] for key in saved}
    header = [*"step return_mean return_std score_mean score_std success length".split(), *LOSSES, "seconds"]
    assert [row["step"] for row in rows] == ["4", "8", "12"] and [*rows[0]] == header
    for row in rows:
        assert (row["success"], row["length"]) == ("", "2.0"), "the toy has no success and episodes of two steps"
        agree("score of the toy", float(row["score_mean"]), 100 * float(row["return_mean"]) / toy_best(), rtol=1e-4)
    of_data = toy_reward(toy_data(0).next_state[:, 0].double().numpy()).sum() / 256
    assert config["data_return"] == pytest.approx(of_data, rel=1e-4)
    assert config["data_score"] == pytest.approx(100 * of_data / toy_best(), rel=1e-4)


def test_runs_keep_their_last_and_their_best_policy_and_say_which(tmp_path, monkeypatch, capsys):
    ours, short, means = tmp_path / "ours", tmp_path / "short", iter([1.0, 3.0, 3.0, 1.5, 2.0])

    def evaluate(*_):
        returns = next(means) + np.array([-2.0, 0, 2])
        return {"return": returns, "success": np.array([math.nan, 1, 1]), "length": np.array([1.0, 2, 6])}

    with monkeypatch.context() as patch:
        patch.setattr(erdp, "evaluate", evaluate)
        assert run(ours, "--num-steps", "20") == 0
    said, row = capsys.readouterr().out, {key: float(value) for key, value in rows_of(ours)[-1].items()}
    last, best, deviation = 200 / toy_best(), 300 / toy_best(), math.sqrt(8 / 3)
    expected = dict(return_mean=2, return_std=deviation, score_mean=last, score_std=last / 2 * deviation)
    expected |= dict(step=20, success=2 / 3, length=3)
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert f"update 20: {in_words(row)}length 3, success 67%\n" in said
    assert f"final score {last:.1f}, best {best:.1f} at update 8" in said
    result = dict(final=last, best=best, best_step=8, steps=20)
    assert read_json(ours, "result.json") == pytest.approx(result, rel=1e-4)
    assert run(short, "--num-steps", "8") == 0
    best, last, end = (checkpoint(ours, f"{name}.pt")["agent"] for name in ("policy-best", "policy", "checkpoint"))
    assert_same("the best policy, of two the older", best, checkpoint(short, "policy.pt")["agent"])
    assert_same("the last policy", last["policy"], end["policy"])


def losses(**changes) -> dict:
    """What an update returns."""
    return {name: torch.tensor(value) for name, value in (dict.fromkeys(erdp.METRICS, 1.0) | changes).items()}


def test_runs_report_mean_losses_since_the_last_evaluation(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = iter(np.arange(1.0, 13.0))
    monkeypatch.setattr(erdp, "update", lambda *_: (v := next(values)) and losses(q=2 * v, critic_loss=v, lcb=-v))
    used = Mock()
    monkeypatch.setattr(erdp, "use_device", used)
    assert run(tmp_path / "run", "--eval-every", "5") == 0 and used.call_count == 1
    scalars = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("losses/lcb")
    assert [(each.step, each.value) for each in scalars] == [(5, -5), (10, -10), (12, -12)], "TensorBoard has the last"
    assert checkpoint(tmp_path / "run")["totals"].dtype == torch.float64, "many updates are summed"
    rows = checkpoint(tmp_path / "run")["evaluations"]
    found = [(row["step"], row["critic_loss"], row["q"], row["lcb"], row["entropy"]) for row in rows]
    assert found == [(5, 3, 6, -3, 1), (10, 8, 16, -8, 1), (12, 11.5, 23, -11.5, 1)]


def test_runs_leave_the_process_as_many_threads_as_it_had(tmp_path):
    torch.set_num_threads(2)
    assert run(tmp_path / "run", "--num-steps", "1") == 0  # on one thread, as its networks are small
    assert torch.get_num_threads() == 2 and "threads: 1" in read_json(tmp_path / "run")["device_name"]
    torch.set_num_threads(1)


def test_runs_of_a_seed_are_the_same_however_often_evaluated_and_of_two_seeds_not(
    finished, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(99)  # what happened in the process before does not matter
    often = ["--eval-every", "1", "--eval-episodes", "3", "--eval-candidates", "1"]
    for name, more in dict(often=often, other=["--seed", "1"]).items():
        assert run(tmp_path / name, *more) == 0
    ours, often, other = map(outcome, (finished, tmp_path / "often", tmp_path / "other"))
    assert len(often["lines"]) == 12
    for key in ("agent", "generator"):
        assert_same(f"{key} of a run with more evaluations", often[key], ours[key])
    for key in ("policy", "critics"):
        pairs = zip(ours["agent"][key].values(), other["agent"][key].values())
        assert not any(torch.equal(*pair) for pair in pairs), f"{key} of two seeds"
    assert not torch.equal(ours["generator"], other["generator"])
    capsys.readouterr()
    assert erdp.main(["--eval-only", str(tmp_path / "other" / "policy.pt"), "--device", "cpu"]) == 0
    last = checkpoint(tmp_path / "other")["evaluations"][-1]
    assert in_words(last) in capsys.readouterr().out, "episodes are those of the run's seed"
    weights = []
    monkeypatch.setattr(erdp, "update", lambda agent, *_: weights.append([*copied(agent.policy).values()]) or losses())
    for seed in "01":
        assert run(tmp_path / f"start{seed}", "--num-steps", "1", "--seed", seed) == 0
    assert not any(map(torch.equal, *weights)), "two seeds begin with different weights"


def in_turn(*happenings):
    return lambda: [happens() for happens in happenings]


def full_disk():
    """As torch.save has it."""
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise RuntimeError("PytorchStreamWriter failed writing file") from error


def worker_first():
    """A signal to all processes, which ends a worker before it reaches this one."""
    threading.Timer(0.2, sigterm).start()
    raise EOFError


kill = functools.partial(pytest.fail, "killed")  # which nothing of erdp.py catches
ctrl_c, sigterm = (functools.partial(signal.raise_signal, number) for number in (signal.SIGINT, signal.SIGTERM))
twice = in_turn(sigterm, sigterm)  # as a scheduler and run_all.sh may both send the same one
full_disk_after_sigterm = in_turn(sigterm, full_disk)
# Signals in an update that is half made, and what comes of them or beside them
nan_after_sigterm = in_turn(sigterm, Mock(side_effect=FloatingPointError("a loss is NaN")))
compiler_after_ctrl_c = in_turn(ctrl_c, Mock(side_effect=RuntimeError("a compiler was interrupted")))
other_pipe = Mock(side_effect=BrokenPipeError("of another pipe"))
PLACES = {"update": (erdp, "update"), "act": (erdp.Actor, "__call__"), "save": (torch, "save")}


def cut(folder, place, number, how, *more, settings=RUN) -> int:
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
        try:
            return run(folder, *more, settings=settings)
        except SystemExit as stop:  # within a step
            return stop.code


CUTS = {  # what happens to a run: place, call, how; its status, where it then stands, and what it says
    "killed before its first evaluation": ("update", 4, kill, None, 0, [], ""),
    "killed in an update, saved by time": ("update", 12, kill, None, 10, [4, 8], ""),
    "killed in its second evaluation": ("act", 3, kill, None, 8, [4], ""),
    "killed while it saves": ("save", 6, kill, None, 4, [4], ""),
    "killed before its best policy is kept": ("save", 4, kill, None, 4, [], ""),
    "Ctrl-C when an evaluation is due": ("update", 8, ctrl_c, 130, 8, [4], "stopped at update 8: --resume goes on"),
    "Ctrl-C in its last evaluation": ("act", 5, ctrl_c, 130, 12, [4, 8], "stopped at update 12: --resume goes on"),
    "Ctrl-C in a compiler": ("update", 7, compiler_after_ctrl_c, 130, 4, [4], "stopped within a step: --resume"),
    "SIGTERM": ("update", 7, sigterm, 143, 7, [4], "stopped at update 7: --resume goes on"),
    "SIGTERM twice at once": ("update", 7, twice, 143, 7, [4], "stopped at update 7: --resume goes on"),
    "SIGTERM that reaches a worker first": ("act", 3, worker_first, 143, 8, [4], "stopped within a step: --resume"),
    "SIGTERM in the last step of an evaluation": ("act", 4, sigterm, 143, 8, [4, 8], "stopped at update 8: --resume"),
    "SIGTERM, and a NaN is found": ("update", 7, nan_after_sigterm, 1, 4, [4], "a loss is NaN"),
    "full disk": ("save", 6, full_disk, 2, 4, [4], "No space left on device"),
    "SIGTERM, and a full disk": ("save", 6, full_disk_after_sigterm, 2, 4, [4], "No space left on device"),
    "a broken pipe": ("act", 3, other_pipe, 2, 8, [4], "of another pipe"),
}


@pytest.mark.parametrize("name", CUTS)
def test_runs_resumed_are_the_uninterrupted_one_bit_for_bit(name, finished, tmp_path, monkeypatch, capsys):
    folder, (place, number, how, status, step, evaluated, words) = tmp_path / "run", CUTS[name]
    assert (erdp.SAVE_EVERY, erdp.LOG_EVERY) == (600, 100)
    monkeypatch.setattr(erdp, "SAVE_EVERY", 0 if "by time" in name else 600)
    assert cut(folder, place, number, how) == status
    said = capsys.readouterr()
    assert stands(folder) == (step, evaluated)
    assert not list(folder.glob(".part*")), "no part of a file is left"
    assert words in said.out + said.err and bool(said.err) == (status in (1, 2))
    assert not said.err or re.fullmatch("erdp: [^\n]*\n", said.err), "one sentence"
    assert not (folder / "result.json").exists(), "result.json marks a finished run"
    assert run(folder, "--resume") == 0
    assert_same(name, outcome(folder), outcome(finished))


def test_runs_end_at_once_at_a_second_signal_and_put_handlers_back(tmp_path, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cut(tmp_path / "run", "update", 6, lambda: (sigterm(), time.sleep(1.1), ctrl_c())) == 130
    assert capsys.readouterr().err == "" and stands(tmp_path / "run") == (4, [4]), "nothing is saved at a second"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_runs_log_for_tensorboard_without_a_gap_where_they_were_resumed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cut(tmp_path / "run", "update", 11, kill) is None  # after update 10 was logged, but not saved
    assert run(tmp_path / "run", "--resume") == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    scores = [(event.step, event.value) for event in events.Scalars("score")]
    rows = checkpoint(tmp_path / "run")["evaluations"]
    agree("scores", scores, [(row["step"], row["score_mean"]) for row in rows], rtol=1e-6)
    for name in LOSSES:
        assert [event.step for event in events.Scalars(f"losses/{name}")] == [4, 5, 8, 10, 12]


def test_runs_that_are_finished_say_so_and_can_be_extended(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, "--num-steps", "10") == 0
    assert stands(folder) == (10, [4, 8, 10]), "they end with an evaluation wherever they end"
    before = files(folder)
    capsys.readouterr()
    for steps in ("9", "10"):
        assert run(folder, "--resume", "--num-steps", steps) == 0
        assert capsys.readouterr() == (f"{folder} is finished\n", "") and files(folder) == before
    assert cut(folder, "update", 1, ctrl_c, "--resume") == 130
    assert not (folder / "result.json").exists() and read_json(folder)["num_steps"] == 12
    assert run(folder, "--resume") == 0 and stands(folder) == (12, [4, 8, 10, 12])
    assert_same("10 updates and 2 more", outcome(folder)["agent"], outcome(finished)["agent"])


def test_runs_past_their_last_update_end_with_an_evaluation(tmp_path):
    assert cut(tmp_path / "run", "update", 7, ctrl_c) == 130
    saved = checkpoint(tmp_path / "run")
    assert 0 < saved["seconds"] < 600
    torch.save(saved | dict(seconds=1e6), tmp_path / "run" / "checkpoint.pt")
    assert run(tmp_path / "run", "--resume", "--num-steps", "6") == 0 and stands(tmp_path / "run") == (7, [4, 7])
    assert 1e6 <= float(rows_of(tmp_path / "run")[1]["seconds"]) < 1e6 + 600, "with the seconds before it was cut off"


def test_runs_save_by_time_only_as_long_after_a_save_as_they_say(tmp_path, monkeypatch):
    """At 100 seconds an update, of the readings at 5, 10 and 15 only the second is more than 600 after a save."""
    done, saves, save = [], [], erdp.Run.save
    monkeypatch.setattr(erdp, "update", lambda *_: done.append(0) or losses())
    monkeypatch.setattr(erdp, "time", SimpleNamespace(monotonic=lambda: 100.0 * len(done)))
    monkeypatch.setattr(erdp.Run, "save", lambda run: saves.append(run.step) or save(run))
    assert run(tmp_path / "run", "--num-steps", "18", "--eval-every", "18") == 0
    assert saves == [0, 10, 18, 18]


@pytest.mark.parametrize("where, step, last", [("policy", 3, 0), ("critics", 3, 0), ("Q", 6, 4), ("Q", 12, 8)])
def test_runs_stop_where_a_number_is_not_finite_and_never_save_it(where, step, last, tmp_path, monkeypatch, capsys):
    """`step` is the update in which it is, `last` that of the last good checkpoint."""
    calls, folder = itertools.count(1), tmp_path / "run"

    def update(agent, *_):
        bad = next(calls) == step
        if bad and where != "Q":
            next(getattr(agent, where).parameters()).data[0] = math.nan
        return losses(q=-math.inf if bad and where == "Q" else 1.0)

    monkeypatch.setattr(erdp, "update", update)
    assert run(folder) == 1
    said = re.fullmatch(r"erdp: a loss is NaN or infinite .* update (\d+): (.*)\n", capsys.readouterr().err)
    assert step <= int(said[1]) <= step + 3 and f"{folder / 'checkpoint.pt'} is the last good checkpoint" == said[2]
    assert stands(folder)[0] == last and checkpoint(folder)["totals"].isfinite().all()
    assert not (folder / "result.json").exists()


def test_runs_that_a_signal_ends_between_two_readings_save_no_nan_either(tmp_path, monkeypatch):
    due, asked = erdp.Run.evaluation_due, []

    def evaluation_due(run):
        asked.append(run.step)
        if asked[-2:] == [3, 3]:  # first after the update, then before the next one
            os.kill(os.getpid(), signal.SIGTERM)
        return due(run)

    monkeypatch.setattr(erdp.Run, "evaluation_due", evaluation_due)
    monkeypatch.setattr(erdp, "update", lambda *_: losses(q=math.nan))
    assert run(tmp_path / "run") == 1 and checkpoint(tmp_path / "run")["totals"].isfinite().all()


@pytest.mark.slow
def test_runs_of_the_toy_draw_figure_1(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **kw: figures.append(figure) or save(figure, *to, **kw))
    assert erdp.main([*RUN.split(), "--run-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    scores = [(float(row["step"]), float(row["score_mean"])) for row in rows_of(tmp_path / "run")]
    score, reward, value = figures[0].axes
    agree("the score while training", score.containers[0].lines[0].get_xydata(), scores)
    (dotted,) = (line for line in score.lines if line.get_linestyle() == ":")
    assert dotted.get_ydata()[0] == pytest.approx(read_json(tmp_path / "run")["data_score"]), "the data's own score"
    x, y = reward.lines[0].get_data()
    agree("the reward", y, toy_reward(x))
    density, _ = np.histogram(toy_data(0).next_state[:, 0].numpy(), 60, density=True)
    agree("the data's density", [bar.get_height() for bar in reward.patches], density, rtol=1e-5)
    saved = checkpoint(tmp_path / "run")
    critics = QEnsemble(2, 1, saved["args"]["num_critics"], saved["args"]["hidden"])
    critics.load_state_dict(saved["agent"]["critics"])
    action = torch.linspace(-1, 1, 201)[:, None]
    q = critics(torch.zeros(201, 2), action).detach().double()
    for line, expected in zip(value.lines, (q.mean(0), q.mean(0) - 4 * q.std(0, correction=0)), strict=True):
        agree(
            "Q of the first action at state 0", line.get_xydata(), torch.stack([action[:, 0], expected], 1), rtol=1e-4
        )


def test_runs_are_at_work_in_their_folder_alone(refused, unfinished):
    with filelock.FileLock(unfinished / ".lock"):
        refused([*RUN.split(), "--resume"], f"{unfinished} ", "another process is at work", folder=unfinished)
    refused(RUN.split(), "config.json/run cannot be used", "--run-dir", folder=unfinished / "config.json" / "run")
    assert run(unfinished, "--resume") == 0
    assert erdp.run_folder(Args(run_dir="~/a")) == Path.home() / "a"
    args = Args(env="own", dataset="mine/a-v0", variant="released", seed=3)
    assert erdp.run_folder(args) == Path("runs/mine-a-v0__released__3")
    assert erdp.run_folder(Args(env="toy", dataset="toy-20")) == Path("runs/toy__paper__0")
    assert erdp.run_folder(Args(env="own", dataset="../a/b.hdf5")).name == "a-b.hdf5__paper__0", "not a hidden folder"


def test_eval_only_scores_a_policy_as_it_was_trained_unless_told_otherwise_and_writes_nothing(finished, capsys):
    def said(name, *more):
        capsys.readouterr()
        assert erdp.main(["--eval-only", str(finished / name), "--device", "cpu", *more]) == 0
        return capsys.readouterr().out

    before, rows = files(finished), checkpoint(finished)["evaluations"]
    best = max(rows, key=lambda row: row["score_mean"])
    for name, row in {"policy.pt": rows[-1], "checkpoint.pt": rows[-1], "policy-best.pt": best}.items():
        assert in_words(row) in said(name), "the run's own evaluation, again"
        args = Args(**checkpoint(finished, name)["args"])
        assert erdp.load_policy(finished / name).agent.args == args
        one = erdp.load_policy(finished / name, eval_candidates=1)
        assert one.agent.args == dataclasses.replace(args, eval_candidates=1)
    for other in ("--eval-candidates", "--eval-episodes", "--seed"):
        assert in_words(rows[-1]) not in said("policy.pt", other, "7")
    assert files(finished) == before


def test_policies_act_in_float32_and_uncompiled_unless_told_otherwise(finished, tmp_path, monkeypatch, refused):
    saved, path, critics = checkpoint(finished, "policy.pt"), tmp_path / "policy.pt", []
    saved["args"] |= dict(precision="bf16", compile=True, device="cuda")
    torch.save(saved, path)
    args = erdp.load_policy(path).agent.args
    assert (args.precision, args.compile, args.device) == ("float32", False, "cpu")
    assert not erdp.load_policy(path).agent.critics_target.bf16
    evaluate = erdp.evaluate
    monkeypatch.setattr(erdp, "evaluate", lambda actor, *a: critics.append(actor.agent.critics) or evaluate(actor, *a))
    used, compiled, use_device = [], [], erdp.use_device
    monkeypatch.setattr(erdp, "use_device", lambda args: used.append(args.precision))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    for precision, flag in (("float32", "--no-compile"), ("bf16", "--compile")):
        assert erdp.main(["--eval-only", str(path), "--precision", precision, flag]) == 0
    assert [each.bf16 for each in critics] == [False, True] and used == ["float32", "bf16"]
    assert compiled == [erdp.act]
    saved["args"] |= dict(precision="tf32")  # as every run on a GPU has it
    torch.save(saved, path)
    assert erdp.main(["--eval-only", str(path)]) == 0
    assert used[-1] == "float32" and len(compiled) == 1, "if nothing is said, as load_policy has it"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as if its tensors were there
        torch.save(saved, path)
    assert erdp.load_policy(path).agent.sde.theta_bar.device.type == "cpu"
    refused(["--eval-only", str(path), "--lcb-coef", "1"], f"{path} was made with --lcb-coef 4.0, not 1.0")
    monkeypatch.setattr(erdp, "use_device", use_device)
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler")))
    refused(["--eval-only", str(path), "--device", "cpu", "--compile"], "torch.compile does not work here", "compiler")


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


def test_run_on_a_tiny_minari_data_set_and_evaluation_without_it(minari_root, tmp_path, capsys):
    """From data to score, with nested observations, matrices as actions and the set's own reference scores."""
    env, folder = made("Ledger", low=[[-1, -1], [-1, -1]], high=[[1, 2], [3, 4]], dtype="float64"), tmp_path / "run"
    dataset = make_minari(env, ref_min_score=2.0, ref_max_score=12.0)
    capsys.readouterr()
    assert learn(folder, "--dataset", dataset) == 0
    said = capsys.readouterr()
    assert said.err == "", "nothing on stderr, whatever the packages print"
    assert "mean return 1.50, score -5.0" in said.out, "of the data's first 3 steps"
    config, rows = read_json(folder), checkpoint(folder)["evaluations"]
    found = [config[key] for key in ("dataset_id", "transitions", "layout", "env", "loss")]
    assert found == ["made/data-v0", 8, LAYOUT, "own", "noise"], "Args' own settings"
    assert [row["step"] for row in rows] == [2, 4] and {row["success"] for row in rows} <= {0, 1 / 3, 2 / 3, 1}
    for row in rows:
        agree("score", row["score_mean"], 100 * (row["return_mean"] - 2) / 10)
        assert 1 <= row["length"] <= 3, "the environment's time limit is kept"
    shutil.rmtree(minari_root)
    for name in ("policy.pt", "checkpoint.pt"):
        assert erdp.main(["--eval-only", str(folder / name), "--device", "cpu"]) == 0, "a policy knows its environment"
        assert in_words(rows[-1]) in capsys.readouterr().out
    actor = erdp.load_policy(folder / "policy.pt")
    action = actor(Ledger.observation_space.sample())
    assert action.dtype == "float64" and gym.make(env).action_space.contains(action), "in the environment's own form"


@pytest.mark.slow
def test_run_in_an_environment_that_the_data_set_does_not_name(minari_root, tmp_path, monkeypatch, capsys):
    env = made("Ledger", 9)
    spaces = dict(observation_space=Ledger.observation_space, action_space=gym.make(env).action_space)
    argv = ["--dataset", make_minari(env, random_episodes(env), recorded=None, **spaces)]
    (tmp_path / "made_here.py").write_text(f"from {__name__} import Ledger\n")
    monkeypatch.chdir(tmp_path)
    assert learn(tmp_path / "run", *argv, "--eval-env", "made_here:Ledger") == 0
    monkeypatch.setitem(gym.registry, "Ledger-v7", dataclasses.replace(made("Ledger", 3), id="Ledger-v7"))
    monkeypatch.setitem(erdp.ROWS, "ledger", erdp.Row("own", argv[1], "Ledger-v7", 2, 0.0, 10.0))
    spec = EnvSpec.from_json(erdp.load_data(Args(env="ledger"))[0].spec)
    assert (spec.id, spec.max_episode_steps) == ("Ledger-v7", 2), "by the row's rule"
    named = make_minari(env, name="made/named-v0", eval_env=made("Ledger", 2, unstable=7))
    by_name = "id Made-v0 / Ledger-v7, max_episode_steps 9 / 3"
    by_env = "max_episode_steps 9 / 2, unstable its default / 7"
    for eval_env, words in (("Ledger-v7", by_name), (None, by_env)):
        capsys.readouterr()
        erdp.load_data(Args(env="own", dataset=named, eval_env=eval_env))
        assert capsys.readouterr().out == f"the data were recorded / are evaluated with {words}\n"
    twice = gym.wrappers.RescaleAction.wrapper_spec(min_action=-1.0, max_action=1.0)
    wrapped = dataclasses.replace(env, additional_wrappers=(twice,))
    rescaled = make_minari(wrapped, random_episodes(env), name="made/rescaled-v0")
    erdp.load_data(Args(env="own", dataset=rescaled, eval_env="Ledger-v7"))
    assert "max_episode_steps 9 / 3, wrappers ['RescaleAction'] / []\n" in capsys.readouterr().out
    args = Args(env="own", dataset=rescaled)
    spec, _ = erdp.describe_env(args, erdp.read_data(args))
    assert [wrapper.name for wrapper in spec.additional_wrappers] == ["RescaleAction"], "the data's own stay"


def rewarded() -> gym.Env:
    """An environment in a wrapper whose argument no file can keep."""
    return gym.wrappers.TransformReward(Ledger(), lambda reward: reward + 100)


def test_run_in_an_environment_whose_entry_point_adds_wrappers(minari_root):
    dataset, returns = make_minari(made("Ledger", 9)), []
    for name in ("Ledger", "rewarded"):
        task, _ = erdp.load_data(Args(env="own", dataset=dataset, eval_env=f"{__name__}:{name}"))
        with erdp.playing(task, 4) as envs:
            played = erdp.evaluate(Gambler(), envs, 4, seed=5)
        returns.append(played["return"])
    agree("its reward", returns[1], returns[0] + 100 * played["length"])


def test_eval_only_plays_in_another_environment_if_its_spaces_are_the_policys(
    refused, minari_root, tmp_path, monkeypatch, capfd
):
    policy = ["--eval-only", str(tmp_path / "run" / "policy.pt")]
    assert learn(tmp_path / "run", "--dataset", make_minari(made("Ledger", 1))) == 0
    capfd.readouterr()
    assert erdp.main([*policy, "--eval-env", f"{__name__}:Ledger"]) == 0
    assert "length 1," in capfd.readouterr().out, "where it has no time limit it takes the policy's"
    monkeypatch.setitem(gym.registry, "Ledger-v7", dataclasses.replace(made("Ledger", 5), id="Ledger-v7"))
    assert erdp.main([*policy, "--eval-env", "Ledger-v7", "--eval-episodes", "9"]) == 0
    assert "length 1," not in capfd.readouterr().out, "its own time limit comes first"
    refused([*policy, "--eval-env", "Pendulum-v1"], "Pendulum-v1 has other observations or actions than the policy")
    refused([*policy, "--eval-env", "CartPole-v1"], "CartPole-v1", "Discrete(2)")
    refused([*policy, "--eval-env", "Nowhere-v0"], "Nowhere-v0 cannot be made")


def test_eval_only_of_an_antmaze_policy_in_another_environment_keeps_the_mirror_image(
    minari_root, tmp_path, monkeypatch, capfd
):
    walls = [[c if c == 1 else 0 for c in line[::-1]] for line in MAZE]
    dataset = make_minari(made("Made", maze_map=walls), [episode(0, [0, 1])], eval_env=made("Made", maze_map=MAZE))
    assert learn(tmp_path / "run", "--env", "antmaze-umaze-v0", "--dataset", dataset) == 0
    policy, played, playing = str(tmp_path / "run" / "policy.pt"), [], erdp.playing
    monkeypatch.setattr(erdp, "playing", lambda task, *more: played.append(task) or playing(task, *more))
    for maze, mirrored in ((MAZE, True), ([*MAZE, [1] * 4], False)):
        monkeypatch.setitem(gym.registry, "Other-v0", dataclasses.replace(made("Made", maze_map=maze), id="Other-v0"))
        capfd.readouterr()
        assert erdp.main(["--eval-only", policy, "--eval-env", "Other-v0", "--eval-episodes", "1"]) == 0
        said, spec = capfd.readouterr().out, EnvSpec.from_json(played[-1].spec)
        assert ("the walls of Other-v0 are mirrored here" in said) == mirrored
        expected = [line[::-1] for line in maze] if mirrored else maze
        assert spec.kwargs.get("maze_map", maze) == expected, "another maze stays as it is"


def test_data_of_a_set_that_names_an_environment_for_evaluation_alone(minari_root):
    env = gym.make(made("Made"))
    spaces = dict(observation_space=env.observation_space, action_space=env.action_space)
    name = make_minari(made("Made"), [episode(0, [1, 2])], recorded=None, eval_env=made("Made", 7), **spaces)
    task, _ = erdp.load_data(Args(env="own", dataset=name))
    assert EnvSpec.from_json(task.spec).max_episode_steps == 7


def test_data_takes_the_sets_own_reference_scores_also_one_of_0(minari_root):
    for known, expected in ((dict(ref_min_score=-1500.0, ref_max_score=0.0), (-1500, 0)), ({}, (0, 100))):
        dataset = make_minari(made("Ledger"), **known)
        task, _ = erdp.load_data(erdp.parse(["--dataset", dataset, "--device", "cpu"]))
        assert (task.ref_min, task.ref_max) == expected
        shutil.rmtree(minari_root / dataset)
    dataset = make_minari(made("Made", maze_map=MAZE), [episode(0, [0])], ref_min_score=-5.0, ref_max_score=5.0)
    task, _ = erdp.load_data(Args(env="antmaze-umaze-v0", dataset=dataset))
    assert (task.ref_min, task.ref_max) == (0, 1), "a row keeps D4RL's"


def test_run_in_another_thread_than_the_main_one_as_in_a_sweep(minari_root, tmp_path):
    argv, statuses = ["--dataset", make_minari(made("Ledger"))], []
    thread = threading.Thread(target=lambda: statuses.append(learn(tmp_path / "run", *argv)))
    thread.start()
    thread.join()
    assert statuses == [0] and stands(tmp_path / "run") == (4, [2, 4])


def test_run_with_a_dead_worker_ends_in_one_sentence_and_goes_on(minari_root, tmp_path, capfd):
    """It dies within a step of the second evaluation."""
    folder, doom = tmp_path / "run", tmp_path / "doom"
    argv = ["--dataset", make_minari(made("Ledger", doom=str(doom)))]
    assert learn(folder, *argv, "--num-steps", "2") == 0
    capfd.readouterr()
    assert cut(folder, "update", 1, doom.touch, *argv, "--resume", settings=SHORT) == 2
    assert re.fullmatch("erdp: a process of the evaluation has died.*--resume.*\n", capfd.readouterr().err)
    assert multiprocessing.active_children() == [] and stands(folder) == (4, [2])
    doom.unlink()
    assert learn(folder, *argv, "--resume") == 0 and stands(folder) == (4, [2, 4])


def test_run_stopped_between_two_steps_needs_no_worker_to_end(minari_root, tmp_path, monkeypatch, capfd):
    """A scheduler's signal to all processes: its workers are gone when the environments are to be closed."""
    folder, argv = tmp_path / "run", ["--dataset", make_minari(made("Ledger"))]
    step = gym.vector.AsyncVectorEnv.step

    def last_step(envs, actions):
        result = step(envs, actions)
        for process in envs.processes:
            process.kill()
            process.join()
        sigterm()
        return result

    after_the_trial = functools.partial(monkeypatch.setattr, gym.vector.AsyncVectorEnv, "step", last_step)
    assert cut(folder, "update", 1, after_the_trial, *argv, settings=SHORT) == 143
    said = capfd.readouterr()
    assert said.err == "" and "stopped at update 2" in said.out and multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, source, sizes",
    [
        ("antmaze-umaze-v0", "standin/antmaze/umaze-v0", (31, 8)),
        ("kitchen-complete-v0", "standin/kitchen/random-v0", (59, 9)),
        ("pen-human-v1", "standin/pen/human-v0", (45, 24)),
        ("walker2d-medium-v2", "standin/d4rl/walker2d-medium-v2.hdf5", (17, 6)),
    ],
)
def test_run_on_recorded_data(env, source, sizes, minari_root, tmp_path, capfd):
    if not os.environ.get("ERDP_DATA"):
        pytest.skip("ERDP_DATA is not set: no folder of recorded data")
    data = Path(os.environ["ERDP_DATA"])
    (minari_root / "standin").symlink_to(data / "minari" / "standin")  # no lock is left where the data are
    argv = ["--env", env, "--dataset", str(data / source) if source.endswith("5") else source]
    assert learn(tmp_path / "run", *argv, "--eval-every", "4", "--eval-episodes", "1") == 0
    assert capfd.readouterr().err == "", "nothing on stderr, whatever the packages print"
    agent, (row,) = erdp.load_policy(tmp_path / "run" / "policy.pt").agent, checkpoint(tmp_path / "run")["evaluations"]
    assert agent.policy.layers[0].in_features == sum(sizes) + 16 and agent.policy.layers[3].out_features == sizes[1]
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
    "--variant released --num-diffusion-steps 2": ["--num-diffusion-steps is 2 but must be from 3"],
    "--variant debruijn --env hopper-medium-v2": ["give it --loss noise or --loss posterior"],
    "--precision tf32 --device cpu": ["--precision tf32", "--device cpu"],
    f"--seed {2**63}": [f"--seed is {2**63}"],
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
    **dict.fromkeys(["seed", "ema_start"], ([0, 2**63 - 1], [-1])),
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


def hdf5(n=6, **rows):
    """A D4RL file of n rows, some of which are changed."""
    return lambda folder: in_made(d4rl_file(folder / "a.hdf5", n, **rows))


def minari_set(env=None, row=None, damage=lambda folder: None, **more):
    """A Minari set of an environment, by default of the Ledger, whose files are damaged."""

    def make(folder):
        dataset = make_minari(env or made("Ledger"), **more)
        damage(folder / "minari" / dataset / "data")
        return ["--dataset", dataset, *(["--env", row] if row else [])]

    return make


def fewer_goals(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        goals = file["episode_1/observations/goal"][:-1]
        del file["episode_1/observations/goal"]
        file["episode_1/observations/goal"] = goals


def lost_rewards(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1/rewards"]


def half_of_it(folder):
    path = folder / "main_data.hdf5"
    os.truncate(path, path.stat().st_size // 2)


BAD = {  # arguments, or what makes the data that they name; and words that the sentence must have
    "a file for the toy": ("--env toy --dataset a.hdf5", ["a.hdf5", "toy-0 to toy-99"]),
    "own data without a name": ("--env own", ["--dataset"]),
    "no such file": ("--dataset a.hdf5", ["a.hdf5", "No such file"]),
    "no such home": ("--env hopper-medium-v2 --dataset ~nobodyhere/a.hdf5", ["~nobodyhere"]),
    "an id without version": ("--dataset made/data", ["made/data", "a Minari id with its version"]),
    "no such set": ("--env pen-human-v1", ["D4RL/pen/human-v2", "Network is unreachable", "downloaded, and is not in"]),
    "no such file of D4RL's": ("--env hopper-medium-v2", ["hopper_medium-v2.hdf5 cannot be downloaded", "by hand"]),
    "another environment for the toy": ("--eval-env Hopper-v4", ["Hopper-v4"]),
    "too large a batch": ("--batch-size 100000000000000", ["smaller"]),
    "no such GPU": ("--device cuda", ["--device cuda is not there: PyTorch sees cpu"]),
    "no policy": ("--eval-only nowhere.pt", ["nowhere.pt", "No such file"]),
    "nothing to resume": ("--resume", ["checkpoint.pt", "--run-dir", "--env"]),
    "hdf5: no timeouts and rewards": (hdf5(timeouts=None, rewards=None), ["rewards"]),
    "hdf5: fewer observations": (hdf5(observations=np.zeros((5, 2))), ["(5, 2), (6, 1), (6,)"]),
    "hdf5: wide observations": (hdf5(observations=np.zeros((6, 3))), ["(6, 3)", "(7, 2)"]),
    "hdf5: a number": (hdf5(rewards=1.0), ["a.hdf5"]),
    "hdf5: a column of ends": (hdf5(300, terminals=np.zeros((300, 1))), ["(300, 1), (300,)"]),
    "hdf5: terminals of 255": (hdf5(terminals=[0, 255, 0, 0, 0, 0]), ["episode 0", "not all 0 or 1"]),
    "hdf5: infinite in float32": (hdf5(observations=np.full((6, 2), 1e39)), ["NaN or infinity"]),
    "hdf5: NaN in the last state": (hdf5(observations=[[0.0, 0.0]] * 5 + [[math.nan] * 2]), ["infinity", "next_state"]),
    "hdf5: action outside": (hdf5(actions=np.full((6, 1), 1.1)), ["5 of its 5 actions are outside", "0.1: clip"]),
    "hdf5: all timeouts": (hdf5(timeouts=np.ones(6)), ["no transition"]),
    "hdf5: no row": (hdf5(0), ["shapes (0, 2)"]),
    "hdf5: no environment": (lambda folder: hdf5()(folder)[:2], ["names no environment", "--eval-env", "--env"]),
    "hdf5: NaN in the last reward": (hdf5(rewards=[0, 1, 2, 3, 4, math.nan]), ["NaN", "reward"]),
    "an empty value": ("--eval-only=", ["an option has an empty value"]),
    "lost rewards": (minari_set(damage=lost_rewards), ["an episode of made/data-v0 cannot be read", "delete"]),
    "fewer goals": (minari_set(damage=fewer_goals), ["made/data-v0"]),
    "scores that do not ascend": (minari_set(ref_min_score=1.0, ref_max_score=1.0), ["1.0 and 1.0, but must ascend"]),
    "half of the data": (minari_set(damage=half_of_it), ["made/data-v0", "delete"]),
    "discrete actions": (minari_set("CartPole-v1"), ["Discrete(2)"]),
    "unbounded actions": (minari_set(made("Ledger", low=[-1] * 60, high=[math.inf] * 60)), ["0 < high - low < 1e6"]),
    "bounds without width": (minari_set(made("Ledger", low=[-1, 1], high=[1, 1])), ["0 < high - low"]),
    "huge bounds": (minari_set(made("Ledger", low=[-5e5] * 2, high=[5e5] * 2)), ["high - low < 1e6"]),
    "evaluation: it cannot be made": (minari_set(eval_env=made("Nowhere")), ["cannot be made"]),
    "evaluation: it cannot be reset": (minari_set(eval_env=made("OldReset")), ["a step in", "fails", "'seed'"]),
    "evaluation: it cannot make a step": (
        minari_set(eval_env=made("OldStep")),
        ["a step in", "fails", "values to unpack"],
    ),
    "another row's data: Kitchen": (minari_set(row="kitchen-complete-v0"), ["cannot be made"]),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name, refused, minari_root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(erdp, "D4RL_SERVER", "http://127.0.0.1:9/")  # where nobody answers
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    argv, words = BAD[name]
    refused([*SHORT.split(), *(argv.split() if isinstance(argv, str) else argv(tmp_path))], *words)


def rewards_of(row) -> list:
    return erdp.load_data(Args(env=row))[1].reward.tolist()


def test_hdf5_is_downloaded_whole_and_once_for_all_processes(tmp_path, monkeypatch):
    name, asked = "hopper_medium-v2.hdf5", []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    content = d4rl_file(tmp_path / name, sizes=(11, 3)).read_bytes()
    handler = functools.partial(Handler, directory=tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(erdp, "D4RL_SERVER", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, args=[0.05]).start()
        with multiprocessing.get_context("fork").Pool(4) as pool:
            found = pool.map(rewards_of, ["hopper-medium-v2"] * 4, chunksize=1)
        server.shutdown()
    assert found == [[0, 1, 2, 3, 4]] * 4 and asked == [f"/{name}"]
    assert files(tmp_path / "d4rl") == {Path(name): content}
    shutil.copytree(tmp_path / "d4rl", tmp_path / ".d4rl" / "datasets")  # where D4RL itself keeps them
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR")
    task, _ = erdp.load_data(Args(env="hopper-medium-v2"))  # the server is gone
    assert (EnvSpec.from_json(task.spec).id, task.ref_max, len(task.low)) == ("Hopper-v4", 3234.3, 3)


CHANGED = "--seed=1 --variant=released --batch-size=9 --num-critics=3 --lcb-coef=1 --pessimism=min --entropy-coef=0"
CHANGED += " --num-diffusion-steps=6 --schedule=vp --loss=posterior --lr=0.01 --eta=2 --grad-norm=1 --max-q-backup"
CHANGED += " --no-clip-denoised --env=hopper-medium-v2 --hidden=9 --discount=0.9 --critic-lr=0.1 --target-rate=0.1"
CHANGED += " --ema-rate=1 --ema-every=2 --ema-start=5 --q-time=1"


@pytest.mark.slow
def test_bad_change_of_a_setting_is_refused_by_its_name_for_a_resumed_run_and_in_its_folder(refused, unfinished):
    names = [flag.split("=")[0].replace("--no-", "--") for flag in CHANGED.split()]
    for flag, name in zip(CHANGED.split(), names):
        refused([*RUN.split(), "--resume", flag], f" was made with {name} ", "give the same", folder=unfinished)
    refused(RUN.split(), f"{unfinished} exists: --resume goes on with it, --run-dir names another", folder=unfinished)
    free = "--num-steps --eval-every --eval-episodes --eval-candidates --device --compile --precision --dataset"
    free += " --eval-env --run-dir --resume --eval-only"
    thought_of = {name[2:].replace("-", "_") for name in names + free.split()}
    assert thought_of == {field.name for field in dataclasses.fields(Args)}


def test_resumed_run_of_ten_steps_may_be_given_its_q_time_again(tmp_path):
    """Its preset has five, of which 7 is none."""
    argv = ["--num-diffusion-steps", "10", "--q-time", "7", "--num-steps"]
    assert run(tmp_path / "run", *argv, "1") == 0 and run(tmp_path / "run", "--resume", *argv[2:], "2") == 0


def test_bad_resume_where_nothing_is_says_so_and_starts_anew_where_told_what(refused, finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".part-checkpoint.pt").write_bytes(b"PK")  # as a killed process leaves it
    refused(["--resume"], str(tmp_path / "run" / "checkpoint.pt"), "--run-dir", "--env")
    refused(["--eval-only", ""], "an option has an empty value")
    assert run(tmp_path / "third", "--resume", "--dataset", "toy-20", "--num-steps", "1") == 0, "the data say which"
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert run(tmp_path / "other", "--num-steps", "1") == 0, "such a file is nothing to be kept"
    assert run(tmp_path / "run", "--resume", "--env", "toy") == 0
    assert_same("begun by --resume", outcome(tmp_path / "run"), outcome(finished))
    (tmp_path / "run" / "checkpoint.pt").unlink()  # to save room, perhaps
    argv = [*RUN.split(), "--env", "toy", "--num-steps", "20", "--resume"]
    refused(argv, "has results, but no checkpoint.pt", folder=tmp_path / "run")


def test_bad_resume_on_other_data_or_another_kind_of_device_is_refused(refused, unfinished):
    refused(["--resume", "--dataset", "toy-21"], "made from other data", "toy-5", folder=unfinished)
    meanwhile = dataclasses.replace(
        Args(**checkpoint(unfinished)["args"]), lr=0.5, run_dir=str(unfinished), resume=True
    )
    with pytest.raises(erdp.UserError, match="was made with --lr"):  # a checkpoint that came after the settings
        erdp.train(meanwhile)
    saved = checkpoint(unfinished)
    torch.save(saved | dict(args=saved["args"] | dict(device="cuda:1")), unfinished / "checkpoint.pt")
    refused(["--resume", "--device", "cpu"], "made on cuda:1", "--eval-only", folder=unfinished)
    words = "--device cuda:9 is not there", "a run goes on only on the kind of device where it began"
    refused(["--resume", "--device", "cuda:9"], *words, folder=unfinished)


def test_bad_sizes_for_the_memory_are_refused_and_mistakes_keep_their_traceback(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(["--device", "cuda:2"], "--device cuda:2 is not there: PyTorch sees cpu, cuda, cuda:0, cuda:1")
    problems = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    for error in (MemoryError, torch.OutOfMemoryError("CUDA out of memory"), *map(RuntimeError, problems)):
        monkeypatch.setattr(erdp, "load_data", Mock(side_effect=error))
        refused(["--env", "toy", "--device", "cpu"], "needs more memory than there is")
    for error in (KeyError("a mistake"), RuntimeError("a mistake")):
        monkeypatch.setattr(erdp, "load_data", Mock(side_effect=error))
        with pytest.raises(type(error), match="a mistake"):
            erdp.main(["--env", "toy"])


@pytest.mark.parametrize("name, argv", [("checkpoint.pt", ["--resume"]), ("policy.pt", ["--eval-only"])])
def test_bad_files_of_a_run_are_refused(name, argv, refused, unfinished):
    """They are cut short, of another version, lack something, or have weights of other sizes."""
    path, whole = unfinished / name, checkpoint(unfinished, name)
    argv = [*argv, str(path)] if name == "policy.pt" else argv
    path.write_bytes(path.read_bytes()[:-1])
    refused(argv, str(path), "not whole", folder=unfinished)
    torch.save(whole | dict(format=2), path)  # of the program before
    refused(argv, f"{path} is no policy or checkpoint of this program", "another version", folder=unfinished)
    without = [{k: v for k, v in whole.items() if k != key} for key in whole]
    agents = [{k: v for k, v in whole["agent"].items() if k != key} for key in whole["agent"]]
    code = type("Code", (), dict(__reduce__=lambda _: (open, (str(unfinished / "made"), "w"))))()  # runs if it is read
    for content in [*without, *(whole | dict(agent=agent) for agent in agents), whole | dict(args={}), "a text", code]:
        torch.save(content, path)
        refused(argv, str(path), folder=unfinished)


def test_help_shows_the_rows_own_settings(capsys):
    with pytest.raises(SystemExit):
        erdp.main(["--env", "pen-human-v1", "--help"])
    said = capsys.readouterr().out
    assert "3e-05" in said and "--num-critics" in said
    for argv in ("--env own", "--env=own", "--dataset mine/a-v0"):
        with pytest.raises(SystemExit):
            erdp.main([*argv.split(), "--help"])
        assert "(default: 1000000)" in capsys.readouterr().out, "and not the toy's"


# ==== Real processes ==================================================================================================
PLAIN = dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")  # a terminal without Unicode
CPU = "--device cpu --num-steps 20 --eval-every 20 --eval-episodes 1 --run-dir run"
REAL = {  # arguments, environment variables, status, and what stderr must be
    "no renderer": ("--env hopper-medium-v2 --dataset a.h5", dict(MUJOCO_GL="osmesa"), 2, "erdp: a.h5 .*no transition"),
    "no Unicode": ("--dataset ü.hdf5", PLAIN, 2, "erdp: .*hdf5 .*"),
    "no compiler": (f"{CPU} --compile", dict(CXX="no-compiler"), 2, "erdp: torch.compile .*--no-compile .*"),
    "a run": (CPU, PLAIN, 0, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_processes_say_one_sentence_of_bad_input_or_nothing(name, tmp_path):
    argv, env, status, words = REAL[name]
    command = [sys.executable, erdp.__file__, *argv.split()]
    before = {d4rl_file(tmp_path / "a.h5", sizes=(11, 3), timeouts=np.ones(6)).relative_to(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == status and re.fullmatch(f"{words}\n" if words else "", done.stderr), done
    assert status == 0 or files(tmp_path).keys() == before, "before anything is written"


def waited_for(condition, child=None):
    """Waits until the condition holds, which it returns, and no longer than the child runs."""
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline and not (child and child.poll() is not None), child and child.communicate()
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_real_processes_end_with_their_workers(number, status, minari_root, tmp_path):
    """In an evaluation. Ctrl-C and a scheduler's signal come to the workers too, SIGKILL to the main process alone."""
    folder = tmp_path / "run"
    argv = [*SHORT.split(), "--dataset", make_minari(made("Ledger")), "--run-dir", str(folder)]
    command = [sys.executable, erdp.__file__, *argv, "--eval-episodes", "1000000"]
    options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    options["env"] = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent))
    with subprocess.Popen(command, start_new_session=True, **options) as child, contextlib.ExitStack() as end:
        end.callback(child.kill)  # if anything fails
        waited_for(lambda: (folder / "checkpoint.pt").exists() and checkpoint(folder)["step"] == 2, child)
        time.sleep(1)
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        (os.kill if number == signal.SIGKILL else os.killpg)(child.pid, number)
        out, err = child.communicate(timeout=120)
    assert child.returncode == status and len(workers) >= 2, err
    assert number == signal.SIGKILL or (err == "" and re.search("stopped .*: --resume goes on from", out)), err
    waited_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


@pytest.mark.slow
def test_readmes_own_environment_is_recorded_learned_and_acted_in_as_printed(tmp_path):
    """From ten recorded episodes of an own environment to a trained policy, by the README's blocks alone."""
    text = Path(erdp.__file__).with_name("README.md").read_text().partition("## Your own data and environment")[2]
    environment, commands = re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)[:2]
    shutil.copy(erdp.__file__, tmp_path)
    (tmp_path / "reach.py").write_text(environment)
    bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    there = os.environ | {"MINARI_DATASETS_PATH": str(tmp_path / "minari"), "PATH": bin_folder, "OMP_NUM_THREADS": "1"}

    def printed(command) -> str:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    *_, action = map(printed, commands.splitlines())
    assert abs(float(action.strip("[]\n"))) <= 1, "it prints an action"
    (tmp_path / "erdp.py").rename(tmp_path / "own-method.py")  # a copy under another name has the toy too
    printed("python own-method.py --num-steps 1 --eval-episodes 1 --device cpu")


# ==== What a CUDA graph of `update` needs, without a GPU ==============================================================
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
        named = name == "to" and any(isinstance(x, str) for x in (*args[1:], *kwargs.values()))
        assert not named, "`to` names a device"  # PyTorch's own clipping gives it the gradients' torch.device
        return function(*args, **kwargs)


WAITS = "x.sum().item()", "x[x > 0]", "bool(x.sum() > 0)", "x.nonzero()", "x.to(device='cpu')", "x.cpu()", "x.tolist()"


@pytest.mark.parametrize("code", [*WAITS, "torch.randn(3)", "x.uniform_()"])
def test_update_checks_see_what_waits_or_draws(code):
    x = torch.ones(4)
    with pytest.raises(AssertionError), NoWaitNorDraw(), NoHostCopies():
        eval(code, dict(torch=torch, x=x))


class Prepared(erdp.Run):
    """A run with a tiny agent of any dtype, whose `learn` is what is captured."""

    def __init__(self, device="cpu", dtype=torch.float32, **choices):
        agent = tiny_agent(device, dtype, **choices)
        args = dataclasses.replace(agent.args, device=device)
        task = SimpleNamespace(layout=[3], low=[-1, -1], high=[1, 1], dtype="float32")
        super().__init__(args, task, random_batch(100), Path())
        self.agent, self.data = agent, moved(self.data, device, dtype)
        self.noise = moved(random_noise(args, torch.Generator().manual_seed(0)), device, dtype)
        self.rows.copy_(torch.arange(args.batch_size))
        self.latest = self.latest.to(dtype)

    def addresses(self) -> dict:
        """data_ptr of every tensor that a replay reads or writes, by name."""
        agent, names = self.agent, ("noise", "data", "rows", "latest", "totals")
        tensors = {name: getattr(self, name) for name in names} | dict(sde=vars(agent.sde), agent=agent.state_dict())
        tensors |= dict(buffers=[dict(agent.policy.named_buffers())])
        leaves, _ = pytree.tree_flatten_with_path(tensors)
        return {pytree.keystr(path): x.data_ptr() for path, x in leaves if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("name", ["paper", "released", "antmaze", "min", "debruijn", "bf16"])
def test_update_neither_waits_nor_draws_and_works_in_place_at_static_addresses(name):
    ours = Prepared(**ALGORITHM1.get(name, dict(precision=name)))
    ours.learn()  # what is initialised on first use runs outside the graph too
    before, values = ours.addresses(), [p.detach().clone() for p in ours.agent.critics.parameters()]
    drawn = torch.get_rng_state()
    for seed in range(3):
        erdp.sample_noise(ours.noise, torch.Generator().manual_seed(seed))
        with NoWaitNorDraw(), NoHostCopies():
            ours.learn()
    assert ours.addresses() == before and torch.equal(torch.get_rng_state(), drawn)
    assert any("exp_avg" in key for key in before) and any("sde" in key for key in before)
    assert not any(torch.equal(p, old) for p, old in zip(ours.agent.critics.parameters(), values)), "it learns"
    assert ours.agent.updates == 4 and ours.totals[-1] == 4


def test_compile_is_of_the_sampler_both_losses_and_acting_and_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    ours = Prepared(compile=True)
    for _ in range(2):
        ours.learn()
        ours.actor(np.zeros(3))
    assert compiled == [erdp.sample_actions, erdp.critic_loss, erdp.policy_loss, erdp.act]


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
        if expected == plain:
            assert cuda.stream.call_args == call(step.stream), "it runs on the stream of its own"
            assert cuda.Stream().wait_stream.call_args == call(cuda.current_stream()), "... after what was asked before"
            assert cuda.current_stream().wait_stream.call_args == call(step.stream), "... and what follows waits for it"
        elif "run" in expected:
            assert cuda.graph.call_args == call(step.graph, stream=step.stream)


# ==== Compiled and captured updates, and CUDA =========================================================================
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@needs_cuda
@pytest.mark.parametrize("name", ALGORITHM1)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_cuda_losses_and_gradients_agree_with_the_cpus(name, dtype, tolerance):
    torch.set_float32_matmul_precision("highest")  # a run before this may have allowed TF32
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
    fast = Prepared(device, torch.float64, **choices)
    eager = Prepared(device, torch.float64, **choices | dict(compile=False))
    generator, step = torch.Generator().manual_seed(1), erdp.Captured(fast.learn) if capture else fast.learn
    for k in range(updates):
        rows = torch.randint(100, fast.rows.shape, generator=generator)
        fresh = random_noise(fast.agent.args, generator)
        for each in (fast, eager):
            each.rows.copy_(rows)
            for buffer, values in zip(each.noise, fresh):
                buffer.copy_(values)
        step()
        eager.learn()
        agree(f"metrics of update {k}", fast.latest.cpu(), eager.latest.cpu(), rtol=1e-7, atol=1e-9)
    assert fast.agent.updates == eager.agent.updates == updates
    for name in ("policy", "critics", "policy_ema", "critics_target"):
        ours, theirs = (getattr(each.agent, name).state_dict() for each in (fast, eager))
        for key, value in ours.items():
            agree(f"{key} of {name} after {updates} updates", value.cpu(), theirs[key].cpu(), rtol=1e-6, atol=1e-8)


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
