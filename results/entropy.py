"""The entropy term of Eq. 15: what it follows, what it does to a policy, its gradient; and one that measures entropy.

    python results/entropy.py                                       # writes entropy.png and entropy.md beside this file
    python results/entropy.py --checkpoint runs/NAME/checkpoint.pt  # (c) for that run, on its data: entropy-trained.md
    python results/entropy.py --toy                                 # small runs over alpha: entropy-toy.md
    python results/entropy.py --out FOLDER

(a) The estimate, as `erdp.policy_loss` computes it, beside the entropy that it stands for, where both the distribution
and its noise E(eps | x_t) are known exactly. (b) Small policies trained with the term and without Q. (c) The gradient
of each term of Eq. 15. (d) The term by de Bruijn's identity: its estimate on finer grids, and what alpha does.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats
import torch
from figure1 import toy_groups
from known_noise import closed_form_deviation, gaussian, optimal, predictor, quantiles
from pages import start, table
from runs import RECORDS, group_runs, read_records, without_home

import erdp

VARIANTS = "paper", "released", "debruijn"
MODE_WIDTH = 0.1
GAUSSIANS = {f"Gaussian, deviation {width:g}": ([0.0], width) for width in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)}
MIXTURES = {f"modes at ±{mode:g}": ([-mode, mode], MODE_WIDTH) for mode in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)}
MOVED = {f"Gaussian, deviation {MODE_WIDTH}, moved to {mean:g}": ([mean], MODE_WIDTH) for mean in (0.2, 0.4, 0.6, 0.8)}
ROWS = 100_000  # samples of (a)
ALPHAS = 0.01, 0.1, 1.0, 10.0
TARGET = [0.0], 0.3  # of (b)
SEEDS, UPDATES = range(3), 1_500  # a seed's runs differ in nothing but alpha and variant
STATE_DIM, ACTION_DIM = 31, 8  # of (c): AntMaze's
FINER = 5, 20, 100, 500  # T of (d)
SHOWN = 0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0  # alphas of (d)
SEARCHED = np.geomspace(0.01, 10, 61)  # alphas among which (d) finds that of the largest entropy
BINS = 100  # of the histogram on [-1, 1] that (d) takes the samples' entropy from
TARGETS = {"Gaussian, deviation 0.3": ([0.0], 0.3), "modes at ±0.5": ([-0.5, 0.5], MODE_WIDTH)}  # of (d)
TIMES = {"t = 1, 2": False, "all": True}  # of (d): whether the late times are kept
TOY_ALPHAS, TOY_SEEDS, TOY_DATA = (0.0, 0.03, 0.1), range(100, 105), "toy-20"
BATCHES = 20  # over which (c) takes the mean of its norms


def flat_critics(state, action, frozen: bool = False):
    """An ensemble of one member that is 1 everywhere: it leaves no Q term, and lambda = eta in variant "paper"."""
    return torch.ones(1, len(action), dtype=action.dtype)


def policy_terms(policy, sde, action, args, generator):
    """`erdp.policy_loss` of actions (B, 1) with fresh noise, a state that is always 0 and no Q term: its dict."""
    t = torch.randint(1, sde.num_steps + 1, (len(action),), generator=generator)
    eps, a_T = torch.randn(2, *action.shape, generator=generator).to(action.dtype)
    zeros = torch.zeros_like(action)
    batch, noise = erdp.Batch(zeros, action, zeros[:, 0], zeros, zeros[:, 0]), erdp.Noise(None, t, eps, a_T, None)
    return erdp.policy_loss(policy, flat_critics, sde, batch, noise, flat_critics(None, action), args)


# ---- (a) the estimate ------------------------------------------------------------------------------------------------


def true_entropy(modes, width) -> float:
    """The differential entropy of equally likely Gaussians at `modes`, by integration over a fine grid."""
    x = np.linspace(min(modes) - 10 * width, max(modes) + 10 * width, 20_001)
    density = scipy.stats.norm.pdf(x[:, None], modes, width).mean(1)
    return float(np.trapezoid(scipy.special.entr(density), x))


def estimates(modes, width) -> list[float]:
    """Of one target: true entropy, that of the sampler's output at T = 5, and the estimate of each variant."""
    sde, generator = erdp.MeanRevertingSDE(dtype=torch.float64), torch.Generator().manual_seed(0)
    action = torch.as_tensor(quantiles(modes, width, ROWS))[:, None]

    network = predictor(sde, modes, width)
    sample = optimal(network, sde, gaussian(6, ROWS, 1, seed=1))
    terms = [policy_terms(network, sde, action, erdp.Args(variant=v), generator)["entropy"] for v in VARIANTS]
    return [true_entropy(modes, width), scipy.stats.differential_entropy(sample[:, 0]), *map(float, terms)]


