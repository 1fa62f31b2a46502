r"""The paper's equations, the code and its tests on one page, in the paper's order.

    python results/reading.py            # writes reading.md beside this file
    python results/reading.py --index    # prints its table equation -> function -> test

PAGE is the page, but for two things that are put in here. A line `code: NAME` becomes the source of that definition of
erdp.py, a class without the methods that have a place of their own; `code: NAME | FIRST | LAST` becomes the lines of
it from the one that contains FIRST to the one that contains LAST. The line `INDEX` becomes the table, of each heading
its bold words, its code and the tests that it names. In mathematics no backslash stands before punctuation, and no line
looks like a list or a heading, so that Markdown leaves it alone.
"""

import argparse
import ast
import functools
import itertools
import re
import textwrap
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
CODE = RESULTS.parent / "erdp.py"
BANNER = "The paper's mathematics ends here"

PAGE = r"""
# The paper beside the code

Each equation of [the paper](https://arxiv.org/abs/2402.04080), typeset anew: what it says, what the code decides where
the paper leaves it open, the code, and the tests that hold it against something else. Where the paper prints an
equation differently, that is said below it; only its `:=` is `=` throughout. "The released code" is what the paper's
authors published. Eq. 9 and 11 are named where they belong; Eq. 18 to 27, 29 and 31 to 39 repeat or prove the others,
and have no code of their own.

The source is taken from [`erdp.py`](../erdp.py) by [`reading.py`](reading.py). The tests are in
[`test_erdp.py`](../test_erdp.py); to run one, type `pytest -k NAME`.

## Names

| in the code | in the paper |
| --- | --- |
| `x_0`, `x_t`, `x_tau`, `x_T` | $`\boldsymbol{x}_0, \boldsymbol{x}_t, \boldsymbol{x}_\tau, \boldsymbol{x}_T`$ |
| `theta_bar[t]` | $`\bar{\theta}_t = \bar{\theta}_{0:t}`$, the integral of $`\theta`$ from 0 to $`t`$ |
| `between(tau, t)`, `between(t - 1, t)` | $`\bar{\theta}_{\tau:t}`$, $`\theta'_t`$ |
| `decay(tau, t)`, `var(tau, t)` | $`e^{-\bar{\theta}_{\tau:t}}`$, $`1 - e^{-2\bar{\theta}_{\tau:t}}`$ |
| `eps`, `eps_hat` | $`\boldsymbol{\epsilon}_t, \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t)`$, with the state |
| `policy`, `policy_ema` | the networks $`\boldsymbol{\epsilon}_\phi`$ of $`\pi_\phi`$ and $`\pi_{\bar{\phi}}`$ |
| `critics`, `critics_target` | all $`Q_{\psi^m}`$ and all $`Q_{\bar{\psi}^m}`$, $`m = 1, \dots, M`$ |
| `state`, `action`, `reward`, `next_state` | $`\boldsymbol{s}_i, \boldsymbol{a}_i, r_i, \boldsymbol{s}_{i+1}`$ |
| `a_0`, `a_1`, `a_T` | $`\hat{\boldsymbol{a}}_i^0, \hat{\boldsymbol{a}}_i^1, \boldsymbol{a}_i^T`$ |
| `lambda_`, `args.eta`, `args.entropy_coef` | $`\lambda, \eta, \alpha`$ |
| `args.discount`, `args.lcb_coef` | $`\gamma, \beta`$ |
| `args.target_rate`, `args.ema_rate` | the $`\eta`$ of Algorithm 1, for $`\bar{\psi}`$ and for $`\bar{\phi}`$ |

In shapes B is the batch, N any number of states, C the candidates for one state, M the critics, T the diffusion steps;
A, S and H are the sizes of an action, of a state and of a hidden layer.

## Index

INDEX

## Section 2: the mean-reverting SDE

### Eq. 1

**The SDE.**

$$
\mathrm{d}\boldsymbol{x} = -\theta_t \boldsymbol{x} \thinspace \mathrm{d}t +
\sigma_t \thinspace \mathrm{d}\boldsymbol{w}, \quad \boldsymbol{x}_0 \sim p_0(\boldsymbol{x}), \quad
\sigma_t^2 = 2 \theta_t
$$

An action is drawn towards 0 while noise is added, until nothing but a standard Gaussian is left. The paper prints
$`\sigma_t^2 = 2 \theta_t`$ in the text after the equation, and does not say what $`\theta_t`$ is. As in the released
code it is a cosine schedule, of which only the integrals over the T steps are ever needed. Every schedule is scaled so
that $`\bar{\theta}_T = -\ln 0.001`$: a thousandth of $`\boldsymbol{x}_0`$ is left at the end.

code: cosine
code: SCHEDULES
code: MeanRevertingSDE

- `test_eq01_theta_has_its_schedules_formula_and_its_integral` holds the integrals against each schedule's formula,
  summed term by term.
- `test_sde_coefficients_are_computed_in_float64_and_rounded` holds every coefficient in float32 against float64.

### Eq. 2

**The transition from an earlier to a later time.**

$$
p(\boldsymbol{x}_t \mid \boldsymbol{x}_\tau) = \mathcal{N}\left(\boldsymbol{x}_t \mid
\boldsymbol{x}_\tau e^{-\bar{\theta}_{\tau:t}}, (1 - e^{-2\bar{\theta}_{\tau:t}}) \boldsymbol{I}\right),
\quad \bar{\theta}_{\tau:t} = \int_\tau^t \theta_z \thinspace \mathrm{d}z, \quad \tau \lt t
$$

This is the SDE's exact solution, and everything below is made of it. The variance is computed by `expm1`, which keeps
its digits where the step is short. Densities are summed over an action's components.

code: MeanRevertingSDE.between
code: MeanRevertingSDE.decay
code: MeanRevertingSDE.var
code: MeanRevertingSDE.transition
code: MeanRevertingSDE.log_prob

- `test_eq02_has_the_moments_and_the_law_of_simulated_paths_of_eq01` holds it against simulated paths of Eq. 1.
- `test_eq02_transitions_from_0_to_tau_to_t_compose_by_chapman_and_kolmogorov` holds two transitions in a row against
  one over both spans.
- `test_eq02_log_density_is_scipys` holds the log-density against SciPy's.

### Eq. 3

**The SDE in reverse.**

$$
\mathrm{d}\boldsymbol{x} = \left[-\theta_t \boldsymbol{x} - \sigma_t^2 \nabla_{\boldsymbol{x}} \log p_t(\boldsymbol{x})
\right] \mathrm{d}t + \sigma_t \thinspace \mathrm{d}\bar{\boldsymbol{w}}, \quad
\boldsymbol{x}_T \sim \mathcal{N}(0, \boldsymbol{I})
$$

Time runs backwards from T to 0, and the score leads noise back to data. One Euler-Maruyama step of it is

$$
\boldsymbol{x}_{t-1} = \boldsymbol{x}_t + \theta'_t \boldsymbol{x}_t +
2 \theta'_t \nabla_{\boldsymbol{x}} \log p_t(\boldsymbol{x}_t) + \sqrt{2 \theta'_t} \thinspace \boldsymbol{z}, \quad
\boldsymbol{z} \sim \mathcal{N}(0, \boldsymbol{I})
$$

Only the likelihood loss of [Table 4](#table-4) and Figure 2 take such steps: actions are sampled by
[Eq. 10](#eq-10).

code: MeanRevertingSDE.reverse_sde_step

- `test_eq03_one_step_keeps_the_sdes_own_law_to_second_order_in_the_step` holds the law after a step, with the exact
  score of Gaussian data, against that of Eq. 1: half the step has a quarter of the error.

### Eq. 4

**A noised action at any time.**

$$
\boldsymbol{x}_t = \boldsymbol{x}_0 e^{-\bar{\theta}_t} +
\sqrt{1 - e^{-2\bar{\theta}_t}} \cdot \boldsymbol{\epsilon}_t,
\quad \boldsymbol{\epsilon}_t \sim \mathcal{N}(0, \boldsymbol{I})
$$

This is Eq. 2 from time 0, written as a function of standard Gaussian noise.

code: MeanRevertingSDE.diffuse

- `test_eq04_is_the_mean_of_eq02_and_its_deviation_times_the_noise` holds it against the mean and deviation of Eq. 2,
  from the schedule's formula.

### Eq. 5

**The noise matching loss.**

$$
L_{\mathrm{diff}}(\phi) = \mathbb{E}_t \left[ \left\lVert \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t) -
\boldsymbol{\epsilon}_t \right\rVert^2 \right]
$$

The network learns to predict the noise in a noised action. The paper prints the norm without its square, with a
bracket too many, and t from [0, T]; as in the released code the error is squared and t uniform on 1..T, as there is no
noise at 0. The square is a mean over the components of an action, not their sum, so that the same $`\eta`$ and
$`\alpha`$ weigh A times as much against it.

code: noise_loss

- `test_eq05_is_the_mean_squared_error_of_the_noise_and_the_other_losses_are_of_means_of_eq07` holds it against a second
  one, written from the paper.

## Section 3.1: optimal sampling

### Eq. 6

**The posterior of the step before.**

$$
p(\boldsymbol{x}_{t-1} \mid \boldsymbol{x}_t, \boldsymbol{x}_0) = \mathcal{N}\left(\boldsymbol{x}_{t-1} \mid
\tilde{\mu}_t(\boldsymbol{x}_t, \boldsymbol{x}_0), \tilde{\beta}_t \boldsymbol{I}\right)
$$

Given where a path began and where it is, the state one step before is Gaussian, however long the step (Proposition
3.1). The appendix prints it again as Eq. 32, with $`\hat{\beta}_t`$ for $`\tilde{\beta}_t`$. The sampler draws from it
so:

code: sample_actions | # Eq. 7 | # Eq. 6

- `test_eq06_and_eq07_are_the_law_of_simulated_states_before_x_t_and_after_x_0` holds it against simulated paths of
  Eq. 1.

### Eq. 7

**The mean and variance of the posterior.**

$$
\tilde{\mu}_t(\boldsymbol{x}_t, \boldsymbol{x}_0) =
\frac{1 - e^{-2\bar{\theta}_{t-1}}}{1 - e^{-2\bar{\theta}_t}} e^{-\theta'_t} \boldsymbol{x}_t +
\frac{1 - e^{-2\theta'_t}}{1 - e^{-2\bar{\theta}_t}} e^{-\bar{\theta}_{t-1}} \boldsymbol{x}_0
$$

$$
\tilde{\beta}_t = \frac{(1 - e^{-2\bar{\theta}_{t-1}})(1 - e^{-2\theta'_t})}{1 - e^{-2\bar{\theta}_t}}, \quad
\theta'_i = \int_{i-1}^{i} \theta_t \thinspace \mathrm{d}t
$$

The mean lies between the present state and the beginning. At t = 1 it is $`\boldsymbol{x}_0`$ and the variance is 0.
The appendix prints it again as Eq. 33, with $`\theta_t`$ for $`\theta'_t`$ in the mean, and as Eq. 36, which is right.

code: MeanRevertingSDE.posterior

- `test_eq07_posterior_is_bayes_rule` holds it against Bayes' rule, Eq. 34, on SciPy's densities.
- `test_eq07_last_step_returns_x_0_without_noise` holds the step at t = 1 against $`\boldsymbol{x}_0`$, to the bit.

### Eq. 8

**The clean action that a predicted noise implies.**

$$
\hat{\boldsymbol{x}}_0 = e^{\bar{\theta}_t} \left(\boldsymbol{x}_t -
\sqrt{1 - e^{-2\bar{\theta}_t}} \thinspace \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t)\right)
$$

This is Eq. 4 solved for $`\boldsymbol{x}_0`$. An error of the predicted noise comes out
$`\sqrt{e^{2\bar{\theta}_t} - 1}`$ times as large: with the default schedule 0.70 times at t = 1, 1,000 times at t = 5.
Table 4's action clip sets a bound to it.

code: MeanRevertingSDE.predict_x0

- `test_eq08_inverts_eq04` holds it against the $`\boldsymbol{x}_0`$ that Eq. 4 noised.

### Eq. 10

**Sampling an action in T steps.**

$$
p_\phi(\boldsymbol{x}_{0:T}) = p(\boldsymbol{x}_T) \prod_{t=1}^{T} p_\phi(\boldsymbol{x}_{t-1} \mid \boldsymbol{x}_t),
\quad p(\boldsymbol{x}_T) = \mathcal{N}(0, \boldsymbol{I})
$$

Each factor is Eq. 6 with the $`\hat{\boldsymbol{x}}_0`$ of Eq. 8 in place of $`\boldsymbol{x}_0`$, and the last
$`\boldsymbol{x}_0`$ is the action (Eq. 9). The paper prints the product over i. Table 4's action clip is taken to
clamp $`\hat{\boldsymbol{x}}_0`$ in each step, but not $`\boldsymbol{x}_t`$; a finished action is always clamped.

code: sample_actions

- `test_eq10_sampler_follows_eq08_eq07_and_eq06_step_by_step` holds it against a second one, written from the paper.
- `test_eq10_samples_approach_a_mixture_as_the_steps_grow` holds its samples, with the exact noise of a mixture of
  Gaussians, against that mixture.
- `test_figure2_optimal_sampling_reconstructs_x_0_exactly_at_every_t` holds its result with the true noise against
  $`\boldsymbol{x}_0`$.

## Section 3.2: the policy with entropy regularization

### Eq. 12

**The policy's objective.**

$$
J_\pi(\phi) = L_{\mathrm{diff}}(\phi) -
\lambda \thinspace \mathbb{E}_{\boldsymbol{s}_i \sim \mathcal{D}, \boldsymbol{a}_i^0 \sim \pi_\phi} \left[
Q_\psi(\boldsymbol{s}_i, \boldsymbol{a}_i^0) - \alpha \log \pi_\phi(\boldsymbol{a}_i^0 \mid \boldsymbol{s}_i) \right],
\quad \lambda = \frac{\eta}{\mathbb{E}_{(\boldsymbol{s}, \boldsymbol{a}) \sim \mathcal{D}}
\left[ \lvert Q_\psi(\boldsymbol{s}, \boldsymbol{a}) \rvert \right]}
$$

The policy imitates the data, prefers actions of high value, and is paid for its entropy
$`\mathcal{H} = \mathbb{E}_{\boldsymbol{s}_i \sim \mathcal{D}}[-\log \pi_\phi(\cdot \mid \boldsymbol{s}_i)]`$,
while $`\lambda`$ takes out the scale of Q. Eq. 11 is the same with $`\lambda = 1`$ and $`\alpha = 0`$.

The action that Q sees is no sample: it is Eq. 8 of the noised data action, which is the paper's own shortcut. The code
clamps it to the bounds, without gradient outside them. It takes $`\lambda`$ for a constant, from the batch's
pessimistic values (Eq. 17) before this step's update of Q. By default Q sees the actions of all diffusion times, with
`--q-time` only those up to a time.

code: policy_loss | q = critics | lambda_ =

- `test_eq12_q_terms_gradient_does_not_change_with_the_scale_of_q` holds the gradient with Q in other units against
  the gradient as it is.
- `test_eq12_alpha_zero_removes_the_entropy_term_exactly` holds $`\alpha = 0`$ against a loss without that term.

### Eq. 13

**The entropy, one step earlier.**

$$
-\log \pi_\phi(\boldsymbol{a}_i^0 \mid \boldsymbol{s}_i) =
-\log \pi_\phi(\boldsymbol{a}_i^1 \mid \boldsymbol{s}_i) + \mathcal{C}
$$

The last step of the sampler adds no noise, so that $`\boldsymbol{a}_i^0`$ is a function of $`\boldsymbol{a}_i^1`$ and
$`\mathcal{C}`$ the logarithm of that function's volume change: a constant for a Gaussian policy, but not for a mixture.
The code leaves it out. How $`\hat{\boldsymbol{a}}_i^1`$ is computed is open: Section 3.2 says by Eq. 2, Algorithm 1
by Eq. 8. We take Eq. 4 at t = 1, of $`\hat{\boldsymbol{a}}_i^0`$ and the predicted noise, the only reading of Eq. 2
with which the term has more than a vanishing gradient. `--variant released` does as the released code, which takes an
Euler step of the drift and then exchanges the earlier and the later state in each density, at times 1, 2 and T.

code: policy_log_prob

- `test_eq13_holds_with_a_constant_for_a_gaussian_policy` holds both densities, from the sampler's closed form, against
  each other.
- `test_eq13_does_not_hold_for_a_mixture` shows that it does not hold for the sampler of a mixture.

### Eq. 14

**The conditional density, by Bayes' rule.**

$$
p_\phi(\boldsymbol{a}_i^1 \mid \boldsymbol{a}_i^T, \boldsymbol{s}_i) =
\frac{p_\phi(\boldsymbol{a}_i^T \mid \boldsymbol{a}_i^1, \boldsymbol{s}_i) \thinspace
p_\phi(\boldsymbol{a}_i^1 \mid \boldsymbol{a}_i^0, \boldsymbol{s}_i)}
{p_\phi(\boldsymbol{a}_i^T \mid \boldsymbol{a}_i^0, \boldsymbol{s}_i)}
$$

All three densities on the right are those of Eq. 2. The left side depends on $`\boldsymbol{a}_i^0`$ as well, which the
paper does not print. As $`\boldsymbol{a}_i^T`$ we take fresh standard Gaussian noise.

code: MeanRevertingSDE.log_prob_x1

- `test_eq14_is_the_joint_gaussians_conditional_density` holds it against SciPy's joint density of both states.

### Eq. 15

**The policy's objective as it is computed.**

$$
J_\pi(\phi) = L_{\mathrm{diff}}(\phi) -
\lambda \thinspace \mathbb{E}_{(\hat{\boldsymbol{a}}_i^0, \hat{\boldsymbol{a}}_i^1) \sim \pi_\phi} \left[
Q_\psi(\boldsymbol{s}_i, \hat{\boldsymbol{a}}_i^0) -
\alpha \log p_\phi(\hat{\boldsymbol{a}}_i^1 \mid \boldsymbol{a}_i^T, \boldsymbol{s}_i) \right]
$$

The paper prints $`p`$ without its $`\phi`$, $`\boldsymbol{a}_t^T`$ for $`\boldsymbol{a}_i^T`$, and a bracket too
many. $`Q_\psi`$ is the pessimistic value of Eq. 17. `VARIANTS` says what is taken for the entropy and what its weight
is: the released code divides the term by its own size, outside the bracket that $`\lambda`$ multiplies.

code: VARIANTS
code: policy_loss

- `test_eq15_policy_loss_and_its_gradient_equal_literal_ones` holds value and gradient, for all variants and losses,
  against a second one, written term by term.
- `test_eq15_gradient_equals_finite_differences` holds the gradient against finite differences of the loss.
- `test_eq15_gradients_flow_into_the_policy_alone` sees that no gradient reaches the weights of Q, or passes by
  $`\lambda`$.

## Section 3.3: pessimistic evaluation

### Eq. 16

**Each critic's own target.**

$$
J_Q(\psi^m) = \mathbb{E}_{(\boldsymbol{s}_i, \boldsymbol{a}_i, r_i, \boldsymbol{s}_{i+1}) \sim \mathcal{D}}
\left[ \left( Q_{\psi^m}(\boldsymbol{s}_i, \boldsymbol{a}_i) - y^m \right)^2 \right]
$$

$$
y^m = r_i + \gamma (1 - d_i) \thinspace \mathbb{E}_{\boldsymbol{a}_{i+1} \sim \pi_{\bar{\phi}}} \left[
Q_{\bar{\psi}^m}(\boldsymbol{s}_{i+1}, \boldsymbol{a}_{i+1}) \right]
$$

Every member learns from its own target network, so that the members stay independent. The paper prints no square,
$`\psi^i`$ for $`\psi^m`$, $`\pi_\phi`$ where Algorithm 1 has $`\pi_{\bar{\phi}}`$, and the arguments of $`y^m`$,
which are left out here. It does not print $`d_i`$, which is 1 where the episode ended for good.

The expectation is one sample or, with Table 4's max Q-backup, the best of 10, for each member on its own. The loss is a
mean over the members too. With `--pessimism min` they share one target, as in clipped double Q.

code: critic_loss

- `test_eq16_equals_loops_over_members_transitions_and_candidates` holds it against loops over all of them.
- `test_eq16_leaves_the_target_networks_and_the_next_actions_without_gradient` sees that no gradient reaches the target.

### Eq. 17

**The lower confidence bound.**

$$
Q_\psi^{\mathrm{LCB}}(\boldsymbol{s}, \boldsymbol{a}) =
\mathbb{E}_{\mathrm{ens}} \left[ Q_{\psi^m}(\boldsymbol{s}, \boldsymbol{a}) \right] -
\beta \sqrt{\mathbb{V}_{\mathrm{ens}} \left[ Q_{\psi^m}(\boldsymbol{s}, \boldsymbol{a}) \right]}
$$

Where the members disagree the value is lowered. The paper prints the left side without its arguments and the root in
brackets. It does not say how the variance is estimated: the code divides by M, and with `--variant released` by M - 1.
One member alone has no deviation, and where all agree the gradient of the deviation is taken as 0.

code: lcb
code: minimum
code: PESSIMISM
code: pessimistic_value

- `test_eq17_is_the_mean_less_beta_deviations` holds it, and the minimum, against NumPy's.
- `test_eq17_has_the_means_gradient_where_members_agree` holds the gradient against the mean's where members agree, and
  against finite differences elsewhere.

### Algorithm 1

**One update, line by line.**

*The beginning*: networks for $`\pi_\phi`$ and $`Q_{\psi^m}`$, $`m = 1, \dots, M`$. Those of $`\pi_{\bar{\phi}}`$ and
$`Q_{\bar{\psi}^m}`$ begin as copies.

code: Agent

*A batch* $`(\boldsymbol{s}_i, \boldsymbol{a}_i, r_i, \boldsymbol{s}_{i+1})`$ from $`\mathcal{D}`$: the program draws
it, and with it all that is random in an update, so that an update is a function of its arguments.

code: Batch
code: Noise
code: update | def update | args, sde =

*The next actions* $`\boldsymbol{a}_{i+1}^0 \sim \pi_{\bar{\phi}}(\cdot \mid \boldsymbol{s}_{i+1})`$, by Eq. 6 and 8.
The paper prints $`\boldsymbol{s}_i`$ for $`\boldsymbol{s}_{i+1}`$, and $`\boldsymbol{a}_{i+1}`$ for the dot.

code: update | # Ensemble-Q learning | next_action =

*The critics* take a step on Eq. 16. The gradient of the whole ensemble is clipped as one vector, at Table 4's norm.

code: update | critic = | optimizer_step(critic
code: optimizer_step

*Noised actions* $`\boldsymbol{a}_i^t`$ come from $`\boldsymbol{a}_i`$ by Eq. 4, one time t for each row. The noise that
the policy predicts in them gives $`\hat{\boldsymbol{a}}_i^0`$, by Eq. 8, and $`\hat{\boldsymbol{a}}_i^1`$, as said at
[Eq. 13](#eq-13). The paper prints both without their hats.

code: policy_loss | x_t = | a_0 =

*The policy* takes a step on Eq. 15, with the Q of Eq. 17 that this update has changed already.

code: update | # Diffusion policy learning | optimizer_step(policy

*The targets* follow: $`\bar{\phi} \leftarrow \eta \phi + (1 - \eta) \bar{\phi}`$ and
$`\bar{\psi}^m \leftarrow \eta \psi^m + (1 - \eta) \bar{\psi}^m`$. This $`\eta`$, 0.005, is not that of Eq. 12. The
paper moves both in every iteration; as in the released code $`\bar{\phi}`$ moves every 5 updates, from update 1,000 on.

code: update | # Target networks | agent.updates +=
code: soft_update

*The end*: what was measured goes to the program.

code: METRICS
code: update | measured = | return

- `test_algorithm1_updates_equal_literal_ones` holds weights, optimisers and metrics after each update against a second
  Algorithm 1, written from the paper in loops.
- `test_algorithm1_moves_the_ema_policy_at_multiples_of_ema_every_from_ema_start_on` holds the updates that move
  $`\bar{\phi}`$ against those of the released code.
- `test_algorithm1_agent_has_the_papers_networks_and_optimisers` holds a new agent against Section 4.1 and Table 4.
- `test_algorithm1_draws_times_and_gaussians_of_their_laws` holds what is random against its laws.
- `test_algorithm1_critics_on_the_toy_are_its_q_by_dynamic_programming` holds what the critics learn on the toy against
  the Q of its own policy.
- `test_algorithm1_on_the_toy_ends_above_the_data_and_above_cloning` holds what the policy learns there against
  both; with the sign of Q turned it ends below the data.

## Section 4.1: the experiments

### Settings

**The hyperparameters.**

$$
M = 64, \quad \beta = 4, \quad \alpha = 0.01, \quad T = 5
$$

These hold for every task. Each setting below is a flag of the program. What the paper does not say is taken from the
released code: the discount, the learning rate of the critics, the rates of the targets, and when the average moves.

code: Start
code: Args

- `test_table_4_defaults_in_signatures_are_the_papers` holds the defaults against Section 4.1.

### Networks

**Three hidden layers of 256 units, with Mish.**

$$
\mathrm{Mish}(x) = x \tanh \left( \ln(1 + e^x) \right)
$$

That much the paper says. The embedding of the time t, 16 sines and cosines of t - 1 and two layers, and the
initialisation are the released code's. The ensemble is computed in products over all members at once.

code: NoiseNetwork
code: QEnsemble

- `test_noise_network_equals_a_literal_one_over_any_leading_axes` holds it against one that is written row by row.
- `test_noise_network_has_the_papers_sizes_and_pytorchs_initialisation` holds its weights against their laws.
- `test_ensemble_equals_separate_networks_over_any_leading_axes` holds values and gradients against single networks.
- `test_ensemble_has_the_papers_sizes_and_the_released_initialisation` holds its weights against their laws.

### Acting

**One of many samples, drawn by its value.**

$$
P(\boldsymbol{a} = \boldsymbol{a}^{(c)}) =
\frac{\exp Q_{\bar{\psi}}^{\mathrm{LCB}}(\boldsymbol{s}, \boldsymbol{a}^{(c)})}
{\sum_{c'=1}^{C} \exp Q_{\bar{\psi}}^{\mathrm{LCB}}(\boldsymbol{s}, \boldsymbol{a}^{(c')})},
\quad \boldsymbol{a}^{(1)}, \dots, \boldsymbol{a}^{(C)} \sim \pi_\phi(\cdot \mid \boldsymbol{s})
$$

Section 4.1 says how many episodes are played, but the paper never says how the policy acts in them. The released code
draws C = 50 actions from the policy itself, not from its average, and one of them by softmax over the lower
confidence bound of the *target* ensemble. So does the program, which passes `critics_target` here as `critics`.

code: choose_action
code: act

- `test_acting_is_by_softmax_over_the_candidates_values` holds the shares of four candidates against SciPy's
  softmax of their values.
- `test_acting_takes_at_any_u_the_first_candidate_whose_cumulative_share_exceeds_it` holds the choice at the
  edges of the shares against their sums.
- `test_actor_draws_a_candidate_by_softmax_over_its_pessimistic_value` holds the same for all of the way from states to
  actions, with Eq. 17 by NumPy.
- `test_actors_samples_are_those_of_eq10_by_the_policy_clipped_as_in_training` holds a single sample against the second
  sampler of Eq. 10.

## Appendix A.1: the score

### Eq. 28

**The score of a noised action.**

$$
\nabla_{\boldsymbol{x}_t} \log p(\boldsymbol{x}_t \mid \boldsymbol{x}_0) =
-\frac{\boldsymbol{x}_t - \boldsymbol{x}_0 e^{-\bar{\theta}_t}}{1 - e^{-2\bar{\theta}_t}}
$$

It is the gradient of Eq. 2's log-density. The paper prints
$`\nabla_{\boldsymbol{x}} \log p_t(\boldsymbol{x} \mid \boldsymbol{x}_0)`$ on the left, for the same.

code: MeanRevertingSDE.score

- `test_eq28_score_is_the_gradient_of_scipys_log_density` holds it against the slope of SciPy's log-density.

### Eq. 30

**The score, from the noise.**

$$
\nabla_{\boldsymbol{x}_t} \log p(\boldsymbol{x}_t \mid \boldsymbol{x}_0) =
-\frac{\boldsymbol{\epsilon}_t}{\sqrt{1 - e^{-2\bar{\theta}_t}}}
$$

So a network that predicts the noise predicts the score as well, and the likelihood loss uses it for that. The paper
prints the left side as in Eq. 28, without its closing bracket.

code: likelihood_loss | # Eq. 30 | # Eq. 30

- `test_eq30_score_of_a_diffused_state_is_minus_its_noise_over_its_deviation` holds it against Eq. 28.

## Appendix A.3: the optimal reverse path

### Eq. 40

**The most likely state before.**

$$
\boldsymbol{x}_{t-1}^{\ast} = \arg\min_{\boldsymbol{x}_{t-1}} \left[
-\log p(\boldsymbol{x}_{t-1} \mid \boldsymbol{x}_t, \boldsymbol{x}_0) \right] =
\frac{1 - e^{-2\bar{\theta}_{t-1}}}{1 - e^{-2\bar{\theta}_t}} e^{-\theta'_t} \boldsymbol{x}_t +
\frac{1 - e^{-2\theta'_t}}{1 - e^{-2\bar{\theta}_t}} e^{-\bar{\theta}_{t-1}} \boldsymbol{x}_0
$$

The problem is the paper's Eq. 37, its solution Eq. 40. It is the mean of Eq. 7, so that the code has no second function
for it. On the way Eq. 38 and 39 print i for t in places, and the last line of Eq. 39 two denominators wrongly: the
first is $`(1 - e^{-2\theta'_t})(1 - e^{-2\bar{\theta}_{t-1}})`$, the second $`1 - e^{-2\theta'_t}`$.

code: likelihood_loss | # Eq. 40 | # Eq. 40

- `test_eq38_posterior_mean_is_the_optimal_reverse_path` holds the mean against the minimum of Eq. 37, whose cost is
  made of SciPy's densities.

## Appendix B.1: the loss types

### Table 4

**The noise and the likelihood loss.**

$$
L_{\mathrm{noise}}(\phi) = \mathbb{E}_t \left[ \left\lVert \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t) -
\boldsymbol{\epsilon}_t \right\rVert^2 \right]
$$

$$
L_{\mathrm{likelihood}}(\phi) = \mathbb{E}_t \left[ \left\lVert (1 + \theta'_t) \boldsymbol{x}_t -
\frac{2 \theta'_t}{\sqrt{1 - e^{-2\bar{\theta}_t}}} \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t) -
\boldsymbol{x}_{t-1}^{\ast} \right\rVert^2 \right]
$$

$$
L_{\mathrm{posterior}}(\phi) = \mathbb{E}_t \left[ \left\lVert \tilde{\mu}_t(\boldsymbol{x}_t, \hat{\boldsymbol{x}}_0) -
\boldsymbol{x}_{t-1}^{\ast} \right\rVert^2 \right]
$$

The paper names the first two, but prints only the first, as Eq. 5. The likelihood loss is that of IR-SDE, which it
cites: a step of Eq. 3 without its noise is to end in Eq. 40. As that is not the mean of Eq. 7, the true noise does not
minimise it at T = 5 ([likelihood.md](likelihood.md)). The third loss is not in the paper: it compares Eq. 7 of the
predicted action with Eq. 7 of the true one, and the true noise does minimise it. `DOMAINS` has the lines of Table 4,
where they differ from the defaults.

code: likelihood_loss
code: posterior_loss
code: LOSSES
code: DOMAINS

- `test_eq05_is_the_mean_squared_error_of_the_noise_and_the_other_losses_are_of_means_of_eq07` holds each of the three
  against a second one, written term by term.
- `test_eq40_posterior_loss_has_the_true_noise_as_its_minimiser` holds the third against a weighted error of the noise.
- `test_table_4_is_the_preset_of_every_row` holds every row's settings against the paper's tables.

## Not in the paper

### De Bruijn's identity

**An entropy that grows with the entropy.**

$$
\frac{\mathrm{d}}{\mathrm{d}\bar{\theta}_t} \mathcal{H}(\boldsymbol{x}_t) =
\mathbb{E} \left[ \left\lVert \nabla_{\boldsymbol{x}_t} \log p_t(\boldsymbol{x}_t) \right\rVert^2 \right] - A
$$

$$
\hat{\mathcal{H}} = \frac{A}{2} \log(2 \pi e) - \sum_{t=1}^{T} w_t \thinspace \mathbb{E} \left[
\left\lVert \boldsymbol{\epsilon}_\phi(\boldsymbol{x}_t, t) \right\rVert^2 - (1 - e^{-2\bar{\theta}_t}) A \right],
\quad w_t = \frac{\theta'_t}{1 - e^{-2\bar{\theta}_t}}
$$

The paper's term, Eq. 13 to 15, ranks Gaussian policies in the reverse order of their entropies
([entropy.md](entropy.md)). `--variant debruijn` puts this one in its place. The first line says how the entropy changes
along Eq. 1; the second adds the changes up, back from the Gaussian at the end, with the score from the predicted noise.
At late times, where $`\boldsymbol{x}_t`$ is all but Gaussian whatever the policy is, $`w_t`$ is set to 0. The
expectation is over noised data actions, so that the term also pulls a policy back to the data.

code: DEBRUIJN_ALPHA
code: GAUSSIAN_WITHIN
code: entropy_weights
code: entropy_estimate

- `test_debruijn_estimate_of_a_mixture_approaches_its_entropy_at_first_order` holds it on ever finer grids against the
  entropy of a mixture, by quadrature.
- `test_debruijn_estimate_of_a_policy_away_from_the_data_is_twice_h_less_the_cross_entropy` holds it, for Gaussians,
  against what it is where the policy has left the data.
- `test_debruijn_minimiser_without_q_divides_the_noise` holds the minimum of the loss without Q against a closed form.
- `test_debruijn_sum_ends_where_x_t_is_gaussian_to_within_a_hundredth_nat` holds the last time used against SciPy's
  entropies.
"""


