"""The packed engine where initial adapters cannot be drawn as PEFT does: `fork_server.start("helpers.other_draws")`."""

from paragen.packed import packed_train


def main() -> int:
    from paragen.packed import frozen_base

    drawn = frozen_base.drawn

    def drawn_with_another_seed(model, like, finetuning_args, seed, is_resumed=False):
        return drawn(model, like, finetuning_args, seed + 1, is_resumed)

    frozen_base.drawn = drawn_with_another_seed
    return packed_train.main()
