"""Runs as their folders and results/runs.jsonl have them, and which of them differ in nothing but the seed.

What a run is, is read from its settings, never from its name. runs.jsonl has a line for each finished run: its name,
settings (config.json), evaluations (metrics.csv), result and, of the toy, Q in the state in which episodes start.
"""

import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pages import RESULTS

import erdp
from erdp import UserError

RECORDS = RESULTS / "runs.jsonl"
UNKEPT = "run_dir resume checkpoint eval_only domain spec layout low high dtype ref_min ref_max".split()  # of config
SMOKE = 4_000  # runs of fewer updates are trials of the program, which are not kept
ACTIONS = torch.linspace(-1, 1, 41)[:, None]  # at which the toy's records keep Q in the state that episodes start in

# ==== 1. Reading and keeping them =====================================================================================


class Run(NamedTuple):
    """A run, and a line of runs.jsonl."""

    name: str
    config: dict  # config.json, without UNKEPT
    evaluations: dict[str, list]  # the columns of metrics.csv
    result: dict | None  # None: unfinished
    start_q: dict | None = None  # the toy's Q at ACTIONS: mean of the ensemble, and pessimistic value


def rounded(x):
    """Six digits, which is all that is kept."""
    return float(f"{x:.6g}") if isinstance(x, float) else x


def without_home(value):
    """A data set's path by its last three parts, which are the same on every machine; anything else as it is."""
    return "/".join(Path(value).parts[-3:]) if isinstance(value, str) and value.endswith(erdp.HDF5) else value


def read_folder(folder: Path) -> Run:
    """The run that left `folder`. Raises UserError where a file of it is missing or damaged, or a score not finite."""
    with erdp.refusing(f"{folder} cannot be read as a run", LookupError, TypeError, AttributeError):
        config = json.loads((folder / "config.json").read_text())
        config = {name: without_home(rounded(value)) for name, value in config.items() if name not in UNKEPT}
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [rounded(float(row[name])) if row[name] else None for row in rows] for name in rows[0]}
        path, result = folder / "result.json", None
        if path.exists():
            result = {name: rounded(value) for name, value in json.loads(path.read_text()).items()}
        return checked(Run(folder.name, config, columns, result, start_q(folder, config["env"])))


def start_q(folder: Path, env: str) -> dict | None:
    """Q of the toy's policy in the state that episodes start in; None of other tasks, and where none can be read."""
    path = folder / "policy.pt"
    if env != "toy" or not path.exists():
        return None
    try:
        agent = erdp.load_policy(path).agent
    except UserError:  # of another version, or damaged: the scores stand without it
        return None
    with torch.no_grad():
        q = agent.critics_target(torch.zeros(len(ACTIONS), 2), ACTIONS)  # (M, 41)
    values = dict(mean=q.mean(0), pessimistic=erdp.pessimistic_value(q, agent.args))
    return {name: [float(f"{x:.4g}") for x in value.tolist()] for name, value in values.items()}


def checked(run: Run) -> Run:
    """The run itself. Raises an exception where it lacks something, or its parts do not agree."""
    if run.config["env"] not in erdp.ROWS:  # an earlier version had a data set's id there
        run.config["env"] = "own"
    identity(run)
    scores = run.evaluations["score_mean"]
    if not np.isfinite(scores).all() or len(scores) != len(run.evaluations["step"]):
        raise ValueError("one of its scores is missing, NaN or infinite")
    if run.result and (run.result["final"], run.result["best"]) != (scores[-1], max(scores)):
        raise ValueError("its result does not agree with its evaluations")
    return run


def read_records() -> list[Run]:
    with erdp.refusing(f"{RECORDS} cannot be read, take it from the repository again", LookupError, TypeError):
        return [checked(Run(**json.loads(line))) for line in RECORDS.read_text().splitlines()]


def read_runs(tops: list[Path]) -> list[Run]:
    """Every run below folders; one that cannot be read is named and left out."""
    runs = []
    for path in (path for top in tops for path in sorted(top.rglob("config.json"))):  # a run has it from its start
        try:
            runs.append(read_folder(path.parent))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    return runs


def keep(runs: list[Run]):
    """Adds the finished runs to runs.jsonl, in place of those with the same settings, data and seed."""
    known = {identity(run): run for run in read_records()}
    known |= {identity(run): run for run in runs if run.result and run.config["num_steps"] >= SMOKE}
    with erdp.whole_file(RECORDS) as file:
        for run in sorted(known.values(), key=lambda run: run.name):
            file.write(json.dumps({name: x for name, x in run._asdict().items() if x is not None}) + "\n")


# ==== 2. Their arms and groups ========================================================================================

