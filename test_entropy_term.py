"""Variant "debruijn", the entropy term by de Bruijn's identity, and --q-time, in the manner of test_erdp.py."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

import erdp
from erdp import Args, Batch, MeanRevertingSDE, Noise, UserError
from test_erdp import (
    MEANS,
    SCHEDULES,
    WEIGHTS,
    WIDTHS,
    agree,
    analytic_predictor,
    gaussian,
    literal_policy_loss,
    literal_theta,
    members_of,
    mixture_score,
    problem,
    sde64,
)

# ---------------------------------------------------------------------------------------------------------------------
# De Bruijn's identity: the weights, and where the sum ends
# ---------------------------------------------------------------------------------------------------------------------
STANDARD = 0.5 * math.log(2 * math.pi * math.e)  # entropy of a standard Gaussian
GRIDS = st.integers(2, 200), st.sampled_from(SCHEDULES)


def last_used(bar) -> int:
    """The last t at which -1/2 log var_t is 0.01 or more, or 1, from theta_bar (T+1,)."""
    return max([1, *(t for t in range(1, len(bar)) if -0.5 * math.log(-math.expm1(-2 * bar[t])) >= 0.01)])


@pytest.mark.parametrize("schedule, last", [("cosine", 2), ("linear", 2), ("vp", 2), ("constant", 1)])
def test_debruijn_sum_of_five_steps_ends_early(schedule, last):
    found = sde64(5, schedule).last_time
    assert type(found) is int and found == last


@given(*GRIDS)
@example(2, "constant")  # x_1 is Gaussian already
def test_debruijn_weights_follow_their_rule_and_add_up_to_theta_bar(T, schedule):
    (prime, bar), weights = literal_theta(schedule, T), erdp.entropy_weights(sde64(T, schedule))
    last, var = last_used(bar), 1 - np.exp(-2 * bar[1:])
    expected = [prime[t] / var[t - 1] if t <= last else 0.0 for t in range(1, T + 1)]
    agree("w_t = theta'_t / var_t, and 0 after the last time", weights, expected, rtol=1e-8)
    agree("the sum of w_t var_t", (weights.numpy() * var).sum(), bar[last])


@given(*GRIDS, st.floats(-1, 1))
def test_debruijn_sum_ends_where_x_t_is_gaussian_to_within_a_hundredth_nat(T, schedule, action):
    """Of one action in [-1, 1]: KL of x_t from the standard Gaussian, and what its entropy lacks, by SciPy."""
    (prime, bar), last = literal_theta(schedule, T), sde64(T, schedule).last_time

    def lacks(t, action):
        law = norm(math.exp(-bar[t]) * action, math.sqrt(-math.expm1(-2 * bar[t])))
        kl = 0.5 * math.log(2 * math.pi) + 0.5 * (law.var() + law.mean() ** 2) - law.entropy()
        return kl, STANDARD - law.entropy()

    for t in range(last + 1, T + 1):
        assert max(lacks(t, action)) < 0.01, "x_t after the last time"
    assert last == 1 or min(lacks(last, 1.0)) >= 0.01 - 1e-12, "at the last time an action on the bounds is still seen"
    left_out = prime[last + 1 :] * (1 / -np.expm1(-2 * bar[last + 1 :]) - 1)
    assert left_out.sum() <= 0.03, "as E||E(eps | x_t)||^2 lies between var_t and 1 a dimension"


# ---------------------------------------------------------------------------------------------------------------------
# De Bruijn's identity: the estimate
# ---------------------------------------------------------------------------------------------------------------------
def literal_estimate(schedule, T, t, eps_hat) -> list:
    """H-hat of each row (B,), term by term."""
    (prime, bar), rows = literal_theta(schedule, T), []
    for time, eps in zip(t, eps_hat):
        var = 1 - math.exp(-2 * bar[time])
        weight = prime[time] / var if time <= last_used(bar) else 0.0
        rows.append(sum(STANDARD - T * weight * (e**2 - var) for e in eps))
    return rows


@given(*GRIDS, st.integers(1, 3), st.integers(0, 999))
def test_debruijn_estimate_is_its_formula_at_one_time_a_row_and_the_grids_sum_on_average(T, schedule, A, seed):
    (prime, bar), sde = literal_theta(schedule, T), sde64(T, schedule)
    t, eps_hat = torch.randperm(T, generator=torch.Generator().manual_seed(seed)) + 1, gaussian(T, A, seed=seed)
    rows = erdp.entropy_estimate(sde, eps_hat, t)
    agree("H-hat", rows, literal_estimate(schedule, T, t.tolist(), eps_hat.tolist()), rtol=1e-9, atol=1e-8)
    total = A * STANDARD
    for time, eps in zip(t.tolist(), eps_hat):
        if time <= last_used(bar):
            total -= prime[time] * (float(eps.square().sum()) / (1 - math.exp(-2 * bar[time])) - A)
    agree("the mean over t", rows.mean(), total, rtol=1e-9, atol=1e-9)
    single = erdp.entropy_estimate(MeanRevertingSDE(T, schedule), eps_hat.float(), t)
    assert single.dtype == torch.float32
    agree("in float32", single.double(), rows, rtol=1e-4, atol=1e-4)


def integral(function) -> float:
    return scipy.integrate.quad(function, -8, 8, points=[-1, 0, 1], limit=400, epsabs=1e-10)[0]


def mixture_density(x, bar) -> float:
    """Of the mixture after Eq. 4 with theta_bar = bar."""
    spread = np.sqrt(math.exp(-2 * bar) * WIDTHS**2 - math.expm1(-2 * bar))
    return (WEIGHTS * norm.pdf(x, math.exp(-bar) * MEANS, spread)).sum()


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


@pytest.mark.parametrize("T", [2, 5, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_debruijn_estimate_of_a_mixture_is_the_grids_sum_of_fisher_informations(T, schedule):
    (prime, bar), expected = literal_theta(schedule, T), STANDARD
    for t in range(1, last_used(bar) + 1):
        fisher = integral(lambda x: mixture_density(x, bar[t]) * mixture_score(x, bar[t]) ** 2)  # noqa: B023
        expected -= prime[t] * (fisher - 1)
    agree("H-hat with the exact noise", of_mixture(T, schedule=schedule), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "vp"])  # "constant" has a long first step at any such T
def test_debruijn_estimate_of_a_mixture_approaches_its_entropy_at_first_order(schedule):
    """Up to what x_t at the last time used lacks of a Gaussian's entropy."""
    errors = []
    for T in (100, 200, 400):
        bar = literal_theta(schedule, T)[1]
        ends = 0.0, bar[last_used(bar)]
        start, end = (integral(lambda x: scipy.special.entr(mixture_density(x, s))) for s in ends)  # noqa: B023
        errors.append(of_mixture(T, schedule=schedule) - (start + STANDARD - end))
    assert 0 < errors[-1] < 0.15, f"errors {errors}"
    agree("half the step, half the error", np.divide(errors[:2], errors[1:]), (2.0, 2.0), rtol=0.1)


