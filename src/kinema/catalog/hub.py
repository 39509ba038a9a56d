"""What a hub says of its files: Hugging Face or a mirror of it, and ModelScope.

Owns addresses, listings and refusals; downloads nothing. The network is touched only by calling.
Source: huggingface_hub file_download.py and utils/_http.py (headers, error codes); modelscope hub/api.py (listing).
"""

from __future__ import annotations

import fnmatch
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote, urlsplit

import httpx2

from kinema.catalog.sources import HubName, Source
from kinema.errors import CatalogError
from kinema.schema import Hub
from kinema.version import VERSION

MODELSCOPE_OWNERS = {"alibaba-pai": "PAI"}
"""Owners that are called otherwise on ModelScope."""

TRIES = 6


@cache
def _tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context()  # reads hundreds of certificates: once a process is enough


@dataclass(frozen=True)
class Remote:
    """One file as a hub describes it. `sha256` of large files, `git_sha1` of small ones; either may be unknown."""

    hub: HubName
    repository: str
    path: str
    url: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


class HubClient:
    """Asks hubs, with the token where it belongs, and again where they are busy.

    patience   seconds before the first of TRIES repetitions; it doubles.
    """

    def __init__(self, hub: Hub, *, connections: int = 8, patience: float = 0.5, timeout: float = 30.0) -> None:
        self.hub = hub
        self.patience = patience
        self._gone: set[str] = set()  # hosts that did not answer: asked once more, not TRIES times
        self._listed: dict[str, list[Remote]] = {}  # by repository: ModelScope describes files in its listing alone
        limits = httpx2.Limits(max_connections=connections + 2, max_keepalive_connections=connections + 2)
        self.http = httpx2.Client(
            headers={"User-Agent": f"kinema/{VERSION}", "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 15.0)),
            limits=limits,
            verify=_tls(),
            follow_redirects=True,
        )

    def close(self) -> None:
        self.http.close()

    def headers(self, url: str) -> dict[str, str]:
        """Return the login for an address of Hugging Face, nothing for any other host."""
        if urlsplit(url).netloc != urlsplit(self.hub.endpoint).netloc:
            return {}
        token = self._token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def describe(self, repository: str, path: str, hub: HubName = "hf") -> Remote:
        """Return size and hash of one file. Raises CatalogError for what is not there, gated or unreachable."""
        if hub == "ms":
            found = [remote for remote in self.listing(Source("ms", repository)) if remote.path == path]
            if not found:
                raise CatalogError(f"{repository} on ModelScope has no file {path}", name=path)
            return found[0]
        url = f"{self.hub.endpoint}/{repository}/resolve/main/{quote(path)}"
        response = self.again(lambda: self._head(url), url)
        if response.status_code >= 400:
            raise self._refusal(response, repository, path)
        tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
        tag = tag.removeprefix("W/").strip('"')
        size = response.headers.get("X-Linked-Size") or response.headers.get("Content-Length")
        if size is None:
            raise CatalogError(f"{url} does not say how long the file is", "try another mirror: HF_ENDPOINT", name=path)
        commit = response.headers.get("X-Repo-Commit")
        return Remote(
            "hf", repository, path, url.replace("/resolve/main/", f"/resolve/{commit}/") if commit else url, int(size),
            tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None, tag if re.fullmatch(r"[0-9a-f]{40}", tag) else None,
        )  # fmt: skip

    def listing(self, source: Source) -> list[Remote]:
        """Return the files of a repository that match the pattern, in order."""
        rows = self._tree(source.repository) if source.hub == "hf" else self._files(source.repository)
        found = sorted((row for row in rows if fnmatch.fnmatchcase(row.path, source.pattern)), key=lambda row: row.path)
        if not found:
            page = f"{self.hub.endpoint}/{source.repository}/tree/main" if source.hub == "hf" else self.hub.modelscope
            raise CatalogError(
                f"{source.repository} has no file that matches {source.pattern!r}",
                f"see {page}",
                name=source.repository,
            )
        return found

    def again(self, ask: Callable[[], httpx2.Response], url: str) -> httpx2.Response:
        """Return an answer; ask again where the network fails or the hub is busy. CatalogError when it stays so."""
        host = urlsplit(url).netloc
        tries = 1 if host in self._gone else TRIES
        for attempt in range(tries):
            try:
                response = ask()
            except httpx2.TransportError as error:
                fault: str = str(error) or type(error).__name__
            else:
                if response.status_code not in (429, 500, 502, 503, 504):
                    self._gone.discard(host)
                    return response
                fault = f"answers {response.status_code}"
            if attempt < tries - 1:
                time.sleep(min(self.patience * 2**attempt, 20))
        self._gone.add(host)
        raise CatalogError(
            f"{host} cannot be reached: {fault}",
            "check the network; HF_ENDPOINT names a mirror, `ms:OWNER/NAME` takes ModelScope instead",
            name=url,
            unreachable=True,
        )

    # --- Hugging Face -----------------------------------------------------------------------------

    def _token(self) -> str | None:
        if self.hub.token is not None:
            return self.hub.token.get_secret_value()
        file = self.hub.token_file
        return file.read_text().strip() or None if file is not None and file.is_file() else None

    def _head(self, url: str) -> httpx2.Response:
        """Ask without going on to the storage behind; a renamed repository's own redirect is followed."""
        for _ in range(3):
            response = self.http.head(url, headers=self.headers(url), follow_redirects=False)
            onward = response.headers.get("Location")
            if not response.is_redirect or onward is None or "X-Linked-Size" in response.headers:
                break
            url = str(response.url.join(onward))
        return response

    def _tree(self, repository: str) -> Iterator[Remote]:
        url: str | None = f"{self.hub.endpoint}/api/models/{repository}/tree/main?recursive=true"
        while url:
            response = self._page(url, repository)
            for row in response.json():
                if row.get("type") == "file":
                    large = row.get("lfs") or {}
                    place = f"{self.hub.endpoint}/{repository}/resolve/main/{quote(row['path'])}"
                    sha1 = None if large else row.get("oid")
                    yield Remote("hf", repository, row["path"], place, row["size"], large.get("oid"), sha1)
            url = response.links.get("next", {}).get("url")

    def _page(self, url: str, repository: str) -> httpx2.Response:
        response = self.again(lambda: self.http.get(url, headers=self.headers(url)), url)
        if response.status_code >= 400:
            raise self._refusal(response, repository, "")
        return response

    def _refusal(self, response: httpx2.Response, repository: str, path: str) -> CatalogError:
        """Put a hub's refusal into words, with the step to take."""
        code, page = response.headers.get("X-Error-Code", ""), f"{self.hub.endpoint}/{repository}"
        if code == "GatedRepo" or (response.status_code in (401, 403) and code != "RepoNotFound"):
            return CatalogError(
                f"{repository} is gated: its licence has to be accepted before {path or 'a file'} can be fetched",
                _gate_steps(page, self._token() is not None),
                name=f"{repository}/{path}",
                gated=True,
            )
        if code == "EntryNotFound" or (response.status_code == 404 and code != "RepoNotFound"):
            return CatalogError(f"{repository} has no file {path}", f"see {page}/tree/main", name=path)
        if code == "RepoNotFound" or response.status_code in (401, 404):
            hint = f"see {page}; for a private one set HF_TOKEN"
            return CatalogError(f"there is no repository {repository}, or it is private", hint, name=repository)
        return CatalogError(
            f"{page} answers {response.status_code}", "try again later, or a mirror: HF_ENDPOINT", name=path
        )

    # --- ModelScope ---------------------------------------------------------------------------------

    def _files(self, repository: str) -> list[Remote]:
        if repository not in self._listed:
            self._listed[repository] = list(self._modelscope(repository))
        return self._listed[repository]

    def _modelscope(self, repository: str) -> Iterator[Remote]:
        owner, _, name = repository.partition("/")
        named = f"{MODELSCOPE_OWNERS.get(owner, owner)}/{name}"
        url = f"{self.hub.modelscope}/api/v1/models/{named}/repo/files?Revision=master&Recursive=true"
        response = self.again(lambda: self.http.get(url), url)
        if response.status_code >= 400:
            raise CatalogError(f"ModelScope has no repository {named}", f"see {self.hub.modelscope}", name=repository)
        for row in (response.json().get("Data") or {}).get("Files") or ():
            if row.get("Type") != "tree":
                place = f"{self.hub.modelscope}/models/{named}/resolve/master/{quote(row['Path'])}"
                yield Remote("ms", repository, row["Path"], place, row["Size"], row.get("Sha256") or None)


def _gate_steps(page: str, has_token: bool) -> str:
    if has_token:
        return f"the account of your token has not accepted it: open {page}, log in, accept, and pull again"
    return (
        f"1. open {page}, log in and accept the licence\n"
        "2. make a token that may read at https://huggingface.co/settings/tokens\n"
        "3. set it, HF_TOKEN=hf_..., and pull again"
    )
