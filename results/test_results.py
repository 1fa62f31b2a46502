"""Tests of the scripts around erdp.py: the mathematics of the studies in results/, the report, and run_all.sh."""

import importlib
import json
import math
import re
import sys
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
    step, operations, _ = benchmark.products(Args(num_critics=2), 31, 8)
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
    exact_noise = script("known_noise").exact_noise
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
        actual = script("known_noise").deviation_of_x0_hat(sde64(), 0.3, t)
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
        return erdp.LOSSES[loss](sde, x_0, x_t.expand(2, 2), times, eps, prediction.expand(2, 2))

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


def test_results_mutants_change_every_function_that_they_name_and_run_tests_that_there_are():
    mutants, root = script("mutants"), Path(erdp.__file__).parent
    found = list(mutants.mutants((root / "erdp.py").read_text()))
    named = {(part, name) for part, functions in mutants.PARTS.items() for name in functions}
    assert {(mutant.part, mutant.function) for mutant in found} == named
    assert {*mutants.EQUIVALENT} <= {(mutant.function, mutant.line, mutant.before, mutant.after) for mutant in found}
    assert all(mutant.source != (root / "erdp.py").read_text() for mutant in found)
    tests = re.findall(r"def (test_\w+)", (root / "test_erdp.py").read_text())
    for selection in {mutant.tests for mutant in found}:
        for word in selection.split(" or "):
            assert any(word in test for test in tests), f"no test has {word} in its name"


def test_results_peers_learn_what_there_is_to_learn_and_td3bc_more_than_regression(tmp_path, capsys):
    peers = script("peers")
    small = "--env toy --dataset toy-20 --steps 600 --episodes 4".split()
    for peer in ("regression", "td3bc"):
        peers.main([peer, *small, "--out", str(tmp_path)])
    regression, td3bc = (json.loads(line)["score"] for line in (tmp_path / "peers.jsonl").read_text().splitlines())
    assert regression < 30 < td3bc, "the mean action is that of most steps, to the left; Q knows better"
    assert (tmp_path / "peers.md").read_text().count("| toy-20 |") == 2
    with pytest.raises(SystemExit) as stop:
        peers.main(["td3bc", "--env", "nowhere", "--out", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_results_pointmaze_is_recorded_by_one_who_does_not_know_the_goal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    pointmaze = script("pointmaze")
    pointmaze.main(["--episodes", "20"])
    args = erdp.parse(["--dataset", pointmaze.DATASET, "--device", "cpu"])
    task = erdp.open_task(args)
    data = erdp.load_data(task, args)
    assert (data.state.shape, data.action.shape) == ((6000, 8), (6000, 2)) and not data.terminal.any()
    near = (data.next_state[:, :2] - data.next_state[:, 2:4]).norm(dim=1) <= 0.45  # of what is reached and desired
    assert torch.equal(near.float(), data.reward) and 0 < near.float().mean() < 0.3
    assert 0 < task.score(task.returns.mean()) < 30 and task.ref_max > 200, "who knows the goal is mostly there"
    with pytest.raises(SystemExit) as stop:
        pointmaze.main([])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
