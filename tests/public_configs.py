"""Published configurations as test data: what config.json says of the shape, where it was taken from, what must come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent / "reference" / "public_configs.jsonl"


class PublicConfig(NamedTuple):
    """parameters: as transformers counts them, None where the configuration is refused; refused: the field it is for."""

    name: str
    source: str
    config: dict[str, Any]
    parameters: int | None = None
    refused: str | None = None

    def write(self, folder: Path) -> Path:
        """Its config.json in a folder, which is returned."""
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


PUBLIC = tuple(PublicConfig(**json.loads(line)) for line in FILE.read_text().splitlines())
ACCEPTED = tuple(each for each in PUBLIC if each.parameters is not None)
REFUSED = tuple(each for each in PUBLIC if each.refused is not None)


def label(public: PublicConfig) -> str:
    """Its name in a test's name; some are there twice, from two sources."""
    return f"{public.name} of {public.source.split('@')[0].rpartition('/')[2]}"
