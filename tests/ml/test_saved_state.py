"""The saved state of a training: what it says of itself, when it is dropped, and what it adds up."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from harness.core.sharding import Sharding
from harness.model.run import Run, World
from harness.training.loop import StepOver, train
from harness.training.weights import Level, LocalWeights

LEVELS = {"one": Level(("a",), 1e-2), "two": Level(("a", "b"), 1e-2)}


def _weights(size: int = 4) -> LocalWeights:
    source = torch.Generator().manual_seed(0)
    return LocalWeights({name: nn.Parameter(torch.randn(3, size, generator=source)) for name in "ab"}, LEVELS)


class Training:
    """Steps of both levels in turn; it notes which it took, and may be killed."""

    def __init__(self, run: Run, weights: LocalWeights | None = None, killed_at: int | None = None):
        self.run, self.weights, self.killed_at = run, weights or _weights(), killed_at
        self.taken: list[int] = []
        self.notices: list[str] = []
        run.notify = self.notices.append
        run.checkpoint_interval_s = 0.0

    def step(self, index: int) -> dict[str, float]:
        if index == self.killed_at:
            raise KeyboardInterrupt
        self.taken.append(index)
        self.run.ledger.forward_passes += 2
        source = torch.Generator().manual_seed(index)
        level = "one" if index % 2 else "two"
        names = LEVELS[level].names
        self.weights.step(level, {n: torch.randn(self.weights.parameters[n].shape, generator=source) for n in names})
        return {"loss": 1.0}

    def do(self) -> Training:
        train(self.run, StepOver(self.step, self.weights), 6, "a test's training")
        return self

    def end(self) -> dict[str, torch.Tensor]:
        return self.weights.read(["a", "b"])


@pytest.fixture
def killed(make_run):
    """The folder of a training that was killed after three of its six steps."""
    run = make_run()
    with pytest.raises(KeyboardInterrupt):
        Training(run, killed_at=3).do()
    return run.folder


def _run(folder, **options) -> Run:
    return Run(1, torch.device("cpu"), "fp32", folder, **options)


def _is_as_undisturbed(training: Training, make_run) -> bool:
    whole = Training(make_run(name="whole")).do()
    return all(torch.equal(value, training.end()[name]) for name, value in whole.end().items())


def test_a_state_says_what_saved_it(killed):
    """Step, setting and code in state.json; names and shapes in the one file of tensors."""
    pointer = json.loads((killed / "state.json").read_text("utf-8"))
    step, tensors, numbers = _run(killed).load_state()

    assert (step, pointer["step"], numbers) == (3, 3, {"loss": 1.0})
    assert pointer["made_by"] == {"code": "", "workers": 1, "zero_stage": 0, "offload": "none"}
    assert tensors.shape("slot/two/b/exp_avg") == (3, 4)
    assert [path.name for path in killed.glob("*.safetensors")] == ["state.3.safetensors"]


def test_a_state_of_other_processes_is_continued(killed, make_run):
    """It was saved by one process; two take it, and the first counts the passes of both."""

    class Two(World):
        size = 2

        def __init__(self, rank: int):
            self.rank = rank

    for rank, passes in ((0, 6.0), (1, 0.0)):
        run = _run(killed, sharding=Sharding(2, 3), world=Two(rank))
        assert run.load_state()[0] == 3
        assert run.ledger.forward_passes == passes
    training = Training(_run(killed)).do()
    assert training.taken == [3, 4, 5]
    assert training.notices == []
    assert _is_as_undisturbed(training, make_run)


def _cut(folder):
    path = folder / "state.3.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder, position=-3):
    path = folder / "state.3.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _change(folder, **changes):
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


DAMAGES = {
    "cut": _cut,
    "a flipped bit in a tensor": _flip,
    "a flipped bit in the header": lambda folder: _flip(folder, 100),
    "no tensors": lambda folder: (folder / "state.3.safetensors").unlink(),
    "an empty file": lambda folder: (folder / "state.3.safetensors").write_bytes(b""),
    "an empty pointer": lambda folder: (folder / "state.json").write_text(""),
    "a pointer that is no object": lambda folder: (folder / "state.json").write_text("[]"),
    "a pointer of bytes": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe\x00"),
    "another step": lambda folder: _change(folder, step=4),
    "another format": lambda folder: _change(folder, format=0),
    "the earlier format": lambda folder: (folder / "state.json").write_text('{"step": 3, "workers": 2}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_dropped_with_one_line(killed, make_run, damage):
    """The training starts over and ends as undisturbed, also in what it counts."""
    DAMAGES[damage](killed)
    training = Training(_run(killed)).do()

    assert len(training.notices) == 1
    assert "dropped and the stage starts over: " in training.notices[0]
    assert "\n" not in training.notices[0]
    assert training.taken == list(range(6))
    assert training.run.ledger.forward_passes == 12
    assert training.run.ledger.sittings == []
    assert _is_as_undisturbed(training, make_run)


def test_a_state_of_other_code_is_dropped_with_one_line(killed, make_run):
    """The line names both."""
    training = Training(_run(killed, code="imma@2")).do()

    assert training.notices[0].endswith("other code saved it (; now imma@2)")
    assert training.taken == list(range(6))
    assert _is_as_undisturbed(training, make_run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "weight/a"}, "it has no 'weight/a'"),
        (lambda t: {**t, "weight/b": torch.ones(3, 5)}, "its 'weight/b' has shape (3, 5), not (3, 4)"),
        (lambda t: {**t, "weight/c": torch.ones(3)}, "it has 'weight/c', which is not trained"),
        (lambda t: {**t, "slot/one/b/exp_avg": torch.ones(3, 4)}, "'slot/one/b/exp_avg', which no optimizer has"),
        (lambda t: {**t, "slot/two/b/exp_avg": torch.ones(6)}, "its 'slot/two/b/exp_avg' has shape (6,)"),
        (lambda t: {n: v for n, v in t.items() if n != "slot/two/b/exp_avg"}, "'exp_avg' of 'two' is incomplete"),
    ],
)
def test_a_state_that_does_not_fit_is_dropped_before_anything_is_changed(killed, make_run, change, said):
    """A weight or slot is missing, unknown, or of another shape."""
    run = _run(killed)
    step, tensors, numbers = run.load_state()
    run.save_state(step, change(dict(tensors)), numbers)
    training = Training(_run(killed)).do()

    assert said in training.notices[0]
    assert training.taken == list(range(6))
    assert training.run.ledger.forward_passes == 12
    assert _is_as_undisturbed(training, make_run)


def test_state_replaces_what_was_saved_before(make_run):
    """One state is on disk."""
    run = make_run()
    for step in (1, 2, 3):
        run.save_state(step, {"x": torch.full((2,), float(step))}, {})

    assert len(list(run.folder.glob("*.safetensors"))) == 1
    step, tensors, _ = run.load_state()
    assert (step, tensors["x"].tolist()) == (3, [3.0, 3.0])


def test_a_save_that_fails_leaves_the_state_before(make_run, monkeypatch):
    """As on a full disk: no half-written file either."""
    run = make_run()
    run.save_state(1, {"x": torch.ones(2)}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.model.saved_state.sync_folder", full)
    with pytest.raises(OSError, match="No space left"):
        run.save_state(2, {"x": torch.zeros(2)}, {})

    assert sorted(path.name for path in run.folder.iterdir()) == ["state.1.safetensors", "state.json"]
    assert run.load_state()[0] == 1


def test_times_of_all_sittings_are_kept(make_run):
    """Two kills: each sitting's start and time to its last state, and the phases of all."""
    folder = make_run().folder
    for number, end in enumerate((2, 4)):
        run = _run(folder, started=1000.0 + number)
        run.began -= 100.0 * (number + 1)  # as if it had begun so long ago
        run.ledger.seconds["load"] = 10.0
        with pytest.raises(KeyboardInterrupt):
            Training(run, killed_at=end).do()
    run = _run(folder)
    run.ledger.seconds["load"] = 10.0
    assert Training(run).do().taken == [4, 5]
    found = run.ledger.as_json()

    assert [sitting["started"] for sitting in found["sittings"]] == [1000.0, 1001.0]
    assert [sitting["seconds"] for sitting in found["sittings"]] == pytest.approx([100.0, 200.0], abs=50.0)
    assert found["seconds"]["load"] == 30.0
    assert found["forward_passes"] == 12
    json.dumps(found)
