"""Tests of gpu_check.py without a GPU: what its comparisons see; that a part's failure is its own."""

import dataclasses
import sys
import time
from pathlib import Path

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


def seen(eager, actual) -> list[str]:
    """The networks in which `actual` is too far from the eager run."""
    found = gpu_check.distances(*eager, actual)
    return [name for name, share in found.items() if not share <= gpu_check.TOLERANCE]


def test_agreement_passes_for_the_same_updates(eager):
    assert set(gpu_check.distances(*eager, gpu_check.follow(ARGS)[1]).values()) == {0.0}


@pytest.mark.parametrize("name", ["critics_target", "policy_ema"])
def test_agreement_fails_for_a_target_that_never_moves(name, eager):
    start, end = eager
    assert gpu_check.distances(start, end, end | {name: start[name]})[name] == 1
    assert seen(eager, end | {name: start[name]}) == [name]


def test_agreement_fails_for_an_ema_that_moves_at_other_updates(eager):
    assert seen(eager, gpu_check.follow(dataclasses.replace(ARGS, ema_start=6))[1]) == ["policy_ema"]


def test_agreement_fails_for_nan(eager):
    start, end = eager
    values = [x.clone() for x in end["critics"]]
    values[0].view(-1)[0] = torch.nan
    assert seen(eager, end | dict(critics=values)) == ["critics"]


def test_differing_names_the_parts_of_checkpoints_that_are_not_equal(monkeypatch):
    agent = erdp.Agent(3, 2, ARGS, "cpu").state_dict()
    one = dict(agent=agent, generator=torch.Generator().get_state(), totals=torch.zeros(5))
    weights = {key: x.nextafter(torch.tensor(9.0)) for key, x in agent["critics"].items()}
    others = {
        "critics": one | dict(agent=agent | dict(critics=weights)),
        "updates": one | dict(agent=agent | dict(updates=agent["updates"] + 1)),
        "draws": one | dict(generator=torch.Generator().manual_seed(1).get_state()),
        "totals": one | dict(totals=torch.ones(5)),
    }
    monkeypatch.setattr(erdp, "load_file", lambda path: others.get(path.parent.name, one))
    assert gpu_check.differing(Path("one"), Path("the same")) == []
    for part in others:
        assert gpu_check.differing(Path("one"), Path(part)) == [part]


def test_a_part_that_fails_keeps_no_other_from_the_page(capsys):
    pages, names = [], ["tests", "agreement", "workers", "speed", "acting"]

    def run(name):
        verdict = {"agreement": "FAILED", "acting": "not reached"}.get(name, "passed")
        return verdict, f"the figure of {name}"

    results = gpu_check.check_all(names, run, lambda found: pages.append(gpu_check.page(names, found, "# Head")))
    assert {*results} == {*names} and len(pages) == len(names)
    wanted = ["tests: passed", "agreement: FAILED", "workers: passed", "speed: passed", "acting: not reached"]
    assert [line[3:] for line in pages[-1].splitlines() if line.startswith("## ")] == wanted
    assert pages[0].count(": not reached") == len(names) - 1
    assert all(f"the figure of {name}" in pages[-1] for name in names)
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in names)


def script(tmp_path, monkeypatch, code: str, seconds: float = 60):
    """`run_part` of a script in place of gpu_check.py."""
    path = tmp_path / "part.py"
    path.write_text(code)
    monkeypatch.setattr(gpu_check, "__file__", str(path))
    return gpu_check.run_part("any", [], seconds)


@pytest.mark.parametrize("status, verdict", [(0, "passed"), (1, "FAILED"), (-9, "FAILED")])
def test_a_parts_verdict_is_its_processes_end(status, verdict, tmp_path, monkeypatch):
    end = f"sys.exit({status})" if status >= 0 else "sys.stdout.flush(); os.kill(os.getpid(), 9)"
    code = f"import os, sys\nprint('figure')\nprint('why', file=sys.stderr)\n{end}"
    assert script(tmp_path, monkeypatch, code) == (verdict, "figure" + "\n\n```\nwhy\n```" * (verdict == "FAILED"))


def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_its_figures_are_kept(tmp_path, monkeypatch):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    verdict, text = script(tmp_path, monkeypatch, code, 5)
    assert verdict == "FAILED, as it was not done within 5 seconds"
    status = Path("/proc") / text / "status"
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
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("gpu_check: nothing can be checked, as an import fails here: import of erdp halted")


@pytest.mark.slow
def test_workers_part_counts_the_processes_that_play_a_run(capsys):
    assert gpu_check.workers(CHECK), capsys.readouterr().out
    assert "worker processes, 8 episodes an evaluation" in capsys.readouterr().out
