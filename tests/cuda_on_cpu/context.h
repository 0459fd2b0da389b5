// Stacks and switching between them. swapcontext would do, but for a system call each time: on x86-64 that was
// most of a kernel's time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, . - simt_switch
)");

namespace simt {

class Context {
 public:
  // The next switch to this calls `entry`, which must not return.
  void start(void* stack, size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & -16);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    pointer_ = top;
  }
  void switch_to(Context& other) { simt_switch(&pointer_, other.pointer_); }

 private:
  void* pointer_ = nullptr;
};

}  // namespace simt

#else

#include <ucontext.h>

namespace simt {

class Context {
 public:
  void start(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack = {stack, 0, bytes};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

}  // namespace simt

#endif
