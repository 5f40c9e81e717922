// Which instructions of x86 a source file is compiled for. A file that is compiled for more than the machine's own
// instructions begins with FOVEATE_BEGIN_TARGET, after all headers that other files include too, and ends with
// FOVEATE_END_TARGET. On other machines it is empty. Only code that has asked the processor may call into it.
#pragma once

#define FOVEATE_AVX2 "avx2,fma,f16c"
#define FOVEATE_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," FOVEATE_AVX2

#define FOVEATE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FOVEATE_BEGIN_TARGET(names) FOVEATE_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define FOVEATE_END_TARGET FOVEATE_PRAGMA(clang attribute pop)
#else  // GCC compiles templates where the file ends, so the target must hold to the end
#define FOVEATE_BEGIN_TARGET(names) FOVEATE_PRAGMA(GCC target(names))
#define FOVEATE_END_TARGET
#endif
