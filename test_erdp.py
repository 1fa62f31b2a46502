"""The proof of erdp.py: one test or more for every equation, table and claim, in the paper's order.

Expectations never come from the code under test. They are SciPy's densities, simulations of the SDE, Bayes' rule,
finite differences, closed forms, or a slow second implementation written here, term by term from the paper (the
`literal_*` functions and `Algorithm1`). A test is named after the equation it proves, and its message says what was
expected of it.

Identities are drawn by Hypothesis (schedule, T, shapes, times, values) and hold in float64 to a relative 1e-10, or to
what their rounding allows. Monte-Carlo tests have fixed seeds, stand outside @given, say which error they are sure to
see, and have a tolerance at which a correct program fails for less than one seed in a million (RATE), shared among all
comparisons of the test.

    pytest                  # everything
    pytest -m "not slow"    # the quick part, which alone catches a wrong equation
"""

import copy
import functools
import inspect
import math
from typing import NamedTuple

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import norm

import erdp
from erdp import Agent, Args, Batch, MeanRevertingSDE, Noise, NoiseNetwork, QEnsemble

settings.register_profile("erdp", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("erdp")
torch.set_num_threads(1)  # every tensor here is small

RATE = 1e-6  # chance that a correct program fails a Monte-Carlo test, over the choice of its seed
SCHEDULES = "cosine", "constant", "linear", "vp"


# ---------------------------------------------------------------------------------------------------------------------
# Assertions, and what the tests draw
# ---------------------------------------------------------------------------------------------------------------------
def numbers(value) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def agree(claim: str, actual, expected, rtol=1e-10, atol=1e-10):
    """Equal shapes, and equal values up to rounding."""
    actual, expected = numbers(actual), numbers(expected)
    assert actual.shape == expected.shape, f"{claim}: shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=claim)


def assert_mean(claim: str, samples, expected, comparisons=1):
    """The mean of independent samples (N, ...) is `expected`, by a two-sided normal test at RATE / comparisons."""
    samples = numbers(samples)
    entries = comparisons * samples[0].size
    bound = norm.isf(RATE / 2 / entries) * samples.std(0) / math.sqrt(len(samples))
    error = np.abs(samples.mean(0) - expected)
    assert np.all(error <= bound), f"{claim}: mean {samples.mean(0)}, expected {expected} within {bound}"


def assert_law(claim: str, samples, law, comparisons=1):
    """Independent samples follow a distribution of scipy.stats, by Kolmogorov-Smirnov at RATE / comparisons."""
    p = scipy.stats.kstest(numbers(samples).ravel(), law.cdf).pvalue
    assert p > RATE / comparisons, f"{claim}: Kolmogorov-Smirnov p-value {p}"


def assert_uniform_counts(claim: str, counts, comparisons=1):
    """Counts of equally likely outcomes, by chi-square at RATE / comparisons."""
    p = scipy.stats.chisquare(counts).pvalue
    assert p > RATE / comparisons, f"{claim}: chi-square p-value {p} for {counts}"


@functools.cache
def literal_theta(schedule: str, T: int):
    """theta'_t and theta_bar_t over t = 0..T, term by term."""

    def f(k):
        return math.cos((k / (T + 1) + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    unscaled = dict(
        cosine=lambda k: 1 - f(k) / f(0),
        constant=lambda k: 1.0,
        linear=lambda k: 1 + (200 - 1) * (k - 1) / (T - 1),
        vp=lambda k: 1 - math.exp(-0.1 / T - 4.95 * (2 * k - 1) / T**2),
    )[schedule]
    steps = [unscaled(k) for k in range(1, T + 1)]
    prime = [0.0] + [step * math.log(1000) / math.fsum(steps) for step in steps]
    return np.array(prime), np.array([math.fsum(prime[: t + 1]) for t in range(T + 1)])


@functools.cache
def sde64(T: int = 5, schedule: str = "cosine") -> MeanRevertingSDE:
    return MeanRevertingSDE(T, schedule, dtype=torch.float64)


class Case(NamedTuple):
    """Times tau < t of a drawn SDE, one a row, what the paper's symbols are there, and three arrays of values."""

    sde: MeanRevertingSDE
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
    return Case(sde64(T, schedule), torch.tensor(tau), torch.tensor(t), *columns, *torch.tensor(values))


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


def mixture_cdf(x, weights=WEIGHTS, means=MEANS, widths=WIDTHS):
    return (weights * norm.cdf((x[..., None] - means) / widths)).sum(-1)


def analytic_predictor(bar, weights=WEIGHTS, means=MEANS, widths=WIDTHS):
    """E(eps | x_t) = -std * score, for data from the mixture (Eq. 30), as a network of the sampler."""

    def network(x_t, t, state):
        b = bar[int(t[0])]
        score = mixture_score(x_t.numpy(), b, weights, means, widths)
        return torch.tensor(-math.sqrt(1 - math.exp(-2 * b)) * score)

    return network


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1-2: the SDE and its transitions
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "schedule, theta_bar",
    [
        ("cosine", [0, 0.1975, 0.9015, 2.2873, 4.3504, 6.9078]),
        ("constant", [0, 1.3816, 2.7631, 4.1447, 5.5262, 6.9078]),
        ("linear", [0, 0.0137, 0.7114, 2.0929, 4.1584, 6.9078]),
        ("vp", [0, 0.4697, 1.5701, 3.0948, 4.9052, 6.9078]),
    ],
)
def test_theta_schedules_have_the_known_values_at_five_steps(schedule, theta_bar):
    agree(f"theta_bar of {schedule}, T = 5", sde64(5, schedule).theta_bar, theta_bar, rtol=0, atol=5.1e-5)


@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_theta_schedules_follow_their_formulas(T, schedule):
    sde, (prime, bar) = sde64(T, schedule), literal_theta(schedule, T)
    assert sde.num_steps == T
    agree(f"theta' of {schedule}", sde.theta_prime, prime, atol=0)
    agree(f"theta_bar of {schedule}", sde.theta_bar, bar, atol=0)


def euler_moments(theta_steps, substeps):
    """Mean and variance from x = 1 after Euler-Maruyama steps of Eq. 1, theta constant within a step."""
    mean, var = 1.0, 0.0
    for theta in theta_steps:
        for _ in range(substeps):
            mean, var = mean * (1 - theta / substeps), var * (1 - theta / substeps) ** 2 + 2 * theta / substeps
    return np.array([mean, var])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T, tau, t", [(2, 0, 1), (2, 1, 2), (6, 0, 6), (6, 1, 3), (6, 3, 5)])
def test_eq2_is_the_limit_of_euler_maruyama_at_first_order(schedule, T, tau, t):
    steps = literal_theta(schedule, T)[0][tau + 1 : t + 1]
    limit = np.array([float(c) for c in sde64(T, schedule).transition(tau, t)])
    errors = [euler_moments(steps, substeps) - limit for substeps in (300, 600)]
    agree("Eq. 2: error of half the Euler step over that of the whole", errors[1] / errors[0], [0.5, 0.5], rtol=0.03)
    agree("Eq. 2: extrapolated Euler steps", 2 * errors[1] - errors[0], [0, 0], atol=2e-4)


@pytest.mark.parametrize("schedule, T, tau, t", [("cosine", 5, 1, 4), ("linear", 8, 0, 5)])
def test_eq1_simulated_sde_has_the_moments_and_law_of_the_recursion(schedule, T, tau, t):
    """Sees an error of 3.5% in the deviation or of 0.035 in the mean (20,000 paths)."""
    rng, x_tau, substeps = np.random.default_rng(1), -1.7, 30
    steps = sde64(T, schedule).theta_prime[tau + 1 : t + 1].numpy()
    x = np.full(20_000, x_tau)
    for h in np.repeat(steps / substeps, substeps):
        x = x - h * x + np.sqrt(2 * h) * rng.standard_normal(len(x))
    scale, var = euler_moments(literal_theta(schedule, T)[0][tau + 1 : t + 1], substeps)
    assert_mean("Eq. 1: mean of the paths", x, scale * x_tau, comparisons=3)
    assert_mean("Eq. 1: variance of the paths", (x - scale * x_tau) ** 2, var, comparisons=3)
    assert_law("Eq. 1: law of the paths", x, norm(scale * x_tau, math.sqrt(var)), comparisons=3)


@given(cases())
def test_eq2_transition_coefficients(case):
    scale, var = case.sde.transition(case.tau, case.t)
    agree("Eq. 2: exp(-theta_bar_{tau:t}), (B, 1)", scale, np.exp(-case.between))
    agree("Eq. 2: 1 - exp(-2 theta_bar_{tau:t}), (B, 1)", var, 1 - np.exp(-2 * case.between))


@given(cases())
def test_eq2_log_prob_equals_scipy(case):
    law = norm(np.exp(-case.between) * case.y.numpy(), np.sqrt(-np.expm1(-2 * case.between)))
    expected = law.logpdf(case.x.numpy()).sum(-1)
    agree("log_prob: SciPy's, summed over dimensions", case.sde.log_prob(case.x, case.y, case.tau, case.t), expected)


@given(st.data(), st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_eq2_transitions_compose(data, T, schedule):
    sde, (tau, s, t) = sde64(T, schedule), sorted(data.draw(st.integers(0, T)) for _ in range(3))
    (scale_1, var_1), (scale_2, var_2), (scale, var) = (sde.transition(*pair) for pair in ((tau, s), (s, t), (tau, t)))
    agree("Eq. 2: tau to s to t scales as tau to t", scale_1 * scale_2, scale)
    agree("Eq. 2: tau to s to t spreads as tau to t", scale_2**2 * var_1 + var_2, var)


@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_eq2_ends_in_a_standard_gaussian(T, schedule):
    scale, var = sde64(T, schedule).transition(0, T)
    assert 0 < scale <= 1e-3 * (1 + 1e-12), "for abs x_0 <= 1 the mean of x_T is at most 1e-3"
    assert abs(var - 1) <= 1e-5, "the variance of x_T is 1"
    agree("theta_bar_T is -ln(1e-3), whatever the schedule", scale, 1e-3)


def test_eq2_of_no_time_is_the_identity():
    scale, var = sde64().transition(3, 3)
    assert (scale, var) == (1, 0)


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


@given(cases())
def test_sde_int_and_tensor_times_agree(case):
    for name, function in AT_ONE_TIME.items():
        together = function(case.sde, case.t, case.x, case.y, case.z)
        for b, t in enumerate(case.t.tolist()):
            alone = function(case.sde, t, case.x[b], case.y[b], case.z[b])
            row = together[:, b, 0] if name == "transition" else together[b]
            agree(f"{name}: row {b} of a tensor of times as its int alone", row.reshape(alone.shape), alone, rtol=1e-14)
    assert all(c.shape == (len(case.t), 1) for c in case.sde.transition(case.tau, case.t)), "coefficients are (B, 1)"
    assert case.sde.posterior(case.x, case.y, case.t)[1].shape == (len(case.t), 1), "coefficients are (B, 1)"


@pytest.mark.parametrize("name", AT_ONE_TIME)
@pytest.mark.parametrize("T", [2, 7])
def test_sde_rejects_ints_off_its_grid(name, T):
    for t in (-1, T + 1):
        with pytest.raises(ValueError, match=f"{t}.*T = {T}"):
            AT_ONE_TIME[name](sde64(T), t, *torch.zeros(3, 2))
    AT_ONE_TIME[name](sde64(T), T, *torch.zeros(3, 2))
    AT_ONE_TIME[name](sde64(T), 1, *torch.zeros(3, 2))


def test_sde_rejects_times_that_descend_and_steps_before_the_first():
    x = torch.zeros(2)
    for tau, t in ((2, 1), (-1, 3), (0, 6), (5, 4)):
        with pytest.raises(ValueError, match="must ascend from 0"):
            sde64().transition(tau, t)
        with pytest.raises(ValueError, match="must ascend from 0"):
            sde64().log_prob(x, x, tau, t)
    for step in (sde64().posterior, lambda x, y, t: sde64().reverse_sde_step(x, t, y, y)):
        with pytest.raises(ValueError, match="must ascend from 1"):
            step(x, x, 0)


def test_sde_rejects_too_few_steps_and_unknown_schedules():
    for T in (1, 0, -3):
        with pytest.raises(ValueError, match=f"num_steps is {T}"):
            MeanRevertingSDE(T)
    with pytest.raises(ValueError, match="schedule is 'sine'.*cosine, constant, linear, vp"):
        MeanRevertingSDE(5, "sine")


@given(st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_sde_coefficients_are_computed_in_float64_and_stored_as_asked(T, schedule):
    tables = {name: table for name, table in vars(sde64(T, schedule)).items() if isinstance(table, torch.Tensor)}
    assert {"theta_prime", "theta_bar"} < tables.keys()
    single, abstract = MeanRevertingSDE(T, schedule), MeanRevertingSDE(T, schedule, torch.float16, "meta")
    for name, table in tables.items():
        assert table.dtype == torch.float64 and table.device.type == "cpu"
        assert torch.equal(getattr(single, name), table.float()), f"{name} in float32 is float64's, rounded"
        assert (getattr(abstract, name).dtype, getattr(abstract, name).device.type) == (torch.float16, "meta")


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 3: the reverse SDE
# ---------------------------------------------------------------------------------------------------------------------
@given(cases())
def test_eq3_one_step_is_euler_maruyama_against_time(case):
    x, score, noise = case.x.numpy(), case.y.numpy(), case.z.numpy()
    drift = -case.prime * x - 2 * case.prime * score  # of Eq. 3, over a step; time runs backwards
    expected = x - drift + np.sqrt(2 * case.prime) * noise
    agree("Eq. 3: one step from t to t - 1", case.sde.reverse_sde_step(case.x, case.t, case.y, case.z), expected)


def reverse_sde_distance(T):
    """Wasserstein distance from the mixture of the reverse SDE's law with its exact score, by quadrature."""
    sde, (_, bar) = sde64(T, "constant"), literal_theta("constant", T)
    x = np.linspace(-8, 8, 481)
    dx, density = x[1] - x[0], norm.pdf(x)
    for t in range(T, 0, -1):
        score, zero = torch.tensor(mixture_score(x, bar[t])), torch.zeros(len(x), dtype=torch.float64)
        mean = sde.reverse_sde_step(torch.tensor(x), t, score, zero).numpy()
        width = float(sde.reverse_sde_step(zero, t, zero, zero + 1)[0])
        density = norm.pdf((x[:, None] - mean) / width) / width @ density * dx
    agree("the quadrature loses nothing", density.sum() * dx, 1.0, rtol=1e-6)
    return np.abs(np.cumsum(density) * dx - mixture_cdf(x + dx / 2)).sum() * dx


def test_eq3_reverse_sde_with_the_exact_score_approaches_the_mixture():
    far, near, nearer = (reverse_sde_distance(T) for T in (10, 30, 90))
    assert far > 2 * near and near > 1.4 * nearer, f"Eq. 3: distances {far}, {near}, {nearer} at T = 10, 30, 90"
    assert nearer < 0.17, f"Eq. 3: distance {nearer} at T = 90"


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 4, 28, 30: diffusing, and the score
# ---------------------------------------------------------------------------------------------------------------------
@given(cases())
def test_eq4_diffuses_with_the_coefficients_of_eq2(case):
    expected = np.exp(-case.bar) * case.x.numpy() + np.sqrt(1 - np.exp(-2 * case.bar)) * case.y.numpy()
    agree("Eq. 4", case.sde.diffuse(case.x, case.t, case.y), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eq4_has_the_law_of_eq2(schedule):
    """Sees an error of 3.5% in the deviation or of 0.035 deviations in the mean (20,000 draws a time)."""
    x_0, (_, bar) = 1.6, literal_theta(schedule, 5)
    for t in range(1, 6):
        x_t = sde64(5, schedule).diffuse(torch.tensor([x_0]), t, gaussian(20_000, 1, seed=t))
        law = norm(math.exp(-bar[t]) * x_0, math.sqrt(1 - math.exp(-2 * bar[t])))
        assert_law(f"Eq. 4: x_t at t = {t}", x_t, law, comparisons=5 * len(SCHEDULES))


@given(cases())
def test_eq28_score_is_the_gradient_of_scipys_log_density(case):
    x_t, std = case.x.numpy(), np.sqrt(-np.expm1(-2 * case.bar))
    law = norm(np.exp(-case.bar) * case.y.numpy(), std)
    gradient = (law.logpdf(x_t + std) - law.logpdf(x_t - std)) / (2 * std)  # exact: the log density is a parabola
    scale = 1 + np.abs(law.logpdf(x_t)).max() / std.min()
    agree("Eq. 28", case.sde.score(case.x, case.y, case.t), gradient, atol=1e-12 * scale)


@given(cases())
def test_eq30_score_is_minus_the_noise_over_its_deviation(case):
    x_0, eps = case.x, case.y
    score = case.sde.score(case.sde.diffuse(x_0, case.t, eps), x_0, case.t)
    agree("Eq. 30", score, -eps.numpy() / np.sqrt(1 - np.exp(-2 * case.bar)))


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 5 and the other diffusion losses
# ---------------------------------------------------------------------------------------------------------------------
def loss_of(case, eps_hat, loss):
    """The loss of a prediction for x_0 = case.x and eps = case.y."""
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    return erdp.diffusion_loss(case.sde, case.x, x_t, case.t, case.y, eps_hat, loss)


@given(cases())
def test_eq5_is_the_mean_squared_error_of_the_noise(case):
    agree("Eq. 5", loss_of(case, case.z, "noise"), np.mean((case.z.numpy() - case.y.numpy()) ** 2))
    assert loss_of(case, case.y, "noise") == 0, "Eq. 5 is zero where the prediction is exact"


def test_eq5_is_the_noises_variance_where_the_prediction_is_zero():
    """Sees an error of 1.6% in the factor (200,000 numbers)."""
    eps = gaussian(50_000, 4, seed=3)
    assert_mean("Eq. 5's summands at a prediction of zero", eps.ravel() ** 2, 1.0)
    loss = erdp.diffusion_loss(sde64(), eps, eps, torch.ones(50_000, dtype=torch.int64), eps, 0 * eps)
    agree("Eq. 5 at a prediction of zero, its default loss", loss, (eps**2).mean())


def test_eq5_has_no_expected_gradient_at_the_posterior_mean_of_the_noise():
    """For x_0 ~ N(0.5, 0.4^2) that is a line in x_t. Sees a slope that is 4% off (100,000 rows a time)."""
    sde, (_, bar), (mu, width) = sde64(), literal_theta("cosine", 5), (0.5, 0.4)
    for t in (1, 2, 4):
        scale, var = math.exp(-bar[t]), 1 - math.exp(-2 * bar[t])
        x_0, eps = mu + width * gaussian(100_000, 1, seed=10 + t), gaussian(100_000, 1, seed=20 + t)
        x_t, times = sde.diffuse(x_0, t, eps), torch.full((100_000,), t)
        deviation = x_t - scale * mu

        def gradients(slope, x_0=x_0, x_t=x_t, times=times, eps=eps, deviation=deviation):
            """Of the loss to the predictor's intercept and slope, a row each: their mean is the loss's gradient."""
            eps_hat = (slope * deviation).requires_grad_()
            erdp.diffusion_loss(sde, x_0, x_t, times, eps, eps_hat, "noise").backward()
            return len(eps) * eps_hat.grad * torch.cat([torch.ones_like(deviation), deviation], 1)

        best = math.sqrt(var) / (scale**2 * width**2 + var)
        assert_mean(f"Eq. 5's gradient at the posterior mean, t = {t}", gradients(best), 0.0, comparisons=3)
        with pytest.raises(AssertionError):
            assert_mean("a slope that is 4% off", gradients(1.04 * best), 0.0, comparisons=3)


def literal_diffusion_loss(loss, prime, bar, before, x_0, x_t, eps, eps_hat):
    """The three losses from Eq. 5, Eq. 40 and one Euler step of Eq. 3; arrays (B, A), symbols of the SDE (B, 1)."""
    if loss == "noise":
        return ((eps_hat - eps) ** 2).mean()
    exp, var = torch.exp, 1 - torch.exp(-2 * bar)

    def eq40(x_0):
        of_x_t = (1 - exp(-2 * before)) / var * exp(-prime)
        return of_x_t * x_t + (1 - exp(-2 * prime)) / var * exp(-before) * x_0

    if loss == "likelihood":
        return (((1 + prime) * x_t - 2 * prime / var**0.5 * eps_hat - eq40(x_0)) ** 2).mean()
    return ((eq40(exp(bar) * (x_t - var**0.5 * eps_hat)) - eq40(x_0)) ** 2).mean()


@given(cases(), st.sampled_from(["noise", "likelihood", "posterior"]))
def test_diffusion_losses_equal_their_formulas(case, loss):
    symbols = (torch.tensor(symbol) for symbol in (case.prime, case.bar, case.before))
    x_t = case.sde.diffuse(case.x, case.t, case.y)
    expected = literal_diffusion_loss(loss, *symbols, case.x, x_t, case.y, case.z)
    agree(f"the {loss} loss", loss_of(case, case.z, loss), expected)


@given(cases())
def test_likelihood_loss_has_its_minimum_at_the_closed_form(case):
    """Rows that share x_t and t, with other noise: the best common prediction, from E(eps | x_t) = their mean."""
    t, x_t, eps = int(case.t[0]), case.x[:1].expand_as(case.x), case.y
    theta, var = float(case.prime[0, 0]), float(1 - np.exp(-2 * case.bar[0, 0]))
    bias = (math.expm1(theta) - theta) * math.sqrt(var) * case.x[:1]
    best = ((2 * math.sinh(theta) * eps.mean(0, keepdim=True) - bias) / (2 * theta)).requires_grad_()
    x_0, times = case.sde.predict_x0(x_t, t, eps), torch.full((len(eps),), t)
    loss = erdp.diffusion_loss(case.sde, x_0, x_t, times, eps, best.expand_as(eps), "likelihood")
    loss.backward()
    steepness = (2 * theta) ** 2 / var  # of the parabola that the loss is in the prediction
    size = 1 + float(best.abs().max())
    agree("the gradient vanishes", best.grad / steepness / size, torch.zeros_like(best), atol=1e-9)


def test_likelihood_loss_tends_to_noise_matching_as_its_steps_shrink():
    errors = []
    for T in (10, 100, 1000):
        sde, x_t, eps = MeanRevertingSDE(T, "constant", dtype=torch.float64), gaussian(1, 3), gaussian(1, 3, seed=1)
        t = torch.tensor([T // 2])
        x_0 = sde.predict_x0(x_t, t, eps)

        def loss(flat, sde=sde, x_0=x_0, x_t=x_t, t=t, eps=eps):
            return float(erdp.diffusion_loss(sde, x_0, x_t, t, eps, torch.tensor(flat)[None], "likelihood"))

        best = scipy.optimize.minimize(loss, np.zeros(3), tol=1e-14).x
        errors.append(np.abs(best - eps.numpy()[0]).max())
    assert errors[0] > 8 * errors[1] > 60 * errors[2], f"bias of the minimiser at T = 10, 100, 1000: {errors}"
    assert errors[0] > 0.1, "on a coarse grid the true noise does not minimise the likelihood loss"


@given(cases())
def test_posterior_loss_has_the_true_noise_as_its_minimiser(case):
    agree("at the true noise", loss_of(case, case.y, "posterior"), 0.0, atol=1e-18)
    weight = 2 * np.sinh(case.prime) / np.sqrt(1 - np.exp(-2 * case.bar))  # Eq. 8's factor in the posterior mean
    expected = np.mean((weight * (case.z - case.y).numpy()) ** 2)
    agree("elsewhere, the weighted error of the noise", loss_of(case, case.z, "posterior"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 6-8 and Appendix A.3: the posterior, x0-hat, and the optimal reverse path
# ---------------------------------------------------------------------------------------------------------------------
def log_densities_of_eq34(case, x, x_t, x_0):
    """log p(x_t | x_{t-1}), log p(x_{t-1} | x_0) and log p(x_t | x_0) by SciPy, at x_{t-1} = x."""

    def log_p(later, earlier, duration):
        return norm.logpdf(later, np.exp(-duration) * earlier, np.sqrt(-np.expm1(-2 * duration)))

    return log_p(x_t, x, case.prime), log_p(x, x_0, case.before), log_p(x_t, x_0, case.bar)


@given(cases(first=2))
def test_eq7_posterior_matches_bayes_rule(case):
    mean, var = case.sde.posterior(case.x, case.y, case.t)
    likelihood, prior, evidence = log_densities_of_eq34(case, case.z.numpy(), case.x.numpy(), case.y.numpy())
    size = 1 + max(np.abs(term).max() for term in (likelihood, prior, evidence))
    log_p = norm.logpdf(case.z.numpy(), mean.numpy(), var.sqrt().numpy())
    agree("Eq. 6-7: log density, as of Eq. 34", log_p, likelihood + prior - evidence, atol=1e-10 * size)


@given(cases())
def test_eq7_coefficients_are_as_printed(case):
    mean, var = case.sde.posterior(case.x, case.y, case.t)
    step, past, total = (1 - np.exp(-2 * theta) for theta in (case.prime, case.before, case.bar))
    of_x_t, of_x_0 = past / total * np.exp(-case.prime), step / total * np.exp(-case.before)
    agree("Eq. 7: mean", mean, of_x_t * case.x.numpy() + of_x_0 * case.y.numpy())
    agree("Eq. 7: variance, (B, 1)", var, past * step / total)


def test_eq7_regression_of_simulated_states_finds_the_posterior():
    """Sees an error of 1.5% of a residual deviation in slope or intercept, 1.5% in the variance (200,000 paths)."""
    (prime, bar), rng, x_0, n = literal_theta("cosine", 5), np.random.default_rng(5), 0.9, 200_000
    for t in (2, 3, 4):
        x = math.exp(-bar[t - 1]) * x_0 + math.sqrt(1 - math.exp(-2 * bar[t - 1])) * rng.standard_normal(n)
        x_t = math.exp(-prime[t]) * x + math.sqrt(1 - math.exp(-2 * prime[t])) * rng.standard_normal(n)
        expected = sde64().posterior(torch.tensor([0.0, 1.0]), torch.tensor([x_0, x_0]), t)
        (at_0, at_1), var = expected[0].tolist(), float(expected[1])
        residual = x - at_0 - (at_1 - at_0) * x_t
        assert_mean(f"Eq. 7: intercept at t = {t}", residual, 0.0, comparisons=9)
        assert_mean(f"Eq. 7: slope at t = {t}", residual * (x_t - x_t.mean()), 0.0, comparisons=9)
        assert_mean(f"Eq. 7: residual variance at t = {t}", residual**2, var, comparisons=9)


@given(cases())
def test_eq7_last_step_returns_x0_without_noise(case):
    for t in (1, torch.ones_like(case.t)):
        mean, var = case.sde.posterior(case.x, case.y, t)
        assert torch.equal(mean, case.y) and not var.any(), "Eq. 7 at t = 1 has mean x_0 and variance 0"


@given(cases())
def test_eq8_inverts_eq4(case):
    sde, x_0, t, eps = case.sde, case.x, case.t, case.y
    agree("Eq. 8 of Eq. 4", sde.predict_x0(sde.diffuse(x_0, t, eps), t, eps), x_0)
    agree("Eq. 4 of Eq. 8", sde.diffuse(sde.predict_x0(case.z, t, eps), t, eps), case.z)
    expected = np.exp(case.bar) * (case.z.numpy() - np.sqrt(1 - np.exp(-2 * case.bar)) * eps.numpy())
    agree("Eq. 8", sde.predict_x0(case.z, t, eps), expected)


def test_eq8_multiplies_errors_of_the_noise_by_up_to_a_thousand():
    zero, one, t = torch.zeros(5, 1, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64), torch.arange(1, 6)
    in_x_0 = sde64().predict_x0(zero, t, one)
    agree("Eq. 8 in x0-hat", -in_x_0[:, 0], [0.70, 2.25, 9.8, 77.5, 1000], rtol=6e-3)
    in_mean, _ = sde64().posterior(zero, in_x_0, t)
    agree("Eq. 8 in the posterior mean", -in_mean[:, 0], [0.70, 1.67, 3.77, 7.74, 12.8], rtol=6e-3)


@settings(max_examples=15)
@given(cases(first=2))
def test_a3_posterior_mean_is_the_optimal_reverse_path(case):
    def cost(x, row, x_t, x_0):
        likelihood, prior, _ = log_densities_of_eq34(row, x, x_t, x_0)
        return -likelihood - prior  # Eq. 38

    mean, _ = case.sde.posterior(case.x, case.y, case.t)
    for b, a in np.ndindex(*case.x.shape):
        row = case._replace(**{name: float(getattr(case, name)[b, 0]) for name in ("prime", "bar", "before")})
        best = scipy.optimize.minimize_scalar(cost, args=(row, float(case.x[b, a]), float(case.y[b, a]))).x
        agree("A.3: argmin of Eq. 37", mean[b, a], best, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 10 and Figure 2: sampling
# ---------------------------------------------------------------------------------------------------------------------
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


def rough_network(x_t, t, state):
    """Far off enough for every clamp to bite, and different for each time and state."""
    return 0.8 * x_t + torch.sin(1.7 * t)[:, None] + 0.3 * state.sum(-1, keepdim=True)


@given(st.integers(2, 30), st.sampled_from(SCHEDULES), st.booleans(), st.booleans(), st.integers(0, 999))
def test_eq10_sampler_follows_eq8_eq7_and_eq6_step_by_step(T, schedule, clip_denoised, clip_sample, seed):
    noise, state = gaussian(T, 4, 2, seed=seed), gaussian(4, 3, seed=seed + 1000)
    arguments = state, noise, clip_denoised, clip_sample
    expected = literal_sample(rough_network, schedule, T, *arguments)
    action = erdp.sample_actions(rough_network, sde64(T, schedule), *arguments)
    agree("Eq. 10", action, expected, rtol=1e-9)


def test_eq10_clips_by_default_inside_each_step_and_at_the_end():
    noise, state = gaussian(5, 200, 2), gaussian(200, 3)

    def sample(*clips):
        return erdp.sample_actions(rough_network, sde64(), state, noise, *clips)

    assert torch.equal(sample(), sample(True, True)), "both clips are the default"
    assert sample(False, False).abs().max() > 1, "an unclipped sample leaves the bounds"
    assert sample(False, True).abs().max() == 1, "a finished sample is clamped to the bounds"
    assert not torch.allclose(sample(True, True), sample(False, True)), "x0-hat is clamped within the steps"


def test_eq10_network_sees_every_time_once_and_the_states():
    state, seen = gaussian(3, 2), []

    def network(x_t, t, s):
        seen.append(t)
        assert s is state and t.shape == (3,) and t.dtype == torch.int64 and x_t.shape == (3, 1)
        return x_t

    erdp.sample_actions(network, sde64(4), state, gaussian(4, 3, 1))
    assert torch.equal(torch.stack(seen), torch.tensor([[4] * 3, [3] * 3, [2] * 3, [1] * 3])), "t = T..1"


def affine_law(function, T):
    """Mean and variance, without sampling, of function(noise (T, B, 1)) that is affine in standard Gaussian noise."""
    noise = torch.cat([torch.zeros(T, 1), torch.eye(T)], 1)[..., None].double()
    x = function(noise)[:, 0]
    return float(x[0]), float(((x[1:] - x[0]) ** 2).sum())


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


@given(st.integers(2, 60), st.sampled_from(SCHEDULES), st.floats(-0.8, 0.8), st.floats(0.05, 1))
def test_eq10_sampler_has_the_moments_of_the_closed_form_recursion(T, schedule, mean, width):
    network = analytic_predictor(literal_theta(schedule, T)[1], np.ones(1), np.array([mean]), np.array([width]))
    law = affine_law(lambda noise: erdp.sample_actions(network, sde64(T, schedule), None, noise, False, False), T)
    _, expected = gaussian_recursion(schedule, T, mean, width)
    agree("Eq. 10: mean and variance for a Gaussian policy", law, expected, rtol=1e-9)


@pytest.mark.parametrize("T, width", [(5, 0.111), (10, 0.185), (30, 0.245), (100, 0.280)])
def test_eq10_sampler_shrinks_a_gaussian_of_width_03_on_a_coarse_grid(T, width):
    network = analytic_predictor(literal_theta("cosine", T)[1], np.ones(1), np.zeros(1), np.array([0.3]))
    mean, var = affine_law(lambda noise: erdp.sample_actions(network, sde64(T), None, noise, False, False), T)
    agree("Eq. 10: mean and deviation", [mean, math.sqrt(var)], [0, width], rtol=0, atol=6e-4)


def test_eq10_samples_approach_a_mixture_as_the_steps_grow():
    """Sees a distance that does not fall by 0.035 (100,000 samples in [-2, 2], Dvoretzky-Kiefer-Wolfowitz bound)."""
    n, x, steps = 100_000, np.linspace(-2, 2, 4001), (5, 10, 30)
    tolerance = 4 * math.sqrt(math.log(2 * len(steps) / RATE) / (2 * n))
    distances = []
    for T in steps:
        network, noise = analytic_predictor(literal_theta("cosine", T)[1]), gaussian(T, n, 1, seed=T)
        action = erdp.sample_actions(network, sde64(T), None, noise, False, False).numpy().ravel()
        assert np.abs(action).max() <= 2
        cdf = np.searchsorted(np.sort(action), x) / n
        distances.append(np.abs(cdf - mixture_cdf(x)).sum() * (x[1] - x[0]))
    assert np.all(-np.diff(distances) > tolerance), f"Wasserstein distances {distances} at T = {steps}"


@given(st.integers(2, 100), st.sampled_from(SCHEDULES), st.floats(-1, 1), st.integers(0, 999))
def test_figure2_optimal_sampling_reconstructs_x0_exactly_at_every_t(T, schedule, x_0, seed):
    bar = torch.tensor(literal_theta(schedule, T)[1])

    def true_noise(x_t, t, state):
        return (x_t - torch.exp(-bar[t])[:, None] * x_0) / torch.sqrt(1 - torch.exp(-2 * bar[t]))[:, None]

    noise = gaussian(T, 3, 2, seed=seed)
    for clips in ((True, True), (False, False)):
        action = erdp.sample_actions(true_noise, sde64(T, schedule), None, noise, *clips)
        agree("Figure 2: the sampler returns x_0", action, np.full((3, 2), x_0))


def test_figure2_reverse_sde_needs_many_steps_to_reconstruct_x0():
    x_0, errors = torch.tensor([[0.7]], dtype=torch.float64), []
    for T in (5, 30, 100):

        def reverse(noise, T=T):
            sde, x_t = sde64(T), noise[0]
            for t in range(T, 0, -1):
                x_t = sde.reverse_sde_step(x_t, t, sde.score(x_t, x_0, t), noise[T - t + 1])
            return x_t

        mean, var = affine_law(reverse, T + 1)
        errors.append(math.sqrt((mean - 0.7) ** 2 + var))
    assert errors[0] > 3 * errors[1] > 6 * errors[2] > 0.06, f"Figure 2: rms errors {errors} of the reverse SDE"


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 13 and 14: the policy's log probability
# ---------------------------------------------------------------------------------------------------------------------
def last_step(network, T=5):
    """a^1 -> (a^0, log abs(d a^0 / d a^1)) of the sampler's last step: Eq. 8 and Eq. 7 at t = 1."""

    def step(a_1):
        t = torch.ones(len(a_1), dtype=torch.int64)
        return sde64(T).posterior(a_1, sde64(T).predict_x0(a_1, 1, network(a_1, t, None)), 1)[0]

    def with_log_slope(a_1, h=1e-5):
        return step(a_1), torch.log(torch.abs(step(a_1 + h) - step(a_1 - h)) / (2 * h))

    return with_log_slope


@given(st.sampled_from([2, 5, 20]), st.floats(-0.5, 0.5), st.floats(0.1, 1))
def test_eq13_holds_with_a_constant_for_a_gaussian_policy(T, mean, width):
    """log pi(a^1) - log pi(a^0), with both densities from the sampler's closed form, at many points."""
    network = analytic_predictor(literal_theta("cosine", T)[1], np.ones(1), np.array([mean]), np.array([width]))
    (m_1, v_1), (m_0, v_0) = gaussian_recursion("cosine", T, mean, width)
    a_1 = m_1 + math.sqrt(v_1) * torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    a_0, log_slope = last_step(network, T)(a_1)
    difference = norm.logpdf(a_1, m_1, math.sqrt(v_1)) - norm.logpdf(a_0, m_0, math.sqrt(v_0))
    agree("Eq. 13: the same at every point", difference, np.full((13, 1), difference[0, 0]), atol=1e-8)
    agree("Eq. 13: and is log abs(d a^0 / d a^1)", difference, log_slope, atol=1e-5)


def test_eq13s_constant_depends_on_the_policys_width():
    bar = literal_theta("cosine", 5)[1]
    networks = (analytic_predictor(bar, np.ones(1), np.zeros(1), np.array([width])) for width in (0.2, 0.6))
    narrow, wide = (last_step(network)(torch.zeros(1, 1).double())[1] for network in networks)
    assert wide - narrow > 1, "Eq. 13's constant is another one for another width"


def test_eq13_does_not_hold_for_a_mixture():
    network = analytic_predictor(literal_theta("cosine", 5)[1])
    _, log_slope = last_step(network)(torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None])
    assert log_slope.max() - log_slope.min() > 1, "for a mixture log pi(a^1) - log pi(a^0) is not constant"


@given(cases())
def test_eq14_equals_the_joint_gaussians_conditional_density(case):
    """(x_1, x_T) given x_0 is jointly Gaussian; SciPy's joint density less that of x_T."""
    first, last = float(case.sde.theta_bar[1]), float(case.sde.theta_bar[-1])
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


def test_eq14_is_the_density_of_simulated_states():
    """Sees an error of 3.5% in the conditional deviation or of 0.035 deviations in its mean (20,000 paths)."""
    (prime, _), rng, n = literal_theta("constant", 3), np.random.default_rng(7), 20_000
    path = [np.full((n, 1), 0.8)]
    for theta in prime[1:]:
        path.append(math.exp(-theta) * path[-1] + math.sqrt(1 - math.exp(-2 * theta)) * rng.standard_normal((n, 1)))
    x_0, x_1, _, x_T = (torch.tensor(x) for x in path)
    log_p = [sde64(3, "constant").log_prob_x1(x_1 + shift, x_T, x_0) for shift in (-1, 0, 1)]
    precision, slope = 2 * log_p[1] - log_p[0] - log_p[2], (log_p[2] - log_p[0]) / 2  # of a parabola in x_1
    assert_law("Eq. 14: x_1 given x_T and x_0, standardised", -slope / precision.sqrt(), norm)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
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


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 999))
def test_noise_network_equals_a_literal_one(B, S, A, hidden, seed):
    torch.manual_seed(seed)
    network = NoiseNetwork(S, A, hidden).double()
    x_t, t, state = gaussian(B, A, seed=seed), torch.randint(1, 101, (B,)), gaussian(B, S, seed=seed + 1)
    expected = literal_noise_network(dict(network.named_parameters()), x_t, t, state)
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
    for name, (_, fan_in) in sizes.items():
        bound = fan_in**-0.5
        for part in (network.get_parameter(f"{name}.weight"), network.get_parameter(f"{name}.bias")):
            assert_law(f"{name}: uniform in +-{bound}", part, scipy.stats.uniform(-bound, 2 * bound), comparisons=12)


def members_of(critics, requires_grad=False):
    """The parameters of each member of a QEnsemble on their own, [W, b, W, b, ...], copied."""
    layers = [p for pair in zip(critics.weights, critics.biases) for p in pair]
    return [[p[m].detach().clone().requires_grad_(requires_grad) for p in layers] for m in range(len(layers[0]))]


def sequential(member):
    """One member as PyTorch's own layers."""
    layers = []
    for weight, bias in zip(member[::2], member[1::2]):
        linear = nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.T.clone(), bias[0].clone()
        layers += [linear, nn.Mish()]
    return nn.Sequential(*layers[:-1])


@settings(max_examples=20)
@given(st.integers(1, 5), *[st.integers(1, 4)] * 3, st.integers(2, 9), st.integers(0, 999))
def test_ensemble_equals_separate_sequential_networks(M, B, S, A, hidden, seed):
    torch.manual_seed(seed)
    critics = QEnsemble(S, A, M, hidden).double()
    state, weight = gaussian(B, S, seed=seed), gaussian(M, B, seed=seed + 1)
    action = gaussian(B, A, seed=seed + 2).requires_grad_()
    networks = [sequential(member) for member in members_of(critics)]
    expected = torch.stack([network(torch.cat([state, action], 1))[:, 0] for network in networks])
    q = critics(state, action)
    agree("QEnsemble (M, B), state before action", q, expected)
    (slope,) = torch.autograd.grad((expected * weight).sum(), action, retain_graph=True)
    (expected * weight).sum().backward()
    action.grad = None
    (q * weight).sum().backward()
    agree("QEnsemble: gradient to the action", action.grad, slope)
    for layer in range(4):
        linears = [network[2 * layer] for network in networks]
        weights = torch.stack([linear.weight.grad.T for linear in linears])
        biases = torch.stack([linear.bias.grad[None] for linear in linears])
        agree("QEnsemble: gradient to the weights", critics.weights[layer].grad, weights)
        agree("QEnsemble: gradient to the biases", critics.biases[layer].grad, biases)
    critics.zero_grad(set_to_none=True)
    action.grad = None
    still = critics(state, action, frozen=True)
    assert torch.equal(still, q), "frozen does not change the values"
    (still * weight).sum().backward()
    agree("QEnsemble: gradient to the action, frozen", action.grad, slope)
    assert all(p.grad is None for p in critics.parameters()), "frozen: no gradient reaches the weights"


def test_ensemble_has_the_papers_sizes_and_the_released_initialisation():
    torch.manual_seed(0)
    critics = QEnsemble(40, 2, 8)
    assert [tuple(p.shape) for p in critics.weights] == [(8, 42, 256), (8, 256, 256), (8, 256, 256), (8, 256, 1)]
    assert [tuple(p.shape) for p in critics.biases] == [(8, 1, 256), (8, 1, 256), (8, 1, 256), (8, 1, 1)]
    for weight in critics.weights[:3]:
        assert_law("hidden weights, the first layer's too", weight, scipy.stats.uniform(-1 / 16, 1 / 8), comparisons=4)
        assert 0.0624 < weight.abs().max() <= 1 / 16
    assert all((bias == 0.1).all() for bias in critics.biases[:3]), "hidden biases are 0.1"
    assert_law("last weights", critics.weights[3], scipy.stats.uniform(-3e-3, 6e-3), comparisons=4)
    many = QEnsemble(1, 1, 1000, 4).biases[3]
    assert 2.9e-3 < many.max() <= 3e-3 and -3e-3 <= many.min() < -2.9e-3, "last biases are uniform in +-3e-3"
    assert len(critics.weights[3].unique()) > 2000, "members differ"
    assert len(QEnsemble(1, 1).weights[0]) == 64, "64 members by default"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_mishs_compiled_formula_equals_pytorchs(monkeypatch, dtype, tolerance):
    points = torch.cat([torch.linspace(-100, 100, 801), torch.linspace(-3, 3, 61), torch.tensor([1e4, -1e4])])
    x, y = (points.to(dtype).requires_grad_() for _ in range(2))
    agree("mish, as it runs uncompiled", erdp.mish(x), F.mish(x), rtol=0, atol=0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    value, expected = erdp.mish(x), F.mish(y)
    agree("mish, as it is compiled", value, expected, rtol=tolerance, atol=1e-37)
    value.sum().backward()
    expected.sum().backward()
    agree("mish's gradient, as it is compiled", x.grad, y.grad, rtol=tolerance, atol=10 * tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 17 and 16: pessimism, and Q-learning
# ---------------------------------------------------------------------------------------------------------------------
@given(st.integers(1, 8), st.integers(1, 4), st.floats(0, 10), st.booleans(), st.integers(0, 999))
def test_eq17_lcb_equals_numpy(M, B, beta, unbiased, seed):
    q = 3 * gaussian(M, B, seed=seed) - 1
    deviation = q.numpy().std(0, ddof=int(unbiased)) if M > 1 else 0
    agree("Eq. 17", erdp.lcb(q, beta, unbiased), q.numpy().mean(0) - beta * deviation)
    if M > 1:
        agree("Eq. 17: beta is 4 and the divisor M by default", erdp.lcb(q), q.numpy().mean(0) - 4 * q.numpy().std(0))


@pytest.mark.parametrize("unbiased", [False, True])
def test_eq17_of_one_member_is_its_mean(unbiased):
    q = gaussian(1, 5).requires_grad_()
    value = erdp.lcb(q, 4.0, unbiased)
    agree("Eq. 17, M = 1", value, q[0])
    value.sum().backward()
    agree("Eq. 17, M = 1: gradient", q.grad, torch.ones(1, 5))


@pytest.mark.parametrize("unbiased", [False, True])
def test_eq17_has_the_means_gradient_where_members_agree(unbiased):
    q = torch.full((4, 3), 0.7, dtype=torch.float64)
    q[:, 1] = gaussian(4)
    q.requires_grad_()
    value = erdp.lcb(q, 4.0, unbiased)
    agree("Eq. 17 at equal members", value[[0, 2]], [0.7, 0.7])
    value.sum().backward()
    agree("Eq. 17: gradient at equal members", q.grad[:, [0, 2]], np.full((4, 2), 1 / 4))

    def others(flat):
        return flat.mean() - 4 * flat.std(ddof=int(unbiased))

    slope = scipy.optimize.approx_fprime(q.detach().numpy()[:, 1], others, 1e-7)
    agree("Eq. 17: gradient elsewhere", q.grad[:, 1], slope, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.floats(0, 8), st.integers(0, 999))
def test_pessimistic_value_is_eq17_or_the_minimum(M, beta, seed):
    q = gaussian(M, 3, seed=seed)
    for variant, ddof in (("paper", 0), ("released", 1)):
        deviation = q.numpy().std(0, ddof=ddof) if M > 1 else 0
        agree(f"lcb, {variant}", erdp.pessimistic_value(q, "lcb", beta, variant), q.numpy().mean(0) - beta * deviation)
        agree(f"min, {variant}", erdp.pessimistic_value(q, "min", beta, variant), q.numpy().min(0))


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
        q = [
            [literal_q(member, batch.next_state[b], candidate[b]) for candidate in next_action]
            for b in range(len(batch.state))
        ]
        rows.append([max(of_candidates) for of_candidates in q])
    if pessimism == "min":
        rows = [[min(column) for column in zip(*rows)]] * len(members)
    not_over = 1 - batch.terminal
    return torch.stack([batch.reward + discount * not_over * torch.stack(row) for row in rows])


def literal_q(member, state, action):
    """Q of one member at one state and action, a scalar."""
    h = torch.cat([state, action])
    for layer in range(4):
        h = h @ member[2 * layer] + member[2 * layer + 1][0]
        h = literal_mish(h) if layer < 3 else h
    return h[0]


def literal_q_of(members, state, action):
    return torch.stack([torch.stack([literal_q(member, s, a) for s, a in zip(state, action)]) for member in members])


@settings(max_examples=25)
@given(*[st.integers(1, 4)] * 3, st.floats(0, 1), st.sampled_from(["lcb", "min"]), st.integers(0, 999))
def test_eq16_equals_loops_over_members_transitions_and_candidates(M, B, C, discount, pessimism, seed):
    critics, target = tiny_critics(M=M, seed=seed), tiny_critics(M=M, seed=seed + 1)
    batch, next_action = random_batch(B, seed=seed), gaussian(C, B, 2, seed=seed + 9).tanh()
    loss, q = erdp.critic_loss(critics, target, batch, next_action, pessimism, discount)
    y = literal_targets(members_of(target), batch, next_action, discount, pessimism)
    expected = literal_q_of(members_of(critics), batch.state, batch.action)
    agree("Eq. 16: Q(s, a) (M, B)", q, expected)
    agree("Eq. 16: squared error, mean over members and batch", loss, ((expected - y) ** 2).sum() / (M * B))


def test_eq16_discounts_by_099_with_independent_targets_by_default():
    critics, target, batch, next_action = tiny_critics(), tiny_critics(seed=1), random_batch(), gaussian(1, 5, 2)
    y = literal_targets(members_of(target), batch, next_action, 0.99, "lcb")
    loss, q = erdp.critic_loss(critics, target, batch, next_action)
    agree("Eq. 16 with its defaults", loss, ((q - y) ** 2).mean())


def critic_gradients(critics, target, batch, next_action, pessimism="lcb"):
    critics.zero_grad(set_to_none=True)
    erdp.critic_loss(critics, target, batch, next_action, pessimism)[0].backward()
    return [p.grad.clone() for p in critics.parameters()]


def test_eq16_members_gradient_depends_on_its_own_target_alone():
    critics, target, batch, next_action = tiny_critics(), tiny_critics(seed=1), random_batch(), gaussian(2, 5, 2)
    before = {p: critic_gradients(critics, target, batch, next_action, p) for p in ("lcb", "min")}
    with torch.no_grad():
        for p in target.parameters():
            p[1] -= 0.5  # another member 1
        target.biases[3][1] -= 50  # and the lowest
    after = {p: critic_gradients(critics, target, batch, next_action, p) for p in ("lcb", "min")}
    for old, new in zip(before["lcb"], after["lcb"]):
        assert torch.equal(old[[0, 2]], new[[0, 2]]), "Eq. 16: members 0 and 2 do not see the target of member 1"
    last = [gradients[-1].flatten() for gradients in (before["lcb"], after["lcb"], before["min"], after["min"])]
    assert last[0][1] != last[1][1], "Eq. 16: member 1 sees its own target"
    assert (last[2] != last[3]).all(), "clipped double Q: all members see the shared target"


def test_eq16_terminal_states_do_not_bootstrap_and_others_do():
    critics, target, batch, next_action = tiny_critics(), tiny_critics(seed=1), random_batch(), gaussian(1, 5, 2)
    elsewhere = batch.next_state + 1
    ended, going_on = torch.ones(5).double(), torch.zeros(5).double()

    def loss(terminal, next_state):
        changed = batch._replace(terminal=terminal, next_state=next_state)
        return float(erdp.critic_loss(critics, target, changed, next_action)[0])

    assert loss(ended, batch.next_state) == loss(ended, elsewhere), "a terminal state's value is 0"
    expected = float(((critics(batch.state, batch.action) - batch.reward) ** 2).mean())
    agree("a terminal state's target is its reward", loss(ended, elsewhere), expected)
    assert loss(going_on, batch.next_state) != loss(going_on, elsewhere), "any other state, a timeout's too, bootstraps"


def test_eq16_leaves_the_target_networks_and_the_next_actions_without_gradient():
    critics, target, batch = tiny_critics(), tiny_critics(seed=1), random_batch()
    next_action = gaussian(2, 5, 2).requires_grad_()
    loss, q = erdp.critic_loss(critics, target, batch, next_action)
    loss.backward()
    assert next_action.grad is None and all(p.grad is None for p in target.parameters()), "y is a constant of Eq. 16"
    assert all(p.grad is not None and p.grad.any() for p in critics.parameters()), "Eq. 16 trains all of Q"


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 12-15: the policy loss
# ---------------------------------------------------------------------------------------------------------------------
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


@given(st.integers(3, 100), st.sampled_from(SCHEDULES), st.sampled_from(["paper", "released"]), st.integers(0, 999))
def test_eq13_to_15_log_prob_of_both_variants(T, schedule, variant, seed):
    a_0, eps_hat, a_T = (gaussian(4, 2, seed=seed + k) for k in range(3))
    expected = literal_log_prob(variant, *literal_theta(schedule, T), a_0, eps_hat, a_T)
    log_p = erdp.policy_log_prob(sde64(T, schedule), a_0, eps_hat, a_T, variant)
    agree(f"log p(a^1 | a^T), {variant}", log_p, expected, rtol=1e-9, atol=1e-9)


def test_released_log_prob_rewards_large_actions_alone():
    a_0, a_T = torch.tensor([[[0.0], [1.0], [0.0], [1.0]], [[0.0], [0.0], [1.0], [1.0]]], dtype=torch.float64)
    entropy = -erdp.policy_log_prob(sde64(), a_0, 0 * a_0, a_T, "released")
    agree("-log p at a_0 = a_T = 0", entropy[0], 0.779, atol=6e-4)
    agree("coefficient of a_0^2", entropy[1] - entropy[0], 0.0628, atol=6e-5)
    agree("coefficient of a_0 a_T", entropy[3] - entropy[2] - entropy[1] + entropy[0], -0.0008, atol=6e-5)


def test_paper_log_prob_is_half_the_squared_noise_and_little_else():
    a_0, a_T = gaussian(50, 1).tanh(), gaussian(50, 1, seed=1)
    eps = gaussian(50, 1, seed=2)
    rest = -erdp.policy_log_prob(sde64(), a_0, eps, a_T, "paper") - eps[:, 0] ** 2 / 2
    assert rest.std() < 0.01 * (eps**2 / 2).std()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_entropy_of_a_gaussians_analytic_predictor_has_its_closed_form(variant):
    """E(-log p) over data N(mu, width^2), eps and a_T, from second moments. Sees an error of 0.02 (200,000 rows)."""
    n, mu, width, (prime, bar), t = 200_000, 0.4, 0.5, literal_theta("cosine", 5), 3
    decay, var = math.exp(-bar[t]), 1 - math.exp(-2 * bar[t])
    spread = decay**2 * width**2 + var  # of x_t
    # a_0 = mu + p (x_t - decay mu), eps_hat = r (x_t - decay mu)
    p, r = decay * width**2 / spread, math.sqrt(var) / spread
    a0_a0, eps_eps, a0_eps = mu**2 + p**2 * spread, r**2 * spread, p * r * spread

    def cross_entropy(u_u, u_v, v_v, duration):
        """E(-log g(u; v, duration)) from E(u^2), E(u v) and E(v^2)."""
        scale, variance = math.exp(-duration), 1 - math.exp(-2 * duration)
        return (u_u - 2 * scale * u_v + scale**2 * v_v) / variance / 2 + math.log(2 * math.pi * variance) / 2

    if variant == "paper":
        c, s = math.exp(-bar[1]), math.sqrt(1 - math.exp(-2 * bar[1]))
        a1_a1, a1_a0 = c**2 * a0_a0 + s**2 * eps_eps + 2 * c * s * a0_eps, c * a0_a0 + s * a0_eps
        expected = cross_entropy(1, 0, a1_a1, bar[5] - bar[1]) + cross_entropy(a1_a1, a1_a0, a0_a0, bar[1])
        expected -= cross_entropy(1, 0, a0_a0, bar[5])
    else:
        k = 1 - prime[1]
        expected = cross_entropy(k**2 * a0_a0, 0, 1, bar[5] - bar[2]) - cross_entropy(a0_a0, 0, 1, bar[5] - bar[1])
        expected += cross_entropy(a0_a0, k * a0_a0, k**2 * a0_a0, bar[2] - bar[1])
    data, eps, a_T = mu + width * gaussian(n, 1, seed=31), gaussian(n, 1, seed=32), gaussian(n, 1, seed=33)
    deviation = decay * data + math.sqrt(var) * eps - decay * mu
    rows = -erdp.policy_log_prob(sde64(), mu + p * deviation, r * deviation, a_T, variant)
    assert_mean(f"the entropy term, {variant}", rows, expected, comparisons=2)
    zero = torch.zeros(n, dtype=torch.float64)
    batch = Batch(data, data, zero, data, zero)
    noise = Noise(None, torch.full((n,), t), eps, a_T, None)

    def policy(x_t, t, state):
        return r * (x_t - decay * mu)

    def critics(state, action, frozen):
        return action.T

    *_, entropy = erdp.policy_loss(policy, critics, sde64(), batch, noise, data.T, Args(variant=variant))
    agree("the mean of -log p that the policy loss reports", entropy, rows.mean(), rtol=1e-9)


class Problem(NamedTuple):
    """One draw of everything that the policy loss takes, and its prediction of the noise as a leaf."""

    args: Args
    sde: MeanRevertingSDE
    critics: QEnsemble
    batch: Batch
    noise: Noise
    q_data: torch.Tensor
    eps_hat: torch.Tensor

    def loss(self, **changes):
        """erdp's policy loss, the prediction standing in for the policy."""
        p = self._replace(**changes)

        def policy(x_t, t, state):
            agree("the policy sees the noised data action", x_t, p.sde.diffuse(p.batch.action, p.noise.t, p.noise.eps))
            assert t is p.noise.t and state is p.batch.state
            return p.eps_hat

        return erdp.policy_loss(policy, p.critics, p.sde, p.batch, p.noise, p.q_data, p.args)

    def gradient(self, **changes):
        eps_hat = changes.pop("eps_hat", self.eps_hat).detach().clone().requires_grad_()
        self.loss(eps_hat=eps_hat, **changes)[0].backward()
        return eps_hat.grad


def problem(seed=0, B=4, M=3, **choices) -> Problem:
    args = Args(**dict(num_diffusion_steps=4, entropy_coef=0.3, eta=0.7, lcb_coef=1.3) | choices)
    T, critics, batch = args.num_diffusion_steps, tiny_critics(M=M, seed=seed), random_batch(B, seed=seed)
    t = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    noise = Noise(None, t, gaussian(B, 2, seed=seed + 20), gaussian(B, 2, seed=seed + 21), None)
    eps_hat = noise.eps + 0.3 * gaussian(B, 2, seed=seed + 22)  # near enough for some x0-hat to lie inside the bounds
    q_data = critics(batch.state, batch.action).detach()
    return Problem(args, sde64(T, args.schedule), critics, batch, noise, q_data, eps_hat)


def literal_policy_loss(args, members, batch, noise, q_data, eps_hat, frozen=None):
    """Eq. 15 as each variant has it. Returns loss, its three parts, and the magnitudes that it treats as constants."""
    prime, bar = literal_theta(args.schedule, args.num_diffusion_steps)
    t = noise.t.numpy()
    prime_t, bar_t, before_t = (torch.tensor(column)[:, None] for column in (prime[t], bar[t], bar[t - 1]))
    std_t = torch.sqrt(1 - torch.exp(-2 * bar_t))
    x_t = torch.exp(-bar_t) * batch.action + std_t * noise.eps
    l_diff = literal_diffusion_loss(args.loss, prime_t, bar_t, before_t, batch.action, x_t, noise.eps, eps_hat)
    a_0 = torch.exp(bar_t) * (x_t - std_t * eps_hat)
    clipped = torch.where(a_0.abs() <= 1, a_0, a_0.sign().detach())  # without gradient outside
    log_p = literal_log_prob(args.variant, prime, bar, a_0, eps_hat, noise.a_T)

    def pessimistic(q):
        if args.pessimism == "min":
            return torch.stack([min(column) for column in q.T])
        M, mean = len(q), q.sum(0) / len(q)
        if M == 1:
            return mean
        return mean - args.lcb_coef * torch.sqrt(((q - mean) ** 2).sum(0) / (M if args.variant == "paper" else M - 1))

    q = literal_q_of(members, batch.state, clipped)
    value = pessimistic(q).mean()
    with torch.no_grad():
        q_size = pessimistic(q_data).abs().mean() if args.variant == "paper" else q.abs().mean()
        frozen = frozen or (q_size, log_p.abs().mean())
    if args.variant == "paper":
        loss = l_diff - args.eta / frozen[0] * (value - args.entropy_coef * log_p.mean())
    else:
        loss = l_diff - args.eta / frozen[0] * value - args.entropy_coef * (-log_p.mean() / frozen[1])
    return loss, l_diff, value, -log_p.mean(), frozen


CHOICES = dict(
    variant=st.sampled_from(["paper", "released"]),
    loss=st.sampled_from(["noise", "likelihood", "posterior"]),
    pessimism=st.sampled_from(["lcb", "min"]),
)


@settings(max_examples=50)
@given(
    st.fixed_dictionaries(
        CHOICES
        | dict(
            num_diffusion_steps=st.integers(3, 30),
            schedule=st.sampled_from(SCHEDULES),
            entropy_coef=st.floats(0, 2),
            eta=st.floats(0, 3),
            lcb_coef=st.floats(0, 5),
            M=st.integers(1, 3),
            B=st.integers(1, 3),
            seed=st.integers(0, 999),
        )
    )
)
def test_eq15_policy_loss_equals_a_literal_one(choices):
    p = problem(**choices)
    eps_hat = p.eps_hat.clone().requires_grad_()
    *expected, _ = literal_policy_loss(p.args, members_of(p.critics), p.batch, p.noise, p.q_data, eps_hat)
    (slope,) = torch.autograd.grad(expected[0], eps_hat)
    size = 1e-9 * (1 + float(slope.abs().max()))
    for name, value, reference in zip(("loss", "L_diff", "mean pessimistic value", "entropy"), p.loss(), expected):
        agree(f"Eq. 15: {name}", value, reference, rtol=1e-8, atol=1e-9)
    agree("Eq. 15: gradient to the predicted noise", p.gradient(), slope, rtol=1e-8, atol=size)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("loss", ["noise", "likelihood", "posterior"])
@pytest.mark.parametrize("pessimism", ["lcb", "min"])
def test_eq15_gradient_equals_finite_differences(variant, loss, pessimism):
    p = problem(variant=variant, loss=loss, pessimism=pessimism, seed=5)
    frozen = literal_policy_loss(p.args, members_of(p.critics), p.batch, p.noise, p.q_data, p.eps_hat)[-1]

    def value(flat):
        """The loss with lambda and the entropy's magnitude held constant, as Eq. 15's gradient does."""
        eps_hat = torch.tensor(flat).view_as(p.eps_hat)
        return float(literal_policy_loss(p.args, members_of(p.critics), p.batch, p.noise, p.q_data, eps_hat, frozen)[0])

    at, h = p.eps_hat.numpy().ravel(), 1e-5
    slope = [(value(at + h * unit) - value(at - h * unit)) / (2 * h) for unit in np.eye(len(at))]
    agree("Eq. 15: gradient", p.gradient().ravel(), slope, rtol=1e-6, atol=1e-6)


@given(st.fixed_dictionaries(CHOICES), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_eq12_q_terms_gradient_does_not_change_with_the_scale_of_q(choices, c, seed):
    p = problem(seed, entropy_coef=0.0, **choices)
    scaled = copy.deepcopy(p.critics)
    with torch.no_grad():
        scaled.weights[3].mul_(c)
        scaled.biases[3].mul_(c)
    gradient = p.gradient(critics=scaled, q_data=c * p.q_data)
    agree("Eq. 12: lambda takes out the scale of Q", gradient, p.gradient(), rtol=1e-8)
    without_q = p.gradient(args=Args(**vars(p.args) | dict(eta=0.0)))
    x_t = p.sde.diffuse(p.batch.action, p.noise.t, p.noise.eps)
    inside = p.sde.predict_x0(x_t, p.noise.t, p.eps_hat).abs() < 1
    assert torch.equal(without_q != p.gradient(), inside), "Eq. 12: Q's gradient reaches every action inside the bounds"


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_eq12_alpha_zero_removes_the_entropy_term_exactly(variant):
    p = problem(variant=variant, entropy_coef=0.0)
    broken = p.noise._replace(a_T=torch.full_like(p.noise.a_T, torch.inf))
    assert not torch.isfinite(p.loss(noise=broken)[3]), "the entropy is infinite here"
    assert torch.equal(p.loss(noise=broken)[0], p.loss()[0]), "alpha = 0: the loss does not contain it"
    assert torch.equal(p.gradient(noise=broken), p.gradient()), "alpha = 0: nor does its gradient"
    with_it = p.gradient(args=Args(**vars(p.args) | dict(entropy_coef=0.01)))
    assert not torch.equal(with_it, p.gradient()), "alpha = 0.01: the gradient contains it"


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_eq15_gradients_flow_into_the_policy_alone(variant):
    p = problem(variant=variant)
    q_data, action = p.q_data.clone().requires_grad_(), p.batch.action.clone().requires_grad_()
    eps_hat = p.eps_hat.clone().requires_grad_()
    loss, *parts = p.loss(q_data=q_data, eps_hat=eps_hat, batch=p.batch._replace(action=action))
    loss.backward()
    assert all(weight.grad is None for weight in p.critics.parameters()), "Q's weights get no gradient from Eq. 15"
    assert q_data.grad is None, "lambda is a constant of Eq. 15"
    assert not any(part.requires_grad for part in parts), "what is reported carries no graph"
    assert eps_hat.grad.ne(0).all()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_eq15_only_q_sees_the_clipped_action(variant):
    """With every x0-hat far outside the bounds Q is constant, and the rest of the loss still moves."""
    p, seen = problem(variant=variant), []

    def critics(state, action, frozen):
        seen.append(action)
        return p.critics(state, action, frozen)

    far = p.eps_hat - 50
    p.loss(eps_hat=far, critics=critics)
    assert (seen[0].abs() == 1).all(), "Q sees a^0-hat clamped to the bounds"
    only_q = Args(**vars(p.args) | dict(entropy_coef=0.0))
    of_eq5 = 2 * (far - p.noise.eps) / far.numel()
    agree("the clamp has no gradient outside", p.gradient(eps_hat=far, args=only_q), of_eq5)
    with_entropy = p.gradient(eps_hat=far)
    assert (with_entropy != p.gradient(eps_hat=far, args=only_q)).all(), "the entropy's a^0-hat is not clamped"


def test_eq12_lambda_takes_each_variants_magnitude_of_q():
    """paper: E abs Q^LCB(s, a) over the data. released: the mean over members of abs Q(s, a^0-hat)."""
    for variant in ("paper", "released"):
        p = problem(variant=variant, entropy_coef=0.0)
        loss, l_diff, value, _ = p.loss()
        weight = (l_diff - loss) / value / p.args.eta
        doubled = p.loss(q_data=2 * p.q_data)
        ratio = (l_diff - doubled[0]) / value / p.args.eta / weight
        agree(f"lambda after doubling Q(s, a), {variant}", ratio, 0.5 if variant == "paper" else 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------
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
        self.critic_adam = Adam([p for member in self.critics for p in member], 2e-3)  # the toy's rate

    def update(self, batch, noise):
        args, T, B = self.args, self.args.num_diffusion_steps, len(batch.state)
        # next actions, at s_{i+1}, by the EMA policy
        candidates = []
        for c in range(10 if args.max_q_backup else 1):
            network = functools.partial(literal_noise_network, self.policy_ema)
            chunk = noise.next_action[:, c * B : (c + 1) * B]
            clips = args.clip_denoised, True
            candidates.append(literal_sample(network, args.schedule, T, batch.next_state, chunk, *clips))
        y = literal_targets(self.critics_target, batch, candidates, 0.99, args.pessimism)
        q = literal_q_of(self.critics, batch.state, batch.action)
        q_loss = ((q - y) ** 2).sum() / (B * len(self.critics))
        self.critic_adam.descend(q_loss, args.grad_norm)
        # the policy, against the updated Q
        bar = literal_theta(args.schedule, T)[1][noise.t.numpy()]
        scale, std = (torch.tensor(c)[:, None] for c in (np.exp(-bar), np.sqrt(1 - np.exp(-2 * bar))))
        eps_hat = literal_noise_network(self.policy, scale * batch.action + std * noise.eps, noise.t, batch.state)
        pi_loss, *parts, _ = literal_policy_loss(args, self.critics, batch, noise, q.detach(), eps_hat)
        self.policy_adam.descend(pi_loss, args.grad_norm)
        # the target networks
        with torch.no_grad():
            if self.updates >= 1000 and self.updates % 5 == 0:
                for name, p in self.policy.items():
                    self.policy_ema[name] = 0.005 * p + 0.995 * self.policy_ema[name]
            for target, member in zip(self.critics_target, self.critics):
                target[:] = [0.005 * new + 0.995 * old for old, new in zip(target, member)]
        self.updates += 1
        return [float(value.detach()) for value in (q_loss, pi_loss, parts[0], q.mean(), *parts[1:])]

    def compare(self, agent: Agent, claim: str):
        for name in ("policy", "policy_ema"):
            for key, p in getattr(agent, name).named_parameters():
                agree(f"{claim}: {name}, {key}", p, getattr(self, name)[key], rtol=1e-9)
        for name in ("critics", "critics_target"):
            for m, member in enumerate(members_of(getattr(agent, name))):
                for k, p in enumerate(member):
                    agree(f"{claim}: {name}, member {m}, tensor {k}", p, getattr(self, name)[m][k], rtol=1e-9)
        policy, critics = (o.state_dict()["state"] for o in (agent.policy_optimizer, agent.critic_optimizer))
        tight = dict(rtol=1e-8, atol=1e-13)
        for name, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):  # of PyTorch's Adam, and of ours
            for k, state in policy.items():
                agree(f"{claim}: {name} of the policy", state[name], getattr(self.policy_adam, moment)[k], **tight)
            for k, state in critics.items():
                place = 2 * (k % 4) + k // 4  # in PyTorch's order the ensemble's 4 weights come before its 4 biases
                members = getattr(self.critic_adam, moment)[place::8]
                agree(f"{claim}: {name} of Q", state[name], torch.stack(members), **tight)


def agent64(seed=0, **choices) -> Agent:
    """A toy-sized agent in float64 whose targets and EMA differ from the networks that they follow."""
    torch.manual_seed(seed)
    args = Args(**dict(env="toy", num_diffusion_steps=4, num_critics=3, batch_size=4, lr=1e-3) | choices)
    agent = Agent(3, 2, args)
    agent.sde = MeanRevertingSDE(args.num_diffusion_steps, args.schedule, dtype=torch.float64)
    with torch.no_grad():
        for module in (agent.policy, agent.critics, agent.policy_ema, agent.critics_target):
            module.double()
        for p in (*agent.policy_ema.parameters(), *agent.critics_target.parameters()):
            p.add_(0.02 * torch.randn_like(p))
        agent.critics.weights[3].mul_(100)
        agent.critics_target.weights[3].mul_(100)
    return agent


def random_noise(args: Args, generator) -> Noise:
    """What `draw` fills, in float64."""
    noise = erdp.empty_noise(args, 2, "cpu")
    noise = Noise(*(part.double() if part.is_floating_point() else part for part in noise))
    erdp.draw(noise, 100, generator)
    return noise


ALGORITHM1 = {
    "paper": dict(),
    "released": dict(variant="released"),
    "gym": dict(loss="likelihood", clip_denoised=False, schedule="vp"),
    "antmaze": dict(max_q_backup=True, eta=2.0, num_diffusion_steps=3),
    "clipped gradients": dict(grad_norm=0.05, entropy_coef=0.5, lr=3e-5),
    "min": dict(pessimism="min", variant="released", loss="posterior", schedule="linear"),
    "one member": dict(num_critics=1, variant="released", entropy_coef=0.0, schedule="constant"),
}


def check_algorithm1(choices, updates, start):
    agent, generator = agent64(**choices), torch.Generator().manual_seed(1)
    agent.updates.fill_(start)
    literal = Algorithm1(agent)
    for k in range(updates):
        batch, noise = random_batch(agent.args.batch_size, seed=100 * k), random_noise(agent.args, generator)
        metrics = erdp.update(agent, batch, noise)
        agree(f"Algorithm 1, update {start + k}: {erdp.METRICS}", metrics, literal.update(batch, noise), rtol=1e-8)
        literal.compare(agent, f"Algorithm 1 after update {start + k}")
    assert agent.updates == start + updates


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("name", ALGORITHM1)
def test_algorithm1_one_update_equals_a_literal_one(name, start):
    check_algorithm1(ALGORITHM1[name], 1, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHM1)
def test_algorithm1_twenty_updates_equal_literal_ones(name):
    check_algorithm1(ALGORITHM1[name], 20, 990)


def test_algorithm1_three_updates_equal_literal_ones():
    check_algorithm1(ALGORITHM1["clipped gradients"], 3, 999)


def test_algorithm1_averages_the_policy_every_5_updates_from_1000_on():
    agent, generator = agent64(num_diffusion_steps=2, num_critics=2), torch.Generator().manual_seed(2)
    due = []
    for step in (0, 5, 995, 999, 1000, 1001, 1004, 1005, 1010, 1013, 2000):
        agent.updates.fill_(step)
        before = agent.policy_ema.layers[0].weight.clone()
        erdp.update(agent, random_batch(4), random_noise(agent.args, generator))
        due += [step] if not torch.equal(before, agent.policy_ema.layers[0].weight) else []
    assert due == [1000, 1005, 1010, 2000], "the policy's EMA moves every 5 updates, from update 1000 on"


def test_algorithm1_descend_clips_all_gradients_as_one_vector():
    module, optimizer = nn.Linear(2, 1, dtype=torch.float64), None
    weight = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    for limit, expected in ((1.0, [0.6, 0.8]), (4.0, [2.4, 3.2]), (6.0, [3.0, 4.0])):
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        module.weight.grad = torch.full((1, 2), 9.0, dtype=torch.float64)  # of an earlier step: must go
        before = [p.detach().clone() for p in module.parameters()]
        erdp.descend((weight * module.weight).sum() + 4 * module.bias.sum(), module, optimizer, limit)
        moved = [float(old.ravel()[0] - new.ravel()[0]) for old, new in zip(before, module.parameters())]
        agree(f"a gradient of norm 5 clipped at {limit}", moved, expected, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.25, torch.tensor(0.25), torch.tensor(0.0)])
def test_algorithm1_targets_move_by_the_rate_toward_their_network(rate):
    target, source = nn.Linear(2, 1, dtype=torch.float64), nn.Linear(2, 1, dtype=torch.float64)
    was_target, was_source = copy.deepcopy(target), copy.deepcopy(source)
    erdp.move(target, source, rate)
    for moved, stayed, old, new in zip(*(m.parameters() for m in (target, source, was_target, was_source))):
        agree("target <- rate source + (1 - rate) target", moved, float(rate) * new + (1 - float(rate)) * old)
        assert torch.equal(stayed, new), "the network itself stays"


def test_algorithm1_agent_has_the_papers_networks_and_optimisers():
    agent = Agent(11, 3, erdp.preset("pen-human-v1"))
    assert [tuple(layer.weight.shape) for layer in agent.policy.layers] == [(256, 30), (256, 256), (256, 256), (3, 256)]
    assert [tuple(w.shape) for w in agent.critics.weights[:2]] == [(64, 14, 256), (64, 256, 256)]
    assert agent.sde.num_steps == 5 and agent.sde.theta_bar.dtype == torch.float32
    agree("the agent's SDE", agent.sde.theta_bar, literal_theta("cosine", 5)[1], rtol=1e-6)
    for module, target in ((agent.policy, agent.policy_ema), (agent.critics, agent.critics_target)):
        for p, copied in zip(module.parameters(), target.parameters()):
            assert torch.equal(p, copied), "targets begin as copies"
            assert p.requires_grad and not copied.requires_grad and p.data_ptr() != copied.data_ptr()
    for optimizer, module, lr in (
        (agent.policy_optimizer, agent.policy, 3e-5),
        (agent.critic_optimizer, agent.critics, 3e-4),
    ):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and group["lr"] == lr, "Table 4's rate is the policy's"
        assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, 0, False)
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert agent.updates == 0
    actor = agent.actor([-1] * 3, [1] * 3)
    assert actor.policy is agent.policy and actor.critics is agent.critics_target, "acts by pi_phi and Q's targets"
    toy = Agent(2, 1, erdp.preset("toy"))
    assert toy.policy.layers[0].out_features == toy.critics.weights[0].shape[2] == erdp.TOY_HIDDEN < 256
    assert [o.param_groups[0]["lr"] for o in (toy.policy_optimizer, toy.critic_optimizer)] == [1e-3, 2e-3]
    other = Agent(2, 1, Args(schedule="vp", num_diffusion_steps=7)).sde
    agree("the agent's SDE, of other settings", other.theta_bar, literal_theta("vp", 7)[1], rtol=1e-6)


@pytest.mark.parametrize("max_q_backup, candidates", [(False, 1), (True, 10)])
def test_algorithm1_noise_has_one_row_a_transition_and_ten_candidates_for_max_q_backup(max_q_backup, candidates):
    noise = erdp.empty_noise(Args(batch_size=6, num_diffusion_steps=4, max_q_backup=max_q_backup), 3, "cpu")
    shapes = [tuple(part.shape) for part in noise]
    assert shapes == [(6,), (6,), (6, 3), (6, 3), (4, candidates * 6, 3)]
    assert [part.dtype for part in noise] == [torch.int64] * 2 + [torch.float32] * 3


def test_algorithm1_draws_rows_times_and_gaussians_of_their_laws():
    """Sees a time or a row that is left out, or 10% too frequent (60,000 draws)."""
    noise = erdp.empty_noise(Args(batch_size=60_000), 1, "cpu")
    places = [part.data_ptr() for part in noise]
    erdp.draw(noise, 7, torch.Generator().manual_seed(0))
    assert [part.data_ptr() for part in noise] == places, "draw fills the buffers in place"
    assert noise.t.min() == 1 and noise.t.max() == 5 and noise.rows.min() == 0 and noise.rows.max() == 6
    assert_uniform_counts("diffusion times are uniform on 1..T", noise.t.bincount(minlength=6)[1:], comparisons=13)
    assert_uniform_counts("rows are uniform on 0..N-1", noise.rows.bincount(minlength=7), comparisons=13)
    assert_uniform_counts("rows and times are independent", (noise.rows * 5 + noise.t - 1).bincount(), comparisons=13)
    gaussians = [noise.eps, noise.a_T, *noise.next_action]
    for gaussian_part in gaussians:
        assert_law("standard Gaussian noise", gaussian_part, norm, comparisons=13)
    products = torch.stack([a * b for k, a in enumerate(gaussians) for b in gaussians[:k]], -1)
    assert_mean("the noises are independent", products, 0.0, comparisons=3)
    again = erdp.empty_noise(Args(batch_size=60_000), 1, "cpu")
    erdp.draw(again, 7, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(noise, again)), "noise is a function of the generator"
    erdp.draw(again, 7, torch.Generator().manual_seed(1))
    assert not any(torch.equal(a, b) for a, b in zip(noise, again))


# ---------------------------------------------------------------------------------------------------------------------
# Table 4, Section 4.1, and the rows of Tables 1 and 2
# ---------------------------------------------------------------------------------------------------------------------
# learning rate, eta, max Q-backup, gradient norm, loss, action clip; then steps and evaluation episodes of Section 4.1
TABLE_4 = {
    "gym": (3e-4, 1.0, False, 4.0, "likelihood", False, 2_000_000, 10),
    "antmaze": (3e-4, 2.0, True, 4.0, "noise", True, 1_000_000, 100),
    "adroit": (3e-5, 0.1, False, 8.0, "noise", True, 1_000_000, 100),
    "kitchen": (3e-4, 0.005, False, 10.0, "likelihood", False, 1_000_000, 100),
}
CHEETAH, HOPPER, WALKER = (-280.178953, 12135.0), (-20.272305, 3234.3), (1.629008, 4592.3)
PEN = (96.262799, 3076.8331017826877)
TABLES_1_AND_2 = {  # row: domain, data set without its version if it is Minari's, environment, reference returns
    "halfcheetah-medium-v2": ("gym", "halfcheetah_medium-v2.hdf5", "HalfCheetah-v4", CHEETAH),
    "hopper-medium-v2": ("gym", "hopper_medium-v2.hdf5", "Hopper-v4", HOPPER),
    "walker2d-medium-v2": ("gym", "walker2d_medium-v2.hdf5", "Walker2d-v4", WALKER),
    "halfcheetah-medium-replay-v2": ("gym", "halfcheetah_medium_replay-v2.hdf5", "HalfCheetah-v4", CHEETAH),
    "hopper-medium-replay-v2": ("gym", "hopper_medium_replay-v2.hdf5", "Hopper-v4", HOPPER),
    "walker2d-medium-replay-v2": ("gym", "walker2d_medium_replay-v2.hdf5", "Walker2d-v4", WALKER),
    "halfcheetah-medium-expert-v2": ("gym", "halfcheetah_medium_expert-v2.hdf5", "HalfCheetah-v4", CHEETAH),
    "hopper-medium-expert-v2": ("gym", "hopper_medium_expert-v2.hdf5", "Hopper-v4", HOPPER),
    "walker2d-medium-expert-v2": ("gym", "walker2d_medium_expert-v2.hdf5", "Walker2d-v4", WALKER),
    "antmaze-umaze-v0": ("antmaze", "D4RL/antmaze/umaze", None, (0, 1)),
    "antmaze-umaze-diverse-v0": ("antmaze", "D4RL/antmaze/umaze-diverse", None, (0, 1)),
    "antmaze-medium-play-v0": ("antmaze", "D4RL/antmaze/medium-play", None, (0, 1)),
    "antmaze-medium-diverse-v0": ("antmaze", "D4RL/antmaze/medium-diverse", None, (0, 1)),
    "antmaze-large-play-v0": ("antmaze", "D4RL/antmaze/large-play", None, (0, 1)),
    "antmaze-large-diverse-v0": ("antmaze", "D4RL/antmaze/large-diverse", None, (0, 1)),
    "pen-human-v1": ("adroit", "D4RL/pen/human", None, PEN),
    "pen-cloned-v1": ("adroit", "D4RL/pen/cloned", None, PEN),
    "kitchen-complete-v0": ("kitchen", "D4RL/kitchen/complete", None, (0, 4)),
    "kitchen-partial-v0": ("kitchen", "D4RL/kitchen/partial", None, (0, 4)),
    "kitchen-mixed-v0": ("kitchen", "D4RL/kitchen/mixed", None, (0, 4)),
}


def test_tables_1_and_2_have_these_rows():
    assert erdp.ROWS.keys() == TABLES_1_AND_2.keys()
    assert len(erdp.ROWS) == 20


@pytest.mark.parametrize("env", TABLES_1_AND_2)
def test_table4_presets_are_the_papers_in_every_row(env):
    args, (domain, *_) = erdp.preset(env), TABLES_1_AND_2[env]
    lr, eta, backup, grad_norm, loss, clip, num_steps, episodes = TABLE_4[domain]
    if env == "antmaze-umaze-v0":
        backup = False  # Table 4's asterisk
    assert args.env == env
    table = (args.lr, args.eta, args.max_q_backup, args.grad_norm, args.loss, args.clip_denoised)
    assert table == (lr, eta, backup, grad_norm, loss, clip), "Table 4"
    assert (args.num_steps, args.eval_episodes, args.eval_every) == (num_steps, episodes, 50_000), "Section 4.1"
    shared = (args.num_critics, args.lcb_coef, args.entropy_coef, args.num_diffusion_steps, args.batch_size)
    assert shared == (64, 4.0, 0.01, 5, 256), "Section 4.1: M, beta, alpha, T, batch"
    assert (args.variant, args.pessimism, args.schedule, args.eval_candidates) == ("paper", "lcb", "cosine", 50)


@pytest.mark.parametrize("env", TABLES_1_AND_2)
def test_tables_1_and_2_take_their_data_and_reference_scores(env):
    row, (domain, dataset, env_id, returns) = erdp.ROWS[env], TABLES_1_AND_2[env]
    assert erdp.domain_of(env) == row.domain == domain
    assert row.dataset.removesuffix("-v1").removesuffix("-v2") == dataset or row.dataset == dataset
    assert (row.env_id, (row.ref_min, row.ref_max)) == (env_id, returns)


def test_presets_of_the_toy_and_of_unknown_data():
    toy = erdp.preset("toy")
    assert (toy.max_q_backup, toy.loss, toy.clip_denoised, toy.variant) == (False, "noise", True, "paper")
    assert (toy.num_diffusion_steps, toy.entropy_coef, toy.lcb_coef, toy.pessimism) == (5, 0.01, 4.0, "lcb")
    assert erdp.domain_of("toy") == "toy" and erdp.domain_of("elsewhere") == "gym"


@pytest.mark.parametrize("available, device", [(False, "cpu"), (True, "cuda")])
def test_presets_take_a_gpu_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    args = erdp.preset("hopper-medium-v2")
    assert (args.device, args.compile) == (device, available)


def test_defaults_in_signatures_are_the_papers():
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    assert defaults(MeanRevertingSDE) == dict(num_steps=5, schedule="cosine", dtype=torch.float32, device="cpu")
    assert defaults(NoiseNetwork) == dict(hidden=256)
    assert defaults(QEnsemble) == dict(num_critics=64, hidden=256)
    assert defaults(QEnsemble.forward) == dict(frozen=False)
    assert defaults(erdp.sample_actions) == dict(clip_denoised=True, clip_sample=True)
    assert defaults(erdp.diffusion_loss) == dict(loss="noise")
    assert defaults(erdp.critic_loss) == dict(pessimism="lcb", discount=0.99)
    assert defaults(erdp.lcb) == dict(beta=4.0, unbiased=False)
    args = Args()
    assert (args.env, args.seed, args.variant, args.device, args.compile) == ("toy", 0, "paper", "cpu", False)
    assert (args.num_critics, args.lcb_coef, args.pessimism, args.entropy_coef) == (64, 4.0, "lcb", 0.01)
    assert (args.num_diffusion_steps, args.schedule, args.loss, args.clip_denoised) == (5, "cosine", "noise", True)
    assert (args.num_steps, args.batch_size, args.lr, args.eta, args.grad_norm) == (1_000_000, 256, 3e-4, 1.0, 4.0)
    assert (args.max_q_backup, args.eval_every, args.eval_episodes, args.eval_candidates) == (False, 50_000, 100, 50)
    assert (erdp.DISCOUNT, erdp.TARGET_RATE, erdp.CRITIC_LR, erdp.BACKUP_CANDIDATES) == (0.99, 0.005, 3e-4, 10)
    assert (erdp.POLICY_EMA_RATE, erdp.POLICY_EMA_EVERY, erdp.POLICY_EMA_START) == (0.005, 5, 1000)
