"""Tests of the scripts around erdp.py: the mathematics of the studies in results/, the report, and run_all.sh."""

import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

import erdp
from erdp import Args, Batch, Noise, QEnsemble
from test_erdp import agree, gaussian_recursion, literal_theta, sde64


# ---------------------------------------------------------------------------------------------------------------------
# The scripts in results/
# ---------------------------------------------------------------------------------------------------------------------
def script(name: str):
    """A script of results/ as a module."""
    folder = Path(__file__).parent
    if not folder.exists():
        pytest.skip("results/ is not beside this file")
    sys.path.append(str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def test_results_benchmarks_plain_ensemble_is_the_same_function_with_gradients_to_its_weights():
    benchmark = script("benchmark")
    args = Args(num_critics=3, batch_size=8)
    data = benchmark.random_data(args, 20)
    (_, plain), (_, eager) = (benchmark.learner(args, way, data) for way in ("plain", "eager"))
    assert isinstance(plain.critics_target, benchmark.PlainEnsemble) and type(eager.critics) is QEnsemble
    found = []
    for agent in (plain, eager):
        q = agent.critics.double()(data.state.double(), data.action.double())
        found.append([q, *torch.autograd.grad(q.square().sum(), list(agent.critics.parameters()))])
    for ours, theirs in zip(*found):
        agree("Q and its gradients, plain and eager", ours, theirs)
    plain.critics(data.state.double(), data.action.double(), frozen=True).sum().backward()
    assert all(p.grad is not None for p in plain.critics.parameters())


def test_results_benchmarks_bound_counts_the_operations_of_the_paper():
    benchmark = script("benchmark")
    step, operations = benchmark.products(Args(num_critics=2), 31, 8)
    critic, policy = 39 * 256 + 2 * 256**2, 55 * 256 + 2 * 256**2  # multiplications a row, without the last layers
    backward = 2 * (2 * 256**2) + 2 * 256**2 + 2 * 39 * 256  # of Q: activations, weights; in the policy's step
    assert operations == 2 * 256 * (2 * (3 * critic + backward) + (5 + 3) * policy)
    step()


@pytest.mark.parametrize("t", [1, 3, 5])
def test_results_exact_noise_is_the_mean_of_eps_given_x_t_by_quadrature(t):
    modes, width, bar = [-0.5, 0.2], 0.15, literal_theta("cosine", 5)[1][t]
    scale, std = math.exp(-bar), math.sqrt(1 - math.exp(-2 * bar))
    x_0 = np.linspace(-2, 2, 40_001)
    prior = sum(np.exp(-0.5 * ((x_0 - mode) / width) ** 2) for mode in modes)
    expected = []
    for x_t in (-1.3, 0.0, 0.4):
        eps = (x_t - scale * x_0) / std  # Bayes: p(x_0 | x_t) is prior times the density of this noise
        weight = prior * np.exp(-0.5 * (eps**2 - (eps**2).min()))
        expected.append([(weight * eps).sum() / weight.sum()])
    x_t = torch.tensor([[-1.3], [0.0], [0.4]], dtype=torch.float64)
    exact_noise = script("figure2").exact_noise
    agree("E(eps | x_t)", exact_noise(sde64(), x_t, t, modes, width), expected, rtol=1e-6)
    agree("t as a tensor", exact_noise(sde64(), x_t, torch.full((3,), t), modes, width), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("T", [2, 5, 30])
def test_results_closed_form_deviations_obey_their_recursions(schedule, T):
    figure2, width, (prime, bar) = script("figure2"), 0.3, literal_theta(schedule, T)
    sde = sde64(T, schedule)
    network = figure2.predictor(sde, [0.0], width)
    variances = {1.0: 1.0, 0.0: 1.0}
    for last in variances:
        for t in range(T, 0, -1):
            spread = math.exp(-2 * bar[t]) * width**2 + 1 - math.exp(-2 * bar[t])  # of x_t: its score is -x_t / spread
            noise = 2 * prime[t] * (last if t == 1 else 1.0)
            variances[last] = (1 + prime[t] - 2 * prime[t] / spread) ** 2 * variances[last] + noise
    samplers = figure2.SAMPLERS.values()
    expected = [gaussian_recursion(schedule, T, 0.0, width)[1][1], *variances.values()]
    actual = [figure2.closed_form_deviation(sampler, sde, network) ** 2 for sampler in samplers]
    agree("variances of optimal sampling, of the reverse SDE, and with a quiet end", actual, expected, rtol=1e-9)


def test_results_x0_hat_loses_the_variance_of_x0_given_x_t():
    for t, bar in list(enumerate(literal_theta("cosine", 5)[1]))[1:]:
        given = 1 / (1 / 0.3**2 + math.exp(-2 * bar) / (1 - math.exp(-2 * bar)))  # Var(x_0 | x_t), two precisions added
        actual = script("figure2").deviation_of_x0_hat(sde64(), 0.3, t)
        agree("deviation of E(x_0 | x_t)", actual, math.sqrt(0.09 - given))


def test_results_true_entropy_of_one_gaussian_and_of_modes_far_apart():
    one = 0.5 * math.log(2 * math.pi * math.e * 0.2**2)
    true_entropy = script("entropy").true_entropy
    agree("one", true_entropy([0.3], 0.2), one, rtol=1e-6)
    agree("two modes, together", true_entropy([0.0, 0.0], 0.2), one, rtol=1e-6)
    agree("two modes, far apart", true_entropy([-5.0, 5.0], 0.2), one + math.log(2), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_results_paper_variant_multiplies_the_predicted_noise_by_what_it_says(alpha):
    """The loss at one x_t, over three eps and a_T = ±1, minimised numerically over their common prediction."""
    eps = torch.tensor([[-0.4], [0.3], [1.0]], dtype=torch.float64).repeat(2, 1)
    a_T = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(3)[:, None]
    sde, t, x_t = sde64(), 2, 0.5
    zeros, times = torch.zeros_like(eps), torch.full((6,), t)
    action = sde.predict_x0(torch.full_like(eps, x_t), t, eps)  # the actions that eps takes to x_t
    batch, noise = Batch(zeros, action, zeros[:, 0], zeros, zeros[:, 0]), Noise(None, times, eps, a_T, None)
    critics, args = script("entropy").flat_critics, Args(entropy_coef=alpha)

    def loss(prediction):
        def policy(*_):
            return torch.full_like(eps, prediction)

        q_data = critics(None, action)
        return float(erdp.policy_loss(policy, critics, sde, batch, noise, q_data, args)["policy_loss"])

    best = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded", options=dict(xatol=1e-8)).x
    agree("E(eps | x_t) / (1 - alpha / 2)", best, 0.3 / (1 - alpha / 2), rtol=0.02, atol=0)


@pytest.mark.parametrize("variant", ["none", "paper", "debruijn"])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 1.0])
def test_results_expected_deviation_obeys_its_recursion(variant, alpha):
    entropy, (prime, bar), variance = script("entropy"), literal_theta("cosine", 5), 1.0
    for t in range(5, 0, -1):
        var, past, step = (1 - math.exp(-2 * theta) for theta in (bar[t], bar[t - 1], prime[t]))
        divisor = dict(none=1.0, paper=1 - alpha / 2, debruijn=1 + 5 * alpha * (t <= 2) * prime[t] / var)[variant]
        noise = math.sqrt(var) / (math.exp(-2 * bar[t]) * 0.3**2 + var) / divisor  # predicted, per x_t
        x_0 = math.exp(bar[t]) * (1 - math.sqrt(var) * noise)
        slope = past / var * math.exp(-prime[t]) + step / var * math.exp(-bar[t - 1]) * x_0
        variance = slope**2 * variance + past * step / var
    assert entropy.expected_deviation(variant, alpha) == f"{math.sqrt(variance):.3g}"
    assert entropy.expected_deviation("paper", 2.0) == "no minimum" and entropy.expected_deviation("released", 1) == ""


@pytest.mark.parametrize("all_times", [False, True])
def test_results_h_hat_of_a_gaussian_and_of_a_point_have_their_closed_forms(all_times):
    entropy, (prime, bar) = script("entropy"), literal_theta("cosine", 5)
    times = range(1, 6 if all_times else 3)

    def closed(width):
        fisher = (1 / (1 - math.exp(-2 * bar[t]) * (1 - width**2)) for t in times)
        return 0.5 * math.log(2 * math.pi * math.e) - sum(prime[t] * (f - 1) for t, f in zip(times, fisher))

    sde = entropy.sde_of(5, all_times)
    exact = entropy.widened(sde, ([0.2], 0.3), 0.0)
    agree("H-hat", entropy.h_hat(sde, exact, ([0.2], 0.3)), closed(0.3), atol=2e-3)
    assert all_times or abs(entropy.least_h_hat(5) - closed(0.0)) < 1e-10


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_results_term_norms_are_those_of_each_term_differentiated_alone(variant):
    entropy = script("entropy")
    torch.manual_seed(0)
    args = Args(env="toy", variant=variant, num_critics=3, batch_size=32, eta=2.0, entropy_coef=0.3)
    agent = erdp.Agent(3, 2, args)
    state, action, zeros = torch.randn(50, 3), 2 * torch.rand(50, 2) - 1, torch.zeros(50)
    data = Batch(state, action, zeros, state, zeros)
    noise = erdp.noise_buffers(args, 2, "cpu")
    erdp.sample_noise(noise, 50, torch.Generator().manual_seed(0))
    state, action = state[noise.rows], action[noise.rows]
    x_t = agent.sde.diffuse(action, noise.t, noise.eps)
    eps_hat = agent.policy(x_t, noise.t, state)
    a_0 = agent.sde.predict_x0(x_t, noise.t, eps_hat)
    log_p = erdp.policy_log_prob(agent.sde, a_0, eps_hat, noise.a_T, variant)
    q, q_data = agent.critics(state, a_0.clamp(-1, 1)), agent.critics(state, action)
    if variant == "paper":
        size = (q_data.mean(0) - 4 * q_data.std(0, correction=0)).abs().mean().item()
        weight = 2.0 * 0.3 / size
    else:
        size, weight = q.abs().mean().item(), 0.3 / log_p.abs().mean().item()
    value = q.mean(0) - 4 * q.std(0, correction=int(variant == "released"))
    terms = ((eps_hat - noise.eps) ** 2).mean(), -2.0 / size * value.mean(), weight * log_p.mean()
    parameters = list(agent.policy.parameters())
    alone = [torch.cat([g.ravel() for g in torch.autograd.grad(x, parameters, retain_graph=True)]) for x in terms]
    expected = [float(g.norm()) for g in alone] + [float(torch.cosine_similarity(alone[2], alone[0], dim=0))]
    agree("norms and cosine", entropy.term_norms(agent, data, args, batches=1), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["noise", "posterior", "likelihood"])
@pytest.mark.parametrize("T, t", [(5, 1), (5, 2), (5, 5), (20, 7)])
def test_results_minimiser_is_where_the_loss_has_no_slope(loss, T, t):
    """As the loss is quadratic in x_0, two equally likely x_0 stand for p(x_0 | x_t, s) of Bayes' rule."""
    likelihood, sde, bar = script("likelihood"), sde64(T), literal_theta("cosine", T)[1][t]
    state, x_t = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.8, -0.5]], dtype=torch.float64)
    mu, scale, var = likelihood.mean_action(state), math.exp(-bar), 1 - math.exp(-2 * bar)
    precision = 1 / likelihood.WIDTH**2 + scale**2 / var
    mean = (mu / likelihood.WIDTH**2 + scale / var * x_t) / precision
    x_0 = torch.cat([mean - precision**-0.5, mean + precision**-0.5])
    eps = (x_t - scale * x_0) / math.sqrt(var)
    times = torch.full((2,), t)
    best = likelihood.minimiser(sde, loss, x_t, times[:1], state)

    def at(prediction):
        return erdp.diffusion_loss(sde, x_0, x_t.expand(2, 2), times, eps, prediction.expand(2, 2), loss)

    for direction in torch.eye(2, dtype=torch.float64):
        up, here, down = (float(at(best + step * direction)) for step in (1.0, 0.0, -1.0))
        assert up - here > 0, "a minimum"
        agree("the parabola's axis: equal to both sides", up - down, 0.0, atol=1e-8 * max(1.0, up))


