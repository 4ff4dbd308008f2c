"""Prompt templates that LLaMA-Factory lacks. Registered before each training; no edit of LLaMA-Factory's source.

Add one with a `register_template(...)` call inside `register`, then name it in a recipe:
`template: your_template_name`. The arguments are those of llamafactory.data.template.register_template.
"""


def register() -> None:
    """Make this repository's templates known to LLaMA-Factory in this process; harmless when called again."""
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template

    if "question_answer" not in TEMPLATES:
        # For base models that know no chat format.
        register_template(
            name="question_answer",
            format_user=StringFormatter(slots=["Question: {{content}}\nAnswer: "]),
            format_system=StringFormatter(slots=["{{content}}\n\n"]),
            format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
        )

    if "gpt2" not in TEMPLATES:
        # GPT-2 has one special token, <|endoftext|>, and its words begin with their space: so does the response.
        register_template(
            name="gpt2",
            format_user=StringFormatter(slots=["Question: {{content}}\nAnswer:"]),
            format_system=StringFormatter(slots=["{{content}}\n\n"]),
            format_assistant=StringFormatter(slots=[" {{content}}", {"eos_token"}]),
        )
    if "bert" not in TEMPLATES:
        # BERT's tokenizer has neither bos nor eos; without replace_eos LLaMA-Factory would add a new token as eos, for
        # which the model has no embedding. [CLS] opens and [SEP] ends each segment, as in BERT's own pretraining.
        register_template(
            name="bert",
            format_user=StringFormatter(slots=["{{content}}[SEP]"]),
            format_system=StringFormatter(slots=["{{content}}[SEP]"]),
            format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
            format_prefix=EmptyFormatter(slots=["[CLS]"]),
            stop_words=["[SEP]"],
            replace_eos=True,
        )
