"""A hub on this machine, made of a folder: what huggingface_hub asks of the Hub to read repositories, and to push."""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from hf_ibnorm.base.files import sha256_file

FIRST_COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories as folders `root/NAMESPACE/NAME`; there is one branch, and of it the newest commit.

    A login is `Bearer NAMESPACE`: it may read all, and write below NAMESPACE. Without one, only public repositories are
    there.
    """

    root: Path
    gated: set[str]
    asked: list[str]
    """What was downloaded, as NAMESPACE/NAME/FILE."""
    private: set[str]
    commits: dict[str, list[list[str]]]
    """For each repository that was pushed to, the files of each of its commits."""
    stored: dict[str, bytes]
    """Large files by SHA-256, which come before the commit that names them."""

    def log_message(self, *_):
        pass

    @property
    def endpoint(self):
        return f"http://{self.headers['Host']}"

    def answer(self, status, content=None, headers=None, body=b"", repository=""):
        if content is not None:
            headers, body = {"Content-Type": "application/json"}, json.dumps(content).encode()
        self.send_response(status)
        named = {"Content-Length": str(len(body)), "X-Repo-Commit": self.revision(repository), **(headers or {})}
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message="", repository=""):
        self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": message}, repository=repository)

    def revision(self, repository):
        commits = self.commits.get(repository)
        return hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest() if commits else FIRST_COMMIT

    @property
    def login(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        read = b""
        while size := int(self.rfile.readline(), 16):
            read += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return read

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        if api or parts[0] == "datasets":
            parts = parts[1 + api :]
        repository, rest = "/".join(parts[:2]), parts[2:]
        folder = self.root / repository
        if api and repository in self.gated:
            return self.refuse(403, "GatedRepo", "Access is gated.")
        if len(parts) < 2 or not folder.is_dir() or (repository in self.private and not self.login):
            return self.refuse(401 if repository in self.private else 404, "RepoNotFound")
        if not api:
            return self.download(repository, "/".join(rest[2:]))
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [(name, size) for name, size in names if not below or name.startswith(f"{below}/")]
            if below and not found:
                return self.refuse(404, "EntryNotFound", repository=repository)
            content = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in found]
            return self.answer(200, content)
        siblings = [{"rfilename": name, "size": size} for name, size in names]
        shown = {"id": repository, "sha": self.revision(repository), "gated": False, "siblings": siblings}
        return self.answer(200, {**shown, "private": repository in self.private}, repository=repository)

    do_HEAD = do_GET

    def download(self, repository, name):
        path = self.root / repository / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", repository=repository)
        if self.command == "GET":
            self.asked.append(f"{repository}/{name}")
        etag = {"ETag": f'"{sha256_file(path)}"'}
        return self.answer(200, headers=etag, body=path.read_bytes(), repository=repository)

    def do_POST(self):
        body = self.body()  # whole, even where it is refused: a client that still sends sees a broken connection
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self.validate_card(json.loads(body)["content"])
        if not self.login:
            return self.refuse(401, "", "Invalid username or password.")
        if parts == ["api", "repos", "create"]:
            return self.create(**json.loads(body))
        if parts[:2] == ["api", "models"] and parts[4:] in (["preupload", "main"], ["commit", "main"]):
            repository = "/".join(parts[2:4])
            if not (self.root / repository).is_dir():
                return self.refuse(404, "RepoNotFound")
            if self.login != parts[2]:
                return self.refuse(403, "", "You have no right to write here.")
            return self.preupload(repository, body) if parts[4] == "preupload" else self.commit(repository, body)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.answer(200, {"objects": [self.object(**each) for each in json.loads(body)["objects"]]})
        return self.answer(404)

    def create(self, name, organization, visibility=None, private=None, **_):
        repository = f"{organization}/{name}"
        if organization != self.login:
            return self.refuse(403, "", f"You have no right to create a model in {organization}.")
        content = {"url": f"{self.endpoint}/{repository}", "name": repository}
        if (self.root / repository).is_dir():
            return self.answer(409, {**content, "error": "You already created this model repo"})
        (self.root / repository).mkdir(parents=True)
        if visibility == "private" or private:
            self.private.add(repository)
        return self.answer(200, content)

    def validate_card(self, text):
        _, front, _ = text.split("---\n", 2)
        card = yaml.safe_load(front)
        wrong = [key for key in ("tags", "model-index") if not isinstance(card.get(key, []), list)]
        wrong += [key for key in ("library_name", "base_model") if not isinstance(card.get(key, ""), str)]
        errors = [{"message": f"{key} has another type"} for key in wrong]
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repository, body):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return self.answer(200, {"files": files})

    def object(self, oid, size):
        here = {} if oid in self.stored else {"actions": {"upload": {"href": f"{self.endpoint}/stored/{oid}"}}}
        return {"oid": oid, "size": size, **here}

    def do_PUT(self):
        body, oid = self.body(), self.path.split("/")[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400)
        self.stored[oid] = body
        return self.answer(200)

    def commit(self, repository, body):
        names = []
        for line in body.splitlines():
            kind, value = (json.loads(line)[key] for key in ("key", "value"))
            path = self.root / repository / value.get("path", "")
            if kind == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                path.write_bytes(self.stored[value["oid"]])
            elif kind == "deletedFile":
                path.unlink()
            names += [value["path"]] if kind != "header" else []
        self.commits.setdefault(repository, []).append(names)
        oid = self.revision(repository)
        return self.answer(200, {"commitUrl": f"{self.endpoint}/{repository}/commit/{oid}", "commitOid": oid})


@contextmanager
def hub_of(root: Path, home: Path, gated: set[str] = frozenset()) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """Serve the folder `root`; gives the handler, whose lists tell what happened, and an environment for commands.

    `home` is where these keep what they download.
    """
    own = {"root": root, "gated": gated, "asked": [], "private": set(), "commits": {}, "stored": {}}
    handler = type("Here", (Hub,), own)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    try:
        yield handler, environment
    finally:
        server.shutdown()
        server.server_close()
