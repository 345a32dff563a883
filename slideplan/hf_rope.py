"""Rotary embedding of a Hugging Face `config.json`, brought into one form as transformers brings it.

A config says it in `rope_parameters`, or as older ones do in `rope_scaling`, `rope_theta`, `partial_rotary_factor` and
`original_max_position_embeddings` beside each other. What comes out names everything that the frequencies depend on,
so that it means the same whatever stands beside it.
"""

from __future__ import annotations

from typing import Any

from slideplan.hf_fields import Fields, is_number, shown
from slideplan.model import RopeValue

DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_LEAST, _MAX_FACTOR = 1e-6, 1e6
# What each type reads: numbers that it needs, and numbers that it can do without.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor",),
}
_WITH_ORIGINAL = ("yarn", "longrope", "llama3")
_FACTOR_LISTS = ("short_factor", "long_factor")
# Where null means what absence means; elsewhere transformers computes with it and fails.
_NULLABLE = _OPTIONAL["yarn"]
# Fields that mean something for some type, and one that records how the weights came about and changes nothing.
_KNOWN = {key for keys in (*_NEEDED.values(), *_OPTIONAL.values()) for key in keys}
_KNOWN |= {*_FACTOR_LISTS, "truncate", "finetuned", _ORIGINAL}


def rotary(config: Fields, head_dim: int, max_positions: int) -> tuple[float, dict[str, RopeValue] | None]:
    """Base frequency and, if frequencies are scaled, how: with `rope_type`, without `rope_theta`.

    Raises ValueError naming the field for what transformers would not understand, or where two fields contradict.
    """
    given = {field: _object(config, field) for field in ("rope_scaling", "rope_parameters")}
    filled = {field: values for field, values in given.items() if values} or {"rope_parameters": {}}
    answers = [_Rotary(config, field, values, head_dim, max_positions).standardised() for field, values in filled.items()]
    if any(answer != answers[0] for answer in answers):
        # transformers would follow the older of the two, whatever the newer one says.
        scaling, parameters = (shown(values) for values in given.values())
        raise config.error("rope_scaling", f"is {scaling}, `rope_parameters` say otherwise: {parameters}; remove the wrong one")
    return answers[0]


def _object(config: Fields, field: str) -> dict[str, Any]:
    given = config.values.get(field) or {}
    if not isinstance(given, dict):
        raise config.error(field, f"is {shown(given)}, must be an object; correct it")
    return given


