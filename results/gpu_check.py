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
import gc
import importlib.util
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    import erdp
except ImportError as error:
    print(f"gpu_check: erdp.py cannot be imported here, so that nothing can be checked: {error}", file=sys.stderr)
    sys.exit(2)

STATES, ACTIONS, ROWS = 31, 8, 100_000  # AntMaze's sizes
UPDATES, TOLERANCE = 24, 0.01  # of the comparison of captured updates with eager ones
ALONE = "speed", "acting", "memory"


@dataclasses.dataclass
class Check:
    rehearse: bool = False
    released: Path | None = None

    def __post_init__(self):
        self.device = "cpu" if self.rehearse else "cuda"
        self.sizes = (2,) if self.rehearse else (4, 64)  # M
        self.precisions = ("float32", "bf16") if self.rehearse else ("float32", "tf32", "bf16")

    def settings(self, **changes) -> erdp.Args:
        """Those of AntMaze's rows with max Q-backup, by default with the largest M, eager and in float32."""
        here = dict(num_critics=self.sizes[-1], compile=False, precision="float32")
        here |= dict(hidden=64, batch_size=64) if self.rehearse else {}
        return dataclasses.replace(erdp.preset("antmaze-medium-play-v0", device=self.device), **here | changes)


# ---------------------------------------------------------------------------------------------------------------------
# What the parts share
# ---------------------------------------------------------------------------------------------------------------------
def row(*cells):
    """Prints a line of a Markdown table, at once, so that the lines before a failure are on the page."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def heads(*cells):
    row(*cells)
    row(*["---"] * len(cells))


def learner(args: erdp.Args, captured: bool):
    """A Run on random data, and a function that makes one update of it, by the lines of `erdp.train`."""
    gc.collect()
    torch.compiler.reset()  # or a second size would be compiled for any size
    erdp.use_device(args)
    generator = torch.Generator().manual_seed(0)
    state, next_state = torch.randn(2, ROWS, STATES, generator=generator)
    action = 2 * torch.rand(ROWS, ACTIONS, generator=generator) - 1
    reward, terminal = torch.randn(ROWS, generator=generator), torch.rand(ROWS, generator=generator) < 0.05
    data = erdp.Batch(state, action, reward, next_state, terminal.float())
    about = dict(domain="antmaze", dataset_id="random", transitions=ROWS, data_checksum=0, data_episodes=1)
    bounds = dict(layout=[STATES], low=[-1.0] * ACTIONS, high=[1.0] * ACTIONS, dtype="float32")
    task = erdp.Task(**about, **bounds, data_return=0.0, spec="", ref_min=0.0, ref_max=1.0)
    run = erdp.Run(args, task, data, Path("nowhere"))
    learn = erdp.Captured(run.learn) if captured else run.learn

    def step():
        run.rows.random_(0, ROWS, generator=run.generator)
        erdp.sample_noise(run.noise, run.generator)
        learn()

    return run, step


def numbers(state: dict) -> dict[str, list]:
    """Copies of the tensors in each entry of a state dict, in float64 on the CPU."""
    leaves = {part: [x for x in tree_leaves(value) if torch.is_tensor(x)] for part, value in state.items()}
    return {part: [x.detach().to("cpu", torch.float64, copy=True) for x in xs] for part, xs in leaves.items()}


def distances(start: dict, expected: dict, actual: dict) -> dict[str, float]:
    """For each part of `numbers`, over its tensors, the largest norm of actual - expected, as a share of that of
    expected - start: 0 where they are equal, 1 where `actual` has not moved at all."""
    found = {}
    for part, tensors in expected.items():
        before = start.get(part) or [torch.zeros_like(x) for x in tensors]  # an optimiser before its first step
        shares = []
        for x, y, x_0 in zip(tensors, actual[part], before, strict=True):
            apart, moved = (y - x).norm(), (x - x_0).norm()
            shares.append(apart / moved if apart != 0 else apart)
        found[part] = float(torch.stack(shares).max())  # NaN if there is one
    return found


def agree(found: dict[str, float]) -> bool:
    return all(share <= TOLERANCE for share in found.values())


def follow(args: erdp.Args, captured: bool = False) -> tuple[dict, dict]:
    """All state before and after UPDATES updates."""
    run, step = learner(args, captured)
    start = numbers(run.agent.state_dict() | dict(totals=run.totals))
    for _ in range(UPDATES):
        step()
    return start, numbers(run.agent.state_dict() | dict(totals=run.totals))


def raises(error: type[Exception], function) -> bool:
    try:
        function()
    except error:
        return True
    return False


def rate(step, device: str, seconds: float) -> float:
    """Calls a second: the median over slices, after six calls that compile, tune and capture."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(6):
        step()
    wait()
    began, found, calls = time.perf_counter(), [], 3 if device == "cpu" else 50
    while time.perf_counter() - began < seconds or len(found) < 3:
        slice_began = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        found.append(calls / (time.perf_counter() - slice_began))
    return statistics.median(found)