@pytest.mark.parametrize("name", ["figure2", "entropy", "likelihood", "equivalence"])
def test_results_scripts_refuse_bad_input_in_one_sentence(name, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    commands = [["--out", str(file)]]
    if name == "equivalence":
        commands = [["checkout", "--out", str(file)], [str(tmp_path)], [str(tmp_path / "none")]]
    if name == "entropy":
        commands += [["--out", str(tmp_path), "--checkpoint", str(file)], ["--checkpoint", str(tmp_path / "none.pt")]]
    for command in commands:
        monkeypatch.setattr(sys, "argv", [f"results/{name}.py", *command])
        with pytest.raises(SystemExit) as stop:
            script(name).main()
        said = capsys.readouterr()
        assert stop.value.code == 2 and not said.out and said.err.count("\n") == 1, said


@pytest.fixture(scope="module")
def report():
    return script("report")


def record(folder, env="antmaze-umaze-v0", scores=(10.0, 30.0, 20.0), dataset=None, finished=True, **settings):
    """A run's folder as a run leaves it, with these scores at its evaluations."""
    folder.mkdir(parents=True)
    args = dataclasses.replace(erdp.preset(env), dataset=dataset, **settings)
    own = {"toy": "toy"}.get(env) or erdp.ROWS[env].dataset + "-v1"
    about = dict(
        dataset_id=dataset or own, transitions=1000, state_dim=31, action_dim=8, device_name="CPU", versions={}
    )
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(args) | about))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, erdp.RunFolder.COLUMNS)
        writer.writeheader()
        for i, score in enumerate(scores, 1):
            row = dict.fromkeys(erdp.RunFolder.COLUMNS, 0.0) | dict(step=i * args.eval_every, success="")
            writer.writerow(row | dict(score_mean=score, return_mean=score))
    result = dict(final=scores[-1], best=max(scores), best_step=0, steps=args.num_steps)
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def section(text, title):
    """The lines of a section's table, as lists of cells."""
    body = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line[:1] == "|"][2:]


