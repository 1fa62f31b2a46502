"""Whether `--variant released` computes what the authors' own agent computes, measured against a checkout of theirs.

    git clone https://github.com/ruoqizzz/entropy-offlineRL CHECKOUT  # outside this repository
    python results/equivalence.py CHECKOUT                            # makes the tables of equivalence.md

Their agent and `erdp.Agent` make the same updates in float64, from the same weights, batches and random numbers. Their
code runs as it is, while torch's random functions are replaced. What three of their agents compute is also kept in
equivalence.json: where there is no checkout, test_equivalence.py compares `erdp.Agent` with that.
"""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import h5py
import numpy as np
import torch
from pages import fill, start, table

import erdp

UPDATES, FIRST = 30, 990  # updates, and the number of the first: the policy's average starts at update 1000
BATCH, STATES = 16, 10  # transitions in an update; states in which both choose an action
SIZES = {"gym": (11, 3), "antmaze": (31, 8), "adroit": (45, 24), "kitchen": (59, 9)}  # of state and action
UMAZE, LARGE, HOPPER, PEN = "antmaze-umaze-v0", "antmaze-large-play-v0", "hopper-medium-v2", "pen-human-v1"
MINIMUM = dict(pessimism="min", loss="likelihood", schedule="linear", num_diffusion_steps=7, entropy_coef=0.5)
CASES = {  # name: (row whose settings both take, changes; M = 4 unless given)
    "AntMaze umaze": (UMAZE, {}),
    "AntMaze large (max Q-backup)": (LARGE, {}),
    "Pen": (PEN, {}),
    "Gym": (HOPPER, {}),
    "Kitchen": ("kitchen-mixed-v0", {}),
    "AntMaze large, M = 2": (LARGE, dict(num_critics=2)),
    "AntMaze umaze, M = 64": (UMAZE, dict(num_critics=64)),
    "Gym, M = 64": (HOPPER, dict(num_critics=64)),
    "AntMaze umaze, linear, T = 3": (UMAZE, dict(schedule="linear", num_diffusion_steps=3)),
    "Pen, constant, T = 7": (PEN, dict(schedule="constant", num_diffusion_steps=7)),
    "Gym, vp, T = 10": (HOPPER, dict(schedule="vp", num_diffusion_steps=10)),
    "Gym, T = 50": (HOPPER, dict(num_diffusion_steps=50)),
    "AntMaze umaze, beta 1, alpha 0.5, eta 0.3": (UMAZE, dict(lcb_coef=1.0, entropy_coef=0.5, eta=0.3)),
    "Gym, beta 8, alpha 0": (HOPPER, dict(lcb_coef=8.0, entropy_coef=0.0)),
    "AntMaze umaze, gradient norm 0.05": (UMAZE, dict(grad_norm=0.05)),
    "Gym, gradient norm 1e6": (HOPPER, dict(grad_norm=1e6)),
    "Pen, minimum, likelihood, linear, T = 7, alpha 0.5": (PEN, MINIMUM),
}
KEPT = "AntMaze large (max Q-backup)", "Gym, vp, T = 10", "Pen, minimum, likelihood, linear, T = 7, alpha 0.5"
CHANGES = {  # of our settings alone, for AntMaze umaze, to show what the comparison sees
    "target rate 0.005 + 2e-6": dict(target_rate=0.005 + 2e-6),
    "EMA rate 0.005 + 2e-6": dict(ema_rate=0.005 + 2e-6),
    "EMA from update 1001 on": dict(ema_start=1001),
    "discount 0.99 + 1e-6": dict(discount=0.99 + 1e-6),
    "beta 4 + 1e-6": dict(lcb_coef=4 + 1e-6),
    "gradient norm 4 + 1e-6": dict(grad_norm=4 + 1e-6),
}
NETWORKS = "policy", "policy EMA", "critics", "target critics"
COLUMNS = "observations", "actions", "rewards", "next_observations", "terminals"  # of their data, as in erdp.Batch


def settings(row: str, changes: dict) -> erdp.Args:
    """The settings of a case."""
    changes = dict(variant="released", num_critics=4) | changes
    return dataclasses.replace(erdp.preset(row, device="cpu"), **changes)


