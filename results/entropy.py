"""The entropy term of Eq. 15: what its estimate follows, what it does to a policy, and how large its gradient is.

    python results/entropy.py                                       # writes entropy.png and entropy.md beside this file
    python results/entropy.py --checkpoint runs/NAME/checkpoint.pt  # (c) for that run, on its data: entropy-trained.md
    python results/entropy.py --out FOLDER

(a) The estimate, -log p of Eq. 14, as `erdp.policy_loss` computes it, beside the entropy that it stands for, where both
the distribution and the noise E(eps | x_t) are known exactly. (b) Small policies trained by noise matching with that
term and without Q: the spread of their samples. (c) The gradient of each term of Eq. 15 in the policy's weights.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import scipy.special
import scipy.stats
import torch
from known_noise import closed_form_deviation, gaussian, optimal, predictor, quantiles
from pages import start, table

import erdp

VARIANTS = "paper", "released"
MODE_WIDTH = 0.1
GAUSSIANS = {f"Gaussian, deviation {width:g}": ([0.0], width) for width in (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0)}
MIXTURES = {f"modes at ±{mode:g}": ([-mode, mode], MODE_WIDTH) for mode in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)}
MOVED = {f"Gaussian, deviation {MODE_WIDTH}, moved to {mean:g}": ([mean], MODE_WIDTH) for mean in (0.2, 0.4, 0.6, 0.8)}
ROWS = 100_000  # samples of (a)
ALPHAS = 0.01, 0.1, 1.0, 10.0
TARGET = [0.0], 0.3  # of (b)
SEEDS, UPDATES = range(3), 1_500  # a seed's runs differ in nothing but alpha and variant
STATE_DIM, ACTION_DIM = 31, 8  # of (c): AntMaze's
BATCHES = 20  # over which (c) takes the mean of its norms


def flat_critics(state, action, frozen: bool = False):
    """An ensemble of one member that is 1 everywhere: it leaves no Q term, and lambda = eta in variant "paper"."""
    return torch.ones(1, len(action), dtype=action.dtype)


def policy_terms(policy, sde, action, args, generator):
    """`erdp.policy_loss` of actions (B, 1) with fresh noise, a state that is always 0 and no Q term."""
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
    """Of one target: true entropy, that of the sampler's output at T = 5, and Eq. 14's estimate for each variant."""
    sde, generator = erdp.MeanRevertingSDE(dtype=torch.float64), torch.Generator().manual_seed(0)
    action = torch.as_tensor(quantiles(modes, width, ROWS))[:, None]

    network = predictor(sde, modes, width)
    sample = optimal(network, sde, gaussian(6, ROWS, 1, seed=1))
    terms = [policy_terms(network, sde, action, erdp.Args(variant=v), generator)[-1] for v in VARIANTS]
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
        loss, *_ = policy_terms(policy, sde, action, args, generator)
        erdp.descend(loss, policy, optimizer, grad_norm=4.0)
    return policy


@torch.no_grad()
def spread(policy, clip: bool, n: int = 20_000) -> tuple[float, float, float]:
    """Deviation, entropy and mean magnitude of T = 5 samples, with x0-hat and sample clamped to [-1, 1] or neither."""
    state, noise = torch.zeros(n, 1), gaussian(5, n, 1, seed=2).float()
    a = erdp.sample_actions(policy, erdp.MeanRevertingSDE(), state, noise, clip, clip)[:, 0].double().numpy()
    heaped = len(np.unique(a)) < 0.99 * n  # on the bounds: a distribution without a density
    return a.std(), -np.inf if heaped else scipy.stats.differential_entropy(a), np.abs(a).mean()


def expected_deviation(variant: str, alpha: float) -> str:
    """What variant "paper" should make of TARGET, unclamped, as its -log p is all but eps_hat^2 / 2 and a constant.

    Then the loss at x_t, E (eps_hat - eps)^2 - alpha eps_hat^2 / 2, is least at E(eps | x_t) / (1 - alpha / 2), and has
    no minimum from alpha = 2 on.
    """
    sde = erdp.MeanRevertingSDE(dtype=torch.float64)
    exact = predictor(sde, *TARGET)
    if variant == "released":
        return ""
    if alpha >= 2:
        return "no minimum"
    return f"{closed_form_deviation(optimal, sde, lambda *x: exact(*x) / (1 - alpha / 2)):.3g}"


# ---- (c) its share of the gradient -----------------------------------------------------------------------------------

def gradient(loss, module):
    """The gradient of `loss` in the weights of `module`, as one vector."""
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(module.parameters()))])


def terms_of_eq15(agent, batch, noise, q_data, args):
    """The diffusion, Q and entropy term of one batch: values (3,), and gradients in the policy's weights (3, P).

    A term is the difference that a setting makes to the loss: lambda, and the magnitude by which variant "released"
    divides, are constants to the gradient. q_data (M, B) is the ensemble's Q of the batch.
    """
    losses, gradients = [], []
    for changes in (dict(eta=0.0, entropy_coef=0.0), dict(entropy_coef=0.0), {}):
        changed = dataclasses.replace(args, **changes)
        loss, *_ = erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, q_data, changed)
        losses.append(loss.detach())
        gradients.append(gradient(loss, agent.policy))
    return tuple(torch.diff(torch.stack([x[0] * 0, *x]), dim=0) for x in (losses, gradients))


def drawn(data, args, batches: int):
    """That many batches of the data, each with its noise, whose buffers the next one fills; always the same ones."""
    generator, noise = torch.Generator().manual_seed(0), erdp.empty_noise(args, data.action.shape[1], "cpu")
    for _ in range(batches):
        erdp.draw(noise, len(data.reward), generator)
        yield erdp.Batch(*(column[noise.rows] for column in data)), noise


def term_norms(agent, data, args, batches: int = BATCHES):
    """Mean norms of the gradients of diffusion, Q and entropy term, and mean cosine of the last with the first."""
    result = []
    for batch, noise in drawn(data, args, batches):
        with torch.no_grad():
            q_data = agent.critics(batch.state, batch.action)
        _, gradients = terms_of_eq15(agent, batch, noise, q_data, args)
        cosine = torch.cosine_similarity(gradients[2], gradients[0], dim=0)
        result.append([*gradients.norm(dim=1).tolist(), float(cosine)])
    return np.mean(result, 0)


@torch.no_grad()
def weight(agent, data, args) -> float:
    """lambda alpha, by which variant "paper" multiplies log p, from the data's first 4,096 rows."""
    q = agent.critics(data.state[:4096], data.action[:4096])
    value = erdp.pessimistic_value(q, args.pessimism, args.lcb_coef, args.variant)
    return args.eta * args.entropy_coef / float(value.abs().mean())