def line_of(text, title, row):
    (line,) = [line for line in section(text, title) if line[0] == row]
    return line


def written(report, runs, out):
    assert report.main([str(runs), "--out", str(out)]) == 0
    return (out / "tables.md").read_text()


def test_report_the_papers_averages_are_the_means_of_the_transcribed_rows(report):
    tables = [(figures, average) for _, figures, average in report.TABLES_1_AND_2.values() if average]
    tables += [([mean for mean, _ in figures], average) for figures, average in report.TABLE_5.values()]
    assert sorted(average for _, average in tables) == [56.1, 66.8, 74.0, 80.0, 85.2, 86.7, 89.9]
    for figures, average in tables:
        assert abs(np.mean(figures) - average) <= 0.05 + 1e-9, f"{figures} do not average to {average}"
    assert [mean for mean, _ in report.TABLE_5[64][0]] == list(report.TABLES_1_AND_2["antmaze"][1][2:])
    assert all(env.startswith("antmaze") and erdp.preset(env).num_critics == 64 for env in report.FOUR)


def test_report_the_rows_stand_beside_their_own_figures(report, tmp_path):
    text = written(report, tmp_path, tmp_path / "out")
    # one of each part, looked up in the paper by name
    assert line_of(text, "Table 1, Gym", "halfcheetah-medium-replay-v2")[1] == "57.0"
    assert line_of(text, "Table 1, Gym", "hopper-medium-expert-v2")[1] == "111.9"
    assert line_of(text, "Table 1, Gym", "walker2d-medium-v2")[1] == "92.5"
    assert line_of(text, "Table 1, Adroit", "pen-cloned-v1")[1] == "66.3"
    assert line_of(text, "Table 1, Kitchen", "kitchen-complete-v0")[1] == "82.3"
    assert line_of(text, "Table 2, AntMaze", "antmaze-umaze-diverse-v0")[1] == "79.8"
    assert line_of(text, "Tables 3 and 5, M = 4", "antmaze-large-play-v0")[1] == "52.4 ± 13.0"
    assert line_of(text, "Figure 4", "antmaze-large-play-v0, Diffusion-QL")[1] == "46.4"
    rows = [
        line[0]
        for title in ("Table 1, Gym", "Table 1, Adroit", "Table 1, Kitchen", "Table 2, AntMaze")
        for line in section(text, title)
    ]
    assert sorted(row for row in rows if row != "average") == sorted(erdp.ROWS)


