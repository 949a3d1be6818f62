"""The bytes of a version over HTTP: whole, in ranges, conditional, and through aliases."""

from __future__ import annotations

import base64
import hashlib

import httpx2
import pytest
from starlette.testclient import TestClient

from ema_server.storage.catalog import Version
from support.served import Served

BASE = "/v1/runs/digits/averages/ema-0.9/versions"


@pytest.fixture
def version(served: Served) -> Version:
    return served.publish("digits", 100, size=2000).versions[0]


@pytest.fixture
def content(version: Version) -> bytes:
    return (version.folder / "model.safetensors").read_bytes()


def address(version: Version, rev: str | None = None) -> str:
    return f"{BASE}/{rev or version.id}/files/model.safetensors"


def test_file_is_served_whole_with_its_digest_as_validator(
    client: TestClient, version: Version, content: bytes
) -> None:
    response = client.get(address(version))

    digest = hashlib.sha256(content)
    assert response.status_code == 200
    assert response.content == content
    assert response.headers["etag"] == f'"{digest.hexdigest()}"'
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert response.headers["digest"] == f"sha-256={base64.b64encode(digest.digest()).decode()}"
    assert response.headers["content-length"] == str(len(content))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert response.headers["x-ema-step"] == "100"
    assert response.headers["content-disposition"] == 'attachment; filename="digits-ema-0.9-step-100.safetensors"'


def test_other_files_are_saved_under_a_name_with_the_version(client: TestClient, version: Version) -> None:
    response = client.get(f"{BASE}/{version.id}/files/version.json")

    assert response.headers["content-disposition"] == 'attachment; filename="digits-ema-0.9-step-100-version.json"'
    assert response.json()["id"] == version.id


def test_head_sends_the_headers_of_get_and_no_body(client: TestClient, version: Version) -> None:
    got, head = client.get(address(version)), client.head(address(version))

    names = ("etag", "content-length", "accept-ranges", "cache-control", "content-disposition", "repr-digest")
    assert head.status_code == 200
    assert head.content == b""
    assert {name: head.headers[name] for name in names} == {name: got.headers[name] for name in names}


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-", slice(0, None)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=1000-", slice(1000, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-999999999", slice(5, None)),
    ],
)
def test_range_is_exactly_the_requested_bytes(
    client: TestClient, version: Version, content: bytes, wanted: str, part: slice
) -> None:
    response = client.get(address(version), headers={"Range": wanted})

    start = range(len(content))[part].start
    assert response.status_code == 206
    assert response.content == content[part]
    assert response.headers["content-range"] == f"bytes {start}-{start + len(content[part]) - 1}/{len(content)}"


@pytest.mark.parametrize("tag", ["{}", "W/{}", '"other", {}', "*"])
def test_client_that_has_the_file_gets_304_without_a_body(client: TestClient, version: Version, tag: str) -> None:
    etag = f'"{version.files[0].sha256}"'

    response = client.get(address(version), headers={"If-None-Match": tag.format(etag)})

    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == etag


def test_another_validator_gets_the_file(client: TestClient, version: Version, content: bytes) -> None:
    assert client.get(address(version), headers={"If-None-Match": '"other"'}).content == content


def test_if_range_resumes_only_with_the_same_digest(client: TestClient, version: Version, content: bytes) -> None:
    etag = f'"{version.files[0].sha256}"'

    same = client.get(address(version), headers={"Range": "bytes=10-", "If-Range": etag})
    other = client.get(address(version), headers={"Range": "bytes=10-", "If-Range": '"stale"'})

    assert (same.status_code, same.content) == (206, content[10:])
    assert (other.status_code, other.content) == (200, content)


def test_range_outside_the_file_is_a_416_problem_with_the_size(
    client: TestClient, version: Version, content: bytes
) -> None:
    response = client.get(address(version), headers={"Range": "bytes=999999999-"})

    assert response.status_code == 416
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["content-range"] == f"bytes */{len(content)}"
    assert response.json()["code"] == "range_not_satisfiable"


@pytest.mark.parametrize(
    "wanted", ["bytes=", "bytes=-", "bytes=1", "bytes=7-3", "bytes=a-b", "bytes=0-1,x", "bytes=1--2"]
)
def test_malformed_byte_range_is_a_400_problem(client: TestClient, version: Version, wanted: str) -> None:
    response = client.get(address(version), headers={"Range": f"bytes={wanted}"})

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "bad_range"


@pytest.mark.parametrize("rev", ["latest", "step-100"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_alias_redirect_is_relative_and_not_cacheable(
    client: TestClient, version: Version, rev: str, method: str
) -> None:
    response = client.request(method, address(version, rev))

    assert response.status_code == 307
    assert response.headers["location"] == f"../../{version.id}/files/model.safetensors"
    assert response.headers["cache-control"] == "no-cache"


def test_alias_ends_at_the_newest_version(client: TestClient, served: Served, version: Version) -> None:
    newer = served.publish("digits", 200).versions[0]

    response = client.get(address(version, "latest"), follow_redirects=True)

    assert response.content == (newer.folder / "model.safetensors").read_bytes()
    assert str(response.url).endswith(f"/{newer.id}/files/model.safetensors")


@pytest.mark.parametrize("wanted", ["bytes=1-", "bytes=-5", "bytes=0-4,10-20", "bytes=100-200"])
def test_mid_file_range_on_an_alias_is_refused_and_names_the_version(
    client: TestClient, version: Version, wanted: str
) -> None:
    response = client.get(address(version, "latest"), headers={"Range": wanted})

    assert response.status_code == 409
    assert response.json()["code"] == "alias_range"
    assert f"…/versions/{version.id}/files/model.safetensors" in response.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-"},
        {"Range": "elephants=5-"},
        {"Range": "bytes=5-", "If-Range": '"another version"'},
        {"Range": "bytes=5-", "If-Match": '"another version"'},
    ],
)
def test_alias_redirects_a_range_that_cannot_splice_two_versions(
    client: TestClient, version: Version, headers: dict[str, str]
) -> None:
    assert client.get(address(version, "latest"), headers=headers).status_code == 307


