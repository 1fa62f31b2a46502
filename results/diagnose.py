"""A look into one run: what each diffusion time gives the policy to learn from; its values, actions and gradients.

    python results/diagnose.py RUN_FOLDER                # writes diagnosis.md and diagnosis.png there
    python results/diagnose.py RUN_FOLDER --out FOLDER

It reads the run's checkpoint.pt and the data that the run was trained on. Its tables:

By diffusion time: Eq. 12 takes a^0-hat of Eq. 8 at every time; here all rows are diffused to the time of the column.
Gradients are in the policy's weights. Norm: of one batch's gradient, mean over batches. Noise: the deviation of one
batch's gradient from the mean one, divided by the norm of the latter.

Values against the data's return-to-go: of the target ensemble, by which the policy acts, at rows of the data that
determine their return-to-go, because their episode ends terminal, or where the discount is below 0.05. Rewards are
scaled as in training. A policy that is better than the data has higher values than it.

What an action is worth: Q at the same states for other actions, and by how much it is above Q of the data's. The mean
and the deviation over states are of the ensemble's mean; the members' deviation around it is a mean over states.

Actions at the start of an episode: at 64 start states near the first one, on the scale from -1 to 1. Distance: of the
means; it and the deviation are averages over dimensions.

The terms of Eq. 15, and Eq. 16: means over batches. A term is the difference that its settings make to the loss.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from pages import save, start, table
from runs import arm_of, label, without_home

import erdp

BATCHES = 20  # over which gradients are averaged
ROWS = 4096  # at which values are compared, at most


def load(path: Path):
    """The agent of a run's checkpoint.pt, on the CPU, that run's data and task, and the update. Raises UserError."""
    saved = erdp.load_file(path)
    args = dataclasses.replace(saved["args"], device="cpu", compile=False, precision="float32")
    with erdp.refusing(f"the data of {path} cannot be read"):
        task, data = erdp.load_data(args)
    if task.data_checksum != saved["task"].data_checksum:
        raise erdp.UserError(f"{path} was made from other data than these: give those of {task.dataset_id}")
    agent = erdp.Agent(data.state.shape[1], data.action.shape[1], args)
    with erdp.refusing(f"{path} has no whole agent: give a run's checkpoint.pt", KeyError, RuntimeError):
        for part in ("policy", "critics", "policy_ema", "critics_target"):
            getattr(agent, part).load_state_dict(saved["agent"][part])
        return agent, data, task, saved["step"]


# ==== 1. Gradients ====================================================================================================


def batches(data, args, count: int):
    """That many batches of the data, each with its noise, whose buffers the next one fills; always the same ones."""
    generator, noise = torch.Generator().manual_seed(0), erdp.noise_buffers(args, data.action.shape[1], "cpu")
    rows = torch.empty(args.batch_size, dtype=torch.int64)
    for _ in range(count):
        rows.random_(0, len(data.reward), generator=generator)
        erdp.sample_noise(noise, generator)
        yield erdp.Batch(*(column[rows] for column in data)), noise


def gradient(loss, module) -> torch.Tensor:
    """The gradient of `loss` in the weights of `module`, as one vector."""
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(module.parameters()))])


def policy_terms(agent, batch, noise, **settings) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each term of Eq. 15 and their sum, with these settings: value, and gradient (P,) in the policy's weights."""
    with torch.no_grad():
        q = agent.critics(batch.state, batch.action)
    found = []
    for off in (dict(eta=0.0, entropy_coef=0.0), dict(entropy_coef=0.0), {}):
        args = dataclasses.replace(agent.args, **settings, **off)
        loss = erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, q, args)["policy_loss"]
        found.append((loss.detach(), gradient(loss, agent.policy)))
    (a, da), (b, db), (c, dc) = found
    terms = {"diffusion loss": (a, da), "-lambda Q": (b - a, db - da), "entropy term": (c - b, dc - db)}
    return terms | {"all of Eq. 15": (c, dc)}


