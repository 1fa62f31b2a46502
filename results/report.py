"""Tables and pictures of finished runs, beside the figures that the paper prints.

    python results/report.py                      # the runs in runs.jsonl -> tables.md, figure1.md, their pictures
    python results/report.py FOLDER ...           # the runs below these folders -> FOLDER/report
    python results/report.py FOLDER --publish     # adds these runs, once they are finished, to runs.jsonl before

A figure of the paper stands beside runs on the row's own data with the settings that the paper has there, and beside no
others. Unfinished runs are listed, not averaged. A folder that cannot be read is named and left out.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from figure1 import figure1, mean_gain, paired
from matplotlib import pyplot as plt
from pages import RESULTS, fill, save, start, table
from runs import CLIPPED_DOUBLE_Q, CLONING, MEASURING, Group, Run, group_runs, keep, label, read_records, read_runs

import erdp

# ==== 1. What the paper prints ========================================================================================

# Domain: the last column of Table 1 or 2, in the order of erdp.ROWS; of Kitchen's the first.
TABLES_1_AND_2 = {
    "gym": (54.9, 94.2, 92.5, 57.0, 102.7, 94.20, 90.32, 111.9, 111.2),
    "adroit": (67.2, 66.3),
    "kitchen": (82.3,),
    "antmaze": (100.0, 79.8, 91.4, 91.6, 81.2, 76.4),
}
FOUR = "antmaze-medium-play-v0", "antmaze-medium-diverse-v0", "antmaze-large-play-v0", "antmaze-large-diverse-v0"
TABLE_5 = {  # M: mean and deviation for each of FOUR; without M = 16 its means are Table 3
    1: ((50.2, 26.4), (67.2, 7.6), (48.2, 10.8), (58.8, 11.4)),
    4: ((87.2, 1.1), (87.2, 3.8), (52.4, 13.0), (69.0, 8.3)),
    16: ((83.6, 7.7), (88.0, 2.2), (71.8, 5.8), (76.4, 8.47)),
    64: ((91.4, 1.5), (91.6, 2.3), (81.2, 3.0), (76.4, 2.1)),
}
DIFFUSION_QL = 76.6, 78.6, 46.4, 56.6  # of FOUR, in Table 2; Figure 4 holds clipped double Q against ERDP


def printed() -> dict[tuple[str, str], str]:
    """What the paper prints, by row and settings in words."""
    found = {}
    for domain, figures in TABLES_1_AND_2.items():
        rows = [env for env, row in erdp.ROWS.items() if row.domain == domain]
        for env, figure in zip(rows, figures):
            found[env, label({})] = f"{figure}"
    for M, figures in TABLE_5.items():
        arm = {} if M == 64 else dict(num_critics=M)
        for env, (mean, std) in zip(FOUR, figures, strict=True):
            found[env, label(arm)] = f"{mean} ± {std}"
    for env, figure in zip(FOUR, DIFFUSION_QL, strict=True):
        found[env, label(CLIPPED_DOUBLE_Q)] = f"{figure} (Diffusion-QL)"
    return found


# ==== 2. Tables =======================================================================================================


def some(head: list[str], lines: list) -> str:
    return table(head, lines) if lines else "There are none yet."


def scores_table(groups: list[Group]) -> str:
    """The paper's figure stands beside runs on its data with all of its settings alone."""
    paper, lines = printed(), []
    for group in groups:
        figure = paper.get((group.env, label(group.arm, untold=())), "") if group.own_data else ""
        settings = label(group.arm), f"{group.setting('num_steps'):,}", group.setting("eval_episodes")
        lines.append([group.env, group.data, *settings, figure, *group.outcome()])
    head = ["row", "data set", "settings", "updates", "episodes", "paper", "data's own", "final", "best", "seeds"]
    return some(head, lines)


