"""The speed of `erdp.update` on this machine, as the program calls it, and what bounds it.

    python results/benchmark.py                                # updates a second for M = 1, 4, 16 and 64
    python results/benchmark.py --env antmaze-medium-play-v0   # with that row's settings: max Q-backup
    python results/benchmark.py --growth                       # and the cost against M, batch size, T and data
    python results/benchmark.py --released CHECKOUT            # and the authors' released code, cloned there
    python results/benchmark.py --out speed.md                 # also writes the tables to a file

Ways of running the same update are timed in turn, slice by slice, in one process, so that a change of the machine's
speed meets them all; a figure is the median over slices. The ways:

    released   the authors' agent, with the same settings, batch and data (--released)
    eager      erdp.update as it is
    compiled   --compile: with torch.compile
    captured   as one CUDA graph (CUDA only; there the next two are captured too, as in the program)
    bf16       --compile --precision bf16

The first multiplies matrices as PyTorch does by itself, the others as `erdp.use_device` has it. Beside them
stands the bound: the matrix products of one update alone, into memory that is there already. The data is random, of
AntMaze's sizes. Two more tables have the speed of evaluation in AntMaze's umaze, for each M but 1, and the parts of an
update. The last lines are `BENCH M=<M> <updates a second>`, of the fastest way but bf16.
"""

import argparse
import contextlib
import dataclasses
import functools
import platform
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.profiler
from pages import table

import erdp

STATE_DIM, ACTION_DIM, ROWS = 31, 8, 100_000  # AntMaze's sizes
EPISODES = 8  # of an evaluation's worker processes at the most
PARTS = {  # of an update, by the names that the profiler gives to operations
    "matrix products": r"mm|linear",
    "compiled: Mish, sampling, losses": r"Compiled|cpp_fused",
    "Adam": r"adam",
    "averages": r"lerp",
    "clipping": r"foreach|norm|clamp",
    "noise and rows": r"normal_|random_|index",
}
WAYS = {"cpu": ("eager", "compiled", "bf16"), "cuda": ("eager", "captured", "compiled", "bf16")}


