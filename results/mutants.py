"""Mutation testing of erdp.py: changes it in one place at a time and runs test_erdp.py against each copy.

    python results/mutants.py --only lcb            # the mutants of one function
    python results/mutants.py --every 2 --publish   # each second one of all, and results/mutants.md

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
from pathlib import Path
from typing import NamedTuple

from pages import RESULTS, ROOT, table

KEPT = ROOT / "runs" / "mutants.jsonl"

# The tests to run first (pytest's -k), and what is mutated
TESTS = {
    "eq01 or sde": ["cosine", "SCHEDULES", "MeanRevertingSDE.__init__"],
    "sde or eq02 or eq07": ["MeanRevertingSDE.between"],
    "eq02": ["MeanRevertingSDE.decay", "MeanRevertingSDE.var", "MeanRevertingSDE.transition"],
    "eq02_log": ["MeanRevertingSDE.log_prob"],
    "eq03": ["MeanRevertingSDE.reverse_sde_step"],
    "eq04": ["MeanRevertingSDE.diffuse"],
    "eq05 or eq40": ["noise_loss", "likelihood_loss", "posterior_loss"],
    "eq07": ["MeanRevertingSDE.posterior"],
    "eq08": ["MeanRevertingSDE.predict_x0"],
    "eq10": ["sample_actions"],
    "eq12 or eq15": ["paper_entropy", "released_entropy", "VARIANTS", "policy_loss"],
    "eq14": ["MeanRevertingSDE.log_prob_x1"],
    "eq16": ["critic_loss"],
    "eq17": ["lcb"],
    "eq28": ["MeanRevertingSDE.score"],
    "entropy or debruijn": ["entropy_weights", "debruijn_entropy"],
    "algorithm1": ["Agent.__init__", "update", "optimizer_step", "soft_update", "noise_buffers", "sample_noise"],
    "mish": ["mish"],
    "noise_network": ["NoiseNetwork.__init__", "NoiseNetwork.forward"],
    "ensemble or eq15": ["QEnsemble.__init__", "QEnsemble.forward"],
    "acting": ["choose_action"],
    "acting or actor": ["act", "Actor.__call__"],
    "toy": ["toy_episodes"],
    "maze": ["same_walls"],
    "data or hdf5 or bad": ["hdf5_episodes", "flatten", "load_data"],
    "antmaze or reward": ["sparse_reward"],
    "table_4 or reward or evaluation or data": ["DOMAINS"],
    "evaluation": ["OneEpisode.step", "evaluate", "summary"],
}
# Mutants that compute the same: what one's function and words() begin with -> why
EQUIVALENT = {
    "DOMAINS `1` to `2` in `reward=lambda reward: (reward": "where the deviation is 0, so is what it divides",
    "noise_loss `F.mse_loss(eps_hat, eps)` to": "a mean squared error is symmetric",
    "likelihood_loss `F.mse_loss(sde": "a mean squared error is symmetric",
    "policy_loss `-1` to `1` in `weight = args.entropy_coef": "the predicted noise has two axes",
    "Agent.__init__ `QEnsemble(state_dim": "the ensemble takes the sum of both",
    "toy_episodes `0 * terminal` to": "an episode's last step alone is asked whether it is cut, and has 0 in both",
    "load_data `3` to `4` in `for number in tqdm(": "seconds until the bar shows",
    "QEnsemble.forward `0` to `1` in `x = x.reshape(": "every layer has a bias for each member",
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
OPERATORS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
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

    def told(self) -> str:
        return f"{self.function} {self.words()}"

    def why(self) -> str | None:
        """Why it is equivalent, if it is."""
        return next((why for start, why in EQUIVALENT.items() if self.told().startswith(start)), None)

    def key(self) -> str:
        suite = (ROOT / "test_erdp.py").read_text()
        return hashlib.sha256((self.source + suite).encode()).hexdigest()[:20]


def mutants(source: str):
    """Yields every Mutant of the functions in TESTS."""
    tree = ast.parse(source)
    for tests, functions in TESTS.items():
        for function in functions:
            for node in walk(find(tree, function)):
                for new in replacements(node):
                    before, after = ast.unparse(node), ast.unparse(new)
                    line = source.splitlines()[node.lineno - 1].partition("  #")[0].strip()
                    yield Mutant(function, line, before, after, tests, replaced(source, node, f"({after})"))


def replaced(source: str, node: ast.AST, text: str) -> str:
    """The source with `text` in the place of a node, whose columns count bytes."""
    lines = source.encode().splitlines(keepends=True)
    begin = len(b"".join(lines[: node.lineno - 1])) + node.col_offset
    end = len(b"".join(lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = b"".join(lines)
    return (whole[:begin] + text.encode() + whole[end:]).decode()


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


def replacements(node: ast.AST):
    """Yields what is put in the place of a node, one at a time."""

    def changed(**fields):
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    match node:
        case ast.BinOp(left=left, op=ast.Pow()):
            yield left
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield changed(op=OPERATORS[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Compare(ops=[op, *rest]) if type(op) in OPERATORS:
            yield changed(ops=[OPERATORS[type(op)](), *rest])
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value or 1.0)
        case ast.IfExp(body=body, orelse=orelse):
            yield changed(body=orelse, orelse=body)
        case ast.Attribute(value=value, attr=attr):
            of_the_sde = isinstance(value, ast.Name) and value.id in ("self", "sde")
            names = NAMES | OF_THE_SDE if of_the_sde else NAMES
            if attr in names:
                yield changed(attr=names[attr])
        case ast.Call(func=func, args=args):
            called = func.attr if isinstance(func, ast.Attribute) else ""
            if called in DROPPED:
                of_a_module = isinstance(func.value, ast.Name) and func.value.id in ("np", "torch", "F")
                yield args[0] if of_a_module else func.value
            if len(args) > 1:
                first, second, *rest = args
                yield changed(args=[second, first, *rest])


def passes(source: str, limit: float, *selection: str) -> bool:
    """Whether the tests that pytest selects pass with `source` as erdp.py, in no more than `limit` seconds."""
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


def allowed_time() -> float:
    """Seconds for a mutant's tests: several times what the unchanged file takes, which must pass."""
    began = time.monotonic()
    if not passes((ROOT / "erdp.py").read_text(), 3600, "-m", "not slow"):
        sys.exit("mutants: the unchanged file does not pass its own tests")
    return 60 + 5 * (time.monotonic() - began)


