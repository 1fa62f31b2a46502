"""Whether `--variant released` computes what the authors' own agent computes, measured against a checkout of theirs.

    git clone https://github.com/ruoqizzz/entropy-offlineRL CHECKOUT  # outside this repository
    python results/equivalence.py CHECKOUT                            # makes the tables of equivalence.md

Their agent and `erdp.Agent` make the same updates in float64, from the same weights, batches and random numbers. Their
code is imported as it is: what its imports need and the comparison does not (gym, d4rl, loggers, progress bars) is
replaced in sys.modules, and a torch function mode hands it the random numbers and turns its float32 into float64.
"""

import argparse
import dataclasses
import functools
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import torch
from pages import fill, start, table
from torch.overrides import TorchFunctionMode

import erdp

UPDATES, FIRST = 30, 990  # the policy's average starts at update 1000
BATCH, ROWS, STATES = 64, 2_000, 20  # STATES: in which both choose an action
SPREAD = 1000.0  # times the last layer as initialised, so that members of the ensemble disagree
SIZES = {"gym": (11, 3), "antmaze": (31, 8), "adroit": (45, 24), "kitchen": (59, 9)}  # of state and action
UMAZE, LARGE, HOPPER, PEN = "antmaze-umaze-v0", "antmaze-large-play-v0", "hopper-medium-v2", "pen-human-v1"
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
    "Gym, cosine, T = 50": (HOPPER, dict(num_diffusion_steps=50)),
    "AntMaze umaze, beta 1, alpha 0.5, eta 0.3": (UMAZE, dict(lcb_coef=1.0, entropy_coef=0.5, eta=0.3)),
    "Gym, beta 8, alpha 0": (HOPPER, dict(lcb_coef=8.0, entropy_coef=0.0)),
    "AntMaze umaze, gradient norm 0.05": (UMAZE, dict(grad_norm=0.05)),
    "Gym, gradient norm 1e6": (HOPPER, dict(grad_norm=1e6)),
}
CHANGES = {  # in what is theirs, to show what the comparison sees: (row, attribute of Theirs, value)
    "target rate 0.005 + 2e-6": (UMAZE, "agent.tau", 0.005 + 2e-6),
    "EMA decay 0.995 + 2e-6": (UMAZE, "agent.ema.beta", 0.995 + 2e-6),
    "discount 0.99 + 1e-6": (UMAZE, "agent.discount", 0.99 + 1e-6),
    "beta 4 + 1e-6": (UMAZE, "agent.lcb_coef", 4 + 1e-6),
    "gradient norm 4 + 1e-6": (HOPPER, "agent.grad_norm", 4 + 1e-6),
    "update counter one ahead": (UMAZE, "agent.step", FIRST + 1),
    "one diffusion time of the first batch, by one": (UMAZE, "later", 1),
    "the choice's temperature, by 1e-4": (UMAZE, "mode.sharper", 1 + 1e-4),
}
MINIMUM = UMAZE, dict(pessimism="min")
NETWORKS = "policy", "policy EMA", "critics", "target critics"
COLUMNS = "observations", "actions", "rewards", "next_observations", "terminals"  # of their data, as in erdp.Batch
COMMON = 1.0, "cpu", 0.99, 0.005  # of their agents' arguments: bound of the actions, device, discount, target rate


