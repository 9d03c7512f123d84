/* consumer.c: thinkv.h used by a C11 program, in named phases. Needs THINKV_SOCKET. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thinkv/thinkv.h>

static const char* phase = "";
static void start_phase(const char* name) {
  phase = name;
  fprintf(stderr, "== %s\n", name);
}
static void check(int ok, const char* what, int line) {
  if (ok) return;
  fprintf(stderr, "%s, line %d: %s\n", phase, line, what);
  exit(1);
}
#define CHECK(condition) check((condition), #condition, __LINE__)
static thinkv_error error = THINKV_ERROR_INIT;
#define OK(call)                                             \
  do {                                                       \
    if ((call) != THINKV_OK) check(0, error.text, __LINE__); \
  } while (0)
#define FAILS(call, expected, words)                                         \
  do {                                                                       \
    memset(error.text, 0, sizeof(error.text));                               \
    CHECK((call) == (expected));                                             \
    CHECK(error.code == (expected));                                         \
    if (strstr(error.text, (words)) == NULL) check(0, error.text, __LINE__); \
  } while (0)

enum { kHeads = 2, kQueries = 4, kDim = 64 };
static float k[kHeads * kDim], v[kHeads * kDim], q[kQueries * kDim], out[kQueries * kDim];
static const thinkv_tensor kt = {k, THINKV_FLOAT32, 3, {1, kHeads, kDim}};
static const thinkv_tensor vt = {v, THINKV_FLOAT32, 3, {1, kHeads, kDim}};
static const thinkv_tensor qt = {q, THINKV_FLOAT32, 3, {1, kQueries, kDim}};
static const thinkv_output ot = {out, THINKV_FLOAT32, 3, {1, kQueries, kDim}};

static thinkv_model_options shape_of_model(void) {
  thinkv_model_options shape = THINKV_MODEL_OPTIONS_INIT;
  shape.layers = 1;
  shape.q_heads = kQueries;
  shape.kv_heads = kHeads;
  shape.head_dim = kDim;
  return shape;
}

static void decode(thinkv_model* model, thinkv_sequence* sequence, int tokens) {
  for (int token = 0; token < tokens; ++token) {
    for (int i = 0; i < kHeads * kDim; ++i) {
      k[i] = sinf((float)(token * 7 + i));
      v[i] = 2.0f;
    }
    thinkv_step* step = NULL;
    OK(thinkv_step_begin(model, &sequence, 1, &step, &error));
    OK(thinkv_step_append(step, 0, &kt, &vt, &error));
    OK(thinkv_step_attend(step, 0, &qt, &ot, NULL, &error));
    OK(thinkv_step_end(step, &error));
  }
}

static void bad_hints(thinkv_sequence* sequence) {
  FAILS(thinkv_sequence_prefill_queries(sequence, 0, NULL, &error), THINKV_INVALID_ARGUMENT,
        "q is null");
  FAILS(thinkv_sequence_prefill_queries(sequence, 0, &kt, &error), THINKV_INVALID_ARGUMENT,
        "expected [n, 4, 64]");
  FAILS(thinkv_sequence_token_classes(sequence, 0, NULL, 3, &error), THINKV_INVALID_ARGUMENT,
        "classes is null");
  OK(thinkv_sequence_token_classes(sequence, 0, NULL, 0, &error));
  FAILS(thinkv_sequence_prefetch(sequence, 0, NULL, &error), THINKV_INVALID_ARGUMENT, "q is null");
  thinkv_tensor bad = qt;
  bad.ndim = 2;
  bad.shape[0] = qt.shape[1];
  bad.shape[1] = qt.shape[2];
  FAILS(thinkv_sequence_prefetch(sequence, 0, &bad, &error), THINKV_INVALID_ARGUMENT, "no step");
}

static void null_arguments(void) {
  start_phase("null arguments");
  thinkv_client* client = NULL;
  thinkv_model* model = NULL;
  thinkv_sequence* sequence = NULL;
  FAILS(thinkv_client_open(NULL, NULL, &error), THINKV_INVALID_ARGUMENT, "client is null");
  FAILS(thinkv_client_ping(NULL, &error), THINKV_INVALID_ARGUMENT, "client is null");
  FAILS(thinkv_sequence_open(NULL, NULL, &sequence, &error), THINKV_INVALID_ARGUMENT, "null");
  FAILS(thinkv_step_end(NULL, &error), THINKV_INVALID_ARGUMENT, "step is null");
  FAILS(thinkv_client_ping((thinkv_client*)&client, &error), THINKV_INVALID_ARGUMENT,
        "not a client handle");
  CHECK(thinkv_client_ping(NULL, NULL) == THINKV_INVALID_ARGUMENT);
  thinkv_client_close(NULL);
  thinkv_model_close(NULL);
  thinkv_sequence_close(NULL);
  thinkv_step_cancel(NULL);
  thinkv_string_free(NULL);
  OK(thinkv_client_open(NULL, &client, &error));
  FAILS(thinkv_model_open(client, NULL, &model, &error), THINKV_INVALID_ARGUMENT, "options");
  FAILS(thinkv_client_pool_stats(client, NULL, &error), THINKV_INVALID_ARGUMENT, "null");
  FAILS(thinkv_client_status_json(client, NULL, &error), THINKV_INVALID_ARGUMENT, "null");
  const thinkv_model_options shape = shape_of_model();
  OK(thinkv_model_open(client, &shape, &model, &error));
  FAILS(thinkv_step_begin(model, NULL, 1, NULL, &error), THINKV_INVALID_ARGUMENT, "sequences");
  OK(thinkv_sequence_open(model, NULL, &sequence, &error));
  FAILS(thinkv_sequence_prefill(sequence, 0, NULL, &vt, &error), THINKV_INVALID_ARGUMENT, "k is");
  thinkv_tensor bad = kt;
  bad.data = NULL;
  FAILS(thinkv_sequence_prefill(sequence, 0, &bad, &vt, &error), THINKV_INVALID_ARGUMENT,
        "k: data is null");
  bad.data = (const char*)k + 1;
  FAILS(thinkv_sequence_prefill(sequence, 0, &bad, &vt, &error), THINKV_INVALID_ARGUMENT,
        "not aligned to 4");
  bad = kt;
  bad.ndim = 9;
  FAILS(thinkv_sequence_prefill(sequence, 0, &bad, &vt, &error), THINKV_INVALID_ARGUMENT, "ndim");
  bad = kt;
  bad.dtype = 7;
  FAILS(thinkv_sequence_prefill(sequence, 0, &bad, &vt, &error), THINKV_UNSUPPORTED, "type 7");
  bad_hints(sequence);
  thinkv_client_close(client);
}

static void struct_sizes(void) {
  start_phase("structs of other versions");
  thinkv_client* client = NULL;
  thinkv_client_options options = THINKV_CLIENT_OPTIONS_INIT;
  options.struct_size = 4;
  FAILS(thinkv_client_open(&options, &client, &error), THINKV_INVALID_ARGUMENT, "struct_size");
  options.struct_size = offsetof(thinkv_client_options, timeout_ms); /* before timeout_ms */
  options.timeout_ms = 0xFFFFFFFFu;                                  /* not read then */
  options.reserved[0] = 1;
  OK(thinkv_client_open(&options, &client, &error));
  options.struct_size = sizeof(options);
  thinkv_client* other = NULL;
  FAILS(thinkv_client_open(&options, &other, &error), THINKV_INVALID_ARGUMENT, "reserved");
  struct {
    thinkv_client_options known;
    unsigned char later[8];
  } newer;
  memset(&newer, 0, sizeof(newer));
  newer.known.struct_size = sizeof(newer);
  OK(thinkv_client_open(&newer.known, &other, &error));
  thinkv_client_close(other);
  newer.later[3] = 1;
  FAILS(thinkv_client_open(&newer.known, &other, &error), THINKV_UNSUPPORTED, "does not know");

  thinkv_pool_stats stats;
  memset(&stats, 0xAB, sizeof(stats));
  stats.struct_size = offsetof(thinkv_pool_stats, pool_name); /* before pool_name */
  OK(thinkv_client_pool_stats(client, &stats, &error));
  CHECK(strcmp(stats.backend, "host") == 0 && stats.pool_bytes > 0);
  CHECK((unsigned char)stats.pool_name[0] == 0xAB); /* not written past the caller's size */
  stats.struct_size = 8;
  FAILS(thinkv_client_pool_stats(client, &stats, &error), THINKV_INVALID_ARGUMENT, "struct_size");

  thinkv_error small;
  memset(&small, 0x55, sizeof(small));
  small.struct_size = 12; /* code and os_error only */
  CHECK(thinkv_client_ping(NULL, &small) == THINKV_INVALID_ARGUMENT);
  CHECK(small.code == THINKV_INVALID_ARGUMENT && small.text[0] == 0x55);
  small.struct_size = offsetof(thinkv_error, text) + 5;
  CHECK(thinkv_client_ping(NULL, &small) == THINKV_INVALID_ARGUMENT);
  CHECK(strcmp(small.text, "the ") == 0 && small.text[5] == 0x55);
  thinkv_client_close(client);
}

