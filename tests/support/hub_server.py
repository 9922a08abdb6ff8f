"""A Hugging Face Hub on this host: as much of its protocol as downloads and commits by huggingface_hub use.

It does what huggingface_hub 0.36 expects of the hub. Large files are kept by their SHA-256 (Git LFS: a batch request
says what to upload, in one piece or in parts; downloads are redirected), small ones go within commits.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit


# Above it, a file is uploaded in parts of this size.
PART_BYTES = 64_000


@dataclass
class Repository:
    """Commits, oldest first: of each, the contents of files by their paths; and the branches' newest."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        # The hub's are Git's; these are of the same form, and as unique.
        number = len(self.commits)
        name = hashlib.sha1(f"{branch} {number} {sorted(files)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(http.server.ThreadingHTTPServer):
    """The hub, at `endpoint`, while it is a context.

    `uploads` and `downloads` have what was transferred: the bytes of large files in each request, by their SHA-256 or
    path. `break_after`, if set, is for how many bytes of large files there is a connection; then it ends, and whoever
    tries again is refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # of large files, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.uploads: list[tuple[str, int]] = []
        self.downloads: list[tuple[str, int]] = []
        self.commits: list[list[str]] = []
        self.break_after: int | None = None

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments: object) -> None:
        """Says nothing of clients that went away."""

    def add(self, repository: str, directory: Path, large: tuple[str, ...] = (".safetensors", ".bin")) -> str:
        """Puts the files of a directory into a repository's main branch; the commit."""
        files = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        repo = self.repositories.setdefault(repository, Repository())
        repo.large |= {path for path in files if path.endswith(large)}
        for path in repo.large & files.keys():
            self.stored[hashlib.sha256(files[path]).hexdigest()] = files[path]
        return repo.commit("main", files)

    def charge(self, size: int) -> int:
        """How many of `size` bytes may be transferred before the connection breaks."""
        if self.break_after is None:
            return size
        allowed = min(size, self.break_after)
        self.break_after -= allowed
        return allowed


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, commit = self._find(match[1], match[2] or "main")
            if repo and commit:
                names = [{"rfilename": name} for name in repo.commits[commit]]
                self._json({"id": match[1], "modelId": match[1], "sha": commit, "siblings": names, "tags": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/(.+)", path):
            self._json({"error": f"no such folder: {match[3]}"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            repo, commit = self._find(match[1], match[2])
            if repo and commit:
                self._json([_tree_entry(name, content) for name, content in repo.commits[commit].items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif match := re.fullmatch(r"/cdn/(\w+)", path):
            if not self._refuses():
                self._content(self.server.stored[match[1]], match[1], {"ETag": f'"{match[1]}"'})
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            known = name in self.server.repositories
            repo = self.server.repositories.setdefault(name, Repository())
            if not known:
                repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.server.endpoint}/{name}", "name": name}, 409 if known else 200)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repo = self.server.repositories[match[1]]
            known = match[2] in repo.branches
            repo.branches.setdefault(match[2], repo.branches["main"])
            self._json({}, 409 if known else 200)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._preupload(match[1], match[2], json.loads(body))
        elif re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [self._lfs_object(item["oid"], item["size"]) for item in json.loads(body)["objects"]]
            self._json({"transfer": "multipart", "objects": objects})
        elif match := re.fullmatch(r"/lfs/complete/(\w+)", path):
            self._complete(match[1], [part["partNumber"] for part in json.loads(body)["parts"]])
        elif match := re.fullmatch(r"/lfs/verify/(\w+)", path):
            self._json({}, 200 if match[1] in self.server.stored else 404)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    def do_PUT(self) -> None:
        match = re.fullmatch(r"/lfs/(\w+)(?:/(\d+))?", self.path)
        assert match
        if self._refuses():
            return
        oid, number, size = match[1], int(match[2] or 0), int(self.headers["Content-Length"])
        allowed = self.server.charge(size)
        content = self.rfile.read(allowed)
        self.server.uploads.append((oid, allowed))
        if allowed < size:
            self.close_connection = True
            self.connection.close()
            return
        self.server.parts.setdefault(oid, {})[number] = content
        if number == 0:
            self._complete(oid, [0])
        else:
            self._json({}, headers={"ETag": hashlib.md5(content).hexdigest()})

    def _complete(self, oid: str, numbers: list[int]) -> None:
        content = b"".join(self.server.parts[oid][number] for number in numbers)
        good = hashlib.sha256(content).hexdigest() == oid
        if good:
            self.server.stored[oid] = content
        self._json({}, 200 if good else 422)

    def _lfs_object(self, oid: str, size: int) -> dict:
        if oid in self.server.stored:
            return {"oid": oid, "size": size}  # nothing to upload
        upload: dict = {"href": f"{self.server.endpoint}/lfs/{oid}", "header": {}}
        if size > PART_BYTES:
            numbers = range(1, -(-size // PART_BYTES) + 1)
            upload["href"] = f"{self.server.endpoint}/lfs/complete/{oid}"
            upload["header"] = {f"{n:05d}": f"{self.server.endpoint}/lfs/{oid}/{n}" for n in numbers}
            upload["header"]["chunk_size"] = str(PART_BYTES)
        verify = {"href": f"{self.server.endpoint}/lfs/verify/{oid}"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _preupload(self, name: str, revision: str, request: dict) -> None:
        repo, commit = self._find(name, revision)
        if not (repo and commit):
            return
        answer = []
        for file in request["files"]:
            large = file["path"].endswith((".safetensors", ".bin", ".so"))
            old = repo.commits[commit].get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _commit(self, name: str, revision: str, lines: list[dict]) -> None:
        repo, commit = self._find(name, revision)
        if not (repo and commit):
            return
        files = dict(repo.commits[commit])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    self._json({"error": f"{value['path']} was not uploaded"}, 400)
                    return
                files[value["path"]] = self.server.stored[value["oid"]]
                repo.large.add(value["path"])
        self.server.commits.append([line["value"]["path"] for line in lines if line["key"] != "header"])
        new = repo.commit(revision, files)
        self._json({"commitUrl": f"{self.server.endpoint}/{name}/commit/{new}", "commitOid": new, "hookOutput": ""})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo, commit = self._find(name, revision)
        if not (repo and commit):
            return
        content = repo.commits[commit].get(path)
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif path in repo.large:
            oid = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            # Of another host, as on the hub: huggingface_hub looks at these headers, and not at those of the file.
            elsewhere = self.server.endpoint.replace("127.0.0.1", "localhost")
            self._json({}, 302, {**headers, "Location": f"{elsewhere}/cdn/{oid}"})
        else:
            self._content(content, path, {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(content)}"'})

    def _refuses(self) -> bool:
        if self.server.break_after == 0:
            self.close_connection = True
            self._json({"error": "no more for you"}, 403)
        return self.server.break_after == 0

    def _content(self, content: bytes, name: str, headers: dict[str, str]) -> None:
        start, size = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start = int(match[1])
            size = min(size, int(match[2]) + 1 if match[2] else size)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{len(content)}"
        self._head(206 if "Content-Range" in headers else 200, size - start, headers)
        if self.command == "HEAD":
            return
        allowed = self.server.charge(size - start) if self.path.startswith("/cdn/") else size - start
        self.wfile.write(content[start : start + allowed])
        self.server.downloads.append((name, allowed))
        if allowed < size - start:
            self.close_connection = True
            self.connection.close()

    def _find(self, name: str, revision: str) -> tuple[Repository | None, str | None]:
        """The repository and commit; where there is none, that is answered."""
        repo = self.server.repositories.get(name)
        commit = repo.resolve(revision) if repo else None
        if commit is None:
            code = "RevisionNotFound" if repo else "RepoNotFound"
            self._json({"error": "Repository or revision not found"}, 404, {"X-Error-Code": code})
        return repo, commit

    def _json(self, content: dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, size: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


def _tree_entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