# Arms: the settings that differ from the row's preset
CLONING = dict(eta=0.0, entropy_coef=0.0, eval_candidates=1)
CLIPPED_DOUBLE_Q = dict(pessimism="min", num_critics=2, entropy_coef=0.0)
MEASURING = {"num_steps", "eval_every", "eval_episodes"}  # they change what "final" and "best" mean
CRITICS_ONLY = {"num_critics", "lcb_coef", "pessimism", "max_q_backup", "variant"}  # of no effect on a cloned policy
UNTOLD = set("env seed dataset device compile precision run_dir resume eval_only".split())  # of no arm


class Group(NamedTuple):
    """Finished runs that differ in nothing but the seed and the machine."""

    env: str
    data: str
    transitions: int
    data_score: float | None  # of the data's own episodes, to a tenth; the toy's data differ by seed
    own_data: bool  # the row's own data, which is the paper's
    arm: dict
    runs: list[Run]  # by seed

    def setting(self, name: str):
        return self.runs[0].config[name]

    def finals(self) -> dict[int, float]:
        """Final score by seed."""
        return {run.config["seed"]: run.result["final"] for run in self.runs}

    def outcome(self) -> list:
        """The data's score; final and best as mean ± standard deviation over seeds (divisor n); number of seeds."""
        cells = ["" if self.data_score is None else f"{self.data_score:.1f}"]
        for name in ("final", "best"):
            scores = [run.result[name] for run in self.runs]
            cells.append(f"{np.mean(scores):.1f}" + f" ± {np.std(scores):.1f}" * (len(scores) > 1))
        return [*cells, len(self.runs)]

    def curve(self) -> tuple[list[float], np.ndarray]:
        """The updates at which all runs were evaluated, and their scores (seeds, evaluations)."""
        columns = [dict(zip(run.evaluations["step"], run.evaluations["score_mean"])) for run in self.runs]
        steps = sorted(set.intersection(*map(set, columns)))
        return steps, np.array([[column[step] for step in steps] for column in columns])

    def draw(self, axis, name: str):
        """Its scores over updates: mean ± deviation over seeds."""
        steps, values = self.curve()
        mean, std = values.mean(0), values.std(0)
        (line,) = axis.plot(steps, mean, marker=".", label=f"{name} ({len(values)} seed{'s' * (len(values) > 1)})")
        axis.fill_between(steps, mean - std, mean + std, alpha=0.1, color=line.get_color())


def arm_of(config: dict) -> dict:
    """The settings that differ from the preset of the run's row, without those that change no result."""
    preset = vars(erdp.preset(config["env"], config.get("variant", "paper"))) | dict(variant="paper")
    names = [name for name in preset if name not in UNTOLD and name in config]
    arm = {name: config[name] for name in names if config[name] != preset[name]}
    return {k: x for k, x in arm.items() if not (CLONING.items() <= arm.items() and k in CRITICS_ONLY)}


def identity(run: Run) -> tuple:
    """What tells runs apart: the fields of a Group but the last, and the seed."""
    config, name = run.config, without_home(run.config["dataset_id"])
    own_name = erdp.ROWS[config["env"]].dataset
    score = config.get("data_score")
    score = None if config["env"] == "toy" or score is None else round(score, 1)
    arm = tuple(arm_of(config).items())
    return config["env"], name, config["transitions"], score, name == own_name, arm, config["seed"]


def group_runs(runs: list[Run]) -> list[Group]:
    """The finished runs, those of one arm on one data set together; of runs alike in all, the seed too, the last."""
    groups = {}
    for run in runs:
        if run.result:
            *key, seed = identity(run)
            groups.setdefault(tuple(key), {})[seed] = run
    found = []
    for (*key, arm), by_seed in groups.items():
        found.append(Group(*key, dict(arm), [by_seed[seed] for seed in sorted(by_seed)]))
    return sorted(found, key=lambda g: (g.data, label(g.arm), g.setting("num_steps"), str(g.arm)))


def label(arm: dict, untold=MEASURING) -> str:
    """An arm in words; what has no words, as flags. Numbers of updates and episodes are left to columns of tables."""
    words, rest = [], {key: value for key, value in arm.items() if key not in untold}
    for name, settings in {"behaviour cloning": CLONING, "clipped double Q": CLIPPED_DOUBLE_Q}.items():
        if settings.items() <= rest.items():
            words.append(name)
            rest = {key: value for key, value in rest.items() if key not in settings}
    names = dict(variant="{}", num_critics="M = {}", entropy_coef="alpha = {:g}")
    words += [text.format(rest.pop(key)) for key, text in names.items() if key in rest]
    for key, value in rest.items():
        flag = key.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return ", ".join(words) or "the row's preset"