class _Rotary:
    """One of the two objects that can describe the rotary embedding, read with the fields around it."""

    def __init__(self, config: Fields, field: str, given: dict[str, Any], head_dim: int, max_positions: int) -> None:
        self._config = config
        self._field = field
        self._given = given
        self._values = {key: value for key, value in given.items() if value is not None}
        self._head_dim = head_dim
        self._max_positions = max_positions
        for key, value in self._values.items():
            if isinstance(value, dict):
                raise self._error(key, f"is {shown(value)}; rotary parameters per layer type are not supported")

    def _error(self, key: str, problem: str) -> ValueError:
        return self._config.error(f"{self._field}.{key}", problem)

    def standardised(self) -> tuple[float, dict[str, RopeValue] | None]:
        kind = self._kind()
        self._refuse_null(kind)
        theta = self._theta()
        rotated = self._rotated(kind)
        unknown = sorted(set(self._values) - _KNOWN - {"rope_type", "type", "rope_theta", _PARTIAL})
        if unknown:
            raise self._error(
                unknown[0],
                f"is {shown(self._values[unknown[0]])}, which transformers does not read for {kind}; remove it if the "
                "model was trained without",
            )
        if kind == "default":
            return theta, None
        scaling: dict[str, RopeValue] = {"rope_type": kind}
        for key in (*_NEEDED[kind], *_OPTIONAL.get(kind, ())):
            if key in self._values or key in _NEEDED[kind]:
                scaling[key] = self._number(kind, key)
        if kind in _WITH_ORIGINAL:
            scaling[_ORIGINAL] = self._original()
        if kind == "proportional":
            scaling[_PARTIAL] = rotated
        if kind == "longrope":
            scaling |= self._factor_lists()
            if "factor" not in scaling:
                scaling["factor"] = max(1.0, self._ratio())  # it is read where it is above 1
        if kind == "yarn":
            if "truncate" in self._values:
                scaling["truncate"] = self._truncate()
            if theta <= 1:
                raise self._error("rope_theta", f"is {theta}, must be more than 1 for yarn; correct it")
        if kind == "llama3" and self._number(kind, "high_freq_factor") <= self._number(kind, "low_freq_factor"):
            raise self._error(
                "high_freq_factor",
                f"is {self._values['high_freq_factor']}, must be more than low_freq_factor "
                f"{self._values['low_freq_factor']}; correct it",
            )
        return theta, scaling

    def _refuse_null(self, kind: str) -> None:
        read = {"rope_type", "rope_theta", *_NEEDED[kind], *_OPTIONAL.get(kind, ())}
        read |= {_ORIGINAL, _PARTIAL, "truncate"} if kind != "default" else set()
        read -= {*_NULLABLE, *(("factor",) if kind in ("yarn", "longrope") else ())}
        for key in sorted(read - self._values.keys()):
            if key in self._given:
                raise self._error(key, "is null, which transformers cannot read; remove it or give its value")
        if "rope_theta" not in self._given and self._config.values.get("rope_theta", DEFAULT_THETA) is None:
            raise self._config.error("rope_theta", "is null, which transformers cannot read; remove it or give its value")

    def _kind(self) -> str:
        kind = self._values.get("rope_type", self._values.get("type"))
        if kind is None and "rope_type" not in self._given and "type" in self._given:
            raise self._error("type", "is null, which transformers cannot read; remove it or give its value")
        if kind is None:
            scaled = sorted(set(self._values) & _KNOWN)
            if scaled:
                raise self._error(
                    "rope_type",
                    f"is missing, and transformers would ignore {scaled[0]} without it; add it, one of {', '.join(_NEEDED)}",
                )
            return "default"
        if not isinstance(kind, str) or kind not in _NEEDED:
            raise self._error("rope_type", f"is {shown(kind)}; supported are {', '.join(_NEEDED)}")
        if kind == "dynamic" and self._head_dim <= 2:
            raise self._error(
                "rope_type", f"is dynamic, which divides by head_dim - 2; head_dim is {self._head_dim}, correct one"
            )
        return kind

    def _theta(self) -> float:
        """What stands inside wins over what stands beside."""
        inner = Fields(self._config.where, {f"{self._field}.rope_theta": self._values.get("rope_theta")})
        return inner.number(f"{self._field}.rope_theta", self._config.number("rope_theta", DEFAULT_THETA))

    def _rotated(self, kind: str) -> float:
        """Part of each head that is rotated: all of it, but for the type that is made for less."""
        rotated = self._values.get(_PARTIAL, self._config.values.get(_PARTIAL))
        if rotated is None:
            return 1.0
        if not is_number(rotated) or not 0 < rotated <= 1:
            raise self._config.error(_PARTIAL, f"is {shown(rotated)}, must be a number in 0..1; correct it")
        if rotated != 1 and kind != "proportional":
            raise self._config.error(_PARTIAL, f"is {shown(rotated)}; partial rotary embedding is not supported")
        return float(rotated)

    def _number(self, kind: str, key: str) -> float:
        value = self._values.get(key)
        if kind == "yarn" and key == "factor" and value is None and "factor" in self._given:
            value = self._ratio()
        if not _between(value, 1 if key == "factor" else _LEAST):
            bound = "of at least 1" if key == "factor" else "above 0"
            raise self._error(key, f"is {shown(value)}, must be a number {bound} for {kind}; correct it")
        return float(value)  # type: ignore[arg-type]

    def _original(self) -> int:
        """Positions that the weights were first trained for: what stands beside wins over what stands inside."""
        if _ORIGINAL in self._config.values:
            if not self._config.has(_ORIGINAL):
                raise self._config.error(_ORIGINAL, "is null, which transformers cannot read; remove it or give its value")
            return self._config.integer(_ORIGINAL)
        inner = Fields(self._config.where, {f"{self._field}.{_ORIGINAL}": self._values.get(_ORIGINAL)})
        return inner.integer(f"{self._field}.{_ORIGINAL}", self._max_positions)

    def _ratio(self) -> float:
        return min(self._max_positions / self._original(), _MAX_FACTOR)

    def _factor_lists(self) -> dict[str, RopeValue]:
        lists: dict[str, RopeValue] = {}
        for key in _FACTOR_LISTS:
            value = self._values.get(key)
            wanted = f"must be a list of {self._head_dim // 2} positive numbers for longrope; correct it"
            if not isinstance(value, list) or not all(_between(each, _LEAST) for each in value):
                raise self._error(key, f"is {shown(value)}, {wanted}")
            if len(value) != self._head_dim // 2:
                raise self._error(key, f"has {len(value)} numbers, {wanted}")
            # Whole numbers would be read back as fractions, and the plan's digest would change.
            lists[key] = [float(each) for each in value]
        if self._original() < 2:
            raise self._error(_ORIGINAL, "is 1, must be more for longrope; correct it")
        return lists

    def _truncate(self) -> bool:
        value = self._values["truncate"]
        if not isinstance(value, bool):
            raise self._error("truncate", f"is {shown(value)}, must be true or false; correct it")
        return value


def _between(value: object, least: float) -> bool:
    """Whether a value is a number from `least` to the largest that a factor can be."""
    return is_number(value) and least <= value <= _MAX_FACTOR  # type: ignore[operator]
