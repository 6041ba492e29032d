"""Two processes train as one: the same steps, the same decisions, one writer; a run moves between one and two."""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import team_work
import torch
from safetensors.torch import load_file

from checkpoints import load_checkpoint
from distributed import Team

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NAME = "ecas_cnn"


@pytest.fixture(scope="module")
def ends(mini_features, repo, tmp_path_factory) -> tuple[Path, Path]:
    """Folders with what one process and what two processes end with."""
    data, one, two = mini_features[0], tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    subprocess.run([*TORCHRUN, str(repo / "tests" / "team_work.py"), str(data), str(two)], check=True, timeout=300)
    team_work.main(data, one)
    return one, two


@pytest.mark.parametrize("network", ["linear", NAME])
def test_ranks_end_with_the_same_weights_and_classes(ends, network):
    first, second = (load_file(ends[1] / f"{network}.{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():  # rank 0 has rounded the averages for their release
        other = second[name]
        assert torch.equal(value, other.half().float() if name.startswith("means.") else other), name
    states = [json.loads((ends[1] / f"{network}.{rank}.json").read_text()) for rank in (0, 1)]
    assert states[0] == states[1]


def test_steps_of_two_are_those_of_one(ends):
    """Without normalisation and random changes nothing but the order of sums differs, shares of unequal size or not."""
    one, two = (load_file(folder / "linear.0.safetensors") for folder in ends)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    states = [json.loads((folder / "linear.0.json").read_text()) for folder in ends]
    for key in ("best_accuracies", "windows", "steps", "epoch"):
        assert states[0][key] == states[1][key], key
    assert [c["graduated"] for c in states[0]["classes"]] == [c["graduated"] for c in states[1]["classes"]]
    assert states[0]["held_out"] == pytest.approx(states[1]["held_out"], rel=1e-3)


def test_shares_are_even_and_whole():
    batch = np.arange(9)
    shares = [Team(torch.device("cpu"), rank, 4).share(batch) for rank in range(4)]
    assert sorted(np.concatenate(shares)) == batch.tolist()
    assert {len(share) for share in shares} == {2, 3}


def test_a_run_moves_from_two_processes_to_one_and_back(mini_features, repo, tmp_path):
    """Stopped within an epoch each time, and the last time let run to its end."""
    options = ("--epochs", 5, "--check-every", 2, "--width", 0.05, "--window", 48, "--share", 0.4, "--threads", 1)
    paths = ("--data", mini_features[0], "--models", tmp_path, "--device", "cpu", "--graduate-at", 0.1)
    script = [str(repo / f"train_{NAME}.py"), *map(str, (*options, *paths))]
    folder = tmp_path / NAME
    latest, log = folder / "latest.safetensors", folder / "log.jsonl"
    told = None
    for epochs, launcher in ((1, TORCHRUN), (3, [sys.executable])):
        words = [*launcher, *script, *(["--resume"] if told else [])]
        run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not (latest.exists() and log.read_text().count("\n") >= epochs):
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        output, errors = run.communicate(timeout=300)
        lines = [line for line in errors.splitlines() if "go on with: " in line]
        assert len(lines) == 1, errors
        assert output.count("training songs") == 1
        told = shlex.split(lines[0].partition("go on with: ")[2])
        assert told[-len(script) - 1 :] == [*script, "--resume"]
        assert (told[0] == "torchrun") == (launcher is TORCHRUN)
        assert load_checkpoint(latest, "")[1]["progress"]["losses"], "it didn't stop within an epoch"
    run = subprocess.run([*TORCHRUN, *script, "--resume"], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.count("validation accuracy") == 1
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(5))
    assert records[-1]["val_loss"] < math.log(10) - 0.05, "it learned nothing"
    assert sorted(path.name for path in folder.iterdir()) == ["latest.safetensors", "log.jsonl", "model.safetensors"]


def test_a_mistake_ends_both_processes(mini_features, repo, tmp_path):
    args = ["--data", str(mini_features[0]), "--models", str(tmp_path), "--batch-size", "3", "--device", "cpu"]
    run = subprocess.run(
        [*TORCHRUN, str(repo / f"train_{NAME}.py"), *args], capture_output=True, text=True, timeout=300
    )
    assert run.returncode
    lines = [line for line in run.stderr.splitlines() if line.startswith(f"train_{NAME}.py: ")]
    assert len(lines) == 1, run.stderr
    assert "--batch-size 3 is too small for 2 processes" in lines[0]
    assert not list(tmp_path.iterdir())
