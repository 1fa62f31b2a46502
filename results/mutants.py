"""Mutation testing of erdp.py: changes it in one place at a time and runs test_erdp.py against each copy.

    python results/mutants.py --list                                  # what would be changed
    python results/mutants.py --only lcb                              # the mutants of one function
    python results/mutants.py --every 3 --out results/mutants.md      # each third, as a table

The mutants come from the syntax tree: signs, products for quotients, constants, exchanged arguments, strict for weak
comparisons, mean for sum, forgotten detach, clamp, square root, logarithm. A mutant is killed when the quick part of
the suite fails, its own function's tests first; one that survives is then shown to its function's slow tests. The
unchanged file must pass before anything is counted.
"""

import argparse
import ast
import copy
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds that a mutant may run: one that hangs is killed too

# What is mutated, by part, with the tests to run first (pytest's -k)
PARTS = {
    "SDE": {
        "SCHEDULES": "schedule",
        "MeanRevertingSDE.__init__": "schedule or eq2 or sde or eq7",
        "MeanRevertingSDE._at": "sde or eq2",
        "MeanRevertingSDE.transition": "eq2",
        "MeanRevertingSDE.diffuse": "eq4",
        "MeanRevertingSDE.score": "eq28 or eq30",
        "MeanRevertingSDE.posterior": "eq7",
        "MeanRevertingSDE.predict_x0": "eq8",
        "MeanRevertingSDE.log_prob": "eq2_log",
        "MeanRevertingSDE.log_prob_x1": "eq14",
        "MeanRevertingSDE.reverse_sde_step": "eq3",
    },
    "networks": {
        "mish": "mish",
        "NoiseNetwork.__init__": "noise_network",
        "NoiseNetwork.forward": "noise_network",
        "QEnsemble.__init__": "ensemble",
        "QEnsemble.forward": "ensemble or eq15",
    },
    "sampler": {"sample_actions": "eq10"},
    "losses": {
        "diffusion_loss": "eq5 or diffusion_loss or likelihood or posterior_loss",
        "critic_loss": "eq16",
        "lcb": "eq17",
        "pessimistic_value": "pessimistic or eq15",
        "policy_log_prob": "log_prob_of_both",
        "policy_loss": "eq15 or eq12",
    },
    "loaders": {
        "flatten": "data",
        "evaluation_maze": "maze or mirrored",
        "load_minari": "data",
        "load_hdf5": "data or hdf5",
        "load_data": "data or bad",
    },
    "loop": {
        "Agent.__init__": "algorithm1",
        "Agent.load_state_dict": "resume",
        "update": "algorithm1",
        "descend": "descend or algorithm1",
        "move": "move or algorithm1",
        "empty_noise": "noise_has or algorithm1",
        "draw": "draws",
        "Actor.__call__": "actor",
        "evaluate": "evaluation",
        "summary": "evaluation",
    },
}
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.MatMult: None}
SWAPS |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
NAMES = {"mean": "sum", "sum": "mean", "amin": "amax", "amax": "amin", "var": "std", "std": "var", "sin": "cos"}
NAMES |= {"cos": "sin", "theta_bar": "theta_prime", "theta_prime": "theta_bar", "_var": "_std", "_std": "_var"}
DROPPED = {"detach", "clamp", "clip", "sqrt", "abs", "log", "exp", "softmax", "cumsum", "astype"}


def mutants(tree: ast.Module):
    """Yields (part, function, line, description, tests, source) for every place that can be changed."""
    for part, functions in PARTS.items():
        for name, tests in functions.items():
            for place, node in enumerate(ast.walk(find(tree, name))):
                for description, change in changes(node):
                    changed = copy.deepcopy(tree)
                    target = next(n for i, n in enumerate(ast.walk(find(changed, name))) if i == place)
                    before = ast.unparse(node)
                    change(target)
                    after = ast.unparse(getattr(target, "replacement", target))
                    if hasattr(target, "replacement"):
                        changed = Replace(target).visit(changed)
                    if before != after:
                        change = f"{description}: `{before}` to `{after}`"
                        yield part, name, node.lineno, change, tests, ast.unparse(changed)


