"""A small numpy inference engine whose KV cache can live in the ThinKV pool."""
