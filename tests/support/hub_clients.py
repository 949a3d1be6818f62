"""Clients of the Hugging Face Hub, as a program that prints JSON: python hub_clients.py CLIENT ARGUMENT...

They read HF_ENDPOINT when they are imported, so each runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of the bytes of each tensor."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in state.items()
    }


def api(repo: str) -> dict[str, Any]:
    """What the calls of `HfApi` return."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    def error(call: Callable[[], Any]) -> str:
        try:
            call()
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as raised:
            return next(kind.__name__ for kind in type(raised).__mro__ if kind.__name__ in ERRORS)
        return "none"

    hub = HfApi()
    info, refs = hub.model_info(repo, files_metadata=True), hub.list_repo_refs(repo)
    card = info.card_data
    metadata = hub.get_safetensors_metadata(repo)
    return {
        "listed": [model.id for model in hub.list_models(author=repo.partition("/")[0])],
        "sha": info.sha,
        "scores": {} if card is None else {one.metric_type: one.metric_value for one in card.eval_results or ()},
        "siblings": {one.rfilename: one.size for one in info.siblings or ()},
        "branches": {ref.name: ref.target_commit for ref in refs.branches},
        "tags": {ref.name: ref.target_commit for ref in refs.tags},
        "files": hub.list_repo_files(repo),
        "tree": sorted(entry.path for entry in hub.list_repo_tree(repo)),
        "paths_info": [entry.path for entry in hub.get_paths_info(repo, ["config.json", "none"])],
        "tensors": sorted(metadata.weight_map),
        "parameters": sum(metadata.parameter_count.values()),
        "exist": [
            hub.repo_exists(repo),
            hub.repo_exists(f"{repo}-none"),
            hub.file_exists(repo, "config.json"),
            hub.file_exists(repo, "none"),
            hub.revision_exists(repo, str(info.sha)),
            hub.revision_exists(repo, "none"),
        ],
        "errors": [
            error(lambda: hub.hf_hub_download("gpt2", "config.json")),
            error(lambda: hub.model_info(repo, revision="none")),
            error(lambda: hub.hf_hub_download(repo, "none")),
            error(lambda: list(hub.list_repo_tree(repo, "none"))),
        ],
    }


ERRORS = ("EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError")


def download(repo: str, name: str, revision: str) -> str:
    """The path of one file."""
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(repo, name, revision=revision))


def two_hubs(upstream: str, own: str, other: str) -> dict[str, str]:
    """A file of a repository of this server, and one that the server sends on, `upstream` being counted as the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import _http

    _http._HUB_ORIGINS |= {_http._url_origin(upstream)}
    return {name: hf_hub_download(name, "config.json") for name in (own, other)}


def snapshot(repo: str, revision: str, *patterns: str) -> str:
    """The folder of a version, or of those of its files that match the patterns."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(repo, revision=revision, allow_patterns=list(patterns) or None))


def engine(repo: str, revision: str) -> dict[str, Any]:
    """The calls by which vLLM and SGLang load weights: list, choose safetensors, download them, read the config."""
    from huggingface_hub import HfFileSystem
    from safetensors.torch import load_file

    listed = HfFileSystem().ls(repo, detail=False, revision=revision)
    folder = Path(snapshot(repo, revision, "*.safetensors"))
    return {"listed": sorted(listed), "digests": digests(load_file(folder / "model.safetensors"))}


def transformers(repo: str, *revisions: str) -> list[dict[str, Any]]:
    """A causal language model and its tokenizer, at each of the revisions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = []
    for revision in revisions:
        model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
        tokens = AutoTokenizer.from_pretrained(repo, revision=revision)("w3 w5")["input_ids"]
        found.append({"digests": digests(model.state_dict()), "tokens": tokens})
    return found


def peft(base: str, repo: str, revision: str) -> dict[str, Any]:
    """An adapter, over a base model from the same server."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import LlamaForCausalLM

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), repo, revision=revision)
    return {"digests": digests(get_peft_model_state_dict(model))}


def diffusers(repo: str, revision: str) -> dict[str, Any]:
    """A model of diffusers."""
    from diffusers import UNet2DModel

    return {"digests": digests(UNet2DModel.from_pretrained(repo, revision=revision).state_dict())}


def timm(repo: str, revision: str) -> dict[str, Any]:
    """A model of timm, made as its config.json says."""
    import timm

    return {"digests": digests(timm.create_model(f"hf-hub:{repo}@{revision}", pretrained=True).state_dict())}


CLIENTS: Mapping[str, Callable[..., Any]] = {
    client.__name__: client
    for client in (api, download, two_hubs, snapshot, engine, transformers, peft, diffusers, timm)
}

if __name__ == "__main__":
    print(json.dumps({"result": CLIENTS[sys.argv[1]](*sys.argv[2:])}))
