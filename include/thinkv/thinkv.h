/* thinkv.h: the C ABI of libthinkv: KV cache pages from the thinkvd pool, for inference engines.
 *
 * Conventions
 *  1. Every function that can fail returns thinkv_status (int32): 0 is success. The values are
 *     frozen and say what the caller does about it. Nothing aborts, throws or sets errno.
 *  2. Results come through out-pointers, written only on success.
 *  3. `error` is optional (NULL) and caller-owned; set struct_size with THINKV_ERROR_INIT. It gets
 *     a sentence for a person, with the numbers in it.
 *  4. Option structs begin with struct_size and are made by their *_INIT macro; fields added later
 *     read as zero for callers built earlier. Reserved fields must be zero.
 *  5. Handles are opaque. Closing a parent closes its children (client > model > sequence, step,
 *     batch).
 *     A closed handle answers THINKV_STALE; it is never a crash. Closing NULL does nothing.
 *     Closing a sequence cancels the step that it is in.
 *  6. Tensors are dense and row-major; the shape is given beside each parameter. On the host
 *     backend they lie in host memory; on the cuda backend in memory of the pool's GPU, and work on
 * them goes to the model's stream. fp32 and the two 16-bit types are accepted as input; outputs are
 *     fp32 on the host backend, any of the three on the cuda backend; lse is always fp32.
 *  7. Threads: a client and its models may be used from any thread. Calls on one sequence or one
 *     step must not overlap; different sequences may run on different threads.
 *  8. Keys are passed AFTER rotary embedding; positions are counted by the library.
 *  9. A forked child must open its own client; inherited handles answer THINKV_STALE there.
 *
 * The life of a sequence: open; prefill every layer once, prefill_end; then for each token
 * step_begin, for each layer append and attend, step_end; close. A step that cannot get its pages
 * fails in step_begin, before anything has changed.
 *
 * On the cuda backend sequences run in the rows of a thinkv_batch: join; for each token reserve,
 * then begin, for each layer append and attend, end. The last four only launch kernels, so they can
 * be captured in one CUDA graph; each replay is preceded by a reserve.
 */
#ifndef THINKV_THINKV_H_
#define THINKV_THINKV_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define THINKV_API __attribute__((visibility("default")))
#else
#define THINKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t thinkv_status;
#define THINKV_OK 0
#define THINKV_INVALID_ARGUMENT 1 /* fix the call */
#define THINKV_EXHAUSTED 2        /* no page left in the pool: evict, close, or retry later */
#define THINKV_QUOTA_EXCEEDED 3   /* the tenant's limit: close sequences or raise the limit */
#define THINKV_NOT_FOUND 4        /* no such policy or pool */
#define THINKV_STALE 5            /* closed handle, forked child, or the daemon restarted */
#define THINKV_UNAVAILABLE 6      /* no daemon: start it, then open a new client */
#define THINKV_VERSION_MISMATCH 7 /* upgrade the library or the daemon */
#define THINKV_PERMISSION 8
#define THINKV_UNSUPPORTED 9 /* valid, but not possible here */
#define THINKV_DEVICE_FAILED 10
#define THINKV_INTERNAL 11 /* a defect of ours: please report */

typedef struct thinkv_client thinkv_client;
typedef struct thinkv_model thinkv_model;
typedef struct thinkv_sequence thinkv_sequence;
typedef struct thinkv_step thinkv_step;
typedef struct thinkv_batch thinkv_batch;

typedef struct thinkv_error {
  uint32_t struct_size;
  thinkv_status code;
  int32_t os_error; /* errno or CUresult, 0 if none */
  uint32_t reserved;
  char text[240]; /* zero-terminated */
} thinkv_error;
#define THINKV_ERROR_INIT            \
  {                                  \
    sizeof(thinkv_error), 0, 0, 0, { \
      0                              \
    }                                \
  }

/* ---- tensors ---- */

#define THINKV_FLOAT32 0u
#define THINKV_FLOAT16 1u
#define THINKV_BFLOAT16 2u

typedef struct thinkv_tensor {
  const void* data;
  uint32_t dtype;   /* THINKV_FLOAT32, ... */
  uint32_t ndim;    /* 1..4 */
  int64_t shape[4]; /* dense, row-major */
} thinkv_tensor;

typedef struct thinkv_output {
  void* data;
  uint32_t dtype; /* THINKV_FLOAT32 */
  uint32_t ndim;
  int64_t shape[4];
} thinkv_output;

/* ---- client ---- */

