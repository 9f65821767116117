"""A W&B server on the loopback, as far as its real client asks for one: GraphQL, the file stream, uploads.

It keeps what it is sent, and continues a run as W&B does: by the number of lines it has of it. It has no artifacts:
a table cannot be logged here.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

ENTITY = "somebody"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100  # wandb sends an epoch's pictures at once

    def __init__(self, moods: dict[str, str]) -> None:
        """`moods`: what it does on a method (GET, POST, PUT) or a STREAM instead of its work: `hang`, or a status."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods = moods
        self.lock = threading.Lock()
        self.runs: dict[str, dict[str, Any]] = {}
        self.contents: list[bytes] = []
        self.asked: list[str] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def run(self, name: str) -> dict[str, Any]:
        """What is known of a run: `fields`, `lines` of each file, how many history lines were `sent`, `states`,
        `exit_code`, `summary`."""
        return self.runs.setdefault(
            name, {"lines": {}, "sent": 0, "states": [], "exit_code": None, "summary": {}, "fields": {}}
        )

    def history(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run(name)["lines"].get("wandb-history.jsonl", [])]


@contextmanager
def serve(**moods: str) -> Iterator[Server]:
    server = Server(moods)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    @property
    def home(self) -> Server:
        return cast(Server, self.server)

    def do_GET(self) -> None:
        if not self.in_a_mood():
            self.answer({}, 404)

    def do_PUT(self) -> None:
        self.content()
        if not self.in_a_mood():
            self.answer({})

    def do_POST(self) -> None:
        content = self.content()
        if self.in_a_mood() or (self.path.endswith("/file_stream") and self.in_a_mood("STREAM")):
            return
        with self.home.lock:
            if self.path == "/graphql":
                question = json.loads(content)
                name = question.get("operationName", "")
                self.home.asked.append(name)
                reply = getattr(self, f"on_{name}", None)
                self.answer({"data": reply(question.get("variables", {})) if reply else {}})
            elif self.path.endswith("/file_stream"):
                self.stream(self.path.split("/")[-2], json.loads(content))
                self.answer({})
            else:
                self.answer({})

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.home.contents.append(content)
        return content

    def in_a_mood(self, on: str = "") -> bool:
        mood = self.home.moods.get(on or self.command)
        if mood == "hang":
            self.home.closing.wait()
            self.close_connection = True
        elif mood:
            self.answer({}, int(mood))
        return mood is not None

    def answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.home.run(name)
        for file, part in sent.get("files", {}).items():
            lines = run["lines"].setdefault(file, [])
            lines[part["offset"] :] = part["content"]
            if file == "wandb-history.jsonl":
                run["sent"] += len(part["content"])
            if file == "wandb-summary.json":
                run["summary"] = json.loads(part["content"][-1])
        if sent.get("complete"):
            run["exit_code"] = sent["exitcode"]
        if sent.get("preempting"):
            run["states"].append("preempting")

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def on_RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:
        bucket = None
        if run := self.home.runs.get(asked["name"]):
            history, events = (run["lines"].get(f"wandb-{name}.jsonl", []) for name in ("history", "events"))
            bucket = {
                "id": asked["name"],
                "name": asked["name"],
                "summaryMetrics": json.dumps(run["summary"]),
                "displayName": asked["name"],
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": len(events),
                "historyTail": json.dumps(history[-1:]),
                "eventsTail": json.dumps(events[-1:]),
                "config": "{}",
                "tags": [],
                "notes": "",
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "1", "name": "p", "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["name"] or asked["id"]
        inserted = name not in self.home.runs
        run = self.home.run(name)
        run["fields"] |= {key: value for key, value in asked.items() if value is not None}
        if asked.get("state"):
            run["states"].append(asked["state"])
        project = {"id": "1", "name": asked["project"] or "p", "entity": {"id": "1", "name": ENTITY}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": asked["displayName"] or name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run["lines"].get("wandb-history.jsonl", [])),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.home.url}/upload/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}
