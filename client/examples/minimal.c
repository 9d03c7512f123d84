#include <stdio.h>
#include <thinkv/thinkv.h>
static float k[128], v[128], q[256], out[256]; /* one token: 2 KV heads, 4 query heads of 64 */
int main(void) {
  thinkv_client* client;
  thinkv_error error = THINKV_ERROR_INIT;
  if (thinkv_client_open(NULL, &client, &error)) return fprintf(stderr, "%s\n", error.text), 1;
  thinkv_model_options shape = THINKV_MODEL_OPTIONS_INIT;
  shape.layers = 1, shape.q_heads = 4, shape.kv_heads = 2, shape.head_dim = 64;
  thinkv_model* model;
  thinkv_sequence* sequence;
  int failed = thinkv_model_open(client, &shape, &model, &error) ||
               thinkv_sequence_open(model, NULL, &sequence, &error);
  thinkv_tensor kt = {k, THINKV_FLOAT32, 3, {1, 2, 64}}, vt = {v, THINKV_FLOAT32, 3, {1, 2, 64}};
  thinkv_tensor qt = {q, THINKV_FLOAT32, 3, {1, 4, 64}};
  thinkv_output ot = {out, THINKV_FLOAT32, 3, {1, 4, 64}};
  for (int token = 0; token < 2000 && !failed; ++token) {
    for (int i = 0; i < 128; ++i) k[i] = (float)((token * 31 + i * 7) % 11) - 5.0f, v[i] = 1.0f;
    thinkv_step* step; /* one token of each sequence of a batch */
    failed = thinkv_step_begin(model, &sequence, 1, &step, &error);
    failed = failed || thinkv_step_append(step, 0, &kt, &vt, &error); /* for each layer */
    failed = failed || thinkv_step_attend(step, 0, &qt, &ot, NULL, &error);
    failed = failed || thinkv_step_end(step, &error);
  }
  thinkv_sequence_stats stats = {.struct_size = sizeof stats};
  failed = failed || thinkv_sequence_get_stats(sequence, &stats, &error);
  if (failed) return fprintf(stderr, "%s\n", error.text), 1;
  printf("%d tokens, attention %.2f, %d bytes held, 16 bits would take %d\n", (int)stats.tokens,
         out[0], (int)stats.bytes_held, (int)stats.bytes_f16);
  thinkv_client_close(client); /* gives every page back */
}