def find(tree: ast.AST, name: str) -> ast.AST:
    """The definition of a function, of a method (Class.method), or of a module's variable."""
    for piece in name.split("."):
        tree = next(node for node in tree.body if piece in defined(node))
    return tree


def defined(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return [getattr(target, "id", getattr(target, "name", None)) for target in targets]


class Replace(ast.NodeTransformer):
    def __init__(self, target):
        self.target = target

    def visit(self, node):
        return node.replacement if node is self.target else self.generic_visit(node)


def changes(node: ast.AST):
    """The (description, in-place change) pairs of one node; a change may set node.replacement instead."""

    def becomes(new):
        return lambda n: setattr(n, "replacement", new(n))

    if isinstance(node, ast.BinOp) and SWAPS.get(type(node.op)):
        yield "operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield "power dropped", becomes(lambda n: n.left)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield "sign or negation dropped", becomes(lambda n: n.operand)
    if isinstance(node, ast.Compare) and SWAPS.get(type(node.ops[0])):
        yield "comparison", lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.BoolOp):
        yield "and for or", lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "flag", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "index or factor", lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield "factor", lambda n: setattr(n, "value", 2 * n.value if n.value else 1.0)
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", lambda n: setattr(n, "attr", NAMES[n.attr])
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called in DROPPED:
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("np", "torch", "F")
            yield f"{called} dropped", becomes(lambda n: n.args[0] if module else n.func.value)
        if len(node.args) > 1 and called != "getattr":
            yield "arguments exchanged", lambda n: n.args.__setitem__(slice(0, 2), [n.args[1], n.args[0]])
    if isinstance(node, ast.IfExp):
        yield "branches exchanged", lambda n: n.__dict__.update(body=n.orelse, orelse=n.body)


def passes(source: str, *selection: str) -> bool:
    """Whether the tests that pytest selects pass with `source` as erdp.py, in a forked copy of this process."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "erdp.py").write_text(source)
        for name in ("test_erdp.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        child = os.fork()
        if child == 0:
            run_tests(folder, selection)
        for _ in range(LIMIT * 20):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) in (0, 5)  # 5: nothing selected
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def run_tests(folder: str, selection: tuple[str, ...]):
    """In the child: becomes a process group of its own, runs pytest silently and never returns."""
    import pytest

    os.setpgid(0, 0)
    os.chdir(folder)
    sys.path.insert(0, folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    code = 1
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "test_erdp.py", *selection])
    finally:
        os._exit(int(code))


def judge(source: str, tests: str) -> str:
    """'quick' or 'slow', the part of the suite that kills a mutant, or 'survived'."""
    if not passes(source, "-m", "not slow", "-k", tests) or not passes(source, "-m", "not slow"):
        return "quick"
    return "survived" if passes(source, "-m", "slow", "-k", tests) else "slow"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="run each so manyth mutant")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one to run")
    parser.add_argument("--only", help="run the mutants of this function alone")
    parser.add_argument("--list", action="store_true", help="show the mutants, run none")
    parser.add_argument("--out", help="the Markdown table to write")
    args = parser.parse_args()
    source = (ROOT / "erdp.py").read_text()
    unchanged = ast.unparse(ast.parse(source))
    chosen = [m for m in mutants(ast.parse(source)) if args.only in (None, m[1])][args.first :: args.every]
    if args.list:
        for part, name, line, description, *_ in chosen:
            print(f"{part} {name}:{line} {description}")
        return print(len(chosen), "mutants")
    for name in ("hypothesis", "pytest", "scipy.optimize", "scipy.stats", "torch._dynamo", "torch.utils.tensorboard"):
        importlib.import_module(name)  # once here, then forked
    import torch

    torch.set_num_threads(1)
    if not passes(unchanged, "-m", "not slow"):
        sys.exit("the unchanged file does not pass its own tests")
    lines = []
    for number, (part, name, line, description, tests, mutant) in enumerate(chosen, 1):
        outcome = judge(mutant, tests)
        lines.append(f"| {part} | `{name}` | {description.replace('|', chr(92) + '|')} | {outcome} |")
        print(f"{number}/{len(chosen)} {outcome}: {name}:{line} {description}", flush=True)
        if args.out:
            head = "| part | function | change | killed by |\n| --- | --- | --- | --- |\n"
            Path(args.out).write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
