"""The groups of recipe keys: every key in them is LLaMA-Factory's, and the defaults are the ones that it uses."""

import ast
import re

import pytest
from conftest import ROOT

from paragen.common.cli import UserError
from paragen.recipes import keys, render, vocabulary

GROUPS = {name: group for name, group in vars(keys).items() if isinstance(group, tuple | set | dict)}
del GROUPS["OFF"], GROUPS["__builtins__"]


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_a_group_holds_keys_that_llamafactory_knows(name):
    assert set(GROUPS[name]) <= vocabulary.known_keys().keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", keys.OMITTED_SEED),
        ("cutoff_len", keys.OMITTED_CUTOFF),
        ("lora_rank", keys.OMITTED_RANK),
        ("per_device_train_batch_size", keys.OMITTED_BATCH_SIZE),
        ("gradient_accumulation_steps", keys.OMITTED_ACCUMULATION),
    ],
)
def test_the_value_of_an_omitted_key_is_llamafactorys(key, value):
    (field,) = [field for name, field in vocabulary._fields() if name == key]
    given = {option.arg: option.value for option in getattr(field.value, "keywords", [])}
    assert ast.literal_eval(given.get("default", field.value)) == value


def test_flash_attention_2_is_refused_as_long_as_the_lock_has_the_transformers_that_fails_with_it(tmp_path):
    """Once the lock has another version, the refusal and this test can go."""
    assert re.search(r"^transformers==5\.6\.0", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    recipe = tmp_path / "a.yaml"
    recipe.write_text("do_train: true\nmodel_name_or_path: x\ndataset: D\noutput_dir: o_lora-rank_8_pretrain\n")
    for value in ("fa2", "FA2"):
        with pytest.raises(UserError, match=r"flash_attn fa2 fails with transformers 5\.6\.0.* 10634\); write sdpa"):
            render.render(recipe, 8, [f"flash_attn={value}"])
    assert render.render(recipe, 8, ["flash_attn=sdpa"])["flash_attn"] == "sdpa"
