"""Tests of results/report.py and diagnose.py on runs made up here, and of run_all.sh as real processes.

In Python's place run_all.sh gets FAKE, which leaves what erdp.py leaves and stops as it stops.
"""

import csv
import dataclasses
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import diagnose
import figure1
import looks
import numpy as np
import pytest
import report
import runs
import torch
from pages import ROOT
from scipy.stats import ttest_1samp

import erdp

# ==== Reports =========================================================================================================


def record(folder, env="antmaze-umaze-v0", scores=(10.0, 30.0, 20.0), dataset=None, finished=True, **settings):
    """A run's folder as a run leaves it, with these scores at its evaluations."""
    folder.mkdir(parents=True)
    row, args = erdp.ROWS[env], dataclasses.replace(erdp.preset(env), dataset=dataset, **settings)
    own = row.dataset + "-v1" * ("/" in row.dataset)
    about = dict(dataset_id=dataset or own, transitions=1000, data_score=40.0, versions={})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(args) | about))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, erdp.COLUMNS)
        writer.writeheader()
        for i, score in enumerate(scores, 1):
            zeros = dict.fromkeys(erdp.COLUMNS, 0.0) | dict(step=i * args.eval_every, success="")
            writer.writerow(zeros | dict(score_mean=score))
    if finished:
        result = dict(final=scores[-1], best=max(scores), best_step=0, steps=args.num_steps)
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def written(folder, page="tables.md") -> str:
    assert report.main([str(folder)]) == 0
    return (folder / "report" / page).read_text()