def fresh_agent():
    """Untrained networks of AntMaze's sizes and settings, and made-up data: Gaussian states, uniform actions."""
    torch.manual_seed(0)
    args = dataclasses.replace(erdp.preset("antmaze-large-diverse-v0"), device="cpu", compile=False)
    state, next_state = torch.randn(2, 10_000, STATE_DIM)
    action, reward = 2 * torch.rand(10_000, ACTION_DIM) - 1, torch.zeros(10_000)
    return erdp.Agent(STATE_DIM, ACTION_DIM, args), erdp.Batch(state, action, reward, next_state, reward)


def load_agent(path: Path):
    """The agent of a run's checkpoint.pt, on the CPU, and what else that file holds. Raises erdp.UserError."""
    with erdp.refusing(f"{path} is not a whole checkpoint.pt of a run", "give that of another run"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        args, about = dataclasses.replace(erdp.Args(**saved["args"]), device="cpu", compile=False), saved["about"]
        agent = erdp.Agent(about["state_dim"], about["action_dim"], args)
        agent.load_state_dict(saved["agent"])
    return agent, saved


def trained_agent(path: Path):
    """The agent of a run's checkpoint.pt, that run's data, and what to call them. Raises erdp.UserError."""
    agent, saved = load_agent(path)
    args, data = agent.args, saved["about"]["dataset_id"]
    name = f"{args.env} on {data}, alpha {args.entropy_coef:g}, {saved['step']} updates"
    return agent, erdp.load_data(erdp.open_task(args), args), name


def gradients(name: str, agent, data):
    """The lines of (c)'s table for one agent: both variants with alpha = 0.01."""
    for variant in VARIANTS:
        args = dataclasses.replace(agent.args, variant=variant, entropy_coef=0.01)
        *norms, cosine = term_norms(agent, data, args)
        shares = [f"{norm:.3g} ({norm / sum(norms):.2%})" for norm in norms]
        factor = f"{weight(agent, data, args):.2g}" if variant == "paper" else ""
        yield [name, len(agent.critics.biases[0]), f"{args.eta:g}", variant, factor, *shares, f"{cosine:.2f}"]


# ---- the files -------------------------------------------------------------------------------------------------------

def shares(norms: list) -> str:
    """(c): what the columns are, and the table."""
    columns = ["networks", "M", "eta", "variant", "lambda alpha", "diffusion", "Q", "entropy", "cosine"]
    return f"""\
Norm of each term's gradient in the policy's weights, and its share of the sum of the three norms; mean over
{BATCHES} batches of 256; alpha = 0.01. lambda alpha: the weight of log p in variant "paper", the alpha of (b).
Cosine: between the gradients of entropy and diffusion term.

{table(columns, norms)}
"""


def markdown(estimated: dict, spreads: dict, norms: list) -> str:
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in estimated.items()]
    groups = {"Gaussians": GAUSSIANS, "modes": MIXTURES, "moved Gaussian": MOVED, "all": estimated}
    ranks = []
    for group, names in groups.items():
        true, *others = np.array([estimated[name] for name in names]).T
        rank = [f"{scipy.stats.spearmanr(true, x).statistic:.2f}" if np.ptp(true) > 1e-6 else "" for x in others]
        ranks.append([group, *rank, *(f"{np.ptp(x):.3f}" for x in (true, *others))])
    kinds = "true", "sampler", "estimate, paper", "estimate, released"
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
`policy_loss` computes it, at t uniform on 1..5. The modes are equally likely, each of deviation {MODE_WIDTH}.

