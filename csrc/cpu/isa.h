// Compiles what lies between AT_FUSED_TARGET_BEGIN and AT_FUSED_TARGET_END for more than the baseline processor.
#pragma once

#define AT_FUSED_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define AT_FUSED_TARGET_BEGIN(features) \
  AT_FUSED_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define AT_FUSED_TARGET_END AT_FUSED_PRAGMA(clang attribute pop)
#else
#define AT_FUSED_TARGET_BEGIN(features) AT_FUSED_PRAGMA(GCC push_options) AT_FUSED_PRAGMA(GCC target(features))
#define AT_FUSED_TARGET_END AT_FUSED_PRAGMA(GCC pop_options)
#endif
