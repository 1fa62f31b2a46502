"""A look into one run: what each diffusion time gives the policy to learn from; its values, actions and gradients.

    python results/diagnose.py RUN_FOLDER                # writes diagnosis.md and diagnosis.png there
    python results/diagnose.py RUN_FOLDER --out FOLDER

It reads the run's checkpoint.pt and the data that the run was trained on.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from pages import save, start, table
from runs import arm_of, label, without_home

import erdp

BATCHES = 20  # over which gradients are averaged


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


def gradient(loss, module) -> torch.Tensor:
    """The gradient of `loss` in the weights of `module`, as one vector."""
    return torch.cat([g.ravel() for g in torch.autograd.grad(loss, list(module.parameters()))])


def batches(data, args, count: int = BATCHES):
    """That many batches of the data, each with its noise, whose buffers the next one fills; always the same ones."""
    generator, noise = torch.Generator().manual_seed(0), erdp.noise_buffers(args, data.action.shape[1], "cpu")
    rows = torch.empty(args.batch_size, dtype=torch.int64)
    for _ in range(count):
        rows.random_(0, len(data.reward), generator=generator)
        erdp.sample_noise(noise, generator)
        yield erdp.Batch(*(column[rows] for column in data)), noise


def at_time(agent, batch, noise, t: int):
    """Of a batch diffused to time t alone: the share of a^0-hat's components inside the bounds, and the gradients (P,)
    of the Q term, lambda included, and of the diffusion term in the policy's weights."""
    args, sde, times = agent.args, agent.sde, torch.full_like(noise.t, t)
    with torch.no_grad():
        q_data = agent.critics(batch.state, batch.action)
    x_t = sde.diffuse(batch.action, times, noise.eps)  # Eq. 4
    eps_hat = agent.policy(x_t, times, batch.state)
    l_diff = erdp.LOSSES[args.loss](sde, batch.action, x_t, times, noise.eps, eps_hat)
    diffusion = gradient(l_diff, agent.policy)
    eps_hat = agent.policy(x_t, times, batch.state)
    a_0 = sde.predict_x0(x_t, times, eps_hat)  # Eq. 8
    q = agent.critics(batch.state, a_0.clamp(-1, 1), frozen=True)  # (M, B)
    size = q if args.variant == "released" else erdp.pessimistic_value(q_data, args)
    term = -args.eta / size.abs().mean().detach() * erdp.pessimistic_value(q, args).mean()
    return (a_0.abs() <= 1).float().mean(), gradient(term, agent.policy), diffusion


def by_time(agent, data, count: int = BATCHES) -> dict[str, list[str]]:
    """The table by diffusion time: a line for each measure, over t = 1..T."""
    names = "components of a^0-hat inside the bounds", "norm of the Q term's gradient"
    names += "... its noise over batches, divided by its mean", "norm of the diffusion term's gradient"
    lines = {name: [] for name in names}
    for t in range(1, agent.sde.num_steps + 1):
        found = [at_time(agent, batch, noise, t) for batch, noise in batches(data, agent.args, count)]
        inside, q, diffusion = (torch.stack(column) for column in zip(*found))
        noise = q.var(0).sum()  # of one batch's gradient
        mean = q.mean(0).square().sum() - noise / count  # squared, without the noise that is left in it
        ratio = f"{(noise / mean).sqrt():.2g}" if mean > 0 else "only noise is seen"
        norms = f"{q.norm(dim=1).mean():.2g}", ratio, f"{diffusion.norm(dim=1).mean():.2g}"
        for line, value in zip(lines.values(), (f"{inside.mean():.2f}", *norms)):
            line.append(value)
    return lines