typedef struct thinkv_client_options {
  uint32_t struct_size;
  uint32_t threads;        /* CPU kernels: 0 chooses, 1 runs everything in the calling thread */
  const char* socket_path; /* NULL: $THINKV_SOCKET, else the per-user, else the system socket */
  const char* client_name; /* NULL: $THINKV_CLIENT_NAME, else the program's name */
  uint32_t timeout_ms;     /* of a round trip to the daemon; 0: 10,000 */
  uint32_t reserved0;
  const char* pool_name; /* or the UUID of its GPU, "GPU-..."; NULL: $THINKV_POOL, else the daemon's
                            only pool, else the pool on the calling thread's current GPU (without a
                            CUDA context: the first GPU that this process sees) */
  uint32_t reserved[4];
} thinkv_client_options;
#define THINKV_CLIENT_OPTIONS_INIT                     \
  {                                                    \
    sizeof(thinkv_client_options), 0, 0, 0, 0, 0, 0, { \
      0                                                \
    }                                                  \
  }

/* Connects. Errors: UNAVAILABLE, VERSION_MISMATCH, PERMISSION, EXHAUSTED (too many clients),
 * NOT_FOUND (no such pool), INVALID_ARGUMENT (several pools, none named, and none on a GPU that is
 * current here; the text lists them). */
THINKV_API thinkv_status thinkv_client_open(const thinkv_client_options* options,
                                            thinkv_client** client, thinkv_error* error);
/* Closes everything that was opened through it and returns all pages. */
THINKV_API void thinkv_client_close(thinkv_client* client);

typedef struct thinkv_pool_stats {
  uint32_t struct_size;
  uint32_t reserved0;
  char backend[16]; /* "host" | "cuda" */
  uint64_t pool_bytes;
  uint64_t pool_free_bytes;
  uint64_t tenant_used_bytes; /* pages granted to this tenant, leases included */
  uint64_t tenant_limit_bytes;
  uint64_t client_granted_bytes;
  uint64_t client_leased_bytes; /* granted, not yet used by a sequence */
  char pool_name[64];           /* of this client's pool, zero-terminated */
} thinkv_pool_stats;
/* One round trip. Requires stats->struct_size. */
THINKV_API thinkv_status thinkv_client_pool_stats(thinkv_client* client, thinkv_pool_stats* stats,
                                                  thinkv_error* error);
/* The daemon's status as JSON text (what `thinkvctl status --json` prints). *json is released by
 * thinkv_string_free. */
THINKV_API thinkv_status thinkv_client_status_json(thinkv_client* client, char** json,
                                                   thinkv_error* error);
THINKV_API void thinkv_string_free(char* text);
/* One empty round trip through the rings, for latency measurements and liveness. */
THINKV_API thinkv_status thinkv_client_ping(thinkv_client* client, thinkv_error* error);

/* ---- model ---- */

typedef struct thinkv_model_options {
  uint32_t struct_size;
  uint32_t layers;
  uint32_t q_heads; /* 1 to 16 times kv_heads */
  uint32_t kv_heads;
  uint32_t head_dim;   /* 64, 128 or 256 */
  uint32_t value_type; /* of 16-bit pages: THINKV_FLOAT16 or THINKV_BFLOAT16 */
  float softmax_scale; /* 0: 1 / sqrt(head_dim) */
  uint32_t reserved0;
  const char* model_name; /* for people; may be NULL */
  uint32_t reserved[8];
} thinkv_model_options;
#define THINKV_MODEL_OPTIONS_INIT                                           \
  {                                                                         \
    sizeof(thinkv_model_options), 0, 0, 0, 0, THINKV_FLOAT16, 0.0f, 0, 0, { \
      0                                                                     \
    }                                                                       \
  }

THINKV_API thinkv_status thinkv_model_open(thinkv_client* client,
                                           const thinkv_model_options* options,
                                           thinkv_model** model, thinkv_error* error);
THINKV_API void thinkv_model_close(thinkv_model* model);
/* cuda backend: the CUstream (cudaStream_t) of all work that is launched for the model from now on;
 * NULL, the state after open, is the legacy default stream. The caller orders the old stream and
 * the new one. Errors: UNSUPPORTED on the host backend. */
THINKV_API thinkv_status thinkv_model_set_stream(thinkv_model* model, void* stream,
                                                 thinkv_error* error);

/* ---- sequence ---- */

#define THINKV_BUDGET_OF_POLICY 0u
#define THINKV_BUDGET_NONE 0xFFFFFFFFu
#define THINKV_SEQUENCE_TRACE_SPARSITY 1u /* measure sparsity in all layers at every step */

