// The XLA FFI handlers. handlers.cc is the only file that knows XLA: it checks buffers against attributes, wraps XLA's
// thread pool as an Executor and calls the operations of conv.h.
#pragma once

#include <utility>
#include <vector>

namespace sparsetrain {

// Target names with their handlers (XLA_FFI_Handler*). Names and attributes are a versioned interface: exported
// programs carry them.
std::vector<std::pair<const char*, void*>> registrations();

}  // namespace sparsetrain
