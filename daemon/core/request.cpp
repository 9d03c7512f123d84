// Ring requests: every field of the descriptor is a client's word.
#include <algorithm>

#include "daemon/core/service_impl.h"
#include "thinkv/internal/check.h"

namespace thinkv::core {
namespace {

using protocol::Completion;
using protocol::Op;
using protocol::Request;

bool known(uint16_t op) {
  return op >= static_cast<uint16_t>(Op::kPing) && op <= static_cast<uint16_t>(Op::kClientStats);
}

// Fields that an operation does not use must be zero: they may get a meaning later.
struct Uses {
  bool handle;
  uint32_t args;
};
Uses uses_of(Op op) {
  switch (op) {
    case Op::kPing:
      return {false, 0};
    case Op::kOpenSequence:
      return {false, 3};
    case Op::kCloseSequence:
      return {true, 0};
    case Op::kSetBudget:
      return {true, 1};
    case Op::kNeedPages:
      return {false, 2};
    case Op::kClientStats:
      return {false, 0};
  }
  return {false, 0};
}

Status check_shape(const Request& request) {
  if (!known(request.op)) {
    return make_error(ErrorCode::kUnsupported, "unknown operation");
  }
  if (request.size != sizeof(Request)) {
    return make_error(ErrorCode::kInvalidArgument, "wrong descriptor size");
  }
  const Uses uses = uses_of(static_cast<Op>(request.op));
  bool zero = request.flags == 0 && request.reserved0 == 0 && request.reserved1 == 0;
  zero = zero && (uses.handle || request.handle == 0);
  for (uint32_t i = uses.args; i < std::size(request.arg); ++i) zero = zero && request.arg[i] == 0;
  if (!zero) return make_error(ErrorCode::kInvalidArgument, "reserved field is not zero");
  return {};
}

Completion ok(const Request& request) {
  Completion completion{};
  completion.user_data = request.user_data;
  return completion;
}

}  // namespace

void Service::Impl::complete(ClientSlot slot, uint16_t op, const Completion& completion) {
  const auto code = static_cast<uint32_t>(completion.status);
  THINKV_CHECK(code < kErrorCodes);
  ++counters_.requests[known(op) ? op : 0][code];
  act(Complete{clients_.at(slot).id, completion});
}

void Service::Impl::fail(ClientSlot slot, const Request& request, const Error& error) {
  Completion completion = ok(request);
  completion.status = static_cast<int32_t>(error.code);
  complete(slot, request.op, completion);
}

void Service::Impl::on(const RequestArrived& event) {
  const std::optional<ClientSlot> slot = clients_.find(event.client);
  if (!slot) return;
  if (const Status shape = check_shape(event.request); !shape) {
    return fail(*slot, event.request, shape.error());
  }
  answer(event, *slot);
}

// Requires: check_shape accepted the request.
void Service::Impl::answer(const RequestArrived& event, ClientSlot slot) {
  const Request& request = event.request;
  switch (static_cast<Op>(request.op)) {
    case Op::kPing:
      return complete(slot, request.op, ok(request));
    case Op::kOpenSequence: {
      const Result<Completion> opened = open_sequence(slot, request);
      if (!opened) return fail(slot, request, opened.error());
      return complete(slot, request.op, *opened);
    }
    case Op::kCloseSequence: {
      const Result<Sequence*> found = sequences_.find(slot, request.handle);
      if (!found) return fail(slot, request, found.error());
      close_sequence(SequenceId(request.handle));
      return complete(slot, request.op, ok(request));
    }
    case Op::kSetBudget: {
      if (const Status set = set_budget(slot, request); !set) {
        return fail(slot, request, set.error());
      }
      return complete(slot, request.op, ok(request));
    }
    case Op::kNeedPages:
      return need_pages(slot, request);
    case Op::kClientStats: {
      Completion completion = client_stats(slot);
      completion.user_data = request.user_data;
      return complete(slot, request.op, completion);
    }
  }
}

// arg: model id, policy id, budget tokens (0: the policy's). result: sequence id, effective budget.
Result<Completion> Service::Impl::open_sequence(ClientSlot slot, const Request& request) {
  Client& client = clients_.at(slot);
  if (request.arg[0] == 0 || request.arg[0] > client.models.size()) {
    return make_error(ErrorCode::kNotFound, "no such model");
  }
  THINKV_ASSIGN_OR_RETURN(Policy * policy, policies_.by_id(request.arg[1]));
  if (request.arg[2] > limits::kTokensMax) {
    return make_error(ErrorCode::kInvalidArgument, "the budget is more than a sequence can hold");
  }
  if (client.sequences == limits::kSequencesPerClientMax) {
    return make_error(ErrorCode::kExhausted, "the client has its maximum of sequences");
  }
  const uint32_t budget =
      request.arg[2] != 0 ? static_cast<uint32_t>(request.arg[2]) : policy->params.budget_tokens;
  const SequenceId id = sequences_.open({.client = slot,
                                         .model = ModelId(static_cast<uint32_t>(request.arg[0])),
                                         .policy = policy->id,
                                         .budget_tokens = budget});
  ++policy->sequences;
  ++client.sequences;
  ++tenants_.at(client.tenant).sequences;
  ++counters_.sequences_opened;
  Completion completion = ok(request);
  completion.result[0] = id.value();
  completion.result[1] = budget;
  return completion;
}

void Service::Impl::close_sequence(SequenceId id) {
  const Sequence sequence = sequences_.at(id);
  const Result<Policy*> policy = policies_.by_id(sequence.policy.value());
  THINKV_CHECK(policy.has_value() && (*policy)->sequences > 0);
  --(*policy)->sequences;
  Client& client = clients_.at(sequence.client);
  THINKV_CHECK(client.sequences > 0 && tenants_.at(client.tenant).sequences > 0);
  --client.sequences;
  --tenants_.at(client.tenant).sequences;
  ++counters_.sequences_closed;
  sequences_.close(id);
}

Status Service::Impl::set_budget(ClientSlot slot, const Request& request) {
  THINKV_ASSIGN_OR_RETURN(Sequence * sequence, sequences_.find(slot, request.handle));
  if (request.arg[0] > limits::kTokensMax) {
    return make_error(ErrorCode::kInvalidArgument, "the budget is more than a sequence can hold");
  }
  const Result<Policy*> policy = policies_.by_id(sequence->policy.value());
  THINKV_CHECK(policy.has_value());
  sequence->budget_tokens =
      request.arg[0] != 0 ? static_cast<uint32_t>(request.arg[0]) : (*policy)->params.budget_tokens;
  return {};
}

Completion Service::Impl::client_stats(ClientSlot slot) const {
  const Client& client = clients_.at(slot);
  const Tenant& tenant = tenants_.at(client.tenant);
  Completion completion{};
  for (const Lease& lease : client.leases) completion.result[0] += lease.granted;
  completion.result[1] = tenant.used_bytes;
  completion.result[2] = tenant.limit_bytes;
  const uint64_t retired =
      uint64_t{extents_.in_state(ExtentState::kRetired)} * extents_.extent_bytes();
  completion.result[3] = pool_bytes() - granted_bytes_ - retired;
  completion.result[4] = pool_bytes();
  return completion;
}

void Service::Impl::need_pages(ClientSlot slot, const Request& request) {
  Client& client = clients_.at(slot);
  if (request.arg[0] >= kPageClassCount || client.leases[request.arg[0]].models == 0) {
    return fail(slot, request,
                make_error(ErrorCode::kInvalidArgument, "no registered model has this page class"));
  }
  if (request.arg[1] > limits::kGrantRing) {
    return fail(slot, request,
                make_error(ErrorCode::kInvalidArgument, "more pages than the grant ring holds"));
  }
  // The shell keeps requests in flight within the ring; this bounds our memory if it does not.
  if (client.pending >= limits::kRequestRing) {
    return fail(slot, request, make_error(ErrorCode::kExhausted, "too many requests wait"));
  }
  const Need need{.client = slot,
                  .user_data = request.user_data,
                  .page_class = static_cast<uint32_t>(request.arg[0]),
                  .pages = static_cast<uint32_t>(request.arg[1])};
  const Outcome outcome = try_need(need);
  if (outcome != Outcome::kWait) return finish_need(need, outcome);
  needs_.push_back(need);
  ++client.pending;
}

}  // namespace thinkv::core
