"""Is there anything for Q to win on a data set? Plain small peers on the loader and evaluation of erdp.py.

    python results/peers.py regression --env ROW [--dataset ...] [--seed 0] [--steps 60000] [--episodes 60]
    python results/peers.py td3bc ...

`regression` fits the mean action. `td3bc` is TD3+BC (Fujimoto and Gu, 2021): clipped double Q, target policy smoothing,
every second update the policy ascends Q at alpha = 2.5 beside the squared error to the data's action. Both are networks
of two hidden layers of 256 units on normalised states. Where td3bc is not above regression, a method that learns with Q
cannot be expected to be above cloning, and the data are at fault. Each run is kept as a line of peers.jsonl, of which
peers.md is made.
"""

import argparse
import contextlib
import copy
import json

import numpy as np
import torch
from pages import start, table
from torch import nn

import erdp

BATCH, HIDDEN, LEARNING_RATE, DISCOUNT, TARGET_RATE = 256, 256, 3e-4, 0.99, 0.005  # the authors'


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    hidden = nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


class Policy(nn.Module):
    """Normalised states (..., S) -> actions (..., A) in [-1, 1]; called with raw states, it acts as an erdp.Actor."""

    def __init__(self, state, action_dim: int, low, high):
        super().__init__()
        self.mean, self.std, self.low, self.high = state.mean(0), state.std(0) + 1e-3, low, high
        self.net = nn.Sequential(mlp(state.shape[1], action_dim), nn.Tanh())

    def normalise(self, state):
        return (state - self.mean) / self.std

    @torch.no_grad()
    def forward(self, state, streams=None) -> np.ndarray:
        action = self.net(self.normalise(torch.as_tensor(state, dtype=torch.float32))).double().numpy()
        action = action.reshape(-1, *self.low.shape)
        return np.clip(self.low + (action + 1) / 2 * (self.high - self.low), self.low, self.high)


class Peer:
    """A policy, for td3bc with two Q-functions and the targets of all three."""

    def __init__(self, policy: Policy, state_dim: int, action_dim: int):
        self.policy = policy
        self.target_net = copy.deepcopy(policy.net)
        self.q = nn.ModuleList(mlp(state_dim + action_dim, 1) for _ in range(2))
        self.target_q = copy.deepcopy(self.q)
        self.policy_optimizer = torch.optim.Adam(policy.net.parameters(), LEARNING_RATE)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), LEARNING_RATE)

    def imitate(self, batch: erdp.Batch):
        descend((self.policy.net(batch.state) - batch.action).square().mean(), self.policy_optimizer)

    def learn_q(self, batch: erdp.Batch):
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(batch.action)).clamp(-0.5, 0.5)
            action = (self.target_net(batch.next_state) + noise).clamp(-1, 1)
            value = values(self.target_q, batch.next_state, action).amin(0)
            target = batch.reward + DISCOUNT * (1 - batch.terminal) * value
        descend((values(self.q, batch.state, batch.action) - target).square().mean(), self.q_optimizer)

    def learn_policy(self, batch: erdp.Batch):
        action = self.policy.net(batch.state)
        q = values(self.q[:1], batch.state, action)
        loss = (action - batch.action).square().mean() - 2.5 * q.mean() / q.abs().mean().detach()
        descend(loss, self.policy_optimizer)
        erdp.soft_update(self.target_net, self.policy.net, TARGET_RATE)
        erdp.soft_update(self.target_q, self.q, TARGET_RATE)


def values(critics, state, action):
    """Q of each critic, (critics, B)."""
    return torch.stack([q(torch.cat([state, action], -1))[:, 0] for q in critics])


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def run(args) -> dict:
    """Trains a peer and plays its episodes. Returns its line of peers.jsonl. Raises UserError."""
    words = ["--env", args.env, "--seed", str(args.seed), "--device", "cpu"]
    settings = erdp.parse(words + ["--dataset", args.dataset] * bool(args.dataset))
    task = erdp.open_task(settings)
    data = erdp.load_data(task, settings)
    torch.manual_seed(args.seed)
    policy = Policy(data.state, data.action.shape[1], task.low, task.high)
    peer = Peer(policy, data.state.shape[1], data.action.shape[1])
    data = data._replace(state=policy.normalise(data.state), next_state=policy.normalise(data.next_state))
    for step in range(args.steps):
        rows = torch.randint(len(data.reward), (BATCH,))
        batch = erdp.Batch(*(column[rows] for column in data))
        if args.peer == "regression":
            peer.imitate(batch)
            continue
        peer.learn_q(batch)
        if step % 2:
            peer.learn_policy(batch)
    with contextlib.closing(erdp.make_envs(task, args.episodes)) as envs:
        score = task.score(erdp.evaluate(policy, envs, args.episodes, args.seed)["return"])
    about = dict(env=args.env, dataset=task.dataset_id.rpartition("/")[2], data=task.score(task.returns.mean()))
    about |= dict(peer=args.peer, steps=args.steps, seed=args.seed, episodes=args.episodes)
    return about | dict(score=float(score.mean()), error=float(score.std() / args.episodes**0.5))


def page(lines: list[dict]) -> str:
    order = sorted(lines, key=lambda line: (line["dataset"], line["peer"], line["steps"], line["seed"]))
    rows = []
    for line in order:
        names = (line[name] for name in ("dataset", "peer", "seed"))
        score = f"{line['score']:.1f} ± {line['error']:.1f}"
        rows.append([*names, f"{line['steps']:,}", line["episodes"], score, f"{line['data']:.1f}"])
    header = "data set", "peer", "seed", "updates", "episodes", "score ± standard error", "the data's own"
    return f"""# Plain peers: what there is to win

Made by `python results/peers.py PEER --env ROW --dataset ...`, a line a run; the script says what the peers are. Scores
are those of the last policy, normalised as D4RL's; the error is over episodes, not over seeds.

{table(header, rows)}
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="peers.py")
    parser.add_argument("peer", choices=["regression", "td3bc"])
    parser.add_argument("--env", required=True, help="a row of the paper's tables")
    parser.add_argument("--dataset", help="data in place of the row's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60_000, help="updates")
    parser.add_argument("--episodes", type=int, default=60)
    args = start(parser, argv)
    try:
        line = run(args)
    except erdp.UserError as error:
        parser.error(str(error))
    print(json.dumps(line))
    kept = args.out / "peers.jsonl"
    with open(kept, "a") as file:
        file.write(json.dumps(line) + "\n")
    (args.out / "peers.md").write_text(page([json.loads(text) for text in kept.read_text().splitlines()]))


if __name__ == "__main__":
    main()
