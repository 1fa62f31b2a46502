"""Tests of the scripts of this folder: report.py on runs made up here, the mathematics of the studies, run_all.sh."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import benchmark
import diagnose
import entropy
import figure1
import figure2
import known_noise
import likelihood
import looks
import mutants
import numpy as np
import peers
import pointmaze
import pointmaze_study
import pytest
import report
import runs
import scipy.stats
import torch
from pages import ROOT

import erdp

agree = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)

# ==== report.py =======================================================================================================


def record(folder, env="antmaze-umaze-v0", scores=(10.0, 30.0, 20.0), finished=True, **settings):
    """A run's folder as a run leaves it, with these scores at its evaluations."""
    folder.mkdir(parents=True)
    args = dataclasses.replace(erdp.preset(env, device="cpu"), **settings)
    about = dict(dataset_id=args.dataset or erdp.ROWS[env].dataset, transitions=1000, data_score=40.0, layout=[3])
    (folder / "config.json").write_text(json.dumps(vars(args) | about))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "score_mean", "success"])
        writer.writeheader()
        writer.writerows(dict(step=i * args.eval_every, score_mean=x, success="") for i, x in enumerate(scores, 1))
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


def test_report_averages_over_seeds_as_numpy_does_and_counts_a_copy_once(tmp_path, capsys):
    finals, bests = [20.0, 35.0, 90.0], [40.0, 35.0, 95.0]
    for seed in range(3):
        other = dict(device="cuda:1", compile=True, dataset="D4RL/antmaze/umaze-v1" if seed else None)
        record(tmp_path / f"a{seed}", scores=[bests[seed], finals[seed]], seed=seed, **other)
    record(tmp_path / "a", scores=[0.0, 0.0], seed=2)
    record(tmp_path / "unfinished", scores=[1.0], seed=3, finished=False)
    (line,) = section(written(tmp_path), "Scores")
    scores = [f"{np.mean(x):.1f} ± {np.std(x):.1f}" for x in (finals, bests)]
    paper, data = "100.0", "40.0"
    settings = ["the row's preset", "1,000,000", "100"]
    assert line == ["antmaze-umaze-v0", "D4RL/antmaze/umaze-v1", *settings, paper, data, *scores, "3"]
    assert "unfinished: unfinished, 50,000 of 1,000,000 updates" in capsys.readouterr().out


OTHERS = [dict(dataset="other/antmaze/umaze-v0"), dict(eval_env="AntMaze_Medium-v5"), dict(variant="released")]
OTHERS += [dict(num_steps=20_000), dict(entropy_coef=0.0), dict(eval_episodes=10), dict(eval_candidates=1)]
OTHERS += [dict(eval_every=1000)]


@pytest.mark.parametrize("settings", OTHERS)
def test_report_other_data_or_settings_never_stand_beside_the_papers_figures(tmp_path, settings):
    record(tmp_path / "antmaze-umaze-v0__paper__0", scores=[77.25], **settings)
    (line,) = section(written(tmp_path), "Scores")
    assert line[0] == "antmaze-umaze-v0" and line[-5:] == ["", "40.0", "77.2", "77.2", "1"]


def test_report_the_papers_averages_are_the_means_of_the_transcribed_rows():
    tables = {name: report.TABLES_1_AND_2[name] for name in ("gym", "adroit", "antmaze")}
    tables |= {M: [mean for mean, _ in figures] for M, figures in report.TABLE_5.items()}
    averages = dict(gym=89.9, adroit=66.8, antmaze=86.7) | {1: 56.1, 4: 74.0, 16: 80.0, 64: 85.2}
    assert averages.keys() == tables.keys()
    for name, figures in tables.items():
        assert abs(np.mean(figures) - averages[name]) <= 0.05 + 1e-9, f"{name}: {figures}"
    assert tables[64] == list(tables["antmaze"][2:])
    found, arms = report.printed(), {"the row's preset": {}, "clipped double Q": runs.CLIPPED_DOUBLE_Q}
    assert all(runs.label(arm) == name for name, arm in arms.items())
    # one of each part, looked up in the paper by name
    assert found["halfcheetah-medium-replay-v2", "the row's preset"] == "57.0"
    assert found["hopper-medium-expert-v2", "the row's preset"] == "111.9"
    assert found["pen-cloned-v1", "the row's preset"] == "66.3"
    assert found["kitchen-complete-v0", "the row's preset"] == "82.3"
    assert found["antmaze-umaze-diverse-v0", "the row's preset"] == "79.8"
    assert found["antmaze-large-play-v0", "M = 4"] == "52.4 ± 13.0"
    assert found["antmaze-large-play-v0", "clipped double Q"].startswith("46.4 ")