# ---- (b) what it does to a policy ------------------------------------------------------------------------------------


def trained(alpha: float, variant: str, seed: int):
    """A NoiseNetwork after UPDATES updates on TARGET with diffusion loss and entropy term (eta = 1, so lambda = 1)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    policy, sde = erdp.NoiseNetwork(1, 1, hidden=64), erdp.MeanRevertingSDE()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    args = erdp.Args(entropy_coef=alpha, variant=variant)
    modes, width = TARGET
    for _ in range(UPDATES):
        mode = torch.tensor(modes)[torch.randint(len(modes), (256,), generator=generator)]
        action = (mode + width * torch.randn(256, generator=generator))[:, None]
        loss = policy_terms(policy, sde, action, args, generator)["policy_loss"]
        erdp.optimizer_step(loss, policy, optimizer, grad_norm=4.0)
    return policy


@torch.no_grad()
def spread(policy, clip: bool, n: int = 20_000) -> tuple[float, float, float]:
    """Deviation, entropy and mean magnitude of T = 5 samples, with x0-hat and sample clamped to [-1, 1] or neither."""
    state, noise = torch.zeros(n, 1), gaussian(5, n, 1, seed=2).float()
    a = erdp.sample_actions(policy, erdp.MeanRevertingSDE(), state, noise, clip, clip)[:, 0].double().numpy()
    heaped = len(np.unique(a)) < 0.99 * n  # on the bounds: a distribution without a density
    return a.std(), -np.inf if heaped else scipy.stats.differential_entropy(a), np.abs(a).mean()


def expected_deviation(variant: str, alpha: float) -> str:
    """Of unclamped samples, from the noise that minimises the loss on TARGET where that is known in closed form.

    Variant "paper": -log p is all but eps_hat^2 / 2 and a constant, and E (eps_hat - eps)^2 - alpha eps_hat^2 / 2 least
    at E(eps | x_t) / (1 - alpha / 2), without a minimum from alpha = 2 on.
    """
    sde = erdp.MeanRevertingSDE(dtype=torch.float64)
    exact = predictor(sde, *TARGET)
    if variant == "paper" and alpha >= 2:
        return "no minimum"
    minimisers = dict(
        none=exact,
        paper=lambda *x: exact(*x) / (1 - alpha / 2),
        debruijn=widened(sde, TARGET, alpha),
    )
    return f"{closed_form_deviation(optimal, sde, minimisers[variant]):.3g}" if variant in minimisers else ""


# ---- (c) its share of the gradient -----------------------------------------------------------------------------------


def gradients_of_eq15(agent, batch, noise, args):
    """Of diffusion, Q and entropy term of one batch in the policy's weights, (3, P).

    A term is the difference that a setting makes to the loss: lambda, and the magnitude by which variant "released"
    divides, are constants to the gradient.
    """
    with torch.no_grad():
        q_data = agent.critics(batch.state, batch.action)
    sums = []
    for changes in (dict(eta=0.0, entropy_coef=0.0), dict(entropy_coef=0.0), {}):
        changed = dataclasses.replace(args, **changes)
        loss = erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, q_data, changed)["policy_loss"]
        gradients = torch.autograd.grad(loss, list(agent.policy.parameters()))
        sums.append(torch.cat([gradient.ravel() for gradient in gradients]))
    return torch.stack([sums[0], sums[1] - sums[0], sums[2] - sums[1]])


def term_norms(agent, data, args, batches: int = BATCHES):
    """Mean norms of the gradients of diffusion, Q and entropy term, and mean cosine of the last with the first."""
    generator, result = torch.Generator().manual_seed(0), []
    noise = erdp.noise_buffers(args, data.action.shape[1], "cpu")
    for _ in range(batches):
        erdp.sample_noise(noise, len(data.reward), generator)
        gradients = gradients_of_eq15(agent, erdp.Batch(*(column[noise.rows] for column in data)), noise, args)
        cosine = torch.cosine_similarity(gradients[2], gradients[0], dim=0)
        result.append([*gradients.norm(dim=1).tolist(), float(cosine)])
    return np.mean(result, 0)


def fresh_agent():
    """As `trained_agent`, untrained: AntMaze's sizes and settings, made-up data (Gaussian states, uniform actions)."""
    torch.manual_seed(0)
    args = dataclasses.replace(erdp.preset("antmaze-large-diverse-v0"), device="cpu", compile=False)
    state, next_state = torch.randn(2, 10_000, STATE_DIM)
    action, reward = 2 * torch.rand(10_000, ACTION_DIM) - 1, torch.zeros(10_000)
    agent = erdp.Agent(STATE_DIM, ACTION_DIM, args)
    return "untrained, made-up data", agent, erdp.Batch(state, action, reward, next_state, reward)