def reserved(check: Check) -> str:
    """The most GPU memory that the process has reserved since the last call."""
    if check.rehearse:
        return "left out"
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return f"{most / 1e9:.2f} GB"


def python(*words, **env) -> tuple[int, str]:
    """The exit status of a Python command in the project's folder, and what it said."""
    env = os.environ | {name: str(value) for name, value in env.items()}
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *map(str, words)], env=env, **options)
    return done.returncode, done.stdout.strip()


def ending(said: str, lines: int = 15) -> str:
    return "```\n" + "\n".join(said.strip().splitlines()[-lines:]) + "\n```"


def program(*words, **env) -> str:
    """What erdp.py said. Raises RuntimeError where its exit status is not 0."""
    status, said = python("erdp.py", *words, **env)
    if status:
        raise RuntimeError(f"erdp.py {' '.join(map(str, words))} ended with status {status}:\n{said}")
    return said


def toy(check: Check, folder: Path, cache: Path, steps: int, *words):
    """A run of the toy, with a folder of its own for what Inductor has compiled and tuned."""
    options = ["--device", check.device, "--eval-every", 400, "--run-dir", folder, "--num-steps", steps]
    program(*options, *words, TORCHINDUCTOR_CACHE_DIR=cache)


def lines_of(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def difference(*folders: Path) -> str:
    """How far the checkpoints of two runs are apart, as shares of the numbers' own size; "" if no bit differs."""
    saved = [erdp.load_file(folder / "checkpoint.pt") for folder in folders]
    a, b = ({**content["agent"], "draws": content["generator"], "totals": content["totals"]} for content in saved)
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    if all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs):
        return ""
    found = distances({}, numbers(a), numbers(b))
    return ", ".join(f"{part} {share:.1e}" for part, share in found.items())


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each prints its figures as Markdown, and returns whether all is well, or None where it is left out
# ---------------------------------------------------------------------------------------------------------------------
def machine(check: Check) -> bool:
    """What this was run on."""
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, {len(os.sched_getaffinity(0))} CPU cores.")
    if not check.rehearse:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        print(f"{torch.cuda.get_device_name()}, capability {capability}, CUDA {torch.version.cuda}.")
    names = "triton", "minari", "gymnasium_robotics", "mujoco", "pooch", "h5py", "pytest", "hypothesis", "scipy"
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    print(f"What cannot be imported here: {', '.join(missing) or 'nothing that was asked for'}.")
    return True