@functools.cache
def definitions(source: str) -> dict[str, range]:
    """The lines, from 0, of every function, class, method and constant, with the comments right above it."""
    lines, found = source.splitlines(), {}

    def add(name, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while re.match("# (?![=#])", lines[first - 1]):
            first -= 1
        found[name] = range(first, node.end_lineno)

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            add(node.name, node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    add(f"{node.name}.{method.name}", method)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            add(node.targets[0].id, node)
    return found


def codes(text: str) -> list[str]:
    return re.findall("^code: (.+)$", text, re.M)


def tests(text: str) -> list[str]:
    return re.findall(r"`(test_\w+)`", text)


def parts() -> dict[str, str]:
    """What stands below each heading that has code and tests: each equation, Algorithm 1, and so on."""
    return dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))


def lines_of(spec: str, source: str) -> list[int]:
    """The lines, from 0, that a `code:` line of PAGE stands for. Raises ValueError where erdp.py does not have them."""
    (name, *marks), lines, found = spec.split(" | "), source.splitlines(), definitions(source)
    if name not in found:
        raise ValueError(f"erdp.py has no {name}, which results/reading.py shows: change its PAGE")
    elsewhere = {n for other in codes(PAGE) if other.startswith(f"{name}.") for n in found.get(other, ())}
    shown = [n for n in found[name] if n not in elsewhere]
    if not marks:
        return shown
    ends = [[n for n in shown if mark in lines[n]] for mark in marks]
    if any(len(end) != 1 for end in ends):
        raise ValueError(f"{name} of erdp.py has not one line for each of {marks}: change PAGE in results/reading.py")
    (first,), (last,) = ends
    return list(range(first, last + 1))


