"""Tables and pictures of finished runs, beside the figures that the paper prints.

    python results/report.py                                # runs/ and results/runs/ -> results/tables.md, figure1.md
    python results/report.py FOLDER ... --out FOLDER        # other runs, another place
    python results/report.py --collect results/runs         # copies what the report needs of each finished run there
    python results/report.py --diagnose runs/toy__paper__0  # one run: its values, actions and gradients

What a run is, is read from its config.json, never from its folder's name. A line of a table of the paper is filled by
runs on the row's own data with the settings that the paper has there, and by no others: runs with other settings, and
runs on other data, have tables of their own, without the paper's figures. Unfinished runs are listed, not averaged.
"""

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import entropy
import figure2
import numpy as np
import torch
from matplotlib import pyplot as plt

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))
import erdp  # noqa: E402
from erdp import UserError  # noqa: E402

plt.switch_backend("Agg")

# ==== 1. What the paper prints ========================================================================================

# Domain: title, last column of Table 1 or 2 in the order of erdp.ROWS, its printed average. None: not transcribed.
TABLES_1_AND_2 = {
    "gym": ("Table 1, Gym", (54.9, 94.2, 92.5, 57.0, 102.7, 94.20, 90.32, 111.9, 111.2), 89.9),
    "adroit": ("Table 1, Adroit", (67.2, 66.3), 66.8),
    "kitchen": ("Table 1, Kitchen", (82.3, None, None), None),
    "antmaze": ("Table 2, AntMaze", (100.0, 79.8, 91.4, 91.6, 81.2, 76.4), 86.7),
}
FOUR = "antmaze-medium-play-v0", "antmaze-medium-diverse-v0", "antmaze-large-play-v0", "antmaze-large-diverse-v0"
TABLE_5 = {  # M: mean and deviation for each of FOUR, and the printed average; without M = 16 its means are Table 3
    1: (((50.2, 26.4), (67.2, 7.6), (48.2, 10.8), (58.8, 11.4)), 56.1),
    4: (((87.2, 1.1), (87.2, 3.8), (52.4, 13.0), (69.0, 8.3)), 74.0),
    16: (((83.6, 7.7), (88.0, 2.2), (71.8, 5.8), (76.4, 8.47)), 80.0),
    64: (((91.4, 1.5), (91.6, 2.3), (81.2, 3.0), (76.4, 2.1)), 85.2),
}
DIFFUSION_QL = 76.6, 78.6, 46.4, 56.6  # of FOUR, in Table 2

# Arms: the settings that differ from the row's preset
CLONING = dict(eta=0, entropy_coef=0, eval_candidates=1)
CLIPPED_DOUBLE_Q = dict(pessimism="min", num_critics=2, entropy_coef=0)
SIZES = {M: dict(num_critics=M) if M != 64 else {} for M in TABLE_5}
ONE_CRITIC = dict(num_critics=1, max_q_backup=False, eval_candidates=1)  # Figure 3, right
ALPHAS = {"0": ONE_CRITIC | dict(entropy_coef=0), "0.01": ONE_CRITIC}
TOY = {  # Figure 1, centre
    "behaviour cloning": CLONING,
    "plain Q": dict(num_critics=1, entropy_coef=0),
    "+ entropy": dict(num_critics=1),
    "+ ensemble": dict(entropy_coef=0),
    "both": {},
}
RELEASED = dict(variant="released")


class Section(NamedTuple):
    """A table of the paper, or the runs behind a picture: lines are (row, its arm's name, arm, the paper's figure)."""

    title: str
    note: str
    lines: list[tuple[str, str, dict, str]]
    average: float | None = None  # as the paper prints it
    picture: str = ""


def sections() -> list[Section]:
    found = []
    for domain, (title, figures, average) in TABLES_1_AND_2.items():
        rows = [env for env, row in erdp.ROWS.items() if row.domain == domain]
        lines = [(env, "", {}, "?" if x is None else f"{x}") for env, x in zip(rows, figures, strict=True)]
        note = "The figures marked with a question mark are not transcribed here: see Table 1 of the paper."
        found.append(Section(title, note * (None in figures), lines, average))
    for M, (figures, average) in TABLE_5.items():
        lines = [(env, "", SIZES[M], f"{mean} ± {std}") for env, (mean, std) in zip(FOUR, figures, strict=True)]
        title = f"Table{'' if M == 16 else 's 3 and'} 5, M = {M}"  # Table 3 is without M = 16
        found.append(Section(title, "", lines, average, "figure5.png" * (M == 64)))
    note = "One critic, and no max Q-backup in training or inference: there, one sampled action, not the best of many."
    lines = [(env, f", alpha = {alpha}", arm, "curve") for env in FOUR for alpha, arm in ALPHAS.items()]
    found.append(Section("Figure 3, right", note, lines, None, "figure3.png"))
    note = "The figures are Table 2's, those of Diffusion-QL there from that method's own paper."
    lines = []
    for env, theirs, (ours, _) in zip(FOUR, DIFFUSION_QL, TABLE_5[64][0], strict=True):
        lines += [(env, ", Diffusion-QL", CLIPPED_DOUBLE_Q, f"{theirs}"), (env, ", ours", {}, f"{ours}")]
    return [*found, Section("Figure 4", note, lines, None, "figure4.png")]


