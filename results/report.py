"""Tables and pictures of finished runs, beside the figures that the paper prints.

    python results/report.py                      # the runs in runs.jsonl -> the pages and pictures here
    python results/report.py FOLDER ...           # the runs below these folders -> FOLDER/report
    python results/report.py FOLDER --collect     # adds these runs, once they are finished, to results/runs.jsonl
    python results/report.py FOLDER --publish     # the same, and makes the pages here anew

What a run is, is read from its settings, never from its name. A line of a table of the paper is filled by runs on the
row's own data with the settings that the paper has there, and by no others: runs with other settings, and runs on other
data, have tables of their own. Unfinished runs are listed, not averaged. A folder that cannot be read is named and left
out. Lines of a peers.jsonl beside the runs (peers.py) have a table too.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figure1 import figure1, mean_gain, paired
from matplotlib import pyplot as plt
from pages import RESULTS, save, table
from runs import (
    CLIPPED_DOUBLE_Q,
    CLONING,
    MEASURING,
    RECORDS,
    Group,
    Run,
    collect,
    group_runs,
    label,
    read_records,
    read_runs,
)

import erdp
from erdp import UserError

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
ONE_CRITIC = dict(num_critics=1, max_q_backup=False, eval_candidates=1)  # Figure 3, right
ALPHAS = {"alpha = 0": ONE_CRITIC | dict(entropy_coef=0.0), "alpha = 0.01": ONE_CRITIC}
SIZES = {f"M = {M}": dict(num_critics=M) if M != 64 else {} for M in TABLE_5}
METHODS = {"clipped double Q": CLIPPED_DOUBLE_Q, "ours": {}}


class Section(NamedTuple):
    """A table of the paper: lines are (row, its arm's name, arm, the paper's figure)."""

    title: str
    note: str
    lines: list[tuple[str, str, dict, str]]
    average: float | None = None  # as the paper prints it
    picture: str = ""


def sections() -> list[Section]:
    found = []
    for domain, (title, figures, average) in TABLES_1_AND_2.items():
        rows = [env for env, row in erdp.ROWS.items() if row.domain == domain]
        lines = [(env, "", {}, "see the paper" if x is None else f"{x}") for env, x in zip(rows, figures, strict=True)]
        found.append(Section(title, "", lines, average))
    for arm, (M, (figures, average)) in zip(SIZES.values(), TABLE_5.items()):
        lines = [(env, "", arm, f"{mean} ± {std}") for env, (mean, std) in zip(FOUR, figures, strict=True)]
        title = f"Table{'' if M == 16 else 's 3 and'} 5, M = {M}"  # Table 3 is without M = 16
        found.append(Section(title, "", lines, average, "figure5.png" * (M == 64)))
    note = "One critic, and no max Q-backup in training or inference: there, one sampled action, not the best of many."
    lines = [(env, f", {name}", arm, "a curve") for env in FOUR for name, arm in ALPHAS.items()]
    found.append(Section("Figure 3, right", note, lines, None, "figure3.png"))
    note = "The paper's figures are Table 2's; it has Diffusion-QL, which learns otherwise, for clipped double Q."
    lines = []
    for env, theirs, (ours, _) in zip(FOUR, DIFFUSION_QL, TABLE_5[64][0], strict=True):
        lines += [(env, ", clipped double Q", CLIPPED_DOUBLE_Q, f"{theirs} (Diffusion-QL)")]
        lines += [(env, ", ours", {}, f"{ours}")]
    return [*found, Section("Figure 4", note, lines, None, "figure4.png")]


# ==== 2. Tables =======================================================================================================


def of_arm(groups: list[Group], env: str, arm: dict) -> Group | None:
    """The group that may stand beside a figure of the paper: its data, its settings, its number of updates."""
    return next((group for group in groups if group.own_data and (group.env, group.arm) == (env, arm)), None)


HEAD = """# The paper's tables, and what has been run

