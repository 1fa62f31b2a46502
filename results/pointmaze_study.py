"""The PointMaze study of pointmaze.md, from its runs' metrics and from their last policies' scores.

    python results/pointmaze_study.py                      # fills pointmaze.md and draws its curves, of all 24 runs
    python results/pointmaze_study.py --keep FOLDER        # takes up runs below FOLDER, and scores their policies
    python results/pointmaze_study.py --ways CLONING ERDP  # draws the ways of the data and of these two runs' policies

With `--out YOURS` it has runs, page and pictures of your own, in YOURS.

Its comparisons were written before the first was made: the design is pointmaze.md's. Nothing is compared before all
runs are there, so that nothing that is seen on the way can end the study early. `unplanned` and `explored` came
afterwards; an exploratory arm is shown when its own four runs are there.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import minari
import numpy as np
import pointmaze
import runs
from matplotlib import pyplot as plt
from pages import fill, save, start, table
from scipy import stats

import erdp

ARMS = {"all": "all times", "early": "early times", "cloning": "cloning with critics"}
EXPLORED = {
    "alpha0": "alpha = 0",
    "one": "M = 1",
    "sixteen": "M = 16",
    "released": "`--variant released`",
    "debruijn": "`--variant debruijn`",
    "clipped": "clipped double Q",
    "weight": "eta = 1.6667, alpha = 0.006",  # alone not in the design
}
OPTIONS = {
    "all": {},
    "early": dict(q_time=3),
    "cloning": dict(eta=0.0, entropy_coef=0.0),
    "alpha0": dict(entropy_coef=0.0),
    "one": dict(num_critics=1),
    "sixteen": dict(num_critics=16),
    "released": dict(variant="released"),
    "debruijn": dict(variant="debruijn"),
    "clipped": dict(pessimism="min", num_critics=2, entropy_coef=0.0),
    "weight": dict(eta=1.6667, entropy_coef=0.006),
}
COMMON = dict(num_critics=4, num_steps=30_000, eval_every=2_500, eval_episodes=10)
SEEDS = range(1, 9)
FEWER = range(1, 5)  # seeds of the exploratory arms
STEPS = range(2_500, 30_001, 2_500)  # the updates after which a run is evaluated
COLUMNS = "score", "one of 50, last policy", "plain sample, last policy"
DIFFERENCE = "{mean:+.1f} [{low:.1f}, {high:.1f}]"  # of what `paired` finds
LATE = 5  # so many last evaluations are a run's score
EPISODES = 20  # whose ways are drawn

# ==== 1. Figures ======================================================================================================


def curve(path: Path) -> list[float]:
    """A run's scores at its evaluations (STEPS). Raises ValueError where one is missing."""
    with open(path, newline="") as file:
        scores = {int(row["step"]): float(row["score_mean"]) for row in csv.DictReader(file)}
    if missing := [step for step in STEPS if step not in scores]:
        raise ValueError(f"{path} has no evaluation at update {missing[0]}")
    return [scores[step] for step in STEPS]


def mean_interval(x) -> tuple:
    """The mean of x (n, ...) over its first axis, and the half width of its 95% interval by Student's t."""
    return np.mean(x, 0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)


def paired(a, b) -> dict:
    """The mean of a - b over seeds with its 95% interval, and p, both of the paired t-test."""
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    return dict(mean=float(np.mean(a) - np.mean(b)), low=float(low), high=float(high), p=float(test.pvalue))


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p)
    steps = (len(p) - np.arange(len(p))) * np.array(p)[order]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted.tolist()


