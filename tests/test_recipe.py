from __future__ import annotations

import json
import math

import pytest

from bellbox.errors import BellboxError
from bellbox.recipe import QuantizerSpec, Recipe, Rule, recipe_from_dict

ROW = QuantizerSpec(levels=16, granularity="row")


def test_bits_and_levels_reach_both_sides():
    for recipe, n in (
        (Recipe.of("bbq"), 4),
        (Recipe.of("bbq", 4), 16),
        (Recipe.of("bbq", bits=1), 2),
        (Recipe.of("bbq", levels=3), 3),
    ):
        rule = recipe.rule_for("model.layers.0.mlp.up_proj")
        assert rule is not None
        assert rule.weights == QuantizerSpec("bbq", n)
        assert rule.activations == QuantizerSpec("bbq", n)
    rule = Recipe.bbq(
        2, weight_levels=3, activation_levels=16, granularity="ema", block=32, gamma_init=2.0
    ).rule_for("x")
    assert rule is not None
    options = {"gamma_lr": 0.1, "gamma_init": 2.0}
    assert rule.weights == QuantizerSpec("bbq", 3, None, None, 1, options)
    assert rule.activations == QuantizerSpec("bbq", 16, None, "ema", 32, options)
    assert rule.weights_rotated


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.lm_head",
        "classifier",
        "score",
        "embed_out",
        "transformer.head",
        "cls.predictions.decoder",
        "lm_head.decoder",
        "vocab_projector",
    ],
)
def test_heads_are_left(name):
    assert Recipe.bbq(2).rule_for(name) is None


@pytest.mark.parametrize(
    "name", ["heads", "model.layers.0.lm_head_proj", "scored", "decoder.layers.0.fc1", "head.0"]
)
def test_names_that_only_look_like_heads_are_quantized(name):
    assert Recipe.bbq(2).rule_for(name) is not None


def test_the_first_matching_rule_decides():
    recipe = Recipe((Rule("*.0.*", ROW), Rule("*.q_proj"), Rule("*", QuantizerSpec(granularity="row"))))
    assert recipe.rule_for("layers.0.q_proj") == Rule("*.0.*", ROW)
    assert recipe.rule_for("layers.1.q_proj") is None
    assert recipe.rule_for("layers.1.k_proj").weights.levels == 4  # type: ignore[union-attr]
    assert Recipe((Rule("*.0.*", ROW),)).rule_for("layers.1.q_proj") is None
    assert Recipe.none().rule_for("anything") is None


def test_rules_go_before_keep_before_heads_before_everything():
    recipe = Recipe.bbq(
        2, keep=("*.down_proj", "lm_*"), rules=(Rule("lm_head", ROW, ROW), Rule("*.7.down_proj", ROW))
    )
    assert recipe.rule_for("lm_head").weights == ROW  # type: ignore[union-attr]
    assert recipe.rule_for("layers.7.down_proj").weights == ROW  # type: ignore[union-attr]
    assert recipe.rule_for("layers.3.down_proj") is None
    assert recipe.rule_for("lm_other") is None
    assert recipe.rule_for("x.lm_head") is None


def test_patterns_are_those_of_a_shell_and_mind_the_case():
    assert Rule("layers.[01].?_proj").matches("layers.1.q_proj")
    assert not Rule("layers.[01].?_proj").matches("layers.2.q_proj")
    assert not Rule("*.Q_proj").matches("layers.2.q_proj")
    assert not Rule("q_proj").matches("layers.2.q_proj")


