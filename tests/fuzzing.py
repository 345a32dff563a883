"""How many broken inputs the readers get."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

STANDARD_EXAMPLES = 100  # what hypothesis takes where nobody says


def readings(usual: int) -> settings:
    """Settings of a test that reads whatever there may be: `usual` examples, more or fewer as the profile has them."""
    examples = max(1, usual * settings.default.max_examples // STANDARD_EXAMPLES)
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