# ==== 2. Runs, their arms and groups ==================================================================================

MEASURING = {"num_steps", "eval_every", "eval_episodes"}  # they change what "final" and "best" mean
CRITICS_ONLY = {"num_critics", "lcb_coef", "pessimism", "max_q_backup", "variant"}  # of no effect on a cloned policy
FILES = "config.json", "metrics.csv", "result.json"


class Run(NamedTuple):
    path: Path
    config: dict
    rows: list[dict]  # of metrics.csv
    result: dict | None  # None: unfinished


class Group(NamedTuple):
    """Finished runs that differ in nothing but the seed and the machine."""

    env: str
    data: str
    transitions: int
    own_data: bool  # the row's own data, which is the paper's
    arm: dict
    runs: list[Run]

    def result(self, name: str) -> np.ndarray:
        return np.array([run.result[name] for run in self.runs])

    def curve(self) -> tuple[list[float], np.ndarray]:
        """The updates at which all runs were evaluated, and their scores (seeds, evaluations)."""
        columns = [{row["step"]: row["score_mean"] for row in run.rows} for run in self.runs]
        steps = sorted(set.intersection(*map(set, columns)))
        return steps, np.array([[column[step] for step in steps] for column in columns])


def read_run(folder: Path) -> Run:
    """The run that left `folder`. Raises UserError where a file of it is missing or damaged."""
    path, result = folder / "config.json", None
    try:
        config = json.loads(path.read_text())
        for field in (*(field.name for field in dataclasses.fields(erdp.Args)), "dataset_id", "transitions"):
            if field != "precision":  # younger than some records
                config[field]  # a KeyError is what we want
        if not (isinstance(config["env"], str) and isinstance(config["dataset_id"], str)):
            raise ValueError("its env or dataset_id is no text")
        path = folder / "metrics.csv"
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [{k: float(x or "nan") if k == "success" else float(x) for k, x in line.items()} for line in lines]
        if not rows or any(set(row) != set(erdp.RunFolder.COLUMNS) for row in rows):
            raise ValueError("its columns are not those of a run")
        path = folder / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
            if (result["final"], result["best"]) != (rows[-1]["score_mean"], max(row["score_mean"] for row in rows)):
                raise ValueError("it does not agree with metrics.csv")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else erdp.short(error)
        raise UserError(f"{path} cannot be used ({why}): copy the run again, or leave its folder out") from error
    return Run(folder, config, rows, result)


def read_runs(folders) -> list[Run]:
    """Every run below `folders`, finished ones first. Of those with the same settings, data and seed the first."""
    paths = [path.parent for top in folders for path in sorted(Path(top).rglob("config.json"))]
    runs, kept = [read_run(path) for path in paths if (path / "metrics.csv").exists()], {}
    for run in sorted(runs, key=lambda run: run.result is None):
        first = kept.setdefault((group_key(run), run.config["seed"]), run)
        if first.path.resolve() != run.path.resolve():
            print(f"{run.path} is left out: {first.path} has the same settings, data and seed")
    return list(kept.values())


def arm_of(config: dict) -> dict:
    """The settings that differ from the preset of the run's row, without those that change no result."""
    free = erdp.FREE - MEASURING - {"eval_candidates"} | {"seed", "env", "dataset"}
    preset = dataclasses.asdict(erdp.preset(config["env"]))
    arm = {name: config[name] for name in preset if name not in free and config[name] != preset[name]}
    return {k: x for k, x in arm.items() if not (CLONING.items() <= arm.items() and k in CRITICS_ONLY)}


def data_name(config: dict) -> str:
    """The data set's id; of a file's path the last three parts, as it can be reached by several ways."""
    name = config["dataset_id"]
    return "/".join(Path(name).parts[-3:]) if name.endswith((".hdf5", ".h5")) else name


def group_key(run: Run) -> tuple:
    config, arm = run.config, tuple(sorted(arm_of(run.config).items()))
    return config["env"], data_name(config), config["transitions"], config["dataset"] is None, arm