def test_a_recipe_is_plain_data():
    recipe = Recipe.bbq(levels=3, keep=("*.down_proj",), rules=(Rule("a", ROW),), share_inputs=False)
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe_from_dict({}) == Recipe.none()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"rule": []}, "rule"),
        ({"rules": [{"pattern": "*", "weight": {}}]}, "weight"),
        ({"rules": [{"pattern": "*", "weights": {"bits": 2}}]}, "bits"),
        ({"rules": [{"weights": {}}]}, "pattern"),
        ({"rules": [{"pattern": 3}]}, "pattern"),
        ({"rules": 5}, "rules"),
        ({"rules": [{"pattern": "*", "weights": {"method": "magic"}}]}, "method"),
        ({"rules": [{"pattern": "*", "weights": {"granularity": "median"}}]}, "granularity"),
        ({"rules": [{"pattern": "*", "weights": {"levels": 1}}]}, "levels"),
        ({"rules": [{"pattern": "*", "weights": {"levels": 257}}]}, "levels"),
        ({"rules": [{"pattern": "*", "weights": {"levels": "many"}}]}, "levels"),
        ({"rules": [{"pattern": "*", "weights": {"block": 96}}]}, "power of two"),
        ({"rules": [{"pattern": "*", "weights": {"zero_point": 0.3}}]}, "zero point"),
        ({"rules": [{"pattern": "*", "weights": {"options": {"gamma_init": math.nan}}}]}, "gamma_init"),
        ({"rules": [{"pattern": "*", "weights": {"options": {"gamma_init": 0.0}}}]}, "gamma_init"),
        ({"rules": [{"pattern": "*", "weights": {"options": {"gama": 1.0}}}]}, "gama.*options: gamma_init"),
        ({"rules": [{"pattern": "*", "weights": {"options": {"gamma": "loose"}}}]}, "gamma.*learned"),
        ({"share_inputs": "perhaps"}, "share_inputs"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(data, names):
    with pytest.raises(BellboxError, match=names) as error:
        recipe_from_dict(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "levels": 4},
        {"bits": 0},
        {"bits": 9},
        {"levels": 1},
        {"levels": 300},
        {"block": 100},
        {"bits": 1.5},
        {"granularity": "median"},
    ],
)
def test_impossible_numbers_are_refused_at_once(options):
    with pytest.raises(BellboxError):
        Recipe.bbq(**options)


def test_a_choice_for_activations_that_are_not_quantized_is_refused() -> None:
    for choice in ({"granularity": "ema"}, {"activation_levels": 16}):
        with pytest.raises(BellboxError, match="weight_only='float' leaves no activations"):
            Recipe.of("bbq", 2, weight_only="float", **choice)


def test_full_precision_but_for_rules_of_ones_own() -> None:
    first = Rule("*.0.*", QuantizerSpec("bbq", 4), QuantizerSpec("bbq", 4))
    recipe = Recipe.of("none", rules=(first,))
    assert recipe.rule_for("model.layers.0.mlp") == first
    assert recipe.rule_for("model.layers.1.mlp") is None


def test_ends_are_passed_over_by_the_rule_for_everything_only() -> None:
    recipe = Recipe.bbq(2, rules=(Rule("lm_head", ROW, ROW),))
    assert recipe.keep_ends
    assert recipe.rule_for("fc", end=True) is None
    assert recipe.rule_for("fc") is not None
    assert recipe.rule_for("lm_head", end=True).weights == ROW  # type: ignore[union-attr]
    assert Recipe.bbq(2, keep_ends=False).rule_for("fc", end=True) is not None
    assert Recipe.bbq_vision(2).rule_for("fc", "conv", end=True) is None


def test_a_recipe_of_an_earlier_file_goes_by_names_alone() -> None:
    data = Recipe.bbq(2).to_dict()
    assert data.pop("keep_ends")
    earlier = recipe_from_dict(data)
    assert not earlier.keep_ends
    assert earlier.rule_for("fc", end=True) is not None
    assert earlier.rule_for("lm_head", end=True) is None


@pytest.mark.parametrize("method", ["quest", "lsq", "n2uq", "rtn"])
def test_eight_bits_are_255_levels_where_256_do_not_fit_int8(method: str) -> None:
    with pytest.warns(UserWarning, match=f"{method} at 8 bits takes 255 levels"):
        recipe = Recipe.of(method, bits=8)
    assert recipe.rules[-1].weights.levels == recipe.rules[-1].activations.levels == 255  # type: ignore[union-attr]
    assert Recipe.of(method, levels=256).rules[-1].weights.levels == 256  # type: ignore[union-attr]


def test_eight_bits_of_bbq_fit_as_they_are() -> None:
    assert Recipe.of("bbq", bits=8).rules[-1].weights == QuantizerSpec("bbq", 256)
