"""An app that describes its errors as what they are. Comes in: its routes; goes out: the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from ema_server.http.problems import MEDIA_TYPE

_PROBLEM = {"$ref": "#/components/schemas/ProblemOut"}


class DescribedApp(FastAPI):
    """FastAPI describes every model as application/json; errors here are problem+json."""

    def openapi(self) -> dict[str, Any]:
        """The document, made once."""
        if self.openapi_schema is None:
            for path in super().openapi()["paths"].values():
                for operation in path.values():
                    _name_problems(operation["responses"])
        return super().openapi()


def _name_problems(responses: dict[str, dict[str, Any]]) -> None:
    for response in responses.values():
        content = response.get("content", {})
        if content.get("application/json", {}).get("schema") == _PROBLEM:
            response["content"] = {MEDIA_TYPE: content["application/json"]}
