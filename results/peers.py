"""Is there anything for Q to win on a data set? Plain small peers on the loader and evaluation of erdp.py.

    python results/peers.py regression --env ROW [--dataset ...] [--seed 0] [--steps 60000] [--episodes 60]
    python results/peers.py td3bc ...
    python results/peers.py iql ...

`regression` fits the mean action. `td3bc` is TD3+BC (Fujimoto and Gu, 2021): clipped double Q, target policy smoothing,
every second update the policy ascends Q at alpha = 2.5 beside the squared error to the data's action. `iql` is IQL
(Kostrikov, Nair and Levine, 2021): V is an expectile of Q over the data's actions, and the policy, here a mean without
a deviation, is fitted to these with weights exp(advantage). All are networks of two hidden layers of 256 units on
normalised states. Where none is above regression, a method that learns with Q cannot be expected to be above cloning,
and the data are at fault. Each run adds a line to peers.jsonl in the current folder, or in that of `--out`;
`results/report.py` has a table of them.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from pages import start
from torch import nn

import erdp

BATCH, HIDDEN, LEARNING_RATE, DISCOUNT, TARGET_RATE = 256, 256, 3e-4, 0.99, 0.005  # the authors'
EXPECTILE, TEMPERATURE = 0.7, 3.0  # of IQL, its authors' for locomotion
SPARSE = 0.9, 10.0  # ... and for AntMaze


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    hidden = nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


class Policy(nn.Module):
    """Normalised states (..., S) -> actions (..., A) in [-1, 1]; called with raw states, it acts as an erdp.Actor."""

    def __init__(self, state, task: erdp.Task):
        super().__init__()
        self.mean, self.std = state.mean(0), state.std(0) + 1e-3
        self.low, self.high = np.array([task.low, task.high], task.dtype)
        self.net = nn.Sequential(mlp(state.shape[1], self.low.size), nn.Tanh())

    def normalise(self, state):
        return (state - self.mean) / self.std

    @torch.no_grad()
    def forward(self, state, streams=None) -> np.ndarray:
        action = self.net(self.normalise(torch.as_tensor(state, dtype=torch.float32))).double().numpy()
        action = action.reshape(-1, *self.low.shape)
        action = self.low + (action + 1) / 2 * (self.high - self.low)
        return np.clip(action, self.low, self.high).astype(self.low.dtype)


class Regression:
    def __init__(self, policy: Policy, data: erdp.Batch, steps: int):
        self.net = policy.net
        self.target_net = copy.deepcopy(policy.net)
        inputs = data.state.shape[1] + data.action.shape[1]
        self.q = nn.ModuleList(mlp(inputs, 1) for _ in range(2))
        self.target_q = copy.deepcopy(self.q)
        self.optimizer = torch.optim.Adam(self.net.parameters(), LEARNING_RATE)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), LEARNING_RATE)

    def update(self, batch: erdp.Batch, step: int):
        descend((self.net(batch.state) - batch.action).square().mean(), self.optimizer)

    def fit_q(self, batch: erdp.Batch, next_value):
        target = batch.reward + DISCOUNT * (1 - batch.terminal) * next_value
        descend((values(self.q, batch.state, batch.action) - target).square().mean(), self.q_optimizer)


class TD3BC(Regression):
    def update(self, batch: erdp.Batch, step: int):
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(batch.action)).clamp(-0.5, 0.5)
            action = (self.target_net(batch.next_state) + noise).clamp(-1, 1)
            next_value = values(self.target_q, batch.next_state, action).amin(0)
        self.fit_q(batch, next_value)
        if step % 2:
            action = self.net(batch.state)
            q = values(self.q[:1], batch.state, action)
            loss = (action - batch.action).square().mean() - 2.5 * q.mean() / q.abs().mean().detach()
            descend(loss, self.optimizer)
            erdp.soft_update(self.target_net, self.net, TARGET_RATE)
            erdp.soft_update(self.target_q, self.q, TARGET_RATE)


class IQL(Regression):
    """Rewards are scaled to a mean magnitude of 1, in place of the authors' scale by the range of returns; AntMaze's
    are -1 a step and 0 at the goal, as theirs."""

    def __init__(self, policy: Policy, data: erdp.Batch, steps: int, sparse: bool = False):
        super().__init__(policy, data, steps)
        self.v = mlp(data.state.shape[1], 1)
        self.v_optimizer = torch.optim.Adam(self.v.parameters(), LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.expectile, self.temperature = SPARSE if sparse else (EXPECTILE, TEMPERATURE)
        self.scale, self.shift = (0.25, -0.5) if sparse else (1 / float(data.reward.abs().mean()), 0.0)

    def update(self, batch: erdp.Batch, step: int):
        batch = batch._replace(reward=self.scale * batch.reward + self.shift)
        with torch.no_grad():
            q = values(self.target_q, batch.state, batch.action).amin(0)
        above = q - self.v(batch.state)[:, 0]
        weight = torch.where(above > 0, self.expectile, 1 - self.expectile)
        descend((weight * above.square()).mean(), self.v_optimizer)
        with torch.no_grad():
            next_value = self.v(batch.next_state)[:, 0]
            advantage = q - self.v(batch.state)[:, 0]
        self.fit_q(batch, next_value)
        weight = (self.temperature * advantage).exp().clamp(max=100)
        descend((weight * (self.net(batch.state) - batch.action).square().sum(-1)).mean(), self.optimizer)
        self.schedule.step()
        erdp.soft_update(self.target_q, self.q, TARGET_RATE)


PEERS = {"regression": Regression, "td3bc": TD3BC, "iql": IQL}


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
    words += ["--dataset", args.dataset] * bool(args.dataset) + ["--eval-env", args.eval_env] * bool(args.eval_env)
    with erdp.refusing(f"{args.dataset or args.env} cannot be learned from"):
        task, data = erdp.load_data(erdp.parse(words))
    torch.manual_seed(args.seed)
    policy = Policy(data.state, task)
    options = dict(sparse=True) if (args.peer, task.domain) == ("iql", "antmaze") else {}
    peer = PEERS[args.peer](policy, data, args.steps, **options)
    data = data._replace(state=policy.normalise(data.state), next_state=policy.normalise(data.next_state))
    for step in range(args.steps):
        rows = torch.randint(len(data.reward), (BATCH,))
        peer.update(erdp.Batch(*(column[rows] for column in data)), step)
    with erdp.playing(task, args.episodes) as envs:
        score = task.score(erdp.evaluate(policy, envs, args.episodes, args.seed)["return"])
    about = dict(env=args.env, dataset=task.dataset_id.rpartition("/")[2], data=task.score(task.data_return))
    about |= dict(peer=args.peer, steps=args.steps, seed=args.seed, episodes=args.episodes)
    return about | dict(score=float(score.mean()), error=float(score.std() / args.episodes**0.5))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="peers.py")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--env", choices=erdp.ROWS, default="own", help="a row of the paper's tables")
    parser.add_argument("--dataset", help="data in place of the row's own")
    parser.add_argument("--eval-env", help="an environment in place of the row's or the data's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60_000, help="updates")
    parser.add_argument("--episodes", type=int, default=60)
    args = start(parser, argv, out=Path())
    try:
        line = run(args)
    except erdp.UserError as error:
        parser.error(str(error))
    print(json.dumps(line))
    with open(args.out / "peers.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