class Ours:
    """`erdp.Agent` in float64 at update FIRST, each of its four networks with weights of its own."""

    def __init__(self, sizes, args):
        self.agent = agent = erdp.Agent(*sizes, args)
        agent.sde = erdp.MeanRevertingSDE(args.num_diffusion_steps, args.schedule, dtype=torch.float64)
        agent.policy_ema.load_state_dict(erdp.NoiseNetwork(*sizes).state_dict())
        agent.critics_target.load_state_dict(erdp.QEnsemble(*sizes, args.num_critics).state_dict())
        for critics in (agent.critics, agent.critics_target):
            critics.weights[-1].data *= SPREAD
            critics.biases[-1].data *= SPREAD
        agent.updates.fill_(FIRST)

    def networks(self) -> dict:
        """Name -> weights, in the order in which the authors' modules hold them."""
        policies = [list(policy.parameters()) for policy in (self.agent.policy, self.agent.policy_ema)]
        for critics in (self.agent.critics, self.agent.critics_target):
            policies.append([w for layer in zip(critics.weights, critics.biases) for w in layer])
        return dict(zip(NETWORKS, policies))

    def choose(self, state, noise, u: float):
        """The action (A,) at `state` (S,) from noise (T, C, A) and a uniform number u, and Fed's `choice`."""
        bound = np.ones(noise.shape[-1])
        stream = SimpleNamespace(standard_normal=lambda *_: noise.numpy(), random=lambda: u)
        with Fed() as mode:
            return erdp.Actor(self.agent, [len(state)], -bound, bound, "float64")(state, [stream]), mode.choice


class Fed(TorchFunctionMode):
    """Within it torch's random functions return `draws` in turn, and float32 becomes float64.

    Where one candidate of many is drawn, theirs by torch.multinomial and ours by torch.searchsorted, `choice` keeps the
    cumulative probabilities (C,) and the number of the one drawn; `sharper` is the inverse temperature of theirs.
    """

    def __init__(self):
        super().__init__()
        self.draws, self.u, self.sharper, self.choice = [], 0.0, 1.0, None

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.randn, torch.randn_like, torch.randint):
            shape = {torch.randn: args, torch.randint: kwargs.get("size", args[-1])}.get(function) or args[0].shape
            wanted, value = self.draws.pop(0)
            assert (function, tuple(shape)) == (wanted, tuple(value.shape)), f"they draw {function} {shape}"
            return value
        if function is torch.multinomial:
            p = args[0] ** self.sharper
            function, args, kwargs = torch.searchsorted, ((p / p.sum()).cumsum(0), torch.tensor([self.u])), {}
        if function is torch.searchsorted:
            chosen = function(*args, **kwargs)
            self.choice = args[0].flatten(), chosen.item()
            return chosen
        if function is torch.Tensor.float or (function is torch.Tensor.to and args[0].dtype == torch.float32):
            return args[0].double()
        if kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def sampler_draws(noise) -> list:
    """Noise (T, C, B, A) as their sampler draws it: a state's candidates side by side, one more at the end, unused."""
    noise = noise.transpose(1, 2).flatten(1, 2)
    return [(torch.randn, noise[0]), *((torch.randn_like, x) for x in (*noise[1:], noise[0]))]