def section(text, title):
    """The lines of a section's table, as lists of cells."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    lines = found[1].splitlines() if found else []
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"][2:]


def test_report_holds_arms_against_cloning_seed_by_seed(tmp_path):
    for arm, settings in {"bc": runs.CLONING, "ours": dict(q_time=3), "other loss": dict(loss="posterior")}.items():
        for seed, score in enumerate([[10.0, 20, 30], [15.0, 24, 36]][arm == "ours"]):
            folder = tmp_path / f"{arm}{seed}"
            record(
                folder,
                "hopper-medium-v2",
                (score,),
                "/home/me/d/x/hopper.hdf5",
                seed=seed,
                **(dict(loss="noise") | settings),
            )
    assert runs.read_folder(tmp_path / "bc0").config["dataset"] == "d/x/hopper.hdf5", "nobody's home is published"
    (line,) = section(written(tmp_path), "Learning with Q against cloning")
    assert line[0] == "hopper-medium-v2" and "--q-time 3" in line[2] and line[-1] == "3"
    assert line[4] == "**+5.0 [+2.5, +7.5]**", "5, 4 and 6 by seed: 5 ± 4.303 * 1 / sqrt(3)"
    (panel,) = report.panels_of(runs.group_runs(runs.read_runs([tmp_path])))["cloning.png"].values()
    assert {"behaviour cloning", "--q-time 3"} == panel.keys() and (tmp_path / "report" / "cloning.png").exists()


def test_report_the_papers_averages_are_the_means_of_the_transcribed_rows():
    tables = [(figures, average) for _, figures, average in report.TABLES_1_AND_2.values() if average]
    tables += [([mean for mean, _ in figures], average) for figures, average in report.TABLE_5.values()]
    assert sorted(average for _, average in tables) == [56.1, 66.8, 74.0, 80.0, 85.2, 86.7, 89.9]
    for figures, average in tables:
        assert abs(np.mean(figures) - average) <= 0.05 + 1e-9, f"{figures} do not average to {average}"
    assert [mean for mean, _ in report.TABLE_5[64][0]] == list(report.TABLES_1_AND_2["antmaze"][1][2:])


def test_report_the_rows_stand_beside_their_own_figures():
    found = {(part.title, env + name): figure for part in report.sections() for env, name, _, figure in part.lines}
    # one of each part, looked up in the paper by name
    assert found["Table 1, Gym", "halfcheetah-medium-replay-v2"] == "57.0"
    assert found["Table 1, Gym", "hopper-medium-expert-v2"] == "111.9"
    assert found["Table 1, Gym", "walker2d-medium-v2"] == "92.5"
    assert found["Table 1, Adroit", "pen-cloned-v1"] == "66.3"
    assert found["Table 1, Kitchen", "kitchen-complete-v0"] == "82.3"
    assert found["Table 2, AntMaze", "antmaze-umaze-diverse-v0"] == "79.8"
    assert found["Tables 3 and 5, M = 4", "antmaze-large-play-v0"] == "52.4 ± 13.0"
    assert found["Figure 4", "antmaze-large-play-v0, clipped double Q"].startswith("46.4 ")
    assert {row for title, row in found if title.startswith(("Table 1", "Table 2"))} == set(erdp.ROWS) - {"toy"}


def test_report_without_runs_has_no_lines(tmp_path):
    text = written(tmp_path)
    assert "No run on a row's own data" in text and "|" not in text
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["tables.md"]


@pytest.mark.parametrize(
    "settings",
    [
        dict(dataset="other/antmaze/umaze-v0"),
        dict(num_steps=20_000),
        dict(entropy_coef=0.0),
        dict(eval_episodes=10),
        dict(eval_candidates=1),
        dict(eval_every=1000),
        dict(variant="released"),
    ],
)
def test_report_other_data_or_settings_never_stand_beside_the_papers_figures(tmp_path, settings):
    record(tmp_path / "antmaze-umaze-v0__paper__0", scores=[77.25], **settings)
    text = written(tmp_path)
    other = "Runs on other data" if "dataset" in settings else "Runs on the paper's data with other settings"
    (line,) = section(text, other)
    assert line[0] == "antmaze-umaze-v0" and line[2] == "40.0" and line[-3:] == ["77.2", "77.2", "1"]
    assert not section(text, "Table 2, AntMaze")
    assert (tmp_path / "report" / "curves.png").exists() == ("dataset" in settings)


def test_report_averages_over_seeds_as_numpy_does_and_counts_a_copy_once(tmp_path, capsys):
    finals, bests = [20.0, 35.0, 90.0], [40.0, 35.0, 95.0]
    for seed in range(3):
        other = dict(device="cuda:1", compile=True, dataset="D4RL/antmaze/umaze-v1" if seed else None)
        record(tmp_path / f"a{seed}", scores=[bests[seed], finals[seed]], seed=seed, **other)
    record(tmp_path / "copy", scores=[0.0, 0.0], seed=2)
    record(tmp_path / "unfinished", scores=[1.0], seed=3, finished=False)
    text = written(tmp_path)
    expected = [f"{np.mean(x):.1f} ± {np.std(x):.1f}" for x in (finals, bests)]
    (line,) = section(text, "Table 2, AntMaze")
    assert line == ["antmaze-umaze-v0", "100.0", *expected, "3", "D4RL/antmaze/umaze-v1"]
    assert section(text, "Unfinished runs") == [["unfinished", "50,000 of 1,000,000"]]
    assert "copy is left out: a2 has" in capsys.readouterr().out


def test_report_gives_an_average_when_all_rows_have_run_and_draws_the_figures(tmp_path):
    for i, env in enumerate(report.FOUR):
        record(tmp_path / f"m4-{i}", env, [10.0, 10.0 * i], num_critics=4)
    record(tmp_path / "double", report.FOUR[0], **runs.CLIPPED_DOUBLE_Q)
    record(tmp_path / "a0", report.FOUR[0], **report.ALPHAS["alpha = 0"])
    text = written(tmp_path)
    assert section(text, "Tables 3 and 5, M = 4")[-1][:4] == ["average", "74.0", "15.0", "17.5"]
    assert [line[0] for line in section(text, "Figure 4")] == [f"{report.FOUR[0]}, clipped double Q"]
    assert [line[0] for line in section(text, "Figure 3, right")] == [f"{report.FOUR[0]}, alpha = 0"]
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"figure3.png", "figure4.png", "figure5.png"}


def test_report_names_the_arms():
    assert runs.label({}) == "as in the paper" and runs.label(dict(num_critics=4)) == "M = 4"
    assert runs.label(dict(eta=0, entropy_coef=0.0, eval_candidates=1)) == "behaviour cloning"
    assert runs.label(dict(pessimism="min", num_critics=2, entropy_coef=0)) == "clipped double Q"
    arm = dict(clip_denoised=True, loss="noise", variant="released", max_q_backup=False, entropy_coef=0.0)
    assert runs.label(arm) == "released, alpha = 0, --clip-denoised, --loss noise, --no-max-q-backup"
    cloning = dataclasses.asdict(erdp.preset("pen-human-v1")) | runs.CLONING
    assert runs.arm_of(cloning | dict(num_critics=1)) == runs.arm_of(cloning), "a cloned policy has no use for critics"


@pytest.mark.parametrize("name, content", [("config.json", '{"env": "toy"'), ("config.json", '{"env": "toy"}')]
    + [("config.json", "[]"), ("metrics.csv", "step,score_mean\n1,2\n"), ("metrics.csv", ""), ("result.json", "null")]
    + [("result.json", '{"final": 20.0}'), ("result.json", '{"final": 99.0, "best": 99.0}')])  # fmt: skip
def test_report_names_a_damaged_run_in_one_sentence(tmp_path, capsys, name, content):
    (record(tmp_path / "a") / name).write_text(content)
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "a") in said and said.startswith("report: ") and said.count("\n") == 1


@pytest.mark.parametrize("argv", [["no-such-folder"], ["--color"], ["--collect"]])
def test_report_bad_input_is_one_sentence_and_status_2(capsys, argv):
    assert report.main(argv) == 2
    said = capsys.readouterr().err
    assert argv[0] in said and said.count("\n") == 1


def test_report_keeps_runs_and_makes_the_same_pages_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RECORDS", tmp_path / "kept" / "runs.jsonl")
    monkeypatch.setattr(report, "RECORDS", tmp_path / "kept" / "runs.jsonl")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    for seed in range(4):
        record(tmp_path / "runs" / f"a{seed}", seed=seed, scores=[1.0, 1 / 3 + seed], finished=seed < 3)
        record(tmp_path / "runs" / f"t{seed}", "toy", seed=seed, scores=[0.1 + seed])
    argv = [str(tmp_path / "runs")]
    assert report.main([*argv, "--collect"]) == 0 and [x.name for x in (tmp_path / "kept").iterdir()] == ["runs.jsonl"]
    (tmp_path / "runs" / "a3" / "config.json").unlink()
    before = (tmp_path / "kept" / "runs.jsonl").read_text()
    assert before.count("\n") == 7 and report.main([*argv, "--publish"]) == 0
    assert (tmp_path / "kept" / "runs.jsonl").read_text() == before, "a second time changes nothing"
    for page in ("tables.md", "figure1.md"):
        assert written(tmp_path / "runs", page) == (tmp_path / "kept" / page).read_text()
    record(tmp_path / "others" / "b", seed=2, scores=[5.0, 6.0])
    assert report.main([str(tmp_path / "others"), "--collect"]) == 0
    assert {run.name for run in runs.read_records(runs.RECORDS)} == {"a0", "a1", "b", "t0", "t1", "t2", "t3"}
    record(tmp_path / "clash" / "a0", seed=7, scores=[5.0, 6.0])
    assert report.main([str(tmp_path / "clash"), "--collect"]) == 2, "another run of that name"


def test_report_the_published_pages_are_those_of_the_records(tmp_path):
    assert report.main(["--out", str(tmp_path)]) == 0
    for page in ("tables.md", "figure1.md"):
        assert (tmp_path / page).read_text() == (runs.RESULTS / page).read_text(), f"{page}: python results/report.py"


# ==== Looks at a comparison whose number of seeds was not fixed =======================================================


def test_looks_one_look_is_students_test_and_more_looks_find_more():
    gains = np.random.default_rng(0).normal(1, 2, (4, 6))
    np.testing.assert_allclose(looks.p_value(gains), ttest_1samp(gains, 0, axis=1).pvalue, rtol=1e-9)
    low, high = figure1.mean_interval(gains[0], 0.1)
    expected = ttest_1samp(gains[0], 0).confidence_interval(0.9)
    np.testing.assert_allclose((low, high), expected, rtol=1e-9)
    rates = [(looks.least_p(*case, draws=1) < 0.05).mean() for case in [((6,),), ((6,), (6,), 1.0), ((6,), (6,), 0.0)]]
    np.testing.assert_allclose(rates, [0.05, 0.05, 1 - 0.95**2], atol=2e-3)


def test_looks_published_page_is_that_of_the_records():
    scores = looks.scores(runs.group_runs(runs.read_records(runs.RECORDS)))
    peers = [dict(peer="td3bc", data=1.0, score=1.0)]
    made, page = looks.markdown(scores, peers, draws=1), (runs.RESULTS / "looks.md").read_text()
    assert made.split("By simulation")[0] == page.split("By simulation")[0], "python results/looks.py"


# ==== Figure 1 ========================================================================================================


def test_figure1_compares_seed_by_seed_and_chooses_the_share_by_the_rule(tmp_path):
    noise = np.random.default_rng(0).normal(0, 3, 8).round(3)
    for share, plain in ((20, 90), (10, 60), (5, 55)):
        for seed, own in enumerate(noise):  # what a seed gives to both policies alike
            finals = {"plain Q": plain + own, "ensemble": plain + own + 2 + 0.4 * (seed % 2), "both": plain - own}
            for name, final in finals.items():
                settings = dict(seed=seed, dataset=f"toy-{share}") | figure1.TOY[name]
                record(tmp_path / f"{share}{name}{seed}", "toy", [1.0, float(final)], **settings)
    text = written(tmp_path, "figure1.md")
    pairs = {(line[0], line[1]): line[2:] for line in section(text, "Policies held against each other")}
    gain, mean, p, better, _, each = pairs["10%", "ensemble against plain Q"]
    assert gain == "**+2.2 [+2.0, +2.4]**" and better == "8 of 8" and each == ", ".join(["+2"] * 8)
    assert not pairs["10%", "both against plain Q"][0].startswith("**") and len(pairs) == 9
    values = np.sort(60 + noise)
    lines = section(text, "Every policy at every share")
    (line,) = [line for line in lines if line[:2] == ["10%", "plain Q"]]
    assert line[2].startswith(f"{values[2:-2].mean():.1f} [") and line[3:5] == [f"{values.std():.1f}", "8"]
    assert "the median seed of plain Q misses. Of the shares above that is 10%" in text
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"figure1.png", "figure1-shares.png"}


def test_figure1_intervals_hold_the_truth_about_as_often_as_they_say():
    draws = np.random.default_rng(1).normal(0, 1, (300, 10))
    held = [low < 0 < high for low, high in (figure1.interval(x, figure1.middle, 400) for x in draws)]
    assert 0.82 < np.mean(held) < 0.98, "95%, or somewhat less of 10 seeds"


# ==== Diagnosis =======================================================================================================


def test_diagnosis_returns_to_go_are_those_of_each_episode():
    rng, parts, expected = np.random.default_rng(0), [], []
    for length, terminal in ((3, 1), (1, 0), (4, 0), (2, 1)):
        states, reward = rng.normal(size=(length + 1, 2)), rng.normal(size=length)
        ends = np.append(np.zeros(length - 1), terminal)
        parts.append((states[:-1], np.zeros((length, 1)), reward, states[1:], ends))
        expected += [sum(0.9 ** (j - i) * reward[j] for j in range(i, length)) for i in range(length)]
    data = erdp.Batch(*map(np.concatenate, zip(*parts)))
    ends = diagnose.episode_ends(data)
    assert ends.tolist() == [2, 3, 7, 9]
    np.testing.assert_allclose(diagnose.returns_to_go(data.reward, ends, 0.9), expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_diagnosis_terms_add_up_to_eq15_and_are_those_of_each_time(variant):
    torch.manual_seed(0)
    args = dataclasses.replace(erdp.preset("toy"), variant=variant, device="cpu", compile=False)
    agent, data = erdp.Agent(2, 1, args), erdp.load_data(erdp.open_task(args), args)
    terms = diagnose.loss_terms(agent, data, 3)
    parts = [terms[name][0] for name in ("diffusion loss", "-lambda Q", "entropy term")]
    assert sum(parts) == pytest.approx(terms["all of Eq. 15"][0], abs=1e-5) and min(map(abs, parts)) > 0
    batch, noise = next(diagnose.batches(data, args, 1))
    inside, q, diffusion = diagnose.at_time(agent, batch, noise, 2)
    noise.t.fill_(2)
    q_data, gradients = agent.critics(batch.state, batch.action).detach(), []
    for eta in (args.eta, 0.0):
        settings = dataclasses.replace(args, eta=eta, entropy_coef=0.0)
        terms = erdp.policy_loss(agent.policy, agent.critics, agent.sde, batch, noise, q_data, settings)
        gradients.append(diagnose.gradient(terms["policy_loss"], agent.policy))
    torch.testing.assert_close(q, gradients[0] - gradients[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(diffusion, gradients[1])
    assert 0 < inside < 1


def test_diagnosis_of_a_run(tmp_path, capsys):
    argv = "--num-steps 20 --eval-every 20 --eval-episodes 2 --device cpu --no-compile --run-dir".split()
    assert erdp.main([*argv, str(tmp_path / "run")]) == 0
    assert diagnose.main([str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "diagnosis.md").read_text()
    assert (tmp_path / "run" / "diagnosis.png").exists() and "512 transitions" in text
    (inside, *_) = section(text, "By diffusion time")
    assert len(inside) == 6 and 1 >= float(inside[1]) > float(inside[5]) >= 0
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert diagnose.main([str(tmp_path / "run")]) == 2 and "not a whole policy" in capsys.readouterr().err


# ==== run_all.sh ======================================================================================================

RUN_ALL = ROOT / "run_all.sh"
ARMS = dict(paper={}, bc=runs.CLONING | dict(num_critics=1), released=dict(variant="released"))
ARMS |= dict(q=dict(num_critics=1, entropy_coef=0), entropy=dict(num_critics=1), ensemble=dict(entropy_coef=0))
ARMS |= {f"M{M}": dict(num_critics=M) for M in (1, 4, 16)}
ARMS |= {"M1-nobackup": dict(num_critics=1, max_q_backup=False, eval_candidates=1)}
ARMS |= {"M1-nobackup-alpha0": ARMS["M1-nobackup"] | dict(entropy_coef=0)}
ARMS |= {"clipped-double-q": dict(pessimism="min", num_critics=2, entropy_coef=0), "debruijn": dict(variant="debruijn")}
ARMS |= {f"debruijn-{alpha}": dict(variant="debruijn", entropy_coef=alpha) for alpha in (0.1, 0.3)}
FAKE = f"""#!{sys.executable} -IS
import os, re, signal, sys, time
words, here = sys.argv[1:], os.environ
with open(here["CALLS"], "a") as file:
    file.write(" ".join(words) + "\\n")