def test_report_without_runs_says_not_run_everywhere(report, tmp_path):
    text = written(report, tmp_path, tmp_path / "out")
    lines = [line for part in report.sections() for line in section(text, part.title) if line[0] != "average"]
    assert len(lines) == 20 + 16 + 8 + 8 and all(line[2:5] == ["not run", "not run", "0"] for line in lines)
    assert "cannot be said yet" in (tmp_path / "out" / "figure1.md").read_text()
    assert not list((tmp_path / "out").glob("*.png"))


def test_report_other_data_never_stands_beside_the_papers_figures(report, tmp_path):
    record(tmp_path / "runs" / "a", scores=[77.25], dataset="other/antmaze/umaze-v0")
    text = written(report, tmp_path / "runs", tmp_path / "out")
    assert line_of(text, "Table 2, AntMaze", "antmaze-umaze-v0")[2:5] == ["not run", "not run", "0"]
    (line,) = section(text, "Runs on other data")
    assert line[:3] == ["antmaze-umaze-v0", "other/antmaze/umaze-v0", "1,000"] and "77.2" in line
    assert text.count("77.2") == 2 and (tmp_path / "out" / "curves.png").exists()  # final and best of that line
    assert section(text, "Runs on the paper's data with other settings") == []


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_steps=20_000),
        dict(entropy_coef=0.0),
        dict(eval_episodes=10),
        dict(eval_candidates=1),
        dict(lr=1e-3),
        dict(eval_every=1000),
        dict(variant="released"),
    ],
)
def test_report_other_settings_never_stand_beside_the_papers_figures(report, tmp_path, settings):
    record(tmp_path / "runs" / "a", scores=[77.25], **settings)
    text = written(report, tmp_path / "runs", tmp_path / "out")
    assert line_of(text, "Table 2, AntMaze", "antmaze-umaze-v0")[2] == "not run"
    assert len(section(text, "Runs on the paper's data with other settings")) == 1 and text.count("77.2") == 2


def test_report_averages_over_seeds_as_numpy_does_and_counts_a_copy_once(report, tmp_path, capsys):
    finals, bests = [20.0, 35.0, 90.0], [40.0, 35.0, 95.0]
    for seed in range(3):
        record(
            tmp_path / "runs" / f"a{seed}", scores=[bests[seed], finals[seed]], seed=seed, device="cuda:1", compile=True
        )
    record(tmp_path / "runs" / "copy", scores=[0.0, 0.0], seed=2)
    record(tmp_path / "runs" / "unfinished", scores=[1.0], seed=3, finished=False)
    text = written(report, tmp_path / "runs", tmp_path / "out")
    expected = [f"{np.mean(x):.1f} ± {np.std(x):.1f}" for x in (finals, bests)]
    assert line_of(text, "Table 2, AntMaze", "antmaze-umaze-v0")[1:] == [
        "100.0",
        *expected,
        "3",
        "D4RL/antmaze/umaze-v1",
    ]
    assert [line[0] for line in section(text, "Unfinished runs")] == ["unfinished"]
    assert "copy is left out" in capsys.readouterr().out
    assert report.spread(np.array([12.34])) == "12.3", "one seed has no deviation"


def test_report_gives_an_average_when_all_rows_have_run_and_draws_the_figures(report, tmp_path):
    for i, env in enumerate(report.FOUR):
        record(tmp_path / "runs" / f"m4-{i}", env, [10.0, 10.0 * i], num_critics=4)
    record(tmp_path / "runs" / "ql", report.FOUR[0], **report.CLIPPED_DOUBLE_Q)
    record(
        tmp_path / "runs" / "a0", report.FOUR[0], num_critics=1, max_q_backup=False, entropy_coef=0, eval_candidates=1
    )
    text = written(report, tmp_path / "runs", tmp_path / "out")
    assert line_of(text, "Tables 3 and 5, M = 4", "average")[1:4] == ["74.0", "15.0", "17.5"]
    assert line_of(text, "Tables 3 and 5, M = 1", "average")[1:4] == ["56.1", "", ""]
    assert line_of(text, "Figure 4", f"{report.FOUR[0]}, Diffusion-QL")[4] == "1"
    assert line_of(text, "Figure 3, right", f"{report.FOUR[0]}, alpha = 0")[4] == "1"
    assert section(text, "Runs on the paper's data with other settings") == []
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"figure3.png", "figure4.png", "figure5.png"}