class Theirs:
    """The authors' agent in float64 at update FIRST, made as their main.py makes it."""

    def __init__(self, code, sizes, args, data):
        self.later, self.mode, self.q = 0, Fed(), []
        options = dict(eta=args.eta, lr=args.lr, schedule=args.schedule, n_timesteps=args.num_diffusion_steps)
        options |= dict(max_q_backup=args.max_q_backup, grad_norm=args.grad_norm, num_critics=args.num_critics)
        options |= dict(pess_method=args.pessimism, lcb_coef=args.lcb_coef, ent_coef=args.entropy_coef)
        options |= dict(loss_type=dict(noise="NML", likelihood="MLL")[args.loss], action_clip=args.clip_denoised)
        with self.mode:
            self.sampler = code.main.Data_Sampler(data, "cpu")
            self.agent = code.eql.Diffusion_EQL(*sizes, *COMMON, **options)
        self.agent.step = FIRST
        self.agent.critic.register_forward_hook(lambda *call: self.q.append(call[-1]))  # of the data, and of a^0-hat

    def networks(self) -> dict:
        modules = self.agent.actor, self.agent.ema_model, self.agent.critic, self.agent.critic_target
        return {name: list(module.parameters()) for name, module in zip(NETWORKS, modules)}

    def update(self, rows, noise) -> list:
        """The erdp.METRICS of one iteration of their `train`, which logs the gradients' norms before clipping."""
        t = noise.t - 1
        t[0], self.later = (t[0] + self.later) % len(noise.next_action), 0
        rest = (torch.randn_like, noise.eps), (torch.randint, t[:, None]), (torch.randn, noise.a_T)
        self.mode.draws = [(torch.randint, rows), *sampler_draws(noise.next_action), *rest]
        self.q.clear()
        with self.mode:
            metric = self.agent.train(self.sampler, 1, len(t), log := mock.Mock())
        assert not self.mode.draws, "they draw less"
        self.logged = {call.args[0]: call.args[1] for call in log.add_scalar.call_args_list}
        q_data, q = (values.detach() for values in self.q)
        lcb = -metric["ql_loss"][0] * q.abs().mean()  # they log the Q term, divided by that magnitude
        losses = [metric[name][0] for name in ("critic_loss", "actor_loss", "bc_loss")]
        return [*losses, q_data.mean().item(), lcb.item(), metric["entropy"][0]]

    def choose(self, state, noise, u: float):
        """As Ours.choose."""
        self.mode.draws, self.mode.u = sampler_draws(noise[:, :, None]), u
        with self.mode:
            return self.agent.sample_action(state), self.mode.choice