if words[0] != "erdp.py":
    sys.exit()
folder = words[words.index("--run-dir") + 1]
name, checkpoint = os.path.basename(folder), folder + "/checkpoint.pt"
def chosen(what):
    return re.search(here.get(what, "^$"), name)
if chosen("BROKEN"):
    sys.exit("erdp: it is broken")
if chosen("KILLED"):
    os.kill(os.getpid(), signal.SIGKILL)
os.makedirs(folder, exist_ok=True)
if chosen("SLOW") and not os.path.exists(checkpoint):
    open(folder + "/config.json", "w").close()
    time.sleep(float(here.get("DEAF", "0")))
    def stop(number, _):
        signal.signal(number, previous)
        time.sleep(float(here.get("SAVING", "0.3")))
        open(checkpoint, "w").close()
        os._exit(128 + number)
    previous = signal.signal(signal.SIGTERM, stop)
    while True:
        time.sleep(0.02)
open(folder + "/result.json", "w").close()
"""


@functools.cache
def listed(*words, **environment) -> tuple[str, ...]:
    """The lines of `list`, with no program in reach but bash itself."""
    bash = next(path for path in ("/bin/bash", "/usr/bin/bash") if os.path.exists(path))
    environment = {"PATH": "/nonexistent"} | environment
    done = subprocess.run([bash, RUN_ALL, "list", *words], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.splitlines())


def settings_of(lines) -> dict[tuple, erdp.Args]:
    """Name's first part, arm and seed, as the run's folder says them -> settings, of the lines that run erdp.py."""
    found = {}
    for words in (shlex.split(line) for line in lines if " erdp.py " in line):
        assert words[-1] == "--resume"
        args = erdp.parse(words[words.index("erdp.py") + 1 : -1])
        name, arm, seed = Path(args.run_dir).name.split("__")
        assert found.setdefault((name, arm, int(seed)), args) is args, "every run has a folder of its own"
    return found


class Project:
    """A copy of run_all.sh, far from the project, with FAKE for Python."""

    def __init__(self, folder):
        self.folder, self.runs, self.children = folder, folder / "runs" / "quick", []
        (folder / "fake").write_text(FAKE)
        (folder / "fake").chmod(0o755)
        (folder / "run_all.sh").write_text(RUN_ALL.read_text())

    def start(self, *words, ignored=False, **environment):
        def signals():
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)

        inherited = {key: x for key, x in os.environ.items() if key not in ("ERDP_DATA", "OMP_NUM_THREADS")}
        known = dict(PYTHON=str(self.folder / "fake"), RUNS="runs", CALLS=str(self.folder / "calls"))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        command = ["bash", self.folder / "run_all.sh", *words]
        child = subprocess.Popen(command, env=inherited | known | environment, cwd="/", preexec_fn=signals, **pipes)
        self.children.append(child)
        return child

    def run(self, *words, **environment) -> tuple[int, str, str]:
        child = self.start(*words, **environment)
        out, err = child.communicate(timeout=120)
        return child.returncode, out, err

    def started(self, count, *words, **environment):
        """run_all.sh once `count` runs, which do not end by themselves, are under way."""
        child, deadline = self.start(*words, SLOW=".", **environment), time.monotonic() + 60
        while len(list(self.runs.glob("*/config.json"))) < count:
            assert child.poll() is None and time.monotonic() < deadline, child.communicate()
            time.sleep(0.02)
        return child

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def left(self) -> list[int]:
        """The processes of the sessions that `start` made."""
        found, sessions = [], {child.pid for child in self.children}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) in sessions and state != "Z":
                found.append(int(path.parent.name))
        return found


@pytest.fixture
def project(tmp_path):
    project = Project(tmp_path)
    yield project
    left = project.left()
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left, "no process is left behind"


def number_of(name: str) -> str:
    return str(1 + next(i for i, line in enumerate(listed("quick")) if f"/{name} " in line))


def test_run_all_lists_every_run_of_the_paper_and_changes_only_what_the_arm_says():
    lines = listed()
    found = settings_of(lines)
    assert lines == listed("full") and len(set(lines)) == len(lines)
    expected = {(env, "paper", seed) for env in erdp.ROWS for seed in range(5)}
    expected |= {("toy", arm, s) for arm in ("bc", "q", "entropy", "ensemble", "released") for s in range(5)}
    arms = "M1", "M4", "M16", "M1-nobackup", "M1-nobackup-alpha0", "clipped-double-q"
    expected |= {(env, arm, seed) for env in report.FOUR for arm in arms for seed in range(5)}
    assert found.keys() == expected
    for (env, arm, seed), args in found.items():
        changed = dict(seed=seed, run_dir=f"runs/{env}__{arm}__{seed}") | ARMS[arm]
        assert args == dataclasses.replace(erdp.preset(env), **changed), f"{env}, {arm}"
    studies = [line for line in lines if " erdp.py " not in line]
    assert studies == [f"python results/{study}.py" for study in ("figure2", "entropy", "likelihood")]


def test_run_all_sweeps_the_toys_shares():
    found = settings_of(listed("toy-sweep"))
    shares, arms = [f"toy-{share}" for share in (20, 10, 5, 2)], ("bc", "q", "ensemble", "paper", "debruijn")
    expected = {(share, arm, seed) for share in shares for arm in arms for seed in range(10)}
    others = "released", "debruijn-0.1", "debruijn-0.3"
    assert found.keys() == expected | {("toy-5", arm, seed) for arm in others for seed in range(5)}
    for (share, arm, seed), args in found.items():
        changed = dict(seed=seed, dataset=share, run_dir=f"runs/{share}__{arm}__{seed}") | ARMS[arm]
        expected = dataclasses.replace(erdp.preset("toy", changed.get("variant", "paper")), **changed)
        assert args == expected, f"{share}, {arm}"


def test_run_all_quick_is_the_toy_in_full_and_small_runs_on_recorded_data():
    lines, without = listed("quick", ERDP_DATA="/some where"), listed("quick")
    assert lines[:33] == without == tuple(line.replace(" runs/", " runs/quick/") for line in listed()[:33])
    found = settings_of(lines[33:])
    envs = "hopper-medium-expert-v2", "antmaze-umaze-v0", "pen-human-v1"
    assert found.keys() == {(env, arm, 0) for env in envs for arm in ("bc", "M4")}
    for (_, arm, _), args in found.items():
        assert args.dataset and args.num_steps < 10_000 and vars(args).items() >= ARMS[arm].items()
    assert sum("MINARI_DATASETS_PATH=/some where/minari" in shlex.split(line) for line in lines) == 6


def test_run_all_runs_what_it_lists_once_and_then_the_report(project):
    status, out, err = project.run("--jobs", "3", "quick")
    assert (status, err.count("\n")) == (0, 1) and "ERDP_DATA is not set" in err
    *calls, last = project.calls()
    assert sorted(calls) == sorted(line.removeprefix("python ") for line in listed("quick"))
    assert last == "results/report.py runs/quick" and out.count(" is finished\n") == 33
    log = (project.runs / "toy__q__3.log").read_text()
    assert log.startswith("$ ") and " --run-dir runs/quick/toy__q__3 --resume\n" in log
    status, out, _ = project.run("quick")
    assert status == 0 and out.count(" is finished already\n") == 33
    assert project.calls() == ["results/report.py runs/quick"]
    assert project.run("task", "1", "quick")[0] == 0 and project.calls() == []


def test_run_all_goes_on_after_failed_and_killed_runs_and_names_them_at_the_end(project):
    status, out, _ = project.run("quick", BROKEN="q__[03]", KILLED="q__4")
    assert status == 1 and len(project.calls()) == 34, "all others and the report have run"
    assert "toy__q__0 failed with status 1: see runs/quick/toy__q__0.log\n" in out
    assert "toy__q__4 failed with status 137: see runs/quick/toy__q__4.log\n" in out
    assert out.splitlines()[-3:] == [
        f"toy__q__{seed} is not finished: see runs/quick/toy__q__{seed}.log" for seed in (0, 3, 4)
    ]
    assert (project.runs / "toy__q__0.log").read_text().splitlines()[1:] == ["erdp: it is broken"]
    assert project.run("task", number_of("toy__q__0"), "quick", BROKEN="q__0")[0] == 1
    assert project.run("task", number_of("toy__q__0"), "quick")[0] == 0


@pytest.mark.parametrize("by, ignored", [("INT", False), ("HUP", False), ("TERM", False), ("TERM", True)])
@pytest.mark.parametrize("words, to_all", [("--jobs 2 quick", False), ("task 1 quick", True)])
def test_run_all_stops_its_runs_with_a_checkpoint_and_goes_on_later(project, by, ignored, words, to_all):
    count, number = 1 if "task" in words else 2, signal.Signals[f"SIG{by}"]
    child = project.started(count, *words.split(), ignored=ignored)
    os.killpg(child.pid, number)  # as Ctrl-C to the terminal's process group
    if to_all:  # as schedulers do
        for other in set(project.left()) - {child.pid}:
            os.kill(other, number)
    assert child.wait(timeout=60) == 130
    assert len(list(project.runs.glob("*/checkpoint.pt"))) == count and not project.left(), "it ends after its runs"
    assert child.communicate()[0].count(" stopped\n") == count
    assert len(project.calls()) == count, "nothing else was started"
    assert project.run(*words.split())[0] == 0
    assert len(project.calls()) == (1 if "task" in words else 34)
    assert not list(project.runs.glob(".stop*"))


def test_run_all_stops_a_run_that_does_not_hear_yet(project):
    child = project.started(1, "task", "1", "quick", DEAF="1")
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 130 and len(list(project.runs.glob("*/checkpoint.pt"))) == 1
    child.communicate()


def test_run_all_ends_at_once_at_a_second_ctrl_c(project):
    child = project.started(2, "--jobs", "2", "quick", SAVING="60")
    for _ in range(100):  # two that come too close together count as one
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)
            time.sleep(0.1)
    assert child.wait(timeout=30) == 130 and " stopped" not in child.communicate()[0]
    assert not list(project.runs.glob("*/checkpoint.pt"))


@pytest.mark.parametrize("words", ["task", "task 0", "task 34 quick", "task x", "task 1 quick 2", "--jobs", "--jobs 0"]
    + ["--jobs x full", "half"])  # fmt: skip
def test_run_all_says_in_one_sentence_what_is_wrong_with_its_words(project, words):
    status, out, err = project.run(*words.split())
    lines = [line for line in err.splitlines() if "ERDP_DATA" not in line]
    assert (status, out, len(lines)) == (2, "", 1) and lines[0].startswith("run_all.sh: ")
    assert project.calls() == []


def test_run_all_without_python_says_so_in_one_sentence(project):
    status, out, err = project.run(PYTHON="no-such-python")
    assert (status, out, err.count("\n")) == (2, "", 1) and "no-such-python" in err