def test_report_reads_what_a_run_is_from_its_config_alone(report, tmp_path):
    record(tmp_path / "runs" / "antmaze-large-play-v0__paper__0", "pen-human-v1", [50.0])
    text = written(report, tmp_path / "runs", tmp_path / "out")
    assert line_of(text, "Table 1, Adroit", "pen-human-v1")[2] == "50.0"
    assert line_of(text, "Table 2, AntMaze", "antmaze-large-play-v0")[2] == "not run"


def test_report_names_the_arms(report):
    assert report.label({}) == "as in the paper"
    assert report.label(dict(num_critics=4)) == "M = 4" and report.label(dict(entropy_coef=0.0)) == "alpha = 0"
    assert report.label(dict(eta=0, entropy_coef=0.0, eval_candidates=1)) == "behaviour cloning"
    assert report.label(dict(pessimism="min", num_critics=2, entropy_coef=0)) == "Diffusion-QL (min of 2)"
    assert report.label(dict(clip_denoised=True, loss="noise", variant="released", max_q_backup=False)) == (
        "released, --clip-denoised, --loss noise, --no-max-q-backup"
    )
    config = dataclasses.asdict(erdp.preset("pen-human-v1")) | dict(eta=0.0, entropy_coef=0.0, eval_candidates=1)
    assert report.arm_of(config | dict(num_critics=1)) == report.arm_of(config), (
        "a cloned policy has no use for critics"
    )
    assert report.arm_of(config | dict(eta=0.1, num_critics=1)) == dict(
        num_critics=1, entropy_coef=0, eval_candidates=1
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", '{"env": "toy"'),
        ("config.json", '{"env": "toy"}'),
        ("config.json", "[]"),
        ("metrics.csv", "step,score_mean\n1,2\n"),
        ("metrics.csv", ""),
        ("metrics.csv", None),
        ("result.json", "null"),
        ("result.json", '{"final": 20.0}'),
        ("result.json", '{"final": 99.0, "best": 99.0}'),
    ],
)
def test_report_names_a_damaged_file_in_one_sentence(report, tmp_path, capsys, name, content):
    path = record(tmp_path / "runs" / "a") / name
    path.write_text(path.read_text().replace("20.0", "twenty") if content is None else content)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and said.startswith("report: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "argv, what",
    [
        (["no-such-folder"], "no-such-folder"),
        (["--diagnose", "no-such-run"], "no-such-run"),
        (["--color"], "--color"),
    ],
)
def test_report_bad_input_is_one_sentence_and_status_2(report, capsys, argv, what):
    assert report.main(argv) == 2
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1


def test_report_can_be_made_again_from_what_was_collected(report, tmp_path):
    for seed in range(2):
        record(tmp_path / "runs" / f"a{seed}", seed=seed, scores=[1.0, 2.0 + seed])
    record(tmp_path / "runs" / "unfinished", seed=9, finished=False)
    assert report.main([str(tmp_path / "runs"), "--collect", str(tmp_path / "kept")]) == 0
    assert report.main([str(tmp_path / "runs"), "--collect", str(tmp_path / "kept")]) == 0, (
        "a second time is no conflict"
    )
    files = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.*"))
    assert files == [f"a{seed}/{name}" for seed in range(2) for name in ("config.json", "metrics.csv", "result.json")]
    lines = [
        line_of(written(report, tmp_path / name, tmp_path / "out" / name), "Table 2, AntMaze", "antmaze-umaze-v0")
        for name in ("runs", "kept")
    ]
    assert lines[0] == lines[1] and lines[0][4] == "2"
    record(tmp_path / "others" / "a0", scores=[5.0])
    assert report.main([str(tmp_path / "others"), "--collect", str(tmp_path / "kept")]) == 2


def test_report_judges_figure_1_each_way(report, tmp_path):
    others = [50.0, 55.0, 60.0]
    cases = {
        "good": {"both": [90.0, 91.0, 92.0]},
        "bad": {"both": [90.0, 91.0, 92.0], "plain Q": [99.0, 99.1, 99.2]},
        "unsure": {"both": [56.0, 50.0, 66.0]},
    }
    said = {}
    for case, finals in cases.items():
        for name, arm in report.TOY.items():
            for seed, final in enumerate(finals.get(name, others)):
                record(tmp_path / case / f"{name}{seed}", "toy", [1.0, final], seed=seed, **arm)
        record(tmp_path / case / "more", "toy", [1.0, 0.0], seed=3)  # a seed that the others lack does not count
        written(report, tmp_path / case, tmp_path / "out")
        said[case] = (tmp_path / "out" / "figure1.md").read_text()
    verdicts = dict(good="the claim holds", bad="the claim does not hold", unsure="these seeds cannot tell")
    for case, words in verdicts.items():
        assert said[case].count(f"**{words}**") == 2 and said[case].count("**") == 4
    assert "is 91.0, the best of the others 55.0" in said["good"]
    assert "+36.0 with a standard error of 2.3" in said["good"]
    assert "a ratio of 0.20, where chance alone makes ratios from 0.24 to 4.11" in said["good"]
    assert "is 91.0, the best of the others 99.1" in said["bad"]
    assert "+2.3 with a standard error of 3.7" in said["unsure"]
    assert (tmp_path / "out" / "figure1.png").exists() and "| both | 4,000 |" in said["bad"]