def test_report_holds_arms_against_cloning_seed_by_seed(tmp_path):
    arms = {"bc": runs.CLONING, "ours": dict(q_time=3), "other loss": dict(loss="posterior")}
    for arm, settings in arms.items():
        for seed, score in enumerate([15.0, 24, 36] if arm == "ours" else [10.0, 20, 30]):
            whole = dict(loss="noise", dataset="/home/me/d/x/hopper.hdf5", seed=seed) | settings
            record(tmp_path / f"{arm}{seed}", "hopper-medium-v2", (score,), **whole)
    found = runs.read_folder(tmp_path / "bc0").config
    assert found["dataset"] == "d/x/hopper.hdf5" and "layout" not in found, "nobody's home is published"
    (line,) = section(written(tmp_path), "Learning with Q against cloning")
    assert line[0] == "hopper-medium-v2" and "--q-time 3" in line[2] and line[-1] == "3"
    assert line[4] == "**+5.0 [+2.5, +7.5]**", "5, 4 and 6 by seed: 5 ± 4.303 * 1 / sqrt(3)"


def test_report_draws_runs_of_other_numbers_of_episodes_in_other_panels(tmp_path):
    for episodes in (10, 50):
        record(tmp_path / f"a{episodes}", dataset="x/y-v0", eval_episodes=episodes)
    panels = report.panels_of(runs.group_runs(runs.read_runs([tmp_path])))
    assert [panel.rpartition("\n")[2] for panel in panels] == [f"{x} episodes an evaluation" for x in (10, 50)]
    assert "(curves.png)" in written(tmp_path) and (tmp_path / "report" / "curves.png").exists()


def test_report_names_the_arms():
    assert runs.label({}) == "the row's preset" and runs.label(dict(num_critics=4)) == "M = 4"
    assert runs.label(runs.CLONING) == "behaviour cloning"
    arm = dict(clip_denoised=True, loss="noise", variant="released", max_q_backup=False, entropy_coef=0.0)
    assert runs.label(arm) == "released, alpha = 0, --clip-denoised, --loss noise, --no-max-q-backup"
    cloning = vars(erdp.preset("pen-human-v1")) | runs.CLONING
    assert runs.arm_of(cloning | dict(num_critics=1)) == runs.arm_of(cloning), "a cloned policy has no use for critics"


DAMAGED = {
    "cut off": ("config.json", '{"env": "toy"'),
    "a setting is missing": ("config.json", '{"env": "toy"}'),
    "no settings": ("config.json", "[]"),
    "a cell is missing": ("metrics.csv", "step,score_mean\n1,2\n2,\n"),
    "empty": ("metrics.csv", ""),
    "not finite": ("metrics.csv", "step,score_mean\n1,nan\n"),
    "no result": ("result.json", "null"),
    "not yet evaluated": ("metrics.csv", None),
    "another run's result": ("result.json", '{"final": 99.0, "best": 99.0}'),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_report_names_a_damaged_run_and_leaves_it_out(tmp_path, capsys, damage):
    name, content = DAMAGED[damage]
    path = record(tmp_path / "a") / name
    path.unlink() if content is None else path.write_text(content)
    record(tmp_path / "b", seed=1)
    assert section(written(tmp_path), "Scores")[0][-1] == "1"
    said = capsys.readouterr().err
    assert str(tmp_path / "a") in said and said.startswith("left out: ") and said.count("\n") == 1


@pytest.mark.parametrize("argv", [["no-such-folder"], ["--color"]])
def test_report_bad_input_is_one_sentence_and_status_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        report.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and argv[0] in said and said.count("\n") == 1


def test_report_keeps_runs_and_makes_the_same_pages_of_them(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(report, "RESULTS", kept)
    monkeypatch.setattr(runs, "RECORDS", kept / "runs.jsonl")
    runs.RECORDS.write_text("")
    for seed in range(4):
        record(tmp_path / "runs" / f"a{seed}", seed=seed, scores=[1.0, 1 / 3 + seed], finished=seed < 3)
    for _ in range(2):  # a second time changes nothing
        assert report.main([str(tmp_path / "runs"), "--publish"]) == 0
        assert [run.name for run in runs.read_records()] == ["a0", "a1", "a2"]
    theirs, ours = written(tmp_path / "runs"), (kept / "tables.md").read_text()
    assert section(theirs, "Scores") == section(ours, "Scores") and len(section(ours, "Scores")) == 1
    assert "pointmaze" in ours and "pointmaze" not in theirs, "what is said of the runs kept here is not said of others"
    record(tmp_path / "others" / "b", seed=2, scores=[5.0, 6.0])
    record(tmp_path / "others" / "smoke", seed=9, num_steps=3000)
    assert report.main([str(tmp_path / "others"), "--publish"]) == 0
    assert [run.name for run in runs.read_records()] == ["a0", "a1", "b"]


@pytest.mark.slow
def test_report_the_published_pages_are_those_of_the_records(tmp_path):
    assert report.main(["--out", str(tmp_path)]) == 0
    for page in ("tables.md", "figure1.md"):
        assert (tmp_path / page).read_text() == (runs.RESULTS / page).read_text(), f"{page}: python results/report.py"
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "figure1.png", "figure1-shares.png"}
    seen = looks.seen_table(looks.gains_of(runs.group_runs(runs.read_records())))
    assert seen in (runs.RESULTS / "looks.md").read_text(), "python results/looks.py"


def test_figure1_compares_seed_by_seed_and_names_other_settings(tmp_path):
    noise = np.random.default_rng(0).normal(0, 3, 8).round(3)
    for seed, own in enumerate(noise):  # what a seed gives to both policies alike
        finals = {"plain Q": 60 + own, "ensemble": 60 + own + 2 + 0.4 * (seed % 2), "both": 60 - own}
        for name, final in finals.items():
            settings = dict(seed=seed, dataset="toy-10") | figure1.TOY[name]
            record(tmp_path / f"{name}{seed}", "toy", [1.0, float(final)], **settings)
    record(tmp_path / "short", "toy", [50.0], dataset="toy-20", num_steps=200)
    text = written(tmp_path, "figure1.md")
    assert "critics helps" in (runs.RESULTS / "figure1.md").read_text() and "critics helps" not in text, "of other runs"
    pairs = {(line[0], line[1]): line[2:] for line in section(text, "Policies held against each other")}
    gain, mean, p, better, _, each = pairs["10%", "ensemble against plain Q"]
    assert gain == "**+2.2 [+2.0, +2.4]**" and mean == "**+2.2 [+2.0, +2.4]**", "2 and 2.4, by four seeds each"
    assert p == "0.0078" and better == "8 of 8" and each == ", ".join(["+2"] * 8), "p = 2 / 2^8"
    assert not pairs["10%", "both against plain Q"][0].startswith("**") and len(pairs) == 3
    short, plain = section(text, "Every policy at every share")[:2]
    assert short[:2] == ["20%", "--num-steps 200"], "not one of the paper's policies"
    values = np.sort(60 + noise)
    assert plain[:2] == ["10%", "plain Q"] and plain[2].startswith(f"{values[2:-2].mean():.1f} [")
    assert plain[3:5] == [f"{values.std():.1f}", "8"]
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"figure1.png", "figure1-shares.png"}