class Draws:
    """All that is random in a case, in float64 and from NumPy's RandomState, whose numbers stay the same for good."""

    def __init__(self, args: erdp.Args):
        self.args, self.rng = args, np.random.RandomState(0)
        self.sizes = S, A = SIZES[erdp.ROWS[args.env].domain]
        N = UPDATES * BATCH
        action, terminal = self.uniform(-1, 1, N, A), (self.uniform(0, 1, N) < 0.1).double()
        self.data = erdp.Batch(self.normal(N, S), action, self.normal(N), self.normal(N, S), terminal)

    def normal(self, *shape):
        return torch.from_numpy(self.rng.standard_normal(shape))

    def uniform(self, low, high, *shape):
        return torch.from_numpy(self.rng.uniform(low, high, shape))

    def weights(self, shape):
        """The weights of a layer: those of Q's last one are large, so that members of the ensemble disagree."""
        bound = 3 if shape[-1] == 1 else 1 / 16
        return self.uniform(-bound, bound, *shape)

    def updates(self):
        """Of each update the rows of its batch (B,), and its noise."""
        T, C, A = self.args.num_diffusion_steps, 10 if self.args.max_q_backup else 1, self.sizes[1]
        for rows in torch.arange(UPDATES * BATCH).split(BATCH):
            t = torch.from_numpy(self.rng.randint(1, T + 1, BATCH))
            yield rows, erdp.Noise(t, self.normal(BATCH, A), self.normal(BATCH, A), self.normal(T, C, BATCH, A))

    def choices(self):
        """Of each choice of an action a state (1, S), noise (T, 1, C, A), and a uniform number (1, 1)."""
        shape = self.args.num_diffusion_steps, 1, self.args.eval_candidates, self.sizes[1]
        for state in self.data.next_state[:STATES].split(1):
            yield state, self.normal(*shape), self.uniform(0, 1, 1, 1)


class Ours:
    """`erdp.Agent` at update FIRST. The minimum is taken as theirs takes it: in the policy loss alone."""

    def __init__(self, args: erdp.Args):
        self.draws, self.value = Draws(args), erdp.PESSIMISM[args.pessimism]
        self.agent = agent = erdp.Agent(*self.draws.sizes, dataclasses.replace(args, pessimism="lcb"))
        agent.sde = erdp.MeanRevertingSDE(args.num_diffusion_steps, args.schedule, dtype=torch.float64)
        agent.updates.fill_(FIRST)
        self.networks = agent.policy, agent.policy_ema, agent.critics, agent.critics_target

    def update(self, rows, noise) -> list:
        """The erdp.METRICS of one update."""
        batch = erdp.Batch(*(column[rows] for column in self.draws.data))
        with mock.patch.dict(erdp.PESSIMISM, lcb=self.value):
            measured = erdp.update(self.agent, batch, noise)
        return [measured[name].item() for name in erdp.METRICS]

    def choose(self, state, noise, u):
        """The action (A,) in a state, one of many candidates."""
        agent = self.agent
        return erdp.act(agent.policy, agent.critics_target, agent.sde, state, noise, u, agent.args)[0]


def in_float64():
    """Within it code that asks torch for float32 gets float64."""
    return mock.patch.multiple(torch, float32=torch.float64, FloatTensor=torch.DoubleTensor)


def feeding(**values: list):
    """Within it the random functions of torch that are named return these values in turn."""
    return mock.patch.multiple(torch, **{name: mock.Mock(side_effect=each) for name, each in values.items()})


def as_they_draw(noise) -> tuple:
    """x_T and the noise of the steps from noise (T, C, B, A): a state's candidates stand side by side, as (B C, A)."""
    x_T, *steps = noise.transpose(1, 2).flatten(1, 2)
    return x_T, [*steps, x_T]  # at the last step they multiply noise by 0


