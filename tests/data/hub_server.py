"""A hub of one dataset, served on this machine, and what the real hub client makes of it.

python hub_server.py FOLDER CACHE: reads the parquet files of FOLDER as nlphuji/flickr30k, streamed
and downloaded into CACHE; prints one JSON object with what came and how many bytes were sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional
from urllib.parse import parse_qs, unquote

FOLDER, CACHE = Path(sys.argv[1]), Path(sys.argv[2])
REVISION, COMMIT = "refs/convert/parquet", "a" * 40
FILES = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*.*")}
FOLDERS = sorted({"/".join(f.split("/")[:n]) for f in FILES for n in range(1, f.count("/") + 1)})
SENT: list[int] = []


def entry(path: str) -> dict[str, Any]:
    if path not in FILES:
        return {"type": "directory", "oid": "0", "path": path}
    return {"type": "file", "oid": digest(path), "size": len(FILES[path]), "path": path}


def digest(path: str) -> str:
    return hashlib.sha1(FILES[path]).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as reading a dataset takes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def handle_any(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = unquote(self.path.split("?")[0]).replace(REVISION, COMMIT)
        api = "/api/datasets/nlphuji/flickr30k"
        if path.startswith(f"/datasets/nlphuji/flickr30k/resolve/{COMMIT}/"):
            self.send_file(path.split(f"{COMMIT}/")[1])
        elif path.startswith(f"{api}/paths-info"):
            wanted = json.loads(asked)["paths"] if asked[:1] == "{" else parse_qs(asked)["paths"]
            self.send_json([entry(p) for p in wanted if p in FILES or p in FOLDERS])
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            start = path[len(f"{api}/tree/{COMMIT}") :].strip("/")
            below = [p for p in (*FILES, *FOLDERS) if p.startswith(f"{start}/" if start else "")]
            depth = start.count("/") + 1 if start else 0
            is_deep = "recursive=true" in self.path.lower()
            self.send_json([entry(p) for p in below if is_deep or p.count("/") == depth])
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in FILES]
            self.send_json({"id": "nlphuji/flickr30k", "sha": COMMIT, "siblings": siblings})
        else:
            self.send_body(b"", 404)

    do_GET = do_HEAD = do_POST = handle_any  # noqa: N815 - names of http.server

    def send_json(self, value: Any) -> None:
        self.send_body(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send_file(self, name: str) -> None:
        body = FILES[name]
        headers = {"ETag": f'"{digest(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked: Optional[str] = self.headers.get("Range")
        if asked is None or self.command == "HEAD":
            self.send_body(body, 200, headers)
            return
        first, _, last = asked.partition("=")[2].partition("-")
        piece = body[int(first) : int(last or len(body)) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(piece) - 1}/{len(body)}"
        SENT.append(len(piece))
        self.send_body(piece, 206, headers)

    def send_body(self, body: bytes, code: int, headers: Optional[dict[str, str]] = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # Before huggingface_hub is imported, which reads them once.
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
    os.environ["NO_PROXY"] = "127.0.0.1"
    os.environ.update(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    from lgpt.data.captioned import open_dataset
    from lgpt.settings.data import DataSettings

    found = {}
    for name, settings in (
        ("streamed", DataSettings(dataset="flickr30k", streaming=True)),
        ("downloaded", DataSettings(dataset="flickr30k", cache_folder=CACHE)),
    ):
        dataset = open_dataset(settings, "train")
        for_captions = sum(SENT)
        pixels = hashlib.sha256()
        for index in range(len(dataset)):
            pixels.update(dataset.load(index).tobytes())
        found[name] = {
            "ids": [dataset.image_id(index) for index in range(len(dataset))],
            "captions": [dataset.captions(index) for index in range(len(dataset))],
            "pixels": pixels.hexdigest(),
            "bytes_for_captions": for_captions,
            "bytes": sum(SENT),
        }
        SENT.clear()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
