"""All that must be seen once on a CUDA machine, in one command and within ten minutes.

    python results/gpu_check.py                        # writes results/gpu.md; needs no download and no MuJoCo
    python results/gpu_check.py --released CHECKOUT    # ... with the speed of the authors' code, cloned there
    python results/gpu_check.py --only speed acting    # these parts alone
    python results/gpu_check.py --rehearse             # on the CPU, small, without CUDA's own parts: seven minutes

Each of PARTS runs in a process of its own: one that fails, hangs or breaks its CUDA context leaves the others whole.
Those that measure speed or memory (ALONE) come last, one at a time; the others run up to four at a time. The page is
written anew whenever a part ends. Exit status: 0, 1 if a part failed or was not reached, 2 where nothing can be run.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves

try:
    import benchmark
    from pages import ROOT, table

    import erdp
except ImportError as error:
    print(f"gpu_check: nothing can be checked, as an import fails here: {error}", file=sys.stderr)
    sys.exit(2)

STATES, ACTIONS = benchmark.STATE_DIM, benchmark.ACTION_DIM  # AntMaze's
NETWORKS = "policy", "critics", "policy_ema", "critics_target"
UPDATES, TOLERANCE = 24, 0.01  # of the comparison of captured updates with eager ones
SECONDS = 570  # for all parts
SECONDS_OF_A_PART = 228


@dataclasses.dataclass
class Check:
    rehearse: bool = False
    released: Path | None = None

    def __post_init__(self):
        self.device = "cpu" if self.rehearse else "cuda"
        self.sizes = (2,) if self.rehearse else (4, 64)  # M
        self.ways = ("compiled",) if self.rehearse else ("captured", "compiled")
        self.precisions = ("float32", "bf16") if self.rehearse else ("float32", "tf32", "bf16")

    def settings(self, **changes) -> erdp.Args:
        """Those of AntMaze's rows with max Q-backup, by default with the largest M, eager and in float32."""
        args = erdp.preset("antmaze-medium-play-v0", device=self.device)
        args = dataclasses.replace(args, num_critics=self.sizes[-1], compile=False, precision="float32")
        if self.rehearse:
            args = dataclasses.replace(args, hidden=64, batch_size=64)
        return dataclasses.replace(args, **changes)


# ==== What the parts share ============================================================================================
def learner(args: erdp.Args, way: str):
    """A function that makes one update on random data, in one of benchmark.py's ways, and its agent."""
    torch.compiler.reset()  # or a second size would be compiled for any size
    erdp.use_device(args)
    return benchmark.learner(args, way, benchmark.random_data(args))


def actor(agent: erdp.Agent) -> erdp.Actor:
    return erdp.Actor(agent, [STATES], [-1.0] * ACTIONS, [1.0] * ACTIONS)


def weights(agent: erdp.Agent) -> dict[str, list]:
    return {name: [x.detach().cpu().double() for x in getattr(agent, name).parameters()] for name in NETWORKS}


def follow(args: erdp.Args, way: str = "eager") -> tuple[dict, dict]:
    """The weights before and after UPDATES updates."""
    step, agent = learner(args, way)
    start = weights(agent)
    for _ in range(UPDATES):
        step()
    return start, weights(agent)


def distances(start: dict, expected: dict, actual: dict) -> dict[str, float]:
    """For each network, over its tensors, the largest norm of actual - expected, as a share of that of
    expected - start: 0 where they are equal, 1 where `actual` has not moved at all."""
    found = {}
    for name in NETWORKS:
        tensors = zip(start[name], expected[name], actual[name], strict=True)
        shares = [(z - y).norm() / (y - x).norm() for x, y, z in tensors]
        found[name] = float(torch.stack(shares).max())  # NaN if there is one
    return found


def python(*words, **env) -> tuple[int, str]:
    """The exit status of a Python command in the project's folder, and what it said."""
    options = dict(cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *map(str, words)], **options)
    return done.returncode, done.stdout.strip()