@pytest.mark.slow
def test_looks_one_look_is_students_test_and_more_looks_find_more():
    rates = [(looks.least_p(*case, draws=1) < 0.05).mean() for case in [((6,),), ((6,), (6,), 0.0)]]
    agree(rates, [0.05, 1 - 0.95**2], atol=2e-3)


# ==== Studies =========================================================================================================


def theta_bar(t: int, T: int = 5) -> float:
    """Of the cosine schedule, from a formula of its own."""
    f = [math.cos((k / (T + 1) + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(T + 1)]
    raw = [1 - x / f[0] for x in f[1:]]
    return math.log(1000) * sum(raw[:t]) / sum(raw)


def sde64(T: int = 5):
    return erdp.MeanRevertingSDE(T, dtype=torch.float64)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_exact_noise_is_the_mean_of_eps_given_x_t_by_quadrature(t):
    modes, width, bar = [-0.5, 0.2], 0.15, theta_bar(t)
    scale, std = math.exp(-bar), math.sqrt(1 - math.exp(-2 * bar))
    x_0 = np.linspace(-2, 2, 40_001)
    prior = sum(np.exp(-0.5 * ((x_0 - mode) / width) ** 2) for mode in modes)
    expected = []
    for x_t in (-1.3, 0.0, 0.4):
        eps = (x_t - scale * x_0) / std  # Bayes: p(x_0 | x_t) is prior times the density of this noise
        weight = prior * np.exp(-0.5 * (eps**2 - (eps**2).min()))
        expected.append([(weight * eps).sum() / weight.sum()])
    x_t = torch.tensor([[-1.3], [0.0], [0.4]], dtype=torch.float64)
    for times in (t, torch.full((3,), t)):
        agree(known_noise.exact_noise(sde64(), x_t, times, modes, width), expected, rtol=1e-6)


@pytest.mark.parametrize("name", figure2.SAMPLERS)
def test_figure2_closed_form_is_the_deviation_of_samples(name):
    found = figure2.measure("cosine", 5, figure2.SAMPLERS[name])
    error = 1 / math.sqrt(2 * figure2.ROWS)  # relative, of a Gaussian sample's deviation
    assert abs(found.one / found.exact - 1) < 5.5 * error, "5.5 errors: 4e-8"
    assert found.error < 1e-12 or name != "optimal sampling"


def test_true_entropy_of_one_gaussian_and_of_modes_far_apart():
    one = 0.5 * math.log(2 * math.pi * math.e * 0.2**2)
    agree(entropy.true_entropy([0.3], 0.2), one, rtol=1e-6)
    agree(entropy.true_entropy([-5.0, 5.0], 0.2), one + math.log(2), rtol=1e-6)


@pytest.mark.parametrize("all_times", [False, True])
def test_h_hat_of_a_gaussian_and_of_a_point_have_their_closed_forms(all_times):
    def closed(width):
        value = 0.5 * math.log(2 * math.pi * math.e)
        for t in range(1, 6 if all_times else 3):
            fisher = 1 / (1 - math.exp(-2 * theta_bar(t)) * (1 - width**2))
            value -= (theta_bar(t) - theta_bar(t - 1)) * (fisher - 1)
        return value

    w = entropy.weights(sde64(), all_times)
    network = known_noise.predictor(sde64(), [0.2], 0.3)
    agree(entropy.h_hat(sde64(), network, ([0.2], 0.3), w), closed(0.3), atol=2e-3)
    assert all_times or abs(entropy.least_h_hat(5) - closed(0.0)) < 1e-10


@pytest.mark.parametrize("loss", ["noise", "posterior", "likelihood"])
@pytest.mark.parametrize("T, t", [(5, 1), (5, 2), (5, 5), (20, 7)])
def test_likelihoods_minimiser_is_where_the_loss_has_no_slope(loss, T, t):
    """As the loss is quadratic in x_0, two equally likely x_0 stand for p(x_0 | x_t, s) of Bayes' rule."""
    sde, bar = sde64(T), theta_bar(t, T)
    state, x_t = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.8, -0.5]], dtype=torch.float64)
    mu, scale, var = likelihood.mean_action(state), math.exp(-bar), 1 - math.exp(-2 * bar)
    precision = 1 / likelihood.WIDTH**2 + scale**2 / var
    mean = (mu / likelihood.WIDTH**2 + scale / var * x_t) / precision
    x_0 = torch.cat([mean - precision**-0.5, mean + precision**-0.5])
    eps, times = (x_t - scale * x_0) / math.sqrt(var), torch.full((2,), t)
    best = likelihood.minimiser(sde, loss, x_t, times[:1], state)
    for direction in torch.eye(2, dtype=torch.float64):
        values = []
        for step in (1.0, 0.0, -1.0):
            prediction = (best + step * direction).expand(2, 2)
            values.append(float(erdp.LOSSES[loss](sde, x_0, x_t.expand(2, 2), times, eps, prediction)))
        up, here, down = values
        assert up - here > 0, "a minimum"
        agree(up, down, rtol=1e-8, atol=1e-8)


