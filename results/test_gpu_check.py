"""Tests of gpu_check.py without a GPU: what its comparison of all state sees; that a part's failure is its own."""

import dataclasses
import sys
import time

import gpu_check
import pytest
import torch

import erdp

CHECK = gpu_check.Check(rehearse=True)
ARGS = CHECK.settings(ema_start=3, hidden=16, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def process_settings():
    """`use_device`'s settings of the process are put back."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def eager(process_settings):
    return gpu_check.follow(ARGS)


def seen(eager, actual) -> dict:
    """The parts in which `actual` is too far from the eager run."""
    found = gpu_check.distances(*eager, actual)
    bad = {part: share for part, share in found.items() if not share <= gpu_check.TOLERANCE}
    assert gpu_check.agree(found) == (not bad)
    return bad


def test_agreement_covers_all_that_an_update_changes_and_all_of_it_moves(eager):
    start, end = eager
    assert [*end] == [*erdp.Agent.PARTS, "updates", "totals"]
    for part, tensors in end.items():
        before = start[part] or [torch.zeros_like(x) for x in tensors]
        assert all((x != x_0).any() for x, x_0 in zip(tensors, before)), f"{part} has moved"
    assert {len(end[part]) for part in erdp.Agent.PARTS[:4]} == {8, 12}, "weights and biases of every layer"
    assert len(end["critic_optimizer"]) == 3 * 8, "step and both moments of each"


def test_agreement_passes_for_the_same_updates(eager):
    _, again = gpu_check.follow(ARGS)
    assert set(gpu_check.distances(*eager, again).values()) == {0.0}


@pytest.mark.parametrize("part", ["critics_target", "policy_ema"])
def test_agreement_fails_for_a_target_that_never_moves(part, eager, monkeypatch):
    kind = erdp.QEnsemble if part == "critics_target" else erdp.NoiseNetwork

    def soft_update(target, source, rate, move=erdp.soft_update):
        if not isinstance(target, kind):
            move(target, source, rate)

    monkeypatch.setattr(erdp, "soft_update", soft_update)
    _, actual = gpu_check.follow(ARGS)
    assert seen(eager, actual)[part] == pytest.approx(1)


def test_agreement_fails_for_an_ema_that_moves_at_other_updates(eager):
    _, actual = gpu_check.follow(dataclasses.replace(ARGS, ema_start=6))
    assert [*seen(eager, actual)] == ["policy_ema"]


@pytest.mark.parametrize("part", ["policy_optimizer", "critic_optimizer"])
@pytest.mark.parametrize("which", range(3))
def test_agreement_fails_for_another_step_or_moment(part, which, eager):
    start, end = eager
    values = [x.clone() for x in end[part]]
    values[which] *= 1.02
    assert [*seen(eager, end | {part: values})] == [part]


def test_agreement_fails_for_one_update_more_or_less_in_the_count(eager):
    _, end = eager
    for off in (-1, 1):
        assert [*seen(eager, end | dict(updates=[end["updates"][0] + off]))] == ["updates"]


def test_agreement_fails_for_nan(eager):
    _, end = eager
    values = [x.clone() for x in end["critics"]]
    values[0].view(-1)[0] = torch.nan
    assert [*seen(eager, end | dict(critics=values))] == ["critics"]


def test_difference_is_empty_for_equal_checkpoints_alone_and_names_what_differs(tmp_path):
    folders = [tmp_path / name for name in ("one", "equal", "drawn", "other")]
    for folder in folders:
        folder.mkdir()
        run, step = gpu_check.learner(ARGS, captured=False)
        run.folder = folder
        step()
        if folder.name == "drawn":
            torch.rand(1, generator=run.generator)
        if folder.name == "other":
            step()
        run.save()
    one, *others = (gpu_check.difference(folders[0], folder) for folder in folders)
    equal, drawn, other = others
    assert one == equal == ""

    def differing(words):
        shares = dict(pair.rsplit(" ", 1) for pair in words.split(", "))
        return {part for part, share in shares.items() if float(share) > 0}

    assert differing(drawn) == {"draws"}
    assert differing(other) == {*erdp.Agent.PARTS, "updates", "totals", "draws"} - {"policy_ema"}, "which moves later"


def test_a_part_that_fails_keeps_no_later_one_from_the_page(capsys):
    pages = []
    names = ["tests", "waiting", "agreement", "speed", "acting", "memory"]

    def run(name):
        if name == "waiting":
            raise RuntimeError("the device is gone")
        return None if name == "acting" else ("FAILED" if name == "speed" else "passed", f"the figure of {name}")

    def write(results):
        pages.append(gpu_check.page(names, results, "# Head"))

    results = gpu_check.check_all(names, run, write)
    assert len(pages) == len(names) and len(results) == len(names) - 1
    assert "**Not reached: acting.**" in pages[-1]
    wanted = ["## tests: passed", "## waiting: FAILED", "## agreement: passed", "## speed: FAILED", "## memory: passed"]
    assert [line for line in pages[-1].splitlines() if line.startswith("## ")] == wanted, "in the order of the parts"
    assert "RuntimeError: the device is gone" in pages[-1] and "the figure of memory" in pages[-1]
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in results)


def script(tmp_path, monkeypatch, code: str, seconds: float = 60):
    """`run_part` of a script in place of gpu_check.py."""
    path = tmp_path / "part.py"
    path.write_text(code)
    monkeypatch.setattr(gpu_check, "__file__", str(path))
    return gpu_check.run_part("any", [], seconds)


@pytest.mark.parametrize("status, verdict", [(0, "passed"), (3, "left out"), (1, "FAILED"), (-9, "FAILED")])
def test_a_parts_verdict_is_its_processes_end(status, verdict, tmp_path, monkeypatch):
    end = f"sys.exit({status})" if status >= 0 else "sys.stdout.flush(); os.kill(os.getpid(), 9)"
    code = f"import os, sys\nprint('figure')\nprint('why', file=sys.stderr)\n{end}"
    assert script(tmp_path, monkeypatch, code) == (verdict, "figure" + "\n\n```\nwhy\n```" * (verdict == "FAILED"))


def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_its_figures_are_kept(tmp_path, monkeypatch):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    verdict, text = script(tmp_path, monkeypatch, code, 5)
    assert verdict == "FAILED, as it was not done within 5 seconds"
    status = gpu_check.Path("/proc") / text / "status"
    end = time.monotonic() + 30
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() < end, "the child goes on"


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == "gpu_check: PyTorch sees no CUDA device here: run it on a machine with one\n"


def test_without_what_the_program_imports_it_says_so_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "erdp", None)
    with pytest.raises(SystemExit) as end:
        exec(compile(open(gpu_check.__file__).read(), gpu_check.__file__, "exec"), {"__file__": gpu_check.__file__})
    assert end.value.code == 2 and capsys.readouterr().err.startswith("gpu_check: erdp.py cannot be imported here")
