"""Prompt templates that LLaMA-Factory lacks. Add yours at the end of this file; LLaMA-Factory's source stays as it is.

A template is one call of `register_template`, and a recipe names it: `template: your_template_name`. The arguments are
those of llamafactory.data.template.register_template. The call only records them: the template is registered with
LLaMA-Factory before a training. A run is stale once its template changed.
"""

from paragen.recipes.templates import (  # noqa: F401 - templates of yours may need the other names
    EmptyFormatter,
    FunctionFormatter,
    Llama2Template,
    ReasoningTemplate,
    StringFormatter,
    ToolFormatter,
    get_mm_plugin,
    register_template,
)

# For base models that know no chat format.
register_template(
    name="question_answer",
    format_user=StringFormatter(slots=["Question: {{content}}\nAnswer: "]),
    format_system=StringFormatter(slots=["{{content}}\n\n"]),
    format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
)

# GPT-2 has one special token, <|endoftext|>, and its words begin with their space: so does the response.
register_template(
    name="gpt2",
    format_user=StringFormatter(slots=["Question: {{content}}\nAnswer:"]),
    format_system=StringFormatter(slots=["{{content}}\n\n"]),
    format_assistant=StringFormatter(slots=[" {{content}}", {"eos_token"}]),
)

# BERT's tokenizer has neither bos nor eos; without replace_eos LLaMA-Factory would add a new token as eos, for which
# the model has no embedding. [CLS] opens and [SEP] ends each segment, as in BERT's own pretraining.
register_template(
    name="bert",
    format_user=StringFormatter(slots=["{{content}}[SEP]"]),
    format_system=StringFormatter(slots=["{{content}}[SEP]"]),
    format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
    format_prefix=EmptyFormatter(slots=["[CLS]"]),
    stop_words=["[SEP]"],
    replace_eos=True,
)