def test_likelihoods_slopes_are_the_published_ones():
    assert likelihood.slopes_table() in (runs.RESULTS / "likelihood.md").read_text(), "python results/likelihood.py"


SMALL = {
    figure2: dict(ROWS=100, STEPS=(2, 5)),
    entropy: dict(ROWS=1000, UPDATES=2, SEEDS=[0], ALPHAS=[0.1], FINER=[5], SHOWN=[0.1], SEARCHED=[0.1]),
    likelihood: dict(STEPS=(3,), UPDATES=2, LONGER=2, STATES=2, SAMPLES=2),
}


@pytest.mark.parametrize("study", SMALL)
def test_studies_make_every_table_of_their_page(study, tmp_path, monkeypatch):
    for name, value in SMALL[study].items():
        monkeypatch.setattr(study, name, value)
    study.main(["--out", str(tmp_path)])
    name, tables = study.__name__, r"<!-- (\w+) -->\n(\| [^|]+ \|)"  # each with the first word of its head
    before, after = ((folder / f"{name}.md").read_text() for folder in (runs.RESULTS, tmp_path))
    assert re.findall(tables, after) == re.findall(tables, before) and before.count("<!--") == after.count("<!--")
    assert after != before and (study is not figure2 or (tmp_path / "figure2.png").exists())


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
    agree(diagnose.returns_to_go(data.reward, ends, 0.9), expected)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_diagnosis_q_term_is_eq12_at_every_time_also_where_training_left_it_out(variant):
    torch.manual_seed(0)
    args = dataclasses.replace(erdp.preset("toy", device="cpu"), variant=variant, q_time=1)
    agent, data = erdp.Agent(2, 1, args), erdp.load_data(args)[1]
    batch, noise = next(diagnose.batches(data, args, 1))
    noise.t.fill_(2)
    assert diagnose.policy_terms(agent, batch, noise)["-lambda Q"][0] == 0
    terms = diagnose.policy_terms(agent, batch, noise, q_time=None)
    x_t = agent.sde.diffuse(batch.action, noise.t, noise.eps)
    eps_hat = agent.policy(x_t, noise.t, batch.state)
    q = agent.critics(batch.state, agent.sde.predict_x0(x_t, noise.t, eps_hat).clamp(-1, 1))
    scale = q if variant == "released" else erdp.lcb(agent.critics(batch.state, batch.action), args.lcb_coef)
    expected = {
        "diffusion loss": erdp.LOSSES[args.loss](agent.sde, batch.action, x_t, noise.t, noise.eps, eps_hat),
        "-lambda Q": -args.eta * erdp.pessimistic_value(q, args).mean() / scale.abs().mean().detach(),
    }
    for name, loss in expected.items():
        value, found = terms[name]
        torch.testing.assert_close(value, loss.detach(), rtol=1e-4, atol=1e-5)
        found_by_hand = torch.autograd.grad(loss, list(agent.policy.parameters()), retain_graph=True)
        torch.testing.assert_close(found, torch.cat([g.ravel() for g in found_by_hand]), rtol=1e-3, atol=1e-4)


def test_diagnosis_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnose, "BATCHES", 2)
    argv = "--num-steps 20 --eval-every 20 --eval-episodes 2 --device cpu --no-compile --run-dir".split()
    assert erdp.main([*argv, str(tmp_path / "run")]) == 0
    diagnose.main([str(tmp_path / "run")])
    text = (tmp_path / "run" / "diagnosis.md").read_text()
    assert (tmp_path / "run" / "diagnosis.png").exists() and "512 transitions" in text
    (inside, *_) = section(text, "By diffusion time")
    assert len(inside) == 6 and 1 >= float(inside[1]) > float(inside[5]) >= 0
    assert [line[0] for line in section(text, "The terms of Eq. 15, and Eq. 16")][-2:] == ["all of Eq. 15", "Eq. 16"]
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SystemExit) as stop:
        diagnose.main([str(tmp_path / "run")])
    assert stop.value.code == 2 and "not whole" in capsys.readouterr().err