def judge(mutant: Mutant, limit: float) -> str:
    """'quick' or 'slow', the part of the suite that kills a mutant, or 'survived'."""
    for selection in (["-m", "not slow", "-k", mutant.tests], ["-m", "not slow"]):
        if not passes(mutant.source, limit, *selection):
            return "quick"
    return "survived" if passes(mutant.source, limit, "-m", "slow", "-k", mutant.tests) else "slow"


def outcomes(chosen: list[Mutant]) -> list[str]:
    """The outcome of each mutant: as listed, as kept, or found now and kept."""
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.touch()
    kept = dict(json.loads(line) for line in KEPT.read_text().splitlines())
    limit, found = None, []
    for number, mutant in enumerate(chosen, 1):
        outcome = "equivalent" if mutant.why() else kept.get(mutant.key())
        if outcome is None:
            limit = limit or allowed_time()
            outcome = judge(mutant, limit)
            with open(KEPT, "a") as file:
                file.write(json.dumps([mutant.key(), outcome]) + "\n")
        print(f"{number} of {len(chosen)}, {outcome}: {mutant.told()}", flush=True)
        found.append(outcome)
    return found


def page(chosen: list[Mutant], found: list[str], number: int, command: str) -> str:
    kinds = "quick", "slow", "equivalent", "survived"
    by_function, special = {}, []
    for mutant, outcome in zip(chosen, found):
        function = f"`{mutant.function}`"
        by_function.setdefault(function, []).append(outcome)
        if outcome in ("equivalent", "survived"):
            special.append([function, mutant.words().replace("|", "\\|"), outcome, mutant.why() or ""])
    by_function["all"] = found
    lines = [[name, len(of_it), *(of_it.count(kind) for kind in kinds)] for name, of_it in by_function.items()]
    return f"""# Mutants of erdp.py

`{command}`: {len(chosen)} of the {number} places were tried.

Killed by the quick part of the suite (`pytest -m "not slow"`), or by
the slow tests of its function; equivalent: it computes the same, as the script says.

{table(["function", "mutants", *kinds], lines)}

## What is not killed

{table(["function", "change", "outcome", "why"], special) if special else "None."}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="run each so manyth mutant")
    functions = [name for names in TESTS.values() for name in names]
    parser.add_argument("--only", choices=functions, metavar="FUNCTION", help="run the mutants of this function alone")
    parser.add_argument("--publish", action="store_true", help="write results/mutants.md")
    args = parser.parse_args()
    if args.every < 1 or (args.only and args.publish):
        parser.error("--every must be at least 1, and --publish is for all functions, without --only")
    every = [m for m in mutants((ROOT / "erdp.py").read_text()) if args.only in (None, m.function)]
    chosen = every[:: args.every]
    found = outcomes(chosen)
    if args.publish:
        command = " ".join(["python results/mutants.py", *sys.argv[1:]])
        (RESULTS / "mutants.md").write_text(page(chosen, found, len(every), command))


if __name__ == "__main__":
    main()