def test_report_returns_to_go_are_those_of_each_episode(report):
    rng = np.random.default_rng(0)
    parts, expected = [], []
    for length, terminal in ((3, 1), (1, 0), (4, 0), (2, 1)):
        states, reward = rng.normal(size=(length + 1, 2)), rng.normal(size=length)
        ends = np.append(np.zeros(length - 1), terminal)
        parts.append((states[:-1], np.zeros((length, 1)), reward, states[1:], ends))
        expected += [sum(0.99 ** (j - i) * reward[j] for j in range(i, length)) for i in range(length)]
    data = erdp.Batch(*map(np.concatenate, zip(*parts)))
    ends = report.episode_ends(data)
    assert ends.tolist() == [2, 3, 7, 9]
    np.testing.assert_allclose(report.returns_to_go(data.reward, ends), expected, rtol=1e-12)


def test_report_the_score_of_the_data_is_the_mean_return_of_its_episodes(report):
    data = erdp.toy_data(3)
    expected = 100 * data.reward.reshape(-1, 2).sum(1).mean() / erdp.ToyEnv.best_return()
    score, episodes, n = report.data_score(erdp.Args(env="toy", seed=3))
    assert (episodes, n) == (256, 512) and score == pytest.approx(expected)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_report_the_terms_of_eq15_add_up(report, variant):
    torch.manual_seed(0)
    args = dataclasses.replace(erdp.preset("toy"), variant=variant, device="cpu", compile=False)
    agent = erdp.Agent(2, 1, args)
    data = erdp.load_data(erdp.open_task(args), args)
    terms = report.loss_terms(agent, data, batches=3)
    parts = [terms[name][0] for name in ("diffusion loss", "-lambda Q", "entropy term")]
    assert sum(parts) == pytest.approx(terms["all of Eq. 15"][0], abs=1e-5) and min(map(abs, parts)) > 0
    none = report.loss_terms(erdp.Agent(2, 1, dataclasses.replace(args, entropy_coef=0.0)), data, batches=1)
    assert none["entropy term"] == [0, 0], "without alpha there is no such term"


