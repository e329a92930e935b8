from __future__ import annotations

import pytest

from qmerge.errors import RecipeError
from qmerge.names import common_unit, join, matches, module_of, under


def test_names_under_a_path() -> None:
    assert under("model.layers.1.mlp.up_proj.weight", "model.layers.1") == "mlp.up_proj.weight"
    assert under("model.layers.10.x", "model.layers.1") is None
    assert under("lm_head.weight", "") == "lm_head.weight"
    assert join("model.layers.1", "mlp") == "model.layers.1.mlp"
    assert join("", "mlp") == "mlp"
    assert module_of("mlp.up_proj.weight") == "mlp.up_proj"
    assert common_unit("a.10.w", ["a.1", "a.10"]) == "a.10"


def test_patterns_are_globs_or_expressions_over_the_whole_name() -> None:
    assert matches("*.mlp.*", "model.layers.0.mlp.up_proj")
    assert not matches("mlp", "model.layers.0.mlp.up_proj")
    assert matches(r"re:model\.layers\.\d+\.mlp\..*", "model.layers.12.mlp.up_proj")
    assert not matches(r"re:model\.layers\.\d", "model.layers.12")
    with pytest.raises(RecipeError, match="regular expression"):
        matches("re:(", "x")