def program(*words, **env) -> str:
    """What erdp.py said. Raises RuntimeError where its exit status is not 0."""
    status, said = python("erdp.py", *words, **env)
    if status:
        raise RuntimeError(f"erdp.py {' '.join(map(str, words))} ended with status {status}:\n{said}")
    return said


def toy(check: Check, folder: Path, cache: Path, steps: int, *words):
    """A run of the toy, with a folder of its own for what Inductor has compiled and tuned."""
    options = ["--device", check.device, "--eval-every", 400, "--run-dir", folder, "--num-steps", steps]
    program(*options, *words, TORCHINDUCTOR_CACHE_DIR=str(cache))


def lines_of(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def differing(*folders: Path) -> list[str]:
    """The parts in which the checkpoints of two runs are not equal bit for bit."""
    saved = [erdp.load_file(folder / "checkpoint.pt") for folder in folders]
    one, other = ({**content["agent"], "draws": content["generator"], "totals": content["totals"]} for content in saved)
    found = []
    for part in one:
        pairs = zip(tree_leaves(one[part]), tree_leaves(other[part]), strict=True)
        if not all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs):
            found.append(part)
    return found


def ending(said: str, lines: int = 15) -> str:
    return "```\n" + "\n".join(said.strip().splitlines()[-lines:]) + "\n```"


# ==== The parts: each prints its figures as Markdown, and returns whether all is well =================================
def machine(check: Check) -> bool:
    """What this was run on."""
    print(benchmark.machine(check.device))
    return True


def tests(check: Check) -> bool:
    """The project's tests that need a GPU: among them those of captured and compiled updates, in float64."""
    status, said = python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "cuda", "test_erdp.py")
    last = said.splitlines()[-1]
    good = status == 0 and (check.rehearse or "skipped" not in last)
    print(last if good else ending(said))
    return good


def recompiling(check: Check) -> bool:
    """What is compiled must be compiled once."""
    step, agent = learner(check.settings(compile=True), "compiled")
    play, states = actor(agent), np.zeros((32, STATES))
    step()
    play(states)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            step()
        play(states)
        step()
        try:
            play(states[:4])
            seen = False
        except torch._dynamo.exc.RecompileError:
            seen = True
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    other = "does" if seen else "does NOT, either"
    print("After one update and one call of the Actor seven more updates, and another call between them, compile")
    print(f"nothing anew; graph breaks: {breaks}. For another number of states the Actor {other}.")
    return seen and not breaks


def agreement(check: Check) -> bool:
    """At AntMaze's sizes, too, captured updates must be the eager ones."""
    args = check.settings(ema_start=3)
    print(f"{UPDATES} updates with the same draws, in float32, with max Q-backup and four moves of the EMA policy. A")
    print("share is the largest distance of a tensor from the eager run's, divided by how far that run has moved it.")
    print(f"The tolerance is {TOLERANCE}: a tensor that never moves reads 1, an EMA that lacks the first of its moves")
    print("0.1. On a GPU what is compiled is captured, too.\n")
    start, eager = follow(args)
    found = {way: distances(start, eager, follow(args, way)[1]) for way in check.ways}
    rows = [[way, *(f"{share:.1e}" for share in shares.values())] for way, shares in found.items()]
    print(table(["way", *NETWORKS], rows))
    return all(share <= TOLERANCE for shares in found.values() for share in shares.values())


