#include "daemon/ipc/process_table.h"

#include <algorithm>

#include "daemon/ipc/peer.h"

namespace thinkv::ipc {

ProcessTable::ProcessTable(boost::asio::io_context& io, std::function<void(uint64_t key)> exited)
    : io_(io), exited_(std::move(exited)) {}

uint64_t ProcessTable::connect(uint32_t pid, uint32_t uid, UniqueFd pidfd) {
  for (auto& [key, process] : processes_) {
    // The same pid twice: the same process, unless the first has ended and we did not notice yet.
    if (process.pid == pid && !process_ended(process.pidfd->native_handle())) {
      ++process.connections;
      return key;
    }
  }
  const uint64_t key = ++last_key_;
  Process& process = processes_[key];
  process.pid = pid;
  process.uid = uid;
  process.connections = 1;
  process.pidfd = std::make_unique<boost::asio::posix::stream_descriptor>(io_, pidfd.release());
  watch(key, process);
  return key;
}

void ProcessTable::watch(uint64_t key, Process& process) {
  process.pidfd->async_wait(boost::asio::posix::stream_descriptor::wait_read,
                            [this, key](const boost::system::error_code& error) {
                              const auto found = processes_.find(key);
                              if (error || found == processes_.end()) return;
                              processes_.erase(found);
                              exited_(key);
                            });
}

void ProcessTable::mark_mapper(uint64_t key) {
  const auto found = processes_.find(key);
  if (found != processes_.end()) found->second.mapper = true;
}

bool ProcessTable::disconnect(uint64_t key) {
  const auto found = processes_.find(key);
  if (found == processes_.end()) return false;
  Process& process = found->second;
  if (process.connections > 0) --process.connections;
  if (process.connections > 0 || process.mapper) return false;
  processes_.erase(found);
  return true;
}

uint32_t ProcessTable::count_of_user(uint32_t uid) const {
  return static_cast<uint32_t>(
      std::count_if(processes_.begin(), processes_.end(), [uid](const auto& entry) {
        return entry.second.uid == uid && entry.second.connections == 0;
      }));
}

}  // namespace thinkv::ipc
