"""Mutation testing of erdp.py: changes it in one place at a time and runs test_erdp.py against each copy.

    python results/mutants.py --list                # what would be changed
    python results/mutants.py --only lcb            # the mutants of one function
    python results/mutants.py --every 2 --publish   # each second one, and results/mutants.md

The mutants come from the syntax tree: signs, products for quotients, constants, exchanged arguments, strict for weak
comparisons, mean for sum, forgotten detach, clamp, square root, logarithm. A mutant is killed when the quick part of
the suite fails, its own function's tests first; one that survives is then shown to its function's slow tests. The
unchanged file must pass before anything is counted. Outcomes are kept in runs/mutants.jsonl by the texts of mutant and
tests: what is cut off goes on there.
"""

import argparse
import ast
import copy
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pages import RESULTS, ROOT, table

KEPT = ROOT / "runs" / "mutants.jsonl"

# What is mutated, and the tests to run first (pytest's -k)
TESTS = {
    "cosine": "eq01",
    "SCHEDULES": "eq01",
    "MeanRevertingSDE.__init__": "eq01 or sde",
    "MeanRevertingSDE.between": "sde or eq02 or eq07",
    "MeanRevertingSDE.decay": "eq02",
    "MeanRevertingSDE.var": "eq02",
    "MeanRevertingSDE.transition": "eq02",
    "MeanRevertingSDE.diffuse": "eq04",
    "MeanRevertingSDE.score": "eq28 or eq30",
    "MeanRevertingSDE.posterior": "eq07",
    "MeanRevertingSDE.predict_x0": "eq08",
    "MeanRevertingSDE.log_prob": "eq02_log",
    "MeanRevertingSDE.log_prob_x1": "eq14",
    "MeanRevertingSDE.reverse_sde_step": "eq03",
    "mish": "mish",
    "NoiseNetwork.__init__": "noise_network",
    "NoiseNetwork.forward": "noise_network",
    "QEnsemble.__init__": "ensemble",
    "QEnsemble.forward": "ensemble or eq15",
    "sample_actions": "eq10",
    "choose_action": "acting",
    "noise_loss": "eq05",
    "likelihood_loss": "eq05",
    "posterior_loss": "eq05 or eq40",
    "policy_log_prob": "eq15",
    "entropy_weights": "entropy or debruijn",
    "entropy_estimate": "entropy or debruijn",
    "VARIANTS": "eq15 or eq12",
    "policy_loss": "eq15 or eq12",
    "critic_loss": "eq16",
    "lcb": "eq17",
    "minimum": "eq17",
    "Agent.__init__": "algorithm1",
    "update": "algorithm1",
    "optimizer_step": "algorithm1",
    "soft_update": "algorithm1",
    "noise_buffers": "algorithm1",
    "sample_noise": "algorithm1",
    "sparse_reward": "antmaze or reward",
    "DOMAINS": "table_4 or reward or evaluation or data",
    "toy_episodes": "toy",
    "hdf5_episodes": "data or hdf5",
    "flatten": "data",
    "same_walls": "maze",
    "load_data": "data or bad",
    "Actor.__call__": "actor",
    "OneEpisode.step": "evaluation",
    "evaluate": "evaluation",
    "summary": "evaluation",
}
# Mutants that compute the same: function, line, text before and after -> why
EQUIVALENT = {
    ("lcb", "return q.mean(0) - beta * var.masked_fill(agree, 1).sqrt().masked_fill(agree, 0)", "1", "2"): (
        "fills a place under a square root that is then set to 0"
    ),
    ("DOMAINS", "reward=lambda reward: (reward - reward.mean()) / (reward.std() or 1),", "1", "2"): (
        "where the deviation is 0, so is what it divides"
    ),
}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
NAMES = {"mean": "sum", "sum": "mean", "amin": "amax", "amax": "amin", "var": "std", "std": "var", "sin": "cos"}
NAMES |= {"cos": "sin", "theta_bar": "num_steps", "fmax": "fmin", "argmax": "argmin"}
OF_THE_SDE = {"var": "decay", "decay": "var"}
DROPPED = {"detach", "clamp", "clip", "sqrt", "abs", "log", "exp", "softmax", "cumsum", "astype"}


class Mutant(NamedTuple):
    function: str
    line: str
    before: str
    after: str
    tests: str
    source: str  # of the whole file

    def words(self) -> str:
        return f"`{self.before}` to `{self.after}` in `{self.line}`"

    def why(self) -> str | None:
        """Why it is equivalent, if it is."""
        return EQUIVALENT.get((self.function, self.line, self.before, self.after))

    def key(self) -> str:
        suite = (ROOT / "test_erdp.py").read_text()
        return hashlib.sha256((self.source + suite).encode()).hexdigest()[:20]


def mutants(source: str):
    """Yields every Mutant of the functions in TESTS."""
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for name, tests in TESTS.items():
        for node in walk(find(tree, name)):
            for change in changes(node):
                changed = copy.deepcopy(node)
                before, after = ast.unparse(node), ast.unparse(change(changed) or changed)
                if before != after:
                    begin = starts[node.lineno - 1] + node.col_offset
                    end = starts[node.end_lineno - 1] + node.end_col_offset
                    text = source.encode()
                    text = text[:begin] + f"({after})".encode() + text[end:]
                    line = lines[node.lineno - 1].decode().partition("  #")[0].strip()
                    yield Mutant(name, line, before, after, tests, text.decode())


