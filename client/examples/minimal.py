import numpy as np
import thinkv

random = np.random.default_rng(0)
with thinkv.Client(name="minimal") as client:
    model = client.model(layers=2, q_heads=6, kv_heads=2, head_dim=64)
    sequence = model.sequence(policy="thinkv", budget=256)
    for layer in range(2):  # the prompt: k, v [tokens, kv_heads, head_dim], after rotary embedding
        k, v = random.standard_normal((2, 20, 2, 64), np.float32)
        sequence.prefill(layer, k, v)
    sequence.prefill_end()
    for token in range(1000):
        with model.step([sequence]) as step:  # a batch of one
            for layer in range(2):
                k, v = random.standard_normal((2, 1, 2, 64), np.float32)
                q = random.standard_normal((1, 6, 64), np.float32)
                step.append(layer, k, v)
                out = step.attend(layer, q)  # [1, 6, 64]
    s = sequence.stats()
    print(f"{s['tokens']} tokens, {s['live_tokens']:.0f} live, {s['bytes_held']} bytes held, "
          f"16 bits would take {s['bytes_f16']}")