def trained_agent(path: Path):
    """What to call the agent of a run's checkpoint.pt, that agent on the CPU, and its data. Raises erdp.UserError."""
    saved = erdp.load_file(path)
    args, about = dataclasses.replace(saved["args"], device="cpu", compile=False, precision="float32"), saved["about"]
    agent = erdp.Agent(about["state_dim"], about["action_dim"], args)
    with erdp.refusing(f"{path} is not a whole checkpoint.pt of a run", "give that of another run"):
        agent.load_state_dict(saved["agent"])
    data = without_home(saved["dataset_id"])
    name = f"{args.env} on {data}, alpha {args.entropy_coef:g}, {saved['step']} updates"
    return name, agent, erdp.load_data(erdp.open_task(args), args)


@torch.no_grad()
def weight(agent, data, args) -> str:
    """lambda alpha, by which variant "paper" multiplies log p, from the data's first 4,096 rows."""
    value = erdp.pessimistic_value(agent.critics(data.state[:4096], data.action[:4096]), args)
    return f"{args.eta * args.entropy_coef / value.abs().mean().item():.2g}" if args.variant == "paper" else ""


def gradient_lines(name: str, agent, data):
    """The lines of (c)'s table for one agent: each variant with its default alpha."""
    for variant in VARIANTS:
        alpha = erdp.preset("toy", variant).entropy_coef
        args = dataclasses.replace(agent.args, variant=variant, entropy_coef=alpha)
        *norms, cosine = term_norms(agent, data, args)
        shares = [f"{norm:.3g} ({norm / sum(norms):.2%})" for norm in norms]
        yield [name, args.num_critics, f"{args.eta:g}", variant, weight(agent, data, args), *shares, f"{cosine:.2f}"]


# ---- (d) a term that measures entropy --------------------------------------------------------------------------------


def sde_of(T: int = 5, all_times: bool = False):
    """An SDE in float64, whose `erdp.entropy_weights` leave out the late times or not."""
    sde = erdp.MeanRevertingSDE(T, dtype=torch.float64)
    sde.last_time = T if all_times else sde.last_time
    return sde


def widened(sde, target, alpha: float):
    """The minimiser of L_diff (Eq. 5) - alpha H-hat / A without Q: the exact noise of `target` / (1 + alpha T w_t).

    At x_t the loss of one dimension is E (eps_hat - eps)^2 + alpha T w_t eps_hat^2 and a constant.
    """
    exact, divisor = predictor(sde, *target), 1 + alpha * sde.num_steps * erdp.entropy_weights(sde)
    return lambda x_t, t, state: exact(x_t, t, state) / divisor[t - 1, None]


def h_hat(sde, network, target) -> float:
    """`erdp.entropy_estimate` at noised actions of `target`, whose quantiles at each t stand for its law: no noise."""
    modes, width = target
    values = []
    for t in range(1, sde.num_steps + 1):
        scale, var = sde.transition(0, t)
        spread = (scale**2 * width**2 + var).sqrt()
        x_t = torch.as_tensor(quantiles(float(scale) * np.array(modes), float(spread)))[:, None]
        times = torch.full((len(x_t),), t)
        values.append(float(erdp.entropy_estimate(sde, network(x_t, times, None), times).mean()))
    return float(np.mean(values))


def least_h_hat(T: int) -> float:
    """H-hat of one point with its exact noise, ||E(eps | x_t)||^2 = ||eps||^2; no action set in [-1, 1] has less."""
    sde = sde_of(T)
    var = sde.transition(0, torch.arange(1, T + 1))[1][:, 0]
    return float(0.5 * math.log(2 * math.pi * math.e) - (erdp.entropy_weights(sde) * (1 - var)).sum())