def excerpt(specs: list[str], source: str) -> str:
    """Lines `code:` of PAGE as one block of code, below its names."""
    lines, blocks = source.splitlines(), []
    for spec in specs:
        block = textwrap.dedent("\n".join(lines[n] for n in lines_of(spec, source))).strip()
        blocks.append(re.sub(r"\n{3,}", "\n\n", block))
    names = ", ".join(f"`{spec.split(' | ')[0]}`" for spec in specs)
    space = "\n\n\n" if any("\n\n" in block for block in blocks) else "\n\n"
    return f"{'In ' * (' | ' in specs[0])}{names}:\n\n```python\n{space.join(blocks)}\n```\n"


def markdown(source: str) -> str:
    """The page, with the code of `source`: whole definitions that follow each other are one block."""

    def blocks(match):
        groups = itertools.groupby(codes(match[0]), key=lambda spec: spec if " | " in spec else "")
        return "\n".join(excerpt(list(specs), source) for _, specs in groups)

    return re.sub("(^code: .+\n)+", blocks, PAGE.lstrip(), flags=re.M).replace("\nINDEX\n", f"\n{index()}\n")


def index(page: str = "") -> str:
    """The table equation -> function -> test, with links to `page`."""
    rows = ["| paper | in `erdp.py` | in `test_erdp.py` |", "| --- | --- | --- |"]
    for heading, text in parts().items():
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        words = re.search(r"^\*\*(.+)\.\*\*$", text, re.M)[1]
        names = (spec.split(" | ")[0].replace("MeanRevertingSDE.", ".") for spec in codes(text))
        columns = ("<br>".join(f"`{name}`" for name in dict.fromkeys(column)) for column in (names, tests(text)))
        rows.append(f"| [{heading}]({page}#{anchor}): {words} | {' | '.join(columns)} |")
    return "\n".join(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes reading.md: the paper's equations, the code and its tests.")
    parser.add_argument("--index", action="store_true", help="print the table equation -> function -> test instead")
    if parser.parse_args(argv).index:
        print(index("results/reading.md"))
    else:
        (RESULTS / "reading.md").write_text(markdown(CODE.read_text()))


if __name__ == "__main__":
    main()
