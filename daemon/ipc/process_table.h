// process_table.h: the processes behind connections, watched by pidfd until they are gone.
//
// A closed socket does not say that the memory a process mapped is unmapped: only its end does.
// A process is kept while it is connected or may still map an extent.
// Threads: the event loop only.
#pragma once

#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>

#include "thinkv/internal/unique_fd.h"

namespace thinkv::ipc {

class ProcessTable {
 public:
  // `exited` is called from the loop with the key of each process that ended.
  ProcessTable(boost::asio::io_context& io, std::function<void(uint64_t key)> exited);

  // The key of the process behind `pidfd`; one number for all connections of one process, never
  // used again. Requires: pidfd is of pid.
  [[nodiscard]] uint64_t connect(uint32_t pid, uint32_t uid, UniqueFd pidfd);
  // It got the descriptor of an extent: watch it to its end.
  void mark_mapper(uint64_t key);
  // One connection less. True: nothing of it can be mapped, and the process is forgotten.
  [[nodiscard]] bool disconnect(uint64_t key);

  [[nodiscard]] uint32_t count_of_user(uint32_t uid) const;
  [[nodiscard]] size_t size() const { return processes_.size(); }

 private:
  struct Process {
    uint32_t pid = 0;
    uint32_t uid = 0;
    uint32_t connections = 0;
    bool mapper = false;
    std::unique_ptr<boost::asio::posix::stream_descriptor> pidfd;
  };
  void watch(uint64_t key, Process& process);

  boost::asio::io_context& io_;
  std::function<void(uint64_t key)> exited_;
  std::unordered_map<uint64_t, Process> processes_;
  uint64_t last_key_ = 0;
};

}  // namespace thinkv::ipc