typedef struct thinkv_sequence_options {
  uint32_t struct_size;
  uint32_t budget_tokens;  /* live tokens of a lane (layer, kv head): generated ones for ThinKV's
                              schedule, for rules as their policy counts */
  const char* policy_name; /* NULL: "thinkv" */
  uint32_t flags;
  uint32_t reserved[7];
} thinkv_sequence_options;
#define THINKV_SEQUENCE_OPTIONS_INIT            \
  {                                             \
    sizeof(thinkv_sequence_options), 0, 0, 0, { \
      0                                         \
    }                                           \
  }

/* Errors: NOT_FOUND (policy; the text lists the known ones), EXHAUSTED, QUOTA_EXCEEDED. */
THINKV_API thinkv_status thinkv_sequence_open(thinkv_model* model,
                                              const thinkv_sequence_options* options,
                                              thinkv_sequence** sequence, thinkv_error* error);
THINKV_API void thinkv_sequence_close(thinkv_sequence* sequence);

/* k, v: [tokens, kv_heads, head_dim], every layer once, the same number of tokens. The engine
 * attends over its fresh K and V itself; the pool stores them. */
THINKV_API thinkv_status thinkv_sequence_prefill(thinkv_sequence* sequence, uint32_t layer,
                                                 const thinkv_tensor* k, const thinkv_tensor* v,
                                                 thinkv_error* error);
/* Ends the prompt. Requires: every layer was given. */
THINKV_API thinkv_status thinkv_sequence_prefill_end(thinkv_sequence* sequence,
                                                     thinkv_error* error);

/* Evicts tokens by position in every lane; positions that are not live or in the newest 16 are
 * skipped. *evicted_slots counts (token, lane) pairs and may be NULL. */
THINKV_API thinkv_status thinkv_sequence_evict(thinkv_sequence* sequence, const uint32_t* positions,
                                               size_t count, uint64_t* evicted_slots,
                                               thinkv_error* error);
/* Recodes the live tokens first..last (inclusive) to another format ("k4v2"), in every lane.
 * Formats of token blocks ("kivi2") come by a rule of the policy only: THINKV_UNSUPPORTED. */
THINKV_API thinkv_status thinkv_sequence_quantize(thinkv_sequence* sequence, uint32_t first,
                                                  uint32_t last, const char* format,
                                                  uint64_t* recoded_slots, thinkv_error* error);
THINKV_API thinkv_status thinkv_sequence_set_budget(thinkv_sequence* sequence,
                                                    uint32_t budget_tokens, thinkv_error* error);

typedef struct thinkv_sequence_stats {
  uint32_t struct_size;
  uint32_t lanes;
  uint64_t tokens; /* positions so far, prompt included */
  uint64_t prompt_tokens;
  uint64_t live_slots;      /* over all lanes; live tokens = live_slots / lanes */
  uint64_t live_tokens_max; /* of one lane */
  uint64_t pages;           /* K/V pages */
  uint64_t page_bytes;
  uint64_t metadata_bytes;
  uint64_t bytes_held; /* pages and metadata, whole pages */
  uint64_t bytes_f16;  /* what a 16-bit cache of the same tokens takes */
  uint64_t evicted_slots;
  uint64_t reused_slots;   /* new tokens written into evicted slots */
  uint64_t gathered_bytes; /* moved where a policy cut the prompt; decoding moves none */
  uint64_t recoded_slots;
  uint64_t demotions; /* of segments */
  uint64_t over_budget_steps;
  uint64_t thoughts[3];   /* segments: reasoning, execution, transition */
  uint64_t budget_tokens; /* 0: none */
  uint64_t tier_bytes;    /* rows of a host tier, in this process; no bytes of the pool */
  uint64_t reserved[5];
} thinkv_sequence_stats;
/* Local, no round trip. Requires stats->struct_size. */
THINKV_API thinkv_status thinkv_sequence_get_stats(thinkv_sequence* sequence,
                                                   thinkv_sequence_stats* stats,
                                                   thinkv_error* error);
/* sparsity [layers] fp32 of the last step; NaN where the layer was not measured. */
THINKV_API thinkv_status thinkv_sequence_sparsity(thinkv_sequence* sequence,
                                                  const thinkv_output* sparsity,
                                                  thinkv_error* error);

/* ---- decode step over a batch ---- */

/* Takes one token of each sequence. Reserves all pages that the step can need; on error nothing
 * has changed. Every sequence belongs to `model` and is in no other step. */
THINKV_API thinkv_status thinkv_step_begin(thinkv_model* model, thinkv_sequence* const* sequences,
                                           uint32_t count, thinkv_step** step, thinkv_error* error);
