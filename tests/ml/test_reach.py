"""Reach: which weights are tuned, and what counts as moved."""

from __future__ import annotations

import pytest
import torch

from attacks.reach import NOTHING, Parameters, Reach
from harness.contracts.attack import AttackedConcept, Budget
from harness.contracts.protection import Protection
from harness.model.pipeline import DiffusionModel
from harness.training.selection import select

BUDGET = Budget((1, 2), 2)


@pytest.fixture
def concept(purse_files) -> AttackedConcept:
    """Four images of a purse."""
    return AttackedConcept("object", ("a purse",) * 4, purse_files, called="purse")


def attacked(model, concept, run, folder, protection=None, budget=BUDGET, **parameters) -> tuple[set[str], Reach]:
    """Run a reach; return the names that differ after loading its last checkpoint from before, and the attack."""
    before = {name: p.detach().clone() for name, p in model.parameters().items()}
    attack = Reach(Parameters(learning_rate=1e-3, **parameters))
    for checkpoint in attack.adapt(model, concept, protection or Protection(), budget, run):
        place = folder / str(checkpoint.step)
        place.mkdir(parents=True)
        checkpoint.save(place)
    with torch.no_grad():
        for name, parameter in model.parameters().items():
            parameter.copy_(before[name])
    attack.load(model, folder / "2")
    return {name for name, p in model.parameters().items() if not torch.equal(p, before[name])}, attack


def modules(names) -> set[str]:
    """Return the modules of parameters."""
    return {name.rpartition(".")[0] for name in names}


def moved_by_a_defense(model, names) -> None:
    """Change weights as a released model's layers do."""
    known = model.parameters()
    model.overlay({name: known[name].detach() * 1.01 + 1e-3 for name in names})


@pytest.mark.parametrize("reach", ["cross_attention", "everything"])
def test_a_reach_trains_its_weights_alone(model, concept, make_run, tmp_path, reach):
    """And all of them; AdamW's decay moves each, whatever its gradient."""
    changed, _ = attacked(model, concept, make_run(), tmp_path / "saved", reach=reach)

    assert changed == set(select(model.parameters(), "unet" if reach == "everything" else reach))


def test_an_adapter_is_on_attention_alone(model, concept, make_run, tmp_path):
    """It is fused into the projections that it adapts."""
    changed, attack = attacked(model, concept, make_run(), tmp_path / "saved", reach="adapter", rank=2)

    attention = select(model.parameters(), "attention")
    assert changed and changed <= set(attention)
    assert modules(changed) == modules(n for n in attention if n.endswith(".weight"))
    attack.unload(model)


def test_unmoved_is_all_but_the_modules_that_were_moved(model, concept, make_run, tmp_path):
    """A bias whose weight was moved is moved too: a module is a whole."""
    weights = [name for name in select(model.parameters(), "attention") if ".attn2." in name and "to_out" in name]
    moved_by_a_defense(model, [name for name in weights if name.endswith(".weight")])
    assert model.moved() == modules(weights)
    changed, _ = attacked(model, concept, make_run(), tmp_path / "saved", reach="unmoved")

    assert any(name.endswith(".bias") for name in weights)
    assert changed == {name for name in select(model.parameters(), "unet") if name not in weights}


def test_nothing_has_moved_on_the_undefended_model(model, concept, make_run, tmp_path):
    """There, unmoved is everything."""
    changed, _ = attacked(model, concept, make_run(), tmp_path / "saved", reach="unmoved")

    assert changed == set(select(model.parameters(), "unet"))


def test_an_honest_attacker_leaves_frozen_weights_out_of_its_reach(model, concept, make_run, tmp_path):
    """An adaptive one does not."""
    frozen = frozenset(select(model.parameters(), "cross_attention_kv"))
    unet = set(select(model.parameters(), "unet"))
    given = {"protection": Protection(frozen=frozen), "reach": "unmoved"}
    honest, attack = attacked(model, concept, make_run(name="honest"), tmp_path / "honest", **given)
    attack.unload(model)
    model.restore()
    bold = Budget((1, 2), 2, "adaptive")
    adaptive, _ = attacked(model, concept, make_run(name="bold"), tmp_path / "bold", budget=bold, **given)

    assert honest == unet - frozen and adaptive == unet


def test_when_everything_was_moved_nothing_is_tuned_and_it_is_said(model, concept, make_run, tmp_path):
    """Each checkpoint is the released model."""
    moved_by_a_defense(model, select(model.parameters(), "unet"))
    run, said = make_run(), []
    run.notify = said.append
    changed, attack = attacked(model, concept, run, tmp_path / "saved", reach="unmoved")

    assert changed == set()
    assert said == ["reach: unmoved: the defense moved every module of the UNet, so nothing is tuned"]
    assert sorted(p.name for p in (tmp_path / "saved").glob("*/*")) == [NOTHING, NOTHING]
    attack.unload(model)


def test_a_threshold_says_how_much_is_a_move(model):
    """Relative to the norm of the base's tensor."""
    known = model.parameters()
    (small, large) = [name for name in select(known, "feed_forward_out") if name.endswith(".weight")][:2]
    base = {name: known[name].detach().clone() for name in (small, large)}
    model.overlay({small: base[small] * 1.001, large: base[large] * 1.5})
    by_hand = {name: float((known[name] - base[name]).norm() / base[name].norm()) for name in base}

    assert by_hand[small] == pytest.approx(0.001, rel=1e-3) and by_hand[large] == pytest.approx(0.5, rel=1e-3)
    assert model.moved() == modules([small, large])
    assert model.moved(0.01) == modules([large])
    assert model.moved(0.6) == set()


def test_a_component_of_another_shape_has_moved_where_it_differs(model, tiny_source):
    """A pruned student takes the UNet's place: what is equal in name, shape and value has not moved."""
    other = DiffusionModel.load(tiny_source, torch.device("cpu")).unet
    with torch.no_grad():
        other.conv_in.weight.mul_(2.0)
    model.replace("unet", other)

    assert model.moved() == {"unet.conv_in"}


def test_a_model_without_its_originals_cannot_say_what_moved(model):
    """They were not kept."""
    model.keeps_originals = False
    model.change(["unet.conv_in.weight"])

    with pytest.raises(ValueError, match="keep_originals: true"):
        model.moved()
    model.keeps_originals = True
