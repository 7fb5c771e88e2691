"""Which of a model's own prompts stands before a text."""

from collections.abc import Mapping

from quiver.errors import InvalidInput

_OTHER_NAMES = {
    "document": ("passage", "doc", "text"),
    "query": ("search_query", "web_search_query", "question"),
    "similarity": ("sts", "query"),
    "classification": (),
    "clustering": (),
}
"""What models call the prompt of a task, where they do not call it by the task's name."""


def choose_prompt(prompts: Mapping[str, str], *, name: str | None = None, task: str | None = None) -> str:
    """Return the text of a prompt: that of a `name`, which must be there, or that of a `task`, where the model has one.

    Raises `InvalidInput`.
    """
    if name:
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise InvalidInput(f"the model has no prompt {name!r} (it has: {known})", param="prompt_name")
        return prompts[name]
    if not task:
        return ""
    names = (task, *_OTHER_NAMES.get(task, ()))
    return next((prompts[name] for name in names if name in prompts), "")
