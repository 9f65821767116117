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
from typing import Any

ENTITY = "somebody"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100  # wandb sends an epoch's pictures at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hanging: set[str] = set()  # methods that it does not answer (GET, POST, PUT), and `file_stream`
        self.lock = threading.Lock()
        self.runs: dict[str, dict[str, Any]] = {}
        self.contents: list[bytes] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def run(self, name: str) -> dict[str, Any]:
        """Return what is known of a run; `sent`: how many lines of history have come, repeated ones too."""
        return self.runs.setdefault(name, {"lines": {}, "sent": 0, "states": [], "exit_code": None, "summary": {}})

    def history(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run(name)["lines"].get("wandb-history.jsonl", [])]


@contextmanager
def serve() -> Iterator[Server]:
    server = Server()
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
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.content()
        self.answer({}, 404)

    def do_PUT(self) -> None:
        self.content()
        self.answer({})

    def do_POST(self) -> None:
        content, reply, words = self.content(), {}, self.path.split("/")
        with self.server.lock:
            if words[-1] == "graphql":
                question = json.loads(content)
                handler = getattr(self, f"on_{question.get('operationName')}", None)
                reply = {"data": handler(question.get("variables", {})) if handler else {}}
            elif words[-1] == "file_stream":
                self.stream(self.server.run(words[-2]), json.loads(content))
        self.answer(reply)

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        self.server.contents.append(content)
        if {self.command, self.path.split("/")[-1]} & self.server.hanging:
            self.server.closing.wait()
            raise TimeoutError  # which closes the connection
        return content

    def answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def stream(self, run: dict[str, Any], sent: dict[str, Any]) -> None:
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
        if run := self.server.runs.get(asked["name"]):
            history = run["lines"].get("wandb-history.jsonl", [])
            bucket = {
                "id": asked["name"],
                "name": asked["name"],
                "summaryMetrics": json.dumps(run["summary"]),
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(history[-1:]),
                "eventsTail": "[]",
                "config": "{}",
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "1", "name": "p", "entity": {"id": "1", "name": ENTITY}, "bucket": bucket}}

    def on_UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["name"] or asked["id"]
        inserted = name not in self.server.runs
        run = self.server.run(name)
        if asked.get("state"):
            run["states"].append(asked["state"])
        project = {"id": "1", "name": asked["project"] or "p", "entity": {"id": "1", "name": ENTITY}}
        count = len(run["lines"].get("wandb-history.jsonl", []))
        bucket = {"id": name, "name": name, "displayName": name, "project": project, "historyLineCount": count}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def on_CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}