def loss_terms(agent, data, count: int = BATCHES) -> dict[str, tuple[float, float]]:
    """Each term of Eq. 15, and Eq. 16: its value and the norm of its gradient, means over batches.

    A term is the difference that its settings make to the loss.
    """
    args, found = agent.args, []
    for batch, noise in batches(data, args, count):
        with torch.no_grad():
            next_state = batch.next_state.expand(noise.next_action.shape[1], -1, -1)
            a = erdp.sample_actions(agent.policy_ema, agent.sde, next_state, noise.next_action, args.clip_denoised)
        critic = erdp.critic_loss(agent.critics, agent.critics_target, batch, next_state, a, args)
        sums = []
        for changes in (dict(eta=0.0, entropy_coef=0.0), dict(entropy_coef=0.0), {}):
            changed, q = dataclasses.replace(args, **changes), critic["q"].detach()
            loss = erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, q, changed)["policy_loss"]
            sums.append((loss.detach(), gradient(loss, agent.policy)))
        terms = [sums[0], *((a[0] - b[0], a[1] - b[1]) for a, b in zip(sums[1:], sums)), sums[-1]]
        terms.append((critic["critic_loss"], gradient(critic["critic_loss"], agent.critics)))
        found.append([(value.item(), g.norm().item()) for value, g in terms])
    names = "diffusion loss", "-lambda Q", "entropy term", "all of Eq. 15", "Eq. 16"
    return dict(zip(names, np.mean(found, 0).tolist()))


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


@torch.no_grad()
def target_q(agent, state, action) -> torch.Tensor:
    """Q (M, N) of the target ensemble, by which the policy acts."""
    return torch.cat([agent.critics_target(*pair) for pair in zip(state.split(512), action.split(512))], 1)


def values(agent, q) -> dict[str, np.ndarray]:
    return {"ensemble's mean": q.mean(0).numpy(), "pessimistic value": erdp.pessimistic_value(q, agent.args).numpy()}


@torch.no_grad()
def other_actions(agent, state, action) -> dict[str, torch.Tensor]:
    """Other actions than the data's own for the states of these rows: the policy's, and two that ignore the state."""
    generator, N, A, T = torch.Generator().manual_seed(0), *action.shape, agent.sde.num_steps
    noise, shuffled = torch.randn(T, N, A, generator=generator), torch.randperm(N, generator=generator)
    return {
        "the policy's": erdp.sample_actions(agent.policy, agent.sde, state, noise, agent.args.clip_denoised),
        "of another row": action[shuffled],
        "uniform": 2 * torch.rand(N, A, generator=generator) - 1,
    }


def start_actions(agent, data, starts) -> dict[str, np.ndarray]:
    """Actions (N, A), in [-1, 1], at the 64 start states nearest to the first: the data's, samples, and as it acts."""
    first, A, own = data.state[starts], data.action.shape[1], agent.args.eval_candidates
    near = ((first - first[0]) / (first.std(0, correction=0) + 1e-6)).square().sum(1).argsort()[:64]
    states, taken = first[near].repeat(4, 1).numpy(), {"the data": data.action[starts][near].numpy()}
    actor = erdp.Actor(agent, [states.shape[1]], -np.ones(A), np.ones(A))
    for name, candidates in {"the policy's samples": 1, "as it acts": own}.items():
        agent.args = dataclasses.replace(agent.args, eval_candidates=candidates)
        taken[name] = actor(states, [np.random.default_rng((0, k)) for k in range(len(states))])
    return taken


# ==== 3. The page =====================================================================================================


