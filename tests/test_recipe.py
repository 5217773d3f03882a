"""The recipe: its fields, its key, its schedules, what is refused in which words, and its file."""

import json
import re
from dataclasses import asdict, fields, replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoreid.errors import UserError
from autoreid.network import BACKBONES, HEADS, CellNet, model_options
from autoreid.recipe import RECIPES, WORDS, Recipe, find_recipe

# Written down before the fields of the tuned recipe came: the results that are recorded carry these keys.
KEYS = {
    "default": "2d2e3b8c0748", "drawn": "adee33cab01d", "autoreid": "f27af083153d", "safr": "410406e8fd5d",
    "safr-baseline": "91ebda060a43", "safr-literal": "5c2f84a28d49", "robust-reid": "0d07c753e5a5",
    "robust-reid-swag": "b00572aebe33", "robust-reid-a": "e99647bb3257", "robust-reid-b": "0d07c753e5a5",
    "robust-reid-c": "0d07c753e5a5", "robust-reid-e": "0d07c753e5a5", "robust-reid-f": "0d07c753e5a5",
    "robust-reid-h": "0d07c753e5a5", "robust-reid-d": "5a5ec238763e", "robust-reid-g": "b00572aebe33",
    "robust-reid-full": "b00572aebe33", "dare": "976da94282f1", "demo": "d0f438043bd0",
}


def said(*arguments) -> str:
    with pytest.raises(UserError) as fault:
        find_recipe(*arguments)
    assert "\n" not in str(fault.value)
    return str(fault.value)


# ---------------------------------------------------------------------------------------- schedules
def test_learning_rates_of_every_schedule():
    cosine = Recipe(lr=1.0, lr_min=0.1, epochs=6, warmup_epochs=2)
    assert [cosine.learning_rate(e) for e in range(6)] == pytest.approx([0.1, 0.55, 1.0, 0.775, 0.325, 0.1])
    step = Recipe(lr=1.0, epochs=6, warmup_epochs=1, schedule="step", milestones=(3, 5))
    assert [step.learning_rate(e) for e in range(6)] == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01])
    late = Recipe(lr=1.0, epochs=6, warmup_epochs=0, schedule="exponential", milestones=(2,), gamma=1e-4, momentum_late=0.5)
    assert [late.learning_rate(e) for e in range(6)] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.001])
    assert [late.momentum_of(e) for e in range(6)] == [0.9, 0.9, 0.5, 0.5, 0.5, 0.5]
    swag = Recipe(lr=1.0, lr_min=0.0, epochs=1, warmup_epochs=0, swag_cycles=2, swag_epochs=3, swag_decay=0.5)
    assert swag.all_epochs == 7
    assert [swag.learning_rate(e) for e in range(1, 7)] == pytest.approx([1, 0.5, 0, 0.5, 0.25, 0])
    for cycle, decay, floor in ((35, 0.7, 0.0), (4, 0.5, 0.01), (2, 1.0, 0.1)):
        swag = Recipe(lr=0.3, lr_min=floor, epochs=1, warmup_epochs=0, swag_cycles=3, swag_epochs=cycle, swag_decay=decay)
        rates = [swag.learning_rate(e) for e in range(1, swag.all_epochs)]
        assert rates == pytest.approx(reference.cyclic_rates(3 * cycle, 0.3, cycle, decay, floor), abs=1e-15)
    sunk = Recipe(lr=1.0, lr_min=0.2, epochs=1, warmup_epochs=0, swag_cycles=3, swag_epochs=4, swag_decay=0.1)
    assert {sunk.learning_rate(e) for e in range(9, 13)} == {0.2}  # a peak of 0.01 would be below the floor