def keep(top: Path, kept: Path):
    """Copies metrics.csv of each of the study's runs below `top` into the folder `kept`, as <arm>__<seed>.csv.

    Of ended runs it also scores the last policy, by both ways of acting, into acting.jsonl, where that is not done for
    this metrics.csv.
    """
    if not (paths := sorted(top.rglob("metrics.csv"))):
        raise erdp.UserError(f"there is no run below {top}")
    kept.mkdir(exist_ok=True)
    for path in paths:
        config = runs.read_folder(path.parent).config
        arm = next((arm for arm, options in OPTIONS.items() if runs.arm_of(config) == COMMON | options), None)
        if arm is None or config["dataset_id"] != pointmaze.DATASET:
            print(f"{path.parent} is no run of the study, and left out")
            continue
        name = f"{arm}__{config['seed']}"
        copy = kept / f"{name}.csv"
        if copy.exists() and copy.read_bytes() != path.read_bytes():  # another run, or the same one further on
            others = [line for line in acted(kept) if line["run"] != name]
            (kept / "acting.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
        shutil.copy(path, copy)
        for candidates in (50, 1) if (path.parent / "result.json").exists() else ():
            if (name, candidates) not in by_run(acted(kept)):
                line = dict(run=name, candidates=candidates) | act(path.parent, candidates)
                with open(kept / "acting.jsonl", "a") as file:  # at once, as a score takes minutes
                    file.write(json.dumps(line) + "\n")


def act(folder: Path, candidates: int, episodes: int = 100) -> dict:
    """How a run's last policy scores, as `--eval-only` does it."""
    task = erdp.load_file(folder / "policy.pt")["task"]
    actor = erdp.load_policy(folder / "policy.pt", eval_candidates=candidates)
    with erdp.playing(task, episodes) as envs:
        returns = erdp.evaluate(actor, envs, episodes, actor.agent.args.seed)["return"]
    scores = task.score(returns)
    figures = dict(score=scores.mean(), deviation=scores.std(), **{"return": returns.mean()})
    return dict(episodes=episodes) | {name: round(float(value), 2) for name, value in figures.items()}


def acted(kept: Path) -> list[dict]:
    """The lines of acting.jsonl."""
    path = kept / "acting.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_run(lines: list[dict]) -> dict:
    """Their scores by run and number of candidates."""
    return {(line["run"], line["candidates"]): line["score"] for line in lines}


def means(scores: dict, acting: dict, arm: str, n: int) -> list[str]:
    """An arm's COLUMNS, as means ± deviations over its first n seeds."""
    columns = (values[:n] for values in (scores[arm], acting[arm, 50], acting[arm, 1]))
    return [f"{np.mean(column):.1f} ± {np.std(column):.1f}" for column in columns]


def tables(scores: dict, acting: dict) -> dict[str, str]:
    """The page's tables and its headline, from scores[arm] (seeds,) and acting[arm, candidates] (seeds,)."""
    arms = table(["arm", *COLUMNS], [[name, *means(scores, acting, arm, len(SEEDS))] for arm, name in ARMS.items()])
    headline = paired(scores["all"], scores["cloning"])
    words = f"All times less cloning with critics: {DIFFERENCE}, p = {{p:.2g}}."
    secondary = {
        "early less all times": (scores["early"], scores["all"]),
        "all times less cloning, plain samples": (acting["all", 1], acting["cloning", 1]),
        "early times less cloning, plain samples": (acting["early", 1], acting["cloning", 1]),
        "cloning, one of 50 less plain sample": (acting["cloning", 50], acting["cloning", 1]),
        "all times, one of 50 less plain sample": (acting["all", 50], acting["all", 1]),
    }
    found = [paired(*pair) for pair in secondary.values()]
    rows = []
    for name, test, p in zip(secondary, found, holm([test["p"] for test in found])):
        rows.append([name, DIFFERENCE.format(**test), f"{p:.2g}"])
    rest = table(["what", "difference, 95% interval", "p by Holm"], rows)
    return dict(arms=arms, headline=words.format(**headline), secondary=rest)


def unplanned(scores: dict, curves: dict, acting: dict) -> str:
    """Differences that the design does not have: by evaluation, of the last policies, and without Student's law."""

    def pairs(values):
        return (values["all"], values["cloning"]), (values["early"], values["all"])

    def cells(values):
        tests = [paired(*pair) | dict(ahead=np.greater(*pair).sum()) for pair in pairs(values)]
        return [f"{DIFFERENCE}, {{ahead}} of 8".format(**test) for test in tests]

    rows = [[f"evaluation at {STEPS[k]:,}", *cells({arm: curves[arm][:, k] for arm in ARMS})] for k in range(-LATE, 0)]
    for candidates, name in ((50, "one of 50"), (1, "plain sample")):
        rows.append([f"last policy, {name}", *cells({arm: acting[arm, candidates] for arm in ARMS})])
    gains = [a - b for a, b in pairs(scores)]
    rows.append(
        ["scores: median; Wilcoxon's p"] + [f"{np.median(x):+.1f}; {stats.wilcoxon(x).pvalue:.2g}" for x in gains]
    )
    return table(["what", "all times less cloning", "early less all times"], rows)


def explored(scores: dict, acting: dict) -> str:
    """The exploratory arms whose runs are all there, below the study's on the same seeds."""
    rows, n = [], len(FEWER)
    plain = {arm: acting[arm, 1] for arm in scores}
    columns = {
        "score less that of all times": (scores, "all"),
        "plain sample less that of all times": (plain, "all"),
        "plain sample less that of cloning": (plain, "cloning"),
    }
    for arm, name in (ARMS | EXPLORED).items():
        if arm in scores:
            less = [
                "" if arm == other else DIFFERENCE.format(**paired(values[arm][:n], values[other][:n]))
                for values, other in columns.values()
            ]
            rows.append([name, *means(scores, acting, arm, n), *less])
    return table(["arm", *COLUMNS, *columns], rows)


# ==== 2. Pictures =====================================================================================================


def draw_curves(path: Path, curves: dict):
    """Scores over updates of each arm, from curves[arm] (seeds, STEPS): means, with bands of their 95% intervals."""
    figure, axis = plt.subplots(figsize=(8, 5))
    for arm, name in ARMS.items():
        mean, half = mean_interval(curves[arm])
        (line,) = axis.plot(STEPS, mean, "o-", label=name)
        axis.fill_between(STEPS, mean - half, mean + half, alpha=0.15, color=line.get_color())
    axis.axvspan(STEPS[-LATE], STEPS[-1], color="gray", alpha=0.1, label="evaluations that are a run's score")
    axis.set(xlabel="updates", ylabel="score", title=f"Mean over {len(SEEDS)} seeds, 95% intervals")
    axis.legend()
    save(figure, path)


def play(folder: Path, env) -> tuple[np.ndarray, float]:
    """The ways (EPISODES, n + 1, 2) of a run's last policy, as it acts, and the mean of their scores."""
    policy, task = erdp.load_policy(folder / "policy.pt"), erdp.load_file(folder / "policy.pt")["task"]
    ways, returns = [], []
    for e in range(EPISODES):
        generator, over = np.random.default_rng(e), False
        observation, _ = env.reset(seed=e)
        way, total = [observation["achieved_goal"]], 0.0
        while not over:
            observation, reward, _, over, _ = env.step(policy(observation, generator))
            way.append(observation["achieved_goal"])
            total += reward
        ways.append(way)
        returns.append(total)
    return np.array(ways), float(task.score(np.mean(returns)))


def draw_ways(path: Path, folders: list[Path]):
    """Where the data and the policies of two runs go, cloning's and ERDP's: EPISODES episodes each, in the maze."""
    data, env = minari.load_dataset(pointmaze.DATASET), pointmaze.make_env()
    ways = [np.array([episode.observations["achieved_goal"] for episode in data.iterate_episodes(range(EPISODES))])]
    titles = ["The data: a wanderer"]
    for name, folder in zip(("Cloning with critics", "ERDP"), folders):
        way, score = play(folder, env)
        ways.append(way)
        titles.append(f"{name}: score {score:.0f}")
    maze = env.unwrapped.maze
    cells = [(maze.cell_rowcol_to_xy(np.array(at)), kind) for at, kind in np.ndenumerate(np.array(maze.maze_map, "O"))]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.4))
    for axis, way, title in zip(axes, ways, titles):
        for (x, y), kind in cells:
            if kind == pointmaze.WALL:
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color="0.75"))
            if kind == pointmaze.GOAL:
                axis.add_patch(plt.Circle((x, y), 0.45, color="tab:green", alpha=0.4))
        axis.plot(*way.transpose(2, 1, 0), color="tab:blue", linewidth=0.7, alpha=0.5)
        axis.plot(*way[:, 0].T, "o", color="black", markersize=4, label="start")
        axis.plot(*way[:, -1].T, "o", color="tab:orange", markersize=4, label="after 300 steps")
        axis.set(title=title, aspect="equal", xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[])
    axes[0].legend(loc="center left")
    save(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="pointmaze_study.py")
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    parser.add_argument("--ways", type=Path, nargs=2, metavar=("CLONING", "ERDP"))
    args = start(parser, argv)
    kept = args.out / "pointmaze"
    if args.keep or args.ways:
        try:
            keep(args.keep, kept) if args.keep else draw_ways(args.out / "pointmaze-ways.png", args.ways)
        except erdp.UserError as error:
            parser.error(str(error))
        return
    curves, acting = {}, {}

    def read(arm: str, seeds):
        curves[arm] = np.array([curve(kept / f"{arm}__{seed}.csv") for seed in seeds])
        acting.update({(arm, c): [scored[f"{arm}__{seed}", c] for seed in seeds] for c in (50, 1)})

    try:
        scored = by_run(acted(kept))
        for arm in ARMS:
            read(arm, SEEDS)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"the study is not complete, and nothing is compared before ({error})")
    for arm in EXPLORED:
        if all((f"{arm}__{seed}", c) in scored for seed in FEWER for c in (50, 1)):
            read(arm, FEWER)
    scores = {arm: values[:, -LATE:].mean(1) for arm, values in curves.items()}
    made = tables(scores, acting) | dict(explored=explored(scores, acting))
    fill("pointmaze.md", args.out, **made, unplanned=unplanned(scores, curves, acting))
    draw_curves(args.out / "pointmaze-curves.png", curves)


if __name__ == "__main__":
    main()
