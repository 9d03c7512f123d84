// ipc.cpp: latencies between a client and a running thinkvd (THINKV_SOCKET); tools/bench/bench
// starts one. Prints p50, p99 and the number of samples of each, as a table or as JSON.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "client/objects.h"
#include "client/session.h"

namespace thinkv::bench {
namespace {

using client::Clock;
using std::chrono::microseconds;

struct Row {
  const char* name;
  const char* what;
  std::vector<double> ns;
};

double percentile(std::vector<double>& sorted, double share) {
  const size_t index = static_cast<size_t>(share * static_cast<double>(sorted.size() - 1));
  return sorted[index];
}

double since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

[[noreturn]] void fail(const Error& error) {
  std::fprintf(stderr, "bench ipc: %s\n", error.what);
  std::exit(1);
}
template <class T>
T must(Result<T> result) {
  if (!result) fail(result.error());
  return std::move(result).value();
}
void must(const Status& status) {
  if (!status) fail(status.error());
}

Row round_trips(const char* name, const char* what, client::Session& session, int count,
                microseconds pause) {
  Row row{name, what, {}};
  for (int i = 0; i < count; ++i) {
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    const auto start = Clock::now();
    must(session.ping());
    row.ns.push_back(since(start));
  }
  return row;
}

// A take is shorter than reading a clock, so one sample is the mean of 1,024.
Row lease_pop(client::Session& session, uint32_t page_class) {
  constexpr uint32_t kPages = 1024;
  Row row{"lease_pop", "one page from the private stack (mean of 1024)", {}};
  const auto source = session.make_source(page_class);
  for (int i = 0; i < 2000; ++i) {
    must(source->reserve(kPages));
    std::vector<PageId> pages(kPages);
    const auto start = Clock::now();
    for (PageId& page : pages) page = source->take();
    row.ns.push_back(since(start) / kPages);
    for (const PageId page : pages) source->give_back(page);
  }
  return row;
}

// What a step pays for its pages: from the lease into the sequence's stack, and back.
Row lease_reserve(client::Session& session, uint32_t page_class) {
  Row row{"lease_reserve", "reserve 96 pages from the lease and settle", {}};
  const auto source = session.make_source(page_class);
  for (int i = 0; i < 5000; ++i) {
    const auto start = Clock::now();
    must(source->reserve(96));
    source->settle();
    row.ns.push_back(since(start));
  }
  return row;
}

void sequences(const ModelGeometry& geometry, std::vector<Row>& rows) {
  Row open{"sequence_open", "open a sequence of 30 layers x 3 heads", {}};
  Row close{"sequence_close", "close it", {}};
  const client::Handle handle = must(client::open_client(
      {.socket_path = client::control_socket_path(nullptr), .client_name = "bench"}, 1));
  const client::Handle model = must(client::open_model(handle, geometry, "bench"));
  for (int i = 0; i < 2000; ++i) {
    auto start = Clock::now();
    const client::Handle sequence = must(client::open_sequence(model, {.policy = "thinkv"}));
    open.ns.push_back(since(start));
    start = Clock::now();
    client::close_sequence(sequence);
    close.ns.push_back(since(start));
  }
  client::close_client(handle);
  rows.push_back(std::move(open));
  rows.push_back(std::move(close));
}

Row attach(const client::SessionOptions& options) {
  Row row{"attach", "connect, receive and map the rings", {}};
  for (int i = 0; i < 200; ++i) {
    const auto start = Clock::now();
    const auto session = must(client::Session::open(options));
    row.ns.push_back(since(start));
  }
  return row;
}

void print(std::vector<Row>& rows, bool json) {
  std::printf(json ? "{\"unit\": \"ns\"" : "%-18s %12s %12s %8s\n", "ns", "p50", "p99", "n");
  for (Row& row : rows) {
    std::sort(row.ns.begin(), row.ns.end());
    const double p50 = percentile(row.ns, 0.5);
    const double p99 = percentile(row.ns, 0.99);
    if (json) {
      std::printf(",\n \"%s\": {\"p50\": %.2f, \"p99\": %.2f, \"n\": %zu}", row.name, p50, p99,
                  row.ns.size());
    } else {
      std::printf("%-18s %12.1f %12.1f %8zu  %s\n", row.name, p50, p99, row.ns.size(), row.what);
    }
  }
  if (json) std::printf("}\n");
}

void run(bool json) {
  const ModelGeometry geometry{.layers = 30, .q_heads = 9, .kv_heads = 3, .head_dim = 64};
  const client::SessionOptions options{.socket_path = client::control_socket_path(nullptr),
                                       .client_name = "bench"};
  std::vector<Row> rows;
  {
    const auto session = must(client::Session::open(options));
    must(session->register_model(geometry, "bench"));
    session->set_spin(std::chrono::milliseconds(100));
    round_trips("warm", "", *session, 1000, microseconds(0));
    rows.push_back(
        round_trips("ring_spinning", "both sides spin", *session, 20'000, microseconds(0)));
    // Longer than the daemon stays hot, so both sides sleep: bell and futex.
    session->set_spin(microseconds(0));
    rows.push_back(
        round_trips("ring_sleeping", "both sides sleep", *session, 1000, microseconds(500)));
    rows.push_back(lease_pop(*session, page_class(geometry.head_dim)));
    rows.push_back(lease_reserve(*session, page_class(geometry.head_dim)));
  }
  sequences(geometry, rows);
  rows.push_back(attach(options));
  print(rows, json);
}

}  // namespace
}  // namespace thinkv::bench

int main(int argc, char** argv) {
  const bool json = argc > 1 && std::strcmp(argv[1], "--json") == 0;
  if (argc > 2 || (argc == 2 && !json)) {
    std::fprintf(stderr, "usage: thinkv_bench_ipc [--json]   (THINKV_SOCKET names the daemon)\n");
    return 2;
  }
  thinkv::bench::run(json);
  return 0;
}
