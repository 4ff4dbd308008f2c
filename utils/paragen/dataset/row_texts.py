"""The texts of a row: which system prompt, prompt and response LLaMA-Factory reads from it."""

from typing import Any

from paragen.dataset import dataset_info


def texts_of(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The texts of a row, as LLaMA-Factory's data/converter.py reads them: prompt and query are joined by a newline.

    `messages` is there for a conversation, and for a prompt with a history.
    """
    columns, tags = dataset_info.columns_of(entry), dataset_info.tags_of(entry)
    images = dataset_info.pictures_of(row, columns["images"]) if "images" in columns else []

    def text(kind: str) -> Any:
        return row.get(columns[kind]) if kind in columns else None

    system = text("system") or ""
    if "messages" not in columns:
        prompt = "\n".join(filter(None, (text("prompt"), text("query"))))
        texts = {"system": system, "prompt": prompt, "response": text("response") or "", "images": images}
        before = text("history") or []
        turns = [*(one for turn in before for one in turn), prompt, texts["response"]]
        messages = [{"role": ("user", "assistant")[n % 2], "content": one} for n, one in enumerate(turns)]
        return texts | ({"messages": messages} if before else {})
    roles = {tags.get(f"{kind}_tag"): kind for kind in ("user", "assistant", "observation", "function", "system")}
    messages = [
        {"role": roles.get(message[tags["role_tag"]]), "content": message[tags["content_tag"]]}
        for message in row[columns["messages"]]
    ]
    system = next((message["content"] for message in messages if message["role"] == "system"), system)
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    response = messages[-1]["content"] if messages and messages[-1]["role"] in ("assistant", "function") else ""
    return {"system": system, "prompt": prompt, "response": response, "images": images, "messages": messages}


def all_of(row: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """All texts of a row, in their order: the system prompt and the turns."""
    texts = texts_of(row, entry)
    turns = [message["content"] for message in texts.get("messages", ()) if message["role"] != "system"]
    return [texts["system"], *(turns or [texts["prompt"], texts["response"]])]
