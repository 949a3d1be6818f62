"""The only file that speaks HTTP. Comes in: paths and bodies; goes out: decoded JSON, responses, or one of our errors.

Foreign exceptions end here, and so does the token: it is sent, and never shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2

from ema_reader.errors import (
    LeaseLost,
    NotFound,
    ReaderError,
    RequestRefused,
    Unauthorized,
    Unreachable,
    UsageError,
    WrongValue,
)

_Value = TypeVar("_Value")

CONNECT_S = 5.0
READ_S = 30.0  # between two pieces of a response, not for all of it
_TRY_LATER = frozenset({429, 502, 503, 504})


def path_of(*parts: str) -> str:
    """`/v1/` and the parts, each quoted.

    Raises:
        UsageError: a part would lead to another address however it is written.
    """
    for part in parts:
        if part in ("", ".", ".."):
            raise UsageError(f"{part!r} is not a name: names have letters, digits, '_', '.' and '-'")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Transport:
    """A connection pool to one server. Safe from several threads.

    Args:
        url: `http://HOST:PORT` or https, a path in front is kept.
        token: sent as a bearer token; None sends none.

    Raises:
        UsageError: the URL is not one, or no server can have the token.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise UsageError(
                "the token (EMA_TOKEN) holds a space, a line end or more than ASCII: no server has such a one"
            )
        headers = {"User-Agent": "ema-reader"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            address = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise UsageError(f"{url!r} is not a URL ({error}): use for example http://127.0.0.1:8080") from None
        if address.scheme not in ("http", "https") or not address.host:
            raise UsageError(f"{url!r} is not an http or https URL: use for example http://127.0.0.1:8080")
        timeout = httpx2.Timeout(READ_S, connect=CONNECT_S)
        self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, follow_redirects=True)

    def get(self, path: str, *, wait_s: int | None = None) -> Any:
        """The decoded JSON at `path`; with `wait_s` the server may take so long to answer.

        Raises:
            ReaderError: by what went wrong: NotFound, Unauthorized, Unreachable, RequestRefused, LeaseLost.
        """
        return self._json("GET", path, None, {} if wait_s is None else {"Prefer": f"wait={wait_s}"})

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, answer_s: float = READ_S) -> Any:
        """The decoded JSON that answers a POST, for which the server may take `answer_s`; raises as `get` does."""
        return self._json("POST", path, body, {}, answer_s)

    def upload(self, path: str, data: bytes, *, answer_s: float) -> Any:
        """The decoded JSON that answers a POST of bytes; see `post`."""
        timeout = httpx2.Timeout(READ_S, connect=CONNECT_S, read=answer_s)
        headers = {"Content-Type": "application/octet-stream"}
        with self._mapped():
            response = self._client.post(path, content=data, headers=headers, timeout=timeout)
        self._check(response)
        return _decode(response, self.url)

    def delete(self, path: str, *, answer_s: float = READ_S) -> None:
        """Send a DELETE, whose answer may take `answer_s` seconds; raises as `get` does."""
        with self._mapped():
            response = self._client.delete(path, timeout=httpx2.Timeout(answer_s, connect=CONNECT_S))
        self._check(response)

    def status_and_json(self, path: str) -> tuple[int, Any]:
        """Status and decoded JSON of a GET whatever the status is; raises Unreachable only."""
        with self._mapped():
            response = self._client.get(path)
            return response.status_code, _decode(response, self.url)

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """A successful response whose body is read piece by piece; raises as `get` does."""
        with self._mapped(), self._client.stream("GET", path, headers=dict(headers)) as response:
            if not response.is_success:
                response.read()
                self._check(response)
            yield response

    def read(self, answer: Any, value_of: Callable[[Any], _Value]) -> _Value:
        """A decoded answer as a value.

        Raises:
            ReaderError: it is none that an ema server gives.
        """
        try:
            return value_of(answer)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReaderError(f"{self.url} does not answer as an ema server does ({error!r}): check the URL") from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _json(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        answer_s: float = READ_S,
    ) -> Any:
        timeout = httpx2.Timeout(answer_s, connect=CONNECT_S)
        with self._mapped():
            response = self._client.request(method, path, json=body, headers=dict(headers), timeout=timeout)
        self._check(response)
        return _decode(response, self.url)

    def _check(self, response: httpx2.Response) -> None:
        if response.is_success:
            return
        problem = _problem(response)
        text = f"{problem['title']}: {problem['detail']}"
        if response.status_code == 401:
            raise Unauthorized(f"{self.url} wants a token: set EMA_TOKEN or use --token")
        if response.status_code == 404:
            if problem["code"] == "unknown":
                raise ReaderError(f"{self.url} answers 404, and not as an ema server does: is the address right?")
            raise NotFound(text)
        if response.status_code == 410:
            raise LeaseLost(text, code=problem["code"], status=410)
        if response.status_code == 422:
            raise WrongValue(text, code=problem["code"], status=422)
        if response.status_code in _TRY_LATER:
            raise Unreachable(f"{self.url} answers {response.status_code}: {text}")
        raise RequestRefused(text, code=problem["code"], status=response.status_code)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise Unreachable(
                f"nobody answers at {self.url} ({error}): is the server up, is the address right?"
            ) from error
        except httpx2.HTTPError as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"the connection to {self.url} broke: {what}") from error


def _problem(response: httpx2.Response) -> dict[str, str]:
    """The problem in the body; for an answer that is not the server's (a proxy's), what can be said of it."""
    known: dict[str, str] = {
        "title": response.reason_phrase,
        "detail": " ".join(response.text[:200].split()),
        "code": "unknown",
    }
    try:
        body = response.json()
    except ValueError:
        return known
    if isinstance(body, dict):
        known.update({key: str(body[key]) for key in known if key in body})
    return known


def _decode(response: httpx2.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ReaderError(f"{url} does not answer in JSON: is it an ema server?") from error
