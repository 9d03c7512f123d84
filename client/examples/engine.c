/* engine.c: continuous batching on the pool, around a toy model. Usage: engine ROWS */
#include <stdio.h>
#include <stdlib.h>
#include <thinkv/thinkv.h>
enum { LAYERS = 2, KV = 2, Q = 4, DIM = 64, WORDS = 50, ROWS = 8, REQUESTS = 12, LENGTH = 160 };
typedef struct {
  int text[LENGTH], length, goal;
  thinkv_sequence* sequence;
} request;
static float k[ROWS * LENGTH * KV * DIM], v[ROWS * LENGTH * KV * DIM], q[ROWS * Q * DIM],
    out[ROWS * Q * DIM];
/* The toy model: a token's vectors are noise, its successor is the word that the attention likes.
 */
static float noise(int a, int b) {
  unsigned x = (unsigned)a * 2654435761u ^ (unsigned)b * 2246822519u;
  x = (x ^ x >> 15) * 3266489917u;
  return (float)((x ^ x >> 13) & 0xFFFF) / 32768.0f - 1.0f;
}
static void embed(float* to, int word, int seed, int count) {
  for (int i = 0; i < count; ++i) to[i] = noise(word * 31 + seed, i);
}
static int next_word(const float* x) {
  int best = 0;
  float most = -1e30f;
  for (int word = 0; word < WORDS; ++word) {
    float score = 0;
    for (int i = 0; i < Q * DIM; ++i) score += x[i] * noise(word, 7 + i);
    if (score > most) most = score, best = word;
  }
  return best;
}
/* The prompt but its last token, which the first step takes. EXHAUSTED: the pool has no room now.
 */
static int start(thinkv_model* model, request* r, thinkv_error* error) {
  thinkv_sequence_options options = THINKV_SEQUENCE_OPTIONS_INIT;
  options.policy_name = "full-f16";
  int failed = thinkv_sequence_open(model, &options, &r->sequence, error);
  for (int layer = 0; layer < LAYERS && !failed; ++layer) {
    for (int i = 0; i < r->length - 1; ++i) {
      embed(k + i * KV * DIM, r->text[i], layer, KV * DIM);
      embed(v + i * KV * DIM, r->text[i], 9 + layer, KV * DIM);
    }
    thinkv_tensor kt = {k, THINKV_FLOAT32, 3, {r->length - 1, KV, DIM}}, vt = kt;
    vt.data = v;
    failed = thinkv_sequence_prefill(r->sequence, (unsigned)layer, &kt, &vt, error);
  }
  failed = failed || thinkv_sequence_prefill_end(r->sequence, error);
  if (failed) thinkv_sequence_close(r->sequence), r->sequence = NULL;
  return failed ? error->code : 0;
}
/* One token for each running request. On EXHAUSTED nothing has changed. */
static int step_all(thinkv_model* model, request** run, int rows, thinkv_error* error) {
  thinkv_sequence* sequences[ROWS];
  thinkv_step* step;
  for (int i = 0; i < rows; ++i) sequences[i] = run[i]->sequence;
  if (thinkv_step_begin(model, sequences, (unsigned)rows, &step, error)) return error->code;
  thinkv_tensor kt = {k, THINKV_FLOAT32, 3, {rows, KV, DIM}}, vt = kt;
  thinkv_tensor qt = {q, THINKV_FLOAT32, 3, {rows, Q, DIM}};
  thinkv_output ot = {out, THINKV_FLOAT32, 3, {rows, Q, DIM}};
  vt.data = v;
  int failed = 0;
  for (int layer = 0; layer < LAYERS && !failed; ++layer) {
    for (int i = 0; i < rows; ++i) {
      const int word = run[i]->text[run[i]->length - 1];
      embed(k + i * KV * DIM, word, layer, KV * DIM);
      embed(v + i * KV * DIM, word, 9 + layer, KV * DIM);
      embed(q + i * Q * DIM, word, 17 + layer, Q * DIM);
    }
    failed = thinkv_step_append(step, (unsigned)layer, &kt, &vt, error) ||
             thinkv_step_attend(step, (unsigned)layer, &qt, &ot, NULL, error);
  }
  if (failed) return thinkv_step_cancel(step), error->code;
  if (thinkv_step_end(step, error)) return error->code;
  for (int i = 0; i < rows; ++i) run[i]->text[run[i]->length++] = next_word(out + i * Q * DIM);
  return 0;
}
int main(int count, char** arguments) {
  const int rows_max = count > 1 ? (int)strtol(arguments[1], NULL, 10) : 4;
  static request all[REQUESTS], *run[ROWS], *queue[REQUESTS]; /* the next one is the last */
  for (int i = 0; i < REQUESTS; ++i) {
    queue[REQUESTS - 1 - i] = &all[i];
    all[i].length = 2 + 3 * i, all[i].goal = all[i].length + 60 + i;
    for (int t = 0; t < all[i].length; ++t) all[i].text[t] = (i * 17 + t * t) % WORDS;
  }
  thinkv_error error = THINKV_ERROR_INIT;
  thinkv_client* client;
  thinkv_model* model;
  thinkv_model_options shape = THINKV_MODEL_OPTIONS_INIT;
  shape.layers = LAYERS, shape.q_heads = Q, shape.kv_heads = KV, shape.head_dim = DIM;
  if (rows_max < 1 || rows_max > ROWS) return fprintf(stderr, "1 to %d rows\n", ROWS), 2;
  if (thinkv_client_open(NULL, &client, &error) ||
      thinkv_model_open(client, &shape, &model, &error)) {
    return fprintf(stderr, "%s\n", error.text), 1;
  }
  int rows = 0, waiting = REQUESTS, waited = 0, full = 0;
  while (rows + waiting > 0) {
    int failed = 0;
    while (rows < rows_max && waiting > 0 && !failed && !full) { /* who may join: the pool says */
      if ((failed = start(model, queue[waiting - 1], &error)) == 0) run[rows++] = queue[--waiting];
    }
    if (rows > 0) failed = step_all(model, run, rows, &error);
    const int no_room = failed == THINKV_EXHAUSTED || failed == THINKV_QUOTA_EXCEEDED;
    if (failed && (!no_room || rows < 2)) return fprintf(stderr, "%s\n", error.text), 1;
    if (failed) { /* the youngest gives its pages back; it goes on once another one has ended */
      full = 1;
      queue[waiting++] = run[--rows], ++waited;
      thinkv_sequence_close(run[rows]->sequence);
    }
    for (int i = 0; i < rows;) {
      if (run[i]->length < run[i]->goal) {
        ++i;
        continue;
      }
      thinkv_sequence_close(run[i]->sequence), --rows, full = 0;
      for (int j = i; j < rows; ++j) run[j] = run[j + 1]; /* the youngest stays the last */
    }
  }
  fprintf(stderr, "%d times a sequence had to wait\n", waited);
  for (int i = 0; i < REQUESTS; ++i) {
    for (int t = 0; t < all[i].length; ++t) printf("%d ", all[i].text[t]);
    printf("\n");
  }
  thinkv_client_close(client);
  return 0;
}
