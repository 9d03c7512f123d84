"""Hugging Face transformers on the shared pool.

    from thinkv.transformers import ThinkvCache

    model.set_attn_implementation("thinkv")
    cache = ThinkvCache(model, policy="thinkv", budget=1024)
    model.generate(**inputs, past_key_values=cache)

Importing this package registers the attention and the mask "thinkv" with transformers; nothing else
of it is changed. Prompts attend exactly, over their fresh keys and values, and are written to the
pool in one pass; each decode step reads the pool in place. transformers 4.57 and 5.x.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from ._attention import attention
from ._cache import ThinkvCache
from ._mask import deferred_mask

AttentionInterface.register("thinkv", attention)
# Without a mask function of the same name transformers leaves masks out, padding included.
AttentionMaskInterface.register("thinkv", deferred_mask)

__all__ = ["ThinkvCache"]