def cloning_table(groups: list[Group]) -> str:
    """Every arm with two seeds or more in common with cloning of the same loss and length."""

    def alike(group):  # what an arm has in common with the cloning that it is held against
        shared = MEASURING | {"loss", "clip_denoised", "schedule", "num_diffusion_steps"}
        return group.env, group.data, group.transitions, {name: x for name, x in group.arm.items() if name in shared}

    lines = []
    for group, clone in itertools.product(groups, groups):
        cloned = [CLONING.items() <= each.arm.items() for each in (group, clone)]
        if cloned != [False, True] or alike(group) != alike(clone):
            continue
        ours, theirs = paired(group, clone)
        if len(ours) > 1:
            names = group.env, group.data, label(group.arm), f"{group.setting('num_steps'):,}"
            lines.append([*names, mean_gain(ours, theirs), len(ours)])
    return some(["row", "data set", "settings", "updates", "ahead of cloning by", "seeds"], lines)


def peers_table(folders: list[Path]) -> str:
    """Of the lines of each folder's peers.jsonl, which peers.py has left there."""
    paths = [folder / "peers.jsonl" for folder in folders]
    peers = [json.loads(line) for path in paths if path.exists() for line in path.read_text().splitlines()]
    lines = []
    for peer in sorted(peers, key=lambda peer: (peer["dataset"], peer["peer"], peer["steps"], peer["seed"])):
        score = f"{peer['score']:.1f} ± {peer['error']:.1f}"
        names = (peer[name] for name in ("dataset", "peer", "seed"))
        lines.append([*names, f"{peer['steps']:,}", peer["episodes"], score, f"{peer['data']:.1f}"])
    return some(["data set", "peer", "seed", "updates", "episodes", "score ± standard error", "the data's own"], lines)


# ==== 3. Learning curves ==============================================================================================


def panels_of(groups: list[Group]) -> dict[str, dict[str, Group]]:
    """A panel for each data set, loss and number of episodes, and of each arm there its longest runs."""
    panels = {}
    for group in sorted(groups, key=lambda g: (g.env, g.data, g.transitions, g.setting("num_steps"))):
        arm = {name: x for name, x in group.arm.items() if name not in MEASURING}
        loss = {name: arm.pop(name) for name in ("loss", "clip_denoised") if name in arm}
        told = f"{label(loss)}, " * bool(loss) + f"{group.setting('eval_episodes')} episodes an evaluation"
        row = "" if group.env == "own" else f"{group.env}\n"
        title = f"{row}{group.data}, {group.transitions:,} transitions\n{told}"
        panels.setdefault(title, {})[label(arm)] = group
    return panels


def draw_curves(path: Path, panels: dict[str, dict[str, Group]]):
    """The panels, three in a row, with the data's own score as a dashed line where it is known."""
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


# ==== 4. The pages ====================================================================================================


def report(runs: list[Run], folders: list[Path], out: Path):
    """All tables and pictures, into the folder `out`."""
    out.mkdir(exist_ok=True)
    bare = folders != [RESULTS]
    groups = group_runs(runs)
    robots = [group for group in groups if group.env != "toy"]
    panels = panels_of(robots)
    if panels:
        draw_curves(out / "curves.png", panels)
    fill(
        "tables.md",
        out,
        bare,
        scores=scores_table(robots),
        cloning=cloning_table(robots),
        curves="![Learning curves](curves.png)" if panels else "There are none yet.",
        peers=peers_table(folders),
    )
    figure1(groups, out, bare)
    print(f"{sum(len(group.runs) for group in groups)} finished runs: see {out}")
    for run in runs:
        if not run.result:
            print(f"unfinished: {run.name}, {run.evaluations['step'][-1]:,.0f} of {run.config['num_steps']:,} updates")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="report")
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs (default: results/runs.jsonl)")
    parser.add_argument("--publish", action="store_true", help="add them to runs.jsonl, and make the pages there anew")
    args = start(parser, argv, out=None)
    if missing := [folder for folder in args.folders if not folder.is_dir()]:
        parser.error(f"{missing[0]} is no folder: give folders that hold runs")
    try:
        folders, runs = args.folders, read_runs(args.folders)
        if args.publish:
            keep(runs)
        if args.publish or not folders:
            report(read_records(), [RESULTS], args.out or RESULTS)
        else:
            report(runs, folders, args.out or folders[0] / "report")
    except (erdp.UserError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