class Spread(NamedTuple):
    """Of samples in [-1, 1]: entropy of their histogram, standard deviation, share on the bounds."""

    entropy: float
    deviation: float
    on_bounds: float


def sampled(network, sde, clip: bool, rows: int = ROWS) -> Spread:
    """Of T steps of sampling, x0-hat clipped or not. The finished sample is clamped, as the policy's always is."""
    noise = gaussian(sde.num_steps, rows, 1, seed=3)
    a = erdp.sample_actions(network, sde, None, noise, clip, clip_sample=True)[:, 0].numpy()
    share = np.histogram(a, BINS, (-1, 1))[0] / rows
    entropy = scipy.special.entr(share).sum() + np.log(2 / BINS)
    return Spread(entropy, a.std(), (np.abs(a) == 1).mean())


class Widening(NamedTuple):
    """Over SHOWN: H-hat, and samples with and without clip; the alphas (clip, no clip) of the largest entropy."""

    h_hat: list[float]
    clipped: list[Spread]
    free: list[Spread]
    best: list[float]


def widening(target, all_times: bool) -> Widening:
    sde, spreads, best = sde_of(all_times=all_times), [], []
    networks = [widened(sde, target, alpha) for alpha in SHOWN]
    for clip in (True, False):
        spreads.append([sampled(network, sde, clip) for network in networks])
        entropies = [sampled(widened(sde, target, alpha), sde, clip, ROWS // 5).entropy for alpha in SEARCHED]
        best.append(float(SEARCHED[np.argmax(entropies)]))
    return Widening([h_hat(sde, network, target) for network in networks], *spreads, best)


def own_samples(alpha: float) -> tuple[float, Spread]:
    """H-hat and the samples (x0-hat clipped) of a policy on TARGET whose term is taken at its own noised samples.

    All is linear: eps_hat = k_t x_t, where k_t minimises E (k x_t - eps)^2 over the data + alpha T w_t E (k x_t)^2 over
    the samples, which follow from k_t: a fixed point.
    """
    sde, (_, width) = sde_of(), TARGET
    times = torch.arange(1, sde.num_steps + 1)
    scale, var = (column[:, 0] for column in sde.transition(0, times))
    weights, of_data = erdp.entropy_weights(sde), scale**2 * width**2 + var  # E x_t^2 of noised data
    deviation = width
    for _ in range(40):
        of_samples = scale**2 * deviation**2 + var
        k = var.sqrt() / (of_data + alpha * sde.num_steps * weights * of_samples)
        spread = sampled(lambda x_t, t, state: k[t - 1, None] * x_t, sde, True, ROWS // 5)  # noqa: B023
        deviation = (deviation + spread.deviation) / 2
    estimate = 0.5 * math.log(2 * math.pi * math.e) - (weights * (k**2 * of_samples - var)).sum()
    return float(estimate), spread


# ---- small runs ------------------------------------------------------------------------------------------------------


def toy(alpha: float, seed: int) -> tuple[float, float]:
    """Scores of a toy run of variant "debruijn" after its last update: acting by the best of 50, and plain samples."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = dict(dataset=TOY_DATA, seed=seed, variant="debruijn", entropy_coef=alpha, eval_every=4000)
        settings["run_dir"] = f"{folder}/run"
        args = erdp.parse([f"--{name.replace('_', '-')}={value}" for name, value in settings.items()])
        args = dataclasses.replace(args, device="cpu", compile=False, precision="float32")
        erdp.train(args)
        task, path = erdp.open_task(args), Path(args.run_dir) / "policy.pt"
        with contextlib.closing(erdp.make_envs(task, args.eval_episodes)) as envs:
            actors = [erdp.load_policy(path, candidates=candidates) for candidates in (args.eval_candidates, 1)]
            results = [erdp.evaluate(actor, envs, args.eval_episodes, seed) for actor in actors]
    return tuple(erdp.summary(task, result)["score_mean"] for result in results)


def toy_markdown(scores: np.ndarray) -> str:
    """scores (alphas, seeds, 2) of `toy`."""
    change = scores - scores[:1]
    error = change.std(1, ddof=1) / np.sqrt(len(TOY_SEEDS))
    rows = []
    for i, alpha in enumerate(TOY_ALPHAS):
        line = [f"{alpha:g}"]
        for runs, step, e in zip(scores[i].T, change[i].mean(0), error[i]):
            against = f"{step:+.1f} ± {e:.1f}" if i else ""
            line += [f"{runs.mean():.1f}", ", ".join(f"{score:.1f}" for score in runs), against]
        rows.append(line)
    measures = "mean", "each seed", "against alpha 0"
    header = [f"{way}: {measure}" for way in ("best of 50", "plain samples") for measure in measures]
    return f"""# Small runs with the entropy term by de Bruijn's identity

`python results/entropy.py --toy`: the toy with {erdp.toy_share(TOY_DATA):.0%} of good steps, `--variant debruijn`,
M = 8, 4,000 updates, seeds {TOY_SEEDS[0]} to {TOY_SEEDS[-1]}. Score (percent of the best return) after the last update,
over 100 episodes, acting by softmax over the value of 50 samples and by plain samples. Against alpha = 0: mean over
seeds of the difference, ± its standard error.

{table(["alpha", *header], rows)}
"""


# ---- the files -------------------------------------------------------------------------------------------------------


def shares(norms: list) -> str:
    """(c): what the columns are, and the table."""
    columns = ["networks", "M", "eta", "variant", "lambda alpha", "diffusion", "Q", "entropy", "cosine"]
    return f"""\
Norm of each term's gradient in the policy's weights, and its share of the sum of the three norms; mean over
{BATCHES} batches of 256; alpha = 0.01, in variant "debruijn" {erdp.DEBRUIJN_ALPHA:g}. lambda alpha: the weight of log p
in variant "paper", the alpha of (b); from 2 / A on, in A action dimensions, its loss has no minimum. Cosine: between
the gradients of entropy and diffusion term.

{table(columns, norms)}
"""


def rule_elsewhere() -> str:
    """By how much the default alpha is behind alpha = 0 on the toy's shares in runs.jsonl, acting by the best of 50."""
    shares, words = toy_groups(group_runs(read_records(RECORDS))), []
    for data, arms in shares.items():
        ours, plain = (arms[name].finals() for name in ("both, de Bruijn", "ensemble"))
        gains = np.array([ours[seed] - plain[seed] for seed in sorted(ours.keys() & plain.keys())])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        kept = "kept" if gains.mean() >= -error else "broken"
        words.append(f"{gains.mean():+.1f} ± {error:.1f} at {erdp.toy_share(data):.0%} ({kept})")
    return f"in Figure 1's runs, by the best of 50, the same rule has {', '.join(words)}"


def right_term(finer: dict, widenings: dict, own: dict) -> str:
    """(d): text and tables."""
    sde, late = sde_of(), sde_of(all_times=True)
    bound = -0.5 * math.log(float(sde.transition(0, sde.last_time)[1]))
    share = 1 - float(erdp.entropy_weights(sde).sum() / erdp.entropy_weights(late).sum())
    growth = ", ".join(f"{float(sde.predict_x0(0.0, t, -1.0)):.3g}" for t in range(1, 6))
    grids = [[name, *(f"{value:.3f}" for value in values)] for name, values in finer.items()]
    rows, best, by_own = [], [], []
    for names, w in widenings.items():
        best.append([*names, *(f"{alpha:.2g}" for alpha in w.best)])
        for alpha, estimate, *both in zip(SHOWN, w.h_hat, w.clipped, w.free, strict=True):
            cells = [(f"{s.entropy:.2f}", f"{s.deviation:.2f}", f"{s.on_bounds:.1%}") for s in both]
            rows.append([*names, f"{alpha:g}", f"{estimate:.2f}", *cells[0], *cells[1]])
    used = list(TIMES)[0]
    lowest = min(alpha for (_, times), w in widenings.items() if times == used for alpha in w.best)
    of_data = widenings[list(TARGETS)[0], used]
    for alpha, (estimate, spread) in own.items():
        i = SHOWN.index(alpha)
        values = of_data.h_hat[i], *of_data.clipped[i][:2], estimate, *spread[:2]
        by_own.append([f"{alpha:g}", *(f"{value:.2f}" for value in values)])
    header = [f"{c}: {m}" for c in ("clipped", "not clipped") for m in ("entropy", "deviation", "on the bounds")]
    return f"""\
## (d) A term that measures entropy

Over s = theta_bar the SDE of Eq. 1 obeys de Bruijn's identity, dH(x_s)/ds = E||grad log p_s||^2 - A. With the score
-E(eps given x_s) / std_s (Eq. 30), x_T standard Gaussian and the network's prediction for E(eps given x_t), the grid
gives

    H-hat = A/2 log(2 pi e) - sum over t of w_t (||eps_phi(x_t, t)||^2 - var_t A),   w_t = theta'_t / var_t.

One t a row, as the diffusion loss draws it, times T, is an unbiased estimate of the sum at no cost. A *smaller*
predicted noise is a larger entropy: the term of `paper`, eps_phi^2 / 2, has the opposite sign. `--variant debruijn` has
the loss L_diff - lambda Q^LCB - alpha H-hat / A.

What it is and is not. It is taken at noised *data* actions. With the exact predictor it is the data's conditional
entropy, up to the grid's error. For a policy q that Q or alpha has moved away from the data p it is 2 H(q) - CE(p, q)
if both are Gaussian, which is not exact for others: it also pulls back to the data, and at q = p its gradient is twice
that of H(q). (a) has its values at T = 5, which rank Gaussians and modes moving apart rightly and do not change as a
Gaussian moves. They are too large, as each step of the grid takes E||E(eps given x_t)||^2 / var_t at its end, where it
is smallest for these targets; a finer grid brings them to the truth. By quadrature:

{table(["target", "true", *(f"T = {T}" for T in FINER)], grids)}

The last line is the least that any actions have: E||E(eps given x_t)||^2 is at most E||eps||^2 = A.

**Late times are left out.** H(x_t) is at least that of x_t given x_0, A/2 log(2 pi e var_t), so that x_t is standard
Gaussian to within -1/2 log var_t nats a dimension for any actions in [-1, 1]. The sum ends at the last t where this is
still {erdp.GAUSSIAN_WITHIN:g} or more (t = 1 is always used): for T = 5 at t = {sde.last_time}, with {bound:.2f} nats.
The sum of w_t var_t over the times used is their theta_bar. The times left out would change H-hat by 0.03 nats a
dimension at most, but have {share:.0%} of the weight, and Eq. 8 multiplies an error of the noise by {growth} at
t = 1..5.

Without Q the minimiser (Eq. 5) is the exact noise divided by 1 + alpha T w_t. {ROWS:,} samples of it, one dimension,
T = 5, finished samples clamped to [-1, 1] as always; clipped: x0-hat is too, in each step (Table 4's action clip).
Entropy: of their histogram of {BINS} bins on [-1, 1], at most log 2 = {math.log(2):.2f}.

{table(["target", "times", "alpha", "H-hat", *header], rows)}

Deviation and H-hat rise with alpha without end; the samples' entropy rises up to these alphas, and falls beyond, as the
samples pile up on the bounds:

{table(["target", "times", "up to, clipped", "up to, not clipped"], best)}

With late times left out the entropy of the samples of these two one-dimensional targets rises up to alpha =
{lowest:.2g} at least; of others nothing is shown. The default, {erdp.DEBRUIJN_ALPHA:g}, is the largest of 0.01, 0.03,
0.1, 0.3, 1 up to that with which the toy with {erdp.toy_share(TOY_DATA):.0%} of good steps is not behind alpha = 0 by
more than a standard error, neither acting by the best of 50 nor by plain samples ([entropy-toy.md](entropy-toy.md)). It
is no choice for other data: {rule_elsewhere()}.

Not taken up: (1) The policy's own samples, noised, in place of data actions: one more pass of the network. Their H-hat
is no nearer to the samples' entropy, and large alphas give less entropy. Gaussian, x0-hat clipped, both minimisers:

{table(["alpha", *(f"{where}: {m}" for where in ("data", "own") for m in ("H-hat", "entropy", "deviation"))], by_own)}

(2) An alpha learnt as in SAC, towards a target for H-hat of at most A log 2, the entropy of uniform actions. At T = 5
whatever the data has an H-hat of {least_h_hat(5):.2f} a dimension or more, above log 2 = {math.log(2):.2f}: at q = p
alpha would go to 0. H-hat is below that only where the policy has left the data, for Gaussians by CE(p, q).
"""


def markdown(estimated: dict, spreads: dict, norms: list, right: str) -> str:
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in estimated.items()]
    groups = {"Gaussians": GAUSSIANS, "modes": MIXTURES, "moved Gaussian": MOVED, "all": estimated}
    ranks = []
    for group, names in groups.items():
        true, *others = np.array([estimated[name] for name in names]).T
        rank = [f"{scipy.stats.spearmanr(true, x).statistic:.2f}" if np.ptp(true) > 1e-6 else "" for x in others]
        ranks.append([group, *rank, *(f"{np.ptp(x):.3f}" for x in (true, *others))])
    kinds = "true", "sampler", *(f"estimate, {variant}" for variant in VARIANTS)
    policies = []
    for (variant, alpha), runs in spreads.items():
        with np.errstate(invalid="ignore"):  # the deviation of infinities
            pairs = zip(runs.mean(0), runs.std(0), strict=True)
        values = [f"{mean:.3g} ± {deviation:.1g}" if np.isfinite(mean) else f"{mean}" for mean, deviation in pairs]
        change = runs[:, 0] - spreads["none", 0.0][:, 0]
        values.insert(1, f"{change.mean():+.3f} ± {change.std():.1g}" if alpha else "")
        policies.append([variant, f"{alpha:g}", *values, expected_deviation(variant, alpha)])
    header = [f"{clip}: {m}" for clip in ("clamped", "not clamped") for m in ("deviation", "entropy", "mean abs a")]
    header.insert(1, "clamped: change of the deviation")
    return f"""# The entropy term of Eq. 15

`python results/entropy.py`, picture: [entropy.png](entropy.png). T = 5, schedule cosine.

## (a) The estimate and the entropy that it stands for

One action dimension; the predictor knows the noise E(eps given x_t) exactly. True: differential entropy of the target.
Sampler: that of {ROWS:,} unclipped samples (Eq. 10). Estimate: mean of -log p (Eq. 14) over {ROWS:,} rows, as
`policy_loss` computes it, at t uniform on 1..5; variant `debruijn` has H-hat of (d) in its place. The modes are equally
likely, each of deviation {MODE_WIDTH}.

{table(["target", *kinds], rows)}

Spearman's rank correlation with the true entropy (1: the same order, -1: the reverse), and the range from the smallest
to the largest value. The moved Gaussian has one entropy wherever it lies.

{table(["targets", *(f"rank: {k}" for k in kinds[1:]), *(f"range: {k}" for k in kinds)], ranks)}

## (b) Policies trained with the term

A network of three hidden layers of 64, {UPDATES:,} updates on diffusion loss (Eq. 5) and entropy term alone, lambda = 1
(alpha here is lambda alpha in Eq. 15). Data: one Gaussian of deviation {TARGET[1]}, whose entropy is
{true_entropy(*TARGET):.3f}. T = 5 samples, x0-hat and sample clamped to [-1, 1] (Table 4's action clip) or neither;
entropy -inf: samples heaped on single points. Mean ± deviation over {len(SEEDS)} seeds, each with its own data and
noise. Change: against alpha = 0 with the same seed. Expected: deviation, not clamped, of the exact noise divided by
1 - alpha / 2, which minimises the loss of variant "paper" if -log p is eps_phi^2 / 2 and a constant (in A dimensions
1 - A alpha / 2, as the diffusion loss is a mean over them and log p a sum); for variant "debruijn", by 1 + alpha T w_t.

{table(["variant", "alpha", *header, "expected"], policies)}

## (c) Its share of the gradient of Eq. 15

Networks as initialised, with AntMaze's sizes (state {STATE_DIM}, action {ACTION_DIM}) and settings, on made-up data
(Gaussian states, uniform actions): Q is near 0, and lambda, which divides by its magnitude, large. Trained networks are
in [entropy-trained.md](entropy-trained.md).

{shares(norms)}
{right}"""


def draw(estimated: dict, spreads: dict, widenings: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (measured, (made, *panels)) = plt.subplots(2, 3, figsize=(16, 8.6))
    measured[1].sharey(measured[0])
    for panel, column, variant in zip(measured, (2, 3, 4), VARIANTS, strict=True):
        labels = "Gaussians of growing deviation", "two modes moving apart", "one narrow Gaussian moving away from 0"
        for names, label in zip((GAUSSIANS, MIXTURES, MOVED), labels, strict=True):
            panel.plot(*zip(*((estimated[n][0], estimated[n][column]) for n in names), strict=True), "o-", label=label)
        estimate = "H-hat" if variant == "debruijn" else "-log p"
        panel.set(xlabel="true entropy", ylabel=f"estimate, {estimate}", title=f"(a) what the term measures, {variant}")
        panel.legend(fontsize=8, loc="upper right" if variant == "released" else "best")
    for variant in VARIANTS:
        runs = [spreads["none", 0.0], *(spreads[variant, alpha] for alpha in ALPHAS)]
        mean, error = [r[:, 0].mean() for r in runs], [r[:, 0].std() for r in runs]
        made.errorbar(range(len(runs)), mean, error, fmt="o-", capsize=3, label=variant)
    made.axhline(TARGET[1], color="0.4", linestyle="--", label=f"the data: {TARGET[1]}")
    made.set_xticks(range(len(runs)), ["0", *(f"{alpha:g}" for alpha in ALPHAS)])
    made.set(xlabel="alpha (lambda = 1)", ylabel="deviation of samples (clamped)", title="(b) what it makes")
    made.legend()
    for panel, target in zip(panels, TARGETS, strict=True):
        for times, colour in zip(TIMES, ("tab:blue", "tab:orange"), strict=True):
            w, x = widenings[target, times], range(len(SHOWN))
            panel.plot(x, [s.entropy for s in w.clipped], "o-", color=colour, label=f"{times}, x0-hat clipped")
            panel.plot(x, [s.entropy for s in w.free], "o--", color=colour, label=f"{times}, x0-hat not clipped")
            panel.plot(x, w.h_hat, ":", color=colour, label=f"{times}: H-hat")
        panel.axhline(math.log(2), color="0.6", linewidth=1, label="log 2, uniform")
        panel.set_xticks(x, [f"{alpha:g}" for alpha in SHOWN])
        panel.set(ylim=(-3.5, 2.5), xlabel="alpha", ylabel="entropy of samples", title=f"(d) debruijn, {target}")
        panel.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="(c) alone, for these checkpoints")
    parser.add_argument("--toy", action="store_true", help="the small runs alone")
    args = start(parser)
    folder = args.out
    if args.toy:
        scores = np.array([[toy(alpha, seed) for alpha in TOY_ALPHAS] for seed in TOY_SEEDS])
        (folder / "entropy-toy.md").write_text(toy_markdown(scores.swapaxes(0, 1)))
        return
    try:
        agents = [trained_agent(path) for path in args.checkpoint]
    except erdp.UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if agents:
        norms = [line for agent in agents for line in gradient_lines(*agent)]
        command = " ".join(["python results/entropy.py --checkpoint", *map(str, args.checkpoint)])
        head = f"# The entropy term's share of the gradient of Eq. 15, in trained networks\n\n`{command}`\n\n"
        (folder / "entropy-trained.md").write_text(head + shares(norms))
        return
    targets = GAUSSIANS | MIXTURES | MOVED
    estimated = {name: estimates(*target) for name, target in targets.items()}
    spreads = {}
    for variant, alpha in [("none", 0.0), *((variant, alpha) for variant in VARIANTS for alpha in ALPHAS)]:
        policies = [trained(alpha, variant, seed) for seed in SEEDS]
        spreads[variant, alpha] = np.array([spread(p, True) + spread(p, False) for p in policies])
    norms, finer = list(gradient_lines(*fresh_agent())), {}
    for name in ("Gaussian, deviation 0.1", "Gaussian, deviation 0.3", "Gaussian, deviation 1", *list(MIXTURES)[3:6]):
        grids = [h_hat(sde, predictor(sde, *targets[name]), targets[name]) for sde in map(sde_of, FINER)]
        finer[name] = [true_entropy(*targets[name]), *grids]
    finer["a single point"] = [-math.inf, *map(least_h_hat, FINER)]
    widenings = {(name, t): widening(target, late) for name, target in TARGETS.items() for t, late in TIMES.items()}
    own = {alpha: own_samples(alpha) for alpha in SHOWN if alpha not in (0.01, 0.2)}
    draw(estimated, spreads, widenings, folder / "entropy.png")
    (folder / "entropy.md").write_text(markdown(estimated, spreads, norms, right_term(finer, widenings, own)))


if __name__ == "__main__":
    main()
