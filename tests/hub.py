"""A look-alike of the Hugging Face Hub for tests without internet: models and datasets over HTTP on 127.0.0.1, kept in
memory.

    with Hub() as hub:
        hub.publish("user/difnet", folder)
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "any"})

`huggingface_hub`, and with it `from_pretrained` and `push_to_hub`, reads `HF_ENDPOINT` when it is imported, so it
must be set before the process starts that talks to the look-alike. A push is one commit that holds the files
themselves, so that neither Git LFS nor Xet is needed. Every repository is public, every token welcome, and one
branch, `main`, is all there is. The endpoints, as https://huggingface.co/docs/hub/api describes them:

    GET   /api/models/{id}[/revision/{revision}]                 what is in a repository
    GET   /api/models/{id}/tree/{revision}[/{folder}]            its files
    HEAD  /{id}/resolve/{revision}/{path}                        a file's hash and size
    GET   /{id}/resolve/{revision}/{path}                        the file; with `Range:` the part that is asked for
    POST  /api/repos/create                                      a new repository
    POST  /api/validate-yaml                                     is the model card's YAML head right? (always yes)
    POST  /api/models/{id}/preupload/{revision}                  how files are to be sent
    POST  /api/models/{id}/commit/{revision}                     a commit: files to add and to delete
    POST  /api/models/{id}/paths-info/{revision}                 some of its files

`{id}` is `user/name`, or a bare `name` as the oldest models have. Datasets have `/api/datasets/..` and
`/datasets/{id}/resolve/..`; a model and a dataset of one name are one repository here.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = r"(?P<id>[^/]+(?:/[^/]+)?)"


@dataclass
class Repository:
    """The files of every commit of one model or dataset, oldest commit first."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit that holds exactly these files; returns its hash."""
        hashes = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(files.items())]
        revision = hashlib.sha1(repr((len(self.commits), hashes)).encode()).hexdigest()
        self.commits[revision] = files
        return revision

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


def entry_of(path: str, content: bytes | None = None) -> dict:
    """A file in a listing, or without content a folder."""
    if content is None:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Hub:
    """The server: it listens from `with Hub() as hub:` to the end of the block.

    Attributes:
        endpoint: the value for `HF_ENDPOINT`.
        repositories: name to `Repository`.
        requests: every request so far, e.g. `"HEAD /user/difnet/resolve/main/config.json"`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def publish(self, name: str, folder: str | Path) -> None:
        """Puts the files of a folder into a repository, as one commit and without HTTP."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        self.repositories.setdefault(name, Repository()).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.head]

    def __enter__(self) -> "Hub":
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request; `routes` at the end says which function answers it."""

    protocol_version = "HTTP/1.1"
    server_version = "HubLookAlike"

    def do_HEAD(self) -> None:
        self.answer_request()

    def do_GET(self) -> None:
        self.answer_request()

    def do_POST(self) -> None:
        self.answer_request()

    def answer_request(self) -> None:
        self.hub: Hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for methods, pattern, function in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return function(self, **match.groupdict())
        self.answer(404, {"error": f"the look-alike has no {self.command} {path}"})

    # Answers

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        """Sends bytes as they are and anything else as JSON. `X_Repo_Commit="..."` becomes `X-Repo-Commit: ...`."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        headers.setdefault("Content_Length", str(len(content)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, id: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a commit; None after a 404 that says what is missing, as `huggingface_hub` expects it."""
        repository = self.hub.repositories.get(id)
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        revision = repository.head if revision == "main" else revision
        if revision not in repository.commits:
            return self.answer(404, {"error": f"No revision {revision}"}, X_Error_Code="RevisionNotFound")
        return revision, repository.commits[revision]

    # Reading

    def model_info(self, id: str, revision: str = "main") -> None:
        if found := self.find(id, revision):
            revision, files = found
            self.answer(200, {"id": id, "sha": revision, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, id: str, revision: str, folder: str | None = None) -> None:
        if found := self.find(id, revision):
            prefix = f"{folder}/" if folder else ""
            inside = {path: content for path, content in found[1].items() if path.startswith(prefix)}
            if folder and not inside:
                return self.answer(404, {"error": f"No folder {folder}"}, X_Error_Code="EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("1", "true")
            entries = []
            for path, content in inside.items():
                parents = [parent.as_posix() for parent in PurePosixPath(path).parents][:-1]
                below = sorted(parent for parent in parents if parent.startswith(prefix) and parent != folder)
                shown = below if recursive else below[:1]
                entries += [folder_entry for name in shown if (folder_entry := entry_of(name)) not in entries]
                if recursive or not below:
                    entries.append(entry_of(path, content))
            self.answer(200, entries)

    def resolve(self, id: str, revision: str, path: str) -> None:
        if found := self.find(id, revision):
            revision, files = found
            if path not in files:
                return self.answer(
                    404, {"error": f"No file {path}"}, X_Error_Code="EntryNotFound", X_Repo_Commit=revision
                )
            content, status = files[path], 200
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": revision}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
                headers["Content_Range"] = f"bytes {start}-{last}/{len(content)}"
                content, status = content[start : last + 1], 206
            self.answer(status, content, **headers)

    def paths_info(self, id: str, revision: str) -> None:
        if found := self.find(id, revision):
            asked = parse_qs(self.body.decode())["paths"]
            entries = []
            for path in asked:
                if path in found[1]:
                    entries.append(entry_of(path, found[1][path]))
                elif any(name.startswith(f"{path}/") for name in found[1]):
                    entries.append(entry_of(path))
            self.answer(200, entries)

    # Writing

    def create(self) -> None:
        request = json.loads(self.body)
        name = "/".join(part for part in (request.get("organization"), request["name"]) if part)
        exists = name in self.hub.repositories
        if not exists:
            self.hub.repositories[name] = Repository()
            self.hub.repositories[name].commit({})
        self.answer(409 if exists else 200, {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})

    def commit(self, id: str, revision: str) -> None:
        files = dict(self.hub.files(id))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] != "header":
                return self.answer(400, {"error": f"the look-alike takes no {operation['key']}"})
        revision = self.hub.repositories[id].commit(files)
        url = f"{self.hub.endpoint}/{id}/commit/{revision}"
        self.answer(200, {"success": True, "commitOid": revision, "commitUrl": url})

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `Hub.requests` has what a test may want to know."""

    routes = [
        (("POST",), r"/api/repos/create", create),
        (("POST",), r"/api/validate-yaml", validate_yaml),
        (("POST",), rf"/api/(?:models|datasets)/{REPOSITORY}/preupload/(?P<revision>[^/]+)", preupload),
        (("POST",), rf"/api/(?:models|datasets)/{REPOSITORY}/commit/(?P<revision>[^/]+)", commit),
        (("POST",), rf"/api/(?:models|datasets)/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", paths_info),
        (("GET",), rf"/api/(?:models|datasets)/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", tree),
        (("GET",), rf"/api/(?:models|datasets)/{REPOSITORY}/revision/(?P<revision>[^/]+)", model_info),
        (("GET",), rf"/api/(?:models|datasets)/{REPOSITORY}", model_info),
        (("HEAD", "GET"), rf"(?:/datasets)?/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ]
