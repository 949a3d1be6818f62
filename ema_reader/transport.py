"""The only file that speaks HTTP: sends requests, decodes JSON, and maps every failure to an error of `ema_reader`.

The token is sent and never shown.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote
from urllib.request import proxy_bypass

import httpx2

from ema_reader.errors import (
    LeaseLost,
    NotFound,
    ReaderError,
    RequestRefused,
    RunUnreadable,
    Unauthorized,
    Unreachable,
    UsageError,
    WrongValue,
)

_Value = TypeVar("_Value")

CONNECT_S = 5.0
READ_S = 30.0  # between two pieces of a response, not for all of it
_TRY_LATER = frozenset({429, 502, 503, 504})
_TLS_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
_GREETING_S = 1.0
_ZEROMQ_GREETING = b"\xff"  # ZMTP: 0xff, eight bytes of padding, 0x7f
_NOT_OURS = {  # what a status means that the ema server did not send
    400: "the request was not accepted; where TLS is spoken, the URL begins with https://",
    401: "a password is required there; the ema server accepts bearer tokens only",
    403: "an access rule there forbids it",
    404: "is the address right, and the path in front of it?",
    405: "this method is not allowed there",
    407: "the proxy requires a password",
    408: "the request took longer than the time limit there",
    413: "the body is larger than the limit there (nginx: client_max_body_size)",
    414: "the address is longer than the limit there",
    429: "there were more requests than the rate limit there",
    431: "the headers are larger than the limit there",
    500: "the failure is there",
    502: "the ema server behind it does not answer",
    503: "the ema server behind it does not answer",
    504: "the ema server behind it took longer than the time limit there (nginx: proxy_read_timeout)",
}


def path_of(*parts: str) -> str:
    """`/v1/` and the parts, each quoted.

    Raises:
        UsageError: a part would lead to another address in any spelling.
    """
    for part in parts:
        if part in ("", ".", ".."):
            raise UsageError(f"{part!r} is not a name: names have letters, digits, '_', '.' and '-'")
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


class Transport:
    """A connection pool to one server. Safe from several threads.

    Proxies of the environment (`HTTP_PROXY` and others) are used, except for addresses of this machine.

    Args:
        url: `http://HOST:PORT` or https; a path prefix is kept.
        token: sent as a bearer token; None or empty sends none.

    Raises:
        UsageError: the URL or the token cannot be valid, or a variable of the environment has a bad value.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise UsageError(
                "the token (EMA_TOKEN) has a space, a line end or a character outside ASCII: no server does"
            )
        self._has_token = bool(token)
        headers = {"User-Agent": "ema-reader"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            self._address = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise UsageError(f"{url!r} is not a URL ({error}): use for example http://127.0.0.1:8080") from None
        if self._address.scheme not in ("http", "https") or not self._address.host:
            raise UsageError(f"{url!r} is not an http or https URL: use for example http://127.0.0.1:8080")
        context = _tls_context(self._address.scheme)
        direct = httpx2.HTTPTransport(verify=context) if _needs_no_proxy(self._address.host) else None
        self._proxies = [] if direct is not None else _proxy_variables(self._address.scheme)
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                headers=headers,
                timeout=_timeout(READ_S),
                follow_redirects=True,
                transport=direct,
                verify=context,
            )
        except (
            ImportError,
            ValueError,
            httpx2.InvalidURL,
        ) as error:  # none but the proxies' values are left to be wrong
            names = _variables_of("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
            raise UsageError(
                f"a proxy variable ({', '.join(names)}) cannot be used: {_why_no_proxy(error)}; "
                "correct or unset it, or name the server's host in NO_PROXY"
            ) from error

    def get(self, path: str, *, wait_s: int | None = None) -> Any:
        """The decoded JSON at `path`; with `wait_s` (at most 60) the server may take that long to answer.

        Raises:
            ReaderError: by what went wrong: NotFound, Unauthorized, Unreachable, RequestRefused, LeaseLost.
        """
        return self._json("GET", path, headers={} if wait_s is None else {"Prefer": f"wait={wait_s}"})

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, answer_s: float = READ_S) -> Any:
        """The decoded JSON that answers a POST, for which the server may take `answer_s`; raises as `get` does."""
        return self._json("POST", path, answer_s, json=body)

    def upload(self, path: str, data: bytes, *, answer_s: float) -> Any:
        """The decoded JSON that answers a POST of bytes; see `post`."""
        return self._json("POST", path, answer_s, content=data, headers={"Content-Type": "application/octet-stream"})

    def delete(self, path: str, *, answer_s: float = READ_S) -> None:
        """Send a DELETE, whose answer may take `answer_s` seconds; raises as `get` does."""
        with self._mapped():
            response = self._client.delete(path, timeout=_timeout(answer_s))
        self._check(response)

    def status_and_json(self, path: str) -> tuple[int, Any]:
        """Status and decoded JSON of a GET, whatever the status.

        Raises:
            ReaderError: no answer, or one without JSON.
        """
        with self._mapped():
            response = self._client.get(path)
        if not response.is_success and not _is_json(response):
            self._check(response)
        return response.status_code, self._decode(response)

    def exchange(self, path: str, body: Mapping[str, Any], *, answer_s: float) -> tuple[int, str]:
        """Status and text that answer a POST, whatever the status. For servers that are no ema servers.

        Raises:
            Unreachable: no answer.
        """
        with self._mapped():
            response = self._client.post(path, json=body, timeout=_timeout(answer_s))
            return response.status_code, response.text

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """A successful response whose body is read in pieces; raises as `get` does."""
        with self._mapped(), self._client.stream("GET", path, headers=dict(headers)) as response:
            if not response.is_success:
                response.read()
                self._check(response)
            yield response

    def read(self, answer: Any, value_of: Callable[[Any], _Value]) -> _Value:
        """A decoded answer as a value.

        Raises:
            ReaderError: an ema server does not answer that.
        """
        try:
            return value_of(answer)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReaderError(f"{self.url} does not answer as an ema server does ({error!r}): check the URL") from error

    def close(self) -> None:
        self._client.close()

    def _json(self, method: str, path: str, answer_s: float = READ_S, **request: Any) -> Any:
        with self._mapped():
            response = self._client.request(method, path, timeout=_timeout(answer_s), **request)
        self._check(response)
        return self._decode(response)

    def _decode(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise ReaderError(f"{self.url} does not answer in JSON: is it an ema server?") from error

    def _check(self, response: httpx2.Response) -> None:
        """Raise the error that the response stands for, if it is one."""
        if response.is_success:
            return
        status, problem, moved = response.status_code, _problem(response), _moved(response)
        if problem is None:
            text = f"{self.url} answers {status} {response.reason_phrase}{_not_ours(response)}{moved}"
            if status == 401:
                raise Unauthorized(text)
            if status in _TRY_LATER:
                raise Unreachable(text)
            raise ReaderError(text)
        text = f"{problem['title']}: {problem['detail']}{moved}"
        code = problem["code"]
        if status == 401 and self._has_token:
            raise Unauthorized(
                f"{self.url} does not accept this token: use the server's with EMA_TOKEN or --token{moved}"
            )
        if status == 401:
            raise Unauthorized(f"{self.url} requires a token, and none was given: set EMA_TOKEN or use --token{moved}")
        if status == 404:
            raise RunUnreadable(text) if code == "run_unreadable" else NotFound(text)
        if status == 410:
            raise LeaseLost(text, code=code, status=status)
        if status == 422:
            raise WrongValue(text, code=code, status=status)
        if status in _TRY_LATER:
            raise Unreachable(f"{self.url} answers {status}: {text}")
        raise RequestRefused(text, code=code, status=status)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise Unreachable(f"nothing answers at {self.url}{self._through()}: {self._hint(error)}") from error
        except httpx2.ProxyError as error:
            raise Unreachable(f"cannot reach {self.url}{self._through()}: {error}") from error
        except (httpx2.ReadTimeout, httpx2.RemoteProtocolError) as error:
            if self._speaks_zeromq():
                raise UsageError(
                    f"{self.url} answers with ZeroMQ: this is the address for trainers; "
                    "use the one that ema serve prints as http"
                ) from error
            what = "no answer in time" if isinstance(error, httpx2.ReadTimeout) else str(error)
            raise Unreachable(f"the connection to {self.url}{self._through()} broke: {what}") from error
        except httpx2.HTTPError as error:
            what = str(error) or type(error).__name__
            raise Unreachable(f"the connection to {self.url}{self._through()} broke: {what}") from error

    def _through(self) -> str:
        return f" (through the proxy of {', '.join(self._proxies)})" if self._proxies else ""

    def _hint(self, error: httpx2.ConnectError) -> str:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            names = _variables_of(*_TLS_VARIABLES[:2])
            given = f" ({', '.join(f'{name} is {os.environ[name]}' for name in names)})" if names else ""
            return f"{text}; set SSL_CERT_FILE to the certificates of the authority that signed it{given}"
        if "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER" in text:
            return f"{text}; if the server speaks plain HTTP, the URL begins with http://"
        return f"{text}; is the server running, and is the address right?"

    def _speaks_zeromq(self) -> bool:
        """Whether the address sends ZeroMQ's greeting, as the port for trainers does."""
        if self._proxies or self._address.scheme != "http":
            return False
        try:
            with socket.create_connection((self._address.host, self._address.port or 80), _GREETING_S) as probe:
                return probe.recv(1) == _ZEROMQ_GREETING
        except OSError:
            return False


def _timeout(read_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(READ_S, connect=CONNECT_S, read=read_s)


def _needs_no_proxy(host: str) -> bool:
    """Whether the host is this machine or in `NO_PROXY`: then a proxy that cannot be used does not matter."""
    return _is_this_machine(host) or bool(proxy_bypass(host))


def _is_this_machine(host: str) -> bool:
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or _is_own(host)


def _is_own(host: str) -> bool:
    """Whether a numeric address is one of this machine: packets to such an address come from it. Sends nothing."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own: str = probe.getsockname()[0]
    except OSError:
        return False
    return own == address[0]


def _variables_of(*names: str) -> list[str]:
    """Those of the variables that are set, in either case."""
    return [name for name in os.environ if name.upper() in names and os.environ[name]]


def _proxy_variables(scheme: str) -> list[str]:
    return _variables_of(f"{scheme.upper()}_PROXY", "ALL_PROXY")


def _why_no_proxy(error: Exception) -> str:
    return "a SOCKS proxy needs the package socksio (pip install socksio)" if "socksio" in str(error) else str(error)


def _tls_context(scheme: str) -> ssl.SSLContext:
    """The certificates of the environment or the system. A bad variable matters only where TLS is spoken.

    Raises:
        UsageError: the certificates cannot be read; the text names the variables.
    """
    try:
        return _context_of(tuple(os.environ.get(name) for name in _TLS_VARIABLES))
    except OSError as error:  # an SSLError is one
        if scheme == "http":
            return httpx2.create_ssl_context(trust_env=False)
        given = ", ".join(f"{name}={os.environ[name]}" for name in _variables_of(*_TLS_VARIABLES))
        raise UsageError(
            f"TLS cannot be set up with {given}: {error.strerror or error}; correct or unset it"
        ) from error


@lru_cache(maxsize=8)
def _context_of(values: tuple[str | None, ...]) -> ssl.SSLContext:
    """The context for these values of the TLS variables; to read the system's certificates takes 20 ms."""
    return httpx2.create_ssl_context()


def _is_json(response: httpx2.Response) -> bool:
    return "json" in response.headers.get("content-type", "")


def _problem(response: httpx2.Response) -> dict[str, str] | None:
    """The problem in the body; None for an answer that an ema server does not give, such as a proxy's."""
    try:
        body = response.json()
        return {key: str(body[key]) for key in ("title", "detail", "code")}
    except (ValueError, KeyError, TypeError):
        return None


def _moved(response: httpx2.Response) -> str:
    """Where redirects led, if that is another server: on the way a POST becomes a GET and the token is left out."""
    if not response.history:
        return ""
    asked, answered = response.history[0].request.url, response.url
    same = (asked.scheme, asked.netloc) == (answered.scheme, answered.netloc)
    return "" if same else f"; it redirects to {answered.scheme}://{answered.netloc.decode()}: use that address"


def _not_ours(response: httpx2.Response) -> str:
    """Who sent an error that is not the ema server's, what it means, and the text of its page."""
    sender = response.headers.get("server")
    text = " ".join(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", response.text[:2000]).split())[:100]
    known = _NOT_OURS.get(response.status_code)
    said = f"; it says {text!r}" if text and known is None else ""
    return f", and not as an ema server does ({sender or 'a proxy or another program'}): {known or 'see its log'}{said}"