def test_the_papers_recipes_in_their_own_figures():
    robust = find_recipe("robust-reid")
    for t, rate in ((1, 3e-3), (2, 6e-3), (10, 3e-2), (150, 3e-2), (151, 3e-3), (225, 3e-3), (226, 3e-4), (350, 3e-4)):
        assert robust.learning_rate(t - 1) == pytest.approx(rate), t  # Eq. 1 counts epochs from 1
    swag = find_recipe("robust-reid-swag")
    assert swag.all_epochs - swag.epochs == 525
    peaks = [swag.learning_rate(350 + 35 * cycle) for cycle in range(15)]
    assert peaks == pytest.approx([3e-2 * 0.7**cycle for cycle in range(15)])
    assert find_recipe("robust-reid-swag", {"epochs": "10"}).all_epochs == 10 + 15
    safr = find_recipe("safr")
    assert safr.identities * safr.images == 72 and safr.learning_rate(0) == pytest.approx(0.1 * safr.lr)
    rates = [safr.learning_rate(e) / safr.lr for e in (9, 10, 19, 20, 30)]
    assert rates == pytest.approx([0.91, 1, 1, 0.6, 0.36]) and safr.center_weight == 0.0005
    dare = find_recipe("dare")
    batches = -(-12936 // 72)  # Market-1501
    assert dare.epochs * batches == pytest.approx(60_000, rel=0.01)
    assert dare.milestones[0] * batches == pytest.approx(30_000, rel=0.01)
    assert dare.learning_rate(dare.epochs - 1) == pytest.approx(3e-7, rel=0.05)
    assert find_recipe("autoreid").learning_rate(0) == 3.5e-3


@pytest.mark.parametrize("cycle", [4, 6, 10])
def test_the_cyclic_schedule_is_torchs(cycle):
    """From ``lr_min`` without a warm-up, as Smith has it; after one the rate goes on from where that led."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.5, step_size_up=cycle // 2)
    expected = []
    for _ in range(25):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    recipe = Recipe(lr=0.5, lr_min=0.01, epochs=25, warmup_epochs=0, schedule="cyclic", cycle_epochs=cycle)
    assert [recipe.learning_rate(e) for e in range(25)] == pytest.approx(expected)
    warm = replace(recipe, warmup_epochs=5)
    rates = [warm.learning_rate(e) for e in range(25)]
    assert rates[:6] == pytest.approx([0.05, 0.14, 0.23, 0.32, 0.41, 0.5])
    assert rates[5:] == pytest.approx(expected[cycle // 2 : cycle // 2 + 20], abs=1e-12)
    odd = Recipe(lr=1.0, lr_min=0.0, epochs=6, warmup_epochs=0, schedule="cyclic", cycle_epochs=3)
    assert [odd.learning_rate(e) for e in range(6)] == pytest.approx([0, 2 / 3, 2 / 3, 0, 2 / 3, 2 / 3])


def test_swa_trains_on_at_its_own_constant_rate():
    usual = Recipe(lr=1.0, lr_min=0.1, epochs=6, warmup_epochs=2)
    swa = replace(usual, swa_epochs=2, swa_lr=0.3)
    assert swa.all_epochs == 6
    rates = [recipe.learning_rate(e) for recipe in (usual, swa, replace(swa, swa_lr=0.0)) for e in range(6)]
    assert rates == [*rates[:6], *rates[:4], 0.3, 0.3, *rates[:6]]
    assert replace(swa, swa_epochs=6).learning_rate(0) == 0.3
    assert replace(usual, swa_lr=0.3).learning_rate(5) == pytest.approx(0.1)  # no SWA


# ---------------------------------------------------------------------------------------- the key
def test_the_keys_of_recorded_results_stay():
    assert {name: recipe.key() for name, recipe in RECIPES.items()} == KEYS
    assert replace(Recipe(), swag_epochs=3).key() == "262d8b3af0ae"
    assert replace(Recipe(), lr=1e-3, center_lr=0.3).key() == "282912efc40d"


def test_the_key_changes_with_every_field_but_those_for_speed():
    base = asdict(Recipe())
    other = {
        "input": (64, 32), "milestones": (1, 2),
        **{name: words[0] if base[name] != words[0] else words[1] for name, words in WORDS.items()},
        **{k: v + 1 for k, v in base.items() if type(v) is int},
        **{k: not v for k, v in base.items() if type(v) is bool},
        **{k: v * 0.5 if v else 0.1 for k, v in base.items() if isinstance(v, float)},
    }
    other |= {"views": 2, "enlarge": 1.5}
    needs = {
        "cycle_epochs": {"schedule": "cyclic"}, "rand_n": {"auto_augment": "randaugment"},
        "rand_m": {"auto_augment": "randaugment"}, "swa_lr": {"swa_epochs": 9},
    }
    speed = {"channels_last", "compile"}
    del other["eval_every"]  # who watches changes nothing
    keys = {replace(Recipe(), **needs.get(name, {}), **{name: value}).key() for name, value in other.items()}
    around = {replace(Recipe(), **more).key() for more in needs.values()}
    assert {*other, "eval_every"} == set(base) and not keys & around and len(keys) == len(other) - len(speed) + 1
    assert all(replace(Recipe(), **{name: other[name]}).key() == Recipe().key() for name in speed)


def test_settings_of_what_is_not_in_use_do_not_change_the_key():
    for idle in ({"cycle_epochs": 3}, {"rand_n": 3, "rand_m": 5, "auto_augment": "none"}, {"swa_lr": 0.1}):
        assert replace(Recipe(), **idle).key() == Recipe().key()
    auto = replace(Recipe(), auto_augment="autoaugment")
    assert replace(auto, rand_m=5).key() == auto.key() != Recipe().key()


def test_a_whole_number_and_the_same_with_a_point_are_one_key():
    assert replace(Recipe(), clip=5, input=[64, 32]).key() == replace(Recipe(), clip=5.0, input=(64, 32)).key()


# ---------------------------------------------------------------------------------------- what a user writes
@pytest.mark.parametrize(("name", "changes", "words"), [
    ("default", {"epochs": "0"}, "epochs=0: allowed is 1 or more"),
    ("default", {"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'? known: adam, adamw, sgd"),
    ("default", {"margn": "1"}, "unknown recipe field 'margn'; did you mean 'margin'?"),
    ("default", {"flip": "2"}, "flip=2.0: allowed is from 0 to 1"),
    ("default", {"clip": "-1"}, "clip=-1.0: allowed is 0 (no clipping) or more"),
    ("default", {"margin": "nan"}, "margin=nan: margin must be a number (default 0.3)"),
    ("default", {"milestones": "x"}, "milestones=x: milestones must be whole numbers as in 2,2,2,2 (default (40, 50))"),
    ("default", {"drop_path": "2"}, "drop_path=2.0: allowed is from 0 to below 1"),
    ("default", {"schedule": "cycle"}, "unknown schedule 'cycle'; did you mean 'cyclic'? known: cosine, cyclic, "),
    ("default", {"auto_augment": "randaug"}, "unknown auto_augment 'randaug'; did you mean 'randaugment'? known: auto"),
    ("default", {"amp": "float16"}, "unknown amp 'float16'; known: bf16, fp16, none"),
    ("default", {"sync_bn": "perhaps"}, "sync_bn=perhaps: sync_bn must be true or false (default False)"),
    ("default", {"accumulate": "1.5"}, "accumulate=1.5: accumulate must be a whole number (default 1)"),
    ("default", {"accumulate": "0"}, "accumulate=0: allowed is 1 or more batches"),
    ("default", {"lr": ""}, "lr=: lr must be a number (default 0.00035)"),
    ("default", {"classifier_dropout": "1"}, "classifier_dropout=1.0: allowed is from 0 to below 1"),
    ("default", {"jitter": "1.1"}, "jitter=1.1: allowed is from 0 to 1"),
    ("default", {"rand_n": "9"}, "rand_n=9: allowed is 1 to 8 operations"),
    ("default", {"rand_m": "31"}, "rand_m=31: allowed is 0 to 30"),
    ("default", {"patch": "-0.1"}, "patch=-0.1: allowed is from 0 to 1"),
    ("default", {"ema": "1"}, "ema=1.0: allowed is from 0 (none) to below 1"),
    ("default", {"swa_epochs": "61"}, "swa_epochs=61: allowed is 0 (none) to 60"),
    ("default", {"swa_lr": "-1"}, "swa_lr=-1.0: allowed is 0 (the schedule's) or more"),
    ("default", {"held_out": "1"}, "held_out=1.0: allowed is from 0 (none) to below 1"),
    ("default", {"schedule": "cyclic", "cycle_epochs": "1"}, "cycle_epochs=1: allowed is 2 to 60, the epochs"),
    ("default", {"schedule": "cyclic", "cycle_epochs": "61"}, "cycle_epochs=61: allowed is 2 to 60, the epochs"),
    ("default", {"schedule": "step", "milestones": ""}, "milestones=(): allowed is at least one with the schedule step"),
    ("default", {"eval_every": "5"}, "eval_every=5: allowed is 0 with held_out=0: only identities that are held out can "
     "be evaluated; set held_out too, as in held_out=0.2"),
    ("default", {"ema": "0.999", "swa_epochs": "5"}, "ema=0.999, swa_epochs=5: allowed is one average of the weights; "
     "set the other to 0"),
    ("robust-reid-swag", {"ema": "0.9"}, "ema=0.9, swag_cycles=15: allowed is one average of the weights; set"),
    ("fast", {}, "unknown recipe 'fast'; known: PATH/recipe.json, autoreid, dare, default, demo, drawn, "),
])
def test_mistakes_are_named(name, changes, words):
    with pytest.raises(UserError) as fault:
        find_recipe(name, changes)
    assert str(fault.value).startswith(words)


def test_all_mistakes_are_named_at_once():
    assert said("default", {"lr": "-1", "swa_epochs": "99", "optimizer": "sdg", "eval_every": "2"}).split("; ") == [
        "unknown optimizer 'sdg'", "did you mean 'sgd'? known: adam, adamw, sgd",
        "eval_every=2: allowed is 0 with held_out=0: only identities that are held out can be evaluated",
        "set held_out too, as in held_out=0.2", "lr=-1.0: allowed is above 0", "lr_min=7e-07: allowed is from 0 to lr",
        "swa_epochs=99: allowed is 0 (none) to 60",
    ]
    words = said("default", {"qqq": "1", "flp": "1", "lr": "x", "soft_margin": "yes", "margn": "2"})
    assert re.fullmatch(
        r"lr=x: lr must be a number \(default 0.00035\); soft_margin=yes: soft_margin must be true or false "
        r"\(default False\); unknown recipe field 'qqq'; unknown recipe field 'flp'; did you mean 'flip'\?; unknown recipe "
        r"field 'margn'; did you mean 'margin'\? known: accumulate, amp, .*, weight_decay", words)


def test_every_field_is_set_by_text_and_by_value():
    """What str, repr or JSON make of a value is read again in the field's own type."""
    other = Recipe(
        input=(64, 32), optimizer="sgd", schedule="cyclic", milestones=(3, 7), soft_margin=True, gather=False, compile=True,
        auto_augment="randaugment", amp="bf16", jitter=0.25, rand_n=3, held_out=0.2, eval_every=4, swa_epochs=5,
        swa_lr=1e-4,
    )
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in asdict(other).items()}
    assert find_recipe("default", texts) == other == find_recipe("default", asdict(other))
    for text, value in (("true", True), ("1", True), ("True", True), ("false", False), ("0", False), ("FALSE", False)):
        assert find_recipe("default", {"sync_bn": text, "gather": text}) == replace(Recipe(), sync_bn=value, gather=value)
    assert find_recipe("default", {"input": "128x64", "lr": "1e-3"}) == replace(Recipe(), input=(128, 64), lr=1e-3)
    for name, value in (("sync_bn", 1), ("accumulate", True), ("lr", False), ("amp", 16), ("epochs", 5.0), ("input", 64)):
        assert said("default", {name: value}).startswith(f"{name}={value}: {name} must be ")