def test_debruijn_estimate_ranks_widths_and_modes_moving_apart_at_five_steps():
    gaussians = [of_mixture(5, [1.0], [0.0], [width]) for width in (0.1, 0.3, 0.5, 1.0)]
    modes = [of_mixture(5, [0.5, 0.5], [-mode, mode], [0.1, 0.1]) for mode in (0.1, 0.2, 0.3, 0.5, 0.8)]
    assert np.diff(gaussians).min() > 0.005 and np.diff(modes).min() > 0.005, (gaussians, modes)
    agree("deviation 1: the truth", gaussians[-1], STANDARD)
    agree("as results/entropy.md has them", gaussians[:2] + modes[1:4], [0.886, 0.982, 0.937, 0.992, 1.120], atol=1e-3)


@pytest.mark.parametrize("p, q", [((0.0, 0.3), (0.0, 0.5)), ((0.1, 0.4), (-0.3, 0.25)), ((0.0, 0.3), (0.4, 0.3))])
def test_debruijn_estimate_of_a_policy_away_from_the_data_is_twice_h_less_the_cross_entropy(p, q):
    """Of the data's and the policy's Gaussian (mean, deviation), with CE(p, q) = -E_p log q by quadrature."""

    def twice_h_less_ce(bar):
        data, policy = (norm(math.exp(-bar) * m, math.sqrt(math.exp(-2 * bar) * (w**2 - 1) + 1)) for m, w in (p, q))
        return 2 * policy.entropy() + data.expect(policy.logpdf)

    errors, data = [], (np.ones(1), np.array([p[0]]), np.array([p[1]]))
    for T in (200, 400):
        end = STANDARD - twice_h_less_ce(literal_theta("cosine", T)[1][sde64(T).last_time])
        errors.append(of_mixture(T, [1.0], [q[0]], [q[1]], data=data) - twice_h_less_ce(0.0) - end)
    assert abs(errors[1]) < 0.08, "the grid's error"
    agree("without the grid's error, which is of first order", 2 * errors[1] - errors[0], 0.0, atol=2e-3)
    assert abs(twice_h_less_ce(0.0) - norm(*q).entropy()) > 0.1, "which is not H(q)"