def test_report_diagnoses_a_run(report, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--num-steps", "20", "--eval-every", "20", "--eval-episodes", "2", "--device", "cpu", "--no-compile"]
    assert erdp.main([*argv, "--run-dir", str(run)]) == 0
    assert report.main(["--diagnose", str(run)]) == 0
    text = (run / "diagnosis.md").read_text()
    assert (run / "diagnosis.png").exists() and "256 episodes" in text and text in capsys.readouterr().out
    (run / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert report.main(["--diagnose", str(run)]) == 2 and "not a whole checkpoint.pt" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# run_all.sh: what it lists, and how it runs it, with a shell script in Python's place
# ---------------------------------------------------------------------------------------------------------------------
RUN_ALL = Path(__file__).parents[1] / "run_all.sh"
ARMS = dict(paper={}, bc=dict(eta=0, entropy_coef=0, eval_candidates=1, num_critics=1))
ARMS |= dict(q=dict(num_critics=1, entropy_coef=0), entropy=dict(num_critics=1), ensemble=dict(entropy_coef=0))
ARMS |= dict(released=dict(variant="released")) | {f"M{M}": dict(num_critics=M) for M in (1, 4, 16)}
ARMS |= {"M1-nobackup": dict(num_critics=1, max_q_backup=False, eval_candidates=1)}
ARMS |= {"M1-nobackup-alpha0": ARMS["M1-nobackup"] | dict(entropy_coef=0)}
ARMS |= {"diffusion-ql": dict(pessimism="min", num_critics=2, entropy_coef=0)}

FAKE = """#!/bin/bash
words=$* resume=${*: -1}
echo "$words" >>"$CALLS"
[[ $1 == erdp.py ]] || exit 0
folder=${words#*--run-dir } folder=${folder% --resume} name=${folder##*/}
if [[ $resume == --resume ]]; then [[ -e $folder/checkpoint.pt ]] || exit 2; else mkdir "$folder" || exit 2; fi
if [[ $name =~ ${BROKEN:-^$} ]]; then echo "erdp: it is broken" >&2; exit 3; fi
if [[ $name =~ ${SLOW:-^$} && $resume != --resume ]]; then
    stop() {
        sleep "${SAVING:-0.3}"
        touch "$folder/checkpoint.pt"
        [[ $name == *bc* ]] && exit 130 # as erdp.py; or as a program that leaves SIGINT alone
        trap - INT
        kill -INT $$
    }
    trap stop INT
    echo $$ >"$folder/.pid" && mv "$folder/.pid" "$folder/config.json"
    while :; do sleep 0.02; done
fi
echo "{}" >"$folder/result.json"
echo "final score 1.5, best 2.5 at update 3; see $folder"
"""


def listed(*words, **environment) -> list[str]:
    """The lines of `list`, with no program in reach but bash itself."""
    if not RUN_ALL.exists():
        pytest.skip("run_all.sh is not beside this file")
    bash = next(path for path in ("/bin/bash", "/usr/bin/bash") if os.path.exists(path))
    environment = {"PATH": "/nonexistent"} | environment
    done = subprocess.run([bash, RUN_ALL, "list", *words], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@functools.cache
def listed_runs(*words, **environment) -> dict[tuple[str, str, int], erdp.Args]:
    """Environment, arm and seed, as the run's folder says them -> settings, of the lines that run erdp.py."""
    commands = [shlex.split(line) for line in listed(*words, **environment)]
    found = [erdp.parse(words[words.index("erdp.py") + 1 :]) for words in commands if "erdp.py" in words]
    runs = {tuple(Path(args.run_dir).name.split("__")): args for args in found}
    assert len(runs) == len(found), "every run has a folder of its own"
    return {(env, arm, int(seed)): args for (env, arm, seed), args in runs.items()}


@pytest.fixture
def project(tmp_path):
    """Starts a copy of run_all.sh, far from the project, with FAKE for Python; `calls` are the commands it got."""
    listed()  # skips where there is no run_all.sh
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    (tmp_path / "run_all.sh").write_text(RUN_ALL.read_text())
    inherited = {key: value for key, value in os.environ.items() if key not in ("ERDP_DATA", "OMP_NUM_THREADS")}
    known = dict(PYTHON=str(tmp_path / "fake"), RUNS="runs", CALLS=str(tmp_path / "calls"))

    class Project:
        runs = tmp_path / "runs" / "quick"

        @staticmethod
        def start(*words, **environment):
            environment, command = inherited | known | environment, ["bash", tmp_path / "run_all.sh", *words]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            return subprocess.Popen(command, env=environment, cwd="/", start_new_session=True, **pipes)

        @classmethod
        def run(cls, *words, **environment) -> tuple[int, str, str]:
            child = cls.start(*words, **environment)
            out, err = child.communicate(timeout=60)
            return child.returncode, out, err

        @staticmethod
        def calls() -> list[str]:
            path = tmp_path / "calls"
            lines = path.read_text().splitlines() if path.exists() else []
            path.unlink(missing_ok=True)
            return lines

    return Project


def started(project, count, *words, **environment) -> subprocess.Popen:
    """run_all.sh once `count` runs, which do not end by themselves, are under way."""
    child, deadline = project.start(*words, SLOW=".", **environment), time.monotonic() + 60
    while len(list(project.runs.glob("*/config.json"))) < count:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.02)
    return child


def number_of(name: str) -> str:
    """The number of a quick line."""
    return str(1 + next(i for i, line in enumerate(listed("quick")) if line.endswith(f"/{name}")))


def test_run_all_lists_every_run_of_the_paper():
    lines = listed()
    assert lines == listed("full") and len(set(lines)) == len(lines)
    tables = {(env, "paper", seed) for env in erdp.ROWS for seed in range(5)}
    toy = {("toy", arm, s) for arm in ("paper", "bc", "q", "entropy", "ensemble", "released") for s in range(5)}
    mazes = [f"antmaze-{size}-{kind}-v0" for size in ("medium", "large") for kind in ("play", "diverse")]
    arms = "M1", "M4", "M16", "M1-nobackup", "M1-nobackup-alpha0", "diffusion-ql"
    ablations = {(env, arm, seed) for env in mazes for arm in arms for seed in range(5)}
    assert listed_runs().keys() == tables | toy | ablations
    assert [line for line in lines if " erdp.py " not in line] == [
        f"python results/{study}.py" for study in ("figure2", "entropy", "likelihood")
    ]


def test_run_all_changes_only_what_the_arm_of_a_run_says():
    for (env, arm, seed), args in listed_runs().items():
        changed = dict(seed=seed, run_dir=f"runs/{env}__{arm}__{seed}") | ARMS[arm]
        assert args == dataclasses.replace(erdp.preset(env), **changed), f"{env}, {arm}"


def test_run_all_quick_is_the_toy_in_full_and_small_runs_on_recorded_data():
    full, small = listed_runs(), listed_runs("quick", ERDP_DATA="/some where")
    lines, without = listed("quick", ERDP_DATA="/some where"), listed("quick")
    assert lines[: len(without)] == without == [line.replace(" runs/", " runs/quick/") for line in listed()[:33]]
    envs = "hopper-medium-expert-v2", "antmaze-umaze-v0", "pen-human-v1"
    assert {key for key in small if key[0] != "toy"} == {(env, arm, 0) for env in envs for arm in ("bc", "paper")}
    for (env, arm, _), args in small.items():
        if env != "toy":
            expected = {"num_critics": 4} | ARMS[arm]
            assert args.dataset and args.num_steps < 10_000 and vars(args).items() >= expected.items(), f"{env}, {arm}"
    assert not {args.run_dir for args in small.values()} & {args.run_dir for args in full.values()}
    minari = [line for line in lines if "--dataset standin/" in line]
    assert len(minari) == 4 and all("MINARI_DATASETS_PATH=/some where/minari" in shlex.split(line) for line in minari)


def test_run_all_runs_what_it_lists_and_then_the_report(project, tmp_path):
    status, out, err = project.run("--jobs", "3", "quick")
    assert (status, err.count("\n")) == (0, 1) and "ERDP_DATA is not set" in err
    *calls, last = project.calls()
    calls.sort(key=lambda call: "toy__q__3" not in call)
    assert sorted(calls) == sorted(line.removeprefix("python ") for line in listed("quick"))
    assert last == "results/report.py runs/quick"
    assert out.count("finished: score 1.5, best 2.5 at update 3\n") == 30
    log = (project.runs / "toy__q__3.log").read_text()
    command, said = log.splitlines()
    assert command.startswith("$ ") and command.endswith(" erdp.py " + calls[0].removeprefix("erdp.py "))
    assert said == "final score 1.5, best 2.5 at update 3; see runs/quick/toy__q__3"


def test_run_all_reports_on_the_projects_own_records_before_any_run(project):
    (project.runs.parents[1] / "results" / "runs").mkdir(parents=True)
    assert project.run("report")[0] == 0 and project.calls() == ["results/report.py results/runs"]
    project.runs.mkdir(parents=True)
    assert project.run("report")[0] == 0 and project.calls() == ["results/report.py runs results/runs"]


def test_run_all_leaves_finished_runs_and_studies_alone(project):
    assert project.run("quick")[0] == 0 and len(project.calls()) == 34
    status, out, _ = project.run("quick")
    assert status == 0 and out.count("is finished already\n") == 33
    assert project.calls() == ["results/report.py runs/quick"]
    assert project.run("task", "1", "quick")[0] == 0 and project.run("task", "31", "quick")[0] == 0
    assert project.calls() == []
    assert project.run("report", "quick")[0] == 0 and project.calls() == ["results/report.py runs/quick"]


def test_run_all_resumes_a_run_that_has_a_checkpoint(project):
    folder = project.runs / "toy__q__0"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    status, out, _ = project.run("task", number_of("toy__q__0"), "quick")
    assert status == 0 and "toy__q__0 resumed\n" in out and "toy__q__0 finished: score 1.5" in out
    (call,) = project.calls()
    assert call.endswith("--run-dir runs/quick/toy__q__0 --resume")


def test_run_all_starts_anew_where_there_is_no_checkpoint_and_deletes_nothing_else(project):
    folder = project.runs / "toy__q__0"
    folder.mkdir(parents=True)
    for name in ("config.json", "events.out.tfevents.17.host.3.0", ".part-checkpoint.pt"):
        (folder / name).touch()
    assert project.run("task", number_of("toy__q__0"), "quick")[0] == 0
    assert {path.name for path in folder.iterdir()} == {"result.json"}
    (folder / "result.json").rename(folder / "notes.txt")
    project.calls()
    status, _, err = project.run("task", number_of("toy__q__0"), "quick")
    assert status == 1 and "toy__q__0" in err and (folder / "notes.txt").exists() and project.calls() == []


def test_run_all_goes_on_after_a_failure_and_names_it_at_the_end(project):
    status, out, _ = project.run("quick", BROKEN="q__[03]")
    assert status == 1 and len(project.calls()) == 34, "all others and the report have run"
    assert out.count("failed with status 3: see runs/quick/toy__q__0.log\n") == 1
    last = [line.split(" ", 2)[2] for line in out.splitlines()[-2:]]
    assert last == [f"toy__q__{seed} is not finished: see runs/quick/toy__q__{seed}.log" for seed in (0, 3)]
    assert (project.runs / "toy__q__0.log").read_text().splitlines()[1:] == ["erdp: it is broken"]
    assert project.run("task", number_of("toy__q__1"), "quick", BROKEN="q__1")[0] == 0, "it is finished"
    assert project.run("task", number_of("toy__q__0"), "quick", BROKEN="q__0")[0] == 3, "the status is the run's"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("words", ["--jobs 2 quick", "task 1 quick", "--jobs 2 task 1 quick"])
def test_run_all_stops_its_runs_with_a_checkpoint_and_goes_on_later(project, by, words):
    count = 1 if "task" in words else 2
    child = started(project, count, *words.split())
    os.killpg(child.pid, by)  # as Ctrl-C to the terminal's process group
    if by != signal.SIGINT:  # as schedulers do
        for path in project.runs.glob("*/config.json"):
            os.kill(int(path.read_text()), by)
    assert child.wait(timeout=30) == 130
    assert len(list(project.runs.glob("*/checkpoint.pt"))) == count, "it ends after its runs"
    assert child.communicate()[0].count(" stopped\n") == count
    assert len(project.calls()) == count, "nothing else was started"
    assert project.run(*words.split())[0] == 0
    assert sum(call.endswith(" --resume") for call in project.calls()) == count


def test_run_all_ends_at_once_at_a_second_ctrl_c(project):
    child = started(project, 2, "--jobs", "2", "quick", SAVING="60")
    for _ in range(100):  # two that come too close together count as one
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)
            time.sleep(0.1)
    assert child.wait(timeout=30) == 130 and " stopped" not in child.communicate()[0]
    assert not list(project.runs.glob("*/checkpoint.pt"))


def test_run_all_keeps_two_processes_from_one_run(project):
    child = started(project, 1, "task", "1", "quick")
    status, out, _ = project.run("task", "1", "quick")
    assert status == 1 and "is being run by another process" in out
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=30)
    assert child.returncode == 130 and len(project.calls()) == 1


@pytest.mark.parametrize(
    "words",
    ["task", "task 0", "task 34 quick", "task x", "task 1 quick 2", "--jobs", "--jobs 0", "--jobs x full", "half"],
)
def test_run_all_says_in_one_sentence_what_is_wrong_with_its_words(project, words):
    status, out, err = project.run(*words.split())
    lines = [line for line in err.splitlines() if "ERDP_DATA" not in line]
    assert (status, out, len(lines)) == (2, "", 1) and lines[0].startswith("run_all.sh: ")
    assert project.calls() == []
    status, _, err = project.run(PYTHON="no-such-python")
    assert status == 2 and "no-such-python" in err