def find(tree: ast.AST, name: str) -> ast.AST:
    """The definition of a function, of a method (Class.method), or of a module's variable."""
    for piece in name.split("."):
        found = [node for node in tree.body if piece in defined(node)]
        if not found:
            sys.exit(f"mutants: erdp.py has no {name}: mend TESTS")
        tree = found[0]
    return tree


def defined(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return [getattr(target, "id", getattr(target, "name", None)) for target in targets]


def walk(node: ast.AST):
    """The nodes of a definition, but for those within f-strings, whose places are not told."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from walk(child)


def changes(node: ast.AST):
    """Functions that change a node in place, or return another in its place."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield lambda n: n.left
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield lambda n: n.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.BoolOp):
        yield lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield lambda n: setattr(n, "value", 2 * n.value if n.value else 1.0)
    if isinstance(node, ast.Attribute):
        owner = node.value.id if isinstance(node.value, ast.Name) else ""
        names = NAMES | OF_THE_SDE if owner in ("self", "sde") else NAMES
        if node.attr in names:
            yield lambda n: setattr(n, "attr", names[n.attr])
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called in DROPPED:
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("np", "torch", "F")
            yield lambda n: n.args[0] if module else n.func.value
        if len(node.args) > 1 and called != "getattr":
            yield lambda n: n.args.__setitem__(slice(0, 2), [n.args[1], n.args[0]])
    if isinstance(node, ast.IfExp):
        yield lambda n: n.__dict__.update(body=n.orelse, orelse=n.body)


def passes(source: str, limit: float, *selection: str) -> bool:
    """Whether the tests that pytest selects pass with `source` as erdp.py. One that takes longer than `limit` seconds
    fails, too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "erdp.py").write_text(source)
        for name in ("test_erdp.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "test_erdp.py", *selection]
        try:
            done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, timeout=limit)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode in (0, 5)  # 5: nothing selected


def judge(mutant: Mutant, limit: float) -> str:
    """'quick' or 'slow', the part of the suite that kills a mutant, or 'survived'."""
    quick, own = ("-m", "not slow"), ("-k", mutant.tests)
    if not passes(mutant.source, limit, *quick, *own) or not passes(mutant.source, limit, *quick):
        return "quick"
    return "survived" if passes(mutant.source, limit, "-m", "slow", *own) else "slow"


def outcomes(chosen: list[Mutant]) -> list[str]:
    """The outcome of each mutant: as listed, as kept, or found now and kept."""
    KEPT.parent.mkdir(exist_ok=True)
    kept = dict(json.loads(line) for line in KEPT.read_text().splitlines()) if KEPT.exists() else {}
    limit, found = None, []
    for number, mutant in enumerate(chosen, 1):
        outcome = "equivalent" if mutant.why() else kept.get(mutant.key())
        if outcome is None:
            limit = limit or allowed_time()
            outcome = judge(mutant, limit)
            with open(KEPT, "a") as file:
                file.write(json.dumps([mutant.key(), outcome]) + "\n")
            print(f"{number} of {len(chosen)}, {outcome}: {mutant.function} {mutant.words()}", flush=True)
        found.append(outcome)
    return found


def allowed_time() -> float:
    """Seconds for a mutant's tests: several times what the unchanged file takes, which must pass."""
    began = time.monotonic()
    if not passes((ROOT / "erdp.py").read_text(), 3600, "-m", "not slow"):
        sys.exit("mutants: the unchanged file does not pass its own tests")
    return 60 + 5 * (time.monotonic() - began)


def page(chosen: list[Mutant], found: list[str], number: int, command: str) -> str:
    kinds, lines, special = ("quick", "slow", "equivalent", "survived"), [], []
    for name in TESTS:
        of_name = [outcome for mutant, outcome in zip(chosen, found) if mutant.function == name]
        if of_name:
            lines.append([f"`{name}`", len(of_name), *(of_name.count(kind) or "" for kind in kinds)])
    lines.append(["all", len(found), *(found.count(kind) for kind in kinds)])
    for mutant, outcome in zip(chosen, found):
        if outcome in kinds[2:]:
            special.append([f"`{mutant.function}`", mutant.words().replace("|", "\\|"), outcome, mutant.why() or ""])
    rest = table(["function", "change", "outcome", "why"], special) if special else "None."
    return f"""# Mutants of erdp.py

`{command}`: {len(chosen)} of the {number} places were tried.

Killed by the quick part of the suite (`pytest -m "not slow"`), or by
the slow tests of its function; equivalent: it computes the same, as the script says.

{table(["function", "mutants", *kinds], lines)}

## What is not killed

{rest}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="run each so manyth mutant")
    parser.add_argument("--only", help="run the mutants of this function alone")
    parser.add_argument("--list", action="store_true", help="show the mutants, run none")
    parser.add_argument("--publish", action="store_true", help="write results/mutants.md")
    args = parser.parse_args()
    every = [m for m in mutants((ROOT / "erdp.py").read_text()) if args.only in (None, m.function)]
    chosen = list(dict.fromkeys(every[:: args.every]))
    if args.list:
        for mutant in chosen:
            print(mutant.function, mutant.words())
        return print(len(chosen), "mutants")
    found = outcomes(chosen)
    print(dict(Counter(found)))
    if args.publish:
        command = " ".join(["python results/mutants.py", *sys.argv[1:]])
        (RESULTS / "mutants.md").write_text(page(chosen, found, len(every), command))


if __name__ == "__main__":
    main()