def test_fewer_epochs_keep_the_shares_of_what_counts_epochs():
    for name, value, changes, expected in (
        ("swa_epochs", 12, {"epochs": "20"}, 4), ("swa_epochs", 12, {"epochs": 2}, 1), ("swa_epochs", 0, {"epochs": 30}, 0),
        ("swa_epochs", 12, {"epochs": "30", "swa_epochs": "2"}, 2), ("swa_epochs", 12, {"lr": "1"}, 12),
    ):
        RECIPES["here"] = replace(Recipe(), **{name: value})
        try:
            assert getattr(find_recipe("here", changes), name) == expected
        finally:
            del RECIPES["here"]
    RECIPES["here"] = replace(Recipe(), schedule="cyclic", cycle_epochs=25)
    try:
        assert [find_recipe("here", {"epochs": e}).cycle_epochs for e in (60, 24, 3)] == [25, 10, 2]
    finally:
        del RECIPES["here"]
    assert find_recipe("default", {"epochs": 30}).cycle_epochs == 10  # not in use


def test_no_field_has_the_name_of_a_models_option():
    """``--set`` takes both, and looks for the recipe's first."""
    options = {name for build in (*BACKBONES.values(), *HEADS.values(), CellNet) for name in model_options(build)}
    assert "dropout" in options and not options & {f.name for f in fields(Recipe)}


