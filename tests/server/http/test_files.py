"""The bytes of a version over HTTP: whole, in ranges, conditional, and through aliases."""

from __future__ import annotations

import base64
import hashlib

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


def test_a_file_is_served_whole_with_its_digest_as_validator(
    client: TestClient, version: Version, content: bytes
) -> None:
    response = client.get(address(version))

    digest = hashlib.sha256(content)
    assert response.status_code == 200
    assert response.content == content
    assert response.headers["etag"] == f'"{digest.hexdigest()}"'
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert response.headers["content-length"] == str(len(content))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert response.headers["x-ema-step"] == "100"
    assert response.headers["content-disposition"] == 'attachment; filename="digits-ema-0.9-step-100.safetensors"'


def test_other_files_are_saved_under_a_name_that_says_the_version_too(client: TestClient, version: Version) -> None:
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
def test_a_range_is_exactly_the_bytes_asked_for(
    client: TestClient, version: Version, content: bytes, wanted: str, part: slice
) -> None:
    response = client.get(address(version), headers={"Range": wanted})

    start = range(len(content))[part].start
    assert response.status_code == 206
    assert response.content == content[part]
    assert response.headers["content-range"] == f"bytes {start}-{start + len(content[part]) - 1}/{len(content)}"


@pytest.mark.parametrize("tag", ["{}", "W/{}", '"other", {}', "*"])
def test_a_client_that_has_the_file_gets_304_without_a_body(client: TestClient, version: Version, tag: str) -> None:
    etag = f'"{version.files[0].sha256}"'

    response = client.get(address(version), headers={"If-None-Match": tag.format(etag)})

    assert response.status_code == 304
    assert response.content == b""
    assert response.headers["etag"] == etag


def test_another_validator_gets_the_file(client: TestClient, version: Version, content: bytes) -> None:
    assert client.get(address(version), headers={"If-None-Match": '"other"'}).content == content


def test_if_range_with_the_same_digest_resumes_and_with_another_starts_over(
    client: TestClient, version: Version, content: bytes
) -> None:
    etag = f'"{version.files[0].sha256}"'

    same = client.get(address(version), headers={"Range": "bytes=10-", "If-Range": etag})
    other = client.get(address(version), headers={"Range": "bytes=10-", "If-Range": '"stale"'})

    assert (same.status_code, same.content) == (206, content[10:])
    assert (other.status_code, other.content) == (200, content)


def test_a_range_outside_the_file_is_a_416_problem_that_tells_the_size(
    client: TestClient, version: Version, content: bytes
) -> None:
    response = client.get(address(version), headers={"Range": "bytes=999999999-"})

    assert response.status_code == 416
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["content-range"] == f"bytes */{len(content)}"
    assert response.json()["code"] == "range_not_satisfiable"


def test_a_range_that_is_none_is_a_400_problem(client: TestClient, version: Version) -> None:
    response = client.get(address(version), headers={"Range": "elephants=1-2"})

    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "bad_range"


@pytest.mark.parametrize("rev", ["latest", "step-100"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_alias_is_redirected_by_a_relative_address_that_must_not_be_cached(
    client: TestClient, version: Version, rev: str, method: str
) -> None:
    response = client.request(method, address(version, rev))

    assert response.status_code == 307
    assert response.headers["location"] == f"../../{version.id}/files/model.safetensors"
    assert response.headers["cache-control"] == "no-cache"


def test_following_an_alias_ends_at_the_newest_version(client: TestClient, served: Served, version: Version) -> None:
    newer = served.publish("digits", 200).versions[0]

    response = client.get(address(version, "latest"), follow_redirects=True)

    assert response.content == (newer.folder / "model.safetensors").read_bytes()
    assert str(response.url).endswith(f"/{newer.id}/files/model.safetensors")


@pytest.mark.parametrize("wanted", ["bytes=1-", "bytes=-5", "bytes=0-4,10-20", "bytes=100-200"])
def test_a_mid_file_range_on_an_alias_is_refused_and_names_the_version(
    client: TestClient, version: Version, wanted: str
) -> None:
    response = client.get(address(version, "latest"), headers={"Range": wanted})

    assert response.status_code == 409
    assert response.json()["code"] == "alias_range"
    assert address(version) in response.json()["detail"]


def test_a_range_from_the_start_or_with_the_right_digest_may_use_an_alias(client: TestClient, version: Version) -> None:
    etag = f'"{version.files[0].sha256}"'

    from_start = client.get(address(version, "latest"), headers={"Range": "bytes=0-"})
    proven = client.get(address(version, "latest"), headers={"Range": "bytes=5-", "If-Range": etag})
    stale = client.get(address(version, "latest"), headers={"Range": "bytes=5-", "If-Range": '"other"'})

    assert [from_start.status_code, proven.status_code, stale.status_code] == [307, 307, 409]


def test_a_file_cut_short_on_the_disk_is_reported_instead_of_served(client: TestClient, version: Version) -> None:
    path = version.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    response = client.get(address(version))

    assert (response.status_code, response.json()["code"]) == (500, "damaged")


def test_a_version_pruned_between_listing_and_download_is_not_found(
    client: TestClient, served: Served, version: Version
) -> None:
    (version.folder / "model.safetensors").unlink()

    response = client.get(address(version))

    assert (response.status_code, response.json()["code"]) == (404, "version_not_found")


def test_a_version_is_held_while_it_is_downloaded_and_a_minute_longer(
    client: TestClient, served: Served, version: Version
) -> None:
    generation = served.catalog.generations("digits")[0]
    client.head(address(version))

    assert not served.catalog.remove(generation)
