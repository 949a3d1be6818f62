"""Adapters of PEFT: which tensors of a model are its active adapter, under which names PEFT saves them, and its config.

PEFT is not imported here. A model has adapters only if PEFT is imported already, and PEFT itself says what they hold.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from torch import Tensor, nn

from trainer_client.errors import PlanError
from trainer_client.model.sources import Source
from trainer_client.model.wrappers import canonical_names, wrapped_attribute

CONFIG_FILE: Final = "adapter_config.json"

_TRANSFORMERS_PREFIX: Final = "base_model.model."  # what its save_pretrained puts before the names of an adapter
_WHAT_TO_DO: Final = "name what to stream with include= (then under the names of the state dict)"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The active adapter of a `peft.PeftModel`, or of a model of transformers after `add_adapter`.

    Attributes:
        model: the model, without its wrappers.
        name: the adapter's.
        is_peft_model: whether the model is a PeftModel.
    """

    model: Any
    name: str
    is_peft_model: bool

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """The active adapter; None if the model has no adapters.

        Raises:
            PlanError: not exactly one adapter is active.
        """
        while (hidden := wrapped_attribute(model, "")) is not None:
            model = getattr(model, hidden)
        is_peft_model = _is_a(model, "peft.peft_model", "PeftModel")
        if not is_peft_model and not (
            _is_a(model, "transformers.integrations.peft", "PeftAdapterMixin")
            and getattr(model, "_hf_peft_config_loaded", False)
        ):
            return None
        active = _active(model)
        if len(active) != 1:
            which = f"the adapters {', '.join(active)} are active" if active else "no adapter is active"
            raise PlanError(f"{which}, and a version holds one: activate one with set_adapter(), or {_WHAT_TO_DO}")
        return cls(model, active[0], is_peft_model)

    def is_active(self) -> bool:
        """Whether it is still the active one."""
        return _active(self.model) == [self.name]

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT saves of it, under the names of PEFT's files. Parameters and buffers are the model's own objects.

        The embeddings are among them if PEFT would save them: they are targeted, or the vocabulary was resized. For
        that, a base model named by its id on the Hub is looked up in the local cache alone.

        Raises:
            PlanError: PEFT cannot say.
        """
        config = self.model.peft_config[self.name]
        base, config.base_model_name_or_path = config.base_model_name_or_path, None  # or PEFT would ask the Hub
        try:
            with warnings.catch_warnings(action="ignore"):
                found: dict[str, Tensor] = sys.modules["peft"].get_peft_model_state_dict(
                    self.model,
                    state_dict=self.model.state_dict(keep_vars=True),
                    adapter_name=self.name,
                    save_embedding_layers=_is_resized(self.model, base) or "auto",
                )
        # Whatever PEFT raises, this model is not one that can be streamed as an adapter.
        except Exception as error:
            raise PlanError(f"PEFT cannot save the adapter {self.name!r}: {error!r}; {_WHAT_TO_DO}") from error
        finally:
            config.base_model_name_or_path = base
        prefix = "" if self.is_peft_model else _TRANSFORMERS_PREFIX
        return {prefix + name: tensor for name, tensor in found.items()}

    def choose(self, sources: Iterable[Source]) -> tuple[Source, ...]:
        """The sources of what PEFT saves of it, under PEFT's names.

        Raises:
            PlanError: it saves something that is not a parameter or buffer of the model (a prompt that it computes).
        """
        by_identity = {id(source.maybe_tensor()): source for source in sources}
        chosen = []
        for name, tensor in self.tensors().items():
            source = by_identity.get(id(tensor))
            if source is None:
                text = (
                    f"what PEFT saves of the adapter {self.name!r} as {name!r} is computed, not a tensor of the model"
                )
                raise PlanError(f"{text}: {_WHAT_TO_DO}")
            chosen.append(replace(source, name=name))
        return tuple(chosen)

    def config(self) -> bytes:
        """The content of its `adapter_config.json`, as `save_pretrained` writes it.

        Raises:
            PlanError: PEFT cannot write it.
        """
        config = copy.deepcopy(self.model.peft_config[self.name])
        mapping = self._complete(config) if self.is_peft_model else None
        config.inference_mode = True
        for name, value in vars(config).items():
            if isinstance(value, set):  # in a fixed order the content is the same after a restart
                setattr(config, name, sorted(value))
        try:
            with tempfile.TemporaryDirectory(prefix="ema-") as folder:
                config.save_pretrained(folder, auto_mapping_dict=mapping)
                return Path(folder, CONFIG_FILE).read_bytes()
        except (OSError, TypeError, ValueError) as error:
            raise PlanError(f"PEFT cannot write the config of the adapter {self.name!r}: {error!r}") from error

    def _complete(self, config: Any) -> dict[str, str] | None:
        """Fill in what `PeftModel.save_pretrained` does; returns the class of the base model where it says that."""
        base = self.model.base_model if config.is_prompt_learning else self.model.base_model.model
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
        if config.task_type is not None:
            return None
        return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def adapter_names(model: nn.Module) -> dict[str, str]:
    """The names under which the active adapter is streamed, each with its canonical name; empty without an adapter."""
    try:
        adapter = Adapter.of(model)
        tensors = {} if adapter is None else adapter.tensors()
    except PlanError:
        return {}
    entries = model.state_dict(keep_vars=True)
    names = dict(zip(map(id, entries.values()), canonical_names(model, entries), strict=True))
    return {name: names[id(tensor)] for name, tensor in tensors.items() if id(tensor) in names}


def _active(model: Any) -> list[str]:
    if _is_a(model, "peft.peft_model", "PeftModel"):
        return list(model.active_adapters)
    # The method of transformers raises where it asks for a newer PEFT.
    layers = (module for module in model.modules() if _is_a(module, "peft.tuners.tuners_utils", "BaseTunerLayer"))
    active: str | list[str] = next((layer.active_adapter for layer in layers), [])
    return [active] if isinstance(active, str) else list(active)


def _is_a(model: nn.Module, file: str, cls: str) -> bool:
    kind = getattr(sys.modules.get(file), cls, None)
    return kind is not None and isinstance(model, kind)


def _is_resized(model: Any, base: str | None) -> bool:
    """Whether the vocabulary has another size than that of the base model, as far as this machine knows."""
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not base or size is None:
        return False
    try:
        original = config.__class__.from_pretrained(base, local_files_only=True)
    # A base model that is not on this machine, or not of transformers: PEFT takes the vocabulary for unchanged too.
    except Exception:  # noqa: BLE001
        return False
    return bool(size != original.vocab_size)
