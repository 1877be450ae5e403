"""Configs: what is accepted, what is refused, and what the refusal says."""

import dataclasses

import pytest

from scaling_ldm import config


def refused(change):
    c = config.default().to_dict()
    change(c)
    with pytest.raises(config.ConfigError) as e:
        config.resolve(c)
    return str(e.value)


def test_default_resolves_and_round_trips():
    experiment = config.resolve(config.default())
    assert experiment == config.Experiment()
    assert config.resolve(config.to_config_dict(experiment)) == experiment


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["train"].update(batchsize=3),
            "config.train.batchsize: did you mean config.train.batch_size?",
        ),
        (lambda c: c.update(trian={}), "did you mean config.train?"),
        (lambda c: c["train"].update(seed=1.5), "must be int like 0, got float 1.5"),
        (lambda c: c["train"].update(seed=True), "must be int like 0, got bool True"),
        (lambda c: c.update(train=3), "config.train is a section"),
        (lambda c: c["data"].update(source="icon"), "did you mean 'icons'?"),
        (lambda c: c["model"].update(architecture="dit"), "known: in_context"),
        (lambda c: c["model"].update(head_dim=48), "does not divide the widths"),
        (lambda c: c["model"].update(heads=4), "exactly one of them is positive"),
        (
            lambda c: c["model"].update(heads=5, head_dim=0),
            "config.model.heads = 5 does not divide the widths [128, 192",
        ),
        (lambda c: c["model"].update(patch_size=3), "does not divide the 32x32"),
        (lambda c: c["model"].update(classes=3), "adaln_zero needs classes > 0"),
        (lambda c: c["plan"].update(budgets_flops=()), "non-empty tuple"),
        (lambda c: c["plan"].update(budgets_flops=(2.0, 1.0)), "must increase"),
        (lambda c: c["plan"].update(sizes=((64,),)), "is not (width, depth)"),
        (lambda c: c["optimizer"].update(b1=1.5), "must lie in [0.0, 0.99999]"),
        (lambda c: c["train"].update(batch_size=0), "must be positive"),
        (lambda c: c["mesh"].update(replica=0), "-1 (what is left) or positive"),
        (lambda c: c["fit"].update(metric="fid"), "known: validation_loss"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(change, said):
    assert said in refused(change)


def test_every_problem_is_listed_at_once():
    def change(c):
        c["train"]["batch_size"] = -1
        c["model"]["activation"] = "tanh"

    text = refused(change)
    assert "batch_size = -1" in text
    assert "activation = 'tanh'" in text


def test_every_numeric_field_has_a_check_of_its_range():
    """A nonsense value is refused before anything runs, or it is listed here."""
    free = {"data.shape", "objective.time_location", "mesh.replica", "plan.sizes"}
    free |= {"plan.budgets_flops"}
    for section in dataclasses.fields(config.Experiment):
        part = getattr(config.Experiment(), section.name)
        if not dataclasses.is_dataclass(part):
            continue
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            name = f"{section.name}.{field.name}"
            if isinstance(value, (bool, str)) or name in free:
                continue
            text = refused(
                lambda c, s=section.name, f=field.name, v=value: c[s].update(
                    {f: type(v)(-12345)}
                )
            )
            assert f"config.{name}" in text


def test_recipe_hash_ignores_where_and_how_long_but_not_what():
    base = config.resolve(config.default())

    def changed(section, **values):
        part = dataclasses.replace(getattr(base, section), **values)
        return dataclasses.replace(base, **{section: part}).recipe_hash

    assert changed("mesh", fsdp=4) == base.recipe_hash
    assert changed("plan", budgets_flops=(1e17,)) == base.recipe_hash
    assert changed("train", checkpoints_per_run=3) == base.recipe_hash
    assert changed("fit", seed=3) == base.recipe_hash
    assert changed("train", batch_size=8) != base.recipe_hash
    assert changed("data", seed=1) != base.recipe_hash
    assert changed("optimizer", learning_rate=1.0) != base.recipe_hash
    assert changed("validation", samples=8) != base.recipe_hash


def test_load_says_which_file_was_meant(tmp_path):
    (tmp_path / "tiny.py").write_text("x = 1\n")
    with pytest.raises(config.ConfigError, match="did you mean .*tiny.py"):
        config.load(tmp_path / "tinny.py")
    with pytest.raises(config.ConfigError, match=r"no get_config\(\)"):
        config.load(tmp_path / "tiny.py")