def tests(check: Check) -> bool:
    """The project's tests that need a GPU."""
    status, said = python("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "cuda", "test_erdp.py")
    last = said.splitlines()[-1]
    good = status == 0 and (check.rehearse or "skipped" not in last)
    print(last if good else ending(said))
    return good


def waiting(check: Check) -> bool | None:
    """An update must not wait for the device, or it could not be captured."""
    if check.rehearse:
        return None
    run, step = learner(check.settings(num_critics=4), captured=False)
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        step()
    seen = raises(RuntimeError, run.latest.sum().item)
    print('Under `torch.cuda.set_sync_debug_mode("error")` three eager updates, after five others, raise nothing.')
    print(f"Reading a number, which waits, {'does' if seen else 'does NOT: this check sees nothing'}.")
    return seen


def recompiling(check: Check) -> bool:
    """What is compiled must be compiled once, as compiling cannot be captured."""
    run, step = learner(check.settings(compile=True), captured=not check.rehearse)
    states = np.zeros((32, STATES), np.float32)
    step()
    run.actor(states)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            step()
        run.actor(states)
        step()
        seen = raises(torch._dynamo.exc.RecompileError, lambda: run.actor(states[:4]))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print("With `error_on_recompile`, after one update and one call of the Actor, seven more updates with another call")
    print(f"between them raise nothing; graph breaks: {breaks}. Another number of states, which is compiled anew,")
    print("does raise." if seen else "does NOT: this check sees nothing.")
    return seen and not breaks


def agreement(check: Check) -> bool:
    """Captured updates must be the eager ones, in all that they change."""
    args = check.settings(ema_start=3)
    compiled = dataclasses.replace(args, compile=True)
    ways = {"captured": (args, True), "compiled, captured": (compiled, True)}
    if check.rehearse:
        ways = {"compiled": (compiled, False)}
    print(f"{UPDATES} updates with the same draws, in float32, with max Q-backup and four moves of the EMA policy. A")
    print("share is the largest distance of a tensor from the eager run's, divided by how far that run has moved it.")
    print(f"The tolerance is {TOLERANCE}: a tensor that never moves reads 1, an EMA that lacks the first of its moves")
    print(f"0.1, `updates` or a step of Adam's that is one off {1 / UPDATES:.3f}; but rounding alone, in what was")
    print("compiled for a CPU, 5e-5.\n")
    start, eager = follow(args)
    heads("way", *eager)
    good = True
    for way, how in ways.items():
        found = distances(start, eager, follow(*how)[1])
        row(way, *(f"{share:.1e}" for share in found.values()))
        good &= agree(found)
    return good


@torch.no_grad()
def precision(check: Check) -> bool:
    """What each precision costs, through `use_device` and an Agent of that precision, against float64."""
    args, rows = check.settings(eta=0.0, entropy_coef=0.0), 4096
    T, device = args.num_diffusion_steps, check.device
    run, step = learner(args, captured=False)
    with torch.enable_grad():
        for _ in range(100):
            step()
    noise = torch.randn(T, rows, ACTIONS, generator=run.generator, device=device)
    state, action, t = run.data.state[:rows], run.data.action[:rows], torch.full((rows,), T, device=device)
    x_T = run.agent.sde.diffuse(action, T, noise[0])

    def outputs(agent, dtype=torch.float32):
        x, s, a, z = (value.to(dtype) for value in (x_T, state, action, noise))
        sample = erdp.sample_actions(agent.policy, agent.sde, s, z, args.clip_denoised)
        return [value.double() for value in (agent.policy(x, t, s), sample, agent.critics(s, a))]

    exact = copy.copy(run.agent)
    exact.sde = erdp.MeanRevertingSDE(T, args.schedule, torch.float64, device)
    exact.policy, exact.critics = (copy.deepcopy(part).double() for part in (run.agent.policy, run.agent.critics))
    expected = outputs(exact, torch.float64)
    decay, var = exact.sde.transition(0, T)
    factor, deviation = float(var.sqrt() / decay), float(expected[2].std(0).mean())
    print(f"A policy after 100 updates by L_diff alone, in {rows} states, against the same weights in float64: root")
    print(f"mean square / largest error. x0-hat is that of Eq. 8 at t = {T}, where eps-hat's error is multiplied by")
    print(f"{factor:.4g}, before it is clamped; an action is the sampler's from the same noise; Q's error is a share")
    print("of the deviation of Q over members.\n")
    heads("precision", "eps-hat", "x0-hat", "action", "Q")
    error = {}
    for name in check.precisions:
        now = dataclasses.replace(args, precision=name)
        erdp.use_device(now)
        agent = erdp.Agent(STATES, ACTIONS, now, device)
        agent.load_state_dict(run.agent.state_dict())
        off = [found - wanted for found, wanted in zip(outputs(agent), expected)]
        eps, sample, q = ((float(x.square().mean().sqrt()), float(x.abs().max())) for x in off)
        cells = (eps, 1), (eps, factor), (sample, 1), (q, 1 / deviation)
        row(name, *(f"{scale * rms:.1e} / {scale * most:.1e}" for (rms, most), scale in cells))
        error[name] = eps[0], q[0]
    *_, other, bf16 = error.values()  # the other is TF32 on a GPU, else float32
    good = bf16[0] == other[0] and bf16[1] > 2 * other[1] and error["float32"][0] < 1e-5
    good &= check.rehearse or error["tf32"][0] > 10 * error["float32"][0]
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
        off = difference(whole, halves)
        scores = " and ".join(f"{float(lines_of(path)[-1]['score_mean']):.2f}" for path in (whole, halves))
    print(f"The two checkpoints are {f'NOT equal: {off}' if off else 'equal bit for bit'}. Their scores are {scores}.")
    return not off


def repeating(check: Check) -> bool:
    """One seed twice, each time compiled and tuned afresh."""
    for words in ([],) if check.rehearse else ([], ["--no-compile"]):
        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [Path(folder) / name for name in ("one", "other")]
            tries = [pool.submit(toy, check, run, run.with_suffix(".cache"), 800, *words) for run in runs]
            [each.result() for each in tries]
            off = difference(*runs)
        way, result = " ".join(words) or "by default", f"differ: {off}" if off else "are equal bit for bit"
        print(f"Two runs of 800 updates of the toy, {way}, {result}.")
    print("Compiled runs may differ, as Inductor times kernels to choose among them; others must not.")
    return not off  # of the last, which is not compiled


PENDULUM = """
import importlib.util, sys, types
if importlib.util.find_spec("gymnasium_robotics") is None:  # nothing of it is needed here
    sys.modules["gymnasium_robotics"] = types.ModuleType("gymnasium_robotics")
import erdp
def make_envs(*args, make=erdp.make_envs):
    envs = make(*args)
    print("WORKERS", len(envs.processes))
    return envs
erdp.make_envs = make_envs
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


def memory_full(check: Check) -> bool | None:
    """A GPU that is full when the update is captured must end the program with a sentence."""
    if check.rehearse:
        return None
    good = True
    large = ["--no-compile", "--num-critics", 64, "--hidden", 256, "--batch-size", 4096, "--num-steps", 10]
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


def speed(check: Check) -> bool:
    """Updates a second as the program makes them, compiled and captured, with max Q-backup and batches of 256."""
    heads("M", "way", "updates a second", "ms an update", "memory reserved")
    for M in check.sizes:
        for name in ["the authors' code"] * bool(check.released) + [*check.precisions]:
            if name in check.precisions:
                args = check.settings(num_critics=M, compile=True, precision=name)
                run, step = learner(args, captured=not check.rehearse)
            else:
                from benchmark import released

                run, _ = learner(check.settings(num_critics=M), captured=False)
                step = released(check.released, run.args, run.data)
                torch.set_float32_matmul_precision("highest")  # PyTorch's own choice
            found = rate(step, check.device, 1 if check.rehearse else 3)
            row(M, name, f"{found:.4g}", f"{1e3 / found:.3g}", reserved(check))
            del run, step  # and the graph's memory with them
    return True


def acting(check: Check) -> bool:
    """The time of one call of an Actor, which draws one of 50 candidates a state, in the default precision."""
    heads("M", "states", "eager, ms", "compiled, ms")
    default = erdp.preset("toy", device=check.device).precision
    for M in check.sizes:
        for count in (32,) if check.rehearse else (4, 32):
            times = []
            for compiled in (False, True):
                args = check.settings(num_critics=M, compile=compiled, precision=default)
                actor = learner(args, captured=False)[0].actor
                states = np.random.default_rng(0).normal(size=(count, STATES))
                streams = [np.random.default_rng(k) for k in range(count)]
                times.append(f"{1e3 / rate(functools.partial(actor, states, streams), check.device, 1):.3g}")
            row(M, count, *times)
    return True


def memory(check: Check) -> bool | None:
    """`torch.cuda.max_memory_reserved` of a run at AntMaze's sizes, and of an Actor on 32 states."""
    if check.rehearse:
        return None
    for M in check.sizes:
        run, step = learner(check.settings(num_critics=M, compile=True, precision="tf32"), captured=True)
        for _ in range(10):
            step()
        run.actor(np.zeros((32, STATES), np.float32))
        print(f"M = {M}: {reserved(check)}.")
        del run, step
    return True


def eval_only(check: Check) -> bool:
    """A saved policy plays as it did at the end of its run, on the GPU and on the CPU."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        toy(check, run, Path(folder) / "cache", 400, "--no-compile", "--precision", "float32")
        score = float(lines_of(run)[-1]["score_mean"])
        for device in dict.fromkeys((check.device, "cpu")):
            said = program("--eval-only", run / "policy.pt", "--device", device)
            found[device] = float(re.search(r"score (-?[\d.]+)", said)[1])
    words = ", ".join(f"{value} on {device}" for device, value in found.items())
    print(f"The toy's score after 400 updates is {score:.1f}, and by `--eval-only` {words}.")
    return abs(found[check.device] - score) < 0.06 and abs(found["cpu"] - score) < 1  # one decimal; rounding elsewhere


PARTS = (
    ("machine", machine),
    ("tests", tests),
    ("waiting", waiting),
    ("recompiling", recompiling),
    ("agreement", agreement),
    ("precision", precision),
    ("resuming", resuming),
    ("repeating", repeating),
    ("workers", workers),
    ("memory-full", memory_full),
    ("speed", speed),
    ("acting", acting),
    ("memory", memory),
    ("eval-only", eval_only),
)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------
def run_part(name: str, words: list[str], seconds: float) -> tuple[str, str]:
    """The verdict on a part, and what it printed; where it failed, also the end of its error output."""
    command = [sys.executable, __file__, "--part", name, *words]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(command, stdout=said, stderr=noise, start_new_session=True)
        try:
            verdict = {0: "passed", 3: "left out"}.get(process.wait(seconds), "FAILED")
        except subprocess.TimeoutExpired:
            verdict = f"FAILED, as it was not done within {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
        texts = []
        for file in (said, noise):
            file.seek(0)
            texts.append(file.read().strip())
    if verdict.startswith("FAILED") and texts[1]:
        texts[0] += f"\n\n{ending(texts[1])}"
    return verdict, texts[0].strip()


def page(names, results: dict, head: str) -> str:
    """The page of what has ended so far, in the order of `names`, and which parts have not."""
    missing = [name for name in names if name not in results]
    lines = [head] + ([f"**Not reached: {', '.join(missing)}.**"] if missing else [])
    about = {name: part.__doc__ for name, part in PARTS}
    for name in names:
        if name in results:
            verdict, text = results[name]
            lines += [f"## {name}: {verdict}", about.get(name, ""), text]
    return "\n\n".join(line for line in lines if line) + "\n"


def check_all(names, run, write) -> dict[str, tuple[str, str]]:
    """Runs the parts `names` by run(name) -> (verdict, text), or None if there is no time; after each, `write`s all."""
    results = {}
    count = min(4, len(os.sched_getaffinity(0)))
    for group, together in ([n for n in names if n not in ALONE], count), ([n for n in names if n in ALONE], 1):
        with concurrent.futures.ThreadPoolExecutor(together) as pool:
            futures = {pool.submit(run, name): name for name in group}
            for future in concurrent.futures.as_completed(futures):
                name = futures[future]
                try:
                    result = future.result()
                except Exception as error:  # the rest is worth having
                    result = "FAILED", f"{type(error).__name__}: {error}"
                if result:
                    results[name] = result
                    print("{}: {}\n{}\n".format(name, *result), flush=True)
                write(results)
    return results


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, _ in PARTS]
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to try this script")
    parser.add_argument("--released", type=Path, metavar="CHECKOUT", help="a clone of the authors' code")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=570, help="in all; a part may take 4 in 10 of them")
    parser.add_argument("--out", type=Path, help="the page (default: results/gpu.md, a rehearsal's elsewhere)")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_check: PyTorch sees no CUDA device here: run it on a machine with one", file=sys.stderr)
        return 2
    if options.part:
        good = dict(PARTS)[options.part](Check(options.rehearse, options.released))
        if good is None:
            print("A CPU has none of this.")
        return {True: 0, False: 1, None: 3}[good]
    began = time.monotonic()
    words = ["--rehearse"] * options.rehearse
    words += ["--released", str(options.released.resolve())] if options.released else []
    rehearsal = Path(tempfile.gettempdir()) / "gpu-rehearsal.md"
    out = options.out or (rehearsal if options.rehearse else ROOT / "results" / "gpu.md")
    called = "python results/gpu_check.py" + " --released CHECKOUT" * bool(options.released)
    called += " --only " + " ".join(options.only) if options.only != names else ""
    title = "A rehearsal on a CPU, which says nothing of a GPU" if options.rehearse else "On a GPU"

    def run(name):
        left = options.seconds - (time.monotonic() - began)
        return run_part(name, words, min(left, 0.4 * options.seconds)) if left > 5 else None

    def write(results):
        seconds = f"{time.monotonic() - began:.0f} seconds, {time.strftime('%Y-%m-%d')}"
        out.write_text(page(options.only, results, f"# {title}\n\n`{called}`: {seconds}."))

    results = check_all(options.only, run, write)
    bad = [name for name in options.only if results.get(name, ("not reached",))[0] not in ("passed", "left out")]
    print(f"{time.monotonic() - began:.0f} seconds; see {out}", f"; not well: {', '.join(bad)}" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