def group_runs(runs: list[Run]) -> list[Group]:
    """The finished runs, those of one arm on one data set together."""
    groups = {}

    def order(run: Run):
        config = run.config
        return data_name(config), label(arm_of(config)), config["num_steps"], str(group_key(run)), config["seed"]

    for run in sorted((run for run in runs if run.result), key=order):
        groups.setdefault(group_key(run), []).append(run)
    return [Group(*key[:-1], dict(key[-1]), some) for key, some in groups.items()]


def label(arm: dict) -> str:
    """An arm in words; what has no words, as flags. The number of updates is told apart from it, in a column."""
    words, rest = [], {key: value for key, value in arm.items() if key not in MEASURING}
    names = {"behaviour cloning": CLONING, "Diffusion-QL (min of 2)": CLIPPED_DOUBLE_Q, "released": RELEASED}
    for name, settings in names.items():
        if settings.items() <= rest.items():
            words.append(name)
            rest = {key: value for key, value in rest.items() if key not in settings}
    symbols = dict(num_critics="M", entropy_coef="alpha")
    words += [f"{symbol} = {rest.pop(key):g}" for key, symbol in symbols.items() if key in rest]
    flags = {key: "--" + "no-" * (value is False) + key.replace("_", "-") for key, value in rest.items()}
    words += [name if isinstance(rest[key], bool) else f"{name} {rest[key]}" for key, name in flags.items()]
    return ", ".join(words) or "as in the paper"


def beside_paper(groups: list[Group], env: str, arm: dict) -> list[Group]:
    """The groups that may stand beside a figure of the paper: its data, its settings, its number of updates."""
    return [group for group in groups if group.own_data and (group.env, group.arm) == (env, arm)]


# ==== 3. The data's own return ========================================================================================

def episode_ends(data: erdp.Batch) -> np.ndarray:
    """The last row of each episode: a terminal one, or one whose next state is not the following row's state."""
    state, next_state, terminal = (np.asarray(x) for x in (data.state, data.next_state, data.terminal))
    return np.append(np.flatnonzero((terminal[:-1] > 0) | (next_state[:-1] != state[1:]).any(1)), len(state) - 1)


def data_score(args: erdp.Args) -> tuple[float, int, int]:
    """The mean return of the data's episodes, rewards as recorded, as a score; episodes; transitions."""
    task = erdp.open_task(args)
    read = erdp.load_hdf5 if isinstance(task.data, Path) else erdp.load_minari
    data = erdp.toy_data(args.seed) if task.data is None else read(task)
    starts = np.append(0, episode_ends(data)[:-1] + 1)
    return float(task.score(np.add.reduceat(data.reward, starts).mean())), len(starts), len(data.reward)


def args_of(config: dict) -> erdp.Args:
    """A run's settings, on the CPU, with the very data set that it was trained on."""
    names = [field.name for field in dataclasses.fields(erdp.Args) if field.name in config]
    args = erdp.Args(**{name: config[name] for name in names})
    data = None if args.env == "toy" else config["dataset_id"]
    return dataclasses.replace(args, device="cpu", compile=False, dataset=data)


def data_scores(groups: list[Group], path: Path) -> dict[str, float]:
    """The scores of the groups' data. The file `path` keeps them, and stands in for data that is not on this machine;
    nothing is downloaded."""
    import minari

    try:
        scores = dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({erdp.short(error)}): delete it, it can be made again") from error
    known, installed = len(scores), minari.list_local_datasets()
    for group in groups:
        args, key = args_of(group.runs[0].config), data_key(group)
        if key not in scores and args.dataset and (args.dataset in installed or Path(args.dataset).is_file()):
            try:
                score, _, transitions = data_score(args)
            except UserError as error:
                print(f"the return of {key} stays unknown: {error}")
                continue
            if transitions == group.transitions:
                scores[key] = score
    if len(scores) > known:
        path.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def data_key(group: Group) -> str:
    return f"{group.env}: {group.data}, {group.transitions:,} transitions"


# ==== 4. Tables =======================================================================================================

def spread(values) -> str:
    """mean ± standard deviation (divisor n); of a single value, that value."""
    return f"{np.mean(values):.1f}" + f" ± {np.std(values):.1f}" * (len(values) > 1)


def outcome(group: Group) -> list:
    return [spread(group.result("final")), spread(group.result("best")), len(group.runs)]


def table(head: str, lines: list[list]) -> str:
    """A Markdown table; `head` has the names of the columns between commas. "None." if there is no line."""
    return figure2.table(head.split(", "), lines) + "\n" if lines else "None.\n"