# ---------------------------------------------------------------------------------------------------------------------
# De Bruijn's identity: the policy loss
# ---------------------------------------------------------------------------------------------------------------------
@settings(max_examples=50)
@given(
    st.fixed_dictionaries(
        dict(
            loss=st.sampled_from(["noise", "posterior"]),
            pessimism=st.sampled_from(["lcb", "min"]),
            num_diffusion_steps=st.integers(2, 30),
            schedule=st.sampled_from(SCHEDULES),
            entropy_coef=st.floats(1e-3, 2),
            eta=st.floats(0, 3),
            B=st.integers(1, 3),
            seed=st.integers(0, 999),
        )
    )
)
def test_debruijn_policy_loss_equals_a_literal_one(choices):
    """L_diff - lambda Q - alpha H-hat / A, from the literal Eq. 15 without an entropy term."""
    p = problem(variant="debruijn", **choices)
    eps_hat, found = p.eps_hat.clone().requires_grad_(), p.loss()
    without = dataclasses.replace(p.args, variant="paper", entropy_coef=0.0)
    expected, _ = literal_policy_loss(without, members_of(p.critics), p.batch, p.noise, p.q_data, eps_hat)
    rows = literal_estimate(p.args.schedule, p.args.num_diffusion_steps, p.noise.t.tolist(), eps_hat)
    expected["entropy"] = sum(rows) / len(rows)
    expected["policy_loss"] -= p.args.entropy_coef * expected["entropy"] / eps_hat.shape[1]
    (slope,) = torch.autograd.grad(expected["policy_loss"], eps_hat)
    for name, reference in expected.items():
        agree(name, found[name], reference, rtol=1e-8, atol=1e-8)
    size = 1e-9 * (1 + float(slope.abs().max()))
    agree("gradient to the predicted noise", p.gradient(), slope, rtol=1e-8, atol=size)


