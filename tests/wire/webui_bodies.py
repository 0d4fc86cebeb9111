"""Requests of the shapes that a chat page with many built-in tools sends: the chat, and three small tasks beside it."""

import json
from typing import Any

AREAS = ("note", "task", "file", "chat", "event", "image", "page", "memory", "folder")
DEEDS = ("search", "create", "update", "delete")
PURPOSE = (
    "{deed} a {area} that belongs to the person who is asking. Use this only if the question cannot be answered "
    "without it, and name in your answer which {area} you have used. Returns a JSON object with the {area} and its id."
)
FIELDS = {
    "query": ("string", "What to look for, in the words of the person. Leave it empty to get the newest ones."),
    "identifier": ("string", "The id of the one that is meant, as an earlier call has returned it."),
    "content": ("string", "The whole new text, as Markdown. What is left out here is removed."),
    "limit": ("integer", "How many to return at most, between 1 and 50. The usual number is 10."),
    "archived": ("boolean", "Whether those that were put away are wanted too."),
}


def tools() -> list[dict[str, Any]]:
    """36 definitions."""
    return [_tool(deed, area) for area in AREAS for deed in DEEDS]


def _tool(deed: str, area: str) -> dict[str, Any]:
    fields = {name: {"type": kind, "description": words} for name, (kind, words) in FIELDS.items()}
    parameters = {"type": "object", "properties": fields, "required": ["query"]}
    purpose = PURPOSE.format(deed=deed.capitalize(), area=area)
    return {
        "type": "function",
        "function": {"name": f"{deed}_{area}", "description": purpose, "parameters": parameters},
    }


def chat(model: str) -> dict[str, Any]:
    question = {"role": "user", "content": "What is the capital of France?"}
    return {"stream": True, "model": model, "messages": [question], "tools": tools()}


def after_a_call(model: str) -> dict[str, Any]:
    """The same chat once a tool has been called."""
    function = {"name": "search_note", "arguments": json.dumps({"query": "France"})}
    called = {"role": "assistant", "content": "", "tool_calls": [{"index": 0, "id": "call_1", "type": "function",
                                                                  "function": function}]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": '{"notes": ["The capital of France is Paris."]}'}
    body = chat(model)
    return body | {"messages": [*body["messages"], called, result]}


def tasks(model: str) -> list[dict[str, Any]]:
    """For a title, for questions that might follow, and for tags: JSON is asked for in the text alone."""
    wishes = {
        "a title of three to five words": '{"title": "..."}',
        "three questions that might follow": '{"follow_ups": ["...", "...", "..."]}',
        "one to three tags": '{"tags": ["...", "..."]}',
    }
    history = "USER: What is the capital of France?\nASSISTANT: The capital of France is Paris."
    bodies = [
        {"model": model, "stream": False, "messages": [{"role": "user", "content": text}]}
        for wish, form in wishes.items()
        for text in [f"### Task:\nWrite {wish} for this chat.\n### Output:\nJSON: {form}\n### Chat:\n{history}"]
    ]
    bodies[0]["max_tokens"] = 1000
    return bodies