def tables(groups: list[Group], unfinished: list[Run], scores: dict, pictures: set[str]) -> str:
    """tables.md. `scores` are the data's own, `pictures` the names of those that have been drawn."""
    text = [
        "# The paper's tables, and what has been run\n",
        "Made by `python results/report.py`. Scores are D4RL's normalised ones, ± is the standard deviation over seeds "
        "(divisor n). *Final* is a run's last evaluation, *best* its best one: the released code keeps the best, the "
        "paper does not say. Beside a figure of the paper stand only runs on the row's own data, with the paper's "
        "settings there and its number of updates.\n",
    ]
    shown = []
    for title, note, rows, average, picture in sections():
        lines, means = [], []
        for env, name, arm, figure in rows:
            some = beside_paper(groups, env, arm)
            shown += some
            means.append([np.mean(some[0].result(key)) if some else np.nan for key in ("final", "best")])
            ours = [[env + name, figure, *outcome(group), group.data] for group in some]
            lines += ours or [[env + name, figure, "not run", "not run", 0, ""]]
        if average is not None:
            ours = ["" if np.isnan(x) else f"{x:.1f}" for x in np.mean(means, 0)]
            lines.append(["average", f"{average}", *ours, "", ""])
        text += [f"## {title}\n", f"{note}\n"] if note else [f"## {title}\n"]
        text += [table("row, paper, final, best, seeds, data set", lines)]
        text += [f"![Learning curves]({picture})\n"] * (picture in pictures)
    rest = [group for group in groups if group.env != "toy" and not any(group is other for other in shown)]
    for own, title in ((True, "Runs on the paper's data with other settings"), (False, "Runs on other data")):
        lines = []
        for g in (g for g in rest if g.own_data == own):
            config, score = g.runs[0].config, scores.get(data_key(g))
            numbers = [f"{config['num_steps']:,}", config["eval_episodes"]]
            mean = "n/a" if score is None else f"{score:.1f}"
            lines.append([g.env, g.data, f"{g.transitions:,}", mean, label(g.arm), *numbers, *outcome(g)])
        text += [f"## {title}\n", "Not to be held against the paper's figures.\n"] if lines else [f"## {title}\n"]
        head = "row, data set, transitions, data's own score, settings, updates, episodes, final, best, seeds"
        text += [table(head, lines)]
    text += ["![Learning curves of the runs on other data](curves.png)\n"] * ("curves.png" in pictures)
    lines = []
    for path, config, rows, _ in unfinished:
        done = f"{rows[-1]['step']:,.0f} of {config['num_steps']:,}"
        lines.append([path.name, config["env"], data_name(config), label(arm_of(config)), config["seed"], done])
    text += ["## Unfinished runs\n", table("folder, row, data set, settings, seed, updates", lines)]
    return "\n".join(text)


# ==== 5. Learning curves ==============================================================================================

def draw_band(axis, group: Group, name: str):
    steps, values = group.curve()
    mean, std = values.mean(0), values.std(0)
    seeds = f"{len(values)} seed" + "s" * (len(values) > 1)
    (line,) = axis.plot(steps, mean, marker=".", label=f"{name} ({seeds})")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.1, color=line.get_color())


