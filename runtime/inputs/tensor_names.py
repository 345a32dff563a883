"""Which stored tensor is which parameter, and what to say about names that are none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from slideplan.hf_fields import shown

BASE_PREFIX = "model."  # of everything but the head; base models are published without
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What wrappers put into names, and who does.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "checkpointing of activations",
    "_forward_module.": "Lightning",
    "base_model.model.": "PEFT",
    "module.": "DistributedDataParallel or DeepSpeed",
    "language_model.": "a model of images or sound around the language model",
}
_NUMBER = re.compile(r"\.(\d{1,9})\.")
_SHOWN_NAMES, _MAX_SHOWN = 3, 200


@dataclass(frozen=True)
class Matching:
    """Stored name by parameter, and pairs of stored tensors (the one that is read, one that has to be equal)."""

    stored: dict[str, str]
    copies: tuple[tuple[str, str], ...]


def match(expected: Iterable[str], present: Collection[str], tied: bool) -> Matching:
    """Find parameters among stored names as transformers does. What is not found is absent from the result."""
    stored: dict[str, str] = {}
    copies = []
    for name in expected:
        names = [name, name.removeprefix(BASE_PREFIX)] if name.startswith(BASE_PREFIX) else [name]
        if tied and name == EMBEDDING:
            names.append(HEAD)
        found = [each for each in names if each in present]
        if found:
            stored[name] = found[0]
            copies += [(found[0], other) for other in found[1:]]
    return Matching(stored, tuple(copies))


def misnamed(expected: Collection[str], missing: Collection[str], present: Collection[str]) -> str:
    """Why most parameters were not found, where their names tell; empty where they do not."""
    if 2 * len(missing) <= len(expected):
        return ""
    bare = {_unwrapped(name) for name in present}
    if 2 * len(match(missing, bare, tied=False).stored) > len(missing):
        parts = [part for part in _WRAPPERS if any(part in name for name in present)]
        causes = " and ".join(f"`{part}` was put there by {_WRAPPERS[part]}" for part in parts)
        example = next(name for name in present if any(part in name for part in parts))
        return f"its tensors are named as {readable(example)}: {causes}; save the model without it, or rename its tensors"
    if any(".lora_" in name for name in present):
        return "it holds an adapter (LoRA) and no whole model; merge it into its base model and save that"
    names = [readable(name) for name in sorted(present)]
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    there = f"{', '.join(names[:_SHOWN_NAMES]) or 'none'}{more}"
    return f"{len(missing)} of {len(expected)} tensors are missing, such as {next(iter(missing))}; there are {there}"


def _unwrapped(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def readable(name: str) -> str:
    """A stored name as it stands in a message: files can hold any text."""
    return name if name.isprintable() and len(name) <= _MAX_SHOWN else shown(name)


def grouped(names: Iterable[str]) -> str:
    """Names in one line; those that differ in one number, such as the layer's, as one with a range."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        # The first number is the layer's; a model of images has others behind it.
        found = _NUMBER.search(name)
        if found is None:
            layers[name, ""] = []
        else:
            layers.setdefault((name[: found.start(1)], name[found.end(1) :]), []).append(int(found[1]))
    return ", ".join(readable(start + _ranges(values) + end) for (start, end), values in layers.items())


def _ranges(values: list[int]) -> str:
    """[0, 1, 2, 5] as {0-2,5}; one number as itself, none as nothing."""
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"{{{text}}}" if len(set(values)) > 1 else text