/* k, v: [batch, kv_heads, head_dim]; each layer once. */
THINKV_API thinkv_status thinkv_step_append(thinkv_step* step, uint32_t layer,
                                            const thinkv_tensor* k, const thinkv_tensor* v,
                                            thinkv_error* error);
/* q: [batch, q_heads, head_dim]; out: the same shape; lse: [batch, q_heads] or NULL, natural log.
 * Requires: this layer was appended. */
THINKV_API thinkv_status thinkv_step_attend(thinkv_step* step, uint32_t layer,
                                            const thinkv_tensor* q, const thinkv_output* out,
                                            const thinkv_output* lse, thinkv_error* error);
/* Labels, budget, evictions; frees the step in any case. Requires: every layer was appended. */
THINKV_API thinkv_status thinkv_step_end(thinkv_step* step, thinkv_error* error);
/* Takes the step back, whatever was appended in it, and frees it: its sequences are as before. */
THINKV_API void thinkv_step_cancel(thinkv_step* step);

/* ---- batch of rows on a GPU (cuda backend) ---- */

typedef struct thinkv_batch_options {
  uint32_t struct_size;
  uint32_t capacity;   /* rows: 1 to 4096 */
  uint32_t tokens_max; /* live tokens a lane that working memory is sized for, on average over the
                          rows, in 4-bit pages (16-bit pages hold a quarter); 0: 8192 */
  uint32_t flags;      /* THINKV_BATCH_... */
  uint32_t reserved[8];
} thinkv_batch_options;
#define THINKV_BATCH_OPTIONS_INIT            \
  {                                          \
    sizeof(thinkv_batch_options), 1, 0, 0, { \
      0                                      \
    }                                        \
  }
/* A reserve that needs more working memory makes it larger, and waits for the stream to do so; only
 * for batches whose steps are in no graph, which would go on with the old memory. */
#define THINKV_BATCH_GROWS 1u

/* Errors: UNSUPPORTED on the host backend, EXHAUSTED (GPU memory outside the pool). */
THINKV_API thinkv_status thinkv_batch_open(thinkv_model* model, const thinkv_batch_options* options,
                                           thinkv_batch** batch, thinkv_error* error);
/* Its sequences leave and stay open. Waits for the stream. */
THINKV_API void thinkv_batch_close(thinkv_batch* batch);
/* Puts a sequence of the same model into a free row, or takes it out (NULL). Between steps; not
 * while the stream is captured. Sequences whose policy measures attention, or has token blocks or
 * entropy-coded streams, must join before the first begin. A sequence that is closed leaves by
 * itself. */
THINKV_API thinkv_status thinkv_batch_set(thinkv_batch* batch, uint32_t row,
                                          thinkv_sequence* sequence, thinkv_error* error);
/* Reserves all pages that the next `steps` steps can need, without waiting for the GPU, and counts
 * those steps as done: call it before each run of a step, launched or replayed. On error nothing
 * has changed. Errors: EXHAUSTED, QUOTA_EXCEEDED, UNAVAILABLE, INVALID_ARGUMENT (tokens_max). */
THINKV_API thinkv_status thinkv_batch_reserve(thinkv_batch* batch, uint32_t steps,
                                              thinkv_error* error);
THINKV_API thinkv_status thinkv_batch_begin(thinkv_batch* batch, thinkv_error* error);
/* k, v: [capacity, kv_heads, head_dim]; rows without a sequence are not read. */
THINKV_API thinkv_status thinkv_batch_append(thinkv_batch* batch, uint32_t layer,
                                             const thinkv_tensor* k, const thinkv_tensor* v,
                                             thinkv_error* error);
/* q, out: [capacity, q_heads, head_dim]; lse: [capacity, q_heads] or NULL, natural log. Rows
 * without a sequence: out 0, lse -inf. Requires: this layer was appended. */
THINKV_API thinkv_status thinkv_batch_attend(thinkv_batch* batch, uint32_t layer,
                                             const thinkv_tensor* q, const thinkv_output* out,
                                             const thinkv_output* lse, thinkv_error* error);
THINKV_API thinkv_status thinkv_batch_end(thinkv_batch* batch, thinkv_error* error);

/* Takes the newest reserve back, whose steps will not be launched; the rows are as they were then.
 * Errors: INVALID_ARGUMENT where there is none that was not run. */
THINKV_API thinkv_status thinkv_batch_unreserve(thinkv_batch* batch, thinkv_error* error);