def save(figure, path: Path):
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_curves(path: Path, panels: dict[str, list[tuple[str, Group]]], scores: dict[str, float]):
    """A panel for each title, three in a row, with the data's own score as a dashed line where it is known."""
    width, height = min(len(panels), 3), -(-len(panels) // 3)
    figure, axes = plt.subplots(height, width, figsize=(6 * width, 4.5 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, group in lines:
            draw_band(axis, group, name)
        score = scores.get(data_key(lines[0][1]))
        if score is not None:
            axis.axhline(score, color="gray", linestyle="--", label="the data's own score")
        axis.set(xlabel="updates", ylabel="score: mean ± deviation (seeds)")
        axis.set_title(title, fontsize="medium")
        axis.legend(fontsize="small")
    save(figure, path)


def other_panels(groups: list[Group]) -> dict[str, list[tuple[str, Group]]]:
    """The runs on other data: a panel for each data set and loss, and of each arm there its longest runs."""
    panels = {}
    for group in sorted(groups, key=lambda group: group.runs[0].config["num_steps"]):
        if not group.own_data:
            rest = {name: x for name, x in group.arm.items() if name not in MEASURING}
            loss = {name: rest.pop(name) for name in ("loss", "clip_denoised") if name in rest}
            title = data_key(group).replace(": ", "\n") + (f"\n{label(loss)}" if loss else "")
            panels.setdefault(title, {})[label(rest)] = group
    return {title: list(panels[title].items()) for title in sorted(panels)}


def panels_of(groups: list[Group]) -> dict[str, dict]:
    """The pictures of learning curves that can be drawn, each with its panels."""

    def paper(name: str, arms: dict):
        def lines(env):
            return [(f"{name}{key}", group) for key, arm in arms.items() for group in beside_paper(groups, env, arm)]

        return {f"{env}\n{name or 'method'}": found for env in FOUR if (found := lines(env))}

    sizes = paper("M = ", {M: SIZES[M] for M in (1, 4, 64)})
    methods = paper("", {"Diffusion-QL": CLIPPED_DOUBLE_Q, "ours": {}})
    found = {"figure3.png": sizes | paper("alpha = ", ALPHAS), "figure4.png": methods, "figure5.png": sizes}
    return {name: panels for name, panels in (found | {"curves.png": other_panels(groups)}).items() if panels}


# ==== 6. Figure 1 =====================================================================================================

def figure1(groups: list[Group], out: Path):
    """figure1.md and figure1.png, from the toy runs."""
    arms = TOY | {"both, released": RELEASED}
    found = {name: some[0] for name, arm in arms.items() if (some := beside_paper(groups, "toy", arm))}
    lines = [[name, *toy_line(found[name])] if name in found else [name, "", *["not run"] * 3, 0] for name in arms]
    others = [g for g in groups if g.env == "toy" and not any(g is known for known in found.values())]
    lines += [[label(group.arm), *toy_line(group)] for group in others]
    text = [
        "# Figure 1: the toy task\n",
        "Made by `python results/report.py`. Scores are in percent of the best possible return, ± is the standard "
        "deviation over seeds (divisor n). The deviation in training is that over the evaluations in the last half of "
        "a run, averaged over seeds.\n",
        table("policy, updates, deviation in training, final, best, seeds", lines),
        verdict({name: {r.config["seed"]: r.result["final"] for r in g.runs} for name, g in found.items()}) + "\n",
    ]
    if found:
        draw_figure1(out / "figure1.png", found)
        text.append("![Reward and data; return while training; learned Q at state 0](figure1.png)\n")
    (out / "figure1.md").write_text("\n".join(text))


def toy_line(group: Group) -> list:
    _, scores = group.curve()
    unsteady = scores[:, scores.shape[1] // 2 :].std(1).mean()
    return [f"{group.runs[0].config['num_steps']:,}", f"{unsteady:.1f}", *outcome(group)]


def verdict(finals: dict[str, dict[int, float]]) -> str:
    """Whether entropy and ensemble together have the best mean and the least spread, as Figure 1 claims.

    finals[arm][seed] is a final score. It is about the policies that learn with Q (a cloned one is steadily bad), and
    the seeds that all of them have. A difference beyond two standard errors counts.
    """
    arms = [name for name in TOY if name != "behaviour cloning"]
    seeds = sorted(set.intersection(*(set(finals.get(name, ())) for name in arms)))
    n = len(seeds)
    if n < 2:
        return "Whether the paper's claim holds cannot be said yet: it takes two seeds that all arms have."
    scores = {name: np.array([finals[name][seed] for seed in seeds]) for name in arms}
    ours = scores.pop("both")
    rival, steady = max(scores, key=lambda name: scores[name].mean()), min(scores, key=lambda name: scores[name].std())
    gain, ratio = ours - scores[rival], ours.std() / scores[steady].std()
    gap, error = gain.mean(), gain.std(ddof=1) / n**0.5
    chance = np.exp(2 / (n - 1) ** 0.5)  # two standard errors of the logarithm of a ratio of deviations

    def judge(better: bool, sure: bool) -> str:
        return f"the claim {'holds' if better else 'does not hold'}" if sure else "these seeds cannot tell"

    return (
        "The paper's claim is that entropy and ensemble together give the best return with the least variance. Among "
        f"the policies that learn with Q, over {n} seeds:\n\n"
        f"* Return: their mean final score is {ours.mean():.1f}, the best of the others {scores[rival].mean():.1f} "
        f"({rival}). Seed by seed, as a seed makes its own data, the difference is {gap:+.1f} with a standard error of "
        f"{error:.1f}: **{judge(gap > 0, abs(gap) > 2 * error)}**.\n"
        f"* Variance: their deviation over seeds is {ours.std():.1f}, the least of the others "
        f"{scores[steady].std():.1f} ({steady}), a ratio of {ratio:.2f}, where chance alone makes ratios from "
        f"{1 / chance:.2f} to {chance:.2f}: **{judge(ratio < 1, abs(np.log(ratio)) > np.log(chance))}**."
    )


def draw_figure1(path: Path, arms: dict[str, Group]):
    figure, (left, centre, right) = plt.subplots(1, 3, figsize=(18, 5.5))
    x = np.linspace(-2, 2, 401)
    left.plot(x, erdp.ToyEnv.reward(x))
    left.set(xlabel="state", ylabel="reward", title="Reward and data")
    density = left.twinx()
    density.hist(erdp.toy_data(0).next_state[:, 0], 60, density=True, alpha=0.4, color="tab:orange")
    density.set(ylabel="density of the states in the data, seed 0")
    for name, group in arms.items():
        draw_band(centre, group, name)
    centre.axhline(100, color="gray", linestyle="--", label="best possible")
    centre.set(xlabel="updates", ylabel="score: mean ± deviation (seeds)", title="Percent of the best return")
    a, missing = np.linspace(-1, 1, 201, dtype=np.float32)[:, None], []
    second = erdp.ToyEnv.reward(a + np.linspace(-1, 1, 401)).max(1, keepdims=True)
    right.plot(a, erdp.ToyEnv.reward(a) + erdp.DISCOUNT * second, "--", color="gray", label="best policy's true Q")
    for name in ("plain Q", "both"):
        policies = [run.path / "policy.pt" for run in (arms[name].runs if name in arms else [])]
        if not any(policy.exists() for policy in policies):
            missing.append(f"{name}: no policy.pt")
            continue
        actor = erdp.load_policy(next(policy for policy in policies if policy.exists()))
        with torch.no_grad():
            q = actor.critics(torch.zeros(len(a), 2), torch.as_tensor(a))  # (M, 201)
        seed = actor.args.seed
        (line,) = right.plot(a, q.mean(0), label=f"{name}, seed {seed}" + ": mean of the ensemble" * (len(q) > 1))
        if len(q) > 1:
            low = erdp.lcb(q, actor.args.lcb_coef)
            right.plot(a, low, ":", color=line.get_color(), label=f"{name}: LCB, beta = {actor.args.lcb_coef:g}")
    right.text(0.98, 0.02, "\n".join(missing), transform=right.transAxes, ha="right")
    right.set(xlabel="first action", ylabel="value", title="Q at state 0")
    for axis in (centre, right):
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    save(figure, path)


# ==== 7. Diagnosis of one run =========================================================================================

def returns_to_go(reward: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The discounted return from each row to its episode's last."""
    value, last = np.array(reward, np.float64), np.isin(np.arange(len(reward)), ends)
    for i in range(len(value) - 2, -1, -1):
        value[i] += 0 if last[i] else erdp.DISCOUNT * value[i + 1]
    return value


@torch.no_grad()
def target_q(agent: erdp.Agent, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Q (M, N) of the target ensemble, by which the policy acts."""
    return torch.cat([agent.critics_target(*pair) for pair in zip(state.split(512), action.split(512), strict=True)], 1)


def values(agent: erdp.Agent, q: torch.Tensor) -> dict[str, np.ndarray]:
    """What the ensemble makes of its members' Q (M, N)."""
    low = erdp.pessimistic_value(q, agent.args.pessimism, agent.args.lcb_coef, agent.args.variant)
    return {"ensemble's mean": q.mean(0).numpy(), "pessimistic value": low.numpy()}


@torch.no_grad()
def other_actions(agent: erdp.Agent, state: torch.Tensor, action: torch.Tensor) -> dict[str, torch.Tensor]:
    """Other actions than the data's own for the states of these rows: the policy's, and two that ignore the state."""
    generator, N, A, T = torch.Generator().manual_seed(0), *action.shape, agent.sde.num_steps
    noise, shuffled = torch.randn(T, N, A, generator=generator), torch.randperm(N, generator=generator)
    return {
        "the policy's": erdp.sample_actions(agent.policy, agent.sde, state, noise, agent.args.clip_denoised),
        "of another row": action[shuffled],
        "uniform": 2 * torch.rand(N, A, generator=generator) - 1,
    }


def start_actions(agent: erdp.Agent, data: erdp.Batch, starts: np.ndarray) -> dict[str, np.ndarray]:
    """Actions (N, A), in [-1, 1], at the 64 start states nearest to the first: the data's, samples, and as it acts."""
    first, A = data.state[starts], data.action.shape[1]
    near = ((first - first[0]) / (first.std(0, correction=0) + 1e-6)).square().sum(1).argsort()[:64]
    actor, taken = agent.actor(-np.ones(A), np.ones(A)), {"the data": data.action[starts][near].numpy()}
    for name, candidates in {"the policy's samples": 1, "as it acts": agent.args.eval_candidates}.items():
        actor.args = dataclasses.replace(agent.args, eval_candidates=candidates)
        blocks = first[near].repeat(4, 1).split(8)
        streams = [[np.random.default_rng((k, i)) for i in range(len(block))] for k, block in enumerate(blocks)]
        taken[name] = np.concatenate([actor(block, some) for block, some in zip(blocks, streams, strict=True)])
    return taken


def loss_terms(agent: erdp.Agent, data: erdp.Batch, batches: int = entropy.BATCHES) -> dict[str, tuple[float, float]]:
    """Each term of Eq. 15, and Eq. 16: its value and the norm of its gradient, means over batches."""
    args, found = agent.args, []
    for batch, noise in entropy.drawn(data, args, batches):
        next_state = batch.next_state.repeat(noise.next_action.shape[1] // args.batch_size, 1)
        with torch.no_grad():
            a = erdp.sample_actions(agent.policy_ema, agent.sde, next_state, noise.next_action, args.clip_denoised)
        a = a.view(-1, *batch.action.shape)
        q_loss, q = erdp.critic_loss(agent.critics, agent.critics_target, batch, a, args.pessimism)
        losses, gradients = entropy.terms_of_eq15(agent, batch, noise, q.detach(), args)
        terms = [*zip(losses, gradients), (losses.sum(), gradients.sum(0))]
        terms.append((q_loss, entropy.gradient(q_loss, agent.critics)))
        found.append([(value.item(), g.norm().item()) for value, g in terms])
    names = "diffusion loss", "-lambda Q", "entropy term", "all of Eq. 15", "Eq. 16"
    return dict(zip(names, np.mean(found, 0).tolist(), strict=True))


def diagnose(folder: Path) -> str:
    """Writes diagnosis.md and diagnosis.png into a run's folder, from its checkpoint.pt and its data."""
    config = read_run(folder).config
    args, (agent, saved) = args_of(config), entropy.load_agent(folder / "checkpoint.pt")
    data, (score, episodes, n) = erdp.load_data(erdp.open_task(args), args), data_score(args)
    if n != config["transitions"]:
        theirs = f"the {config['transitions']} of the run"
        raise UserError(f"{config['dataset_id']} has {n} transitions, not {theirs}: give the data that it had")
    ends, rows = episode_ends(data), np.arange(n)
    starts, end = np.append(0, ends[:-1] + 1), ends[np.searchsorted(ends, rows)]
    returns, terminal = returns_to_go(data.reward.numpy(), ends), data.terminal.numpy() > 0
    known = rows[terminal[end] | (erdp.DISCOUNT ** (end - rows) < 0.05)]
    note = "rows that determine their return-to-go: their episode ends terminal, or where the discount is below 0.05"
    if not len(known):
        known, note = rows, "rows; all episodes are cut off while rewards still count: the return-to-go lacks its tail"
    some = np.random.default_rng(0).permutation(known)[:4096]
    figure, ((scatter, along), (start, bars)) = plt.subplots(2, 2, figsize=(13, 9))

    true, lines = returns[some], []
    state, action = data.state[some], data.action[some]
    own = target_q(agent, state, action)
    for name, x in values(agent, own).items():
        scatter.plot(true, x, ".", markersize=2, label=name)
        share, correlation = f"{(x > true).mean():.0%}", f"{np.corrcoef(x, true)[0, 1]:.2f}"
        lines.append([name, f"{x.mean():.2f}", f"{x.std():.2f}", share, correlation])
    lines.append(["return-to-go", f"{true.mean():.2f}", f"{true.std():.2f}", "", ""])
    scatter.axline((true.mean(), true.mean()), slope=1, color="gray")
    scatter.set(xlabel="the data's discounted return-to-go", ylabel="value", title="Values of the data's actions")

    reached = args.env.startswith("antmaze") and terminal[ends].any()  # there, the highest return is the shortest way
    total = np.where(terminal[ends], ends - starts, -1) if reached else np.add.reduceat(data.reward.numpy(), starts)
    e = total.argmax()
    episode = rows[starts[e] : ends[e] + 1]
    for name, x in values(agent, target_q(agent, data.state[episode], data.action[episode])).items():
        along.plot(x, label=name)
    along.plot(returns[episode], "--", color="gray", label="return-to-go")
    which = "longest that reaches the goal" if reached else "highest return"
    along.set(xlabel="step", ylabel="value", title=f"Along one of the data's episodes: the {which}")

    compared = [["the data's", f"{float(own.mean()):.2f}", *["0.00"] * 3]]
    for name, other in other_actions(agent, state, action).items():
        gain = target_q(agent, state, other) - own  # (M, N)
        figures = (own + gain).mean(), gain.mean(), gain.mean(0).std(), gain.std(0, correction=0).mean()
        compared.append([name, *(f"{float(x):.2f}" for x in figures)])

    taken, moved = start_actions(agent, data, starts), []
    for k, (name, x) in enumerate(taken.items()):
        start.errorbar(np.arange(x.shape[1]) + k / 6, x.mean(0), x.std(0), fmt="o", label=name)
        away = np.abs(x.mean(0) - taken["the data"].mean(0)).mean()
        moved.append([name, f"{away:.3f}", f"{x.std(0).mean():.3f}", f"{(np.abs(x) > 0.99).mean():.0%}"])
    start.set(xlabel="dimension of the action", ylabel="mean ± deviation", title="Actions at the start of an episode")

    terms = loss_terms(agent, data)
    bars.bar(list(terms), [norm for _, norm in terms.values()])
    bars.set(yscale="log", ylabel="gradient norm before clipping", title="The terms of the losses")
    for axis in (scatter, along, start):
        axis.legend(fontsize="small")
    save(figure, folder / "diagnosis.png")
    text = "\n".join([
        f"# Diagnosis of {folder.name}\n",
        f"{args.env} on {data_name(config)}, {label(arm_of(config))}, seed {args.seed}, update {saved['step']:,}. "
        f"The data: {n:,} transitions, {episodes:,} episodes, their mean return as a score {score:.1f}.\n",
        "## Values against the data's return-to-go\n",
        f"The target ensemble at {len(some):,} {note}. Rewards are scaled as in training. A policy that is better than "
        "the data has higher values than it.\n",
        table("what, mean, deviation, above the return-to-go, correlation with it", lines),
        "## What an action is worth\n",
        "Q at the same states for other actions, and by how much it is above Q of the data's: mean and deviation over "
        "states of the ensemble's mean, and the members' deviation around it, mean over states.\n",
        table("action, mean Q, above the data's, over states, over members", compared),
        "## Actions at the start of an episode\n",
        f"At {len(taken['the data'])} start states near the first one, on the scale from -1 to 1. Distance: of the "
        "means; it and the deviation are averages over dimensions.\n",
        table("whose, distance from the data, deviation, at the bounds", moved),
        "## The terms of Eq. 15, and Eq. 16\n",
        f"Means over {entropy.BATCHES} batches. The policy's gradient and the critics' are clipped at "
        f"{args.grad_norm:g}.\n",
        table("term, value, gradient norm", [[name, f"{v:.4g}", f"{norm:.4g}"] for name, (v, norm) in terms.items()]),
        "![Values, actions, gradients](diagnosis.png)\n",
    ])
    (folder / "diagnosis.md").write_text(text)
    return text


# ==== 8. The command line =============================================================================================

def collect(runs: list[Run], folder: Path):
    """Copies the FILES of each finished run into a folder of its name in `folder`."""
    for run in (run for run in runs if run.result):
        target = folder / run.path.name
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            content, copy = (run.path / name).read_bytes(), target / name
            if copy.exists() and copy.read_bytes() != content:
                raise UserError(f"{target} holds another run than {run.path}: rename one of the two")
            copy.write_bytes(content)
        print(f"{run.path} -> {target}")


def report(runs: list[Run], out: Path):
    """All tables and pictures, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    groups, unfinished = group_runs(runs), [run for run in runs if not run.result]
    scores, pictures = data_scores(groups, out / "data.json"), panels_of(groups)
    for name, panels in pictures.items():
        draw_curves(out / name, panels, scores)
    (out / "tables.md").write_text(tables(groups, unfinished, scores, set(pictures)))
    figure1(groups, out)
    print(f"{len(runs) - len(unfinished)} finished and {len(unfinished)} unfinished runs: see tables.md in {out}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders that hold runs (default: runs and results/runs)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to (default: results)")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="copy the finished runs' records there instead")
    parser.add_argument("--diagnose", type=Path, metavar="RUN_FOLDER", help="look into this run instead")

    def fail(message: str):
        raise UserError(f"{message}: see --help")

    parser.error = fail
    try:
        args = parser.parse_args(argv)
        if missing := [folder for folder in args.runs if not folder.is_dir()]:
            raise UserError(f"{missing[0]} is no folder: give folders that hold runs")
        if args.diagnose:
            print(diagnose(args.diagnose))
            return 0
        runs = read_runs(args.runs or [RESULTS.parent / "runs", RESULTS / "runs"])
        collect(runs, args.collect) if args.collect else report(runs, args.out)
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report: {erdp.short(error)}: give a folder that can be read and written", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