@torch.no_grad()
def precision(check: Check) -> bool:
    """What each precision costs, through `use_device` and an Agent of that precision, against float64."""
    args, rows = check.settings(), 4096
    torch.manual_seed(0)
    agent = erdp.Agent(STATES, ACTIONS, args, check.device)
    state, x_t = (torch.randn(rows, size, device=check.device) for size in (STATES, ACTIONS))
    t = torch.ones(rows, dtype=torch.int64, device=check.device)
    exact_eps = copy.deepcopy(agent.policy).double()(x_t.double(), t, state.double())
    exact_q = copy.deepcopy(agent.critics).double()(state.double(), x_t.double())
    eps, q = {}, {}  # the errors of each precision
    for name in check.precisions:
        now = dataclasses.replace(args, precision=name)
        erdp.use_device(now)
        other = erdp.Agent(STATES, ACTIONS, now, check.device)
        other.load_state_dict(agent.state_dict())
        eps[name] = float((other.policy(x_t, t, state) - exact_eps).norm() / exact_eps.norm())
        q[name] = float((other.critics(state, x_t) - exact_q).norm() / exact_q.norm())
    print(f"A new agent in {rows} states, against the same weights in float64: the norm of the error, as a share of")
    print("that of the numbers themselves.\n")
    print(table(["precision", "eps-hat", "Q"], [[name, f"{eps[name]:.1e}", f"{q[name]:.1e}"] for name in eps]))
    before = check.precisions[-2]  # TF32 on a GPU, else float32
    good = eps["float32"] < 1e-5 and eps["bf16"] == eps[before] and q["bf16"] > 2 * q[before]
    if not check.rehearse:
        good &= eps["tf32"] > 10 * eps["float32"]
    print(f"\nThey {'are' if good else 'are NOT'} what they are called: each is coarser than the one before it, and")
    print("bf16 in the critics alone.")
    return good


def resuming(check: Check) -> bool:
    """800 updates of the toy, and 400, an end, and 400 more in another process."""
    with tempfile.TemporaryDirectory() as folder:
        whole, halves, cache = (Path(folder) / name for name in ("whole", "halves", "cache"))
        toy(check, whole, cache, 800)
        toy(check, halves, cache, 400)
        toy(check, halves, cache, 800, "--resume")
        off = differing(whole, halves)
    print("The two checkpoints are", f"NOT equal: {', '.join(off)}." if off else "equal bit for bit.")
    return not off


def repeating(check: Check) -> bool:
    """One seed twice, each time compiled and tuned afresh, and twice without compiling."""
    for way in ["--no-compile"] if check.rehearse else ["--compile", "--no-compile"]:
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / name for name in ("one", "other")]
            for run in runs:
                toy(check, run, run.with_suffix(".cache"), 800, way)
            off = differing(*runs)
        result = f"differ in {', '.join(off)}" if off else "are equal bit for bit"
        print(f"Two runs of 800 updates of the toy with {way} {result}.")
    print("Compiled runs may differ, as Inductor times kernels to choose among them; others must not.")
    return not off  # of the last, which is not compiled


PENDULUM = """
import contextlib, importlib.util, sys, types
if importlib.util.find_spec("gymnasium_robotics") is None:  # nothing of it is needed here
    sys.modules["gymnasium_robotics"] = types.SimpleNamespace(__version__="none")
import erdp
@contextlib.contextmanager
def playing(*args, play=erdp.playing):
    with play(*args) as envs:
        print("WORKERS", len(envs.processes))
        yield envs
erdp.playing = playing
sys.exit(erdp.main())
"""


def workers(check: Check) -> bool:
    """A run whose evaluations, of Pendulum, are played in worker processes, forked before CUDA starts."""
    import h5py

    rng, rows = np.random.default_rng(0), 600
    columns = dict(observations=rng.normal(size=(rows, 3)), actions=rng.uniform(-2, 2, (rows, 1)))
    columns |= dict(rewards=-rng.random(rows), terminals=np.zeros(rows), timeouts=np.arange(rows) % 200 == 199)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data.hdf5", Path(folder) / "run"
        with h5py.File(data, "w") as file:
            for name, values in columns.items():
                file[name] = values
        words = ["--dataset", data, "--eval-env", "Pendulum-v1", "--num-critics", 4, "--run-dir", run]
        words += ["--device", check.device, "--num-steps", 200, "--eval-every", 100, "--eval-episodes", 8]
        status, said = python("-c", PENDULUM, *words)
        count = re.search(r"WORKERS (\d+)", said)
        if status or not count:
            print(f"The run ended with status {status}:\n\n{ending(said)}")
            return False
        lines = lines_of(run)
    returns = ", ".join(f"{float(line['return_mean']):.0f} at update {line['step']}" for line in lines)
    print(f"{count[1]} worker processes, 8 episodes an evaluation: mean return {returns}.")
    return [line["step"] for line in lines] == ["100", "200"]


