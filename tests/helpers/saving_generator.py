"""train_generator.py, but with its state saved after each step: for tests that kill it on the way."""

from unittest import mock


def main() -> None:
    import train_generator
    from paragen.generator import train

    with mock.patch.object(train, "SAVE_SECONDS", 0):
        train_generator.main()