def learner(args: erdp.Args, way: str, data: erdp.Batch):
    """(a function that makes one update on fresh noise, its agent), set up as in a run."""
    args = dataclasses.replace(args, compile=way in ("compiled", "bf16"))
    args.precision = "bf16" if way == "bf16" else args.precision
    torch.manual_seed(args.seed)
    agent = erdp.Agent(data.state.shape[1], data.action.shape[1], args, args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    rows = torch.empty(args.batch_size, dtype=torch.int64, device=args.device)
    noise = erdp.noise_buffers(args, data.action.shape[1], args.device)

    def learn():
        erdp.update(agent, erdp.Batch(*(column[rows] for column in data)), noise)

    if args.device != "cpu" and way in ("captured", "compiled", "bf16"):
        learn = erdp.Captured(learn)

    def step():
        rows.random_(0, len(data.reward), generator=generator)
        erdp.sample_noise(noise, generator)
        learn()

    return step, agent


def released(checkout: Path, args: erdp.Args, data: erdp.Batch):
    """A function that makes one update of the authors' released agent."""
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    from agents import eql_diffusion
    from equivalence import their_settings
    from utils.data_sampler import Data_Sampler

    eql_diffusion.tqdm = iter  # no progress bar a call
    columns = dict(observations=data.state, actions=data.action, next_observations=data.next_state)
    columns |= dict(rewards=data.reward, terminals=data.terminal)
    sampler = Data_Sampler({name: column.cpu().numpy() for name, column in columns.items()}, args.device)
    agent = eql_diffusion.Diffusion_EQL(data.state.shape[1], data.action.shape[1], **their_settings(args))

    def step():
        ours = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # PyTorch's own choice
        agent.train(sampler, 1, batch_size=args.batch_size)
        torch.set_float32_matmul_precision(ours)

    return step


def products(args: erdp.Args, state_dim: int, action_dim: int):
    """A function that makes the matrix products of one update alone, and their operations."""
    M, B, H, C = args.num_critics, args.batch_size, args.hidden, 10 if args.max_q_backup else 1
    calls, operations = [], 0

    def add(times, batch, rows, inner, columns):
        nonlocal operations
        shape = (batch,) if batch else ()
        sizes = (*shape, rows, inner), (*shape, inner, columns), (*shape, rows, columns)
        a, b, out = (torch.randn(size, device=args.device) for size in sizes)
        calls.extend([(torch.bmm if batch else torch.mm, a, b, out)] * times)
        operations += 2 * times * max(batch, 1) * rows * inner * columns

    fan_in = state_dim + action_dim
    for rows in (B, C * B, B):  # forward: Q, its target, and Q in the policy's step
        add(1, 0, rows, fan_in, M * H)
        add(2, M, rows, H, H)
    add(4, M, B, H, H)  # backward to the hidden activations: of Q, and in the policy's step
    add(2, M, H, B, H)  # backward to Q's hidden weights
    add(1, 0, fan_in, B, M * H)  # ... and to its first ones
    add(1, 0, B, M * H, fan_in)  # backward to the policy's action
    width = state_dim + action_dim + 16
    for rows, times in ((C * B, args.num_diffusion_steps), (B, 3)):  # the policy: sampling; forward and backward
        add(times, 0, rows, width, H)
        add(2 * times, 0, rows, H, H)

    def step():
        for product, a, b, out in calls:
            product(a, b, out=out)

    return step, operations


def synchronize(device: str):
    if device != "cpu":
        torch.cuda.synchronize()


def rates(steps: dict, device: str, seconds: float, slices: int = 5) -> dict[str, float]:
    """Calls a second of each function, timed in turn for about `seconds` in all: the median over slices."""
    counts, found = {}, {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(5):  # compiles and captures
            step()
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        counts[name] = max(1, round(seconds / slices / len(steps) / (time.perf_counter() - began)))
    for _ in range(slices):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(counts[name]):
                step()
            synchronize(device)
            found[name].append(counts[name] / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def peak_memory(device: str) -> str:
    """On CUDA of the tensors since the last call, else of the process since its start."""
    if device == "cpu":
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB"
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak / 1e9:.2f} GB"


def compare(args: erdp.Args, data: erdp.Batch, sizes: list[int], seconds: float, checkout: Path | None):
    """The table of all ways by M, and the BENCH lines."""
    ways, lines, bench = WAYS[torch.device(args.device).type], [], []
    ways = ("released", *ways) if checkout else ways
    for M in sizes:
        args = dataclasses.replace(args, num_critics=M)
        torch.compiler.reset()  # or a second size would be compiled for any size
        multiply, operations = products(args, data.state.shape[1], data.action.shape[1])
        steps = {way: learner(args, way, data)[0] for way in ways if way != "released"}
        if checkout:
            steps["released"] = released(checkout, args, data)
        rate = rates(steps | {"products": multiply}, args.device, seconds)
        best = max(rate[way] for way in ways if way != "bf16")
        found = [f"{rate[way]:.4g} ({rate[way] / rate[ways[0]]:.2f})" for way in ways]
        line = [M, *found, f"{1e3 / best:.3g}"]
        speed = f"{rate['products']:.4g} ({operations * rate['products'] / 1e9:.0f})"
        lines.append([*line, speed, f"{best / rate['products']:.0%}", peak_memory(args.device)])
        bench.append(f"BENCH M={M} {best:.4g}")
        print(bench[-1], file=sys.stderr)
    bound = f"{args.precision} products alone (GFLOP/s)", "their share"
    heads = [f"{way} (times {ways[0]})" for way in ways]
    return table(["M", *heads, f"ms (fastest in {args.precision})", *bound, "peak memory"], lines), bench


def growth(args: erdp.Args, data: erdp.Batch, seconds: float) -> str:
    """The time of an update against M, batch size, T and the number of transitions, one changed at a time."""
    way = "eager" if args.device == "cpu" else "captured"
    changes = [("M", dict(num_critics=M)) for M in (1, 4, 16, 64, 128)]
    changes += [("batch size", dict(num_critics=4, batch_size=B)) for B in (256, 1024, 4096)]
    changes += [("T", dict(num_critics=4, num_diffusion_steps=T)) for T in (5, 10, 50)]
    lines = []
    for name, change in changes:
        rate = rates({way: learner(dataclasses.replace(args, **change), way, data)[0]}, args.device, seconds)[way]
        others = "" if name == "M" else ", M = 4"
        lines.append([f"{name} = {list(change.values())[-1]}{others}", f"{rate:.4g}", f"{1e3 / rate:.4g}"])
    args = dataclasses.replace(args, num_critics=4)
    for size in (10_000, 1_000_000):
        rate = rates({way: learner(args, way, random_data(args, size))[0]}, args.device, seconds)[way]
        lines.append([f"{size:,} transitions, M = 4", f"{rate:.4g}", f"{1e3 / rate:.4g}"])
    return table([f"{way}, one thing changed", "updates a second", "ms an update"], lines)


def acting(args: erdp.Args, num_critics: int, seconds: float) -> list:
    """A line of the table of evaluation in AntMaze's umaze, by an untrained policy: environment steps a second.

    MuJoCo alone is what the same worker processes do with actions of zero.
    """
    args = dataclasses.replace(args, num_critics=num_critics, env="antmaze-umaze-v0", eval_env="AntMaze_UMaze-v5")
    spec, about = erdp.describe_env(args)
    spec.max_episode_steps = length = 50
    about |= dict(dataset_id="", transitions=0, data_checksum=0, data_episodes=0, data_return=0.0, ref_min=0, ref_max=1)
    task = erdp.Task(domain="antmaze", spec=erdp.as_json(spec), **about)
    torch.compiler.reset()
    actors = {}
    for way in ("eager", "compiled"):
        torch.manual_seed(args.seed)
        options = dataclasses.replace(args, compile=way == "compiled")
        agent = erdp.Agent(erdp.size(task.layout), len(task.low), options, args.device)
        actors[way] = erdp.Actor(agent, task.layout, task.low, task.high, task.dtype)
    with erdp.playing(task, EPISODES) as envs:
        K = envs.num_envs
        still = np.zeros((K, len(task.low)), task.dtype)

        def mujoco():
            envs.reset(seed=0)
            for _ in range(length):
                envs.step(still)

        ways = {way: functools.partial(erdp.evaluate, actor, envs, K, 0) for way, actor in actors.items()}
        rate = rates(ways | {"MuJoCo alone": mujoco}, args.device, seconds)
        state = np.random.default_rng(0).standard_normal((K, erdp.size(task.layout)))
    speeds = [f"{rate[way] * K * length:.4g} ({rate[way] / rate['eager']:.2f})" for way in rate]
    action = {way: actor(state, [np.random.default_rng(k) for k in range(K)]) for way, actor in actors.items()}
    rounding = np.abs(action["compiled"] - action["eager"]).max()
    return [num_critics, K, *speeds, f"{rate['compiled'] / rate['MuJoCo alone']:.0%}", f"{rounding:.1e}"]


def parts(args: erdp.Args, data: erdp.Batch, seconds: float, updates: int = 50) -> str:
    """The table of what one compiled update spends its time on, by PyTorch's profiler."""
    args = dataclasses.replace(args, num_critics=4)
    torch.compiler.reset()
    step, _ = learner(args, "compiled", data)
    whole = 1e3 / rates({"compiled": step}, args.device, seconds)["compiled"]
    with torch.profiler.profile() as profiler:
        for _ in range(updates):
            step()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        for part, names in PARTS.items():
            if re.search(names, event.key):
                spent[part] += event.self_cpu_time_total / 1e3 / updates
                break
    spent["launching, Python and what is left"] = whole - sum(spent.values())
    lines = [[part, f"{ms:.2f}", f"{ms / whole:.0%}"] for part, ms in spent.items()]
    return table(["part of a compiled update, M = 4", "ms", "share"], [*lines, ["all", f"{whole:.2f}", ""]])


def random_data(args: erdp.Args, size: int = ROWS) -> erdp.Batch:
    generator = torch.Generator().manual_seed(0)
    state, next_state = torch.randn(2, size, STATE_DIM, generator=generator)
    action, reward = 2 * torch.rand(size, ACTION_DIM, generator=generator) - 1, torch.randn(size, generator=generator)
    return erdp.Batch(*(x.to(args.device) for x in (state, action, reward, next_state, torch.zeros(size))))


def machine(device: str) -> str:
    """The CPU by its name, family and model, as a virtual machine's name may say little; the GPU; PyTorch; the day."""
    about = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            about.setdefault(name.strip(), value.strip())
    cpu = about.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in about:
        cpu += f" (family {about['cpu family']}, model {about['model']})"
    name = cpu if device == "cpu" else f"{torch.cuda.get_device_name(device)} beside {cpu}"
    return f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=erdp.ROWS, default="antmaze-umaze-v0", help="the row whose settings are used")
    parser.add_argument("--critics", type=int, nargs="+", default=[1, 4, 16, 64], metavar="M", help="ensemble sizes")
    parser.add_argument("--precision", choices=("float32", "tf32"), help="as erdp.py takes it")
    parser.add_argument("--released", type=Path, metavar="CHECKOUT", help="a clone of the authors' code")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing a line")
    parser.add_argument("--growth", action="store_true", help="how cost grows, too")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.error = lambda message: parser.exit(2, f"benchmark: {message}: see --help\n")
    options = parser.parse_args(argv)
    if min(options.critics) < 1 or not options.seconds > 0:
        parser.error("--critics must be at least 1 and --seconds more than 0")
    if options.released and not (options.released / "agents" / "eql_diffusion.py").exists():
        parser.error(f"--released {options.released} is no clone of the authors' code")
    args = erdp.preset(options.env)
    if options.precision == "tf32" and args.device == "cpu":
        parser.error("--precision tf32 is CUDA's")
    args.precision = options.precision or args.precision
    erdp.use_device(args)
    data = random_data(args)
    B, backup = args.batch_size, "with" if args.max_q_backup else "without"
    sizes = f"states of {data.state.shape[1]}, actions of {data.action.shape[1]}, batch {B}, {backup} max Q-backup"
    words = ["CHECKOUT" if word == str(options.released) else word for word in (argv or sys.argv[1:])]
    command = " ".join(["python results/benchmark.py", *words])
    found, bench = compare(args, data, options.critics, options.seconds, options.released)
    text = f"`{command}`: {machine(args.device)}; {sizes}, {args.precision}.\n\nUpdates a second:\n\n{found}\n"
    heads = ["M", "processes", "eager", "compiled (times eager)", "MuJoCo alone", "compiled / MuJoCo", "rounding"]
    lines = [acting(args, M, options.seconds) for M in options.critics if M > 1]
    text += "\n## Evaluation\n\nEnvironment steps a second of an untrained policy in AntMaze's umaze, 50 candidates. "
    text += "Rounding: by how much an action of compiled acting differs from that of eager acting, at most.\n"
    text += f"\n{table(heads, lines)}\n"
    if args.device == "cpu":  # a graph's replay tells the profiler nothing of its parts
        text += f"\n## Where an update's time goes\n\n{parts(args, data, options.seconds / 3)}\n"
    if options.growth:
        text += f"\n## How the cost of an update grows\n\n{growth(args, data, options.seconds / 3)}\n"
    print("\n".join(["", text, *bench]))
    if options.out:
        options.out.write_text(f"# Speed\n\n{text}")


if __name__ == "__main__":
    main()