def import_checkout(path: Path) -> SimpleNamespace:
    """The authors' modules, and the commit that is checked out. Raises erdp.UserError."""
    problem = f"{path} is not a checkout of ruoqizzz/entropy-offlineRL"
    stubs = {name: mock.MagicMock() for name in ("gym", "d4rl", "utils.logger", "torch.utils.tensorboard")}
    stubs["tqdm"] = SimpleNamespace(tqdm=iter)
    sys.dont_write_bytecode = True
    with erdp.refusing(problem, ImportError, subprocess.SubprocessError):
        with mock.patch.dict(sys.modules, stubs), mock.patch.object(sys, "path", [str(path), *sys.path]):
            main, eql, bc = map(importlib.import_module, ("main", "agents.eql_diffusion", "agents.bc_diffusion"))
        git = ["git", "-C", str(path), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
        commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    return SimpleNamespace(main=main, eql=eql, bc=bc, commit=commit)


def furthest(ours, theirs, origin) -> float:
    """Over the tensors of a network: the largest difference of a weight as a share of the tensor's largest movement."""
    pairs = [((a - b).abs().max().item(), (b - o).abs().max().item()) for a, b, o in zip(ours, theirs, origin)]
    return max(difference / (moved or 1) for difference, moved in pairs)


@torch.no_grad()
def compare(code, env: str, changes: dict, change=None, shared_minimum: bool = True) -> list:
    """A line of the table: both agents over UPDATES updates, then the actions that they choose in STATES states."""
    torch.manual_seed(0)
    generator, sizes = torch.Generator().manual_seed(0), SIZES[erdp.ROWS[env].domain]
    here = dict(variant="released", device="cpu", compile=False, precision="float32", batch_size=BATCH, num_critics=4)
    args = dataclasses.replace(erdp.preset(env), **here | changes)
    state, next_state = torch.randn(2, ROWS, sizes[0], generator=generator)
    action, reward = 2 * torch.rand(ROWS, sizes[1], generator=generator) - 1, torch.randn(ROWS, generator=generator)
    data = erdp.Batch(state, action, reward, next_state, (torch.rand(ROWS, generator=generator) < 0.1).double())
    ours, theirs = Ours(sizes, args), Theirs(code, sizes, args, {k: x.numpy() for k, x in zip(COLUMNS, data)})
    origin = {name: [w.clone() for w in weights] for name, weights in ours.networks().items()}
    for name, weights in theirs.networks().items():
        for w, o in zip(weights, origin[name], strict=True):
            w.copy_(o)
    if change:
        *path, last = change[0].split(".")
        setattr(functools.reduce(getattr, path, theirs), last, change[1])
    if not shared_minimum:  # as in theirs: the minimum in the policy loss alone
        ours.agent.args = dataclasses.replace(args, pessimism="lcb")
        with_minimum = {erdp.policy_loss: lambda *x: erdp.policy_loss(*x[:-1], args)}
        ours.agent.compiled = lambda function: with_minimum.get(function, function)
    rows, noise = torch.empty(BATCH, dtype=torch.int64), erdp.noise_buffers(args, sizes[1], "cpu")
    far, losses, clipped = dict.fromkeys(NETWORKS, 0.0), [], np.zeros(2, int)
    for _ in range(UPDATES):
        rows.random_(0, ROWS, generator=generator)
        erdp.sample_noise(noise, generator)
        with torch.enable_grad():
            a = erdp.update(ours.agent, erdp.Batch(*(column[rows] for column in data)), noise)
            b = theirs.update(rows, noise)
        losses.append([[a[name].item() for name in erdp.METRICS], b])
        clipped += [theirs.logged[f"{part} Grad Norm"] > args.grad_norm for part in ("Critic", "Actor")]
        for name, weights in theirs.networks().items():
            far[name] = max(far[name], furthest(ours.networks()[name], weights, origin[name]))
    a, b = np.array(losses).swapaxes(0, 1)  # (UPDATES, 6)
    loss, acts = np.abs(a - b).max(0) / np.abs(b).max(0), []
    for x in next_state[:STATES].float().numpy():
        candidates = torch.randn(args.num_diffusion_steps, args.eval_candidates, sizes[1], generator=generator)
        u = torch.rand((), generator=generator).item()
        (a, (p_a, chosen_a)), (b, (p_b, chosen_b)) = (who.choose(x, candidates, u) for who in (ours, theirs))
        acts.append(((p_a - p_b).abs().max().item(), np.abs(a - b).max(), chosen_a == chosen_b))
    p, apart, same = np.transpose(acts)
    deviation = theirs.agent.critic(state, action).std(1).mean().item()
    first = [args.num_critics, args.num_diffusion_steps, f"{deviation:.2g}", "{} / {}".format(*clipped)]
    numbers = [f"{x:.0e}" for x in (loss.max(), *far.values(), p.max(), apart.max())]
    return [*first, *numbers, f"{same.sum():g} of {STATES}"]


def statements(code) -> list[list]:
    """(statement, what was measured) for the authors' agents as they are, in float32 and with their own randomness."""
    torch.manual_seed(0)
    data = {key: np.random.default_rng(0).random((100, n)) for key, n in zip(COLUMNS, (3, 2, 1, 3, 1))}
    options, sampler, calls, factors = dict(n_timesteps=5, loss_type="NML"), code.main.Data_Sampler(data, "cpu"), [], []
    one, several = (code.eql.Diffusion_EQL(3, 2, *COMMON, **options, num_critics=M) for M in (1, 4))
    loss = one.train(sampler, 1, BATCH)["actor_loss"][0]
    lost = np.mean([w.isnan().all().item() for w in one.actor.parameters()])
    for name, policy in (("policy", several.actor), ("average", several.ema_model)):
        policy.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", wraps=torch.nn.utils.clip_grad_norm_) as clip:
        code.bc.Diffusion_BC(3, 2, *COMMON, **options).train(sampler, 1, BATCH)
        cloning = clip.call_count
        several.train(sampler, 1, BATCH)
    for epochs in (1000, 2000):
        decayed = code.eql.Diffusion_EQL(3, 2, *COMMON, **options, lr_decay=True, lr_maxt=epochs)
        for _ in range(epochs // 50 - 1):  # their main.py calls `train` once per 50 epochs
            decayed.train(sampler, 1, BATCH)
        factors.append(decayed.actor_optimizer.param_groups[0]["lr"] / 3e-4)
    passes = f"{calls.count('policy')} of the policy, {calls.count('average')} of its average for next actions"
    return [
        ["M = 1 gives NaN", f"policy loss {loss:g}; tensors of the policy that are NaN after an update: {lost:.0%}"],
        ["the policy loss takes an x0-hat of Eq. 8, not a chain of T = 5 steps", f"passes in an update: {passes}"],
        ["cloning clips no gradient", f"calls of clip_grad_norm_ in an update: {cloning}, by the other agent 2"],
        ["--lr_decay ends at a factor of 0.999", "{:.5f} with 1,000 epochs, {:.5f} with 2,000".format(*factors)],
    ]


def data_lines(code) -> list[list]:
    """Lines of the table on data: for a made-up D4RL file, the largest difference in each column."""
    rng, lines = np.random.default_rng(0), []
    rows = dict(observations=rng.normal(size=(ROWS, 11)), actions=rng.uniform(-1, 1, (ROWS, 3)))
    rows |= dict(terminals=rng.random(ROWS) < 0.05, timeouts=rng.random(ROWS) < 0.05)
    for domain, tune in dict(gym="no", antmaze="cql_antmaze", adroit="normalize").items():
        rows["rewards"] = rng.random(ROWS) < 0.1 if domain == "antmaze" else rng.normal(100, 30, ROWS)
        with tempfile.TemporaryDirectory() as folder:
            args = erdp.Args(env=HOPPER, dataset=f"{folder}/made-up.hdf5")
            with h5py.File(args.dataset, "w") as file:
                for key, values in rows.items():
                    file[key] = values.astype(np.float32)
            rewarded = erdp.DOMAINS["gym"]._replace(reward=erdp.DOMAINS[domain].reward)
            with mock.patch.dict(erdp.DOMAINS, gym=rewarded):
                _, ours = erdp.load_data(args)
        kept = np.flatnonzero(~rows["timeouts"][:-1])  # what d4rl.qlearning_dataset keeps, in float32
        arrays = dict(rows, next_observations=rows["observations"][1:])
        arrays = {key: values[kept].astype(np.float32) for key, values in arrays.items()}
        theirs, N = code.main.Data_Sampler(arrays, "cpu", tune), len(kept)
        reward = theirs.reward[:, 0] * ((N / (N - 1)) ** 0.5 if domain == "adroit" else 1)
        columns = theirs.state, theirs.action, reward, theirs.next_state, 1 - theirs.not_done[:, 0]
        lines.append([domain, N, *(f"{(a - b).abs().max().item():.0e}" for a, b in zip(ours, columns, strict=True))])
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of ruoqizzz/entropy-offlineRL")
    args = start(parser, argv)
    try:
        code = import_checkout(args.checkout)
    except erdp.UserError as error:
        parser.error(str(error))
    said, data = statements(code), data_lines(code)
    torch.set_default_dtype(torch.float64)
    agents = [[name, *compare(code, *case)] for name, case in CASES.items()]
    changed = [[name, *compare(code, row, {}, change=change)] for name, (row, *change) in CHANGES.items()]
    agents.append(["AntMaze umaze, the minimum in the policy loss alone", *compare(code, *MINIMUM, None, False)])
    changed.append(["none, but `--pessimism min` as it is", *compare(code, *MINIMUM)])
    header = ["M", "T", "deviation", "clipped", "losses", *NETWORKS, "p", "action", "candidate"]
    fill(
        "equivalence.md",
        args.out,
        commit=f"The authors' repository ruoqizzz/entropy-offlineRL at commit `{code.commit}`.",
        agents=table(["settings", *header], agents),
        changed=table(["change", *header], changed),
        data=table(["domain", "N", *erdp.Batch._fields], data),
        statements=table(["statement", "measured"], said),
    )


if __name__ == "__main__":
    main()