FULL = """
import sys, torch, erdp
torch.compile = lambda function: function  # the memory that an eager update takes is known
class Full(erdp.Captured):
    def __call__(self):
        if self.calls == 3:  # the call that captures
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_reserved() + SPARE
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
            print("CAPTURING", flush=True)
        super().__call__()
        if self.calls == 4:
            print("CAPTURED", flush=True)
erdp.Captured = Full
sys.exit(erdp.main())
"""


def memory_full(check: Check) -> bool:
    """A GPU that is full when the update is captured must end the program with a sentence."""
    good = True
    large = ["--num-critics", 64, "--hidden", 256, "--batch-size", 4096, "--num-steps", 10]
    for spare in (0, 2e9):  # at the first allocation, and about where the critics' backward pass begins
        with tempfile.TemporaryDirectory() as folder:
            options = ["--device", "cuda", "--run-dir", Path(folder) / "run", *large]
            status, said = python("-c", FULL.replace("SPARE", str(spare)), *options)
        inside = "CAPTURING" in said and "CAPTURED" not in said
        sentence = status == 2 and "\nerdp: this needs more memory" in said and "Traceback" not in said
        print(f"With {spare / 1e9:g} GB for what is captured the program ends with status {status}:\n")
        print(f"{ending(said, 3 if sentence else 25)}\n")
        good &= inside and sentence
    return good