def critic_term(agent, batch, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 16: its value, and its gradient in the critics' weights."""
    args, next_state = agent.args, batch.next_state.expand(noise.next_action.shape[1], -1, -1)
    with torch.no_grad():
        a = erdp.sample_actions(agent.policy_ema, agent.sde, next_state, noise.next_action, args.clip_denoised)
    loss = erdp.critic_loss(agent.critics, agent.critics_target, batch, next_state, a, args)["critic_loss"]
    return loss.detach(), gradient(loss, agent.critics)


def terms_table(agent, data) -> str:
    """Of each term of Eq. 15, their sum, and Eq. 16."""
    found = {}
    for batch, noise in batches(data, agent.args, BATCHES):
        terms = policy_terms(agent, batch, noise) | {"Eq. 16": critic_term(agent, batch, noise)}
        for name, (value, g) in terms.items():
            found.setdefault(name, []).append((value.item(), g.norm().item()))
    lines = [[name, *(f"{x:.4g}" for x in np.mean(each, 0))] for name, each in found.items()]
    return table(["term", "value", "gradient norm"], lines)


def times_table(agent, data) -> str:
    """By diffusion time; of the Q term also at times that --q-time leaves out of training."""
    names = "components of a^0-hat inside the bounds", "norm of the Q term's gradient"
    names += "... its noise over batches, divided by its mean", "norm of the diffusion term's gradient"
    columns = []
    for t in range(1, agent.sde.num_steps + 1):
        inside, q, diffusion = [], [], []
        for batch, noise in batches(data, agent.args, BATCHES):
            noise.t.fill_(t)
            x_t = agent.sde.diffuse(batch.action, noise.t, noise.eps)  # Eq. 4
            with torch.no_grad():
                a_0 = agent.sde.predict_x0(x_t, noise.t, agent.policy(x_t, noise.t, batch.state))  # Eq. 8
            terms = policy_terms(agent, batch, noise, q_time=None)
            inside.append((a_0.abs() <= 1).float().mean())
            q.append(terms["-lambda Q"][1])
            diffusion.append(terms["diffusion loss"][1].norm())
        q = torch.stack(q)  # (BATCHES, P)
        spread = q.var(0).sum()  # of one batch's gradient
        mean = q.mean(0).square().sum() - spread / BATCHES  # squared, without the noise that is left in it
        ratio = f"{(spread / mean).sqrt():.2g}" if mean > 0 else "only noise is seen"
        norms = f"{q.norm(dim=1).mean():.2g}", ratio, f"{np.mean(diffusion):.2g}"
        columns.append([f"{np.mean(inside):.2f}", *norms])
    return table(["t", *range(1, len(columns) + 1)], zip(names, *columns))


# ==== 2. Values and actions ===========================================================================================


def episode_ends(data) -> np.ndarray:
    """The last row of each episode: a terminal one, or one whose next state is not the following row's state."""
    state, next_state, terminal = (np.asarray(x) for x in (data.state, data.next_state, data.terminal))
    return np.append(np.flatnonzero((terminal[:-1] > 0) | (next_state[:-1] != state[1:]).any(1)), len(state) - 1)


def returns_to_go(reward, ends, discount: float) -> np.ndarray:
    """The discounted return from each row to its episode's last."""
    value, last = np.array(reward, np.float64), np.isin(np.arange(len(reward)), ends)
    for i in range(len(value) - 2, -1, -1):
        value[i] += 0 if last[i] else discount * value[i + 1]
    return value


def rows_that_know(data, ends, discount: float) -> np.ndarray:
    """ROWS rows at most that determine their return-to-go; any, where all episodes are cut off too early for that."""
    rows = np.arange(len(data.reward))
    end = ends[np.searchsorted(ends, rows)]
    known = rows[(data.terminal.numpy()[end] > 0) | (discount ** (end - rows) < 0.05)]
    return np.random.default_rng(0).permutation(known if len(known) else rows)[:ROWS]


@torch.no_grad()
def target_q(agent, state, action) -> torch.Tensor:
    """Q (M, N) of the target ensemble, by which the policy acts."""
    return torch.cat([agent.critics_target(*pair) for pair in zip(state.split(512), action.split(512))], 1)


def values_table(agent, q, returns, axis) -> str:
    """Of the target ensemble's Q (M, N) and returns-to-go (N,), which `axis` shows."""
    lines = []
    values = {"ensemble's mean": q.mean(0), "pessimistic value": erdp.pessimistic_value(q, agent.args)}
    for name, x in values.items():
        x = x.numpy()
        axis.plot(returns, x, ".", markersize=2, label=name)
        share, correlation = f"{(x > returns).mean():.0%}", f"{np.corrcoef(x, returns)[0, 1]:.2f}"
        lines.append([name, f"{x.mean():.2f}", f"{x.std():.2f}", share, correlation])
    lines.append(["return-to-go", f"{returns.mean():.2f}", f"{returns.std():.2f}", "", ""])
    axis.axline((returns.mean(), returns.mean()), slope=1, color="gray")
    axis.set(xlabel="the data's discounted return-to-go", ylabel="value", title="Values of the data's actions")
    return table(["what", "mean", "deviation", "above the return-to-go", "correlation with it"], lines)


def worth_table(agent, state, action, q) -> str:
    """Of other actions than the data's, whose Q is given (M, N): the policy's, and two that ignore the state."""
    generator, N, A, T = torch.Generator().manual_seed(0), *action.shape, agent.sde.num_steps
    noise, shuffled = torch.randn(T, N, A, generator=generator), torch.randperm(N, generator=generator)
    others = {
        "the policy's": erdp.sample_actions(agent.policy, agent.sde, state, noise, agent.args.clip_denoised),
        "of another row": action[shuffled],
        "uniform": 2 * torch.rand(N, A, generator=generator) - 1,
    }
    lines = [["the data's", f"{float(q.mean()):.2f}", "", "", ""]]
    for name, other in others.items():
        gain = target_q(agent, state, other.detach()) - q  # (M, N)
        figures = (q + gain).mean(), gain.mean(), gain.mean(0).std(), gain.std(0, correction=0).mean()
        lines.append([name, *(f"{float(x):.2f}" for x in figures)])
    return table(["action", "mean Q", "above the data's", "over states", "over members"], lines)


def starts_table(agent, data, starts, axis) -> str:
    """Of the actions at start states that the data have, of the policy's samples, and as it acts; `axis` shows them."""
    first, A, own = data.state[starts], data.action.shape[1], agent.args.eval_candidates
    near = ((first - first[0]) / (first.std(0, correction=0) + 1e-6)).square().sum(1).argsort()[:64]
    states, taken = first[near].repeat(4, 1).numpy(), {"the data": data.action[starts][near].numpy()}
    actor = erdp.Actor(agent, [states.shape[1]], -np.ones(A), np.ones(A))
    for name, candidates in {"the policy's samples": 1, "as it acts": own}.items():
        agent.args = dataclasses.replace(agent.args, eval_candidates=candidates)
        taken[name] = actor(states, [np.random.default_rng((0, k)) for k in range(len(states))])
    lines = []
    for k, (name, x) in enumerate(taken.items()):
        axis.errorbar(np.arange(A) + k / 6, x.mean(0), x.std(0), fmt="o", label=name)
        away = np.abs(x.mean(0) - taken["the data"].mean(0)).mean()
        lines.append([name, f"{away:.3f}", f"{x.std(0).mean():.3f}", f"{(np.abs(x) > 0.99).mean():.0%}"])
    axis.set(xlabel="dimension of the action", ylabel="mean ± deviation", title="Actions at the start of an episode")
    return table(["whose", "distance from the data", "deviation", "at the bounds"], lines)


# ==== 3. The page =====================================================================================================


def diagnosis(folder: Path, out: Path) -> str:
    agent, data, task, step = load(folder / "checkpoint.pt")
    args, ends = agent.args, episode_ends(data)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    rows = rows_that_know(data, ends, args.discount)
    returns = returns_to_go(data.reward.numpy(), ends, args.discount)[rows]
    state, action = data.state[rows], data.action[rows]
    q = target_q(agent, state, action)
    tables = {
        "By diffusion time": times_table(agent, data),
        f"Values against the data's return-to-go, at {len(rows):,} rows": values_table(agent, q, returns, left),
        "What an action is worth": worth_table(agent, state, action, q),
        "The terms of Eq. 15, and Eq. 16": terms_table(agent, data),
        "Actions at the start of an episode": starts_table(agent, data, np.append(0, ends[:-1] + 1), right),
    }
    for axis in (left, right):
        axis.legend(fontsize="small")
    save(figure, out / "diagnosis.png")
    about = f"""# Diagnosis of {folder.name}

{args.env} on {without_home(task.dataset_id)}: {label(arm_of(vars(args)))}, seed {args.seed}, update {step:,}.
The data: {len(data.reward):,} transitions, mean score of its episodes {task.score(task.data_return):.1f}.
`python results/diagnose.py --help` tells what the tables have.

![Values, actions](diagnosis.png)
"""
    text = "\n".join([about, *(f"## {title}\n\n{made}\n" for title, made in tables.items())])
    (out / "diagnosis.md").write_text(text)
    return text


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, prog="diagnose")
    parser.add_argument("folder", type=Path, help="a run's folder")
    args = start(parser, argv, out=None)
    try:
        print(diagnosis(args.folder, args.out or args.folder))
    except erdp.UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
