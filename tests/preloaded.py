"""Imported for what it imports: everything that a run loads only when it needs it, so that processes forked later have it.

Nothing here starts a thread: a process forked from one with threads of OpenMP ends as soon as it uses its own.
"""

import transformers.modeling_utils
import transformers.models.llama.modeling_llama  # noqa: F401
from numba.core.registry import cpu_target

cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()