def eval_only(check: Check) -> bool:
    """A saved policy plays as it did at the end of its run, on the GPU and on the CPU."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        toy(check, run, Path(folder) / "cache", 400, "--no-compile", "--precision", "float32")
        score = float(lines_of(run)[-1]["score_mean"])
        for device in (check.device, "cpu"):
            said = program("--eval-only", run / "policy.pt", "--device", device)
            found[device] = float(re.search(r"score (-?[\d.]+)", said)[1])
    words = ", ".join(f"{value} on {device}" for device, value in found.items())
    print(f"The toy's score after 400 updates is {score:.1f}, and by `--eval-only` {words}.")
    return abs(found[check.device] - score) < 0.06 and abs(found["cpu"] - score) < 1  # one decimal; rounding elsewhere


def speed(check: Check) -> bool:
    """Updates a second with max Q-backup and batches of 256; what is compiled is captured, too, as in the program."""
    for name in check.precisions[:-1]:  # each table has bf16 as a way of its own
        args = check.settings(precision=name)
        erdp.use_device(args)
        seconds = 1 if check.rehearse else 6
        found, _ = benchmark.compare(args, benchmark.random_data(args), check.sizes, seconds, check.released)
        print(f"In {name}:\n\n{found}\n", flush=True)
    return True


def acting(check: Check) -> bool:
    """Calls a second of an Actor in 32 states, in each of which it draws one of 50 candidates, in TF32 on a GPU.

    In float32 compiled actions must be the eager ones, but where rounding makes it draw another candidate."""
    state, lines, good = np.random.default_rng(0).normal(size=(32, STATES)), [], True

    def players(M: int, precision: str):
        """Each way, and an Actor that acts in it, of the same weights."""
        for way in ("eager", "compiled"):
            args = check.settings(num_critics=M, compile=way == "compiled", precision=precision)
            erdp.use_device(args)
            torch.manual_seed(0)
            yield way, actor(erdp.Agent(STATES, ACTIONS, args, check.device))

    def drawn(play, k: int):
        return play(state, [np.random.default_rng(32 * k + n) for n in range(32)])

    for M in check.sizes:
        actions = [np.concatenate([drawn(play, k) for k in range(10)]) for _, play in players(M, "float32")]
        alike = np.isclose(*actions, rtol=0, atol=1e-3).all(1).mean()
        good &= alike >= 0.98  # of 320
        streams = [np.random.default_rng(k) for k in range(32)]
        calls = {way: functools.partial(play, state, streams) for way, play in players(M, check.precisions[-2])}
        rates = (f"{rate:.3g}" for rate in benchmark.rates(calls, check.device, 2).values())
        lines.append([M, *rates, f"{alike:.1%}"])
    print(table(["M", "eager", "compiled", "equal actions in float32"], lines))
    return good


def memory(check: Check) -> bool:
    """The GPU memory that updates as the program makes them and an Actor in 32 states reserve, with M = 64."""
    step, agent = learner(check.settings(precision="tf32"), "compiled")
    for _ in range(10):
        step()
    actor(agent)(np.zeros((32, STATES)))
    print(f"{torch.cuda.max_memory_reserved() / 1e9:.2f} GB, by `torch.cuda.max_memory_reserved`.")
    return True


TOGETHER = machine, tests, recompiling, agreement, precision, resuming, repeating, workers, memory_full, eval_only
ALONE = acting, memory, speed  # the longest last, which has what is left of the time
PARTS = {part.__name__.replace("_", "-"): part for part in TOGETHER + ALONE}
NOT_REACHED = "not reached", ""
NOT_REHEARSED = "memory-full", "memory"


# ==== All of them =====================================================================================================
def run_part(name: str, words: list[str], seconds: float) -> tuple[str, str]:
    """The verdict on a part, and what it printed; where it failed, also the end of its error output."""
    command = [sys.executable, __file__, "--part", name, *words]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        try:
            verdict = "FAILED" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            verdict = f"FAILED, as it was not done within {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
        said.seek(0)
        errors.seek(0)
        text, why = said.read().strip(), errors.read().strip()
    if verdict != "passed" and why:
        text += f"\n\n{ending(why)}"
    return verdict, text


def page(names, results: dict, head: str) -> str:
    """The page of what has ended so far, in the order of `names`."""
    paragraphs = [head]
    for name in names:
        verdict, text = results.get(name, NOT_REACHED)
        paragraphs += [f"## {name}: {verdict}", PARTS[name].__doc__, text]
    return "\n\n".join(paragraphs).strip() + "\n"


def check_all(names, run, write) -> dict[str, tuple[str, str]]:
    """Runs the parts `names` by run(name) -> (verdict, text), and after each of them `write`s all results so far."""
    results, lock = {}, threading.Lock()

    def check(name):
        result = run(name)
        with lock:
            results[name] = result
            print("{}: {}\n{}\n".format(name, *result), flush=True)
            write(results)

    with concurrent.futures.ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(check, [name for name in names if PARTS[name] not in ALONE]))  # raises what they raise
    for name in names:
        if PARTS[name] in ALONE:
            check(name)
    return results


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to try this script")
    parser.add_argument("--released", type=Path, metavar="CHECKOUT", help="a clone of the authors' code")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_check: PyTorch sees no CUDA device here: run it on a machine with one", file=sys.stderr)
        return 2
    if options.part:
        return 0 if PARTS[options.part](Check(options.rehearse, options.released)) else 1
    began = time.monotonic()
    names, words = list(options.only), []
    title, out = "On a GPU", ROOT / "results" / "gpu.md"
    if options.rehearse:
        names = [name for name in names if name not in NOT_REHEARSED]
        words.append("--rehearse")
        title = "A rehearsal on a CPU, which says nothing of a GPU"
        out = Path(tempfile.gettempdir()) / "gpu-rehearsal.md"
    if options.released:
        words += ["--released", str(options.released.resolve())]

    def run(name):
        left = SECONDS - (time.monotonic() - began)
        most = left if PARTS[name] is speed else min(left, SECONDS_OF_A_PART)
        return run_part(name, words, most) if left > 5 else NOT_REACHED

    def write(results):
        seconds = f"{time.monotonic() - began:.0f} seconds, {time.strftime('%Y-%m-%d')}"
        out.write_text(page(names, results, f"# {title}\n\nBy `results/gpu_check.py`: {seconds}."))

    results = check_all(names, run, write)
    bad = [name for name in names if results[name][0] != "passed"]
    print(f"{time.monotonic() - began:.0f} seconds; see {out}", f"; not well: {', '.join(bad)}" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
