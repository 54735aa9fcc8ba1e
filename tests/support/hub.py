# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the Hugging Face hub's protocol, with models of a few kilobytes."""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

REVISION = "a" * 40
WEIGHTS = "acestep-v15-turbo/model.safetensors"
"""The large file of the main repository."""


def weights(length: int, seed: int = 0) -> bytes:
    """A safetensors file with one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    body = hashlib.shake_256(f"{seed}".encode()).digest(length)
    return len(header).to_bytes(8, "little") + header + body


def _model(prefix: str, seed: int, length: int, **more: bytes) -> dict[str, bytes]:
    files = {"config.json": b'{"model_type": "acestep"}', "model.safetensors": weights(length, seed)}
    named = {name.replace("__", "."): content for name, content in more.items()}
    return {f"{prefix}{name}": content for name, content in (files | named).items()}


def published(large: int = 300_000) -> dict[str, dict[str, bytes]]:
    """Repositories as ACE-Step publishes them: the main one with four folders, others with the files of one model."""
    tokenizer = {"tokenizer__json": b"{}"}
    silence = {"silence_latent__pt": b"silence", "modeling_acestep__py": b"raise SystemExit"}
    main = {
        **_model("acestep-v15-turbo/", 1, large, **silence),
        **_model("acestep-5Hz-lm-1.7B/", 2, 5_000, **tokenizer),
        **_model("Qwen3-Embedding-0.6B/", 3, 4_000, **tokenizer),
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights(3_000, 4),
        "README.md": b"music",
    }
    return {
        "ACE-Step/Ace-Step1.5": main,
        "ACE-Step/acestep-v15-base": _model("", 5, 6_000, **silence),
        "ACE-Step/acestep-5Hz-lm-0.6B": _model("", 6, 2_000, **tokenizer),
    }


@dataclass
class Hub:
    """The hub. Use it as a context; ``url`` is ``HF_ENDPOINT``.

    Attributes:
        repositories: files by name, by repository.
        token: where set, requests without it are refused.
        cut: for a file's name, after how many bytes its connection is closed, once.
        stall: for a file's name, after how many bytes its transfer waits for ``go_on``; ``stalled`` is set then.
        claimed: for a file's name, the size that the listing names in place of its own.
        served: for a file's name, what is sent in place of its content.
        requests: the files that were requested, with the byte that each began at.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=published)
    token: str | None = None
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, int]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The value of ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def listing(self, repository: str) -> Mapping[str, Any]:
        """What the hub says of a repository: its revision and files, with sizes and hashes."""
        files = self.repositories[repository]
        siblings = [self._sibling(name, content) for name, content in files.items()]
        return {"id": repository, "modelId": repository, "sha": REVISION, "private": False, "siblings": siblings}

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        size = self.claimed.get(name, len(content))
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": blob}
        if name.endswith(".safetensors"):
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return found


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Write nothing."""

    def do_HEAD(self) -> None:
        """Answer a question about a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a listing or a file."""
        hub, path = self.server.hub, unquote(self.path.partition("?")[0])
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, b"{}")
        elif listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            known = listed[1] in hub.repositories
            self._answer(200 if known else 404, json.dumps(hub.listing(listed[1]) if known else {}).encode())
        elif wanted := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{REVISION}/(.+)", path):
            self._file(wanted[1], wanted[2])
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", f"{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _file(self, repository: str, name: str) -> None:
        hub = self.server.hub
        content = hub.served.get(name, hub.repositories[repository][name])
        first = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
        rest = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", f"{len(rest)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        hub.requests.append((name, first))
        self._send(name, rest)

    def _send(self, name: str, rest: bytes) -> None:
        hub = self.server.hub
        if (end := hub.cut.pop(name, None)) is not None:
            self.wfile.write(rest[:end])
            self.close_connection = True
            return
        if (end := hub.stall.pop(name, None)) is not None:
            self.wfile.write(rest[:end])
            self.wfile.flush()
            hub.stalled.set()
            hub.go_on.wait(120)
            rest = rest[end:]
        self.wfile.write(rest)