def their_settings(args: erdp.Args) -> dict:
    """What the authors' agent is given for `args`, beside its sizes."""
    options = dict(eta=args.eta, lr=args.lr, schedule=args.schedule, n_timesteps=args.num_diffusion_steps)
    options |= dict(max_q_backup=args.max_q_backup, grad_norm=args.grad_norm, num_critics=args.num_critics)
    options |= dict(pess_method=args.pessimism, lcb_coef=args.lcb_coef, ent_coef=args.entropy_coef)
    options |= dict(loss_type=dict(noise="NML", likelihood="MLL")[args.loss], action_clip=args.clip_denoised)
    return options | dict(max_action=1.0, device=args.device, discount=args.discount, tau=args.target_rate)


class Theirs:
    """The authors' agent at update FIRST, made as their main.py makes it."""

    def __init__(self, code, args: erdp.Args):
        self.draws = Draws(args)
        data = {name: column.numpy() for name, column in zip(COLUMNS, self.draws.data)}
        with in_float64(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            self.sampler = code.sampler.Data_Sampler(data, "cpu")
            self.agent = agent = code.eql.Diffusion_EQL(*self.draws.sizes, **their_settings(args))
        agent.step = FIRST
        self.networks = agent.actor, agent.ema_model, agent.critic, agent.critic_target

    def update(self, rows, noise) -> list:
        """The erdp.METRICS of one iteration of their `train`."""
        x_T, steps = as_they_draw(noise.next_action)
        draws = dict(randn=[x_T, noise.a_T], randn_like=[*steps, noise.eps], randint=[rows, noise.t[:, None] - 1])
        q = []
        with feeding(**draws), self.agent.critic.register_forward_hook(lambda *call: q.append(call[-1].detach())):
            metric = self.agent.train(self.sampler, 1, len(rows))
        of_data, of_policy = q
        lcb = -metric["ql_loss"][0] * of_policy.abs().mean()  # they log the Q term divided by that magnitude
        losses = [metric[name][0] for name in ("critic_loss", "actor_loss", "bc_loss")]
        return [*losses, of_data.mean().item(), lcb.item(), metric["entropy"][0]]

    def choose(self, state, noise, u):
        """As Ours.choose."""
        x_T, steps = as_they_draw(noise.transpose(1, 2))
        draw_one = mock.patch.object(torch, "multinomial", lambda p, number: torch.searchsorted(p.cumsum(0), u[0]))
        with in_float64(), feeding(randn=[x_T], randn_like=steps), draw_one:
            return torch.from_numpy(self.agent.sample_action(state.numpy()))


class Result(NamedTuple):
    """What an agent computes in a case."""

    metrics: np.ndarray  # (UPDATES, 6)
    change: list  # of the weights of each of the four networks by all updates, as a vector
    below: torch.Tensor  # (STATES, C) of the candidates for an action, the probabilities summed up
    actions: torch.Tensor  # (STATES, A)


def run(agent: Ours | Theirs) -> Result:
    """Gives the agent weights that are drawn, makes all updates, then chooses actions."""
    draws, networks = agent.draws, []
    for network in agent.networks:
        weights = list(network.parameters())
        if isinstance(network, erdp.QEnsemble):  # in the order in which the authors' modules hold them
            weights = [w for layer in zip(network.weights, network.biases) for w in layer]
        for w in weights:
            w.data = draws.weights(w.shape)
        networks.append(weights)
    before = [torch.nn.utils.parameters_to_vector(weights).detach() for weights in networks]
    metrics = np.array([agent.update(*each) for each in draws.updates()])
    after = [torch.nn.utils.parameters_to_vector(weights).detach() for weights in networks]
    with torch.no_grad(), mock.patch.object(torch, "searchsorted", wraps=torch.searchsorted) as search:
        actions = torch.stack([agent.choose(*each) for each in draws.choices()])
    below = torch.stack([call.args[0].flatten() for call in search.call_args_list])
    return Result(metrics, [a - b for a, b in zip(after, before)], below, actions)


def compare(ours: Result, theirs: Result) -> list:
    """The largest differences: of the metrics, of each network's weights, and of acting."""
    metrics = np.abs(ours.metrics - theirs.metrics).max(0) / np.abs(theirs.metrics).max(0)
    networks = [(a - b).norm() / b.norm() for a, b in zip(ours.change, theirs.change)]
    acting = [(ours.below - theirs.below).abs().max(), (ours.actions - theirs.actions).abs().max()]
    return [f"{x:.0e}" for x in (metrics.max(), *networks, *acting)]


def figures(result: Result) -> dict:
    """What equivalence.json keeps."""
    return dict(
        metrics=dict(zip(erdp.METRICS, result.metrics.T.tolist())),
        moved=[change.norm().item() for change in result.change],
        actions=result.actions.mean(1).tolist(),
    )


def data_lines(code) -> list[list]:
    """Lines of the table on data: for a made-up D4RL file, the largest difference in each column."""
    rng, rows, lines = np.random.default_rng(0), 2000, []
    file = dict(observations=rng.normal(size=(rows, 11)), actions=rng.uniform(-1, 1, (rows, 3)))
    file |= dict(terminals=rng.random(rows) < 0.05, timeouts=rng.random(rows) < 0.05)
    for domain, tune in dict(gym="no", antmaze="cql_antmaze", adroit="normalize").items():
        file["rewards"] = rng.random(rows) < 0.1 if domain == "antmaze" else rng.normal(100, 30, rows)
        rewarded = erdp.DOMAINS["gym"]._replace(reward=erdp.DOMAINS[domain].reward)
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(erdp.DOMAINS, gym=rewarded):
            path = f"{folder}/made-up.hdf5"
            with h5py.File(path, "w") as written:
                for name, column in file.items():
                    written[name] = column.astype(np.float32)
            _, ours = erdp.load_data(erdp.Args(env=HOPPER, dataset=path))
        kept = np.flatnonzero(~file["timeouts"][:-1])  # what d4rl.qlearning_dataset keeps
        arrays = file | dict(next_observations=file["observations"][1:])
        arrays = {name: arrays[name][kept].astype(np.float32) for name in COLUMNS}
        theirs, N = code.sampler.Data_Sampler(arrays, "cpu", tune), len(kept)
        reward = theirs.reward[:, 0] * ((N / (N - 1)) ** 0.5 if domain == "adroit" else 1)
        columns = theirs.state, theirs.action, reward, theirs.next_state, 1 - theirs.not_done[:, 0]
        differences = [(a - b).abs().max().item() for a, b in zip(ours, columns)]
        lines.append([domain, N, *(f"{x:.0e}" for x in differences)])
    return lines


def import_checkout(path: Path) -> SimpleNamespace:
    """The authors' modules, and the commit that is checked out."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(path))
    with in_float64():
        eql = importlib.import_module("agents.eql_diffusion")
        sampler = importlib.import_module("utils.data_sampler")
    eql.tqdm = iter  # no progress bar
    git = ["git", "-C", str(path), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return SimpleNamespace(eql=eql, sampler=sampler, commit=commit)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of ruoqizzz/entropy-offlineRL")
    options = start(parser, argv)
    checkout, out = options.checkout, options.out
    if not (checkout / "agents/eql_diffusion.py").exists():
        parser.error(f"{checkout} is not a checkout of ruoqizzz/entropy-offlineRL")
    code = import_checkout(checkout)
    data = data_lines(code)
    torch.set_default_dtype(torch.float64)  # of what their code makes without naming a type
    agents, changed, kept = [], [], {}
    for name, case in CASES.items():
        args = settings(*case)
        theirs = run(Theirs(code, args))
        agents.append([name, *compare(run(Ours(args)), theirs)])
        if name in KEPT:
            kept[name] = figures(theirs)
    args = settings(UMAZE, {})
    theirs = run(Theirs(code, args))
    for name, setting in CHANGES.items():
        ours = run(Ours(dataclasses.replace(args, **setting)))
        changed.append([name, *compare(ours, theirs)])
    (out / "equivalence.json").write_text(json.dumps(kept) + "\n")
    header = ["metrics", *NETWORKS, "p", "action"]
    fill(
        "equivalence.md",
        out,
        commit=f"The authors' repository ruoqizzz/entropy-offlineRL at commit `{code.commit}`.",
        agents=table(["settings", *header], agents),
        changed=table(["change", *header], changed),
        data=table(["domain", "N", *erdp.Batch._fields], data),
    )


if __name__ == "__main__":
    main()