{table(["target", *kinds], rows)}

Spearman's rank correlation with the true entropy (1: the same order, -1: the reverse), and the range from the smallest
to the largest value. The moved Gaussian has one entropy wherever it lies.

{table(["targets", *(f"rank: {k}" for k in kinds[1:]), *(f"range: {k}" for k in kinds)], ranks)}

## (b) Policies trained with the term

A network of three hidden layers of 64, {UPDATES:,} updates on diffusion loss (Eq. 5) and entropy term alone, lambda = 1
(alpha here is lambda alpha in Eq. 15). Data: one Gaussian of deviation {TARGET[1]}, whose entropy is
{true_entropy(*TARGET):.3f}. T = 5 samples, x0-hat and sample clamped to [-1, 1] (Table 4's action clip) or neither;
entropy -inf: samples heaped on single points. Mean ± deviation over {len(SEEDS)} seeds; the runs of a seed have the
same data and noise. Change: against alpha = 0 with the same seed. Expected: deviation, not clamped, of the exact noise
divided by 1 - alpha / 2, which minimises the loss of variant "paper" if -log p is eps_phi^2 / 2 and a constant.

{table(["variant", "alpha", *header, "expected"], policies)}

## (c) Its share of the gradient of Eq. 15

Networks as initialised, with AntMaze's sizes (state {STATE_DIM}, action {ACTION_DIM}) and settings, on made-up data
(Gaussian states, uniform actions): Q is near 0, and lambda, which divides by its magnitude, large. Trained networks are
in [entropy-trained.md](entropy-trained.md).

{shares(norms)}"""


def draw(estimated: dict, spreads: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.3))
    axes[1].sharey(axes[0])
    for panel, column, variant in ((axes[0], 2, "paper"), (axes[1], 3, "released")):
        labels = "Gaussians of growing deviation", "two modes moving apart", "one narrow Gaussian moving away from 0"
        for names, label in zip((GAUSSIANS, MIXTURES, MOVED), labels, strict=True):
            panel.plot(*zip(*((estimated[n][0], estimated[n][column]) for n in names), strict=True), "o-", label=label)
        panel.set(xlabel="true entropy", ylabel="estimate, -log p", title=f"(a) what the term measures, {variant}")
        panel.legend(fontsize=8, loc="lower left" if variant == "paper" else "upper right")
    for variant in VARIANTS:
        runs = [spreads["none", 0.0], *(spreads[variant, alpha] for alpha in ALPHAS)]
        mean, error = [r[:, 0].mean() for r in runs], [r[:, 0].std() for r in runs]
        axes[2].errorbar(range(len(runs)), mean, error, fmt="o-", capsize=3, label=variant)
    axes[2].axhline(TARGET[1], color="0.4", linestyle="--", label=f"the data: {TARGET[1]}")
    axes[2].set_xticks(range(len(runs)), ["0", *(f"{alpha:g}" for alpha in ALPHAS)])
    axes[2].set(xlabel="alpha (lambda = 1)", ylabel="deviation of samples (clamped)", title="(b) what it makes")
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[], help="(c) alone, for these checkpoints")
    args = start(parser)
    folder = args.out
    try:
        agents = [trained_agent(path) for path in args.checkpoint]
    except erdp.UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if agents:
        norms = [line for agent, data, name in agents for line in gradients(name, agent, data)]
        command = " ".join(["python results/entropy.py --checkpoint", *map(str, args.checkpoint)])
        head = f"# The entropy term's share of the gradient of Eq. 15, in trained networks\n\n`{command}`\n\n"
        (folder / "entropy-trained.md").write_text(head + shares(norms))
        return
    estimated = {name: estimates(*target) for name, target in (GAUSSIANS | MIXTURES | MOVED).items()}
    spreads = {}
    for variant, alpha in [("none", 0.0), *((variant, alpha) for variant in VARIANTS for alpha in ALPHAS)]:
        policies = [trained(alpha, variant, seed) for seed in SEEDS]
        spreads[variant, alpha] = np.array([spread(p, True) + spread(p, False) for p in policies])
    norms = list(gradients("untrained, made-up data", *fresh_agent()))
    draw(estimated, spreads, folder / "entropy.png")
    (folder / "entropy.md").write_text(markdown(estimated, spreads, norms))


if __name__ == "__main__":
    main()