@pytest.mark.parametrize("T, schedule", [(5, "cosine"), (5, "linear"), (8, "vp"), (2, "constant")])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_debruijn_minimiser_without_q_divides_the_exact_noise(T, schedule, alpha):
    """By 1 + alpha T w_t, in each of A = 2 dimensions: where the loss at one x_t, over three actions, has no slope."""
    (prime, bar), sde = literal_theta(schedule, T), sde64(T, schedule)
    eps = torch.tensor([[-0.4, 1.0], [0.3, -0.7], [1.0, 0.6]], dtype=torch.float64)
    x_t, ones = torch.tensor([[0.5, -0.2]]).double().expand(3, 2), torch.ones(1, 3).double()
    args = Args(variant="debruijn", entropy_coef=alpha, eta=0.0, num_diffusion_steps=T, schedule=schedule)

    def slope(t, prediction):
        guess = torch.full((1, 2), prediction, dtype=torch.float64).requires_grad_()
        batch = Batch(eps, sde.predict_x0(x_t, t, eps), ones[0], eps, ones[0])
        noise = Noise(None, torch.full((3,), t), eps, eps, None)
        found = erdp.policy_loss(lambda *_: guess.expand(3, 2), lambda *_, **__: ones, sde, batch, noise, ones, args)
        return torch.autograd.grad(found["policy_loss"], guess)[0]

    for t in range(1, T + 1):
        at_0, at_1 = slope(t, 0.0), slope(t, 1.0)  # of a parabola
        assert (at_1 > at_0).all(), "a minimum: a smaller predicted noise is a larger entropy"
        weight = prime[t] / (1 - math.exp(-2 * bar[t])) if t <= last_used(bar) else 0.0
        expected = eps.mean(0, keepdim=True) / (1 + alpha * T * weight)
        agree(f"the minimiser at t = {t}", at_0 / (at_0 - at_1), expected, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# --q-time
# ---------------------------------------------------------------------------------------------------------------------
ALL = pytest.mark.parametrize("variant", ["paper", "released", "debruijn"])


def timed(variant, t, **choices):
    """A problem without an entropy term whose rows have these diffusion times."""
    p = problem(variant=variant, B=len(t), num_diffusion_steps=5, entropy_coef=0.0, **choices)
    return p._replace(noise=p.noise._replace(t=torch.tensor(t)))


@ALL
@pytest.mark.parametrize("pessimism", ["lcb", "min"])
@pytest.mark.parametrize("q_time, rows", [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])])
def test_q_time_keeps_the_q_term_to_the_rows_up_to_it(variant, pessimism, q_time, rows):
    p = timed(variant, [3, 1, 5, 2, 4], pessimism=pessimism, q_time=q_time)
    q = p.critics(p.batch.state[rows], p.literal_a_0()[rows].clamp(-1, 1))
    value = erdp.pessimistic_value(q, p.args).mean()
    size = q.abs().mean() if variant == "released" else erdp.pessimistic_value(p.q_data, p.args).abs().mean()
    found = p.loss()
    agree("the value", found["lcb"], value)
    agree("the loss", found["policy_loss"], found["diffusion_loss"] - 0.7 * value / size)
    change = p.gradient() - p.gradient(args=dataclasses.replace(p.args, eta=0.0))
    inside = (p.literal_a_0().abs() < 1).any(1)
    assert change.any(1).tolist() == [b in rows and bool(inside[b]) for b in range(5)], "of other rows: no gradient"
    assert inside[rows].any()


@ALL
def test_q_time_none_is_the_last_time(variant):
    p = timed(variant, [3, 1, 5, 2, 4])
    last = dataclasses.replace(p.args, q_time=5)
    assert p.args.q_time is None and torch.equal(p.gradient(), p.gradient(args=last))
    for name, value in p.loss().items():
        assert torch.equal(value, p.loss(args=last)[name]), name


@ALL
@pytest.mark.parametrize("pessimism", ["lcb", "min"])
def test_q_time_before_all_times_of_a_batch_leaves_no_q_term(variant, pessimism):
    p = timed(variant, [3, 5, 4], pessimism=pessimism, q_time=2)
    without, found = dataclasses.replace(p.args, eta=0.0), p.loss()
    assert found["lcb"] == 0 and torch.equal(found["policy_loss"], found["diffusion_loss"])
    assert torch.equal(p.gradient(), p.gradient(args=without)) and p.gradient().isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [["--loss", "likelihood"], ["--env", "hopper-medium-v2"]], ids=" ".join)
def test_debruijn_with_the_likelihood_loss_is_refused(more):
    with pytest.raises(UserError, match="^--loss likelihood .* --variant debruijn.*: give --loss noise or --loss post"):
        erdp.parse(["--variant", "debruijn", *more])
    assert erdp.parse(["--variant", "debruijn", *more, "--loss", "posterior"]).loss == "posterior"


def test_debruijn_has_its_own_alpha_by_default():
    assert erdp.DEBRUIJN_ALPHA == 0.03
    for env in ("toy", "antmaze-umaze-v0"):
        found = [erdp.parse(["--env", env, "--variant", v]).entropy_coef for v in ("paper", "released", "debruijn")]
        assert found == [0.01, 0.01, 0.03]
    assert erdp.parse(["--variant=debruijn", "--entropy-coef", "0.01"]).entropy_coef == 0.01


@pytest.mark.parametrize("q_time", ["0", "-1", "6"])
def test_q_time_must_be_a_diffusion_time(q_time):
    with pytest.raises(UserError, match=f"^--q-time is {q_time} but must be a diffusion time, 1 to 5$"):
        erdp.parse(["--q-time", q_time])
    assert [erdp.parse(["--q-time", word]).q_time for word in ("1", "5", "None")] == [1, 5, None]