static void pools(void) {
  start_phase("pools");
  thinkv_client* client = NULL;
  thinkv_client_options options = THINKV_CLIENT_OPTIONS_INIT;
  options.pool_name = "default";
  OK(thinkv_client_open(&options, &client, &error));
  thinkv_pool_stats stats = {.struct_size = sizeof(stats)};
  OK(thinkv_client_pool_stats(client, &stats, &error));
  CHECK(strcmp(stats.pool_name, "default") == 0);
  thinkv_client_close(client);
  options.pool_name = "elsewhere";
  FAILS(thinkv_client_open(&options, &client, &error), THINKV_NOT_FOUND, "no pool 'elsewhere'");
  options.pool_name = NULL;
  options.reserved0 = 1;
  FAILS(thinkv_client_open(&options, &client, &error), THINKV_INVALID_ARGUMENT, "reserved");
}

static void main_path(void) {
  start_phase("main path");
  thinkv_client* client = NULL;
  thinkv_model* model = NULL;
  thinkv_sequence* sequence = NULL;
  errno = 4711;
  OK(thinkv_client_open(NULL, &client, &error));
  const thinkv_model_options shape = shape_of_model();
  OK(thinkv_model_open(client, &shape, &model, &error));
  thinkv_sequence_options options = THINKV_SEQUENCE_OPTIONS_INIT;
  options.policy_name = "k4v4-only";
  options.budget_tokens = THINKV_BUDGET_NONE;
  OK(thinkv_sequence_open(model, &options, &sequence, &error));
  decode(model, sequence, 100);
  CHECK(errno == 4711);
  CHECK(fabsf(out[0] - 2.0f) < 0.2f); /* all values are 2 */
  uint64_t count = 0;
  const uint32_t positions[] = {1, 2, 3};
  OK(thinkv_sequence_evict(sequence, positions, 3, &count, &error));
  CHECK(count == 3 * kHeads);
  OK(thinkv_sequence_quantize(sequence, 10, 19, "k2v2", &count, &error));
  CHECK(count == 10 * kHeads);
  thinkv_sequence_stats stats = {.struct_size = sizeof(stats)};
  OK(thinkv_sequence_get_stats(sequence, &stats, &error));
  CHECK(stats.tokens == 100 && stats.lanes == kHeads && stats.evicted_slots == 3 * kHeads);
  CHECK(stats.bytes_held == stats.pages * stats.page_bytes + stats.metadata_bytes);
  CHECK(stats.budget_tokens == 0 && stats.gathered_bytes == 0);
  char* json = NULL;
  OK(thinkv_client_status_json(client, &json, &error));
  CHECK(json != NULL && json[0] == '{');
  thinkv_string_free(json);
  OK(thinkv_client_ping(client, &error));
  CHECK(strcmp(thinkv_version(), "0.1.0") == 0);
  CHECK(strcmp(thinkv_status_name(THINKV_STALE), "stale handle") == 0);
  CHECK(strcmp(thinkv_status_name(77), "unknown error") == 0);
  thinkv_client_close(client);
  FAILS(thinkv_sequence_get_stats(sequence, &stats, &error), THINKV_STALE, "closed");
  FAILS(thinkv_client_ping(client, &error), THINKV_STALE, "the client was closed");
  thinkv_sequence_close(sequence);
  thinkv_client_close(client);
}

int main(void) {
  null_arguments();
  struct_sizes();
  pools();
  main_path();
  puts("ok");
  return 0;
}
