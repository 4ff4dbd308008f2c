"""Prompt templates that LLaMA-Factory lacks. Registered before each training; no edit of LLaMA-Factory's source.

Add one with a `register_template(...)` call inside `register`, then name it in a recipe:
`template: your_template_name`. The arguments are those of llamafactory.data.template.register_template.
"""


def register() -> None:
    """Make this repository's templates known to LLaMA-Factory in this process; harmless when called again."""
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import TEMPLATES, register_template

    if "question_answer" not in TEMPLATES:
        # For base models that know no chat format.
        register_template(
            name="question_answer",
            format_user=StringFormatter(slots=["Question: {{content}}\nAnswer: "]),
            format_system=StringFormatter(slots=["{{content}}\n\n"]),
            format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
        )
