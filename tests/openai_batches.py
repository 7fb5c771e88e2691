"""Files and batches as OpenAI documents them, in memory: what the client's batches are tried against.

https://platform.openai.com/docs/api-reference/batch
"""

import base64
import email
import email.policy
import json
import struct
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from client_servers import Got, Handler

STATES = ("validating", "in_progress", "in_progress", "finalizing", "completed")
"""What a batch says, one time after another."""


def vector_of(text: str) -> list[float]:
    """Return what a text gives: its length, and its first letter."""
    return [float(len(text)), float(ord(text[0]))]


@dataclass
class OpenAI:
    """An action for `scripted`: answers every request by the documentation."""

    states: tuple[str, ...] = STATES
    files: dict[str, bytes] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    def __call__(self, handler: Handler, got: Got) -> None:
        """Answer."""
        url = urlsplit(got.path)
        match (got.method, *url.path.removeprefix("/v1/").split("/")):
            case ("POST", "files"):
                answer = self.take_file(got)
            case ("GET", "files", file_id, "content"):
                handler.reply(200, self.files[file_id], {"content-type": "application/octet-stream"})
                return
            case ("POST", "batches"):
                answer = self.create(got.json())
            case ("GET", "batches"):
                answer = self.page({name: values[0] for name, values in parse_qs(url.query).items()})
            case ("GET", "batches", batch_id) if self.find(batch_id):
                answer = self.move_on(self.find(batch_id))
            case ("POST", "batches", batch_id, "cancel"):
                answer = self.find(batch_id) | {"status": "cancelling"}
            case _:
                error = {"message": "No such object", "type": "invalid_request_error", "param": None, "code": None}
                handler.reply(404, json.dumps({"error": error}).encode(), {})
                return
        handler.reply(200, json.dumps(answer).encode(), {})

    def take_file(self, got: Got) -> dict[str, Any]:
        """Read a form as a library for mail does, which knows nothing of who wrote it."""
        head = f"content-type: {got.headers['content-type']}\r\n\r\n".encode()
        form = email.message_from_bytes(head + got.body, policy=email.policy.HTTP)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        assert fields["purpose"].get_content().strip() == "batch"
        assert fields["file"].get_filename() == "texts.jsonl"
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = fields["file"].get_payload(decode=True)
        size = len(self.files[file_id])
        return {"id": file_id, "object": "file", "bytes": size, "purpose": "batch", "status": "processed"}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Begin a batch; its fields are those that OpenAI asks for."""
        assert (body["endpoint"], body["completion_window"]) == ("/v1/embeddings", "24h")
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        batch = {
            "id": f"batch_{len(self.batches)}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": "24h",
            "status": self.states[0],
            "created_at": 1700000000 + len(self.batches),
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        self.batches.append(batch)
        return batch

    def find(self, batch_id: str) -> dict[str, Any]:
        """Return a batch, or nothing."""
        return next((batch for batch in self.batches if batch["id"] == batch_id), {})

    def move_on(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Let a batch do its next step; in the end, its files are there."""
        batch["status"] = self.states[min(self.asked, len(self.states) - 1)]
        self.asked += 1
        if batch["status"] == "failed":
            error = {"code": "invalid_json_line", "message": "line 3 is no JSON", "param": None, "line": 3}
            batch["errors"] = {"object": "list", "data": [error]}
        if batch["status"] in ("completed", "expired", "cancelled"):
            self.finish(batch)
        return batch

    def finish(self, batch: dict[str, Any]) -> None:
        """Write the output, in no order, and the errors: a line with `!` fails, one with `?` was never begun."""
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        good, bad = [], []
        for line in reversed(lines):
            (bad if any(mark in "".join(line["body"]["input"]) for mark in "!?") else good).append(answered(line))
        for name, answers in (("output_file_id", good), ("error_file_id", bad)):
            if answers:
                batch[name] = f"file-{batch['id']}-{name}"
                self.files[batch[name]] = "".join(json.dumps(answer) + "\n" for answer in answers).encode()
        batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        """List batches, the youngest first."""
        found = self.batches[::-1]
        if "after" in query:
            found = found[[batch["id"] for batch in found].index(query["after"]) + 1 :]
        limit = int(query.get("limit", 20))
        shown = found[:limit]
        ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
        return {"object": "list", "data": shown, "has_more": len(found) > limit, **ids}


def answered(line: dict[str, Any]) -> dict[str, Any]:
    """Return the output line of an input line."""
    texts, about = line["body"]["input"], {"id": "batch_req_1", "custom_id": line["custom_id"]}
    assert (line["method"], line["url"], line["body"]["encoding_format"]) == ("POST", "/v1/embeddings", "base64")
    if "?" in "".join(texts):
        return {**about, "response": None, "error": {"code": "batch_expired", "message": "it was too late"}}
    if "!" in "".join(texts):
        body = {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}}
        return {**about, "response": {"status_code": 400, "request_id": "r", "body": body}, "error": None}
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(struct.pack("<2f", *vector_of(text))).decode(),
        }
        for i, text in enumerate(texts)
    ]
    body = {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}}
    return {**about, "response": {"status_code": 200, "request_id": "r", "body": body}, "error": None}