# ==== Tools ===========================================================================================================


def test_benchmarks_bound_counts_the_operations_of_the_paper():
    step, operations = benchmark.products(erdp.Args(num_critics=2), 31, 8)
    critic, policy = 39 * 256 + 2 * 256**2, 55 * 256 + 2 * 256**2  # multiplications a row, without the last layers
    backward = 2 * (2 * 256**2) + 2 * 256**2 + 2 * 39 * 256  # of Q: activations, weights; in the policy's step
    assert operations == 2 * 256 * (2 * (3 * critic + backward) + (5 + 3) * policy)
    step()


@pytest.mark.slow
def test_benchmark_measures_updates_and_steps_and_names_the_machine(tmp_path, monkeypatch):
    M, processes, *speeds, share, rounding = benchmark.acting(erdp.Args(hidden=64), 2, 0.1)
    eager, compiled, mujoco = (float(speed.split()[0]) for speed in speeds)
    assert M == 2 and processes > 0 and min(eager, compiled, mujoco) > 0
    assert float(share[:-1]) == pytest.approx(100 * compiled / mujoco, abs=0.6) and 0 <= float(rounding) < 1e-4
    monkeypatch.setattr(benchmark, "acting", lambda *_: [4])
    monkeypatch.setitem(benchmark.WAYS, "cpu", ("eager",))
    benchmark.main(["--critics", "1", "--seconds", "0.1", "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "GFLOP/s" in text and ("family" in text or not Path("/proc/cpuinfo").exists())
    spent = re.findall(r"^\| .+ \| (-?[\d.]+) \| (-?\d+)% \|$", text, re.M)  # the rest is negative in a noisy moment
    assert len(spent) == len(benchmark.PARTS) + 1 and sum(int(share) for _, share in spent) in range(95, 106)


def test_mutants_change_every_function_that_they_name_and_run_tests_that_there_are():
    source = (ROOT / "erdp.py").read_text()
    found = list(mutants.mutants(source))
    assert {mutant.function for mutant in found} == {name for names in mutants.TESTS.values() for name in names}
    for start in mutants.EQUIVALENT:
        assert sum(mutant.told().startswith(start) for mutant in found) == 1, f"not one mutant is {start}"
    assert all(mutant.source != source for mutant in found)
    tests = re.findall(r"def (test_\w+)", (ROOT / "test_erdp.py").read_text())
    for selection in mutants.TESTS:
        for word in selection.split(" or "):
            assert any(word in test for test in tests), f"no test has {word} in its name"


def test_mutants_outcomes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "KEPT", tmp_path / "runs" / "kept.jsonl")
    chosen, asked = [mutants.Mutant("f", "x + y", "x", "y", "sde", str(i)) for i in range(3)], []
    monkeypatch.setattr(mutants, "allowed_time", lambda: 1.0)
    monkeypatch.setattr(mutants, "passes", lambda source, *_: asked.append(source) or source == "1")
    for _ in range(2):
        assert mutants.outcomes(chosen) == ["quick", "survived", "quick"]
    assert asked == ["0", "1", "1", "1", "2"]


@pytest.mark.slow
def test_peers_learn_what_there_is_to_learn_and_with_q_more_than_regression(tmp_path, capsys):
    for peer in peers.PEERS:
        peers.main([peer, *"--env toy --dataset toy-20 --steps 600 --episodes 4 --out".split(), str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    regression, td3bc, iql = (line["score"] for line in lines)
    assert regression < 30 < min(td3bc, iql), "the mean action is that of most steps, to the left; Q knows better"
    assert written(tmp_path).count("| toy-20 |") == 3
    with pytest.raises(SystemExit) as stop:
        peers.main(["td3bc", "--env", "nowhere"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_pointmaze_is_recorded_by_one_who_does_not_know_the_goal(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(pointmaze, "EPISODES", 20)
    pointmaze.main()
    task, data = erdp.load_data(erdp.parse(["--dataset", pointmaze.DATASET, "--device", "cpu"]))
    assert (data.state.shape, data.action.shape) == ((6000, 8), (6000, 2)) and not data.terminal.any()
    near = (data.next_state[:, :2] - data.next_state[:, 2:4]).norm(dim=1) <= 0.45  # of what is reached and desired
    assert torch.equal(near.float(), data.reward) and 0 < near.float().mean() < 0.3
    assert 0 < task.score(task.data_return) < 30 and task.ref_max > 200, "who knows the goal is mostly there"
    with pytest.raises(SystemExit, match="is there already"):
        pointmaze.main()


# ==== run_all.sh ======================================================================================================

ARMS = dict(paper={}, bc=runs.CLONING | dict(num_critics=1), released=dict(variant="released"))
ARMS |= dict(q=dict(num_critics=1, entropy_coef=0.0), entropy=dict(num_critics=1), ensemble=dict(entropy_coef=0.0))
ARMS |= {f"M{M}": dict(num_critics=M) for M in (1, 4, 16)}
ARMS |= {"M1-nobackup": dict(num_critics=1, max_q_backup=False, eval_candidates=1)}
ARMS |= {"M1-nobackup-alpha0": ARMS["M1-nobackup"] | dict(entropy_coef=0.0)}
ARMS |= {"clipped-double-q": runs.CLIPPED_DOUBLE_Q, "debruijn": dict(variant="debruijn")}
ARMS |= {f"debruijn-{alpha}": dict(variant="debruijn", entropy_coef=alpha) for alpha in (0.1, 0.3)}
STANDINS = "hopper-medium-expert-v2", "antmaze-umaze-v0", "pen-human-v1"
FAKE = """#!/bin/bash
echo "$*" >>calls
[[ $1 == erdp.py ]] || exit 0
while [[ $1 != --run-dir ]]; do shift; done
mkdir -p "$2"
[[ ! $2 =~ ${BROKEN:-^$} ]] || { echo "erdp: it is broken"; exit 1; }
if [[ $2 =~ ${SLOW:-^$} && ! -e $2/checkpoint.pt ]]; then
    trap 'trap - TERM; sleep 0.5; >"$2/checkpoint.pt"; exit 143' TERM # a second signal ends it
    >"$2/config.json"
    while true; do sleep 0.05; done
fi
>"$2/result.json"
"""  # it leaves what erdp.py leaves, and stops as it stops


def run_all(folder, *words, **environment) -> subprocess.Popen:
    """run_all.sh in `folder`, far from the project, with FAKE for Python."""
    for name, text in {"run_all.sh": (ROOT / "run_all.sh").read_text(), "fake": FAKE}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = dict(PATH=os.environ["PATH"], PYTHON="./fake") | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # also in the background
    return subprocess.Popen(["bash", folder / "run_all.sh", *words], env=environment, cwd="/", **pipes)


def done(folder, *words, **environment) -> tuple[int, str, str, list[str]]:
    """Status, output, and the calls of Python."""
    (folder / "calls").unlink(missing_ok=True)
    child = run_all(folder, *words, **environment)
    out, err = child.communicate(timeout=300)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return child.returncode, out, err, calls


def settings_of(lines) -> dict[tuple, erdp.Args]:
    """Name's first part, arm and seed, as the run's folder says them -> settings, of the lines that run erdp.py."""
    found = {}
    for words in (shlex.split(line) for line in lines if " erdp.py " in line):
        args = erdp.parse([*words[words.index("erdp.py") + 1 : -1], "--device", "cpu"])
        name, arm, seed = Path(args.run_dir).name.split("__")
        assert words[-1] == "--resume" and (name, arm, int(seed)) not in found, "every run has a folder of its own"
        found[name, arm, int(seed)] = args
    return found


def runs_of(size) -> set[tuple]:
    """The runs that a size must have: row or share, arm, seed."""
    if size == "toy-sweep":
        shares, arms = [f"toy-{share}" for share in (20, 10, 5, 2)], ("bc", "q", "ensemble", "paper", "debruijn")
        some = itertools.product(["toy-5"], ("released", "debruijn-0.1", "debruijn-0.3"), range(5))
        return {*itertools.product(shares, arms, range(10)), *some}
    found = {*itertools.product(["toy"], ("paper", "bc", "q", "entropy", "ensemble", "released"), range(5))}
    if size == "quick":
        return found | {*itertools.product(STANDINS, ("bc", "M4"), [0])}
    arms = "M1", "M4", "M16", "M1-nobackup", "M1-nobackup-alpha0", "clipped-double-q"
    found |= {*itertools.product(erdp.ROWS.keys() - {"toy", "own"}, ["paper"], range(5))}
    return found | {*itertools.product(report.FOUR, arms, range(5))}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["full", "toy-sweep", "quick"])
def test_run_all_lists_every_run_of_the_paper_and_changes_only_what_the_arm_says(tmp_path, size):
    found = settings_of(done(tmp_path, "list", size, ERDP_DATA="/some where")[1].splitlines())
    assert found.keys() == runs_of(size)
    for (env, arm, seed), args in found.items():
        changed = ARMS[arm] | dict(seed=seed, run_dir=args.run_dir)
        if size == "toy-sweep":
            changed["dataset"] = env
        if size == "quick" and env in STANDINS:
            assert args.dataset and args.num_steps < runs.SMOKE and vars(args).items() >= changed.items()
        else:
            row = env.partition("-")[0] if size == "toy-sweep" else env
            expected = erdp.preset(row, changed.get("variant", "paper"), "cpu")
            assert args == dataclasses.replace(expected, **changed), f"{env}, {arm}"


def test_run_all_runs_what_it_lists_then_the_report_and_names_what_failed(tmp_path):
    lines = done(tmp_path, "list", "pen-human-v1")[1].splitlines()
    assert [line.split()[5] for line in lines] == [*"01234"]
    status, out, _, calls = done(tmp_path, "--jobs", "3", "pen-human-v1", BROKEN="__[03]")
    assert status == 1 and sorted(calls[:-1]) == [line.removeprefix("./fake ") for line in lines]
    assert calls[-1] == "results/report.py runs/all"
    failed = [f"pen-human-v1__paper__{seed} failed: see runs/all/pen-human-v1__paper__{seed}.log" for seed in (0, 3)]
    assert out.splitlines()[-2:] == failed
    assert (tmp_path / "runs" / "all" / "pen-human-v1__paper__0.log").read_text() == "erdp: it is broken\n"
    assert done(tmp_path, "pen-human-v1")[0] == 0
    status, out, _, calls = done(tmp_path, "task", "2", "pen-human-v1", BROKEN="__1")
    assert (status, out, len(calls)) == (1, "erdp: it is broken\n", 1), "the run in place of the script"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_all_stops_its_runs_with_a_checkpoint_and_goes_on_later(tmp_path, number):
    child, deadline = run_all(tmp_path, "--jobs", "2", "pen-human-v1", SLOW="."), time.monotonic() + 100
    while len(list((tmp_path / "runs" / "all").glob("*/config.json"))) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, number)  # as Ctrl-C to the terminal's process group
    assert child.wait(timeout=100) == 130, child.communicate()
    assert len(list((tmp_path / "runs" / "all").glob("*/checkpoint.pt"))) == 2, "it ends after its runs"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "nothing else was started"
    assert done(tmp_path, "pen-human-v1")[0] == 0
    child.communicate()


@pytest.mark.parametrize("words", ["task", "task 0", "task 99 quick", "task x", "task 1 quick 2", "--jobs 0", "half"])
def test_run_all_says_in_one_sentence_what_is_wrong_with_its_words(tmp_path, words):
    status, out, err, calls = done(tmp_path, *words.split(), ERDP_DATA="x")
    assert (status, out, err.count("\n"), calls) == (2, "", 1, []) and err.startswith("run_all.sh: ")
    status, out, err, _ = done(tmp_path, PYTHON="no-such-python")
    assert (status, out, err.count("\n")) == (2, "", 1) and "no-such-python" in err


# ==== The PointMaze study =============================================================================================


@pytest.fixture
def study(tmp_path):
    """The figures of 24 made-up runs, kept as the study keeps them: scores (arms, seeds), which are those of LATE."""
    rng = np.random.default_rng(0)
    scores, acted = rng.uniform(10, 30, (3, 8)), rng.uniform(10, 30, (3, 8, 2))
    kept, lines = tmp_path / "pointmaze", []
    kept.mkdir()
    for (i, arm), (j, seed) in itertools.product(enumerate(pointmaze_study.ARMS), enumerate(pointmaze_study.SEEDS)):
        late = scores[i, j] + np.array([-2, 0, 1, 1, 0])
        rows = [f"{step},{score}" for step, score in zip(range(2500, 30_001, 2500), [*[0.0] * 7, *late])]
        (kept / f"{arm}__{seed}.csv").write_text("\n".join(["step,score_mean", *rows]) + "\n")
        run = f"{arm}__{seed}"
        lines += [json.dumps(dict(run=run, candidates=c, score=acted[i, j, k])) for k, c in enumerate((50, 1))]
    (kept / "acting.jsonl").write_text("\n".join(lines))
    return scores, acted


def test_pointmaze_study_pairs_seeds_takes_late_scores_and_corrects_by_holm(study, tmp_path):
    scores, acted = study
    pointmaze_study.main(["--out", str(tmp_path)])
    page, (every, early, cloning) = (tmp_path / "pointmaze.md").read_text(), scores
    assert (tmp_path / "pointmaze-curves.png").exists()
    for name, score, samples in zip(pointmaze_study.ARMS.values(), scores, acted):
        cells = score, samples[:, 0], samples[:, 1]
        assert f"| {name} | {' | '.join(f'{x.mean():.1f} ± {x.std():.1f}' for x in cells)} |" in page
    half = scipy.stats.t.ppf(0.975, 7) * (every - cloning).std(ddof=1) / 8**0.5
    mean = (every - cloning).mean()
    assert f"All times less cloning with critics: {mean:+.1f} [{mean - half:.1f}, {mean + half:.1f}], p = " in page
    line = re.search(r"^\| early less all times \| (\S+) .*", page, re.MULTILINE)
    assert float(line[1]) == pytest.approx((early - every).mean(), abs=0.05)
    line = re.search(r"^\| cloning, one of 50 less plain sample \| (\S+) .*", page, re.MULTILINE)
    assert float(line[1]) == pytest.approx((acted[2, :, 0] - acted[2, :, 1]).mean(), abs=0.05)
    for step in ("20,000", "30,000"):  # the arms' scores are all moved by the same there
        line = re.search(rf"^\| evaluation at {step} \| .* \| (\S+) .*, (\d) of 8 \|", page, re.MULTILINE)
        assert float(line[1]) == pytest.approx((early - every).mean(), abs=0.05)
        assert int(line[2]) == (early > every).sum()
    line = re.search(r"^\| last policy, plain sample \| (\S+) ", page, re.MULTILINE)
    assert float(line[1]) == pytest.approx((acted[0, :, 1] - acted[2, :, 1]).mean(), abs=0.05)
    assert pointmaze_study.holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])


def test_pointmaze_study_shows_an_exploratory_arm_when_its_four_runs_are_there(study, tmp_path):
    (every, *_), acted = study
    kept, late = tmp_path / "pointmaze", np.array([40.0, 50.0, 60.0, 90.0])
    for seed, score in zip(pointmaze_study.FEWER, late):
        if seed == 4:
            pointmaze_study.main(["--out", str(tmp_path)])
            assert "| M = 16 |" not in (tmp_path / "pointmaze.md").read_text(), "one of its runs is missing"
        rows = [f"{step},{score if step >= 20_000 else 0}" for step in pointmaze_study.STEPS]
        (kept / f"sixteen__{seed}.csv").write_text("\n".join(["step,score_mean", *rows]))
        with open(kept / "acting.jsonl", "a") as file:
            for c in (50, 1):
                file.write("\n" + json.dumps(dict(run=f"sixteen__{seed}", candidates=c, score=score + c)))
    pointmaze_study.main(["--out", str(tmp_path)])
    line = re.search(r"^\| M = 16 \| (.*) \|$", (tmp_path / "pointmaze.md").read_text(), re.MULTILINE)[1].split(" | ")
    assert line[:3] == ["60.0 ± 18.7", "110.0 ± 18.7", "61.0 ± 18.7"]
    plain = acted[:, :4, 1]
    for cell, less in zip(line[3:], (late - every[:4], late + 1 - plain[0], late + 1 - plain[2]), strict=True):
        half = scipy.stats.t.ppf(0.975, 3) * less.std(ddof=1) / 2
        expected = less.mean(), less.mean() - half, less.mean() + half
        assert [float(x) for x in re.findall(r"[-+]?[\d.]+", cell)] == pytest.approx(expected, abs=0.05), (
            "the same seeds"
        )


@pytest.mark.parametrize("lost", ["all__3.csv", "a line of early__8.csv", "acting.jsonl"])
def test_pointmaze_study_compares_nothing_before_all_runs_are_there(lost, study, tmp_path, capsys):
    path = tmp_path / "pointmaze" / lost.split()[-1]
    lines = path.read_text().splitlines()
    path.unlink()
    if " " in lost:
        path.write_text("\n".join(lines[:-1]))
    with pytest.raises(SystemExit) as stop:
        pointmaze_study.main(["--out", str(tmp_path)])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and "not complete" in said.err
    assert not list(tmp_path.glob("pointmaze?*"))


@pytest.mark.slow
def test_pointmaze_study_takes_up_runs_by_their_settings_and_draws_ways_of_policies(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(pointmaze, "EPISODES", 3)
    monkeypatch.setattr(pointmaze_study, "EPISODES", 2)
    pointmaze.main()
    small = "--device cpu --num-critics 1 --hidden 8 --batch-size 8 --num-steps 2 --eval-episodes 2".split()
    run = tmp_path / "run"
    assert erdp.main(["--dataset", pointmaze.DATASET, *small, "--run-dir", str(run)]) == 0
    pointmaze_study.main(["--ways", str(run), str(run), "--out", str(tmp_path)])
    assert (tmp_path / "pointmaze-ways.png").exists()
    env = pointmaze.make_env()
    ways, score = pointmaze_study.play(run, env)
    assert ways.shape == (2, 301, 2) and 0 <= score <= 100
    cells = {tuple(env.unwrapped.maze.cell_xy_to_rowcol(position)) for position in ways.reshape(-1, 2)}
    assert cells <= set(pointmaze.WAY), "no way leads through a wall"
    monkeypatch.setattr(pointmaze_study, "act", functools.partial(pointmaze_study.act, episodes=2))
    keep, kept = ["--keep", str(tmp_path), "--out", str(tmp_path / "mine")], tmp_path / "mine" / "pointmaze"
    pointmaze_study.main(keep)
    assert "is no run of the study" in capsys.readouterr().out and not list(kept.iterdir())
    own = dict(num_critics=1, hidden=8, batch_size=8, num_steps=2, eval_episodes=2)
    monkeypatch.setattr(pointmaze_study, "COMMON", own)
    for again in range(3):  # the second time all is there, the third time another run's
        if again == 2:
            (kept / "all__0.csv").write_text("step,score_mean\n")
            (kept / "acting.jsonl").write_text('{"run": "all__0", "candidates": 50, "score": 0, "episodes": 9}\n')
        pointmaze_study.main(keep)
        lines = [json.loads(line) for line in (kept / "acting.jsonl").read_text().splitlines()]
        assert [(line["run"], line["candidates"], line["episodes"]) for line in lines] == [
            ("all__0", c, 2) for c in (50, 1)
        ]
    assert (kept / "all__0.csv").read_text() == (run / "metrics.csv").read_text()
    final = json.loads((run / "result.json").read_text())["final"]
    assert lines[0]["score"] == pytest.approx(final, abs=0.01), "the run's own last evaluation, again"
    with pytest.raises(SystemExit):
        pointmaze_study.main(["--ways", str(run), str(tmp_path / "none"), "--out", str(tmp_path)])
    assert re.fullmatch("pointmaze_study.py: .*none.*\n", capsys.readouterr().err)
