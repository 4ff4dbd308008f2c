"""What LLaMA-Factory prints during a run: its warnings, each once. LLAMAFACTORY_VERBOSITY=INFO shows the rest."""

import logging
import os
import sys
from typing import Any

from paragen.common.cli import UserError

MIXED_PRECISION = "We recommend enable mixed precision training."
RESUMED = "Warning: The following arguments do not match the ones in the `trainer_state.json`"


class Once(logging.Filter):
    """Passes each message of a logger once: arguments are parsed several times in a process, with the same warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


parser_messages = Once()


def is_news(record: logging.LogRecord) -> bool:
    """Whether a message of transformers says more than that a finetune saves at other steps than its pretrain."""
    return not record.getMessage().startswith(RESUMED)


def reduce() -> None:
    """Set the level of LLaMA-Factory's loggers, which are already there in a process forked from one that imported it.

    Call it before LLaMA-Factory is imported, or after that in a forked process. Raises UserError for an unknown level.
    """
    level = (os.environ.get("LLAMAFACTORY_VERBOSITY") or "WARN").upper()
    if level not in logging.getLevelNamesMapping():
        raise UserError(f"LLAMAFACTORY_VERBOSITY={level}: is not a level; DEBUG, INFO, WARN or ERROR")
    os.environ["LLAMAFACTORY_VERBOSITY"] = level
    logging.getLogger("llamafactory.hparams.parser").addFilter(parser_messages)
    logging.getLogger("transformers.trainer_utils").addFilter(is_news)
    if "llamafactory" in sys.modules:
        logging.getLogger("llamafactory").setLevel(level)


def log_examples() -> None:
    """Have LLaMA-Factory log the tokens of its first row, at the level INFO, in place of printing them."""
    from llamafactory.data import loader
    from llamafactory.data.processor import supervised

    logger = logging.getLogger(loader.__name__)

    def log(*texts: Any) -> None:
        logger.info(" ".join(map(str, texts)))

    for module in (loader, supervised):
        vars(module)["print"] = log


def expect_float32() -> None:
    """Drop the advice to use mixed precision: on a CPU, float32 is our choice."""
    parser_messages.seen.add(MIXED_PRECISION)
