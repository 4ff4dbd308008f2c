"""Rendering a recipe for a rank: what changes, what stays, what is refused. No training."""

import pytest
import yaml

from paragen.common.cli import UserError
from paragen.recipes import render

RECIPE = """### model
model_name_or_path: ../models/M
do_train: true
dataset: D   # a comment
lora_rank: 8
output_dir: saves/M_lora-rank_8_finetune
learning_rate: 5e-5
save_steps: 1
resume_from_checkpoint: "saves/M_lora-rank_8_pretrain/checkpoint-70"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "with a space" / "m_D_finetune.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def edit(recipe, old, new):
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new))


def test_rank_is_set_in_all_three_places_and_nothing_else_changes(recipe):
    config = render.render(recipe, 16)
    assert config["lora_rank"] == 16
    assert config["output_dir"] == "saves/M_lora-rank_16_finetune"
    assert config["resume_from_checkpoint"] == "saves/M_lora-rank_16_pretrain/checkpoint-70"
    own = render.load(recipe)
    assert {key for key in own if own[key] != config[key]} == {"lora_rank", "output_dir", "resume_from_checkpoint"}


def test_numbers_are_read_as_llamafactory_reads_them(recipe):
    assert render.render(recipe, 8)["learning_rate"] == 5e-5
    assert render.render(recipe, 8, ["learning_rate=1e-4", "bf16=false"])["learning_rate"] == 1e-4
    dumped = yaml.safe_load(render.dump(render.render(recipe, 8)))
    assert dumped["learning_rate"] == 5e-5, "also by readers that take 5e-5 for a text"


@pytest.mark.parametrize("rank", ["0", "-1", "8.5", "eight", "", "8 ", "٨"])
def test_a_rank_is_a_positive_whole_number(rank):
    with pytest.raises(UserError, match="not a positive whole number"):
        render.parse_rank(rank)


def test_a_model_whose_own_name_holds_a_rank_keeps_it(recipe):
    edit(recipe, "saves/M_lora", "saves/M_lora-rank_4_merged_lora")
    config = render.render(recipe, 2)
    assert config["output_dir"] == "saves/M_lora-rank_4_merged_lora-rank_2_finetune"


def test_a_rank_in_a_folder_above_is_left_alone(recipe):
    edit(recipe, "saves/M", "/disk_lora-rank_64_x/saves/M")
    assert render.render(recipe, 2)["output_dir"] == "/disk_lora-rank_64_x/saves/M_lora-rank_2_finetune"


def test_paths_without_a_rank_stay_as_they_are(recipe):
    edit(recipe, "M_lora-rank_8_finetune", "plain")
    assert render.render(recipe, 2)["output_dir"] == "saves/plain"


@pytest.mark.parametrize("value", ["false", "null", "", "~"])
def test_a_recipe_that_resumes_from_nothing_is_a_pretrain(recipe, value):
    edit(recipe, "M_lora-rank_8_finetune", "plain")
    edit(recipe, '"saves/M_lora-rank_8_pretrain/checkpoint-70"', value)
    config = render.render(recipe, 2)
    assert not config["resume_from_checkpoint"] and render.phase_of(config) == "pretrain"


def test_the_phase_is_finetune_where_it_resumes_and_saves_every_step(recipe):
    assert render.phase_of(render.render(recipe, 8)) == "finetune"
    edit(recipe, "M_lora-rank_8_finetune", "plain")
    assert render.phase_of(render.render(recipe, 8)) == "finetune"
    assert render.phase_of(render.render(recipe, 8, ["save_steps=100"])) == "pretrain"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "save_steps=2",
            ":8: save_steps 2 would collect nothing in M_lora-rank_8_finetune: a finetune saves every step",
        ),
        ("save_steps=null", "save_steps None would collect nothing"),
        ("resume_from_checkpoint=null", ":9: resume_from_checkpoint is missing, but M_lora-rank_8_finetune is for a"),
        (
            "output_dir=saves/M_lora-rank_8_pretrain",
            ":6: output_dir M_lora-rank_8_pretrain is a pretrain's, but this run",
        ),
        ("max_steps=0", "max_steps 0 trains nothing: set it to the number of the last step"),
        ("max_steps=-5", "max_steps -5 trains nothing"),
    ],
)
def test_a_run_that_would_not_make_what_its_folder_is_for_is_refused(recipe, override, said):
    with pytest.raises(UserError) as refused:
        render.render(recipe, 8, [override])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_length_in_epochs_may_be_said_with_max_steps_minus_one(recipe):
    assert render.render(recipe, 8, ["max_steps=-1", "num_train_epochs=2"])["max_steps"] == -1


def test_windows_line_ends_and_a_byte_order_mark_are_read(recipe):
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_text().replace("\n", "\r\n").encode())
    assert render.render(recipe, 4)["output_dir"] == "saves/M_lora-rank_4_finetune"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("output_dir: saves/M_lora-rank_8", "output_dir: saves/M_lora-rank_4", ":6: output_dir names rank 4"),
        ("saves/M_lora-rank_8_pre", "saves/M_lora-rank_4_pre", ":9: resume_from_checkpoint names rank 4"),
        ("lora_rank: 8", "lora_rank: 16", "names rank 8 but lora_rank is 16"),
        ("lora_rank: 8\n", "", None),
        ("lora_rank: 8", "lora_rank: eight", ":5: lora_rank 'eight'"),
        ("do_train: true", "do_train: false", ":3: do_train"),
        ("dataset: D", "dataset:", "dataset is missing"),
        ("dataset: D", "dataset: [", "not valid YAML"),
        ("dataset: D", "dataset: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("save_steps: 1", "save_steps: 1\nfinetuning_type: full", "finetuning_type 'full'"),
        ("save_steps: 1", "save_total_limit: 0", "save_total_limit 0 is less than 1"),
        ('"saves/M_lora-rank_8_pretrain/checkpoint-70"', "true", ":9: resume_from_checkpoint True"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_with_its_line(recipe, old, new, said):
    edit(recipe, old, new)
    if said is None:  # without the key LLaMA-Factory's default, 8, agrees with the paths
        assert render.render(recipe, 4)["lora_rank"] == 4
        return
    with pytest.raises(UserError) as refused:
        render.render(recipe, 8)
    assert said in str(refused.value) and str(recipe) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"just text", b"\xff\xfe\x00", b"a: ${b}\n", b"a: 1\na: 2\n"])
def test_what_is_no_recipe_is_refused(recipe, content):
    recipe.write_bytes(content)
    with pytest.raises(UserError) as refused:
        render.render(recipe, 8)
    assert str(recipe) in str(refused.value)


@pytest.mark.parametrize("text", ["nonsense", "=1", "a b=1", "--lora_rank=3"])
def test_an_override_that_is_no_key_value_is_refused(recipe, text):
    with pytest.raises(UserError, match="is not key=value"):
        render.render(recipe, 8, [text])


def test_a_seed_of_the_recipes_own_stays_in_its_paths(recipe):
    edit(recipe, "save_steps", "seed: 7\nsave_steps")
    edit(recipe, "lora-rank_8_", "lora-rank_8_seed-7_")
    assert render.render(recipe, 4)["output_dir"] == "saves/M_lora-rank_4_seed-7_finetune"
    assert render.render(recipe, 4, ["seed=9"])["output_dir"] == "saves/M_lora-rank_4_seed-9_finetune"
    edit(recipe, "seed: 7", "seed: 8")
    with pytest.raises(UserError, match="names seed 7 but seed is 8"):
        render.render(recipe, 4)


@pytest.mark.parametrize("ending", ["/", "/.", "//"])
def test_a_trailing_slash_or_dot_hides_no_rank(recipe, ending):
    edit(recipe, "M_lora-rank_8_finetune", f"M_lora-rank_8_finetune{ending}")
    assert render.render(recipe, 16)["output_dir"] == f"saves/M_lora-rank_16_finetune{ending}"


def test_a_seed_other_than_the_recipes_is_named_in_the_folders(recipe):
    config = render.render(recipe, 8, ["seed=7"])
    assert config["output_dir"] == "saves/M_lora-rank_8_seed-7_finetune"
    assert config["resume_from_checkpoint"] == "saves/M_lora-rank_8_seed-7_pretrain/checkpoint-70"
    assert render.render(recipe, 8, ["seed=42"])["output_dir"] == "saves/M_lora-rank_8_finetune"
    edit(recipe, "save_steps", "seed: 7\nsave_steps")
    assert render.render(recipe, 8, ["seed=7"])["output_dir"] == "saves/M_lora-rank_8_finetune"
    edit(recipe, "M_lora-rank_8_finetune", "plain_finetune")
    assert render.render(recipe, 8, ["seed=3"])["output_dir"] == "saves/plain_seed-3_finetune"


@pytest.mark.parametrize(
    "value",
    ["${oc.env:A_SECRET}", "x${oc.env:A_SECRET,y}", '"${${where}:A_SECRET}"', "[a, {b: '${oc.env:A_SECRET}'}]"],
)
def test_a_resolver_is_refused_and_what_it_reads_is_not_shown(recipe, monkeypatch, value):
    monkeypatch.setenv("A_SECRET", "hf_do_not_show")
    recipe.write_text(f"{RECIPE}where: oc.env\nrun_name: {value}\n")
    with pytest.raises(UserError) as refused:
        render.render(recipe, 8)
    assert "calls a resolver" in str(refused.value) and str(recipe) in str(refused.value)
    with pytest.raises(UserError, match="calls a resolver"):
        render.parse_overrides(["run_name=${oc.env:A_SECRET}"])


def test_another_key_of_the_recipe_can_be_referred_to(recipe):
    recipe.write_text(f"{RECIPE}run_name: '${{dataset}}: ${{learning_rate}}'\n")
    assert render.render(recipe, 8)["run_name"] == "D: 5e-05"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"{a: " * 3000 + b"1" + b"}" * 3000, "nested too deeply"),
        (b"a: " + b"9" * 9000, "not a recipe"),
        (b"a: &a [1,1]\n" + b"".join(b"b%d: &b%d [%s]\n" % (n, n, b"*a," * 9) for n in range(9)), "YAML aliases"),
        (b"a: " + b"x" * 2_000_000, "2000003 bytes"),
    ],
)
def test_a_recipe_that_would_take_all_memory_or_stack_is_refused(recipe, content, said):
    recipe.write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        render.render(recipe, 8)
    assert str(recipe) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("folder", ["/", "..", ".", "../..", "~", "/.."])
def test_a_run_folder_that_holds_other_things_is_refused(recipe, folder):
    edit(recipe, "output_dir: saves/M_lora-rank_8_finetune", f"output_dir: {folder!r}")
    with pytest.raises(UserError, match="name a folder for this run alone"):
        render.render(recipe, 8)


@pytest.mark.parametrize("path", ["x" * 300, "../" + "y" * 256 + "/z", '"a\\0b"', "a/" * 3000])
def test_what_cannot_be_a_path_is_refused(recipe, path):
    edit(recipe, "model_name_or_path: ../models/M", f"model_name_or_path: {path}")
    with pytest.raises(UserError, match=":2: model_name_or_path .* is no path"):
        render.render(recipe, 8)
