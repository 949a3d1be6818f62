"""The read routes of the Hugging Face Hub, as its clients use them, and their errors."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ema_server.evaluation.metric_store import Report, Subject
from ema_server.http.app import create_app
from ema_server.http.hub.card import ledger_digest
from ema_server.storage.catalog import Version
from support.served import Served

REPO = "digits/ema-0.9"
API = f"/api/models/{REPO}"
COMPANIONS = {"tokenizer.json": b"{}", "extra/merges.txt": b"a b\n"}
NOWHERE = "0" * 40


@pytest.fixture
def version(served: Served) -> Version:
    served.publish("digits", 100)
    return served.publish("digits", 200, size=2000, companions=COMPANIONS).versions[0]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    """A server with a token, and one version."""
    served = Served(tmp_path / "guarded", token="secret")
    served.publish("digits", 100)
    with TestClient(create_app(served.services), follow_redirects=False) as client:
        yield client
    served.close()


def scored(served: Served, version: Version, task: str, at: str, **metrics: float) -> None:
    subject = Subject("digits", "ema-0.9", version.id, version.step)
    served.metrics.add(Report(subject, task, at, metrics, None, None, None, at)).result(20.0)


def git_oid(content: bytes) -> str:
    made = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True, timeout=30)
    return made.stdout.decode().strip()


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({}, {"digits/raw", "digits/ema-0.9", "vision/raw"}),
        ({"author": "digits"}, {"digits/raw", "digits/ema-0.9"}),
        ({"search": "RAW"}, {"digits/raw", "vision/raw"}),
        ({"search": "raw", "author": "vision"}, {"vision/raw"}),
        ({"author": "none"}, set()),
    ],
)
def test_models_are_the_averages_with_a_version(
    client: TestClient, served: Served, query: dict[str, str], names: set[str]
) -> None:
    newest = served.publish("digits", 100, ["raw", "ema-0.9"])
    served.publish("vision", 5, ["raw"])
    served.show("empty", None, ["raw"])

    listed = client.get("/api/models", params=query).json()

    assert {each["id"] for each in listed} == names
    ids = {f"{version.run}/{version.average}": version.id for version in newest.versions}
    assert {each["id"]: each["sha"] for each in listed if each["author"] == "digits"}.items() <= ids.items()
    assert len(client.get("/api/models", params={**query, "limit": 1}).json()) == min(1, len(names))


def test_model_info_has_the_newest_version_and_its_files(client: TestClient, version: Version) -> None:
    info = client.get(API).json()

    assert (info["id"], info["author"], info["sha"], info["private"]) == (REPO, "digits", version.id, False)
    assert info["lastModified"] == version.created
    assert [each["rfilename"] for each in info["siblings"]] == [
        "model.safetensors",
        "version.json",
        "tokenizer.json",
        "extra/merges.txt",
        "README.md",
    ]
    assert all(list(each) == ["rfilename"] for each in info["siblings"])


def test_blobs_adds_sizes_and_ids_of_the_files(client: TestClient, version: Version) -> None:
    siblings = client.get(API, params={"blobs": "True"}).json()["siblings"]
    listed = {entry["path"]: entry for entry in client.get(f"{API}/tree/main", params={"recursive": True}).json()}

    for each in siblings:
        entry = listed[each["rfilename"]]
        assert (each["size"], each["blobId"]) == (entry["size"], entry["oid"])
        assert each.get("lfs", {}).get("sha256") == entry.get("lfs", {}).get("oid")


@pytest.mark.parametrize("rev", ["main", "HEAD", "latest", "step-200", "ID"])
def test_revision_names_a_version(client: TestClient, version: Version, rev: str) -> None:
    info = client.get(f"{API}/revision/{version.id if rev == 'ID' else rev}").json()

    assert info["sha"] == version.id


def test_repository_is_private_where_a_token_is_needed(guarded: TestClient) -> None:
    assert guarded.get(API, headers={"Authorization": "Bearer secret"}).json()["private"] is True


@pytest.mark.parametrize("path", [API, f"/{REPO}/resolve/main/model.safetensors", f"{API}/refs"])
@pytest.mark.parametrize("token", [{}, {"Authorization": "Bearer hf_other"}])
def test_missing_token_is_named_in_the_message(guarded: TestClient, path: str, token: dict[str, str]) -> None:
    response = guarded.get(path, headers=token)

    assert response.status_code == 401
    assert "HF_TOKEN" in response.headers["x-error-message"]
    assert "x-error-code" not in response.headers


def test_refs_are_main_and_a_tag_for_each_step(client: TestClient, served: Served, version: Version) -> None:
    first = served.catalog.find("digits", "ema-0.9", "step-100")
    assert first is not None

    refs = client.get(f"{API}/refs", params={"include_prs": 1}).json()

    assert refs["branches"] == [{"name": "main", "ref": "refs/heads/main", "targetCommit": version.id}]
    assert refs["tags"] == [
        {"name": "step-200", "ref": "refs/tags/step-200", "targetCommit": version.id},
        {"name": "step-100", "ref": "refs/tags/step-100", "targetCommit": first.id},
    ]
    assert refs["converts"] == refs["pullRequests"] == []


def test_tag_of_a_step_with_two_versions_names_the_newer_one(client: TestClient, served: Served) -> None:
    served.publish("digits", 100)
    newer = served.publish("digits", 100).versions[0]

    tags = client.get(f"{API}/refs").json()["tags"]

    assert [tag["targetCommit"] for tag in tags] == [newer.id]
    assert client.get(f"{API}/revision/step-100").json()["sha"] == newer.id


def test_average_without_a_version_has_no_refs(client: TestClient, served: Served) -> None:
    served.show("digits", None, ["ema-0.9"])

    assert client.get(f"{API}/refs").json()["branches"] == []
    response = client.get(API)
    assert (response.status_code, response.headers["x-error-code"]) == (404, "RevisionNotFound")


@pytest.mark.parametrize(
    ("path", "recursive", "names"),
    [
        ("", "false", ["extra", "model.safetensors", "version.json", "tokenizer.json", "README.md"]),
        (
            "",
            "true",
            ["extra", "model.safetensors", "version.json", "tokenizer.json", "extra/merges.txt", "README.md"],
        ),
        ("/extra", "false", ["extra/merges.txt"]),
    ],
)
def test_tree_lists_files_and_folders(
    client: TestClient, version: Version, path: str, recursive: str, names: list[str]
) -> None:
    listed = client.get(f"{API}/tree/main{path}", params={"recursive": recursive, "expand": "false"}).json()

    assert [entry["path"] for entry in listed] == names
    assert {entry["path"] for entry in listed if entry["type"] == "directory"} == set(names) & {"extra"}


@pytest.mark.process
def test_ids_of_files_are_those_of_git_and_git_lfs(client: TestClient, version: Version) -> None:
    listed = {entry["path"]: entry for entry in client.get(f"{API}/tree/main").json()}
    readme = client.get(f"/{REPO}/resolve/{version.id}/README.md").content

    weights = version.files[0]
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.sha256}\nsize {weights.size}\n".encode()
    entry = listed["model.safetensors"]
    assert entry["oid"] == git_oid(pointer)
    assert entry["lfs"] == {"oid": weights.sha256, "size": weights.size, "pointerSize": len(pointer)}
    assert listed["README.md"] == {
        "type": "file",
        "path": "README.md",
        "size": len(readme),
        "oid": git_oid(readme),
    }


@pytest.mark.parametrize("kind", ["data", "json"])
@pytest.mark.parametrize("expand", [True, False])
def test_paths_info_leaves_out_what_does_not_exist(
    client: TestClient, version: Version, kind: str, expand: bool
) -> None:
    body: Any = {"paths": ["model.safetensors", "extra", "none.bin"], "expand": expand}
    given: dict[str, Any] = {kind: body}

    listed = client.post(f"{API}/paths-info/main", **given).json()

    assert {entry["path"] for entry in listed} == {"model.safetensors", "extra"}
    commits = {entry.get("lastCommit", {}).get("id") for entry in listed}
    assert commits == {version.id if expand else None}


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"paths": 1}', b"\xff", b"[" * 100_000])
def test_paths_info_without_paths_is_a_422(client: TestClient, version: Version, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(f"{API}/paths-info/main", content=body, headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "invalid")


def test_expanded_tree_has_the_version_as_last_commit(client: TestClient, version: Version) -> None:
    listed = client.get(f"{API}/tree/main", params={"expand": True, "recursive": True}).json()

    last = {"id": version.id, "title": "step 200", "date": version.created}
    assert [entry["lastCommit"] for entry in listed] == [last] * 6


def test_raw_is_another_address_of_a_file(client: TestClient, version: Version) -> None:
    response = client.head(f"/{REPO}/raw/main/model.safetensors")

    assert response.headers["location"] == f"/{REPO}/resolve/{version.id}/model.safetensors"
    missing = client.head(f"/{REPO}/raw/main/none")
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "EntryNotFound")


def test_file_is_sent_with_the_headers_that_clients_need(client: TestClient, version: Version) -> None:
    path = f"/{REPO}/resolve/{version.id}/model.safetensors"
    head, got = client.head(path), client.get(path)

    content = (version.folder / "model.safetensors").read_bytes()
    digest = f'"{hashlib.sha256(content).hexdigest()}"'
    assert got.content == content
    for response in (head, got):
        assert response.status_code == 200
        assert response.headers["x-repo-commit"] == version.id
        assert response.headers["etag"] == response.headers["x-linked-etag"] == digest
        assert response.headers["content-length"] == response.headers["x-linked-size"] == str(len(content))
        assert "content-encoding" not in response.headers
        assert not [name for name in response.headers if name.startswith("x-xet")]


@pytest.mark.parametrize("name", ["model.safetensors", "extra/merges.txt", "README.md"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_branch_is_redirected_to_the_version(client: TestClient, version: Version, name: str, method: str) -> None:
    response = client.request(method, f"/{REPO}/resolve/main/{name}", headers={"Accept-Encoding": "gzip, deflate"})

    target = f"/{REPO}/resolve/{version.id}/{name}"
    assert (response.status_code, response.headers["location"]) == (307, target)
    assert response.headers["x-repo-commit"] == version.id
    reached = client.head(target)
    for header in ("x-linked-etag", "x-linked-size"):
        assert response.headers[header] == reached.headers[header]


@pytest.mark.parametrize(
    ("prefix", "kept"),
    [("/team/ema", "/team/ema"), ("/team/", "/team"), ("", "")]
    + [(bad, "") for bad in ("//evil.example", "team", "/a//b", "/a?b", "/a b", "https://evil.example", "/")],
)
def test_redirect_stays_behind_the_prefix_of_a_proxy(
    client: TestClient, version: Version, prefix: str, kept: str
) -> None:
    path = f"/{REPO}/resolve/main/model.safetensors"
    response = client.head(path, headers={"X-Forwarded-Prefix": prefix})

    assert response.headers["location"] == f"{kept}/{REPO}/resolve/{version.id}/model.safetensors"


@pytest.mark.parametrize("wanted", ["bytes=0-", "bytes=0-100000", "bytes=8-99", "bytes=-50", "bytes=8-9,20-29"])
def test_range_with_an_end_is_redirected_from_a_branch(client: TestClient, version: Version, wanted: str) -> None:
    path = f"/{REPO}/resolve/main/model.safetensors"

    assert client.get(path, headers={"Range": wanted}).status_code == 307
    followed = client.get(path, headers={"Range": wanted}, follow_redirects=True)
    assert followed.status_code == 206


@pytest.mark.parametrize("wanted", ["bytes=8-", "bytes=8-9,20-"])
def test_resume_through_a_branch_is_refused(client: TestClient, version: Version, wanted: str) -> None:
    path = f"/{REPO}/resolve/main/model.safetensors"
    response = client.get(path, headers={"Range": wanted})

    assert (response.status_code, response.json()["code"]) == (409, "alias_range")
    assert f"/resolve/{version.id}/model.safetensors" in response.json()["detail"]
    etag = f'"{version.files[0].sha256}"'
    assert client.get(path, headers={"Range": wanted, "If-Range": etag}).status_code == 307


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/gpt2", "RepoNotFound"),
        ("/api/models/org/model", "RepoNotFound"),
        ("/api/models/digits/none/refs", "RepoNotFound"),
        ("/api/models/gpt2/tree/main", "RepoNotFound"),
        ("/api/datasets/org/data/revision/main", "RepoNotFound"),
        ("/gpt2/resolve/main/config.json", "RepoNotFound"),
        ("/org/model/resolve/main/config.json", "RepoNotFound"),
        ("/datasets/org/data/resolve/main/train.parquet", "RepoNotFound"),
        (f"{API}/revision/v1", "RevisionNotFound"),
        (f"{API}/revision/refs%2Fpr%2F1", "RevisionNotFound"),
        (f"{API}/revision/{NOWHERE}", "RevisionNotFound"),
        (f"{API}/tree/step-7", "RevisionNotFound"),
        (f"/{REPO}/resolve/{NOWHERE}/model.safetensors", "RevisionNotFound"),
        (f"/{REPO}/resolve/refs%2Fpr%2F1/model.safetensors", "RevisionNotFound"),
        (f"{API}/tree/main/additional_chat_templates", "EntryNotFound"),
        (f"{API}/tree/main/model.safetensors", "EntryNotFound"),
        (f"/{REPO}/resolve/main/config.json", "EntryNotFound"),
        (f"/{REPO}/resolve/main/a/b/c.json", "EntryNotFound"),
        (f"/{REPO}/resolve/main/..%2f..%2fLOCK", "EntryNotFound"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_error_has_the_word_that_clients_distinguish(
    client: TestClient, version: Version, method: str, path: str, code: str
) -> None:
    response = client.request(method, path)

    assert (response.status_code, response.headers["x-error-code"]) == (404, code)
    assert response.headers["x-error-message"]
    assert response.headers.get("x-repo-commit") == (version.id if code == "EntryNotFound" else None)


def test_error_message_in_a_header_is_printable(client: TestClient, version: Version) -> None:
    response = client.get("/api/models/a%0d%0aX-Injected:%201/b\u00e9\u2026")

    message = response.headers["x-error-message"]
    assert response.status_code == 404
    assert message.isascii()
    assert message.isprintable()
    assert "x-injected" not in response.headers


def test_other_addresses_have_no_headers_of_the_hub(client: TestClient, version: Version) -> None:
    response = client.get("/v1/runs/none")

    assert response.status_code == 404
    assert not [name for name in response.headers if name.startswith("x-error")]


def test_pruned_version_is_a_missing_revision(client: TestClient, served: Served, version: Version) -> None:
    (version.folder / "model.safetensors").unlink()

    response = client.get(f"/{REPO}/resolve/{version.id}/model.safetensors")

    assert (response.status_code, response.headers["x-error-code"]) == (404, "RevisionNotFound")


def test_damaged_version_is_an_error_of_the_server(client: TestClient, version: Version) -> None:
    (version.folder / "version.json").write_bytes(b"{")

    response = client.get(API)

    assert (response.status_code, response.json()["code"]) == (500, "damaged")


def test_download_is_recorded_so_that_its_metrics_are_accepted(
    client: TestClient, served: Served, version: Version
) -> None:
    client.head(f"/{REPO}/resolve/{version.id}/model.safetensors")
    assert served.metrics.find("digits", "ema-0.9", version.id).result(20.0) is None

    client.get(f"/{REPO}/resolve/{version.id}/model.safetensors")

    assert served.metrics.find("digits", "ema-0.9", version.id).result(20.0) is not None


def test_card_names_rule_step_version_and_ledger(client: TestClient, version: Version) -> None:
    response = client.get(f"/{REPO}/resolve/{version.id}/README.md")
    written = json.loads((version.folder / "version.json").read_text())

    canonical = json.dumps(written["ledger"], sort_keys=True, separators=(",", ":"))
    assert response.headers["content-type"].startswith("text/markdown")
    assert f"| ledger | `sha256:{hashlib.sha256(canonical.encode()).hexdigest()}` |" in response.text
    for part in ("`ema:0.9`", "| step | 200 |", f"`{version.id}`", f"`sha256:{version.files[0].sha256}`"):
        assert part in response.text
    etag = response.headers["etag"]
    assert etag == f'"{hashlib.sha256(response.content).hexdigest()}"'
    again = client.get(f"/{REPO}/resolve/{version.id}/README.md", headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=5-9999", slice(5, None)),
    ],
)
def test_range_of_the_card_is_exactly_the_requested_bytes(
    client: TestClient, version: Version, wanted: str, part: slice
) -> None:
    path = f"/{REPO}/resolve/{version.id}/README.md"
    whole = client.get(path)

    response = client.get(path, headers={"Range": wanted})

    start, size = range(len(whole.content))[part].start, len(whole.content)
    assert (response.status_code, response.content) == (206, whole.content[part])
    assert response.headers["content-range"] == f"bytes {start}-{start + len(response.content) - 1}/{size}"
    assert response.headers["x-linked-size"] == str(size)
    stale = client.get(path, headers={"Range": wanted, "If-Range": '"other"'})
    assert (stale.status_code, stale.content) == (200, whole.content)
    assert client.head(path, headers={"Range": wanted}).headers["content-length"] == str(size)


def test_range_outside_the_card_is_a_416_and_several_are_the_whole(client: TestClient, version: Version) -> None:
    path = f"/{REPO}/resolve/{version.id}/README.md"

    outside = client.get(path, headers={"Range": "bytes=99999-"})
    several = client.get(path, headers={"Range": "bytes=0-1,5-6"})

    assert (outside.status_code, outside.json()["code"]) == (416, "range_not_satisfiable")
    assert (several.status_code, several.content) == (200, client.get(path).content)


@pytest.mark.parametrize(
    ("files", "library", "call"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "transformers", "AutoModel.from_pretrained"),
        ({"config.json": b'{"architecture": "resnet18"}'}, "timm", "timm.create_model"),
        (
            {"config.json": b'{"_class_name": "UNet2DModel", "_diffusers_version": "0"}'},
            "diffusers",
            "diffusers.UNet2DModel.from_pretrained",
        ),
        ({"adapter_config.json": b"{}", "config.json": b'{"model_type": "llama"}'}, "peft", "PeftModel"),
        ({"config.json": b'{"own": 1}'}, None, "hf_hub_download"),
        ({}, None, "hf_hub_download"),
    ],
)
def test_card_says_which_library_loads_the_model(
    client: TestClient, served: Served, files: dict[str, bytes], library: str | None, call: str
) -> None:
    served.publish("digits", 100, companions=files)

    assert client.get(API).json().get("library_name") == library
    assert call in client.get(f"/{REPO}/resolve/main/README.md", follow_redirects=True).text


def test_readme_of_the_trainer_takes_the_place_of_the_card(client: TestClient, served: Served) -> None:
    served.publish("digits", 100, companions={"README.md": b"# Mine\n"})

    names = [each["rfilename"] for each in client.get(API).json()["siblings"]]
    assert names.count("README.md") == 1
    assert client.get(f"/{REPO}/resolve/main/README.md", follow_redirects=True).text == "# Mine\n"


def test_scores_are_in_the_card_data_and_the_files_stay(client: TestClient, served: Served, version: Version) -> None:
    tree = client.get(f"{API}/tree/main").json()
    assert "model-index" not in client.get(API).json()["cardData"]
    scored(served, version, "default", "2026-01-01T00:00:00Z", accuracy=0.5)
    scored(served, version, "default", "2026-01-02T00:00:00Z", accuracy=0.75, loss=1.0)
    scored(served, version, "robust", "2026-01-01T00:00:00Z", accuracy=0.25)

    results: list[dict[str, Any]] = client.get(API).json()["cardData"]["model-index"][0]["results"]

    found = {each["task"]["name"]: {one["name"]: one["value"] for one in each["metrics"]} for each in results}
    assert found == {"default": {"accuracy": 0.75, "loss": 1.0}, "robust": {"accuracy": 0.25}}
    assert client.get(f"{API}/tree/main").json() == tree
    assert "model-index" not in client.get(f"{API}/revision/step-100").json()["cardData"]


def test_model_info_needs_no_scores(client: TestClient, served: Served, version: Version) -> None:
    def drop(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE reports")

    served.metrics.submit(drop).result(20.0)

    assert client.get(API).json()["sha"] == version.id


def test_derived_version_has_the_ledgers_of_its_parts_or_none() -> None:
    assert ledger_digest({"derived": {"kind": "synthesized"}}) is None
    parts = [{"average": "raw", "weight": 1.0}]
    assert ledger_digest({"derived": {"kind": "blend", "ledgers": parts}}) == ledger_digest({"ledger": parts})