def diagnosis(folder: Path, out: Path) -> str:
    agent, data, task, step = load(folder / "checkpoint.pt")
    args, ends, rows = agent.args, episode_ends(data), np.arange(len(data.reward))
    starts, end = np.append(0, ends[:-1] + 1), ends[np.searchsorted(ends, rows)]
    returns = returns_to_go(data.reward.numpy(), ends, args.discount)
    known = rows[(data.terminal.numpy()[end] > 0) | (args.discount ** (end - rows) < 0.05)]
    note = "rows that determine their return-to-go: their episode ends terminal, or where the discount is below 0.05"
    if not len(known):
        known, note = rows, "rows; all episodes are cut off while rewards still count: the return-to-go lacks its tail"
    some = np.random.default_rng(0).permutation(known)[:4096]
    true, state, action = returns[some], data.state[some], data.action[some]
    figure, (scatter, axis, bars) = plt.subplots(1, 3, figsize=(18, 5))

    own, lines = target_q(agent, state, action), []
    for name, x in values(agent, own).items():
        scatter.plot(true, x, ".", markersize=2, label=name)
        share, correlation = f"{(x > true).mean():.0%}", f"{np.corrcoef(x, true)[0, 1]:.2f}"
        lines.append([name, f"{x.mean():.2f}", f"{x.std():.2f}", share, correlation])
    lines.append(["return-to-go", f"{true.mean():.2f}", f"{true.std():.2f}", "", ""])
    scatter.axline((true.mean(), true.mean()), slope=1, color="gray")
    scatter.set(xlabel="the data's discounted return-to-go", ylabel="value", title="Values of the data's actions")

    compared = [["the data's", f"{float(own.mean()):.2f}", "", "", ""]]
    for name, other in other_actions(agent, state, action).items():
        gain = target_q(agent, state, other) - own  # (M, N)
        figures = (own + gain).mean(), gain.mean(), gain.mean(0).std(), gain.std(0, correction=0).mean()
        compared.append([name, *(f"{float(x):.2f}" for x in figures)])

    taken, moved = start_actions(agent, data, starts), []
    for k, (name, x) in enumerate(taken.items()):
        axis.errorbar(np.arange(x.shape[1]) + k / 6, x.mean(0), x.std(0), fmt="o", label=name)
        away = np.abs(x.mean(0) - taken["the data"].mean(0)).mean()
        moved.append([name, f"{away:.3f}", f"{x.std(0).mean():.3f}", f"{(np.abs(x) > 0.99).mean():.0%}"])
    axis.set(xlabel="dimension of the action", ylabel="mean ± deviation", title="Actions at the start of an episode")

    terms = loss_terms(agent, data)
    bars.bar(list(terms), [norm for _, norm in terms.values()])
    bars.set(yscale="log", ylabel="gradient norm before clipping", title="The terms of the losses")
    for panel in (scatter, axis):
        panel.legend(fontsize="small")
    save(figure, out / "diagnosis.png")
    times = [[name, *line] for name, line in by_time(agent, data).items()]
    norms = [[name, f"{v:.4g}", f"{norm:.4g}"] for name, (v, norm) in terms.items()]
    name = without_home(task.dataset_id)
    unseen = f"This policy was trained without the Q term at the times after {args.q_time}.\n"
    text = f"""# Diagnosis of {folder.name}

`python results/diagnose.py runs/{folder.name}`, at update {step:,}. {args.env} on {name}:
{label(arm_of(vars(args)))}, seed {args.seed}.
The data: {len(rows):,} transitions, mean score of its episodes {task.score(task.data_return):.1f}.

## By diffusion time

Eq. 12 takes a^0-hat of Eq. 8 at every time. {BATCHES} batches of {args.batch_size} rows, all diffused to the time of
the column. Gradients are in the policy's weights. Norm: of one batch's gradient, mean over batches. Noise: the
deviation of one batch's gradient from the mean one, divided by the norm of the latter.
{unseen if args.q_time else ""}
{table(["t", *range(1, agent.sde.num_steps + 1)], times)}

## Values against the data's return-to-go

The target ensemble at {len(some):,} {note}.
Rewards are scaled as in training. A policy that is better than the data has higher values than it.

{table(["what", "mean", "deviation", "above the return-to-go", "correlation with it"], lines)}

## What an action is worth

Q at the same states for other actions, and by how much it is above Q of the data's: mean and deviation over states of
the ensemble's mean, and the members' deviation around it, mean over states.

{table(["action", "mean Q", "above the data's", "over states", "over members"], compared)}

## Actions at the start of an episode

At {len(taken["the data"])} start states near the first one, on the scale from -1 to 1. Distance: of the means; it and
the deviation are averages over dimensions.

{table(["whose", "distance from the data", "deviation", "at the bounds"], moved)}

## The terms of Eq. 15, and Eq. 16

Means over {BATCHES} batches. The policy's gradient and the critics' are clipped at {args.grad_norm:g}.

{table(["term", "value", "gradient norm"], norms)}

![Values, actions, gradients](diagnosis.png)
"""
    (out / "diagnosis.md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="diagnose")
    parser.add_argument("folder", type=Path, help="a run's folder")
    args = start(parser, argv, out=None)
    try:
        print(diagnosis(args.folder, args.out or args.folder))
    except erdp.UserError as error:
        print(f"diagnose: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
