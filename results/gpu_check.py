"""All that must be seen once on a CUDA machine, in one command and within ten minutes.

    python results/gpu_check.py                # writes results/benchmark-<gpu>.md; needs no download and no MuJoCo
    python results/gpu_check.py --rehearse     # the same on the CPU with small sizes and without CUDA's parts

The CUDA tests; captured and compiled updates against eager ones in float32 at full size; the speed of an update with
and without max Q-backup against what arithmetic and memory allow, with peak memory; a training run with evaluations on
the toy task, and its resumption. Exit status: 0, 1 if something failed, 2 without CUDA.
"""

import argparse
import csv
import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmark
import torch
from benchmark import erdp
from pages import table

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570  # seconds in all
BEGAN = time.monotonic()


def command(*words) -> tuple[bool, str]:
    """Whether a Python command succeeded within what is left of the time, and the end of what it said."""
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        left = max(LIMIT - (time.monotonic() - BEGAN), 10)
        done = subprocess.run([sys.executable, *map(str, words)], timeout=left, **options)
    except subprocess.TimeoutExpired:
        return False, "not done within the ten minutes"
    return done.returncode == 0, "\n".join(done.stdout.strip().splitlines()[-15:])


def tests() -> tuple[bool, str]:
    good, said = command("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", "test_erdp.py")
    good = good and "skipped" not in said.splitlines()[-1]
    return good, said.splitlines()[-1] if good else f"```\n{said}\n```"


def agreement(args: erdp.Args, data: erdp.Batch, updates: int = 20) -> tuple[bool, str]:
    """How far the metrics of 20 updates in each fast way are from those of eager updates on the same noise."""
    found = {}
    for way in ("eager", *ways(args)):
        torch.compiler.reset()
        step, agent = benchmark.learner(args, way, data)
        for _ in range(updates):
            step()
        numbers = torch.cat([p.detach().flatten() for p in (*agent.policy.parameters(), *agent.critics.parameters())])
        found[way] = numbers.double().cpu()
    distance = {way: float((x - found["eager"]).abs().max()) for way, x in found.items() if way != "eager"}
    bound = updates * 3e-4  # Adam moves a parameter by at most about its learning rate an update
    words = ", ".join(f"{way} {value:.1e}" for way, value in distance.items())
    good = all(value < bound / 4 for value in distance.values())
    claim = f"Largest distance of a parameter from that after {updates} eager updates"
    return good, f"{claim}: {words}; updates may have moved it by {bound:.0e}."


def ways(args: erdp.Args) -> tuple[str, ...]:
    return ("compiled",) if args.device == "cpu" else ("captured", "compiled")


def peaks(device: str, size: int) -> tuple[float, float]:
    """Products' FLOP/s and copies' bytes/s that this device reaches on large matrices."""
    a, b = torch.randn(2, size, size, device=device)
    out = torch.empty_like(a)
    rate = benchmark.rates({"product": lambda: torch.mm(a, b, out=out), "copy": lambda: out.copy_(a)}, device, 2)
    return 2 * size**3 * rate["product"], 2 * a.nbytes * rate["copy"]


def speed(args: erdp.Args, data: erdp.Batch, size: int, seconds: float) -> tuple[bool, str]:
    """Updates a second, and the least time that arithmetic and memory allow: each product reads its factors and writes
    its result once, Adam and the averages touch ten numbers a parameter, and all else is free."""
    erdp.use_device(args)
    arithmetic, bandwidth = peaks(args.device, size)
    lines = []
    for backup in (False, True):
        torch.compiler.reset()
        now = dataclasses.replace(args, max_q_backup=backup)
        _, operations, moved = benchmark.products(now, data.state.shape[1], data.action.shape[1])
        for way in ("eager", *ways(now), "bf16"):
            benchmark.peak_memory(now.device)
            step, agent = benchmark.learner(now, way, data)
            rate = benchmark.rates({way: step}, now.device, seconds)[way]
            numbers = sum(p.numel() for p in (*agent.policy.parameters(), *agent.critics.parameters()))
            least = operations / arithmetic, (moved + 40 * numbers) / bandwidth
            shares = [f"{1e3 * x:.3g} ms ({x * rate:.0%})" for x in least]
            lines.append(["yes" if backup else "no", way, f"{rate:.4g}", *shares, benchmark.peak_memory(now.device)])
    heads = "max Q-backup", "way", "updates a second", "arithmetic alone", "memory traffic alone", "peak memory"
    reached = f"{arithmetic / 1e12:.3g} TFLOP/s ({args.precision}, also for bf16), {bandwidth / 1e9:.3g} GB/s"
    return True, f"M = {args.num_critics}. Reached on large matrices: {reached}.\n\n{table(heads, lines)}"


def training(device: str) -> tuple[bool, str]:
    """A toy run of 800 updates in two halves, the second resumed, with an evaluation at the end of each."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["erdp.py", "--device", device, "--eval-every", 400, "--run-dir", run]
        for steps, resume in ((400, []), (800, ["--resume"])):
            good, said = command(*words, "--num-steps", steps, *resume)
            if not good:
                return False, f"```\n{said}\n```"
        with open(run / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    scores = ", ".join(f"{float(row['score_mean']):.1f} at update {row['step']}" for row in rows)
    return [row["step"] for row in rows] == ["400", "800"], f"Toy, stopped at 400 and resumed: scores {scores}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to try this script")
    rehearse = parser.parse_args().rehearse
    if not rehearse and not torch.cuda.is_available():
        print("gpu_check: PyTorch sees no CUDA device here: run it on a machine with one", file=sys.stderr)
        return 2
    device = "cpu" if rehearse else "cuda"
    args = dataclasses.replace(erdp.preset("antmaze-umaze-v0"), device=device, num_critics=2 if rehearse else 64)
    args.precision = "float32"  # for the agreement; speed is measured as the program runs
    erdp.use_device(args)
    data = benchmark.random_data(args)
    parts = {"Training, evaluation, resume": lambda: training(device)}
    parts["Captured and compiled updates equal eager ones"] = lambda: agreement(args, data)
    fast = dataclasses.replace(args, precision="float32" if rehearse else "tf32")
    size, seconds = (512, 1) if rehearse else (8192, 8)
    parts["Speed"] = lambda: speed(fast, data, size, seconds)
    if not rehearse:
        parts["Tests"] = tests  # last: what it takes of the time is known least
    text, failed = "", []
    for name, part in parts.items():
        try:
            good, said = part()
        except Exception as error:  # the rest is worth having
            good, said = False, f"{type(error).__name__}: {error}"
        failed += [] if good else [name]
        text += f"## {name}: {'passed' if good else 'FAILED'}\n\n{said}\n\n"
        print(f"{name}: {'passed' if good else 'FAILED'}\n{said}\n", flush=True)
    seconds = time.monotonic() - BEGAN
    head = f"# On a GPU\n\n`python results/gpu_check.py`: {benchmark.machine(device)}; {seconds:.0f} seconds.\n\n"
    if not rehearse:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        (ROOT / "results" / f"benchmark-{gpu}.md").write_text(head + text.rstrip() + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
