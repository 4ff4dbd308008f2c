"""The groups of recipe keys: every key in them is LLaMA-Factory's, and the defaults are the ones that it uses."""

import ast

import pytest

from paragen.recipes import keys, vocabulary

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