# ---------------------------------------------------------------------------------------- the file
def test_a_recipe_file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"epochs": 5, "warmup_epochs": 1, "input": [64, 32]}))
    recipe = find_recipe(str(path), {"lr": "0.5"})
    assert (recipe.epochs, recipe.input, recipe.lr) == (5, (64, 32), 0.5)
    for values, words in (({"input": 5}, "input=5: input must be whole numbers"), ({"lr": None}, "lr=None: lr must be")):
        path.write_text(json.dumps(values))
        with pytest.raises(UserError) as fault:
            find_recipe(str(path))
        assert str(fault.value).startswith(f"{path}: {words}")
    path.write_text(json.dumps({"epoch": 5}))
    with pytest.raises(UserError) as fault:
        find_recipe(str(path))
    assert str(fault.value).startswith(f"{path}: unknown recipe field 'epoch'; did you mean 'epochs'?")


@given(st.data())
def test_a_written_recipe_is_read_again(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe = data.draw(st.sampled_from(list(RECIPES.values())))
    recipe = replace(recipe, **data.draw(st.fixed_dictionaries({}, optional={
        "lr": st.floats(1e-3, 10), "amp": st.sampled_from(WORDS["amp"]), "gather": st.booleans(), "compile": st.booleans(),
        "rand_m": st.integers(0, 30), "input": st.tuples(st.integers(16, 99), st.integers(16, 99)),
        "classifier_dropout": st.floats(0, 0.9),
    })))
    recipe.to_file(path, {"study": "drawn", "mean_rank": 0.7})
    again = find_recipe(str(path))
    assert again == recipe and again.key() == recipe.key()
    written = json.loads(path.read_text())
    assert list(written)[:2] == ["format", "version"] and written["provenance"] == {"study": "drawn", "mean_rank": 0.7}
    assert set(written) == {"format", "version", "provenance", *asdict(recipe)}
    assert written["format"] == "autoreid-recipe" and written["version"] == 1


@pytest.mark.parametrize(("values", "words"), [
    ({"format": "autoreid-genotype"}, "format=autoreid-genotype: allowed is autoreid-recipe; give the recipe.json that "
     "`autoreid tune` wrote, or your own"),
    ({"version": 2}, "version=2: allowed is the number 1; where a newer autoreid wrote this file, update autoreid"),
    ({"provenance": "me"}, "provenance=me: allowed is an object"),
    ({"lr": "NaN"}, 'lr="NaN": write it without quotes'),
    ({"lr": float("nan")}, "lr=nan: lr must be a number (default 0.00035)"),
    ({"gather": 1}, "gather=1: gather must be true or false (default True)"),
    ({"lr": -1, "erase": 2}, "lr=-1.0: allowed is above 0; lr_min=7e-07: allowed is from 0 to lr; erase=2.0: allowed is "
     "from 0 to 1"),
    ([], None),
])
def test_what_is_wrong_with_a_file(tmp_path, values, words):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    assert said(str(path)) == f"{path}: " + (words or "a recipe is a JSON object of fields, got list")


def test_a_damaged_or_missing_file(tmp_path):
    path = tmp_path / "recipe.json"
    assert said(str(path)) == f"{path}: no such recipe file"
    path.write_text('{"lr": ')
    assert said(str(path)).startswith(f"{path}: not valid JSON (")


def test_the_papers_recipe():
    r = RECIPES["autoreid"]
    assert (r.input, r.epochs, r.optimizer, r.lr, r.milestones, r.identities, r.images, r.margin) == (
        (384, 128), 240, "adam", 3.5e-3, (80, 150), 8, 4, 0.3)


# ---------------------------------------------------------------------------------------- what a newcomer writes
def test_fewer_epochs_in_a_file_shorten_what_is_counted_in_epochs(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"epochs": 3}')
    assert find_recipe(str(path)) == find_recipe("default", {"epochs": 3})
    assert find_recipe("default", {"schedule": "cyclic", "epochs": 6}).cycle_epochs == 2


@pytest.mark.parametrize(("text", "words"), [
    ('{"lr": "0.01", "epochs": "3"}', 'lr="0.01": write it without quotes; epochs="3": write it without quotes'),
    ('{"version": "1"}', 'version="1": allowed is the number 1'),
    ('{"milestones": [50, 40]}', "milestones=(50, 40): allowed is ascending epochs, from 0"),
    ('{"input": [16, 999999]}', "input=16x999999: allowed is HxW with both sides from 16 to 4096"),
])
def test_what_a_file_may_not_say(tmp_path, text, words):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(UserError) as fault:
        find_recipe(str(tmp_path / "recipe.json"))
    assert words in str(fault.value)


def test_speed_and_idle_fields_are_no_part_of_the_key():
    plain = find_recipe("default").key()
    for changes in ({"channels_last": True}, {"compile": True}, {"rand_n": 3}, {"cycle_epochs": 7}):
        assert find_recipe("default", changes).key() == plain
    held = find_recipe("default", {"held_out": 0.2})
    assert held.key() != plain and find_recipe("default", {"held_out": 0.2, "eval_every": 2}).key() == held.key()
    assert "compile" not in held.question() and held.question()["held_out"] == 0.2