Made by `python results/report.py`. Scores are D4RL's normalised ones, ± is the standard deviation over seeds (divisor
n). *Final* is a run's last evaluation, *best* its best one: the released code keeps the best, the paper does not say.
Beside a figure of the paper stand only runs on the row's own data, with the paper's settings there and its number of
updates; rows and tables without such runs are left out.
"""
CLONED = """Final scores, seed by seed. Both have the same episodes, but act differently: cloning by a plain sample,
what learns with Q by the best of 50, unless `--eval-candidates` says otherwise. Mean difference with its 95% interval,
by Student's t over seeds, as if their number had been fixed beforehand, which on Hopper it was not
([looks.md](looks.md)); bold: the interval leaves out 0.
"""
PEERS = """Small networks on the same data and episodes (`python results/peers.py`): the score of the last policy, with
its standard error over episodes, not over seeds.
"""


def tables(groups: list[Group], unfinished: list[Run], peers: list[dict], pictures: set[str]) -> str:
    """tables.md. `pictures` are the names of those that have been drawn."""
    text, shown = [HEAD], []
    for title, note, rows, average, picture in sections():
        found = [(env + name, figure, of_arm(groups, env, arm)) for env, name, arm, figure in rows]
        lines = [[name, figure, *group.outcome(), group.data] for name, figure, group in found if group]
        shown += [group for *_, group in found if group]
        if average is not None and len(lines) == len(rows):
            means = np.mean([(group.mean("final"), group.mean("best")) for *_, group in found], 0)
            lines.append(["average", f"{average}", *(f"{x:.1f}" for x in means), "", ""])
        if lines:
            text += [f"## {title}\n", *[f"{note}\n"] * bool(note)]
            text += [table(["row", "paper", "final", "best", "seeds", "data set"], lines) + "\n"]
            text += [f"![Learning curves]({picture})\n"] * (picture in pictures)
    if not shown:
        text.append("No run on a row's own data has the paper's settings and number of updates yet.\n")
    rest = [group for group in groups if group.env != "toy" and not any(group is other for other in shown)]
    for own, title in ((True, "Runs on the paper's data with other settings"), (False, "Runs on other data")):
        lines = []
        for g in (g for g in rest if g.own_data == own):
            score, steps = "" if g.data_score is None else f"{g.data_score:.1f}", f"{g.setting('num_steps'):,}"
            lines.append([g.env, g.data, score, label(g.arm), steps, g.setting("eval_episodes"), *g.outcome()])
        if lines:
            head = ["row", "data set", "data's own score", "settings", "updates", "episodes", "final", "best", "seeds"]
            text += [f"## {title}\n", "Not to be held against the paper's figures.\n", table(head, lines) + "\n"]
    if lines := against_cloning(rest):
        head = ["row", "data set", "settings", "updates", "ahead of cloning by", "seeds"]
        text += ["## Learning with Q against cloning\n", CLONED, table(head, lines) + "\n"]
        text += ["![The data sets on which cloning has two seeds or more](cloning.png)\n"] * ("cloning.png" in pictures)
    text += ["![Learning curves of the runs on other data](curves.png)\n"] * ("curves.png" in pictures)
    if peers:
        head = ["data set", "peer", "seed", "updates", "episodes", "score ± standard error", "the data's own"]
        text += ["## Plain peers\n", PEERS, table(head, peer_lines(peers)) + "\n"]
    if unfinished:
        lines = [[run.name, f"{run.evaluations['step'][-1]:,.0f} of {run.config['num_steps']:,}"] for run in unfinished]
        text += ["## Unfinished runs\n", table(["run", "updates"], lines) + "\n"]
    return "\n".join(text)


def against_cloning(groups: list[Group]) -> list[list]:
    """The lines of every arm with two seeds or more in common with cloning of the same loss and length."""

    def alike(group):  # what an arm has in common with the cloning that it is held against
        shared = MEASURING | {"loss", "clip_denoised", "schedule", "num_diffusion_steps"}
        return group.env, group.data, group.transitions, {name: x for name, x in group.arm.items() if name in shared}

    lines, cloned, learned = [], [], []
    for group in groups:
        (cloned if CLONING.items() <= group.arm.items() else learned).append(group)
    for group, clone in itertools.product(learned, cloned):
        ours, theirs = paired(group, clone)
        if len(ours) > 1 and alike(group) == alike(clone):
            names = group.env, group.data, label(group.arm), f"{group.setting('num_steps'):,}"
            lines.append([*names, mean_gain(ours, theirs), len(ours)])
    return lines


def peer_lines(peers: list[dict]) -> list[list]:
    lines = []
    for peer in sorted(peers, key=lambda peer: (peer["dataset"], peer["peer"], peer["steps"], peer["seed"])):
        score = f"{peer['score']:.1f} ± {peer['error']:.1f}"
        names = (peer[name] for name in ("dataset", "peer", "seed"))
        lines.append([*names, f"{peer['steps']:,}", peer["episodes"], score, f"{peer['data']:.1f}"])
    return lines


# ==== 3. Learning curves ==============================================================================================


def draw_curves(path: Path, panels: dict[str, dict[str, Group]]):
    """A panel for each title, three in a row, with the data's own score as a dashed line where it is known."""
    width, height = min(len(panels), 3), -(-len(panels) // 3)
    figure, axes = plt.subplots(height, width, figsize=(6 * width, 4.5 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, panels.items()):
        for name, group in lines.items():
            group.draw(axis, name)
        if group.data_score is not None:
            axis.axhline(group.data_score, color="gray", linestyle="--", label="the data's own score")
        axis.set(xlabel="updates", ylabel="score: mean ± deviation (seeds)")
        axis.set_title(title, fontsize="medium")
        axis.legend(fontsize="small")
    save(figure, path)


def panels_of(groups: list[Group]) -> dict[str, dict]:
    """The pictures of learning curves that can be drawn: panel, line, group."""

    def paper(arms: dict):
        panels = {}
        for env in FOUR:
            lines = {name: of_arm(groups, env, arm) for name, arm in arms.items()}
            panels[f"{env}\n{', '.join(arms)}"] = {name: group for name, group in lines.items() if group}
        return {title: lines for title, lines in panels.items() if lines}

    others = {}  # a panel for each data set, loss and number of episodes, and of each arm there its longest runs
    for group in sorted(groups, key=lambda g: (g.env, g.data, g.transitions, g.setting("num_steps"))):
        if not group.own_data and group.env != "toy":
            rest = {name: x for name, x in group.arm.items() if name not in MEASURING}
            loss = {name: rest.pop(name) for name in ("loss", "clip_denoised") if name in rest}
            told = f"{label(loss)}, " * bool(loss) + f"{group.setting('eval_episodes')} episodes an evaluation"
            row = "" if group.env == "own" else f"{group.env}\n"
            title = f"{row}{group.data}, {group.transitions:,} transitions\n{told}"
            others.setdefault(title, {})[label(rest)] = group
    sizes = paper({name: SIZES[name] for name in ("M = 1", "M = 4", "M = 64")})
    found = {"figure3.png": sizes | paper(ALPHAS), "figure4.png": paper(METHODS), "figure5.png": sizes}
    cloned = {title: lines for title, lines in others.items() if "behaviour cloning" in lines}
    cloned = {title: lines for title, lines in cloned.items() if len(lines["behaviour cloning"].runs) > 1}
    found |= {"cloning.png": cloned, "curves.png": others}
    return {name: panels for name, panels in found.items() if panels}


# ==== 4. The command line =============================================================================================


def report(runs: list[Run], peers: list[dict], out: Path):
    """All tables and pictures, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    groups, unfinished = group_runs(runs), [run for run in runs if not run.result]
    pictures = panels_of(groups)
    for name, panels in pictures.items():
        draw_curves(out / name, panels)
    (out / "tables.md").write_text(tables(groups, unfinished, peers, set(pictures)))
    figure1(groups, out)
    print(f"{len(runs) - len(unfinished)} finished and {len(unfinished)} unfinished runs: see tables.md in {out}")


def read_peers(folders: list[Path]) -> list[dict]:
    paths = [path for folder in folders if (path := folder / "peers.jsonl").exists()]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs (default: results/runs.jsonl)")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: FOLDER/report)")
    parser.add_argument("--collect", action="store_true", help="add the finished runs to results/runs.jsonl instead")
    parser.add_argument("--publish", action="store_true", help="add them, and make the pages in results/ anew")
    parser.error = lambda message: parser.exit(2, f"report: {message}: see --help\n")
    args = parser.parse_args(argv)
    if missing := [folder for folder in args.folders if not folder.is_dir()]:
        parser.error(f"{missing[0]} is no folder: give folders that hold runs")
    if not args.folders and args.collect:
        parser.error("--collect needs a folder")
    try:
        runs = read_runs(args.folders) if args.folders else read_records(RECORDS)
        if args.folders and (args.collect or args.publish):
            runs = collect(runs)
            print(f"{RECORDS} has {len(runs)} runs")
        if not args.collect:
            here = not args.folders or args.publish
            peers = read_peers([RESULTS] if here else args.folders)
            report(runs, peers, args.out or (RESULTS if here else args.folders[0] / "report"))
    except (UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