/* What one attend does other than the usual. */
typedef struct thinkv_attend_options {
  uint32_t struct_size;
  uint32_t window; /* attends the newest `window` tokens only, this step's included; 0: all */
  uint32_t sinks;  /* with a window: the first tokens that are attended all the same */
  uint32_t flags;  /* THINKV_ATTEND_... */
  uint32_t reserved[8];
} thinkv_attend_options;
#define THINKV_ATTEND_OPTIONS_INIT            \
  {                                           \
    sizeof(thinkv_attend_options), 0, 0, 0, { \
      0                                       \
    }                                         \
  }
/* The policy does not see this query: for the second and later queries of one step. */
#define THINKV_ATTEND_SILENT 1u
/* Only for what the policy measures: a layer where it measures nothing is left out, and `out` is
 * not written there. */
#define THINKV_ATTEND_MEASURE_ONLY 2u
/* thinkv_batch_attend with options (NULL: none). A window that a model has is given at each step;
 * tokens that fell out of it are not freed by it: thinkv_sequence_trim frees them. */
THINKV_API thinkv_status thinkv_batch_attend_with(thinkv_batch* batch, uint32_t layer,
                                                  const thinkv_attend_options* options,
                                                  const thinkv_tensor* q, const thinkv_output* out,
                                                  const thinkv_output* lse, thinkv_error* error);

/* cuda backend: evicts all tokens of a sequence but the newest `keep`, and at least 16, without
 * waiting for the stream: what a sliding window needs, from time to time. Errors: UNSUPPORTED on
 * the host backend and under a policy with entropy, INVALID_ARGUMENT (keep 0). */
THINKV_API thinkv_status thinkv_sequence_trim(thinkv_sequence* sequence, uint32_t keep,
                                              thinkv_error* error);
/* cuda backend: a sequence of its own that goes on from where this one is (beams, several samples
 * of one prompt). Copies every page; waits for the stream. It is in no batch. Errors: as
 * thinkv_sequence_open; UNSUPPORTED on the host backend. */
THINKV_API thinkv_status thinkv_sequence_copy(thinkv_sequence* sequence, thinkv_sequence** copy,
                                              thinkv_error* error);

/* ---- about ---- */

THINKV_API const char* thinkv_version(void); /* "0.1.0" */
THINKV_API const char* thinkv_status_name(thinkv_status status);

/* ---- hints for policies with rules ---- */

/* q: [count, q_heads, head_dim], the newest queries of the prompt after rotary embedding, up to all
 * of them: the policy's scores.prompt_queries says how many count, and scores.spread from where;
 * where k and v of the prompt lie; optional, for all layers or for none, each once after its
 * prefill and before prefill_end, the same count. Rules that fire at the prompt's end look at them;
 * without them they wait for the first decode steps. Policies without such rules take the call and
 * ignore it. On the cuda backend q is read in the order of the stream and not kept: it may be
 * written again by work that comes later there. */
THINKV_API thinkv_status thinkv_sequence_prefill_queries(thinkv_sequence* sequence, uint32_t layer,
                                                         const thinkv_tensor* q,
                                                         thinkv_error* error);
/* Class bits (bit n: class n) of the tokens at positions first, first + 1, ...; before or after
 * they come, as often as wanted, not while a step is open. What was never given is 0. Policies
 * whose rules read no classes take the call and ignore it. A byte a position, in pages of the
 * sequence's metadata. On the cuda backend the call waits for the stream. Errors: EXHAUSTED,
 * QUOTA_EXCEEDED, UNSUPPORTED (positions that are too late: millions). */
THINKV_API thinkv_status thinkv_sequence_token_classes(thinkv_sequence* sequence, uint32_t first,
                                                       const uint8_t* classes, size_t count,
                                                       thinkv_error* error);

/* ---- hint for policies with a tier ---- */

/* q: [q_heads, head_dim] in host memory: a guess of the query that this layer will attend with in
 * the open step. The rows that the step fetches from the tier are chosen by it now, and not again
 * by the step's own query, without which the result is the same kind of choice, made later.
 * Optional, at any time in a step, for any layers. Policies without a tier take the call and ignore
 * it. On the cuda backend q is in GPU memory, and the sequence in a batch: the call enqueues the
 * choice, for the step that begin() began; the rows are copied when the layer attends. It can be
 * captured, and run on another stream (thinkv_model_set_stream) beside the layers before, if the
 * engine orders it behind begin() and before the layer's attend.
 * Errors: INVALID_ARGUMENT where the sequence is in no step. */
THINKV_API thinkv_status thinkv_sequence_prefetch(thinkv_sequence* sequence, uint32_t layer,
                                                  const thinkv_tensor* q, thinkv_error* error);

#ifdef __cplusplus
}
#endif
#endif /* THINKV_THINKV_H_ */
