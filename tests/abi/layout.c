/* layout.c: sizes and offsets of thinkv.h, frozen (64-bit). A change here breaks every engine that
 * was built before: add fields in reserved space instead. */
#include <stddef.h>
#include <thinkv/thinkv.h>

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type)
#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)

SIZE(thinkv_status, 4);

SIZE(thinkv_error, 256);
AT(thinkv_error, code, 4);
AT(thinkv_error, os_error, 8);
AT(thinkv_error, text, 16);

SIZE(thinkv_tensor, 48);
AT(thinkv_tensor, dtype, 8);
AT(thinkv_tensor, ndim, 12);
AT(thinkv_tensor, shape, 16);
SIZE(thinkv_output, 48);
AT(thinkv_output, dtype, 8);
AT(thinkv_output, ndim, 12);
AT(thinkv_output, shape, 16);

SIZE(thinkv_client_options, 56);
AT(thinkv_client_options, threads, 4);
AT(thinkv_client_options, socket_path, 8);
AT(thinkv_client_options, client_name, 16);
AT(thinkv_client_options, timeout_ms, 24);
AT(thinkv_client_options, reserved0, 28);
AT(thinkv_client_options, pool_name, 32);
AT(thinkv_client_options, reserved, 40);

SIZE(thinkv_pool_stats, 136);
AT(thinkv_pool_stats, backend, 8);
AT(thinkv_pool_stats, pool_bytes, 24);
AT(thinkv_pool_stats, client_leased_bytes, 64);
AT(thinkv_pool_stats, pool_name, 72);

SIZE(thinkv_model_options, 72);
AT(thinkv_model_options, layers, 4);
AT(thinkv_model_options, head_dim, 16);
AT(thinkv_model_options, value_type, 20);
AT(thinkv_model_options, softmax_scale, 24);
AT(thinkv_model_options, model_name, 32);
AT(thinkv_model_options, reserved, 40);

SIZE(thinkv_sequence_options, 48);
AT(thinkv_sequence_options, budget_tokens, 4);
AT(thinkv_sequence_options, policy_name, 8);
AT(thinkv_sequence_options, flags, 16);
AT(thinkv_sequence_options, reserved, 20);

SIZE(thinkv_batch_options, 48);
AT(thinkv_batch_options, capacity, 4);
AT(thinkv_batch_options, tokens_max, 8);
AT(thinkv_batch_options, flags, 12);
AT(thinkv_batch_options, reserved, 16);

SIZE(thinkv_attend_options, 48);
AT(thinkv_attend_options, window, 4);
AT(thinkv_attend_options, sinks, 8);
AT(thinkv_attend_options, flags, 12);
AT(thinkv_attend_options, reserved, 16);

SIZE(thinkv_sequence_stats, 208);
AT(thinkv_sequence_stats, lanes, 4);
AT(thinkv_sequence_stats, tokens, 8);
AT(thinkv_sequence_stats, bytes_held, 64);
AT(thinkv_sequence_stats, over_budget_steps, 120);
AT(thinkv_sequence_stats, thoughts, 128);
AT(thinkv_sequence_stats, budget_tokens, 152);
AT(thinkv_sequence_stats, tier_bytes, 160);
AT(thinkv_sequence_stats, reserved, 168);

_Static_assert(THINKV_OK == 0 && THINKV_INVALID_ARGUMENT == 1 && THINKV_EXHAUSTED == 2, "codes");
_Static_assert(THINKV_QUOTA_EXCEEDED == 3 && THINKV_NOT_FOUND == 4 && THINKV_STALE == 5, "codes");
_Static_assert(THINKV_UNAVAILABLE == 6 && THINKV_VERSION_MISMATCH == 7, "codes");
_Static_assert(THINKV_PERMISSION == 8 && THINKV_UNSUPPORTED == 9, "codes");
_Static_assert(THINKV_DEVICE_FAILED == 10 && THINKV_INTERNAL == 11, "codes");
_Static_assert(THINKV_FLOAT32 == 0 && THINKV_FLOAT16 == 1 && THINKV_BFLOAT16 == 2, "types");