def test_part_of_another_version_is_not_continued_through_an_alias(
    client: TestClient, served: Served, version: Version
) -> None:
    old = f'"{version.files[0].sha256}"'
    newer = served.publish("digits", 200, size=2000).versions[0]
    content = (newer.folder / "model.safetensors").read_bytes()

    def resume(**headers: str) -> httpx2.Response:
        headers = {"Range": "bytes=5-", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return client.get(address(newer, "latest"), headers=headers, follow_redirects=True)

    stale, refused, same = resume(If_Range=old), resume(If_Match=old), resume(If_Range=f'"{newer.files[0].sha256}"')

    assert (stale.status_code, stale.content) == (200, content), "the whole of the new version"
    assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
    assert (same.status_code, same.content) == (206, content[5:])


@pytest.mark.parametrize("wanted", ["elephants=1-2", "items=0-", "nonsense", "bytes 0-5"])
def test_range_of_another_unit_is_ignored(client: TestClient, version: Version, content: bytes, wanted: str) -> None:
    response = client.get(address(version), headers={"Range": wanted})

    assert (response.status_code, response.content) == (200, content)


def test_unsatisfiable_ranges_among_several_are_dropped(client: TestClient, version: Version, content: bytes) -> None:
    one = client.get(address(version), headers={"Range": "bytes=5-9,99999999-,-0"})
    two = client.get(address(version), headers={"Range": "bytes=5-9, 20-29, 99999999-99999999999"})
    none = client.get(address(version), headers={"Range": "bytes=99999999-,-0"})
    many = client.get(address(version), headers={"Range": "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 400, 2))})

    assert (one.status_code, one.content) == (206, content[5:10])
    assert (two.status_code, two.headers["content-type"].partition(";")[0]) == (206, "multipart/byteranges")
    assert content[5:10] in two.content
    assert content[20:30] in two.content
    assert (none.status_code, none.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert (many.status_code, many.content) == (200, content), "more ranges than are worth it"


def test_head_ignores_a_range(client: TestClient, version: Version, content: bytes) -> None:
    response = client.head(address(version), headers={"Range": "bytes=5-9"})

    assert (response.status_code, response.headers["content-length"]) == (200, str(len(content)))


_PAST, _FUTURE = "Mon, 01 Jan 2024 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-Match": "ETAG"}, 200),
        ({"If-Match": '"other", ETAG'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": "W/ETAG"}, 412),
        ({"If-Unmodified-Since": _FUTURE}, 200),
        ({"If-Unmodified-Since": "MODIFIED"}, 200),
        ({"If-Unmodified-Since": _PAST}, 412),
        ({"If-Unmodified-Since": "yesterday"}, 200),
        ({"If-Match": "ETAG", "If-Unmodified-Since": _PAST}, 200),
        ({"If-Modified-Since": _PAST}, 200),
        ({"If-Modified-Since": "MODIFIED"}, 304),
        ({"If-Modified-Since": _FUTURE}, 304),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-None-Match": '"other"', "If-Modified-Since": _FUTURE}, 200),
        ({"If-None-Match": "ETAG", "If-Modified-Since": _PAST}, 304),
        ({"If-Match": '"other"', "If-None-Match": "ETAG"}, 412),
        ({"If-Match": '"other"', "Range": "bytes=99999999-"}, 412),
        ({"If-Range": "ETAG", "Range": "bytes=5-9"}, 206),
        ({"If-Range": "MODIFIED", "Range": "bytes=5-9"}, 206),
        ({"If-Range": "W/ETAG", "Range": "bytes=5-9"}, 200),
        ({"If-Range": _PAST, "Range": "bytes=5-9"}, 200),
        ({"If-Range": '"other"', "Range": "bytes=99999999-"}, 200),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_preconditions_are_evaluated_in_rfc_9110_order(
    client: TestClient, version: Version, method: str, headers: dict[str, str], status: int
) -> None:
    modified = client.head(address(version)).headers["last-modified"]
    etag = f'"{version.files[0].sha256}"'
    sent = {name: value.replace("ETAG", etag).replace("MODIFIED", modified) for name, value in headers.items()}

    response = client.request(method, address(version), headers=sent)

    assert response.status_code == (200 if method == "HEAD" and status == 206 else status)
    if response.status_code == 304:
        assert (response.content, response.headers["etag"]) == (b"", etag)


def test_if_match_of_another_version_is_412(client: TestClient, version: Version) -> None:
    place = f"{BASE}/{version.id}"

    assert client.get(place, headers={"If-Match": f'"{version.id}"'}).status_code == 200
    assert client.get(place, headers={"If-Match": '"other"'}).json()["code"] == "precondition_failed"


def test_truncated_file_is_reported_instead_of_served(client: TestClient, version: Version) -> None:
    path = version.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    response = client.get(address(version))

    assert (response.status_code, response.json()["code"]) == (500, "damaged")


def test_version_pruned_between_listing_and_download_is_not_found(
    client: TestClient, served: Served, version: Version
) -> None:
    (version.folder / "model.safetensors").unlink()

    response = client.get(address(version))

    assert (response.status_code, response.json()["code"]) == (404, "version_not_found")


def test_version_is_held_during_a_download_and_a_minute_longer(
    client: TestClient, served: Served, version: Version
) -> None:
    generation = served.catalog.generations("digits")[0]
    client.head(address(version))

    assert not served.catalog.remove(generation)
